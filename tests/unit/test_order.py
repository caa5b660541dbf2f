"""The order of the data is a permutation each epoch, and can be entered anywhere."""

import tracemalloc

import numpy as np
import pytest

from largescale.data.order import CHUNK_ROWS, block_indices, chunks, sample_indices

LAST = 2_000_000 * 1024 - 1                             # the last position of the longest run: fits int64, not int32


def epoch(n_rows: int, number: int = 0, seed: int = 0) -> list[int]:
    return sample_indices(np.arange(number * n_rows, (number + 1) * n_rows), n_rows, seed).tolist()


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_every_epoch_visits_every_row_once(number: int) -> None:
    for n_rows in (*range(1, 301), 4095, 4096, 4097, 99_991):
        assert sorted(epoch(n_rows, number)) == list(range(n_rows)), n_rows


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch(100, number, seed)) for number in range(50) for seed in range(50)}
    assert len(orders) == 50 * 50


def test_seek_equals_sequential_also_across_epochs() -> None:
    n_rows, positions = 37, np.arange(1000)
    whole = sample_indices(positions, n_rows, seed=3)
    for start in range(0, 1000, 13):
        assert np.array_equal(sample_indices(positions[start:start + 50], n_rows, seed=3), whole[start:start + 50])
    assert np.array_equal(sample_indices(positions[::-1], n_rows, seed=3), whole[::-1])


def test_the_order_is_pinned() -> None:
    """A resumed run relies on an order that no version of this library changes."""
    assert epoch(10) == [8, 7, 0, 5, 2, 1, 9, 3, 4, 6]
    assert sample_indices(np.array([0, 10**9, LAST]), 10**9, seed=1).tolist() == [122206474, 502151260, 1198866]


def test_uniform_over_rows_and_neighbours() -> None:
    """Chi-square of where position 0 lands, and of the difference between neighbours; sd of each is sqrt(2 * df)."""
    n_rows, epochs = 100, 20_000
    starts = np.arange(epochs) * n_rows
    first, second = sample_indices(starts, n_rows, seed=5), sample_indices(starts + 1, n_rows, seed=5)
    for observed, bins in ((np.bincount(first), n_rows), (np.bincount((second - first) % n_rows)[1:], n_rows - 1)):
        expected = epochs / bins
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert abs(chi_square - bins) < 5 * np.sqrt(2 * bins)


def test_all_orders_of_four_rows_are_as_likely() -> None:
    orders = sample_indices(np.arange(4 * 24_000), 4, seed=7).reshape(-1, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 850 and counts.max() < 1150


def test_memory_does_not_grow_with_rows() -> None:
    tracemalloc.start()
    indices = sample_indices(np.arange(LAST - 1023, LAST + 1), 10**9, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 and len(set(indices.tolist())) == 1024 and indices.max() < 10**9


@pytest.mark.parametrize(("positions", "n_rows"), [([-1], 10), ([0], 0)])
def test_refuses_what_has_no_order(positions: list[int], n_rows: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        sample_indices(np.array(positions), n_rows, seed=0)


def blocks(n_rows: int, lanes: int, number: int = 0, seed: int = 0) -> np.ndarray:
    """An epoch in blocks."""
    return block_indices(np.arange(number * n_rows, (number + 1) * n_rows), n_rows, seed, lanes)


@pytest.mark.parametrize("lanes", [1, 3, 8, 64])
@pytest.mark.parametrize("number", [0, 1, 1000])
def test_blocks_visit_every_row_once_an_epoch(number: int, lanes: int) -> None:
    window = lanes * CHUNK_ROWS
    sizes = {1, 2, lanes - 1, lanes, lanes + 1, window - 1, window, window + 1, 3 * window, 3 * window + lanes + 1, 10_007} - {0}
    for n_rows in sizes:
        assert np.array_equal(np.sort(blocks(n_rows, lanes, number)), np.arange(n_rows)), n_rows


def test_blocks_can_be_entered_anywhere() -> None:
    n_rows, lanes, positions = 1037, 4, np.arange(4000)
    whole = block_indices(positions, n_rows, 3, lanes)
    for start in range(0, 4000, 97):
        assert np.array_equal(block_indices(positions[start:start + 50], n_rows, 3, lanes), whole[start:start + 50])
    assert np.array_equal(block_indices(positions[::-1].reshape(-1, 8), n_rows, 3, lanes), whole[::-1].reshape(-1, 8))


def test_blocks_are_pinned() -> None:
    """A resumed run relies on an order that no version of this library changes."""
    assert blocks(10, 2).tolist() == [6, 8, 5, 7, 2, 0, 4, 9, 3, 1]
    assert block_indices(np.array([0, 10**9, LAST]), 10**9, 1, 1024).tolist() == [924300355, 257658973, 621070401]


def test_a_place_of_the_batch_takes_the_rows_of_one_chunk() -> None:
    """In an order of its own; the chunks of a window, of an epoch and of two epochs are different ones."""
    n_rows, lanes = 10_007, 8
    found = chunks(np.arange(2 * n_rows), n_rows, 5, lanes)
    rows = block_indices(np.arange(2 * n_rows), n_rows, 5, lanes)
    begins = set()
    for lane in range(lanes):
        first, window = np.unique(found.first[lane:64 * lanes:lanes]), rows[lane:64 * lanes:lanes]
        assert len(first) == 1 and sorted((window - first) % n_rows) == [*range(CHUNK_ROWS)]
        assert not np.array_equal((window - first) % n_rows, np.arange(CHUNK_ROWS))
        begins.add(int(first[0]))
    assert len(begins) == lanes
    epochs = [found.first[epoch][found.place[epoch] == 0][:100] for epoch in (slice(n_rows), slice(n_rows, None))]
    assert [len(set(epoch)) for epoch in epochs] == [100, 100]
    assert {*epochs[0] % CHUNK_ROWS}.isdisjoint(epochs[1] % CHUNK_ROWS)


def test_blocks_mix_a_sorted_set_as_full_does() -> None:
    """1,000 classes of 130 rows, one after the other: a batch has about as many of them as one of random rows, also of
    the rows that make no full window at an epoch's end, which are no neighbours."""
    n_rows, batch, steps = 130_000, 256, 50

    def classes(rows: np.ndarray) -> float:
        return float(np.mean([len(set(step // 130)) for step in rows.reshape(steps, batch)]))

    positions = np.arange(steps * batch)
    full = classes(sample_indices(positions, n_rows, 0))
    for begin in (0, n_rows - steps * batch):
        assert classes(block_indices(begin + positions, n_rows, 0, batch)) > 0.95 * full
    neighbours = np.abs(np.diff(block_indices(positions, n_rows, 0, batch)))
    assert np.median(neighbours) > 0.25 * n_rows        # 0.29 where rows are independent
