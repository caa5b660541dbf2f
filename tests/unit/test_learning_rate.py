"""largescale/config/learning_rate.py: schedules of the learning rate and the ramp-up of the EMA, against closed forms."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights
from largescale.config.learning_rate import described, ema_decay, learning_rate
from largescale.config.presets import PRESETS, debug
from largescale.config.schema import Config, OptimizerConfig
from largescale.config.validation import remarks
from tests.conftest import RunHere, assert_same_run, cut


def config(steps: int = 1000, **optimizer: Any) -> Config:
    base = debug()
    return dataclasses.replace(base, optimizer=OptimizerConfig(lr=1e-3, **optimizer), train=dataclasses.replace(base.train, steps=steps))


@pytest.mark.parametrize(("optimizer", "expected"), [
    ({}, {0: 1e-3, 500: 1e-3, 10**7: 1e-3}),
    ({"warmup_steps": 100}, {0: 0, 1: 1e-5, 50: 5e-4, 100: 1e-3, 999: 1e-3}),
    ({"schedule": "linear"}, {0: 1e-3, 250: 7.5e-4, 500: 5e-4, 999: 1e-6, 1000: 0}),
    ({"schedule": "linear", "final_lr": 1e-4, "warmup_steps": 200}, {100: 5e-4, 200: 1e-3, 600: 5.5e-4, 1000: 1e-4, 2000: 1e-4}),
    ({"schedule": "linear", "decay_steps": 500}, {250: 5e-4, 500: 0, 999: 0}),
    ({"schedule": "cosine"}, {0: 1e-3, 250: 5e-4 * (1 + 0.5**0.5), 500: 5e-4, 750: 5e-4 * (1 - 0.5**0.5), 1000: 0}),
    ({"schedule": "cosine", "final_lr": 2e-4, "warmup_steps": 500}, {250: 5e-4, 500: 1e-3, 750: 6e-4, 1000: 2e-4}),
    ({"schedule": "wsd"}, {0: 1e-3, 900: 1e-3, 950: 5e-4, 1000: 0}),
    ({"schedule": "wsd", "warmup_steps": 10, "decay_steps": 500, "final_lr": 5e-4}, {5: 5e-4, 400: 1e-3, 500: 1e-3, 750: 7.5e-4, 1000: 5e-4}),
    ({"schedule": "inverse_sqrt", "warmup_steps": 100}, {50: 5e-4, 100: 1e-3, 400: 5e-4, 900: 1e-3 / 3}),
    ({"schedule": "inverse_sqrt", "decay_steps": 25}, {0: 1e-3, 25: 1e-3, 100: 5e-4}),
    ({"schedule": "inverse_sqrt"}, {0: 1e-3, 999: 1e-3}),
])
def test_closed_forms(optimizer: dict[str, Any], expected: dict[int, float]) -> None:
    for step, rate in expected.items():
        assert math.isclose(learning_rate(config(**optimizer), step), rate, rel_tol=1e-12, abs_tol=1e-18), step


def test_edms_own_recipe() -> None:
    """As its training_loop.py computes both, from the images seen before an update."""
    recipe = PRESETS["edm_ddpmpp_cifar10_original"]()
    for step in (0, 1, 1000, 19_531, 25_000, 390_624):
        images = 512 * step
        assert learning_rate(recipe, step) == pytest.approx(1e-3 * min(images / 10e6, 1), rel=2e-5)
        half_life = min(500_000, images * 0.05)
        assert ema_decay(recipe, step) == pytest.approx(0.5 ** (512 / max(half_life, 1e-8)), rel=1e-12)
    assert (recipe.train.steps, recipe.curriculum.pacing, recipe.model.class_dropout_prob) == (390_625, "none", 0)


def test_a_run_has_the_learning_rate_of_each_step(run_here: RunHere, tmp_path: Any) -> None:
    """Logged, also after it was cut and resumed, bitwise the run that was not."""
    options = ("--optimizer.schedule", "cosine", "--optimizer.warmup-steps", 5, "--optimizer.final-lr", 1e-4, "--checkpoint.keep-last", 9)
    truth = run_here(*options, output=tmp_path / "truth")
    assert truth.code == 0, truth.err
    base = debug()
    expected = dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, schedule="cosine", warmup_steps=5, final_lr=1e-4))
    assert [row["optimizer/lr"] for row in truth.trace()] == [learning_rate(expected, step) for step in range(20)]
    cut(truth.run, tmp_path / "cut", 10)
    assert_same_run(run_here(*options, output=tmp_path / "cut").run, truth.run)


def test_a_schedule_that_changes_on_resume_is_said_and_in_force(run_here: RunHere) -> None:
    run_here("--train.steps", 4)
    again = run_here("--train.steps", 8, "--optimizer.schedule", "linear")
    assert again.code == 0 and "in force from here on: optimizer.schedule: constant -> linear" in again.err
    assert [row["optimizer/lr"] for row in again.trace()] == [1e-3] * 4 + [1e-3 * (8 - step) / 8 for step in range(4, 8)]


def test_the_ema_of_a_run_with_a_ramp_up(run_here: RunHere) -> None:
    """Followed by hand from the master weights of every step."""
    options = ("--train.steps", 6, "--checkpoint.every", 1, "--checkpoint.keep-last", 9, "--checkpoint.keep-every", 0)
    run = run_here(*options, "--optimizer.ema-rampup", 0.5)
    assert run.code == 0 and "untrained weights" not in run.err, run.err
    average = named_weights(CheckpointDir.at(run.run, 0), "master")
    for step in range(6):
        decay = min(0.99, 0.5 ** (1 / (0.5 * step)) if step else 0)
        for name, weight in named_weights(CheckpointDir.at(run.run, step + 1), "master").items():
            average[name] = torch.lerp(average[name], weight, 1 - decay)
    found = named_weights(checkpoints(run.run)[0], "ema")
    assert [name for name in found if not torch.equal(found[name], average[name])] == []


@pytest.mark.parametrize(("optimizer", "note"), [
    ({"schedule": "cosine", "decay_steps": 400}, "the cosine schedule ends at step 400, the run at step 1,000: the last 600 steps have the learning rate 0"),
    ({"schedule": "linear", "warmup_steps": 500, "decay_steps": 1000}, "the learning rate ends at 0.0005, not at 0"),
    ({"schedule": "wsd", "warmup_steps": 500, "decay_steps": 1000}, "ends at step 1,500"),
    ({"warmup_steps": 1000}, "optimizer.warmup_steps=1,000 is not over at the end of the run, step 1,000"),
    ({"final_lr": 1e-5}, "--optimizer.final-lr has no effect with optimizer.schedule=constant"),
    ({"decay_steps": 5}, "--optimizer.decay-steps has no effect with a constant learning rate"),
])
def test_a_schedule_that_does_not_fit_the_run_is_noted(optimizer: dict[str, Any], note: str) -> None:
    assert any(note in remark for remark in remarks(config(**optimizer), 10)), remarks(config(**optimizer), 10)
    usual = {"schedule": optimizer.get("schedule", "constant")}
    assert not any("schedule" in remark or "rate" in remark for remark in remarks(config(**usual), 10))


@pytest.mark.parametrize(("optimizer", "noted"), [({}, True), ({"decay_steps": 1000}, True), ({"warmup_steps": 10}, False), ({"decay_steps": 999}, False)])
def test_inverse_sqrt_that_never_falls_is_noted(optimizer: dict[str, Any], noted: bool) -> None:
    settings = config(schedule="inverse_sqrt", **optimizer)
    assert any("inverse_sqrt schedule is constant" in remark for remark in remarks(settings, 10)) == noted
    assert (learning_rate(settings, 1000) == settings.optimizer.lr) == noted


def test_in_one_line(run_here: RunHere) -> None:
    assert described(config()) == "0.001, constant"
    line = described(config(schedule="cosine", warmup_steps=250))
    assert line.startswith("\u2581\u2582") and line.endswith("from 0 to 0.001 in 250 steps, cosine, 0 at the end") and len(line.split()[0]) == 40
    dry = run_here("--optimizer.schedule", "wsd", "--dry-run")
    assert dry.code == 0 and "learning rate: " + "\u2588" * 30 in dry.err
    wrong = run_here("--optimizer.schedule", "cosin")
    assert wrong.code == 2 and "cosine" in wrong.err
