"""One process trains a run, also where the file system has no locks, or none between machines."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.checkpoint.writer import Writer
from largescale.errors import TakenOverError
from largescale.host import lease as lease_module
from largescale.host.files import try_lock
from largescale.host.lease import LASTS_S, Lease, LeaseRequest, is_gone, read_owner
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from largescale.training.run_directory import lock_run_dir
from largescale.training.trainer import Trainer
from tests.conftest import RunHere


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "clock", clock)
    monkeypatch.setattr(lease_module, "RENEW_EVERY_S", 10**6)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lease"


@pytest.fixture
def owner(path: Path, clock: Clock) -> Iterator[Lease]:
    lease = Lease.create(path, "owner")
    assert lease
    yield lease
    if not lease._released.is_set():
        lease.release()


def wait(request: LeaseRequest, clock: Clock, seconds: float, meanwhile: Callable[[], Any] = lambda: None) -> Lease | None:
    """The lease after so many looks, one a second; without another process's help it stays None."""
    for _ in range(round(seconds)):
        if lease := request.try_take():
            return lease
        clock.now += 1
        meanwhile()
    return None


def others(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, "token": "another", **changes})


def test_a_lease_that_is_renewed_is_never_taken(owner: Lease, clock: Clock, path: Path) -> None:
    request = LeaseRequest(path)

    def renew() -> None:
        if clock.now % 30 == 0:
            owner.renew()

    assert wait(request, clock, 4 * LASTS_S, renew) is None
    owner.require()
    assert request.owner == f"process {os.getpid()} on {read_owner(path)['host']}"  # type: ignore[index]


def test_a_lease_that_is_given_back_is_free_at_once(path: Path, clock: Clock) -> None:
    first = Lease.create(path, "first")
    assert first and Lease.create(path, "second") is None
    first.release()
    second = LeaseRequest(path).try_take()
    assert second and [file.name for file in path.parent.iterdir()] == ["lease"]
    second.renew()
    second.release()


@pytest.mark.parametrize("after", ["released", "deleted"])
def test_a_suspended_owner_does_not_come_back_when_the_other_has_ended(after: str, owner: Lease, clock: Clock, path: Path) -> None:
    """What it would train on from is long past."""
    request = LeaseRequest(path)
    wait(request, clock, LASTS_S)
    taken = request.try_take()
    assert taken
    taken.release()
    if after == "deleted":
        path.unlink()
    with pytest.raises(TakenOverError):
        owner.require()
    assert path.exists() == (after == "released")


