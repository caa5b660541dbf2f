"""The short form of chaos.py, whose long form is run by hand: python tests/e2e/chaos.py --minutes 20."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("seed", "more"), [("5", ("--starts", "4", "--steps", "160")), ("2", ("--starts", "3", "--steps", "120", "--world-sizes", "1", "2", "3"))]
)
def test_disturbed_at_random(seed: str, more: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "tests/e2e/chaos.py"), "--fork", "--seed", seed, *more]
    chaos = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = chaos.communicate(timeout=6000)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chaos.pid, signal.SIGKILL)  # its ranks too
    print(out)
    assert chaos.returncode == 0 and "nothing was lost" in out, out + err
