"""How a loss converges, as eval.difficulty tells it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.difficulty_study.convergence import LossCurve, converge, rank_correlation, read_losses


def curve(loss: np.ndarray) -> LossCurve:
    return LossCurve(np.arange(1, len(loss) + 1), np.asarray(loss, float))


def test_a_loss_that_only_falls() -> None:
    step = np.arange(1, 4001)
    found = converge(curve(0.3 + np.exp(-step / 500)), patience=200)
    assert (found.rises, found.smoothed_rises, found.oscillates_from, found.steps) == (0, 0, None, 4000)
    # of the mean of the last 100 of exp(-s / tau), all but the start; below a tenth of its range
    lag = (math.exp(100 / 500) - 1) / (100 * (1 - math.exp(-1 / 500)))
    assert found.final == pytest.approx(0.3 + math.exp(-8) * lag * math.exp(-1 / 500), rel=1e-3)
    assert found.falls_until == pytest.approx(500 * math.log(10 * lag), abs=8)


def test_rises_are_counted_after_step_100() -> None:
    """A saw of four steps up and one down has 4 rises in 5 steps; those up to step 100 do not count."""
    loss = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], 60)       # 300 steps: up to each but the first of five
    found = converge(curve(loss), patience=200)
    assert found.rises == 160
    assert converge(curve(loss[:100]), patience=200).rises == 0 and converge(curve(loss[:103]), patience=200).rises == 2
    assert found.smoothed_rises == 0                    # W = 15: the mean is the same at all of them


def test_the_smoothed_loss() -> None:
    loss = np.random.default_rng(0).normal(size=3000)
    smoothed = curve(loss).smoothed
    assert curve(loss).window == 100 and curve(loss[:300]).window == 15 and curve(loss[:3]).window == 1
    assert smoothed[99:] == pytest.approx(np.convolve(loss, np.full(100, 0.01), "valid"))
    assert smoothed[:3] == pytest.approx([loss[0], loss[:2].mean(), loss[:3].mean()])
    assert curve(loss).normalised.max() == 1 and curve(loss).normalised.min() == 0
    assert curve(np.full(40, 2.0)).normalised.tolist() == [0] * 40


def test_where_it_begins_to_oscillate() -> None:
    """It falls to step 1,000 and stays above that from there on; with a patience that outlasts the rest, nowhere."""
    step = np.arange(1, 2001)
    loss = np.where(step <= 1000, 2 - step / 1000, 1.0 + 1e-3 * np.sin(step) ** 2)
    w = 100                                             # the mean over the last 100 is least when all of them are flat
    least = int(np.argmin(curve(loss).smoothed)) + 1
    assert 1000 + w <= least + 60 and converge(curve(loss), patience=200).oscillates_from is not None
    flat = np.where(step <= 1000, 2 - step / 1000, 1.5)
    assert converge(curve(flat), patience=200).oscillates_from == 1000
    assert converge(curve(flat), patience=1000).oscillates_from == 1000
    assert converge(curve(flat), patience=1001).oscillates_from is None


def test_slower_is_told_from_faster() -> None:
    """By all numbers but the count of single steps, which the noise of a batch decides."""
    step, random = np.arange(1, 5001), np.random.default_rng(1)
    found = [converge(curve(np.exp(-step / tau) + random.normal(0, 0.02, 5000)), patience=200) for tau in (1500, 600, 150)]
    for name, falling in (("smoothed_rises", False), ("oscillates_from", True), ("falls_until", True)):
        values = [getattr(c, name) if getattr(c, name) is not None else 5001 for c in found]
        assert values == sorted(values, reverse=falling) and values[0] != values[-1], name
    rises = [c.rises / 4900 for c in found]
    assert max(rises) - min(rises) < 0.03 and rises == pytest.approx([0.5] * 3, abs=0.03)


def test_a_late_peak() -> None:
    """What the loss was before its largest value does not count as having fallen."""
    loss = np.concatenate([np.zeros(5), np.linspace(10, 0, 95)])
    assert converge(curve(loss), patience=5).falls_until > 80


def test_reading_losses(tmp_path: Path) -> None:
    rows = [{"step": 0, "event": "started", "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0},
            {"step": 2, "reference/C1": 0.1}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    found = read_losses(tmp_path)
    assert (found.step.tolist(), found.loss.tolist()) == ([1, 2, 4], [1.0, 3.0, 4.0])
    assert len(read_losses(tmp_path / "nothing").step) == 0


def test_rank_correlation() -> None:
    assert rank_correlation([5, 4, 2, 1]) == pytest.approx(-1) and rank_correlation([1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([None, 7, 3]) == pytest.approx(-1)              # not at all: later than any
    assert rank_correlation([1, 3, 2, 4, 5]) == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert rank_correlation([1, 1, 2]) == pytest.approx(math.sqrt(3) / 2)   # ties share a rank
    assert rank_correlation([1, 1, 2, 3]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 2]) is None and rank_correlation([3, 3, 3, 3]) is None
