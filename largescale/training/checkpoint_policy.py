"""When a checkpoint is made valid, and what is done about one that cannot be written: training goes on, and says so."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.distributed.step_report import Report
from largescale.distributed.watchdog import Watch
from largescale.engine.deepspeed_engine import Engine
from largescale.errors import CheckpointError
from largescale.host.signals import stop_requested
from largescale.monitoring.goodput import Goodput
from largescale.monitoring.step_timer import Meter
from largescale.monitoring.telemetry import Telemetry

RETRY_S = 30.0         # between tries of the last checkpoint of a finished run
RETRY_ON_STOP_S = 5.0  # the same where the machine is about to be taken away ...
TRIES_ON_STOP = 3      # ... and how many


class Saving:
    """Every public method but `due` is collective."""

    def __init__(self, checkpointer: Checkpointer, engine: Engine, meter: Meter, watch: Watch, telemetry: Telemetry,
                 goodput: Goodput):
        self._checkpointer, self._engine, self._meter, self._watch = checkpointer, engine, meter, watch
        self._telemetry, self._goodput = telemetry, goodput
        self._every = checkpointer.config.every
        self._retry_at = -1  # the step of the next try after one that failed
        self._said = False   # of the one that is being written, that it fails
        self._stall_s = 0.0  # how long training has stood still for it

    @property
    def last_saved(self) -> int:
        return self._checkpointer.last_saved

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._retry_at

    def save(self, step: int, state: dict[str, Any], reason: str) -> None:
        """Start to write one, once the one before is valid or has failed."""
        with self._standing_still(step):
            self._finish(step)
            if not self._checkpointer.pending:
                self._checkpointer.save(step, state, self._engine, reason)

    def save_first(self, step: int, state: dict[str, Any]) -> None:
        """Proves, before GPU time is spent, that the run can be saved. Raises CheckpointError where it cannot."""
        self.save(step, state, "start")
        with self._standing_still(step):
            problem = self._finish(step, told=False)
        if self.last_saved != step:
            error = CheckpointError(f"{problem}; free space or correct --output, and run again")
            error.agreed = True
            raise error

    def look(self, step: int, report: Report) -> None:
        """After each step: an error is known to all at the next one; what is written is made valid."""
        if report.cannot_write and not self._said:
            self._said = True
            self._telemetry.say(f"step {step}: a checkpoint cannot be written on ranks {report.cannot_write[:8]}")
        if self._checkpointer.pending and not report.writing:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Make the one that is being written valid."""
        with self._standing_still(step):
            self._finish(step)

    def leave(self, step: int, state: dict[str, Any], reason: str) -> None:
        """The last checkpoint. Where it cannot be written, it is tried again for as long as there is time."""
        tries, stopped = 0, reason == "stop"
        while True:
            self.save(step, state, reason)
            self.finish(step)
            tries += 1
            if self.last_saved == step:
                return
            no_more = tries == TRIES_ON_STOP if stopped else self._checkpointer.ranks.any(stop_requested())
            if no_more:
                self._telemetry.say(f"step {step} is not saved: all after step {self.last_saved} will be trained again")
                return
            pause = RETRY_ON_STOP_S if stopped else RETRY_S
            self._telemetry.say(f"trying again in {pause:g} s; free space, or restore the file system")
            self._watch.at("wait for the file system")
            time.sleep(pause)

    @contextlib.contextmanager
    def _standing_still(self, step: int) -> Iterator[None]:
        saved, start = self.last_saved, time.perf_counter()
        with self._meter.lap("checkpoint"):
            yield
        self._stall_s += time.perf_counter() - start
        if self.last_saved != saved:
            stall = {"checkpoint/stall_s": self._stall_s, "checkpoint/write_s": self._checkpointer.write_s}
            self._telemetry.log(step, stall)
            self._stall_s = 0.0

    def _finish(self, step: int, told: bool = True) -> str | None:
        if not self._checkpointer.pending:
            return None
        written, problem = self._checkpointer.finish()
        self._said = False
        if not written:
            self._retry_at = step + max(1, self._every // 10)
        if problem and told:
            text = f"{problem}; the last good one is step {self.last_saved}"
            self._telemetry.event(step, "checkpoint failed", text)
        if written:
            self._telemetry.sync()  # a power cut must not take rows that this checkpoint has behind it
        self._goodput.note(step, self.last_saved)
        return problem
