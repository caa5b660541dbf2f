"""Disks that are full, fail, or may not be written to, and run directories that vanish or move while training goes on."""

import errno
import os
import pwd
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largescale.checkpoint.files import checkpoints
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.host.files import try_lock
from largescale.monitoring import telemetry
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from largescale.training.trainer import Trainer
from tests.conftest import RunHere, assert_refused, assert_same_run


def test_a_log_that_cannot_be_written_does_not_end_the_run(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("largescale.monitoring.telemetry.tqdm.write", full)
    monkeypatch.setattr("largescale.monitoring.telemetry.tqdm.update", full)
    assert run_here("--train.steps", 8, "--curriculum.patience", 0).code == 0


def test_a_full_disk_delays_the_log_and_not_the_run(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is kept, to the half line, until it can."""
    write = telemetry.Telemetry._write

    def full(self: telemetry.Telemetry, row: Any) -> None:
        file = self._file

        class Disk:
            def write(self, data: bytes) -> int:
                if row["step"] == 4:
                    raise OSError(28, "No space left on device")
                if row["step"] == 3 and len(data) < 20:
                    raise OSError(28, "No space left on device")
                return int(file.write(data[:-10] if row["step"] == 3 else data))

        self._file = Disk()  # type: ignore[assignment]
        write(self, row)
        self._file = file

    monkeypatch.setattr(telemetry.Telemetry, "_write", full)
    outcome = run_here("--train.steps", 6)
    assert outcome.code == 0 and outcome.err.count("telemetry cannot be written") == 1
    assert [row["step"] for row in outcome.trace()] == [1, 2, 3, 4, 5, 6]


def test_unwritable_run_directory(run_here: RunHere, tmp_path: Path) -> None:
    """Found at the start, not at the first checkpoint hours later."""
    (tmp_path / "file").write_text("")
    assert_refused(run_here(output=tmp_path / "file" / "run"), f"cannot write to {tmp_path}/file/run", "--output")
    assert_refused(run_here("--dry-run", output=tmp_path / "file"), f"cannot read {tmp_path}/file: Not a directory; choose another --output DIR")


def test_a_folder_in_which_nothing_can_be_made(run_here: RunHere, tmp_path: Path) -> None:
    """Status 2, not 75: another try changes nothing. What may go away, such as a link to a disk that is not mounted, stays 75."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output, why in ((Path("/proc/largescale"), ""), (tmp_path / ("x" * 300), "File name too long"),
                        (tmp_path / "new" / ("x" * 300), "File name too long"), (tmp_path / "loop", "Too many levels of symbolic links")):
        assert_refused(run_here(output=output), f"error: cannot write to {output}/lock: {why}", "choose another --output")
        # It makes nothing, so it finds only what lies in a folder that is there.
        if why and output.parent == tmp_path:
            assert_refused(run_here("--dry-run", output=output), f"error: cannot read {output}: {why}; choose another --output DIR")
    (tmp_path / "not mounted").symlink_to(tmp_path / "nowhere")
    assert run_here(output=tmp_path / "not mounted").code == 75


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOENT, errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_which_errors_are_permanent(error: int, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**where: Any) -> Any:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("largescale.host.files.tempfile.TemporaryFile", fail)
    outcome = run_here()
    assert outcome.code == (2 if error in (errno.EINVAL, errno.ENOENT) else 75) and os.strerror(error) in outcome.err


@pytest.mark.parametrize("name", ["", "lock", "metrics.jsonl", "checkpoints", "starts"])
def test_a_run_directory_of_somebody_else(name: str, run_here: RunHere, read_only: Any) -> None:
    """The folder, or only what lies in it: one line that says what, and whose."""
    run = run_here("--train.steps", 4).run
    before = read_metrics(run)
    read_only(run / name)
    outcome = run_here("--train.steps", 8)
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert_refused(outcome, f"error: cannot write to {run / name}", f": Permission denied; {run / name}", f" belongs to {owner} (mode ")
    assert "; choose another --output" in outcome.err and len(outcome.err.splitlines()) == 1
    assert read_metrics(run) == before


def test_a_run_directory_that_vanishes(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training goes on; what is saved after that is whole, and locked again. (Step 5 is tried again where it was still
    being written.)"""
    commit_step, locks = Trainer.commit_step, list[Any]()

    def vanish(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            shutil.rmtree(tmp_path / "run")
        if self.state.step == 11:
            locks.append(try_lock(tmp_path / "run/lock"))

    monkeypatch.setattr(Trainer, "commit_step", vanish)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 5)
    assert outcome.code == 0 and locks == [None], outcome.err
    found = {c.step: c.problem() for c in checkpoints(outcome.run)}
    assert found == dict.fromkeys(found) and {10, 12} <= found.keys() and min(found) > 7


def test_a_run_directory_that_vanishes_and_is_anothers(run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path) -> None:
    commit_step, locks = Trainer.commit_step, list[Any]()

    def replace(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").mkdir()
            locks.append(try_lock(tmp_path / "run/lock"))

    monkeypatch.setattr(Trainer, "commit_step", replace)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 10)
    assert_refused(outcome, f"{outcome.run} was deleted, and another process trains there now", "--output DIR")
    assert locks[0] and not checkpoints(outcome.run)


@pytest.mark.parametrize("old_name", ["free", "taken by another run"])
def test_a_run_directory_that_is_renamed(old_name: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                         tmp_path: Path) -> None:
    """The run goes on in it, and says so: nothing is lost, or lies at the old name, and nobody else gets it."""
    settings = ("--train.steps", 12, "--checkpoint.every", 5, "--telemetry.preview-every", 9, "--telemetry.preview-steps", 2)
    truth = run_here(*settings, output=tmp_path / "truth").run
    old, new, commit_step, locks = tmp_path / "run", tmp_path / "moved", Trainer.commit_step, list[Any]()

    def rename(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            old.rename(new)
            if old_name != "free":
                (old / "starts").mkdir(parents=True)
        if self.state.step in (8, 11):
            locks.append(try_lock(new / "lock"))

    monkeypatch.setattr(Trainer, "commit_step", rename)
    outcome = run_here(*settings)
    assert outcome.code == 0 and locks == [None, None], outcome.err
    assert f"{old} was moved: continuing in {new}; a later start needs --output {new}" in outcome.err
    assert [*old.rglob("*")] == ([] if old_name == "free" else [old / "starts"]) and old.exists() == (old_name != "free")
    assert_same_run(new, truth)
    assert read_starts(new)[-1].ended == "finished" and (new / "samples/step_00000009.png").exists()


def test_the_old_name_does_not_come_back(tmp_path: Path) -> None:
    """Renamed between two calls of a save: that save fails, and is tried again where the run lies then."""
    from largescale.checkpoint.writer import Writer

    writer = Writer()
    writer.makedirs(str(tmp_path / "run/checkpoints"), exist_ok=True)
    writer.makedirs(str(tmp_path / "run/checkpoints/step_00000004"))
    assert writer.failed and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    writer = Writer()
    writer.makedirs(str(tmp_path / "run/checkpoints/step_00000004"))
    assert not writer.failed and (tmp_path / "run/checkpoints/step_00000004").is_dir()


def test_data_that_can_be_read_at_the_third_try(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gather, failures = ShardDataset.gather, 2

    def flaky(self: ShardDataset, *args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures and kwargs.get("choice") is None and len(args) == 3 and args[0].tolist() == bad:
            failures -= 1
            raise OSError(5, "Input/output error")
        return gather(self, *args, **kwargs)

    settings = ("--train.steps", 6, "--optimizer.lr", 0.01)
    truth = run_here(*settings, output=tmp_path / "truth").run
    rows = np.arange(16) + 3 * 16
    bad = sample_indices(rows, 300, 0).tolist()
    monkeypatch.setattr(ShardDataset, "gather", flaky)
    monkeypatch.setattr("largescale.training.trainer.READ_RETRY_S", (0.0, 0.0))
    assert run_here(*settings).code == 0 and failures == 0
    assert_same_run(tmp_path / "run", truth)


def test_a_disk_that_is_full_at_the_start(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 0 proves that the run can be saved."""
    from largescale.checkpoint import writer

    def full(state: Any, path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    outcome = run_here()
    assert_refused(outcome, "checkpoint of step 0 was not written", "No space left on device", "free space")
    assert read_metrics(outcome.run) == []


def test_a_limit_on_the_size_of_files(run_here: RunHere) -> None:
    """ulimit -f: what the system says, not what torch makes of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        outcome = run_here()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(outcome, "checkpoint of step 0 was not written: rank 0: OSError: [Errno 27] File too large; free space")


def test_a_failed_write_is_said_and_tried_again(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a while: training goes on, the last good checkpoint stays, the next one is written."""
    from largescale.checkpoint import writer

    write = writer._write

    def full(state: Any, path: Path) -> Any:
        if "step_00000004" in str(path):
            raise OSError(28, "No space left on device")
        return write(state, path)

    monkeypatch.setattr(writer, "_write", full)
    # A step takes as long as the thread that writes, whichever of them is slow here.
    monkeypatch.setattr(writer.Writer, "busy", property(lambda self: not self.wait(600)))
    outcome = run_here("--train.steps", 8, "--checkpoint.every", 2)
    assert outcome.code == 0
    assert "checkpoint of step 4 was not written: rank 0: OSError: [Errno 28] No space left on device" in outcome.err
    assert [c.step for c in checkpoints(outcome.run)] == [8, 6, 5]  # tried again at the next step
