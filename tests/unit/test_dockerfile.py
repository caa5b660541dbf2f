"""What goes into the image, and how a program starts in it. That it builds, docs/containers.md tells."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.ranks import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_what_is_taken_is_there() -> None:
    """And the programs of the README with what they read; of the rest of a clone nothing."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and {"largescale", "data_prep", "eval", "ds_configs", "slurm"} <= taken
    assert [name for name in taken if not (ROOT / name).exists()] == []
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M)
    assert {name for names in copied for name in names.split()} - {"."} <= taken


def test_its_extras() -> None:
    """All but those for development, for the examples, for the site, for trackers and for clusters that have their own image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"--extra ([\w-]+)", DOCKERFILE)) == set(project["optional-dependencies"]) - {"dev", "docs", "examples", "wandb", "mlflow", "ray"}


def test_where_its_python_is() -> None:
    default = re.search(r"PYTHON:-(/\S+)/bin/python}", (ROOT / "slurm/env.sh").read_text())
    assert default and f"python3 -m venv {default[1]};" in DOCKERFILE


@pytest.mark.parametrize("home", ["/", "", None, "missing", "."])
def test_entrypoint(home: str | None, tmp_path: Path) -> None:
    """A user without a home has /tmp, one without a name the number; the status is the program's."""
    env = {"PATH": os.environ["PATH"]}
    if home is not None:
        env["HOME"] = str(tmp_path / home) if home in (".", "missing") else home
    done = subprocess.run([ROOT / "entrypoint.sh", "sh", "-c", 'echo "$HOME $LOGNAME $1"; exit 75', "sh", "a b"], env=env,
                          text=True, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 75
    home, name, argument = done.stdout.rstrip("\n").split(" ", 2)
    assert home == (str(tmp_path) if env.get("HOME") == str(tmp_path) else "/tmp") and name and argument == "a b"
