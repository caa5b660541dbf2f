"""Work that is dealt out to workers, any of which may die at any moment. Nothing here knows Ray."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from largescale.errors import DataError, Stopped
from largescale.host.signals import stop_requested

# How often one piece of work may end the process that does it.
MOST_TRIES = 5
# Seconds between two words about workers of which none is ready.
REPORT_S = 60.0

Work = tuple[Any, ...]  # a worker's method, and its arguments
BEGIN: Work = ("begin",)


@dataclass(frozen=True)
class Lost:
    """What a call gives whose process died."""

    reason: str


class Calls(Protocol):
    """Calls of workers' methods, that are under way."""

    def start(self, worker: int, method: str, *arguments: Any) -> None:
        """Calls a method. "begin" waits until a worker that died is started again."""

    def wait(self) -> list[tuple[int, Any]]:
        """The calls that ended within a second or so, with what they return, or Lost. Raises what
        they raise."""


class Dealer:
    """Gives each worker that is free something to do, and to another what a worker died over.
    `tell`: what to do with a line about that."""

    def __init__(
        self, calls: Calls, workers: int, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self.under_way: dict[int, Work] = {}
        self._calls, self._tell = calls, tell
        self._idle: deque[int] = deque()
        self._starting = set(range(workers))
        self._tries: Counter[Work] = Counter()
        self._told = time.monotonic()
        for worker in range(workers):
            calls.start(worker, "begin")

    def begin(self) -> Any:
        """Waits for the first worker, and returns what it has found out."""
        while True:
            for _, begun in self._ended():
                return begun

    def deal(
        self,
        todo: Iterable[Work],
        each: Callable[[Work, Any], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Has all of it done; `each` is called with what is done and its result, `tick` now and then.
        Raises Stopped where a signal asks for that."""
        left = deque(todo)
        while left or self.under_way:
            while left and self._idle:
                worker, work = self._idle.popleft(), left.popleft()
                self.under_way[worker] = work
                self._calls.start(worker, *work)
            for work, result in self._ended():
                if isinstance(result, Lost):
                    left.appendleft(work)
                elif work != BEGIN:
                    each(work, result)
            tick()

    def _ended(self) -> list[tuple[Work, Any]]:
        """What workers have done since: its result, or Lost where it has to be done again."""
        if stop_requested():
            raise Stopped
        ended = []
        for worker, result in self._calls.wait():
            work = self.under_way.pop(worker, BEGIN)
            self._starting.discard(worker)
            if not isinstance(result, Lost):
                self._idle.append(worker)
            elif work != BEGIN:
                self._lost(worker, work, result)
            else:
                self._give_up(worker, result)
                continue
            ended.append((work, result))
        self._tell_of_no_room()
        return ended

    def _lost(self, worker: int, work: Work, lost: Lost) -> None:
        self._tries[work] += 1
        what = " ".join(map(str, work[:2]))
        if self._tries[work] == MOST_TRIES:
            raise DataError(
                f"{MOST_TRIES} processes died over one piece of work ({what}), the last: "
                f"{lost.reason}; see the logs of Ray on the nodes, correct that, and run again to "
                "go on"
            )
        self._tell(f"worker {worker} is gone, and its work ({what}) goes to another")
        self._starting.add(worker)
        self._calls.start(worker, *BEGIN)

    def _give_up(self, worker: int, lost: Lost) -> None:
        if not self._idle and not self.under_way and not self._starting:
            raise DataError(
                f"no worker stays alive, the last: {lost.reason}; see the logs of Ray on the nodes, "
                "correct that, and run again to go on"
            )
        self._tell(f"worker {worker} is given up: {lost.reason}")

    def _tell_of_no_room(self) -> None:
        now = time.monotonic()
        if self._idle or self.under_way:
            self._told = now
        elif now - self._told > REPORT_S:
            self._told = now
            waiting = len(self._starting)
            self._tell(f"no worker is ready: {waiting} wait for room, or load the encoders")
