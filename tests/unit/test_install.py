"""install.py, without a network: a `uv` that writes down how it was called stands in for the real one."""

import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import install

ROOT = Path(__file__).parents[2]
FAKE_UV = """#!/bin/sh
exec {python} - "$@" <<'END'
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
if sys.argv[1:] == ["--version"]:
    print("uv {version} (somewhere)")
elif os.path.exists({broken!r}):
    sys.exit(1)
END
"""


class Clone:
    """A folder with install.py and a .venv of Python's own, and a PATH that leads to no other uv than the fake one."""

    def __init__(self, folder: Path, venv: Path):
        self.folder, self.log, self.broken = folder / "a clone", folder / "log", folder / "broken"
        self.venv, self.record = self.folder / ".venv", self.folder / ".venv/installed.json"
        self.folder.mkdir()
        for name in ("install.py", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(venv, self.venv, symlinks=True)
        self.uv = folder / "bin/uv"
        self.uv.parent.mkdir()
        self.make_uv(".".join(map(str, install.OLDEST_UV)) + ".7")

    def make_uv(self, version: str) -> None:
        self.uv.write_text(FAKE_UV.format(python=shlex.quote(sys.executable), log=str(self.log), broken=str(self.broken), version=version))
        self.uv.chmod(0o755)

    def install(self, *extras: str, **env: str) -> "subprocess.CompletedProcess[str]":
        self.log.unlink(missing_ok=True)
        home = {"HOME": str(self.folder.parent), "PATH": f"{self.uv.parent}:/usr/bin:/bin"}
        return subprocess.run([sys.executable, self.folder / "install.py", *extras], env=home | env, capture_output=True, text=True)

    def calls(self, what: str = "pip") -> list[tuple[list[str], dict[str, str]]]:
        """Of uv: arguments and environment."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in map(json.loads, lines) if call[0][0] == what]


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: it takes seconds."""
    venv = tmp_path_factory.mktemp("install") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    return venv


@pytest.fixture
def clone(tmp_path: Path, venv: Path) -> Clone:
    return Clone(tmp_path, venv)


def test_every_dependency_is_pinned_with_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    entries = dict(re.findall(r"(?m)^([a-z0-9._-]+)==.*\\\n((?:    --hash=.*\n)+)", text))
    assert set(re.findall(r"(?m)^([a-z0-9._-]+)==", text)) == entries.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *itertools.chain(*(extras[name] for name in install.EXTRAS))]
    names = {re.split(r"[<>=\[ ]", dependency)[0].lower().replace("_", "-") for dependency in wanted} - {"largescale"}  # an extra that brings another
    assert names <= entries.keys()
    assert {*install.EXTRAS, *install.NOT_LOCKED} == extras.keys()


def test_what_is_installed_and_that_it_is_installed_once(clone: Clone) -> None:
    first = clone.install("demo")
    assert first.returncode == 0, first.stderr
    (packages, _), (project, _) = clone.calls()
    assert {"--require-hashes", "--constraints", "--build-constraints", "--extra", "demo"} <= set(packages)
    assert {"--no-deps", "--editable"} <= set(project)
    assert clone.install("demo").returncode == 0 and clone.calls() == []
    assert clone.install("demo", "prep").returncode == 0 and len(clone.calls()) == 2
    assert clone.install("prep").returncode == 0 and clone.calls() == []
    with (clone.folder / "requirements.lock").open("a") as lock:
        lock.write("# other versions\n")
    assert clone.install("demo").returncode == 0 and len(clone.calls()) == 2
    assert json.loads(clone.record.read_text())["extras"] == ["demo"]  # prep is still that of the old versions


def test_an_installation_that_fails_is_said_and_goes_on(clone: Clone) -> None:
    clone.broken.touch()
    failed = clone.install("demo")
    assert failed.returncode == 1 and "the same command goes on from here" in failed.stderr and not clone.record.exists()
    clone.broken.unlink()
    assert clone.install("demo").returncode == 0 and clone.record.exists()


