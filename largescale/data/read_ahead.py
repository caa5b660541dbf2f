"""Reads the chunks of blocks (see order.py) before their rows are asked for, by long reads in
sequence, into the page cache: there the mapped shards find them."""

import contextlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from largescale.data.order import CHUNK_ROWS, Extent, chunks, in_extents
from largescale.data.shards import ShardDataset
from largescale.errors import DataError

# Reads at a time: one alone would wait for a file system's answer most of the time.
_THREADS = 4
_BYTES_A_READ = 2**20
# Steps whose chunks are looked up at once.
_STEPS_A_BLOCK = 16
# What begins within so many steps is read at once. The rest of the next window is spread over the
# steps before that: all ranks at once would be more than storage and network give.
_SOON = 16


class ReadAhead(AbstractContextManager["ReadAhead"]):
    """Has this rank's next chunks read, those of the window that follows: `advance(step)`.

    rows: this rank's rows of a global batch. A rank reads no other rank's chunks. What cannot be
    read is left to the reader of the rows, which reports it.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        seed: int,
        global_batch_size: int,
        rows: npt.NDArray[np.int64],
        *,
        mirrors: bool,
        captions: bool,
        extents: Sequence[Extent] = (),
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._rows = rows
        self._extents = extents or (Extent(0, len(dataset)),)
        self._columns = {"mirrors": mirrors, "captions": captions}
        # Chunks that begin in these steps are known; those that wait, by the step they begin in.
        self._known = range(0)
        self._waiting: deque[tuple[int, int, int]] = deque()  # (step, first row, rows)
        self._reads: set[Future[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "loader-read-ahead")

    def advance(self, step: int) -> None:
        """Starts reading what `step` and the steps of a window after it need. Returns at once."""
        end = step + CHUNK_ROWS + 1
        if step not in self._known:
            # At a start, or after a jump, chunks are open that began before.
            for read in self._reads:
                read.cancel()
            self._reads.clear()
            self._waiting.clear()
            self._find(range(step, step + 1), begun=True)
            self._known = range(step, step + 1)
        if end - self._known.stop >= _STEPS_A_BLOCK:
            self._find(range(self._known.stop, end))
            self._known = range(step, end)

        spread = -(-self._rows.size // (CHUNK_ROWS - _SOON))
        self._reads = {read for read in self._reads if not read.done()}
        while self._waiting and (spread > 0 or self._waiting[0][0] < step + _SOON):
            _, first, n = self._waiting.popleft()
            self._reads.add(self._threads.submit(self._read, first, n))
            spread -= 1

    def _find(self, steps: range, begun: bool = False) -> None:
        """Has the chunks that begin in these steps wait, or with `begun` those that are open."""
        column = np.array(steps)[:, None]
        positions = column * self._global_batch_size + self._rows.ravel()
        step_of = np.broadcast_to(column, positions.shape)
        for inside, behind, n_rows in in_extents(positions, self._extents):
            found = chunks(behind, n_rows, self._seed, self._global_batch_size)
            wanted = (found.place == 0) | begun
            pieces = np.stack([step_of[inside], found.first, found.size], 1)[wanted]
            # Of a set that has grown, the one chunk over the end of the old rows goes on at new ones
            # here: its rows are read when they are asked for.
            self._waiting.extend(map(tuple, pieces.tolist()))

    def _read(self, first: int, n: int) -> None:
        # Read, not advised: the kernel follows advice to read for a few pages only.
        buffer = memoryview(bytearray(_BYTES_A_READ))
        with contextlib.suppress(DataError, OSError):
            for path, offset, size in self._dataset.pieces(first, n, **self._columns):
                with path.open("rb", buffering=0) as file:
                    file.seek(offset)
                    while size > 0 and (n_read := file.readinto(buffer[:size])):
                        size -= n_read

    def close(self) -> None:
        """Ends the threads; what one is reading is finished first."""
        self._threads.shutdown(cancel_futures=True)

    def __exit__(self, *error: Any) -> None:
        self.close()
