"""What every program does with its command line before it is read."""

import re
import sys
from pathlib import Path

import pytest

from largescale.host.launch import arguments
from tests.conftest import RunHere
from tests.ranks import ROOT


def test_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves ~ alone after an equals sign; what is no path stays."""
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--output=~/runs/x", "--data.path=~", "~/x", "--out", "a~b", "--prompts=~ 5 apples", "--x=/y/~/z", "--note=a=~/b"]
    expected = ["--output=/home/ada/runs/x", "--data.path=/home/ada", "/home/ada/x", *given[3:]]
    assert arguments(given) == expected
    monkeypatch.setattr(sys, "argv", ["program", *given])
    assert arguments() == expected


def test_a_run_in_the_home_directory(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.chdir(tmp_path)
    assert run_here("--output=~/runs/x", "--train.steps", 1, "--train.ds-config", ROOT / "ds_configs/zero2_fp32.json").code == 0
    assert (tmp_path / "ada/runs/x/metrics.jsonl").exists() and not (tmp_path / "~").exists()


def test_a_field_by_its_former_name(run_here: RunHere) -> None:
    """Old files are read under their names; the command line takes today's, and names it."""
    outcome = run_here("--model.caption-tokens", 4)
    assert outcome.code == 2 and "Unrecognized options: --model.caption-tokens" in outcome.err, outcome.err
    assert "--model.max-caption-tokens" in outcome.err


def test_every_program() -> None:
    """All read their command line in one place, which knows of ~."""
    files = {path: path.read_text() for folder in ("largescale", "data_prep", "eval") for path in (ROOT / folder).rglob("*.py")}
    programs = [text for text in files.values() if '__name__ == "__main__"' in text]
    assert len(programs) >= 18 and all("parse_options(" in text or "packing.main(" in text for text in programs)
    readers = {path.name for path, text in files.items() if re.search(r"tyro\.cli\(|parse_args\(|sys\.argv", text)}
    assert readers == {"command_line.py", "launch.py"}
