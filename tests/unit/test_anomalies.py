"""Skipped windows of the data, and the watch for losses that leap."""

import itertools
import random
from pathlib import Path

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.monitoring.telemetry import read_metrics
from largescale.training.spikes import SpikeDetector
from largescale.training.state import SkippedInputs, input_step, skips_after_rollback
from tests.conftest import RunHere, trace


def test_without_skips_a_step_takes_its_own_inputs() -> None:
    assert [input_step(step, []) for step in range(5)] == list(range(5))


def test_a_window_is_left_out() -> None:
    """Bad at step 6, back to step 4: inputs 4, 5 and 6 are not used, and none is used twice."""
    skips = skips_after_rollback(6, 4, [], "why")
    assert skips == [SkippedInputs(4, 3, "why")]
    assert [input_step(step, skips) for step in range(8)] == [0, 1, 2, 3, 7, 8, 9, 10]


def test_again_from_the_same_checkpoint() -> None:
    """Inputs 7 .. 9 are bad too: both windows stay left out, as two."""
    skips = skips_after_rollback(6, 4, skips_after_rollback(6, 4, [], "a"), "b")
    assert [input_step(step, skips) for step in range(6)] == [0, 1, 2, 3, 10, 11] and len(skips) == 2


def test_back_beyond_an_earlier_window() -> None:
    """The checkpoint after that window was damaged: what it left out lies inside the new one."""
    first = skips_after_rollback(6, 4, [], "a")
    skips = skips_after_rollback(9, 2, first, "b")
    assert skips == [SkippedInputs(2, 11, "b")] and input_step(9, first) == 12 and input_step(2, skips) == 13


def test_any_sequence_of_skips_uses_no_input_twice_and_none_that_was_bad() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        skips: list[SkippedInputs] = []
        bad: set[int] = set()
        step = 0
        for _ in range(draw.randint(1, 6)):
            step += draw.randint(0, 20)
            bad.add(input_step(step, skips))
            back_to = draw.randint(max(0, step - 15), step)
            skips, step = skips_after_rollback(step, back_to, skips, ""), back_to
        inputs = [input_step(s, skips) for s in range(step + 50)]
        assert all(a < b for a, b in itertools.pairwise(inputs)), seed
        assert not bad & set(inputs), seed


def watch_of(*losses: float, factor: float = 3.0) -> SpikeDetector:
    watch = SpikeDetector(factor)
    for loss in losses:
        watch.observe(loss)
    return watch


def test_nothing_is_a_spike_before_the_mean_is_one() -> None:
    assert not watch_of(*[1.0] * 99).is_spike(1e9)
    watch = watch_of(*[1.0] * 100)
    assert watch.is_spike(3.01) and not watch.is_spike(2.99)


def test_the_usual_loss_forgets() -> None:
    """Exactly the geometric mean of the first hundred; after that a loss that has risen for good is no spike for long."""
    assert watch_of(*[1.0] * 50, *[4.0] * 50).usual == pytest.approx(2.0)
    risen = watch_of(*[1.0] * 100, *[4.0] * 100)
    assert risen.spikes == 24 and not risen.is_spike(4.0)  # 4 > 3 * 4 ** (1 - 0.99 ** k) for k below 23.2
    assert watch_of(*[1.0] * 100, 1e6).usual == pytest.approx(10**0.06)  # one leap moves it by 15 %


def test_each_stage_has_its_own() -> None:
    watch = watch_of(*[1.0] * 100)
    watch.new_stage()
    assert not watch.is_spike(100.0) and watch.count == 0


def test_state() -> None:
    watch, other = watch_of(*[1.0] * 100, 5.0), SpikeDetector(3.0)
    other.load_state_dict(watch.state_dict())
    assert vars(other) == vars(watch) and watch.spikes == 1


def test_spike_factor(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spikes are counted per run, said, and change nothing that is computed."""
    monkeypatch.setattr(SpikeDetector, "WINDOW", 3)
    settings = ("--train.steps", 24, "--curriculum.pacing", "none", "--optimizer.lr", 1e-9)
    found = {}
    for factor in (1.001, 3):
        run = run_here(*settings, "--anomaly.spike-factor", factor, output=tmp_path / str(factor)).run
        found[factor] = sum(row.get("event") == "spike" for row in read_metrics(run)), trace(run)
        assert checkpoints(run)[0].manifest()["state"]["spikes"]["spikes"] == found[factor][0]
    assert found[1.001][0] > 0 == found[3][0] and found[1.001][1] == found[3][1]


def test_which_inputs_a_run_reads(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, flips and every draw follow the skips."""
    import torch

    from largescale.data.loader import Loader
    from largescale.training import step as step_module

    read, drawn = [], []
    batch, draws, losses = Loader.batch, step_module.step_draws, step_module.TrainStep.micro_step_losses

    def recorded(self: Loader, step: int) -> object:
        read.append(step)
        return batch(self, step)

    def recorded_draws(seed: int, step: int, *args: object, **kwargs: object) -> object:
        drawn.append(step)
        return draws(seed, step, *args, **kwargs)  # type: ignore[arg-type]

    def bad(self: step_module.TrainStep, *args: object) -> object:
        result, *rest = losses(self, *args)  # type: ignore[arg-type]
        return (result._replace(loss=result.loss * torch.inf) if self.state.input_step == 6 else result), *rest

    monkeypatch.setattr(Loader, "batch", recorded)
    monkeypatch.setattr(step_module, "step_draws", recorded_draws)
    monkeypatch.setattr(step_module.TrainStep, "micro_step_losses", bad)
    outcome = run_here("--train.steps", 9, "--checkpoint.every", 4, "--anomaly.not-finite", "skip")
    assert outcome.code == 0, outcome.err
    assert read[1:] == drawn == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
