"""Curves of a log of any length, thinned in one pass: of each bin of steps the mean and the
extremes are kept, so that no spike is lost."""

from dataclasses import dataclass

import numpy as np

from largescale.monitoring.run_log import Columns

# A curve has between so many and twice as many bins, once it has that many rows.
BINS = 256


@dataclass(frozen=True)
class Curve:
    """A number over steps: a point for each bin that has one."""

    # The mean step of the values of a bin.
    step: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    # Values that were not finite, and are in no bin.
    not_finite: int

    @property
    def thinned(self) -> bool:
        """Whether a bin holds values that differ."""
        return bool((self.high > self.low).any())


class Series:
    """Every number of a log, in bins of equally many steps: a power of two, which grows with the
    run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.width = 1
        # The row of each key in `_bins`, which is (5, keys, bins): of the finite values lowest,
        # highest, sum and count, and the sum of their steps.
        self._rows: dict[str, int] = {}
        self._bins = _empty(0)
        self._not_finite: dict[str, int] = {}

    def take(self, columns: Columns) -> None:
        """Add rows, in any order."""
        usable = np.isfinite(columns.get("step", np.empty(0)))
        usable &= columns.get("step", np.empty(0)) >= 0
        if not usable.any():
            return
        step = columns["step"][usable]
        while step.max() >= self.width * 2 * BINS:
            self._widen()

        # Rows of a bin next to each other, as they nearly always are.
        index = (step // self.width).astype(np.int64)
        order = np.argsort(index, kind="stable")
        index = index[order]
        first = np.flatnonzero(np.diff(index, prepend=-1))
        values = np.stack([column[usable][order] for column in columns.values()])
        self._add(list(columns), step[order], values, first, index[first])

    def _add(
        self,
        keys: list[str],
        step: np.ndarray,
        values: np.ndarray,
        first: np.ndarray,
        bins: np.ndarray,
    ) -> None:
        """Add values of some keys, (keys, steps); those from each of `first` to the next one belong
        in `bins`."""
        for key, count in zip(keys, np.isinf(values).sum(1), strict=True):
            self._rows.setdefault(key, len(self._rows))
            self._not_finite[key] = self._not_finite.get(key, 0) + int(count)
        new = len(self._rows) - self._bins.shape[1]
        if new:
            self._bins = np.concatenate([self._bins, _empty(new)], axis=1)

        finite = np.isfinite(values)
        known = np.where(finite, values, np.nan)
        at = np.ix_(np.array([self._rows[key] for key in keys]), bins)
        low, high, total, count, steps = self._bins
        low[at] = np.fmin(low[at], np.fmin.reduceat(known, first, axis=1))
        high[at] = np.fmax(high[at], np.fmax.reduceat(known, first, axis=1))
        total[at] += np.add.reduceat(np.where(finite, values, 0.0), first, axis=1)
        count[at] += np.add.reduceat(finite, first, axis=1, dtype=np.float64)
        steps[at] += np.add.reduceat(np.where(finite, step, 0.0), first, axis=1)

    def _widen(self) -> None:
        """Make two bins one."""
        self.width *= 2
        pairs = self._bins.reshape(5, -1, BINS, 2)
        self._bins = _empty(len(self._rows))
        self._bins[0, :, :BINS] = np.fmin(pairs[0, ..., 0], pairs[0, ..., 1])
        self._bins[1, :, :BINS] = np.fmax(pairs[1, ..., 0], pairs[1, ..., 1])
        self._bins[2:, :, :BINS] = pairs[2:].sum(-1)

    @property
    def keys(self) -> list[str]:
        return list(self._rows)

    @property
    def last_step(self) -> int:
        if not self._rows:
            return 0
        _, high, _, count, _ = self._bins[:, self._rows["step"]]
        return int(high[count > 0][-1])

    def curve(self, key: str) -> Curve | None:
        """The curve of a key; None where no row has a finite value of it."""
        if key not in self._rows:
            return None
        held = self._bins[:, self._rows[key]]
        if not held[3].any():
            return None
        some = held[3] > 0
        low, high, total, count, step = held[:, some]
        with np.errstate(over="ignore"):
            mean = np.clip(total / count, low, high)
        return Curve(step / count, low, mean, high, self._not_finite[key])

    def means(self, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(the steps, (bins,); means of each key in the bins from the first to the last that have
        rows of these keys, (keys, bins)): NaN where a bin has none."""
        _, _, total, count, _ = self._bins[:, [self._rows[key] for key in keys]]
        any_row = np.flatnonzero(count.any(0))
        # A bin in which nothing was logged at all looks like the one before.
        last = np.zeros(2 * BINS, np.int64)
        last[any_row] = any_row
        filled = np.maximum.accumulate(last)[any_row[0] : any_row[-1] + 1]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            means = np.where(count > 0, total / count, np.nan)[:, filled]
        edges = np.arange(any_row[0], any_row[-1] + 2) * float(self.width)
        return edges, means


def _empty(keys: int) -> np.ndarray:
    held = np.zeros((5, keys, 2 * BINS))
    held[:2] = np.nan
    return held
