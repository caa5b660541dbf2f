"""eval.gradients: gradients by cluster against finite differences, and dot products that chance does not raise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import curve, gradients
from eval.gradients import ClusterGradients, Gradients, cosines, dot_products, norms
from largescale.checkpoint.files import checkpoints
from largescale.checkpoint.weights import load_trained
from tests.conftest import RunHere, make_blobs


def measure(*args: object) -> int:
    return gradients.main([*map(str, args), "--device", "cpu"])


def test_dot_products_have_no_part_from_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0], [6, 0, 0, 0], [-1, 1, 0, 0]])
    found = []
    for _ in range(4000):
        found.append(dot_products(truth[:, None] + torch.randn(4, 2, 4, generator=generator)))
    mean = np.mean(found, 0)
    np.testing.assert_allclose(mean, (truth @ truth.T).numpy(), atol=0.5)       # a plain square would add 4 to the diagonal
    np.testing.assert_allclose(norms(mean), [3, 4, 6, 2**0.5], rtol=0.03)
    np.testing.assert_allclose(cosines(mean)[0], [1, 0, 1, -(0.5**0.5)], atol=0.03)
    assert np.isnan(cosines(dot_products(torch.tensor([[[1.0], [-1.0]], [[1.0], [1.0]]])))[0]).all()


def test_a_run(run_here: RunHere, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = make_blobs(tmp_path / "held_out", seed=1, prefix="other")
    # With a learned variance the loss has parts whose gradient is stopped: a difference of losses would not show it.
    run = run_here("--train.steps", 10, "--model.no-learn-sigma").run
    args = (run, "--validation", held_out, "--images", 8, "--batch-size", 2)
    assert measure(*args, "--every", 10) == 0
    rows = [json.loads(line) for line in (run / "gradients/results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10] and (run / "gradients/gradients.png").stat().st_size > 10_000
    # Another start adds what is new, and does not measure anything again.
    assert measure(*args, "--out", tmp_path / "out") == 0
    after = [json.loads(line) for line in (run / "gradients/results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in after] == [0, 10, 5] and after[:2] == rows
    assert [row["step"] for row in json.loads((tmp_path / "out/gradients.json").read_text())[str(run)]] == [0, 5, 10]

    # The loss along a gradient rises as fast as the gradient is long. In float64, where differences are exact enough.
    options = Gradients((run,), held_out, images=8, device="cpu")
    each = ClusterGradients(run, options)
    trained = load_trained(run, 10, "raw")
    trained.model.double()
    each._set.x_start, each._set.noise = each._set.x_start.double(), each._set.noise.double()
    halves = each.halves(trained)
    np.testing.assert_allclose(dot_products(halves), rows[1]["dot_products"], rtol=1e-3, atol=1e-7)
    weights = [weight for weight in trained.model.parameters() if weight.requires_grad]
    for cluster in (0, 4):
        direction = halves[cluster].mean(0)
        direction = direction / direction.norm()
        losses = []
        for step in (1e-4, -2e-4):
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights) + step * direction, weights)
            with torch.no_grad():
                of_rows = [loss for _, loss in each._set.losses(trained.model, trained.objective, 40, torch.device("cpu"), bool)]
            losses.append(torch.cat(of_rows).view(5, -1)[cluster].mean().item())
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights) + 1e-4 * direction, weights)
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(halves[cluster].mean(0).norm().item(), rel=1e-3)


def test_bad_input(run_here: RunHere, blobs: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 5).run
    held_out = make_blobs(tmp_path / "held_out", seed=1, prefix="other")
    checkpoints(run)[-1].remove()   # step 0, a multiple of everything
    for args, said in (
        ((run, "--validation", blobs, "--images", 7), "images=7 must be even"),
        ((run, "--validation", captioned), "error: --validation"),
        ((run, "--validation", tmp_path / "none"), "none"),
        ((tmp_path / "no_run", "--validation", blobs), "no_run"),
        ((run, "--validation", blobs), "error: --validation"),
        ((run, "--validation", held_out, "--every", 3), "keeps no checkpoint at a multiple of 3 steps"),
    ):
        assert measure(*args) == 2
        assert said in capsys.readouterr().err
    # Before anything is measured.
    again = run_here("--train.steps", 5, output=tmp_path / "again").run
    (tmp_path / "file").write_text("")
    for options, said in (
        ((again, run, "--every", 3), "keeps no checkpoint at a multiple of 3"),
        ((run, "--out", tmp_path / "file"), "cannot write to"),
        ((run, "--out", checkpoints(run)[0].path), "--out"),
    ):
        assert measure(*options, "--validation", held_out) == 2
        assert said in capsys.readouterr().err
    assert not (again / "gradients").exists() and not (run / "gradients").exists()


def test_other_data_than_were_trained_on(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of them nobody knows whether the images of --validation were trained on."""
    data = make_blobs(tmp_path / "data")
    held_out = make_blobs(tmp_path / "held_out", seed=1, prefix="other")
    run = run_here("--train.steps", 5, "--data.path", data, "--optimizer.ema-widths", 0.05, 0.1, "--checkpoint.ema-snapshot-every", 5).run
    shutil.rmtree(data)
    make_blobs(data, seed=2)
    widths = (run, "--num-samples", 0, "--ema-widths", 0.05, "--device", "cpu")
    for program in (lambda: measure(run, "--validation", held_out), lambda: curve.main([*map(str, widths), "--validation", str(held_out)])):
        assert program() == 2
        assert f"{data} holds other data than {run} was trained on, so which images are held out cannot be told" in capsys.readouterr().err
