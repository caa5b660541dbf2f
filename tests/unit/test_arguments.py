"""What every program does with its command line before it is read."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import sample
from largescale import export, requeue, status
from largescale.config.command_line import run_program
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


@pytest.mark.parametrize(("variables", "says"), [
    ({"RANK": "abc"}, "RANK='abc' in the environment must be a whole number of at least 0; torchrun and srun set it"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment must be a whole number of at least 1"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment must be"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5: RANK=5 must be below WORLD_SIZE=2; ranks are counted from 0"),
    ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK='1.5' in the environment must be"),
    ({"SLURM_RESTART_COUNT": "abc"}, "SLURM_RESTART_COUNT='abc' in the environment must be"),
    ({"SLURM_CPUS_PER_TASK": "many", "OMP_NUM_THREADS": ""}, "SLURM_CPUS_PER_TASK='many' in the environment must be"),
])
def test_a_launchers_variable_that_is_wrong(
    variables: dict[str, str], says: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = run_here()
    assert outcome.code == 2 and f"error: {says}".replace("error: rank", "error on rank") in outcome.err and "Traceback" not in outcome.err


def test_a_launchers_variable_that_is_empty_counts_as_unset(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process of its own sets RANK and WORLD_SIZE before DeepSpeed reads them, which it does once.
    assert run_here("--train.steps", 1, output=tmp_path / "first").code == 0
    for name in ("SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert run_here("--train.steps", 2).code == 0


@pytest.mark.parametrize("program", [status, export, requeue, sample])
def test_a_wrong_rank_in_other_programs(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(SystemExit) as left:
        program.main(["runs/none"])
    assert left.value.code == 2 and "error: RANK='abc' in the environment" in capsys.readouterr().err


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
    assert len(programs) >= 18 and all("parse_options(" in text or "program.main(" in text for text in programs)
    readers = {path.name for path, text in files.items() if re.search(r"tyro\.cli\(|parse_args\(|sys\.argv", text)}
    assert readers == {"command_line.py", "launch.py"}


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    """One line and a shell's status, where a program does not wait for a good moment to stop."""
    def work() -> None:
        raise KeyboardInterrupt

    assert run_program(work, "") == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
