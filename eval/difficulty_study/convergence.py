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

AFTER = 100  # rises are counted after this step
WINDOW = 100  # steps that the smoothed loss is the mean of, at most
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Convergence:
    """Of a loss L_s at steps s = 1 .. S. The smoothed loss at s is the mean of the last W steps up
    to s, W the smaller of 100 and S / 20; normalised, it is 1 where it is largest and 0 where it is
    least."""

    steps: int
    """S."""
    final: float
    """The smoothed loss at S."""
    rises: int
    """Steps s > 100 with L_s > L_{s-1}: the paper's count, as far as it says."""
    smoothed_rises: int
    """The same of the smoothed loss: the fewer, the longer it goes on falling."""
    oscillates_from: int | None
    """The first step from W on whose smoothed loss is not undercut within the next `patience`
    steps, much as the curriculum would end a stage there. None: there is none, it falls to the
    end."""
    falls_until: int
    """The first step after the largest smoothed loss at which the normalised one is below 0.1.
    Hardly hinges on the noise of the loss, but on how far it has come in S steps."""


@dataclass(frozen=True)
class LossCurve:
    step: npt.NDArray[np.int64]
    loss: Array

    @property
    def window(self) -> int:
        return max(1, min(WINDOW, len(self.loss) // 20))

    @property
    def smoothed(self) -> Array:
        """(S,), over fewer steps where there are not W before."""
        total, w = np.concatenate([[0.0], self.loss.cumsum()]), self.window
        end = np.arange(1, len(self.loss) + 1)
        start = np.maximum(end - w, 0)
        return (total[end] - total[start]) / (end - start)

    @property
    def normalised(self) -> Array:
        smoothed = self.smoothed
        return (smoothed - smoothed.min()) / ((smoothed.max() - smoothed.min()) or 1.0)


def read_losses(run: Path) -> LossCurve:
    """What the run's metrics.jsonl holds; of two rows of one step the later. A run that logs every
    k-th step has means over k steps there, which count as observations."""
    found = {
        int(row["step"]): float(row["loss"])
        for row in read_metrics(run)
        if "loss" in row and "event" not in row
    }
    steps = sorted(found)
    return LossCurve(
        np.array(steps, np.int64), np.array([found[step] for step in steps], np.float64)
    )


def converge(curve: LossCurve, patience: int) -> Convergence:
    """`patience`: in observations. The curve has at least one."""
    smoothed, late = curve.smoothed, curve.step[1:] > AFTER
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
    best, since = np.inf, -1
    for i, loss in enumerate(curve.smoothed):
        if i + 1 < curve.window:
            continue
        if loss < best:
            best, since = loss, i
        elif i - since >= patience:
            return int(curve.step[since])
    return None


def rank_correlation(values: list[float | None]) -> float | None:
    """Spearman's, of values with their place in the list; None counts as the largest of all. None
    where there are fewer than three values, or all are the same."""
    known = np.array([np.inf if value is None else value for value in values])
    if len(known) < 3 or (known == known[0]).all():
        return None
    ranks = (known[:, None] > known).sum(1) + (
        (known[:, None] == known).sum(1) - 1
    ) / 2  # ties: the mean rank
    return float(np.corrcoef(ranks, np.arange(len(known)))[0, 1])


def plain(convergence: Convergence) -> dict[str, Any]:
    return asdict(convergence)
