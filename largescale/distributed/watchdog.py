"""Ends a run in which a rank is gone or hangs, and reports which one."""

import threading
import time
from typing import NoReturn, Self

from largescale.distributed.ranks import Ranks, not_met
from largescale.errors import LargescaleError, LostRankError
from largescale.host import launch
from largescale.host.launch import env_world_size, leave, print_error
from largescale.host.machine import memory_bound

# How much longer than its time limit a run may take until it trains.
START_S = 60


class Watchdog:
    """While it is entered, a thread checks for heartbeats of the main thread, and ends the process
    where there is none within the time limit.

    A collective that hangs on a GPU cannot be interrupted from the thread that waits for it, nor
    can a file system that does not answer.
    """

    def __init__(self, timeout_s: float):
        # Set once all ranks have started.
        self.ranks: Ranks | None = None
        self.limit_s = timeout_s + START_S
        # The process is about to be ended by the watchdog; the watchdog is not needed any more.
        self._ending = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # The kernel's count of kills so far, to see later whether it has killed a rank here.
        self._memory = memory_bound()
        self._kills = self._memory.kills() if self._memory else 0
        self.where = ""
        self.heartbeat("start-up")

    def heartbeat(self, where: str | None = None) -> None:
        """Record that the main thread makes progress. `where`: what it does now; by default what it
        did before."""
        self.where = where or self.where
        self._moved = time.monotonic()

    def _heartbeat_of_main_thread(self) -> None:
        # The thread that writes checkpoints must not hide that the main thread hangs.
        if threading.current_thread() is threading.main_thread():
            self._moved = time.monotonic()

    def wait_if_ending(self) -> None:
        """For an error of the main thread: where the watchdog is about to end the process, wait for
        it instead of reporting the error."""
        # The other ranks end too by then, and an error that follows from it is not the cause.
        if self._ending.is_set():
            self._thread.join()

    def killed(self) -> str | None:
        """A message where the kernel has killed a process for memory here since the start, or
        None."""
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

    def _watch(self) -> None:
        checked = time.monotonic()
        while not self._done.wait(pause := min(self.limit_s / 10, 1.0)):
            now = time.monotonic()
            late = now - checked - pause
            checked = now
            # This thread stood still too, as when the cluster suspends a job: that is no hang.
            if late > pause:
                self._moved += late
            if now - self._moved > self.limit_s:
                self._ending.set()
                end_at_once(self._stuck())

    def _stuck(self) -> LostRankError:
        if self.ranks is None:
            return not_met(env_world_size(), self.limit_s)
        return lost_rank(
            self.ranks, self.where, f"no progress for {self.limit_s:g} s", self.killed()
        )


def lost_rank(ranks: Ranks, where: str, what: str, killed: str | None = None) -> LostRankError:
    """The error with which to end this rank, after a roll call.

    `where`: what this rank was doing. `what` has happened, such as "lost contact". `killed`: the
    message of a kill for memory on this machine.
    """
    found = ranks.roll_call(where)
    if found is None:
        text = f"{what}: rank 0, or the launcher that keeps its store, does not answer"
    else:
        text = f"{what}: {_roll_call_result(found, ranks.world_size)}"
    if killed:
        text += f"; {killed}"
    error = LostRankError(text + "; the same command continues from the last checkpoint")

    # Only the lowest rank that is left prints it. Without an answer rank 0 is taken to be gone.
    lowest = min(found) if found else min(1, ranks.world_size - 1)
    error.agreed = ranks.rank != lowest
    return error


def _roll_call_result(found: dict[int, str], world_size: int) -> str:
    """Which ranks do not answer, and what each of the others is doing. `found`: by rank."""
    parts = []
    missing = sorted(set(range(world_size)) - found.keys())
    if missing:
        verb = "does" if len(missing) == 1 else "do"
        parts.append(f"{rank_names(missing)} {verb} not answer")

    # Most ranks wait at the same place, which is named once.
    places: dict[str, list[int]] = {}
    for rank, place in found.items():
        places.setdefault(place, []).append(rank)
    for place, at_place in places.items():
        parts.append(f"{rank_names(at_place)} in {place}")
    return "; ".join(parts)


def end_at_once(error: LargescaleError) -> NoReturn:
    """Print the error and end the process."""
    # The interpreter's usual exit would wait for a process group whose other ranks are gone, or
    # wait for this one.
    print_error(error)
    leave(error.exit_status)


def rank_names(ranks: list[int]) -> str:
    """Such as 'rank 3' or 'ranks 0, 1, 2'; at most eight are named."""
    shown = ", ".join(map(str, ranks[:8]))
    if len(ranks) > 8:
        shown += f" and {len(ranks) - 8} more"
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
