"""The curriculum in other people's loops: each file of examples/ on two ranks, killed, and continued as if it had not been."""

import re
from pathlib import Path

import pytest

from tests.ranks import ROOT, ranks_of
from tests.unit.test_layers import imports

NEEDS = {"flow_matching": (), "edm": (), "diffusers_accelerate": ("accelerate", "diffusers"), "lightning_callback": ("pytorch_lightning",)}
MORE = {"diffusers_accelerate": ("--cpu",), "lightning_callback": ("--devices", "2")}
SMALL = ("--clusters", "10", "--patience", "0")
# Runs an example, and tells what its curriculum was shown.
OBSERVED = """
import runpy, sys
from largescale.curriculum import Curriculum
observe = Curriculum.observe
def observed(self, loss):
    print(f"observed {loss!r}", file=sys.stderr)
    return observe(self, loss)
Curriculum.observe = observed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# 20 steps, of 5 an epoch, with a checkpoint after the fifteenth
LENGTH = {name: ("--epochs", "4", "--save-every", "3") if name == "lightning_callback" else ("--steps", "20", "--save-every", "15") for name in NEEDS}


def log(name: str, checkpoint: Path) -> list[str]:
    """The lines of the steps that a start took."""
    done = ranks_of("-c", OBSERVED, f"examples/{name}.py", *MORE.get(name, ()), *SMALL, *LENGTH[name], "--checkpoint", checkpoint)
    assert [run.returncode for run in done] == [0, 0], "".join(run.stderr for run in done)
    first, second = (re.findall(r"(?m)^observed (.+)$", run.stderr) for run in done)
    assert first and first == second  # both ranks were shown the same loss, though their noise differs
    return re.findall(r"(?m)^step .+$", done[0].stdout)


def test_all_of_them_are_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*NEEDS}
    page = (ROOT / "docs/curriculum.md").read_text()
    assert all(f"](../examples/{name}.py)" in page and f" examples/{name}.py" in page for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason="pip install -e '.[examples]' carries it")
    whole = log(name, tmp_path / "checkpoint")
    assert [line.split()[1] for line in whole] == [str(step) for step in range(1, 21)]
    levels = [float(line.split()[-1]) for line in whole]
    assert levels == sorted(levels, reverse=True) and levels[0] > levels[14] > levels[-1], levels
    # As after a kill at the end: what came after the checkpoint is done again.
    assert log(name, tmp_path / "checkpoint") == whole[15:]


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_needs_the_curriculum_alone(name: str) -> None:
    ours = {module for module in imports(ROOT / "examples" / f"{name}.py") if module.startswith("largescale")}
    assert ours and all(module.startswith("largescale.curriculum") for module in ours)
