"""Nothing hangs for longer than its time limit and a minute, whoever is missing and whenever; a suspended run goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from largescale.distributed import watchdog
from largescale.distributed.watchdog import Watchdog
from largescale.errors import LargescaleError
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import QUIET, Train, trace
from tests.ranks import ROOT, ranks_of, running

ARGS = ("--train.steps", 12, "--telemetry.log-every", 1, "--checkpoint.every", 4, "--train.micro-batch-size", 4,
        "--train.timeout-s", 3)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank(frozen: int, tmp_path: Path, blobs: Path) -> None:
    """Its connections stay open and nothing answers: also where it keeps the store in which ranks call each other."""
    program = ("tests/dist/driver.py", "--freeze", 6, frozen, "--", "debug", "--data.path", blobs, *QUIET, *ARGS)
    with running(*program, "--output", tmp_path / "run") as started:
        (left,) = started.wait(1 - frozen)
        assert started.processes[frozen].exitcode is None
    who = "rank 1 does not answer" if frozen else "rank 0, or the launcher that keeps its store, does not answer"
    assert left.returncode == 1 and f"no progress for 3 s: {who}" in left.stderr, left.stderr


def test_a_file_system_that_does_not_answer(tmp_path: Path, train: Train) -> None:
    """When a run starts. A pipe that nobody writes to stands for it."""
    args = (*ARGS, "--output", tmp_path / "run")
    assert train(*args)[0].returncode == 0
    (manifest := tmp_path / "run/checkpoints/step_00000012/manifest.json").unlink()
    os.mkfifo(manifest)
    done = train(*args, "--train.steps", 24, driver=("--watch-from", "start-up: checkpoints"))
    assert [rank.returncode for rank in done] == [1, 1]
    assert "no progress for 3 s: ranks 0, 1 in start-up: checkpoints" in done[0].stderr, done[0].stderr


def test_a_port_that_somebody_else_has(tmp_path: Path, blobs: Path) -> None:
    """And at which nobody answers: rank 0 says so, and another rank does not wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        program = [sys.executable, "tests/dist/driver.py", "--watch-from", "start-up", "--", "debug", "--data.path", blobs,
                   *QUIET, *ARGS, "--output", tmp_path / "run"]
        env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        first, second = (subprocess.run([*map(str, program)], env={**env, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT,
                                        capture_output=True, text=True, timeout=900) for rank in "01")
    assert first.returncode == second.returncode == 1
    assert f"rank 0 cannot listen at 127.0.0.1:{port} (Address already in use); set MASTER_PORT" in first.stderr
    assert f"the 2 ranks did not find each other at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 3 s" in second.stderr


def test_a_suspended_run_goes_on(tmp_path: Path, blobs: Path, train: Train) -> None:
    """Both ranks are stopped for longer than a hang may last, as `scontrol suspend` does, and continued."""
    args = (*ARGS, "--train.steps", 80, "--train.timeout-s", 5)
    run, truth = tmp_path / "run", tmp_path / "truth"
    with running("-m", "largescale.train", "debug", "--data.path", blobs, *QUIET, *args, "--output", run) as started:
        while len(read_metrics(run)) < 20:
            assert all(process.exitcode is None for process in started.processes)
            time.sleep(0.05)
        started.signal(signal.SIGSTOP)
        time.sleep(8)
        started.signal(signal.SIGCONT)
        done = started.wait()
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr
    assert train(*args, "--output", truth)[0].returncode == 0 and trace(run) == trace(truth)


class Ended(Exception):
    pass


def test_only_the_time_in_which_it_ran_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for an hour does not hang; one that was running does, at its limit."""
    now, waits = [0.0], [1.0, 3600.0, 1.0, 1.0, *[1.0] * 12]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def end(error: LargescaleError) -> None:
        raise Ended

    def wait(seconds: float) -> bool:
        now[0] += waits.pop(0)
        return False

    monkeypatch.setattr(watchdog, "time", Clock)
    monkeypatch.setattr(watchdog, "end_at_once", end)
    looking = Watchdog(10)
    looking.limit_s = 10
    monkeypatch.setattr(looking._done, "wait", wait)
    with pytest.raises(Ended):
        looking._watch()
    assert now[0] == 3610 and len(waits) == 5  # 1 s before it was stopped, the wait that was stopped, and 9 s after


# ---- who may listen and speak


MEETING = """
import os, pathlib, sys
from largescale.distributed.ranks import Ranks
ranks = Ranks("cpu", 60)
if sys.argv[1] == "listen" and ranks.rank == 0:
    port = f"{int(os.environ['MASTER_PORT']):04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if address.endswith(":" + port) and state == "0A":
                print(address)
if sys.argv[1] == "speak":
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sys.argv[2]}",)
    import pickle
    if ranks.rank == 1:
        ranks.all_gather_bytes(pickle.dumps(Evil()))
    else:
        try:
            ranks.all_gather_json([1, "two", None])
        except ValueError:
            print("not understood")
ranks.barrier()
"""


def test_rank_0_listens_on_the_address_that_is_meant() -> None:
    done = ranks_of("-c", MEETING, "listen")
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout.split(":")[0] == "0100007F"  # 127.0.0.1, and nothing else


def test_what_a_rank_says_is_not_run(tmp_path: Path) -> None:
    done = ranks_of("-c", MEETING, "speak", tmp_path / "executed")
    assert done[0].stdout.strip() == "not understood", done[0].stderr
    assert not (tmp_path / "executed").exists()
