"""Lists of texts that do not fit in memory, compared by 8 bytes of each: what is given twice, and what
another list lacks.

Of ten million texts two have the same 8 bytes with a probability of 3 in a million. Those that would
be said to be given twice are compared as texts.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Texts = Callable[[], Iterable[Sequence[str]]]
"""Gives a list of texts, some at a time, whenever it is called."""

# Hashes that are read at a time.
BLOCK = 2**16
# Hashes that are compared at a time: those of one range of values.
RANGE = 2**18
# How many of the texts that are given twice are named.
MOST_NAMED = 4

# Named, so that tests can have two texts with one hash.
_hash = hash


class Hashes:
    """The hashes of texts in the order in which they were added, in a file that vanishes with the
    process. Another process has other hashes of the same texts."""

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, texts: Sequence[str]) -> None:
        self._file.write(np.fromiter(map(_hash, texts), np.int64, len(texts)).data)
        self._count += len(texts)

    def within(self, low: int, high: int) -> tuple[Digests, Numbers]:
        """The hashes from `low` to `high`, as unsigned numbers, and the number of each one's text."""
        digests: list[Digests] = [np.empty(0, np.uint64)]
        numbers: list[Numbers] = [np.empty(0, np.int64)]
        start = 0
        self._file.seek(0)
        while data := self._file.read(8 * BLOCK):
            block = np.frombuffer(data, np.uint64)
            at = np.flatnonzero((block >= low) & (block <= high))
            digests.append(block[at])
            numbers.append(at + start)
            start += len(block)
        return np.concatenate(digests), np.concatenate(numbers)


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    """The first and the last value of ranges that have about RANGE of so many hashes each."""
    parts = 1 + count // RANGE
    for part in range(parts):
        yield part * 2**64 // parts, (part + 1) * 2**64 // parts - 1


def lacking(asked: Hashes, there: Hashes) -> Iterator[Numbers]:
    """The numbers of the texts in `asked` that are not in `there`, rising within each array."""
    for low, high in _ranges(max(len(asked), len(there))):
        digests, numbers = asked.within(low, high)
        others, _ = there.within(low, high)
        others.sort()
        # Sorted too: a search for one after the other is five times as fast as anywhere.
        order = np.argsort(digests)
        yield np.sort(numbers[order[~among(others, digests[order])]])


def among(ordered: Digests, digests: Digests) -> npt.NDArray[np.bool_]:
    """Which of the digests are in an array that is sorted."""
    at = np.searchsorted(ordered, digests)
    found = at < len(ordered)
    found[found] = ordered[at[found]] == digests[found]
    return found


def given_twice(hashes: Hashes, texts: Texts) -> tuple[int, list[tuple[int, int, str]]]:
    """How many texts are given more than once; and of the first of them the numbers of the first two
    places, and the text. `hashes`: those of the texts."""
    count, pairs = _repeated(hashes)
    found = texts_at(texts(), {number for pair in pairs for number in pair})
    twice = []
    for first, again in pairs:
        if found[first] == found[again]:
            twice.append((first, again, found[again]))
    # The others are different texts of one hash.
    return count - (len(pairs) - len(twice)), twice


def _repeated(hashes: Hashes) -> tuple[int, list[tuple[int, int]]]:
    """How many hashes are there more than once, and of a few of them the first two places, in the
    order of the second."""
    count = 0
    pairs: list[tuple[int, int]] = []
    for low, high in _ranges(len(hashes)):
        digests, numbers = hashes.within(low, high)
        ordered = np.sort(digests)
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            continue
        order = np.argsort(digests, kind="stable")  # of equal ones the first comes first
        # Where equal ones begin: not in the middle of three.
        begin = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]]))
        first, again = numbers[order[begin]], numbers[order[begin + 1]]
        count += len(begin)
        least = np.argsort(again)[:MOST_NAMED]
        pairs += zip(first[least].tolist(), again[least].tolist(), strict=True)
        pairs = sorted(pairs, key=lambda pair: pair[1])[:MOST_NAMED]
    return count, pairs


def texts_at(texts: Iterable[Sequence[str]], numbers: Iterable[int]) -> dict[int, str]:
    """The texts of these numbers, of a list that is given some at a time."""
    found: dict[int, str] = {}
    wanted = sorted(numbers)
    start = 0
    for some in texts if wanted else ():
        while len(found) < len(wanted) and wanted[len(found)] < start + len(some):
            number = wanted[len(found)]
            found[number] = some[number - start]
        if len(found) == len(wanted):
            break
        start += len(some)
    return found
