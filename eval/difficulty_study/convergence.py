"""How fast a model that is trained on one interval converges, read off its loss (section 4 of
arXiv:2403.10348).

The paper calls those tasks easy whose loss stops falling, and oscillates, early, and counts how
often the loss rises after step 100. Losses of single steps rise at nearly every other step from the
start, whatever the interval: the noise of a batch is larger than what a step gains. So that count
is given, and beside it two numbers of the smoothed loss.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from largescale.monitoring.telemetry import read_metrics

# Rises are counted after this step: before it every model's loss falls steeply.
AFTER = 100
# Steps that the smoothed loss is the mean of, at most.
WINDOW = 100
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Convergence:
    """How fast a loss L_s at steps s = 1 .. S has converged. The smoothed loss at s is the mean of
    the last W steps up to s, W the smaller of 100 and S / 20; normalised, it is 1 where it is
    largest and 0 where it is least."""

    steps: int
    """S, the number of steps."""
    final: float
    """The smoothed loss at step S."""
    rises: int
    """Steps s > 100 with L_s > L_{s-1}: the paper's count, as far as the paper describes it."""
    smoothed_rises: int
    """Steps s > 100 at which the smoothed loss rises: the fewer, the longer it keeps falling."""
    oscillates_from: int | None
    """The first step from W on whose smoothed loss is not undercut within the next `patience`
    steps, much as the curriculum would end a stage there. None: there is none, it falls to the
    end."""
    falls_until: int
    """The first step after the largest smoothed loss at which the normalised one is below 0.1. It
    hardly depends on the noise of the loss, but on how far it has fallen in S steps."""


@dataclass(frozen=True)
class LossCurve:
    """The training loss of a run, by step."""

    step: npt.NDArray[np.int64]
    loss: Array

    @property
    def window(self) -> int:
        """W: how many steps the smoothed loss is the mean of."""
        return max(1, min(WINDOW, len(self.loss) // 20))

    @property
    def smoothed(self) -> Array:
        """The smoothed loss (S,), over fewer steps where there are not W before."""
        # A running mean by differences of the running sum.
        total = np.concatenate([[0.0], self.loss.cumsum()])
        end = np.arange(1, len(self.loss) + 1)
        start = np.maximum(end - self.window, 0)
        return (total[end] - total[start]) / (end - start)

    @property
    def normalised(self) -> Array:
        """The smoothed loss (S,), scaled to [0, 1]; 0 where it never changes."""
        smoothed = self.smoothed
        return (smoothed - smoothed.min()) / ((smoothed.max() - smoothed.min()) or 1.0)


def read_losses(run: Path) -> LossCurve:
    """The losses in the run's metrics.jsonl; of two rows of one step the later. A run that logs
    every k-th step has means over k steps there, which count as observations."""
    # A run that was resumed has logged some steps twice; the later row is the one that counts.
    found = {}
    for row in read_metrics(run):
        if "loss" in row and "event" not in row:
            found[int(row["step"])] = float(row["loss"])
    steps = sorted(found)
    losses = [found[step] for step in steps]
    return LossCurve(np.array(steps, np.int64), np.array(losses, np.float64))


def converge(curve: LossCurve, patience: int) -> Convergence:
    """Measure a curve of at least one observation. `patience`: in observations."""
    smoothed = curve.smoothed
    # A rise belongs to the later of its two steps, so the first step has none.
    late = curve.step[1:] > AFTER
    # A loss that rises at first starts its fall at its top.
    top = int(np.argmax(smoothed))
    return Convergence(
        steps=int(curve.step[-1]),
        final=float(smoothed[-1]),
        rises=int((np.diff(curve.loss) > 0)[late].sum()),
        smoothed_rises=int((np.diff(smoothed) > 0)[late].sum()),
        oscillates_from=_oscillates_from(curve, patience),
        falls_until=int(curve.step[top + np.argmax(curve.normalised[top:] < 0.1)]),
    )


def _oscillates_from(curve: LossCurve, patience: int) -> int | None:
    """The step whose smoothed loss is not undercut within `patience` observations."""
    best = np.inf
    best_index = -1
    # Before a full window the mean is of fewer steps, and so noisier.
    first = curve.window - 1
    for i, loss in enumerate(curve.smoothed[first:], first):
        if loss < best:
            best = loss
            best_index = i
        elif i - best_index >= patience:
            return int(curve.step[best_index])
    return None


def rank_correlation(values: list[float | None]) -> float | None:
    """Spearman's rank correlation of values with their place in the list; None counts as the
    largest of all. Returns None where there are fewer than three values, or all are the same."""
    known = np.array([np.inf if value is None else value for value in values])
    # Two values always correlate fully, and equal ones have no deviation to divide by.
    if len(known) < 3 or (known == known[0]).all():
        return None

    # Equal values share the mean of their ranks.
    smaller = (known[:, None] > known).sum(1)
    equal = (known[:, None] == known).sum(1) - 1
    ranks = smaller + equal / 2
    return float(np.corrcoef(ranks, np.arange(len(known)))[0, 1])


def plain(convergence: Convergence) -> dict[str, Any]:
    """The numbers as JSON values."""
    return asdict(convergence)
