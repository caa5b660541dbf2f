"""Slurm takes the scripts of slurm/ as they are shipped."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.slurm.conftest import SMALL_JOB, Job, Lab

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "env.sh")


@pytest.mark.parametrize("script", [*SCRIPTS, "env.sh"])
def test_bash(script: str) -> None:
    subprocess.run(["bash", "-n", f"slurm/{script}"], cwd=ROOT, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", f"slurm/{script}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_header(script: str, lab: Lab) -> None:
    """As shipped, on nodes of 8 GPUs and 96 cores."""
    where = "128 processors on nodes n[1-2] in" if script.startswith("dit") else "64 processors on nodes n1 in"
    if script == "difficulty.sh":
        where = "8 processors on nodes n1 in"  # each task of its array
    assert f"using {where}" in lab("sbatch", "--test-only", f"slurm/{script}")


@pytest.mark.parametrize(("folder", "settings", "said"), [
    ("elsewhere", {}, "error: no slurm/env.sh in {folder}; type sbatch in the clone's folder"),
    ("clone", {"PYTHON": "bin/nothing"}, "error: no bin/nothing in {folder}; python3 install.py train makes .venv, PYTHON=/where/it/is names another"),
])
def test_cannot_start(folder: str, settings: dict[str, str], said: str, lab: Lab, tmp_path: Path) -> None:
    """Says why, and is not requeued."""
    where = tmp_path if folder == "elsewhere" else ROOT
    script, log = ROOT / "slurm/pack_imagenet.sh", tmp_path / "log"
    number = lab("sbatch", "--parsable", *SMALL_JOB, f"--output={log}", script, env=settings, folder=where)
    job = Job(lab, number, log, tmp_path)
    assert said.format(folder=where) in job.ended("FAILED", restarts=0)
    assert job.fact("ExitCode") == "2:0"
