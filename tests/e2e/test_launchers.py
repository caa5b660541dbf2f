"""What a user sees under other launchers than srun, and from other places than the clone."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import QUIET
from tests.ranks import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def arguments(blobs: Path, run: Path, *more: Any) -> list[str]:
    return [*map(str, ("-m", "largescale.train", "debug", "--data.path", blobs, "--output", run, *QUIET, *more))]


def children(pid: int) -> list[int]:
    """By /proc: a container may have no pgrep."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            found += [int(stat.parent.name)] if parent == pid else []
    return found


def test_the_last_word_under_torchrun_is_ours(tmp_path: Path, blobs: Path) -> None:
    """Its report of a failed rank ends with our line, of an error and of a stop alike."""
    done = subprocess.run([*TORCHRUN, "1", *arguments(tmp_path / "none", tmp_path / "run")], cwd=ROOT, env=ENV, text=True,
                          capture_output=True, timeout=900)
    line = f"{tmp_path}/none does not exist"
    assert done.returncode == 1 and f"error: {line}" in done.stderr
    assert line in done.stderr.rpartition("traceback :")[2]

    run = tmp_path / "run"
    process = subprocess.Popen([*TORCHRUN, "2", *arguments(blobs, run, "--train.steps", 100_000, "--telemetry.log-every", 1)], cwd=ROOT,
                               env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not read_metrics(run):
            assert process.poll() is None
            time.sleep(0.1)
        for rank in children(process.pid):
            os.kill(rank, signal.SIGTERM)
        said, _ = process.communicate(timeout=900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert f"stopped {run} at step {checkpoints(run)[0].step}," in said.rpartition("traceback :")[2]


def test_a_launcher_that_gives_the_local_rank_as_an_argument(tmp_path: Path, blobs: Path) -> None:
    """DeepSpeed's own puts it before all others."""
    command = [sys.executable, "-m", "largescale.train", "--local_rank=0", *arguments(blobs, tmp_path / "run", "--train.steps", 2)[2:]]
    env = {**ENV, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_installed_without_the_clone(tmp_path: Path, blobs: Path) -> None:
    """What `pip install .` puts in place trains, and brings the programs of data_prep and eval."""
    pytest.importorskip("setuptools")
    clone = tmp_path / "clone"
    for name in ("largescale", "data_prep", "eval", "ds_configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    built = subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "bdist_wheel", "-d", tmp_path],
                           cwd=clone, text=True, capture_output=True, timeout=600)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    env = {**ENV, "PYTHONPATH": str(tmp_path / "site")}
    (empty := tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, *arguments(blobs, tmp_path / "run", "--train.steps", 2)], cwd=empty, env=env, text=True,
                          capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for program in ("eval.sample", "data_prep.describe"):
        helped = subprocess.run([sys.executable, "-m", program, "--help"], cwd=empty, env=env, text=True, capture_output=True, timeout=900)
        assert helped.returncode == 0, helped.stderr


@pytest.mark.parametrize("program", ["largescale/train.py", "largescale/status.py", "data_prep/folder.py", "eval/sample.py"])
def test_a_program_by_its_path_from_any_folder(program: str, tmp_path: Path) -> None:
    helped = subprocess.run([sys.executable, ROOT / program, "--help"], cwd=tmp_path, env=ENV, text=True, capture_output=True,
                            timeout=900)
    assert helped.returncode == 0 and f"python -m {program.removesuffix('.py').replace('/', '.')}" in helped.stdout, helped.stderr
