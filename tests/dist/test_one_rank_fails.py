"""What goes wrong on one rank is known to all: nobody hangs, nothing that was saved is lost, and the message says where."""

from pathlib import Path

import pytest

from largescale.checkpoint_files import checkpoints
from tests.conftest import Train, ds_json, trace

ARGS = ("--train.steps", 12, "--telemetry.log-every", 1, "--checkpoint.every", 4, "--train.micro-batch-size", 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss(precision: str, tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    args = (*ARGS, "--train.ds-config", ds_json(precision, tmp_path), "--output", run)
    done = train(*args, driver=("--bad-loss", 6, 1))
    assert [p.returncode for p in done] == [2, 2]
    expected = "error: the loss is not finite at step 7, curriculum index 5, on rank 1; the last good checkpoint is step 4"
    assert expected in done[0].stderr
    assert done[1].stderr.count("not finite") == 0, "one rank speaks for all"
    assert checkpoints(run)[0].step == 4
    assert train(*args)[0].returncode == 0
    assert [row["step"] for row in trace(run)] == list(range(1, 13))


def test_gradient(tmp_path: Path, train: Train) -> None:
    """A finite loss with a NaN gradient: DeepSpeed skips the update, and we say which rank it came from."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--bad-gradient", 6, 1))
    assert [p.returncode for p in done] == [2, 2]
    assert "the gradient is not finite at step 7" in done[0].stderr and "rank 1 in x_embedder.proj" in done[0].stderr
    assert "rank 0 in" not in done[0].stderr
    assert checkpoints(run)[0].step == 4


def test_fp16_gradient_lowers_the_scale_then_stops(tmp_path: Path, train: Train) -> None:
    """From a scale of 16 an overflow is retried at 8, 4, 2 and 1; at 1 it is the model's fault."""
    run = tmp_path / "run"
    ds = ds_json("fp16", tmp_path, initial_scale_power=4)
    done = train(*ARGS, "--output", run, "--train.ds-config", ds, driver=("--bad-gradient", 6, 0))
    assert [p.returncode for p in done] == [2, 2]
    assert "the gradient is not finite at step 7" in done[0].stderr and "loss scale 1)" in done[0].stderr
    assert checkpoints(run)[0].step == 4


def test_full_disk_on_one_rank(tmp_path: Path, train: Train) -> None:
    """The checkpoint is given up by all, training goes on, and the next one is written."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--full-disk", 4, 1))
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    assert "checkpoint of step 4 was not written: rank 1: OSError: [Errno 28] No space left on device" in done[0].stderr
    assert [c.step for c in checkpoints(run)] == [12, 8, 0]


def test_no_data_on_one_rank(tmp_path: Path, train: Train) -> None:
    done = train(*ARGS, "--output", tmp_path / "run", driver=("--no-data", 1))
    assert [p.returncode for p in done] == [2, 2]
    assert done[0].stderr.splitlines()[-1] == "error: the file system is not mounted here" and not done[1].stderr
