"""A service in a thread of its own, so that nothing that it does can delay or end training."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from largescale.config.serialise import FREE_ON_RESUME, flatten
from largescale.host.files import from_json, write_atomically
from largescale.monitoring.trackers.secrets import without_secrets
from largescale.monitoring.trackers.service import Ended, Moment, RunInfo, Service

# What waits for a service at most. With a row every 25 s, that is seven hours.
MOST_WAITING = 1_000
# Pictures among it, which take megabytes each.
MOST_PICTURES = 16
# Pauses before a call that failed is tried again; after the last one its content is lost.
RETRY_S = (1.0, 10.0, 60.0)
# Pauses between tries to start, the last one for ever: without a start nothing can be sent.
START_RETRY_S = (1.0, 5.0, 15.0, 60.0)
# Seconds between two notes of what was sent.
NOTE_EVERY_S = 1.0


@dataclass
class Sent:
    """What a service has of a run, as RUN/trackers/NAME.json records it: with it no start sends
    again what an earlier one has sent."""

    # How much was sent, over all starts.
    number: int = 0
    # See Moment.
    branch: int = 0
    # The step of what was sent last, and what was sent of that step.
    step: int = -1
    names: list[str] = field(default_factory=list)
    # A hash of what decides what is computed: a run that goes back with another takes another way.
    config: str = ""

    def has(self, step: int, name: str) -> bool:
        return step < self.step or (step == self.step and name in self.names)

    def add(self, step: int, name: str) -> None:
        if step != self.step:
            self.names = []
        self.step = step
        self.names.append(name)
        self.number += 1


@dataclass(frozen=True)
class Item:
    """Something that was logged and is to be sent."""

    step: int
    name: str
    """Tells it from other items of its step."""
    send: Callable[[Service, Moment], None]
    unix_s: float

    @property
    def is_picture(self) -> bool:
        return self.name.startswith("image ")


def metrics_item(step: int, metrics: dict[str, float], unix_s: float) -> Item:
    # A step can have several rows, which differ in their keys.
    name = next(iter(metrics), "")
    return Item(step, name, lambda service, at: service.log(at, metrics), unix_s)


def event_item(step: int, kind: str, text: str, unix_s: float) -> Item:
    return Item(step, f"event {kind}", lambda service, at: service.event(at, kind, text), unix_s)


def image_item(step: int, name: str, image: np.ndarray, unix_s: float) -> Item:
    return Item(step, f"image {name}", lambda service, at: service.image(at, name, image), unix_s)


def item_of(row: dict[str, Any]) -> Item:
    """What is sent of a row of metrics.jsonl."""
    if "event" in row:
        return event_item(row["step"], str(row["event"]), str(row.get("text")), time.time())
    metrics = {key: value for key, value in row.items() if type(value) in (int, float)}
    del metrics["step"]
    return metrics_item(row["step"], metrics, time.time())


@dataclass(frozen=True)
class RollBack:
    """From here on the run takes another way."""


@dataclass(frozen=True)
class Finish:
    ended: Ended
    summary: dict[str, Any]


class Background:
    """Gives a service what is logged, in order. On an error it tries again, and training goes on;
    what is lost is counted."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Service],
        run: Callable[[], RunInfo],
        *,
        folder: Callable[[], Path],
        step: int,
        logged: Callable[[int], Iterable[dict[str, Any]]],
        message: Callable[[str], None],
        deadline_s: float,
    ):
        """`connect`, `run`, `folder` and `logged` are called in the thread. `folder`: where to note
        what was sent. `step`: where the run stands; `logged`: the rows of metrics.jsonl from a step
        on, of which those up to `step` are sent that the service lacks. `message` prints a line.
        `deadline_s`: how long the end may wait for what is not sent yet."""
        self.name = name
        self._connect = connect
        self._run = run
        self._folder = folder
        self._step = step
        self._logged = logged
        self._message = message
        self._deadline_s = deadline_s

        self._queue: queue.SimpleQueue[Item | RollBack | Finish] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failure_reported = False
        # What was to be sent, counted by the caller; and what was sent by this start or an earlier
        # one, counted by the thread.
        self.num_given = 0
        self._num_done = 0
        # Pictures that were put into the queue, and that have left it.
        self._num_pictures = 0
        self._num_pictures_done = 0

        self._sent = Sent()
        self._replaying = False
        self._noted_s = 0.0
        # Sent, but perhaps not on disk at the service yet.
        self._unsettled: collections.deque[tuple[float, Sent]] = collections.deque()
        self._thread = threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True)
        self._thread.start()

    # ---- called by training: returns at once

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._give(metrics_item(step, dict(metrics), time.time()))

    def event(self, step: int, kind: str, text: str) -> None:
        self._give(event_item(step, kind, text, time.time()))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        room = self._num_pictures - self._num_pictures_done < MOST_PICTURES
        self._num_pictures += room
        self._give(image_item(step, name, image, time.time()), room=room)

    def roll_back(self, step: int) -> None:
        self._queue.put(RollBack())

    def _give(self, item: Item, *, room: bool = True) -> None:
        self.num_given += 1
        if room and self._queue.qsize() < MOST_WAITING:
            self._queue.put(item)
        else:
            self._report(f"{self.name} has fallen far behind, and later entries are lost")

    def close(self, ended: Ended, summary: Mapping[str, Any]) -> None:
        """Wait for what is not sent yet, until the deadline, and say what is lost."""
        self._closing.set()
        self._queue.put(Finish(ended, dict(summary)))
        self._thread.join(self._deadline_s)
        if self.num_lost:
            self._message(
                f"{self.name} did not get {self.num_lost} of {self.num_given} entries of this "
                "start; metrics.jsonl has them all"
            )
        elif self._thread.is_alive():
            self._message(f"{self.name} did not answer in {self._deadline_s:g} s at the end")

    @property
    def num_lost(self) -> int:
        """How much was not sent; while the run goes on, how much was not sent yet."""
        return self.num_given - self._num_done

    # ---- the thread

    def _serve(self) -> None:
        service, run = self._start()
        if service is None or run is None:
            return
        self._read_sent(run)
        self._send_missing(service)
        while not isinstance(item := self._next(service), Finish):
            if isinstance(item, RollBack):
                self._take_another_way()
            elif self._replaying and self._sent.has(item.step, item.name):
                self._num_done += 1
            else:
                self._replaying = self._replaying and item.step <= self._sent.step
                self._num_done += self._try(service, item)
            self._num_pictures_done += isinstance(item, Item) and item.is_picture
        with self._tolerated():
            service.finish(item.ended, item.summary)
            self._note(0.0)

    def _next(self, service: Service) -> Item | RollBack | Finish:
        """The next of what was logged. While there is none, what the service has is noted."""
        while True:
            self._note(service.settle_s)
            # What is not noted yet has to be, also if nothing follows.
            wait_s = NOTE_EVERY_S if self._unsettled else None
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=wait_s)

    def _start(self) -> tuple[Service | None, RunInfo | None]:
        """The service with the run begun or continued; None where the end came first."""
        tries = 0
        while True:
            with self._tolerated():
                run = self._run()
                service = self._connect()
                note = service.start(run)
                if note:
                    self._message(f"note: {without_secrets(note)}")
                return service, run
            pause = START_RETRY_S[min(tries, len(START_RETRY_S) - 1)]
            tries += 1
            if self._closing.wait(pause):
                return None, None

    def _read_sent(self, run: RunInfo) -> None:
        """Read what the service has, and see whether the run goes on or takes another way."""
        computed = {
            key: value for key, value in flatten(run.config) if not key.startswith(FREE_ON_RESUME)
        }
        config = hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()
        # Damaged, as by a full disk: then all is sent again, and that is better than nothing.
        with contextlib.suppress(OSError, ValueError, TypeError):
            self._sent = Sent(**from_json((self._folder() / f"{self.name}.json").read_text()))
        changed = self._sent.config not in ("", config)
        self._sent.config = config
        self._replaying = self._sent.step >= self._step
        if changed and self._sent.step > self._step:
            self._take_another_way()

    def _take_another_way(self) -> None:
        self._sent.branch += 1
        self._replaying = False

    def _send_missing(self, service: Service) -> None:
        """Send what metrics.jsonl has up to the step at which this start begins, and the service has
        not: it was not reached, or the run was killed."""
        with self._tolerated():
            for row in self._logged(self._sent.step):
                # Rows of this start come by themselves.
                if row["step"] > self._step:
                    break
                item = item_of(row)
                if not self._sent.has(item.step, item.name):
                    self._try(service, item)
                    self._note(service.settle_s)

    def _try(self, service: Service, item: Item) -> bool:
        """Send an item, several times if need be; whether the service has it."""
        for pause in (*RETRY_S, None):
            with self._tolerated():
                at = Moment(item.step, self._sent.branch, self._sent.number, item.unix_s)
                item.send(service, at)
                self._sent.add(item.step, item.name)
                copy = dataclasses.replace(self._sent, names=[*self._sent.names])
                self._unsettled.append((time.monotonic(), copy))
                return True
            # At the end there is no time for pauses.
            if pause is None or self._closing.wait(pause):
                return False
        return False

    def _note(self, settle_s: float) -> None:
        """Record what was sent at least `settle_s` ago, now and then."""
        now = time.monotonic()
        if not self._closing.is_set() and now - self._noted_s < NOTE_EVERY_S:
            return
        known = None
        while self._unsettled and now - self._unsettled[0][0] >= settle_s:
            known = self._unsettled.popleft()[1]
        if known:
            self._noted_s = now
            with contextlib.suppress(OSError):
                write_atomically(
                    self._folder() / f"{self.name}.json", json.dumps(dataclasses.asdict(known))
                )

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Report an error of the service instead of raising it."""
        try:
            yield
        # Whatever a foreign library raises, training does not notice.
        except Exception as error:
            text = " ".join(without_secrets(f"{type(error).__name__}: {error}").split())
            self._report(f"{self.name} fails, training continues: {text[:300]}")

    def _report(self, text: str) -> None:
        """Print the first failure of this start."""
        if not self._failure_reported:
            self._failure_reported = True
            self._message(text)