def test_an_upgrade_that_fails_is_not_taken_for_done(clone: Clone) -> None:
    """Also where the old versions are asked for again: some of the packages are new ones already."""
    clone.install("demo")
    clone.broken.touch()
    lock = clone.folder / "requirements.lock"
    before = lock.read_text()
    lock.write_text(before + "# other versions\n")
    assert clone.install("demo").returncode == 1 and not clone.record.exists()
    clone.broken.unlink()
    lock.write_text(before)
    assert clone.install("demo").returncode == 0 and len(clone.calls()) == 2


def empty(venv: Path) -> None:
    shutil.rmtree(venv)
    venv.mkdir()


def without_pip(venv: Path) -> None:
    shutil.rmtree(next(venv.glob("lib/python*/site-packages/pip")))


def python_removed(venv: Path) -> None:
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/usr/bin/python3.0")


def python_replaced(venv: Path) -> None:
    """As a new release of the system does: the packages lie in the old one's folder."""
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.10.2\n")


@pytest.mark.parametrize("breaks", [empty, python_removed, python_replaced])
def test_a_venv_that_does_not_work_is_made_anew(clone: Clone, breaks: Callable[[Path], None]) -> None:
    clone.install("demo")
    breaks(clone.venv)
    done = clone.install("demo")
    assert done.returncode == 0, done.stderr
    assert len(clone.calls()) == 2 and clone.record.exists()
    version = subprocess.run([clone.venv / "bin/python", "-m", "pip", "--version"], capture_output=True, text=True).stdout
    assert "python {}.{}".format(*sys.version_info) in version


