"""What goes wrong on one rank is known to all: nobody hangs, nothing that was saved is lost, and the message says where."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.distributed.ranks import NEVER
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import QUIET, Train, assert_same_run, cut, ds_json, trace
from tests.ranks import ROOT, ranks_of, running

ARGS = ("--train.steps", 12, "--telemetry.log-every", 1, "--checkpoint.every", 4, "--train.micro-batch-size", 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss(precision: str, tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    args = (*ARGS, "--train.ds-config", ds_json(precision, tmp_path), "--output", run)
    done = train(*args, driver=("--bad-loss", 6, 1))
    assert [p.returncode for p in done] == [2, 2]
    expected = "error: the loss is not finite at step 7, curriculum index 5, on rank 1, in C_5; the last good checkpoint is step 4; lower --optimizer.lr, or leave"
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
    assert "a checkpoint cannot be written on ranks [1]" in done[0].stderr  # at the next step
    given_up = next(row["step"] for row in read_metrics(run) if row.get("event") == "checkpoint failed")  # when rank 0 was done
    # Tried again at the next step, which may be one that is saved anyhow; of what there is, three are kept.
    assert [c.step for c in checkpoints(run)] == sorted({12, 8, given_up + 1, 0}, reverse=True)[:3]


def test_no_data_on_one_rank(tmp_path: Path, train: Train) -> None:
    done = train(*ARGS, "--output", tmp_path / "run", driver=("--no-data", 1))
    assert [p.returncode for p in done] == [2, 2]
    assert done[0].stderr.splitlines()[-1] == "error: the file system is not mounted here" and not done[1].stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_another_version_on_one_rank(rank: int, tmp_path: Path, train: Train) -> None:
    """Before anything is read or written."""
    done = train(*ARGS, "--output", tmp_path / "run", driver=("--other-version", rank))
    assert [p.returncode for p in done] == [2, 2] and not done[1].stderr
    assert "error: rank 1 runs another version of largescale than rank 0: " in done[0].stderr
    assert "install the same on all nodes" in done[0].stderr and not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_any_more(tmp_path: Path, train: Train) -> None:
    """All leave together, saved, with the status that asks for another start; the run becomes what it would have been."""
    for run, fault in ((tmp_path / "truth", ()), (tmp_path / "run", ("--lost-files", 6, 1))):
        done = train(*ARGS, "--output", run, driver=fault)
    assert [p.returncode for p in done] == [75, 75], done[0].stderr
    assert "error: rank 1 cannot read the data of step 7: /nowhere/shard_0000" in done[0].stderr
    assert "No such file or directory" in done[0].stderr and "; saved at step 6" in done[0].stderr
    assert not done[1].stderr and checkpoints(run)[0].step == 6
    assert train(*ARGS, "--output", run)[0].returncode == 0
    assert_same_run(run, tmp_path / "truth")


def test_data_that_are_damaged(tmp_path: Path, train: Train) -> None:
    """Not worth another start; in fp16 the step that nobody applied does not lower the loss scale."""
    run, ds = tmp_path / "run", ds_json("fp16", tmp_path, initial_scale_power=4)
    done = train(*ARGS, "--output", run, "--train.ds-config", ds, driver=("--damaged-data", 6, 0))
    assert [p.returncode for p in done] == [2, 2], done[0].stderr
    assert "error: rank 0 cannot read the data of step 7: shard_00000.arrow is damaged" in done[0].stderr
    assert checkpoints(run)[0].step == 6
    assert checkpoints(run)[0].optimizer_state(0)["loss_scaler"]["cur_scale"] == 16


def test_every_group_has_the_time_limit_of_the_run(tmp_path: Path, blobs: Path) -> None:
    """DeepSpeed's own too, which torch would give ten minutes on NCCL and thirty on gloo."""
    done = ranks_of(ROOT / "tests/dist/timeouts.py", "debug", "--data.path", blobs, *ARGS, "--output", tmp_path / "run")
    assert done[0].returncode == 0, done[0].stderr
    word, groups, *limits = done[0].stdout.split()[-3:]
    assert (word, limits) == ("limits", [str(NEVER.total_seconds())]) and int(groups) >= 4


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_nobody_expects(rank: int, tmp_path: Path, train: Train) -> None:
    """Its traceback is printed at once. NCCL's process group would wait, when it closes, for ranks that wait for this
    one."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--bug", 6, rank))
    assert [each.returncode for each in done] == [1, 1]
    assert "ZeroDivisionError: a bug on this rank alone" in done[rank].stderr
    assert "lost contact" in done[1 - rank].stderr and "Traceback" not in done[1 - rank].stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(rank: int, tmp_path: Path, train: Train) -> None:
    """The other one does not wait for it, and says who is gone."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--kill", 6, rank))
    assert (done[rank].returncode, done[1 - rank].returncode) == (-signal.SIGKILL, 1)
    who = "rank 1 does not answer; rank 0 in" if rank else "rank 0, or the launcher that keeps its store, does not answer"
    assert f"lost contact: {who}" in done[1 - rank].stderr and "continues from the last checkpoint" in done[1 - rank].stderr
    assert "Traceback" not in done[1 - rank].stderr
    assert train(*ARGS, "--output", run)[0].returncode == 0
    assert [row["step"] for row in trace(run)] == list(range(1, 13))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_runs_out_of_memory(rank: int, tmp_path: Path, train: Train) -> None:
    """It says what to do, with a status that no batch script starts again; the other one ends as if it had crashed."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--out-of-memory", 6, rank))
    assert (done[rank].returncode, done[1 - rank].returncode) == (2, 1), done[rank].stderr
    expected = (f"error{' on rank 1' if rank else ''}: out of memory in forward of step 7, with a micro batch of 4: CUDA out of "
                "memory. Tried to allocate 2.00 GiB; set --train.micro-batch-size 2 (or auto, which finds one) or set "
                "--train.activation-checkpointing or start more ranks")
    assert expected in done[rank].stderr and not any("Traceback" in p.stderr for p in done)
    who = "rank 1 does not answer; rank 0 in" if rank else "rank 0, or the launcher that keeps its store, does not answer"
    assert f"lost contact: {who}" in done[1 - rank].stderr
    again = train(*ARGS, "--output", run, "--train.micro-batch-size", 2)
    assert again[0].returncode == 0 and f"resumed {run} at step " in again[0].stderr
    assert [row["step"] for row in trace(run)] == list(range(1, 13))


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_of_the_rank_that_has_least(rank: int, tmp_path: Path, train: Train) -> None:
    """auto: every rank takes the micro batch that fits on all."""
    args = (*ARGS[:-2], "--train.micro-batch-size")
    done = train(*args, "auto", "--output", tmp_path / "auto", driver=("--available", 3, rank))
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    assert "micro batch 2 (auto): 4 accumulation steps" in done[0].stderr and "micro batch" not in done[1].stderr
    assert train(*args, 2, "--output", tmp_path / "two")[0].returncode == 0
    assert_same_run(tmp_path / "auto", tmp_path / "two")
    none = train(*args, "auto", "--output", tmp_path / "none", driver=("--available", 0, rank))
    assert [p.returncode for p in none] == [2, 2] and not none[1].stderr
    assert f"not even one image at a time fits on rank {rank}, which has 0.00 GiB" in none[0].stderr


def test_a_rank_hangs(tmp_path: Path, train: Train) -> None:
    """Ended after the configured time; the message says where each of them is."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, "--train.timeout-s", 6, driver=("--hang", 6, 1))
    assert [p.returncode for p in done] == [1, 1]
    assert "error: no progress for 6 s: rank 0 in" in done[0].stderr and "rank 1 in data of step 7" in done[0].stderr
    assert "error" not in done[1].stderr
    ended = read_starts(run)[-1]
    assert (ended.from_step, ended.ended) == (0, None)
    assert ended.saved_step == checkpoints(run)[0].step and ended.saved_step in (0, 4)  # 4, if it was written by then