def test_a_renewal_that_hangs_does_not_hold_up_training(owner: Lease, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be written is kept instead: this is an error of the disk as any other."""
    monkeypatch.setattr(lease_module, "WAIT_FOR_RENEWAL_S", 0.01)
    clock.now += 31
    with owner._renewing, pytest.raises(TimeoutError, match="the file system does not answer"):
        owner.require()
    owner.require()


def test_a_lease_that_cannot_be_written_is_not_left(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            LeaseRequest(path).try_take()
    assert not path.exists()


def test_a_suspended_owner_finds_its_lease_gone(owner: Lease, clock: Clock, path: Path) -> None:
    """It says who trains now, and leaves that one's file alone."""
    request = LeaseRequest(path)
    assert wait(request, clock, LASTS_S) is None
    taken = request.try_take()
    assert taken and [file.name for file in path.parent.iterdir()] == ["lease"]
    before = path.read_bytes()
    for write in (owner.require, owner.renew, owner.require):
        with pytest.raises(TakenOverError, match=rf"another process \(process {os.getpid()} on .*has taken over"):
            write()
    owner.release()
    assert path.read_bytes() == before and owner.lost
    taken.renew()
    taken.release()


def test_a_suspended_owner_that_nobody_has_missed_goes_on(owner: Lease, clock: Clock, path: Path) -> None:
    clock.now += 100 * LASTS_S
    owner.require()
    assert LeaseRequest(path).try_take() is None


def test_who_waits_may_be_suspended_too(owner: Lease, clock: Clock, path: Path) -> None:
    """What was renewed meanwhile, or could not be for a file system that did not answer either, is not seen: it looks on."""
    request = LeaseRequest(path)
    assert request.try_take() is None
    clock.now += 2 * LASTS_S
    assert request.try_take() is None and wait(request, clock, LASTS_S - 1) is None


def test_no_file_is_touched_while_a_renewal_is_fresh(owner: Lease, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, "renew", lambda: pytest.fail("renewed"))
        clock.now += 29
        owner.require()


def test_a_disk_that_fails_for_a_while(owner: Lease, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be written then, and the run goes on: it may still be its own."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, "_write", lambda: os.stat("/nowhere"))
        clock.now += LASTS_S
        with pytest.raises(FileNotFoundError):
            owner.require()
    owner.require()
    assert owner.lost is None


def test_an_owner_that_is_gone(owner: Lease, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken over at once: a process of this machine that has ended, or an earlier start of this job."""
    content = read_owner(path)
    assert content and content["started"] and not is_gone(content)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for changes in ({"started": "1"}, {"pid": ended.pid}):
        path.write_text(others(content, **changes))
        assert is_gone(content | changes)
        taken = LeaseRequest(path).try_take()
        assert taken
        taken.release()
        # Of another machine, boot or container it cannot be known.
        for key in ("host", "boot", "pid_namespace"):
            assert not is_gone({**content, **changes, key: "another"})
    for foreign in ({"pid": "x"}, {"pid": 2**80}, {"pid": -1}, {"pid": None}):
        assert not is_gone({**content, "started": "1", **foreign})

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    earlier = {**content, "host": "another", "job": "7 of Slurm", "restart": 1}
    assert is_gone(earlier)
    assert not is_gone({**earlier, "restart": 2}) and not is_gone({**earlier, "job": "8 of Slurm"})


@pytest.mark.parametrize("content", ["", '{"token": "ab', "[]", "\0" * 300, '{"pid": -1}', '{"restart": "x", "job": ""}'])
def test_a_file_that_is_half_written(content: str, path: Path, clock: Clock) -> None:
    path.write_text(content)
    request = LeaseRequest(path)
    assert wait(request, clock, LASTS_S) is None
    taken = request.try_take()
    assert taken
    taken.renew()
    taken.release()


def test_who_comes_too_late_takes_nothing(owner: Lease, path: Path, clock: Clock) -> None:
    """Two that wait see the lease run out; or its owner renews it after the last look."""
    late, later = LeaseRequest(path), LeaseRequest(path)
    content = path.read_bytes()
    owner.renew()
    assert late._take_over(content) is None
    owner.renew()
    content = path.read_bytes()
    taken = late._take_over(content)
    assert taken and later._take_over(content) is None
    taken.renew()
    assert [file.name for file in path.parent.iterdir()] == ["lease"]
    taken.release()
    path.unlink()
    assert later._take_over(content) is None


def test_a_file_that_is_deleted_is_made_again(owner: Lease, path: Path, clock: Clock) -> None:
    path.unlink()
    owner.renew()
    assert read_owner(path)["token"] == "owner"  # type: ignore[index]
    path.unlink()
    taken = Lease.create(path, "another")
    assert taken
    with pytest.raises(TakenOverError):
        owner.renew()
    taken.release()


def test_a_file_that_is_deleted_while_the_disk_is_full(owner: Lease, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not left empty, which would look like another owner's."""
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                owner.renew()
            assert not path.exists()
    owner.renew()
    assert owner.lost is None and read_owner(path)["token"] == "owner"  # type: ignore[index]


def test_an_owner_that_was_killed_and_not_waited_for(owner: Lease, path: Path) -> None:
    """As in a container whose first process waits for nobody."""
    content = read_owner(path)
    assert content
    killed = subprocess.Popen(["true"])
    assert os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone({**content, "pid": killed.pid, "started": lease_module._started(killed.pid)})
    killed.wait()


def test_a_folder_that_is_renamed(tmp_path: Path, clock: Clock) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    lease = Lease.create(old / "lease", "owner")
    assert lease
    old.rename(new)
    old.mkdir()
    lease.renew()
    assert lease.path == new / "lease" and not list(old.iterdir())
    lease.release()
    assert is_gone(read_owner(new / "lease") or {}) and not list(old.iterdir())


def test_a_folder_that_is_deleted(tmp_path: Path, clock: Clock) -> None:
    """Nobody has taken it over, however long ago that was: at the next save it is made, locked and leased again."""
    run = tmp_path / "run"
    run.mkdir()
    with lock_run_dir(run, pytest.fail) as lock:
        shutil.rmtree(run)
        clock.now += 2 * LASTS_S
        with pytest.raises(FileNotFoundError):
            lock.require()
        assert not lock.lost and lock.find() == run and try_lock(run / "lock") is None
        lock.require()
        assert LeaseRequest(run / "lease").try_take() is None
        shutil.rmtree(run)
        run.mkdir()
        other = Lease.create(run / "lease", "another")
        assert other
        with pytest.raises(TakenOverError):
            lock.find()
        other.release()


def test_a_thread_renews(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_EVERY_S", 0.01)
    lease = Lease.create(path, "owner")
    assert lease
    renewed = threading.Event()
    monkeypatch.setattr(lease, "renew", renewed.set)
    assert renewed.wait(60)
    lease.release()


def test_a_rank_does_not_write_over_the_files_of_another_process(tmp_path: Path) -> None:
    """Only rank 0 holds the lease; the others look whose it is before they open a file."""
    file = tmp_path / "checkpoints/step_00000004/x.pt"
    file.parent.mkdir(parents=True)
    file.write_text("another's")
    (tmp_path / "lease").write_text('{"token": "another"}')
    writer = Writer()
    writer.token = "own"
    writer.save({}, str(file))
    files, error = writer.collect()
    assert files == {} and error and "another process has taken over" in error and file.read_text() == "another's"


@pytest.fixture(params=["no locks", "locks of one machine"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems on which flock does not show a process on another machine."""
    def flock(file: Any, operation: int) -> None:
        if request.param == "no locks":
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_job_is_refused(locks: None, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loses nothing: started again when the first one has ended, it continues."""
    run = run_here("--train.steps", 2).run
    before = read_metrics(run)
    first = LeaseRequest(run / "lease").try_take()
    assert first
    monkeypatch.setattr("largescale.training.run_directory.LOCK_WAIT_S", 1)
    outcome = run_here("--train.steps", 4)
    assert outcome.code == 75 and f"error: another process trains {run}; stop it" in outcome.err
    assert f"another process trains {run} (process {os.getpid()} on " in outcome.err
    assert read_metrics(run) == before and checkpoints(run)[0].step == 2
    first.renew()
    first.release()
    assert run_here("--train.steps", 4).code == 0 and is_gone(read_owner(run / "lease") or {})


def test_a_run_that_is_taken_over_writes_nothing(locks: None, run_here: RunHere, tmp_path: Path, clock: Clock,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended at step 7 for longer than its lease: it ends at the next step with status 75, as who finds the run taken."""
    run, commit_step, seen = tmp_path / "run", Trainer.commit_step, list[Any]()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def suspended(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            clock.now += 2 * LASTS_S
            (run / "lease").unlink()
            seen.append(Lease.create(run / "lease", "another"))
            seen.append(files())

    monkeypatch.setattr(Trainer, "commit_step", suspended)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 5, "--telemetry.log-every", 1)
    assert outcome.code == 75 and outcome.err.count("has taken over") == 1 and f"has taken over {run} from this one" in outcome.err
    assert files() == seen[1] and len(read_starts(run)) == 1
    seen[0].renew()
    seen[0].release()
    monkeypatch.setattr(Trainer, "commit_step", commit_step)
    assert run_here("--train.steps", 12).code == 0


@pytest.mark.parametrize("step", [5, 12])
def test_a_run_that_is_taken_over_while_it_saves(step: int, locks: None, run_here: RunHere, tmp_path: Path, clock: Clock,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint gets no manifest, and no older one is removed; also the last one of a run."""
    run, save, seen = tmp_path / "run", Writer.collect, list[Any]()

    def taken(self: Writer) -> Any:
        collected = save(self)
        if (run / f"checkpoints/step_{step:08}").exists():
            (run / "lease").unlink()
            seen.append(Lease.create(run / "lease", "another"))
        return collected

    monkeypatch.setattr(Writer, "collect", taken)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 5, "--checkpoint.keep-last", 1)
    assert outcome.code == 75 and "has taken over" in outcome.err
    assert [c.step for c in checkpoints(run)] == ([0] if step == 5 else [10])
    assert (run / f"checkpoints/step_{step:08}").exists()
    seen[0].release()