def test_a_venv_without_pip_is_made_anew_where_there_is_no_uv(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    clone.install("demo")
    monkeypatch.setattr(install, "VENV", clone.venv)
    monkeypatch.setattr(install, "PYTHON", clone.venv / "bin/python")
    version = "{}.{}".format(*sys.version_info)
    assert install.version_in_venv(pip_needed=True) == version
    without_pip(clone.venv)
    assert install.version_in_venv(pip_needed=True) is None and install.version_in_venv(pip_needed=False) == version


def test_an_old_uv_is_passed_over(monkeypatch: pytest.MonkeyPatch, clone: Clone) -> None:
    monkeypatch.setenv("PATH", str(clone.uv.parent))
    assert install.uv_on_path() == str(clone.uv)
    clone.make_uv("0.2.37")
    assert install.uv_on_path() is None
    clone.uv.write_bytes(b"\x7fELF of another machine")
    assert install.uv_on_path() is None
    clone.uv.unlink()
    assert install.uv_on_path() is None
    clone.make_uv("9.9.9")
    monkeypatch.setattr(install, "VENV", clone.uv.parents[1])
    assert install.uv_on_path() is None


def test_the_users_settings_of_pip_and_not_his_paths(clone: Clone, tmp_path: Path) -> None:
    clone.install("demo", PIP_INDEX_URL="https://mirror.example/simple", PIP_CERT="/etc/company.pem", PYTHONPATH="/elsewhere",
                  UV_HTTP_TIMEOUT="7")
    (_, env), _ = clone.calls()
    assert env["UV_DEFAULT_INDEX"] == "https://mirror.example/simple" and env["SSL_CERT_FILE"] == "/etc/company.pem"
    assert env["UV_HTTP_TIMEOUT"] == "7" and "PYTHONPATH" not in env and "UV_CACHE_DIR" not in env
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://old.example\nproxy = http://proxy.example:3128\n"
                                       "[install]\nindex-url = https://new.example/simple\ntrusted-host =\n    a.example\n    b.example\n")
    clone.install("prep", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    (_, env), _ = clone.calls()
    assert env["UV_DEFAULT_INDEX"] == "https://new.example/simple" and env["UV_INSECURE_HOST"] == "a.example b.example"
    assert env["HTTPS_PROXY"] == env["HTTP_PROXY"] == "http://proxy.example:3128"


def test_a_home_that_cannot_be_written(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder, so not even root can write there")
    done = clone.install("demo", HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    (_, env), _ = clone.calls()
    assert env["UV_CACHE_DIR"] == str(clone.venv / "cache")


def test_a_cache_on_another_disk_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would hold everything a second time."""
    monkeypatch.setattr(install, "VENV", tmp_path)
    assert install.is_beside(tmp_path / "cache/uv")
    if Path("/dev/shm").is_dir() and os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
            assert not install.is_beside(Path(elsewhere))


def test_a_second_installation_says_that_it_waits(clone: Clone) -> None:
    with (clone.folder / "install.py").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = subprocess.Popen([sys.executable, clone.folder / "install.py", "demo"], stdout=subprocess.PIPE, text=True,
                                  env={"HOME": str(clone.folder), "PATH": f"{clone.uv.parent}:/usr/bin:/bin"})
        assert second.stdout
        assert second.stdout.readline() == "another installation into .venv is running: waiting for its end\n"
        assert second.poll() is None and not clone.record.exists()
    assert second.wait(300) == 0 and clone.record.exists()


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 15)])
def test_other_pythons_are_refused_with_one_that_is_there(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1))
    monkeypatch.setattr(shutil, "which", lambda name: name == "python3.13")
    with pytest.raises(SystemExit, match=r"3\.11 to 3\.14, .* is 3\.\d+; try make PYTHON=python3\.13$"):
        install.check_python()


@pytest.mark.parametrize(("gone", "says"), [("ensurepip", r"apt install python3\.\d+-venv"), ("disk", r"0\.5 GB free, .* take 7 GB")])
def test_what_an_environment_cannot_be_made_without(gone: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = SimpleNamespace(free=5 * 10**8 if gone == "disk" else 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=says):
        install.make_venv(uv=None)


def test_it_is_readable_for_an_old_python() -> None:
    """So that a person reads which Python is needed."""
    import ast

    ast.parse((ROOT / "install.py").read_text(), feature_version=(3, 6))


def test_the_makefile_starts_ranks_by_address_and_in_an_environment_of_its_own() -> None:
    """A machine whose name does not resolve, and a cluster's PYTHONPATH."""
    makefile = (ROOT / "Makefile").read_text()
    assert "--local-addr 127.0.0.1" in makefile
    shown = subprocess.run(["make", "--silent", "-f", "-", "show"], input=makefile + "\nshow:\n\t@env\n", text=True, cwd=ROOT,
                           capture_output=True, env=os.environ | {"PYTHONPATH": "/elsewhere", "PYTHONDONTWRITEBYTECODE": "1"}, check=True)
    assert "PYTHONPATH" not in shown.stdout and "PYTHONDONTWRITEBYTECODE" not in shown.stdout


@pytest.mark.parametrize(("target", "variable"), [("demo", "RUN"), ("demo-text", "TEXT_RUN")])
def test_a_run_of_the_demo_in_a_folder_with_spaces(target: str, variable: str, tmp_path: Path) -> None:
    """The name of the folder is one word of every command, whatever is in it."""
    place = "/tmp/a b; touch x"
    shown = subprocess.run(["make", "-n", target, f"{variable}={place}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in shown.replace("\\\n", " ").splitlines() if " -m largescale." in line or " -m eval." in line]
    words = [word for command in commands for word in shlex.split(command) if "a b" in word]
    assert len(commands) >= 2 and words and all(word.startswith(place) for word in words)


def test_make_test_leaves_the_gpu_to_the_tests_of_it() -> None:
    """Some of those fill its memory, so nothing else may run beside them."""
    shown = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    beside, alone = (line for line in shown.splitlines() if "-m pytest" in line)
    assert beside.startswith("CUDA_VISIBLE_DEVICES= ") and "-n auto" in beside
    assert "CUDA_VISIBLE_DEVICES" not in alone and alone.endswith("-m pytest tests/gpu")


def test_make_clean_leaves_runs() -> None:
    shown = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv" in shown.split() and not any(word.startswith("runs") for word in shown.split())
