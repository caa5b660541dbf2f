"""tests/fresh_machine.sh refuses what cannot work before it makes or mounts anything."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fresh_machine.sh"


def answer(tmp_path: Path, *args: str, uid: int = 0) -> "subprocess.CompletedProcess[str]":
    """Where the user's id is uid, and no other program can be found."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (programs / "id").chmod(0o755)
    environment = {**os.environ, "PATH": str(programs)}
    return subprocess.run(["/bin/bash", str(SCRIPT), *args], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("args, uid, message", [
    ([], 0, "SUITE and FOLDER are needed; --help shows how"),
    (["--no-such", "trixie", "machine"], 0, "no option --no-such; --help lists them"),
    (["--cpus"], 0, "--cpus needs a value; --help lists the options"),
    (["--cpus", "0", "trixie", "machine"], 0, "--cpus 0: a number from 1 on is needed"),
    (["--path", "../clone", "trixie", "machine"], 0, "--path ../clone: it lies beneath /srv, without .."),
    (["--user", "--cache", "cache", "trixie", "machine"], 0, "--cache belongs to root: leave out --user"),
    (["trixie", "machine"], 1000, "making a Debian in a folder needs root: sudo tests/fresh_machine.sh ..."),
    (["trixie", "machine"], 0, "debootstrap is missing: apt-get install debootstrap"),
])
def test_what_cannot_work_is_one_line_that_says_why(tmp_path: Path, args: list[str], uid: int, message: str) -> None:
    said = answer(tmp_path, *args, uid=uid)
    assert (said.returncode, said.stdout, said.stderr) == (2, "", f"fresh_machine.sh: {message}\n")


def test_help_lists_every_option(tmp_path: Path) -> None:
    options = re.findall(r"^ +(--[a-z-]+(?: \| --[a-z-]+)*)\)", SCRIPT.read_text(), re.MULTILINE)
    options = [option for line in options for option in line.split(" | ")]
    assert len(options) > 5
    said = answer(tmp_path, "--help")
    assert said.returncode == 0
    assert [option for option in options if f"\n  {option} " not in said.stdout] == []
