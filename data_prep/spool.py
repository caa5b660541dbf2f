"""Sequences that do not fit in memory: kept, and sorted, in files that vanish with the process."""

import heapq
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

T = TypeVar("T")

# Values that are sorted in memory. More of them lie in files, sorted in runs of so many.
RUN = 2**17
# Values that are written and read at a time. Of each run so many are in memory.
_CHUNK = 200


class Spool(Generic[T]):
    """Values in a file, to be read again from the first. The file has no name: nothing else can read
    it, and it is gone when this is."""

    def __init__(self, values: Iterable[T], folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        values = iter(values)
        while chunk := list(islice(values, _CHUNK)):
            pickle.dump(chunk, self._file, 5)

    def add(self, value: T) -> None:
        """Adds a large value, to be in memory by itself. Not once the values are read."""
        pickle.dump([value], self._file, 5)

    def __iter__(self) -> Iterator[T]:
        self._file.seek(0)
        while True:
            try:
                chunk = pickle.load(self._file)
            except EOFError:
                return
            yield from chunk


def sorted_on_disk(
    values: Iterable[Any], folder: Path | None, run: int | None = None
) -> Iterator[Any]:
    """The values, rising, whatever their number. `folder`: where those lie that exceed a run."""
    length = run or RUN
    values = iter(values)
    runs: list[Iterable[Any]] = []
    while chunk := sorted(islice(values, length)):
        # All of a short sequence, which needs no file.
        if not runs and len(chunk) < length:
            return iter(chunk)
        runs.append(Spool(chunk, folder))
    return heapq.merge(*runs)
