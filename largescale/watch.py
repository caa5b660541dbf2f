"""Ends a run in which a rank is gone or does not move, and says which one."""

import threading
import time
from typing import NoReturn, Self

from largescale.distributed import Ranks
from largescale.errors import LargescaleError, LostRankError
from largescale.launch import leave, print_error
from largescale.machine import memory_bound


class Watch:
    """While it is entered, a thread looks whether the main thread still moves, and ends the process if it does not.

    A collective that hangs on a GPU cannot be interrupted from the thread that waits for it.
    """

    def __init__(self, ranks: Ranks, timeout_s: float):
        self._ranks, self._timeout_s, self._done = ranks, timeout_s, threading.Event()
        self._thread: threading.Thread | None = None
        self._memory = memory_bound()
        self._kills = self._memory.kills() if self._memory else 0
        self.at("start-up")

    def at(self, where: str) -> None:
        """The main thread's sign of life."""
        self.where, self._moved = where, time.monotonic()

    def killed(self) -> str | None:
        """What to say where the kernel has killed for memory here since this was made."""
        return self._memory.killed_since(self._kills) if self._memory else None

    def __enter__(self) -> Self:
        self.at(self.where)
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(min(self._timeout_s / 10, 5.0)):
            if time.monotonic() - self._moved > self._timeout_s:
                end_at_once(lost_rank(self._ranks, self.where, f"no progress for {self._timeout_s:g} s", self.killed()))


def lost_rank(ranks: Ranks, where: str, what: str, killed: str | None = None) -> LostRankError:
    """The error to end with, after a roll call in which the ranks that are left say `where` they are.

    Only the lowest of these is to print it.
    """
    found = ranks.roll_call(where)
    if found is None:
        text = f"{what}: rank 0, or the launcher that keeps its store, does not answer"
    else:
        missing = [rank for rank in range(ranks.world_size) if rank not in found]
        places: dict[str, list[int]] = {}
        for rank, place in found.items():
            places.setdefault(place, []).append(rank)
        gone = [f"{_named(missing)} {'does' if len(missing) == 1 else 'do'} not answer"] if missing else []
        text = f"{what}: " + "; ".join([*gone, *(f"{_named(ranks)} in {place}" for place, ranks in places.items())])
    if killed:
        text += f"; {killed}"
    error = LostRankError(text + "; the same command goes on from the last checkpoint")
    lowest = min(found) if found else min(1, ranks.world_size - 1)
    error.agreed = ranks.rank != lowest
    return error


def end_at_once(error: LargescaleError) -> NoReturn:
    """The usual way out would wait for a process group whose other ranks are gone, or wait for this one."""
    print_error(error)
    leave(error.exit_status)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
