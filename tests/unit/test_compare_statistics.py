"""eval.compare: that the statistics and the validation loss are right."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from eval.comparison.statistics import (
    against_first,
    cluster_table,
    holm,
    mean,
    paired,
    standings,
    summary,
    t_test,
    table,
)
from eval.comparison.validation_loss import ValidationLoss, figure
from largescale.config.presets import PRESETS
from largescale.config.validation import ema_note
from largescale.data.fixed_noise_set import VALIDATION_SEED
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import Losses
from largescale.errors import DataError
from largescale.randomness import step_draws
from tests.unit.comparisons import one_thread, tiny_extractor  # noqa: F401

CPU = torch.device("cpu")


# ---- statistics


def rows(*values: float | None, name: str = "FD") -> list[dict[str, Any]]:
    return [{"step": 100 * (i + 1), "figures": {name: {"value": value}, "other": {"value": 0.0}}} for i, value in enumerate(values)]


def test_means_and_differences() -> None:
    assert mean([2.0, 4.0, 9.0]) == mean([9.0, 2.0, 4.0]) and mean([2.0, 4.0, 9.0]).value == 5
    assert mean([2.0, 4.0, 9.0]).spread == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert mean([3.0]).spread is None and str(mean([3.0])) == "3" and str(mean([1.0, 2.0])) == "1.5 ± 0.71"
    # Seeds spread by 10, each difference is -1 but for 0.1: pairing shows what the means hide.
    found = paired([9.0, 19.1, 28.9], [10.0, 20.0, 30.0])
    assert found.value == pytest.approx(-1.0) and found.error == pytest.approx(0.1 / math.sqrt(3)) and found.is_significant
    assert str(found) == "-1 ± 0.058, better (p = 0.00332)"
    assert str(paired([1.0, 1.2], [0.0, 0.0])) == "+1.1 ± 0.1, no significant difference (p = 0.0577)"
    assert str(paired([1.0, 1.02], [0.0, 0.0])) == "+1.01 ± 0.01, worse (p = 0.0063)" and str(paired([2.0], [1.0])) == "+1"
    assert not paired([2.0], [1.0]).is_significant and not paired([1.0, 1.0], [1.0, 1.0]).is_significant
    for seeds, quantile in enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), 2):  # a table's, of 97.5 %
        assert t_test(quantile * 1.001, 1.0, seeds) < 0.05 < t_test(-quantile * 0.999, 1.0, seeds)


def test_p_values() -> None:
    """Of 1 and 2 degrees of freedom in closed form; of more, as scipy has them from the values."""
    for t in (0.3, 1.0, 4.0):
        assert t_test(2 * t, 2.0, 2) == pytest.approx(1 - 2 / math.pi * math.atan(t))
        assert t_test(-t, 1.0, 3) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    ours, theirs = [1.0, 2.5, 3.0, 5.5], [1.5, 2.0, 4.5, 6.0]
    assert paired(ours, theirs).p_value == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)
    assert t_test(0.0, 0.0, 3) == 1 and t_test(0.1, 0.0, 3) == 0  # all differences alike


def test_holms_correction() -> None:
    """By hand: 0.01 x 4; 0.02 x 3; 0.03 x 2, as large as the one before; 0.9 x 1."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.04]) == [0.04] and holm([]) == []


def test_many_methods_that_do_nothing() -> None:
    """One of twenty looks significant by chance, every other time; with the correction, at most one time of twenty."""
    draws = np.random.default_rng(0).normal(size=(200, 21, 4))
    raw = adjusted = 0
    for draw in draws:
        found = against_first({str(i): list(values) for i, values in enumerate(draw)}).values()
        assert all(d.p_value is not None and d.p_adjusted is not None and d.p_adjusted >= d.p_value for d in found)
        raw += any(d.p_value < 0.05 for d in found if d.p_value is not None)
        adjusted += any(d.is_significant for d in found)
    assert adjusted <= 0.07 * 200 < 0.3 * 200 < raw


