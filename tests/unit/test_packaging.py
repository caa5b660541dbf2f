"""What `pip install largescale` brings: numpy and the curriculum; what trains is an extra."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from largescale.host import extras
from largescale.host.extras import TRAIN
from largescale.train import main

ROOT = Path(__file__).parents[2]
# Of a launcher or a user, and other packages'.
CLEAN = {name: value for name, value in os.environ.items() if not re.match("PYTHON|RANK|WORLD_SIZE|VIRTUAL_ENV", name)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", reason="a wheel is built with setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    for name in ("largescale", "data_prep", "eval", "ds_configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "bdist_wheel", "-d", folder], cwd=clone, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path) -> Path:
    """The Python of an empty environment, into which the wheel was installed with what it asks for."""
    pytest.importorskip("uv", reason="pip install -e '.[dev]' carries uv")
    venv = wheel.parent / "venv"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    install = [*uv, "pip", "install", "--quiet", "--python", venv, "--constraints", ROOT / "requirements.lock", wheel]
    said = ""
    for more in (["--offline"], []):  # numpy is in uv's cache, or else on PyPI
        done = subprocess.run([*install, *more], env=CLEAN | {"UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}, text=True, capture_output=True)
        if done.returncode == 0:
            return venv / "bin/python"
        said = done.stderr
    pytest.skip(f"numpy is neither in uv's cache nor to be had from PyPI: {' '.join(said.split())[-200:]}")


def run(python: Path, *args: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([python, *args], cwd=python.parent, env=CLEAN | env, text=True, capture_output=True, timeout=300)


def test_the_wheel_asks_for_numpy_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    asked = re.findall(r"(?m)^Requires-Dist: (.+)$", metadata)
    assert [line.split(">")[0] for line in asked if "extra ==" not in line] == ["numpy"]
    train = {re.split("[<>=]", line)[0] for line in asked if 'extra == "train"' in line}
    assert {name.replace("pillow", "PIL").replace("pyyaml", "yaml") for name in train} == TRAIN


def test_the_readmes_three_lines_where_nothing_else_is_installed(bare: Path) -> None:
    listed = run(bare, "-c", "from importlib.metadata import distributions as d; print(sorted(p.metadata['Name'] for p in d()))")
    assert listed.stdout == "['largescale', 'numpy']\n", listed.stderr
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = run(bare, "-c", code + "assert 0 < curriculum.observations and curriculum.index < 20, curriculum.index\n")
    assert done.returncode == 0, done.stderr


PROGRAMS = ("largescale.train debug", "largescale.status runs/x", "largescale.export runs/x", "largescale.requeue runs/x --status 1",
            "data_prep.digits --help", "eval.sample --help")


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_program_without_its_extra_is_one_error_that_names_it(bare: Path, command: str) -> None:
    done = run(bare, "-m", *command.split())
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: \w+ is not installed; pip install 'largescale\[train\]', in the clone: .*\n", done.stderr), done.stderr


def test_training_without_what_it_loads_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before ranks meet, which would wait for each other."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "deepspeed" else True)
    assert main(["debug"]) == 2
    assert capsys.readouterr().err.startswith("error: deepspeed is not installed; pip install 'largescale[train]', in the clone: ")


@pytest.mark.parametrize("program", ["", "mine.py", "-c"])
def test_the_programs_of_others_keep_their_tracebacks(bare: Path, program: str, tmp_path: Path) -> None:
    code = "import largescale.curriculum; import torch"
    (tmp_path / "mine.py").write_text(code)
    args = {"": ("-m", "mine"), "mine.py": (tmp_path / "mine.py",), "-c": ("-c", code)}[program]
    done = run(bare, *args, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" in done.stderr and "No module named 'torch'" in done.stderr
    assert "largescale[train]" not in done.stderr


def test_an_error_in_a_program_keeps_its_traceback(bare: Path) -> None:
    """A package that no extra brings is a bug of ours."""
    code = "import sys; from largescale.host.extras import name_the_extra; sys.excepthook = name_the_extra; import nowhere_at_all"
    done = run(bare, "-c", code)
    assert done.returncode == 1 and "Traceback" in done.stderr and "nowhere_at_all" in done.stderr
