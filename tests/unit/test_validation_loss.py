"""The loss on held-out images while training, and the checkpoint that is best by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.comparison.validation_loss import ValidationLoss
from largescale.checkpoint.files import CheckpointDir, checkpoints
from largescale.checkpoint.weights import load_trained
from largescale.data.fixed_noise_set import VALIDATION_SEED, FixedNoiseSet
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.monitoring.telemetry import read_metrics
from largescale.training import validation_loss
from tests.conftest import RunHere, assert_same_run, cut, make_blobs
from tests.ranks import ranks_of

EVERY = ("--telemetry.validation-every", 4, "--telemetry.validation-images", 8)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blobs(tmp_path_factory.mktemp("held_out") / "held_out", rows=90, seed=7, prefix="held_out_")


def losses(run: Path) -> dict[int, dict[str, float]]:
    found = {}
    for row in read_metrics(run):
        if "validation/ema" in row:
            found[row["step"]] = {key: value for key, value in row.items() if key.startswith("validation/")}
    return found


def test_the_losses_of_held_out_images(held_out: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Those that eval.compare computes of the same checkpoint, and MLPerf's eight levels by hand; training does not notice."""
    options = ("--train.steps", 10, "--checkpoint.every", 4, "--checkpoint.keep-last", 9, "--optimizer.lr", 0.01)
    run = run_here(*options, "--data.validation", held_out, *EVERY)
    assert run.code == 0, run.err
    found = losses(run.run)
    assert [*found] == [4, 8, 10]
    assert_same_run(run_here(*options, output=tmp_path / "without").run, run.run)

    trained = load_trained(run.run, 8)
    data, edges = ShardDataset(held_out), tuple(i / 5 for i in range(6))
    by_compare = ValidationLoss(data, trained.config, edges, 8, 16, torch.device("cpu"))
    for name, kind in (("ema", None), ("raw", "raw")):
        model = load_trained(run.run, 8, kind).model
        clusters = by_compare(model, trained.objective)
        ours = [found[8][f"validation/{name}_C{i}"] for i in range(1, 6)]
        np.testing.assert_allclose(ours, clusters, rtol=1e-5)
        assert found[8][f"validation/{name}"] == pytest.approx(np.mean(clusters), rel=1e-5)
        rows = FixedNoiseSet(data, tuple(i / 8 for i in range(9)), 8, seed=VALIDATION_SEED, shape=(1, 16, 16), captions=False,
                             device=torch.device("cpu"), spread=False)
        assert sorted(set(rows.u.tolist())) == [(i + 0.5) / 8 for i in range(8)] and len(rows.u) == 64
        t = torch.floor(rows.u * 1000).long()
        with torch.no_grad():
            expected = trained.objective.training_losses(model, rows.x_start, t, rows.noise, rows.y).loss.mean()
        assert found[8][f"validation/{name}_8_levels"] == pytest.approx(float(expected), rel=1e-5)
    assert found[8]["validation/ema"] != found[8]["validation/raw"] and found[8]["validation/raw"] < found[4]["validation/raw"]
    more = run_here(*options, "--data.validation", held_out, "--telemetry.validation-every", 10, "--telemetry.validation-images", 16,
                    output=tmp_path / "more")
    assert [*losses(more.run)] == [10] and losses(more.run)[10] != found[10]


