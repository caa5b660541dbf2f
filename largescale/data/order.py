"""The order of the data: a function of (seed, epoch) that can be entered at any position at the
same cost.

A shuffled list of indices would need memory for every row and a replay on every resume. Here each
index is computed by itself, by a keyed permutation of [0, n_rows), so nothing about the order is
ever saved.

Two orders: `full`, in which a step's rows come from anywhere, and `blocks`, for storage on which many
small reads are slow. There the rows are cut into chunks of neighbours, as many chunks as a global
batch has rows are open at a time (a window), and place g of the batch takes the rows of one of them
in random order until all have come. So what a rank reads is a few long pieces, which no other rank
reads, however many ranks there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Rounds of the Feistel network: 4 give a pseudorandom permutation (Luby and Rackoff, 1988).
_ROUNDS = 6
CHUNK_ROWS = 64
"""Neighbouring rows that are read at once in blocks: 1 MiB of latents of 16 KiB. Longer chunks are
read faster, and leave a batch's place with rows of one kind for longer where a set is sorted."""


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
    key, index = _epochs(positions, n_rows, seed)
    return _permute(index, np.uint64(n_rows), key).astype(np.int64)


class Chunks(NamedTuple):
    """The chunk of each of some positions; arrays of one shape."""

    first: npt.NDArray[np.int64]  # its first row; behind the last row of the set comes row 0
    size: npt.NDArray[np.int64]  # its rows
    place: npt.NDArray[np.int64]  # of the position among the chunk's; 0 where the chunk begins
    key: npt.NDArray[np.uint64]  # of the order of its rows


def chunks(positions: npt.NDArray[np.int64], n_rows: int, seed: int, lanes: int) -> Chunks:
    """The chunks that hold the rows of these positions in blocks; see `block_indices`."""
    key, index = _epochs(positions, n_rows, seed)
    n, n_lanes, n_rows_of_chunk = map(np.uint64, (n_rows, lanes, CHUNK_ROWS))
    n_windows, left = np.divmod(n, n_lanes * n_rows_of_chunk)  # those that are full

    # Neighbouring positions are those of different chunks: of one lane each.
    window, index = np.divmod(index, n_lanes * n_rows_of_chunk)
    place, lane = np.divmod(index, n_lanes)
    slot = window * n_lanes + lane
    is_full = window < n_windows
    chunk = _permute(np.where(is_full, slot, 0), np.maximum(n_windows * n_lanes, np.uint64(1)), key)

    # The set is cut into as many sections as there are lanes. A section has a chunk for each full
    # window, and behind them its share of the rows that are left, which make a last, smaller one.
    each, more = np.divmod(left, n_lanes)
    section, chunk = np.divmod(chunk, np.maximum(n_windows, np.uint64(1)))
    section = np.where(is_full, section, lane)
    chunk = np.where(is_full, chunk, n_windows)
    first = section * (n_windows * n_rows_of_chunk + each) + np.minimum(section, more)
    first += chunk * n_rows_of_chunk
    size = np.where(is_full, n_rows_of_chunk, each + (lane < more))

    # Chunks begin at other rows in each epoch, so that the same rows are not always neighbours.
    first = (first + _mix(~key) % n) % n
    return Chunks(
        first.astype(np.int64),
        size.astype(np.int64),
        place.astype(np.int64),
        _mix(key + slot + np.uint64(1)),
    )


def block_indices(
    positions: npt.NDArray[np.int64], n_rows: int, seed: int, lanes: int
) -> npt.NDArray[np.int64]:
    """Rows to read at these positions of the run, as `sample_indices` has them, but in blocks.

    lanes: chunks that are open at a time, the global batch's size: place g of the batch then takes
    its rows from one chunk for CHUNK_ROWS steps. The order depends on it.
    """
    found = chunks(positions, n_rows, seed, lanes)
    inside = _permute(found.place.astype(np.uint64), found.size.astype(np.uint64), found.key)
    return (found.first + inside.astype(np.int64)) % n_rows


ORDERS: dict[str, Callable[[npt.NDArray[np.int64], int, int, int], npt.NDArray[np.int64]]] = {
    "full": lambda positions, n_rows, seed, lanes: sample_indices(positions, n_rows, seed),
    "blocks": block_indices,
}
"""The rows at (positions, n_rows, seed, global batch size), by data.order."""


def _epochs(
    positions: npt.NDArray[np.int64], n_rows: int, seed: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The key of each position's epoch (of one element, where they have one epoch), and its place
    there. Raises ValueError for a negative
    position or no rows."""
    if n_rows < 1 or positions.min(initial=0) < 0:
        raise ValueError(
            f"n_rows={n_rows} must be at least 1 and positions at least 0; "
            f"the lowest is {positions.min(initial=0)}"
        )
    epoch, index = np.divmod(positions.astype(np.uint64), np.uint64(n_rows))
    # Of one epoch, as most calls are, one is enough for all.
    if epoch.size > 1 and epoch.min() == epoch.max():
        epoch = epoch.reshape(-1)[:1].reshape((1,) * epoch.ndim)
    # A key for each epoch, so that each has a permutation of its own.
    return _mix(_mix(np.full_like(epoch, seed)) ^ epoch), index


def _permute(
    index: npt.NDArray[np.uint64],
    n: np.uint64 | npt.NDArray[np.uint64],
    key: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """A permutation of [0, n) for each key."""
    # The smallest square that holds [0, n). Roots are rounded exactly, and n is far below 2 ** 52.
    side = np.ceil(np.sqrt(n)).astype(np.uint64)
    index = _feistel(index, key, side)

    # Cycle walking: follow the cycle of the permutation of the square until it is back inside.
    # This is rare, as the square has fewer than 2 sqrt(n) + 1 numbers too many.
    keys, sides = np.broadcast_to(key, index.shape), np.broadcast_to(side, index.shape)
    while (outside := index >= n).any():
        index[outside] = _feistel(index[outside], keys[outside], sides[outside])
    return index


def _feistel(
    index: npt.NDArray[np.uint64],
    key: npt.NDArray[np.uint64],
    side: np.uint64 | npt.NDArray[np.uint64],
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


def in_extents(
    positions: npt.NDArray[np.int64], extents: Sequence[Extent]
) -> Iterator[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], int]]:
    """For each extent that some of the positions lie in: which of them do, how far behind its start,
    and its rows."""
    # The last extent that begins before a position, or at it.
    starts = [extent.start for extent in extents]
    of_extent = np.searchsorted(starts, positions, side="right") - 1
    for number, extent in enumerate(extents):
        inside = of_extent == number
        if inside.any():
            yield inside, positions[inside] - extent.start, extent.rows


def indices_in_extents(
    positions: npt.NDArray[np.int64],
    extents: Sequence[Extent],
    indices: Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.int64]],
) -> npt.NDArray[np.int64]:
    """Rows to read at these positions of a run whose data set has grown. `indices`: the rows at
    positions of a set that has so many rows."""
    rows = np.empty_like(positions)
    for inside, behind, n_rows in in_extents(positions, extents):
        rows[inside] = indices(behind, n_rows)
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
