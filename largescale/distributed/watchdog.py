"""Ends a run in which a rank is gone or does not move, and says which one."""

import threading
import time
from typing import NoReturn, Self

from largescale.distributed.ranks import Ranks, not_met
from largescale.errors import LargescaleError, LostRankError
from largescale.host import launch
from largescale.host.launch import env_world_size, leave, print_error
from largescale.host.machine import memory_bound

START_S = 60
"""Beside its time limit, what a run may take longer until it trains."""


class Watchdog:
    """While it is entered, a thread looks whether the main thread still moves, and ends the process
    if it does not.

    A collective that hangs on a GPU cannot be interrupted from the thread that waits for it, nor
    can a file system that does not answer. `ranks` is set when they have met.
    """

    def __init__(self, timeout_s: float):
        self.ranks: Ranks | None = None
        self.limit_s = timeout_s + START_S
        self._ending = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._memory = memory_bound()
        self._kills = self._memory.kills() if self._memory else 0
        self.where = ""
        self.heartbeat("start-up")

    def heartbeat(self, where: str | None = None) -> None:
        """The main thread's sign of life. `where`: what it does now; by default it still does what
        it did."""
        self.where = where or self.where
        self._moved = time.monotonic()

    def _heartbeat_of_main_thread(self) -> None:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # not the one that writes checkpoints
            self._moved = time.monotonic()

    def wait_if_ending(self) -> None:
        """For the main thread's errors: once the watch is about to end the process, the other ranks
        end too, and what it meets of that is not the cause."""
        if self._ending.is_set():
            self._thread.join()

    def killed(self) -> str | None:
        """What to say where the kernel has killed for memory here since this was made."""
        return self._memory.killed_since(self._kills) if self._memory else None

    def __enter__(self) -> Self:
        self.heartbeat()
        launch.on_heartbeat = self._heartbeat_of_main_thread
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        launch.on_heartbeat = None
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(pause := min(self.limit_s / 10, 1.0)):
            late, looked = time.monotonic() - looked - pause, time.monotonic()
            if (
                late > pause
            ):  # the whole process stood still, as when the cluster suspends a job: that is no hang
                self._moved += late
            if looked - self._moved > self.limit_s:
                self._ending.set()
                end_at_once(self._stuck())

    def _stuck(self) -> LostRankError:
        if self.ranks is None:
            return not_met(env_world_size(), self.limit_s)
        return lost_rank(
            self.ranks, self.where, f"no progress for {self.limit_s:g} s", self.killed()
        )


def lost_rank(ranks: Ranks, where: str, what: str, killed: str | None = None) -> LostRankError:
    """The error to end with, after a roll call in which the ranks that are left say `where` they
    are.

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
        gone = (
            [f"{_named(missing)} {'does' if len(missing) == 1 else 'do'} not answer"]
            if missing
            else []
        )
        text = f"{what}: " + "; ".join(
            [*gone, *(f"{_named(ranks)} in {place}" for place, ranks in places.items())]
        )
    if killed:
        text += f"; {killed}"
    error = LostRankError(text + "; the same command continues from the last checkpoint")
    lowest = min(found) if found else min(1, ranks.world_size - 1)
    error.agreed = ranks.rank != lowest
    return error


def end_at_once(error: LargescaleError) -> NoReturn:
    """The usual way out would wait for a process group whose other ranks are gone, or wait for this
    one."""
    print_error(error)
    leave(error.exit_status)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (
        f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    )
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