def test_the_same_on_two_ranks_and_after_a_cut(held_out: Path, blobs: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Rows are spread over the ranks in fixed batches: of the same weights every number is the same, bitwise."""
    options = ("--train.steps", 8, "--checkpoint.every", 4, "--data.validation", held_out, *EVERY)
    truth = run_here(*options, output=tmp_path / "truth")
    cut(truth.run, tmp_path / "cut", 4)
    assert run_here(*options, output=tmp_path / "cut").code == 0
    assert losses(tmp_path / "cut") == losses(truth.run)

    first = ("--train.steps", 1, "--data.validation", held_out, "--telemetry.validation-images", 5, "--optimizer.lr", 1e-30)
    one = run_here(*first, output=tmp_path / "one")
    done = ranks_of("-m", "largescale.train", "debug", "--data.path", blobs, "--output", tmp_path / "two", *first)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    assert losses(tmp_path / "two") == losses(one.run) != {}


def test_the_best_checkpoint_is_kept(held_out: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Written when the loss falls, kept until it falls again, over resumes; without the option nothing is."""
    given = {2: 5.0, 4: 3.0, 6: 4.0, 8: float("nan"), 10: 3.5, 12: 2.0, 14: 2.5, 16: 3.0}

    def figures(self: Any, engine: Any) -> dict[str, float]:
        step = int(engine._zero.optimizer.state[engine._master]["step"])
        return {"validation/ema": given[step], "validation/raw": -given[step]}

    monkeypatch.setattr(validation_loss.ValidationLoss, "__call__", figures)
    options = ("--checkpoint.every", 5, "--checkpoint.keep-last", 1, "--data.validation", held_out, "--telemetry.validation-every", 2)
    run = run_here("--train.steps", 10, *options, "--checkpoint.keep-best", "ema")
    assert run.code == 0, run.err
    assert [checkpoint.step for checkpoint in checkpoints(run.run)] == [10, 4]
    assert [row["validation/best_step"] for row in losses(run.run).values()] == [2, 4, 4, 4, 4]
    shutil.copytree(run.run, tmp_path / "lost")
    run = run_here("--train.steps", 14, *options, "--checkpoint.keep-best", "ema")
    assert [checkpoint.step for checkpoint in checkpoints(run.run)] == [14, 12]
    assert json.loads((CheckpointDir.at(run.run, 14).path / "manifest.json").read_text())["state"]["best"] == {
        "loss": 2.0, "steps": [2, 4, 12], "of": f"ema on 64 images a cluster of {ShardDataset(held_out).fingerprint}"}

    # The least loss on other images says nothing of these.
    other = run_here("--train.steps", 16, *options, "--checkpoint.keep-best", "ema", "--telemetry.validation-images", 8)
    assert losses(run.run)[16]["validation/best_step"] == 16 and "from here on it is that of ema on 8 images a cluster" in other.err

    shutil.rmtree(tmp_path / "lost/checkpoints/step_00000004")  # somebody has removed it: the one before does not come back
    again = run_here("--train.steps", 12, *options, "--checkpoint.keep-best", "ema", output=tmp_path / "lost")
    assert again.code == 0 and [checkpoint.step for checkpoint in checkpoints(again.run)] == [12, 10]  # 12 is the best, 10 the last of the others
    without = run_here("--train.steps", 10, *options, output=tmp_path / "without")
    assert [checkpoint.step for checkpoint in checkpoints(without.run)] == [10]
    raw = run_here("--train.steps", 6, *options, "--checkpoint.keep-best", "raw", output=tmp_path / "raw")
    assert [checkpoint.step for checkpoint in checkpoints(raw.run)] == [6, 2]


def test_sets_that_do_not_fit(held_out: Path, blobs: Path, captioned: Path, run_here: RunHere, tmp_path: Path) -> None:
    with ShardWriter(other := tmp_path / "other", DatasetInfo("blobs", "pixels", (1, 8, 8), 10)) as writer:
        writer.write(id="a", latent=np.zeros((1, 8, 8), np.uint8), label=3)
    mixed = make_blobs(tmp_path / "mixed", rows=20)  # the first rows of the training set
    for folder, message in (
        (other, f"--data.validation {other} has shape=(1, 8, 8), the training set {blobs} has (1, 16, 16)"),
        (captioned, "the training set"), (mixed, "shares 20 rows with the training set"), (tmp_path / "gone", "gone"),
    ):
        for dry in ((), ("--dry-run",)):
            run = run_here("--data.validation", folder, *dry, output=tmp_path / "run")
            assert run.code == 2 and message in run.err and "Traceback" not in run.err, run.err
    wrong = run_here("--checkpoint.keep-best", "ema", output=tmp_path / "run")
    assert wrong.code == 2 and "checkpoint.keep_best=ema must be none without data.validation" in wrong.err
    dry = run_here("--data.validation", held_out, "--checkpoint.keep-best", "ema", "--dry-run", output=tmp_path / "run")
    assert "for the 5 that are kept: the last 3, 0 for ever, 1 of a stop, the best" in dry.err
    assert dry.code == 0 and f"validation: {held_out}, 90 images; every 5,000 steps 1,664 forward passes" in dry.err