def test_other_weights(tmp_path: Path, train: Train) -> None:
    """A rank whose weights are not the others': found before the checkpoint is valid."""
    run = tmp_path / "run"
    done = train(*ARGS, "--output", run, driver=("--other-weights", 8, 1))
    assert [p.returncode for p in done] == [1, 1]  # as after a crash: the weights are made anew from the last checkpoint
    assert "error: rank 1 disagrees with rank 0 on weights (checksum)" in done[0].stderr and not done[1].stderr
    assert [c.step for c in checkpoints(run)] == [4, 0]


@pytest.mark.parametrize("phase", ["open_dataset", "TrainStep", "Preview", "ReferenceLoss"])
def test_asked_to_stop(phase: str, tmp_path: Path, train: Train) -> None:
    """In every phase: saved where there is something to save, and left with the status that asks for another start."""
    args = (*ARGS, "--output", tmp_path / "run", "--telemetry.preview-every", 6, "--telemetry.reference-every", 6)
    done = train(*args, driver=("--stop-in", phase))
    assert [p.returncode for p in done] == [75, 75], done[0].stderr
    if phase in ("Preview", "ReferenceLoss"):
        assert "of step 6 is left out" in done[0].stderr
        assert not list((tmp_path / "run").glob("samples/*")) or phase == "ReferenceLoss"
        assert checkpoints(tmp_path / "run")[0].manifest()["reason"] == "stop"
    else:
        assert "asked to stop" in done[0].stderr and not checkpoints(tmp_path / "run")
    assert train(*args)[0].returncode == 0


