"""docs/stage_ends.py: which batch a stage of the curriculum ended by."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largescale.config.schema import Config, CurriculumConfig, TrainConfig
from largescale.curriculum import Curriculum, PatiencePacing, uniform_clusters
from largescale.errors import CheckpointError, ConfigError, DataError
from tests.conftest import RunHere

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


def test_the_place_of_a_batch(stage_ends: Any) -> None:
    """By the mean over the batch, computed here for the second stage of five: u in [0.6, 1)."""
    config = Config("x", curriculum=CurriculumConfig(n_clusters=5, patience=3), train=TrainConfig(global_batch_size=4, seed=7))
    row = {"protocol": {"edges": np.linspace(0, 1, 6).tolist()}, "figures": {f"validation loss (raw weights) C{i}": {"value": 10.0**-i} for i in range(1, 6)}}
    means = []
    for number in range(20, 60):
        u = 0.6 + 0.4 * stage_ends.drawn(config, number)
        means.append(np.mean(10.0 ** -np.interp(u, [0.1, 0.3, 0.5, 0.7, 0.9], range(1, 6))))
    places = []
    for end in range(30, 60):
        # The lowest loss was patience + 1 steps ago.
        lowest = means[end - 20 - 5]
        places.append(stage_ends.place(config, row, 20, end, index=4))
        assert places[-1] == 1 + sum(mean < lowest for mean in means[: end - 20])
    assert len({*places}) > 10


def test_the_expected_loss(stage_ends: Any) -> None:
    """In a cluster's middle it is the cluster's; half-way between two the geometric mean."""
    row = {"protocol": {"edges": [0, 0.5, 1]}, "figures": {f"validation loss (raw weights) C{i}": {"value": value} for i, value in ((1, 0.4), (2, 0.1))}}
    found = stage_ends.expected_loss(np.array([0.25, 0.5, 0.75]), row)
    assert found == pytest.approx([0.4, 0.2, 0.1])


def test_what_it_is_not_about(stage_ends: Any, run_here: RunHere, tmp_path: Path) -> None:
    """The paper's curriculum only, for which its places hold."""
    for number, options in enumerate((("--curriculum.order", "hard_first"), ("--curriculum.loss-smoothing", 0.5), ("--noise.sampling", "mode"), ("--curriculum.pacing", "fixed"))):
        run = run_here("--train.steps", 1, *options, output=tmp_path / str(number)).run
        with pytest.raises(ConfigError, match="was not trained with the paper's curriculum"):
            stage_ends.lines_of(run)
    run = run_here("--train.steps", 8, "--curriculum.pacing", "patience", "--curriculum.patience", 0, output=tmp_path / "papers").run
    with pytest.raises(DataError, match=r"has no held-out loss behind step \d; run eval.compare first"):
        stage_ends.lines_of(run)
    with pytest.raises(CheckpointError, match="none"):
        stage_ends.lines_of(tmp_path / "none")
