"""The order of the data: a function of (seed, epoch) that can be entered at any position at the
same cost.

A shuffled list of indices would need memory for every row and a replay on every resume. Here each
index is computed by itself, by a keyed permutation of [0, n_rows), so nothing about the order is
ever saved.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Rounds of the Feistel network: 4 give a pseudorandom permutation (Luby and Rackoff, 1988).
_ROUNDS = 6


def sample_indices(
    positions: npt.NDArray[np.int64], n_rows: int, seed: int
) -> npt.NDArray[np.int64]:
    """Rows to read at these positions of the run; each epoch (n_rows positions) visits every row
    exactly once.

    positions: int64 of any shape, `step * global_batch_size + row`; one call may straddle epochs.
    Returns int64 in [0, n_rows), shaped as positions. Raises ValueError for a negative position or
    no rows. Golden values in the tests pin the order: to change it would change the inputs of every
    run that resumes.
    """
    if n_rows < 1 or positions.min(initial=0) < 0:
        raise ValueError(
            f"n_rows={n_rows} must be at least 1 and positions at least 0; "
            f"the lowest is {positions.min(initial=0)}"
        )
    epoch, index = np.divmod(positions.astype(np.uint64), np.uint64(n_rows))
    # A key for each epoch, so that each has a permutation of its own.
    key = _mix(_mix(np.full_like(epoch, seed)) ^ epoch)
    side = np.uint64(math.isqrt(n_rows - 1) + 1)  # the smallest square that holds [0, n_rows)
    index = _feistel(index, key, side)

    # Cycle walking: follow the cycle of the permutation of the square until it is back inside.
    # This is rare, as the square has fewer than 2 sqrt(n_rows) + 1 numbers too many.
    while (outside := index >= n_rows).any():
        index[outside] = _feistel(index[outside], key[outside], side)
    return index.astype(np.int64)


def _feistel(
    index: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64], side: np.uint64
) -> npt.NDArray[np.uint64]:
    """A permutation of [0, side ** 2) for each key: a Feistel network whose halves are digits in
    base `side`."""
    left, right = np.divmod(index, side)
    # Each round can be undone, whatever _mix does: so the network is a permutation.
    for i in range(_ROUNDS):
        left, right = right, (left + _mix(_mix(key + np.uint64(i)) ^ right) % side) % side
    return left * side + right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood, 2014); arithmetic is modulo 2 ** 64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Extent:
    """From a position of the run on, its data set has so many rows; epochs begin there."""

    start: int
    rows: int


def indices_in_extents(
    positions: npt.NDArray[np.int64],
    extents: Sequence[Extent],
    indices: Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64]:
    """Rows to read at these positions of a run whose data set has grown. `indices`: the rows at
    positions of a set that has so many rows."""
    rows = np.empty_like(positions)
    # The last extent that begins before a position, or at it.
    of_extent = np.searchsorted([extent.start for extent in extents], positions, side="right") - 1
    for number, extent in enumerate(extents):
        inside = of_extent == number
        if inside.any():
            rows[inside] = indices(positions[inside] - extent.start, extent.rows)
    return rows


def grown_extents(extents: Sequence[Extent], position: int, rows: int) -> list[Extent]:
    """The extents of a run that finds at `position`, the next that it reads, that its data set has
    grown to so many rows: the epoch that it is in keeps its rows, and the next has all."""
    begun = [extent for extent in extents if extent.start < position] or [extents[0]]
    start, rows_now = begun[-1].start, begun[-1].rows
    end = start + -(-(position - start) // rows_now) * rows_now
    # Nothing was read of an epoch that would begin just here.
    kept = [extent for extent in begun if extent.start < end]
    return [*kept, Extent(end, rows)]