# ---- numbers that go bad, under the policy to go on without them


def test_loss_skipped(tmp_path: Path, train: Train) -> None:
    """Back to step 4, on with the inputs of step 7; a run that is cut later knows that; so does the account."""
    run, again = tmp_path / "run", tmp_path / "again"
    args = (*ARGS, "--checkpoint.keep-last", 9, "--anomaly.not-finite", "skip")
    done = train(*args, "--output", run, driver=("--bad-loss", 6, 1))
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    assert "went back to step 4, leaving out the inputs of 3 steps" in done[0].stderr
    assert [row["step"] for row in trace(run)] == list(range(1, 13))
    state = checkpoints(run)[0].manifest()["state"]
    assert [(skip["at"], skip["count"]) for skip in state["skips"]] == [(4, 3)] and "on rank 1" in state["skips"][0]["why"]
    event = next(row for row in read_metrics(run) if row.get("event") == "not finite")
    assert (event["step"], event["ranks"], event["clusters"]) == (4, [1], [5])
    assert [(s.from_step, s.step, (s.ended or "")[:8]) for s in read_starts(run)] == [(0, 6, "the loss"), (4, 12, "finished")]
    cut(run, again, 8)
    assert train(*args, "--output", again)[0].returncode == 0
    assert_same_run(again, run)


def test_gradients_skipped_until_it_is_enough(tmp_path: Path, train: Train) -> None:
    """In fp16 at the smallest scale; every fifth input is bad, and two windows may be left out."""
    run, ds = tmp_path / "run", ds_json("fp16", tmp_path, initial_scale_power=2)
    settings = ("--anomaly.not-finite", "skip", "--anomaly.max-skips", 2, "--train.ds-config", ds, "--output", run)
    done = train(*ARGS, *settings, "--train.steps", 16, driver=("--bad-gradient", 5, 1, "--every", 5))
    assert [p.returncode for p in done] == [2, 2], done[0].stderr
    assert done[0].stderr.count("went back to step") == 2
    assert "anomaly.max_skips=2 windows of data were left out already" in done[0].stderr
    assert "rank 1 in x_embedder.proj.weight, from C_5" in done[0].stderr


@pytest.mark.parametrize("policy", ["count", "stop", "skip"])
def test_a_loss_that_leaps(policy: str, tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    args = ("--train.steps", 120, "--telemetry.log-every", 1, "--checkpoint.every", 100, "--curriculum.patience", 200)
    settings = ("--anomaly.spike", policy, "--anomaly.spike-factor", 1e4)  # so small a model leaps by itself now and then
    done = train(*args, "--output", run, *settings, driver=("--leap", 110))
    said = "times the usual; highest on rank 1"
    assert said in done[0].stderr and "at step 111" in done[0].stderr
    steps = [row["step"] for row in trace(run)]
    if policy == "stop":
        assert [p.returncode for p in done] == [2, 2] and checkpoints(run)[0].step == 100
        return
    assert [p.returncode for p in done] == [0, 0] and steps == list(range(1, 121))
    state = checkpoints(run)[0].manifest()["state"]
    skipped = [(skip["at"], skip["count"]) for skip in state["skips"]]
    assert (skipped, state["spikes"]["spikes"]) == (([(100, 11)], 0) if policy == "skip" else ([], 1))
    best = max(row["loss"] for row in trace(run))
    assert (best > 1e3) == (policy == "count")


def test_a_shard_that_is_cut_while_it_is_mapped(tmp_path: Path, blobs: Path) -> None:
    """A bus error ends the process at once; it says where, and the next start names the file."""
    shutil.copytree(blobs, data := tmp_path / "data")
    run = tmp_path / "run"
    args = ("-m", "largescale.train", "debug", "--data.path", data, *QUIET, "--telemetry.log-every", 1, "--output", run)
    with running(*args, "--train.steps", 100_000, ranks=1) as started:
        while not read_metrics(run):
            assert started.processes[0].exitcode is None
            time.sleep(0.05)
        os.truncate(data / "shard_00001.arrow", 0)
        (done,) = started.wait()
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr and "shards.py" in done.stderr
    (again,) = ranks_of(*args, ranks=1)
    assert again.returncode == 2 and "shard_00001.arrow has 0 bytes, not the manifest's" in again.stderr
