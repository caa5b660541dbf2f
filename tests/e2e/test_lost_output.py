"""Nobody reads what a run prints: a daemon's closed descriptors, a full disk under its log, `| head`. It trains all the
same, and its exit status is its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.monitoring.run_record import read_starts
from tests.conftest import QUIET
from tests.ranks import ROOT


@pytest.mark.parametrize("where", [
    ">&- 2>&-", pytest.param("> /dev/full 2>&1", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")),
    "2>&1 | head -n 1",
])
def test_a_run_whose_output_is_lost(where: str, blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f'"{sys.executable}" -m largescale.train debug --data.path "{blobs}" --output "{run}" --train.steps 6 --train.device cpu {{}}'
    program = f"set -o pipefail; {command.format(' '.join(map(str, QUIET)))} {where}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, timeout=900)
    assert done.returncode == 0
    assert checkpoints(run)[0].step == 6 and [start.ended for start in read_starts(run)] == ["finished"]
