"""docs/stage_ends.py: which batch a stage of the curriculum ended by."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largescale.curriculum import Curriculum, PatiencePacing, uniform_clusters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stage_ends() -> Any:
    spec = importlib.util.spec_from_file_location("stage_ends", ROOT / "docs/stage_ends.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("patience", [1, 3, 10])
def test_the_step_of_the_lowest_loss(stage_ends: Any, patience: int) -> None:
    """By the pacing itself."""
    curriculum = Curriculum(uniform_clusters(2), PatiencePacing(patience=patience))
    losses = [5.0, 4.0, 1.0, *[2.0] * 20]
    end = next(step for step, loss in enumerate(losses, 1) if curriculum.observe(loss))
    assert stage_ends.lowest_loss_at(end, patience) == 1 + losses.index(min(losses))


def test_the_expected_loss(stage_ends: Any) -> None:
    """In a cluster's middle it is the cluster's; half-way between two the geometric mean."""
    row = {"figures": {f"validation loss (raw weights) C{i}": {"value": value} for i, value in ((1, 0.4), (2, 0.1))}}
    found = stage_ends.expected_loss(np.array([0.25, 0.5, 0.75]), np.array([0, 0.5, 1]), row)
    assert found == pytest.approx([0.4, 0.2, 0.1])
