"""SiT, EDM and every baseline in the trainer: what they draw, that they go on where they were, in every precision."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.sample import Sample, Sampler
from largescale.checkpoint_files import CheckpointDir
from largescale.noise_sampling import LossSecondMoment
from largescale.telemetry import read_metrics
from tests.conftest import RunHere, assert_same_run, cut, ds_json, trace

RESAMPLED = ("--noise.sampling", "loss_second_moment", "--diffusion.timesteps", 10)
SYSTEMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "sit": ("debug_sit", ()),
    "sit gvp": ("debug_sit", ("--diffusion.interpolant", "gvp", "--model.no-learn-sigma")),
    "edm": ("debug_edm", ()),
    "edm augmented": ("debug_edm", ("--model.unet.augment-dim", 9, "--data.augment", 0.5)),
    "edm with a DiT": ("debug", ("--diffusion.objective", "edm", "--model.no-learn-sigma")),
    "hard first": ("debug", ("--curriculum.order", "hard_first")),
    "separate stages": ("debug", ("--curriculum.stages", "separate")),
    "one cluster": ("debug", ("--curriculum.pacing", "none", "--curriculum.only-cluster", 2)),
    "naive": ("debug", ("--curriculum.pacing", "fixed", "--curriculum.interval", 3)),
    "resampled": ("debug", RESAMPLED),
    "resampled sit": ("debug_sit", RESAMPLED),
    "min-SNR": ("debug_sit", ("--noise.weighting", "min_snr")),
    "P2": ("debug_edm", ("--noise.weighting", "p2")),
    "SpeeD": ("debug", ("--noise.sampling", "speed", "--noise.weighting", "p2")),
    "logit-normal": ("debug_sit", ("--noise.sampling", "logit_normal")),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_goes_on_where_it_was(name: str, run_here: RunHere, tmp_path: Path) -> None:
    preset, args = SYSTEMS[name]
    args = ("--train.steps", 24, "--curriculum.patience", 1, "--checkpoint.every", 4, "--checkpoint.keep-last", 100, *args)
    truth = run_here(*args, preset=preset, output=tmp_path / "truth")
    assert truth.code == 0, truth.err
    for step in (0, 4, 12, 20):
        run = tmp_path / f"cut{step}"
        cut(truth.run, run, step)
        assert f"resumed {run} at step {step}," in run_here(*args, preset=preset, output=run).err
        assert_same_run(run, truth.run)
        shutil.rmtree(run)


def test_resampling_is_lost_with_its_state(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would see it."""
    args = ("--train.steps", 24, "--checkpoint.every", 12, "--curriculum.pacing", "none", *RESAMPLED)
    truth = run_here(*args, output=tmp_path / "truth").run
    state = CheckpointDir.at(truth, 12).manifest()["state"]["noise_sampler"]
    assert state, "its history is in the checkpoint"
    cut(truth, tmp_path / "cut", 12)
    monkeypatch.setattr(LossSecondMoment, "load_state_dict", lambda self, state: None)
    run_here(*args, output=tmp_path / "cut")
    assert trace(tmp_path / "cut") != trace(truth)


def clusters_drawn(rows: list[dict[str, Any]]) -> list[set[int]]:
    return [{int(key.removeprefix("cluster/C")) for key in row if key.startswith("cluster/C")} for row in rows]


@pytest.mark.parametrize("preset", ["debug", "debug_sit", "debug_edm"])
@pytest.mark.parametrize("order, stages", [("easy_first", "accumulating"), ("hard_first", "accumulating"),
                                           ("easy_first", "separate"), ("hard_first", "separate")])
def test_only_active_noise_levels_are_drawn(preset: str, order: str, stages: str, run_here: RunHere) -> None:
    """Each row's clusters are those of the stage that its step was drawn in: the one in force after the step before."""
    rows = run_here("--train.steps", 8, "--curriculum.pacing", "fixed", "--curriculum.interval", 1, "--curriculum.order", order,
                    "--curriculum.stages", stages, "--train.global-batch-size", 64, preset=preset).trace()
    of_stages: dict[tuple[str, str], list[set[int]]] = {
        ("easy_first", "accumulating"): [{5}, {4, 5}, {3, 4, 5}, {2, 3, 4, 5}],
        ("hard_first", "accumulating"): [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}],
        ("easy_first", "separate"): [{5}, {4}, {3}, {2}, {1}],
        ("hard_first", "separate"): [{1}, {2}, {3}, {4}, {5}],
    }
    expected = of_stages[order, stages]
    assert clusters_drawn(rows) == expected + [{1, 2, 3, 4, 5}] * (8 - len(expected))


def test_one_cluster_from_start_to_end(run_here: RunHere) -> None:
    rows = run_here("--train.steps", 3, "--curriculum.pacing", "none", "--curriculum.only-cluster", 4).trace()
    assert clusters_drawn(rows) == [{4}] * 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", ["debug_sit", "debug_edm"])
def test_in_half_precision(preset: str, precision: str, run_here: RunHere, tmp_path: Path) -> None:
    """Close to fp32, on the same inputs; the weights that train are half, the master weights not."""
    args = ("--train.steps", 8, "--curriculum.pacing", "none")
    full = run_here(*args, preset=preset, output=tmp_path / "fp32").trace()
    half = run_here(*args, "--train.ds-config", ds_json(precision, tmp_path), preset=preset, output=tmp_path / precision)
    assert half.code == 0, half.err
    losses = [[row["loss"] for row in rows] for rows in (full, half.trace())]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("preset, sampler, steps", [("debug_sit", "sde", 250), ("debug_edm", "heun", 18)])
def test_watched_and_sampled(preset: str, sampler: str, steps: int, run_here: RunHere, tmp_path: Path) -> None:
    """The reference loss, a preview, and eval.sample with the objective's own sampler."""
    outcome = run_here("--train.steps", 4, "--telemetry.reference-every", 4, "--telemetry.preview-every", 4, preset=preset)
    assert outcome.code == 0, outcome.err
    assert len([row for row in read_metrics(outcome.run) if "reference/C5" in row]) == 1
    assert len(list((outcome.run / "samples").glob("*.png"))) == 1
    made = Sampler(Sample(outcome.run, tmp_path / "samples", num_samples=10, steps=6, compile="off"))
    assert (made.sampler, made.trained.objective.default_steps) == (sampler, steps)
    made()
    assert (tmp_path / "samples" / "cfg1.5" / "manifest.json").exists()


@pytest.mark.parametrize("change, refused", [
    (("--diffusion.objective", "flow"), "diffusion.objective: gaussian -> flow"),
    (("--noise.sampling", "logit_normal"), "noise.sampling: uniform -> logit_normal"),
    (("--noise.weighting", "p2"), "noise.weighting: none -> p2"),
    (("--curriculum.order", "hard_first"), "curriculum.order: easy_first -> hard_first"),
    (("--curriculum.stages", "separate"), "curriculum.stages: accumulating -> separate"),
])
def test_a_checkpoint_of_another_run_is_refused(change: tuple[str, str], refused: str, run_here: RunHere) -> None:
    assert run_here("--train.steps", 2).code == 0
    again = run_here("--train.steps", 4, *change)
    assert again.code == 2 and refused in again.err
