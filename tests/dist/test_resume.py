"""A resumed run is the uninterrupted run, to the bit: 2 ranks, real DeepSpeed, real kills, cut anywhere."""

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from largescale.checkpoint.files import CheckpointDir, checkpoints
from tests.conftest import Train, assert_same_run, cut, ds_json, trace
from tests.ranks import ranks_of

# Two accumulation steps, clipping, a curriculum that moves, and a checkpoint at every step, to serve every cut.
ARGS = ("--train.steps", 24, "--train.micro-batch-size", 4, "--optimizer.clip-grad-norm", 0.5, "--curriculum.patience", 1,
        "--checkpoint.every", 1, "--checkpoint.keep-last", 100, "--telemetry.log-every", 1)


def test_cut_after_every_step(tmp_path: Path, blobs: Path) -> None:
    """fp32, bf16 and fp16: 12 cuts each, at step 0, at and beside every transition, after skipped steps."""
    done = ranks_of("tests/dist/sweep.py", tmp_path, blobs, timeout_s=3000)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    found = json.loads(done[0].stdout.splitlines()[-1])
    assert {precision: result["differ"] for precision, result in found.items()} == {"fp32": [], "bf16": [], "fp16": []}
    assert all(result["stages"] > 2 and result["cuts"] == 12 for result in found.values())
    skipped = found["fp16"]["skipped"]
    assert skipped[0] > 0 and skipped[-1] > skipped[0], "the fp16 run was to skip steps at the start and later on"


@pytest.fixture(scope="module")
def truths() -> dict[str, tuple[Path, tuple[Any, ...]]]:
    return {}


def undisturbed(precision: str, truths: dict[str, Any], factory: pytest.TempPathFactory, train: Train) -> tuple[Path, Any]:
    """The run that was never cut, once per precision."""
    if precision not in truths:
        folder = factory.mktemp(precision)
        args = (*ARGS, "--train.ds-config", ds_json(precision, folder, initial_scale_power=24, loss_scale_window=3))
        done = train(*args, "--output", folder / "truth")
        assert [p.returncode for p in done] == [0, 0], done[0].stderr
        truths[precision] = folder / "truth", args
    return truths[precision]


@pytest.mark.parametrize(
    ("precision", "where"),
    [("fp32", "step 0"), ("fp32", "a transition"), ("bf16", "just before a transition"), ("fp16", "after a skipped step"),
     ("fp16", "just after a transition")],
)
def test_new_process(precision: str, where: str, truths: dict[str, Any], tmp_path: Path, train: Train,
                     tmp_path_factory: pytest.TempPathFactory) -> None:
    truth, args = undisturbed(precision, truths, tmp_path_factory, train)
    transition = checkpoints(truth)[0].manifest()["state"]["curriculum"]["transitions"][0][0]
    skipped = itertools.pairwise(row["optimizer/skipped_steps"] for row in trace(truth))
    step = {
        "step 0": 0, "just before a transition": transition - 1, "a transition": transition,
        "just after a transition": transition + 1,
        "after a skipped step": next((i + 2 for i, (a, b) in enumerate(skipped) if b > a), None),
    }[where]
    assert step is not None
    run = tmp_path / "run"
    cut(truth, run, step)
    done = train(*args, "--output", run)
    assert done[0].returncode == 0, done[0].stderr
    assert f"resumed {run} at step {step}," in done[0].stderr
    assert_same_run(run, truth)


@pytest.mark.parametrize("forget", ["patience", "ema", "moments", "loss_scale"])
def test_negative_control(forget: str, truths: dict[str, Any], tmp_path: Path, train: Train,
                          tmp_path_factory: pytest.TempPathFactory) -> None:
    """The comparison fails when something is lost on the way, so it would have seen it."""
    truth, args = undisturbed("fp16", truths, tmp_path_factory, train)
    pairs = itertools.pairwise(trace(truth))
    step = next(a["step"] for a, b in pairs if b["curriculum/index"] < a["curriculum/index"])  # patience is used up
    run = tmp_path / "run"
    cut(truth, run, step)
    done = train(*args, "--output", run, driver=("--forget", forget))
    assert done[0].returncode == 0, done[0].stderr
    with pytest.raises(AssertionError):
        assert_same_run(run, truth)


@pytest.mark.parametrize(("precision", "step"), [("fp32", 1), ("bf16", 7), ("fp16", 13)])
def test_killed_process(precision: str, step: int, truths: dict[str, Any], tmp_path: Path, train: Train,
                        tmp_path_factory: pytest.TempPathFactory) -> None:
    """kill -9 of both ranks after a step whose files are written and whose manifest is not: the one before is resumed."""
    truth, args = undisturbed(precision, truths, tmp_path_factory, train)
    run = tmp_path / "run"
    done = train(*args, "--output", run, driver=("--die-after", step))
    assert [p.returncode for p in done] == [-signal.SIGKILL] * 2
    assert CheckpointDir.at(run, step).path.exists() and not CheckpointDir.at(run, step).exists
    done = train(*args, "--output", run)
    assert f"resumed {run} at step {step - 1}," in done[0].stderr, done[0].stderr
    assert_same_run(run, truth)


def test_asked_to_stop(truths: dict[str, Any], tmp_path: Path, train: Train,
                       tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGTERM at one rank: all leave at the same step, saved, with the status that asks for a requeue."""
    truth, args = undisturbed("fp32", truths, tmp_path_factory, train)
    run = tmp_path / "run"
    done = train(*args, "--output", run, "--checkpoint.every", 100, driver=("--stop-at", 5))
    assert [p.returncode for p in done] == [75, 75], done[0].stderr
    assert checkpoints(run)[0].step == 6
    train(*args, "--output", run)
    assert_same_run(run, truth)


def test_one_rank_and_two(tmp_path: Path, train: Train) -> None:
    """The same 50 steps on 1 rank and on 2, and from 2 to 1 half-way: equal to rounding in fp32; also in blocks, and of a
    copy that two ranks make."""
    args = ("--train.steps", 50, "--telemetry.log-every", 1, "--checkpoint.every", 25, "--curriculum.patience", 3,
            "--data.order", "blocks")
    for ranks in (1, 2):
        copy = ("--data.stage", tmp_path / "local") if ranks == 2 else ()
        done = train(*args, *copy, "--output", tmp_path / f"on{ranks}", ranks=ranks)
        assert done[0].returncode == 0, done[0].stderr
    assert f"is read from {tmp_path}/local/" in done[0].stderr and "is read from" not in done[1].stderr
    shutil.copytree(tmp_path / "on2", tmp_path / "then1")
    shutil.rmtree(CheckpointDir.at(tmp_path / "then1", 50).path)
    done = train(*args, "--output", tmp_path / "then1", ranks=1)
    assert "at step 25" in done[0].stderr
    one, two, then_one = (trace(tmp_path / name) for name in ("on1", "on2", "then1"))
    for other in (two, then_one):
        assert [row["curriculum/index"] for row in other] == [row["curriculum/index"] for row in one]
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(other, one, strict=True))
        print(f"largest relative difference of 50 losses: {worst:.2e}")
        assert worst < 1e-5
