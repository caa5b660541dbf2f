"""The short form of chaos.py, whose long form is run by hand: python tests/e2e/chaos.py --minutes 20."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("seed", "more"), [("5", ("--starts", "4", "--steps", "500")), ("2", ("--starts", "3", "--steps", "300", "--world-sizes", "1", "2", "3"))]
)
def test_disturbed_at_random(seed: str, more: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "tests/e2e/chaos.py"), "--seed", seed, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost" in done.stdout
