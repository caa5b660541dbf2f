"""A resumed run is the uninterrupted run, to the bit: 2 ranks, real DeepSpeed, real kills, cut anywhere."""

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint_files import CheckpointDir, checkpoints, named_weights
from largescale.telemetry import read_metrics
from tests.conftest import Train

# Saved at every step, so that one run serves every cut.
EVERY_STEP = ("--checkpoint.every", 1, "--checkpoint.keep-last", 100, "--telemetry.log-every", 1)
COMPUTED = ("loss", "mse", "vb", "curriculum/", "cluster/", "optimizer/")
PRECISIONS = ("fp32", "bf16", "fp16")


def trace(run: Path) -> list[dict[str, Any]]:
    """All that training computed, step by step; not how long it took."""
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith(COMPUTED)}
        for row in read_metrics(run) if "loss" in row
    ]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(run)[0]
    state = {f"{kind}.{name}": w for kind in ("master", "ema") for name, w in named_weights(newest, kind).items()}
    for rank in range(newest.manifest()["world_size"]):
        optimizer = newest.optimizer_state(rank)["base_optimizer_state"]["state"][0]
        state |= {f"{key}.{rank}": optimizer[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return state


def assert_same_run(run: Path, truth: Path) -> None:
    assert trace(run) == trace(truth)
    ours, theirs = final_state(run), final_state(truth)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert checkpoints(run)[0].manifest()["state"]["curriculum"] == checkpoints(truth)[0].manifest()["state"]["curriculum"]


def cut(truth: Path, run: Path, step: int) -> None:
    """What is on disk when the run is killed after the save of `step`."""
    shutil.copytree(truth, run)
    for checkpoint in checkpoints(run):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)


def ds_json(precision: str, folder: Path, **fp16: Any) -> Path:
    ds = json.loads((Path(__file__).parents[2] / f"ds_configs/zero2_{precision}.json").read_text())
    if precision == "fp16":
        ds["fp16"] |= fp16
    path = folder / f"{precision}.json"
    path.write_text(json.dumps(ds))
    return path


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[Any, ...]]]:
    return {}


def undisturbed(precision: str, truths: dict[str, Any], folder: Path, train: Train) -> tuple[Path, tuple[Any, ...]]:
    """The run that was never cut, once per precision: 24 steps, in two accumulation steps each, a curriculum that moves."""
    if precision not in truths:
        run = folder / f"truth_{precision}"
        # A scale that overflows at the start, and doubles soon enough to overflow again.
        ds = ds_json(precision, folder, initial_scale_power=24, loss_scale_window=3)
        args = (*EVERY_STEP, "--train.steps", 24, "--curriculum.patience", 2, "--train.micro-batch-size", 4, "--train.ds-config", ds,
                "--optimizer.clip-grad-norm", 0.5)
        done = train(*args, "--output", run)
        assert [p.returncode for p in done] == [0, 0], done[0].stderr
        truths[precision] = run, args
    return truths[precision]


def interesting_cuts(run: Path) -> list[int]:
    """Step 0, the last but one, and at and beside the first transition."""
    (first, *_) = checkpoints(run)[0].manifest()["state"]["curriculum"]["transitions"]
    transition = first[0]
    return sorted({0, transition - 1, transition, transition + 1, 23})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cut_anywhere(precision: str, truths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, train: Train) -> None:
    folder = tmp_path_factory.mktemp(precision)
    truth, args = undisturbed(precision, truths, folder, train)
    steps = trace(truth)
    assert [row["step"] for row in steps] == list(range(1, 25))
    assert len({row["curriculum/index"] for row in steps}) > 2
    cuts = interesting_cuts(truth)
    if precision == "fp16":
        skipped = [row["optimizer/skipped_steps"] for row in steps]
        assert skipped[0] > 0 and skipped[-1] > skipped[0]
        after_skip = next(i for i in range(1, 24) if skipped[i] > skipped[i - 1])  # skips between steps i and i + 1
        cuts = sorted({*cuts, after_skip, after_skip + 1})
    for step in cuts:
        run = folder / f"cut_{step}"
        cut(truth, run, step)
        done = train(*args, "--output", run)
        assert done[0].returncode == 0, done[0].stderr
        assert f"resumed {run} at step {step}," in done[0].stderr
        assert_same_run(run, truth)


@pytest.mark.parametrize("forget", ["patience", "ema", "moments", "loss_scale"])
def test_negative_control(forget: str, truths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, train: Train) -> None:
    """The comparison fails when something is lost on the way, so it would have seen it."""
    folder = tmp_path_factory.mktemp("control")
    truth, args = undisturbed("fp16", truths, folder, train)
    rows = trace(truth)
    step = next(a["step"] for a, b in itertools.pairwise(rows) if 0 < a["curriculum/patience"] < b["curriculum/patience"])
    run = folder / "run"
    cut(truth, run, step)
    done = train(*args, "--output", run, driver=("--forget", forget))
    assert done[0].returncode == 0, done[0].stderr
    with pytest.raises(AssertionError):
        assert_same_run(run, truth)


def test_killed_process(truths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, train: Train) -> None:
    """kill -9 of both ranks after step 7, its files written and its manifest not: step 6 is resumed."""
    folder = tmp_path_factory.mktemp("killed")
    truth, args = undisturbed("bf16", truths, folder, train)
    run = folder / "run"
    done = train(*args, "--output", run, driver=("--die-after", 7))
    assert [p.returncode for p in done] == [-signal.SIGKILL] * 2
    assert CheckpointDir.at(run, 7).path.exists() and not CheckpointDir.at(run, 7).exists
    done = train(*args, "--output", run)
    assert f"resumed {run} at step 6," in done[0].stderr, done[0].stderr
    assert_same_run(run, truth)


def test_asked_to_stop(truths: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, train: Train) -> None:
    """SIGTERM at one rank: all leave at the same step, saved, with the status that asks for a requeue."""
    folder = tmp_path_factory.mktemp("stopped")
    truth, args = undisturbed("fp32", truths, folder, train)
    run = folder / "run"
    done = train(*args, "--output", run, "--checkpoint.every", 100, driver=("--stop-at", 5))
    assert [p.returncode for p in done] == [75, 75], done[0].stderr
    assert checkpoints(run)[0].step == 6
    train(*args, "--output", run)
    assert_same_run(run, truth)


def test_one_rank_and_two(tmp_path: Path, train: Train) -> None:
    """The same 50 steps on 1 rank and on 2, and from 2 to 1 half-way: equal to rounding in fp32."""
    args = ("--train.steps", 50, "--telemetry.log-every", 1, "--checkpoint.every", 25, "--curriculum.patience", 3,
            "--optimizer.lr", 1e-4)
    for ranks in (1, 2):
        done = train(*args, "--output", tmp_path / f"on{ranks}", ranks=ranks)
        assert done[0].returncode == 0, done[0].stderr
    shutil.copytree(tmp_path / "on2", tmp_path / "then1")
    shutil.rmtree(CheckpointDir.at(tmp_path / "then1", 50).path)
    done = train(*args, "--output", tmp_path / "then1", ranks=1)
    assert "at step 25" in done[0].stderr
    one, two, then_one = (trace(tmp_path / name) for name in ("on1", "on2", "then1"))
    for other in (two, then_one):
        assert [row["curriculum/index"] for row in other] == [row["curriculum/index"] for row in one]
        assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(other, one, strict=True)) < 1e-5
