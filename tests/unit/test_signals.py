"""A polite stop, whatever asks for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.host import signals
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import QUIET
from tests.ranks import ROOT


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_each_asks_to_stop(number: str) -> None:
    signals.serve_stop_signals()
    assert not signals.stop_requested()
    for _ in range(2):
        os.kill(os.getpid(), getattr(signal, f"SIG{number}"))
        assert signals.stop_requested()


def test_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.serve_stop_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not signals.stop_requested()


def test_a_terminal_that_is_closed(blobs: Path, tmp_path: Path) -> None:
    """The kernel sends HUP, and nothing can be said any more: the run saves and leaves all the same."""
    ours, theirs = os.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "largescale.train", "debug", "--data.path", str(blobs), "--output", str(tmp_path / "run"),
         *map(str, QUIET), "--train.steps", "1000000", "--checkpoint.every", "1000000", "--telemetry.log-every", "1"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True, preexec_fn=lambda: os.login_tty(os.dup(0)))
    os.close(theirs)
    try:
        os.set_blocking(ours, False)
        end = time.monotonic() + 600
        while len(read_metrics(tmp_path / "run")) < 5 and program.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
            try:
                os.read(ours, 65536)  # what it says: nobody would read it otherwise, and it would wait
            except OSError:
                continue
        os.close(ours)
        assert program.wait(300) == signals.EXIT_REQUEUE
    finally:
        program.kill()
    newest = checkpoints(tmp_path / "run")[0]
    assert newest.step >= 5 and newest.problem() is None
    assert read_starts(tmp_path / "run")[-1].ended == "stopped"