def test_standings() -> None:
    runs = {
        "vanilla": {0: rows(9, 5, 4, 4.5), 1: rows(10, 6, 5, 3)},           # best 4 at 300, 3 at 400
        "fast": {0: rows(5, 4, 3, 2), 1: rows(6, 3, 2, 1)},                 # reach these at 200, 200
        "half": {0: rows(5, 4.5, 4.2, 3.5), 1: rows(9, 8, 7, 6)},           # at 400, never
        "never": {0: rows(9, 8, 7, 6), 1: rows(9, 8, 7, 7)},
    }
    found = standings(runs, "FD")
    vanilla, fast, half, never = (found[name] for name in runs)
    assert vanilla.final == mean([4.5, 3]) and vanilla.best == mean([4, 3]) and vanilla.best_at == 350
    assert vanilla.difference is None and vanilla.reached == (300, 400) and vanilla.speedup == 1
    assert fast.difference == replace(paired([2, 1], [4.5, 3]), p_adjusted=fast.difference.p_adjusted) and fast.reached == (200, 200) and fast.speedup == 1.75
    assert half.reached == (400, None) and half.speedup is None
    assert never.reached == (None, None) and never.best == mean([6, 7]) and never.best_at == 350
    lines = table(found).markdown
    assert lines[2] == "| vanilla | 3.75 ± 1.1 | 3.5 ± 0.71 |  | 350 | 1.00 |"
    assert [s.difference.p_adjusted for s in (fast, half, never) if s.difference] == holm(
        [s.difference.p_value or 0 for s in (fast, half, never) if s.difference])
    assert lines[3].endswith("| -2.25 ± 0.25, no significant difference (p = 0.211, raw 0.0704) | 200 | 1.75 |")
    assert lines[4].endswith("| 400 (1 of 2 seeds) |  |") and lines[5].endswith("| not reached |  |")
    said = summary(found, "FD", 400)
    assert "at step 400, FD is 3.75 ± 1.1 by vanilla; 1.5 ± 0.71 by fast (difference -2.25 ± 0.25, no significant difference (p = 0.211, raw 0.0704); reaches vanilla's best at step 200)" in said
    assert "reaches vanilla's best at step 400 (1 of 2 seeds)" in said and "reaches vanilla's best never" in said and "\n" not in said


def test_a_distance_that_was_not_finite() -> None:
    """It is left out; the curve goes on without it."""
    found = standings({"vanilla": {0: rows(None, 5, 4)}, "other": {0: rows(9, None, 4)}}, "FD")
    assert found["vanilla"].reached == (300,) and found["other"].reached == (300,) and found["other"].best.value == 4
    with pytest.raises(DataError, match="FD was finite at no checkpoint"):
        standings({"vanilla": {0: rows(None, None)}}, "FD")


def test_clusters_in_percent() -> None:
    def run(*clusters: float) -> list[dict[str, Any]]:
        return [{"step": 1, "figures": {figure("EMA", f" C{i}"): {"value": v} for i, v in enumerate(clusters, 1)}}]

    lines = cluster_table({"vanilla": {0: run(2.0, 4.0), 1: run(4.0, 4.0)}, "other": {0: run(1.0, 4.4), 1: run(2.0, 4.8)}}, 2, "EMA").markdown
    assert lines == ["| method | C1 | C2 |", "|---|---|---|", "| vanilla | 3 | 4 |", "| other | -50.00 % ± 0.00 | +15.00 % ± 5.00 |"]


def test_what_is_said_of_a_long_ema() -> None:
    config = PRESETS["debug"]()                         # 20 steps at 0.99
    assert ema_note(config) == ("The EMA still holds 82% of the untrained weights at step 20: ema_decay=0.99 is for longer runs, for "
                                "20 steps try --optimizer.ema-decay 0.5.")
    digits = PRESETS["digits"]()                        # 2,400 at 0.997
    assert not ema_note(digits) and not ema_note(digits, 1533) and "below 1%" in ema_note(digits, 1532)
    assert ema_note(digits, 200) == "The EMA still holds 55% of the untrained weights at step 200: from step 1,533 on it is below 1%."
    none = replace(digits, optimizer=replace(digits.optimizer, ema_decay=0.0))
    assert ema_note(none, 0) and not ema_note(none, 1)


# ---- the validation loss


class Levels:
    """An objective whose loss is the noise level."""

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return v

    def training_losses(self, model: Any, x_start: Tensor, t: Tensor, noise: Tensor, y: Any) -> Losses:
        return Losses(t, t, t)


@pytest.fixture
def validation(blobs: Path) -> Callable[..., ValidationLoss]:
    def make(edges: tuple[float, ...], images: int, batch_size: int = 7) -> ValidationLoss:
        return ValidationLoss(ShardDataset(blobs), PRESETS["debug"](), edges, images, batch_size, CPU)

    return make


def test_which_noise_levels_a_cluster_has(validation: Callable[..., ValidationLoss]) -> None:
    """Evenly spaced in each: the mean is its middle."""
    found = validation((0.0, 0.1, 0.6, 1.0), 5)(nn.Identity(), Levels())  # type: ignore[arg-type]
    assert found == pytest.approx([0.05, 0.35, 0.8])


def test_the_loss_of_a_model_that_says_nothing(validation: Callable[..., ValidationLoss]) -> None:
    """It is that of the noise: its mean square."""
    config = PRESETS["debug"]()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, learn_sigma=False))
    noise = step_draws(VALIDATION_SEED, 0, 12, (1, 16, 16), dropout_prob=0.0, posterior=False, device=CPU).noise
    found = validation((0.0, 0.2, 0.5, 1.0), 4)(lambda x, t, y: torch.zeros_like(x), build_objective(config))  # type: ignore[arg-type]
    assert found == pytest.approx(noise.square().reshape(3, -1).mean(1).double().numpy())
