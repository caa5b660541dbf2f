"""Memory limits: said before any work, and named after a kill."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from largescale import requeue, status
from largescale.host import machine
from largescale.host.machine import MemoryBound
from largescale.host.sizes import size_text
from largescale.monitoring import run_record
from largescale.planning import memory
from tests.conftest import RunHere
from tests.ranks import ROOT

LESS = "raise the job's memory (Slurm: --mem), start fewer ranks, or set --train.activation-checkpointing"


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory cgroup with a limit of 0.9 GB that has counted three kills for memory; no swap; a single rank."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    count(folder, 3)
    bound(monkeypatch, 9 * 10**8, folder)
    monkeypatch.setattr(machine, "has_swap", lambda: False)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return folder


def bound(monkeypatch: pytest.MonkeyPatch, size: int, folder: Path | None) -> None:
    for module in (machine, memory, run_record):
        monkeypatch.setattr(module, "memory_bound", lambda: MemoryBound(size, folder))
    monkeypatch.setattr("largescale.distributed.watchdog.memory_bound", lambda: MemoryBound(size, folder))


def count(folder: Path, kills: int) -> None:
    (folder / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\n")


def test_enough(limit: Path, run_here: RunHere) -> None:
    outcome = run_here("--train.steps", 1)
    assert outcome.code == 0 and "warning" not in outcome.err


@pytest.mark.parametrize(("size", "swap", "dry", "code", "says"), [
    (520_100_000, False, False, 0, "warning: 1 rank needs about 52"),
    (5 * 10**8, False, False, 0, "warning: 1 rank needs about 52"),
    (2 * 10**8, True, False, 0, "warning: 1 rank needs about 52"),
    (2 * 10**8, False, False, 2, "error: 1 rank needs about 52"),
    (2 * 10**8, False, True, 0, "warning: 1 rank needs about 52"),  # it may be meant for another machine
])
def test_said_before(limit: Path, size: int, swap: bool, dry: bool, code: int, says: str, run_here: RunHere,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, size, limit)
    monkeypatch.setattr(machine, "has_swap", lambda: swap)
    outcome = run_here("--train.steps", 1, *(["--dry-run"] if dry else []))
    assert outcome.code == code
    (line,) = [line for line in outcome.err.splitlines() if line.startswith(says)]
    assert f"but the job's memory cgroup has a limit of {size_text(size)}: {LESS}" in line
    assert outcome.run.exists() == (code == 0 and not dry)


def test_many_ranks_and_their_launcher(limit: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "warning: 2 ranks need about 1.3" in run_here("--train.steps", 1).err  # torch thrice is 0.9 GB
    bound(monkeypatch, 899 * 10**6, limit)
    assert "error: 2 ranks need about 1.3" in run_here("--train.steps", 1).err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")  # the first of another machine, whose own limit it is
    assert "error on rank 2: 2 ranks need about 1.3" in run_here("--train.steps", 1).err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_here("--train.steps", 1).err == ""


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """A memory cgroup of the kernel's with a limit of 200 MB."""
    name = f"largescale_test_{os.getpid()}"
    around = next(iter(machine._cgroups("memory")), None)
    if around is None or (Path("/proc/meminfo").exists() and machine.has_swap()):
        pytest.skip("no memory cgroups here, or swap")
    limits = [file for file in ("memory.limit_in_bytes", "memory.max") if (around / file).exists()]
    folder = around / name
    try:
        folder.mkdir()
        (folder / (limits or ["memory.max"])[0]).write_text(str(200 * 10**6))
    except OSError as error:
        folder.rmdir() if folder.exists() else None
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


def test_the_kernels_own_limit_is_read_before_torch_is_loaded(real_cgroup: Path, blobs: Path, tmp_path: Path) -> None:
    """With torch it would be killed."""
    enter = f"echo $$ > {real_cgroup}/cgroup.procs && exec \"$@\""
    done = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-m", "largescale.train", "debug", "--data.path", blobs, "--output", tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "1"})
    assert done.returncode == 2, done.stderr
    assert "error: 1 rank needs about 520 MB of this machine's memory" in done.stderr
    assert "the job's memory cgroup has a limit of 200 MB" in done.stderr


def killed(run: Path) -> run_record.Start:
    """A start that said nothing of its end."""
    start = run_record.begin(run, began_unix_s=10, world_size=2, device="cpu", from_step=0, settings={})
    run_record.write(run, start)
    return start


def test_named_by_the_next_start(limit: Path, run_here: RunHere, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = killed(run)
    start.seen_unix_s = 20.0  # long ago: it does not run
    run_record.write(run, start, seen=False)
    count(limit, 4)
    said = f"killed by signal 9; the job's memory cgroup has a limit of 900 MB, and counts an out-of-memory kill: {LESS}"
    assert said in status.facts(run)["standing"]
    again, why = requeue.decide(run, 137, 5, "7", 0)
    assert again and said in why
    assert f"the start before was {said}" in run_here("--train.steps", 1, output=run).err
    first, second = run_record.read_starts(run)
    assert str(first.ended).startswith(said) and (second.ended, second.oom_kills) == ("finished", 4)


def test_what_is_no_kill_for_memory(limit: Path, tmp_path: Path) -> None:
    start = killed(tmp_path / "run")
    assert run_record.out_of_memory(start) is None
    count(limit, 6)
    assert "counts 3 out-of-memory kills" in str(run_record.out_of_memory(start))
    for change in ({"host": "elsewhere"}, {"memory": "/sys/fs/cgroup/other"}, {"ended": "stopped"}):
        assert run_record.out_of_memory(replace(start, **change)) is None
    assert start.host == socket.gethostname()


def test_noted_by_a_rank_that_is_left(limit: Path, tmp_path: Path) -> None:
    start = killed(tmp_path / "run")
    run_record.note_end(tmp_path / "run", start.seen_unix_s + 1, "of another start")
    assert run_record.read_starts(tmp_path / "run")[0].ended is None
    run_record.note_end(tmp_path / "run", start.began_unix_s, "killed by signal 9")
    (noted,) = run_record.read_starts(tmp_path / "run")
    assert (noted.ended, noted.seen_unix_s) == ("killed by signal 9", start.seen_unix_s)
    run_record.note_end(tmp_path / "nowhere", 0, "killed")
