"""When a checkpoint is made valid, and what is done about one that cannot be written: training goes
on, and says so."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.distributed.step_report import StepReport
from largescale.engine.deepspeed_engine import Engine
from largescale.errors import CheckpointError
from largescale.host.signals import stop_requested
from largescale.training.recorder import Recorder

RETRY_S = 30.0  # between tries of the last checkpoint of a finished run
RETRY_ON_STOP_S = 5.0  # the same where the machine is about to be taken away ...
TRIES_ON_STOP = 3  # ... and how many


class CheckpointPolicy:
    """Every public method but `due` is collective."""

    def __init__(self, checkpointer: Checkpointer, engine: Engine, recorder: Recorder):
        self._checkpointer, self._engine, self._recorder = checkpointer, engine, recorder
        self._every = checkpointer.config.every
        self._retry_at = -1  # the step of the next try after one that failed
        self._failure_reported = False  # of the one that is being written
        self._stall_s = 0.0  # how long training has stood still for it

    @property
    def last_saved(self) -> int:
        return self._checkpointer.last_saved

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._retry_at

    def save(self, step: int, state: dict[str, Any], reason: str) -> None:
        """Start to write one, once the one before is valid or has failed."""
        with self._stalled(step):
            self._finalize(step)
            if not self._checkpointer.pending:
                self._checkpointer.save(step, state, self._engine, reason)

    def save_first(self, step: int, state: dict[str, Any]) -> None:
        """Proves, before GPU time is spent, that the run can be saved. Raises CheckpointError where
        it cannot."""
        self.save(step, state, "start")
        with self._stalled(step):
            problem = self._finalize(step, report=False)
        if self.last_saved != step:
            error = CheckpointError(f"{problem}; free space or correct --output, and run again")
            error.agreed = True
            raise error

    def poll(self, step: int, report: StepReport) -> None:
        """After each step: an error is known to all at the next one; what is written is made
        valid."""
        if report.cannot_write and not self._failure_reported:
            self._failure_reported = True
            ranks = report.cannot_write[:8]
            self._recorder.telemetry.message(
                f"step {step}: a checkpoint cannot be written on ranks {ranks}"
            )
        if self._checkpointer.pending and not report.writing:
            self.finalize(step)

    def finalize(self, step: int) -> None:
        """Make the one that is being written valid."""
        with self._stalled(step):
            self._finalize(step)

    def save_on_exit(self, step: int, state: dict[str, Any], reason: str) -> None:
        """The last checkpoint. Where it cannot be written, it is tried again for as long as there
        is time."""
        tries, stopped = 0, reason == "stop"
        while True:
            self.save(step, state, reason)
            self.finalize(step)
            tries += 1
            if self.last_saved == step:
                return
            no_more = (
                tries == TRIES_ON_STOP
                if stopped
                else self._checkpointer.ranks.any(stop_requested())
            )
            if no_more:
                self._recorder.telemetry.message(
                    f"step {step} is not saved: all after step {self.last_saved} will be trained "
                    "again"
                )
                return
            pause = RETRY_ON_STOP_S if stopped else RETRY_S
            self._recorder.telemetry.message(
                f"trying again in {pause:g} s; free space, or restore the file system"
            )
            self._recorder.watchdog.heartbeat("wait for the file system")
            time.sleep(pause)

    @contextlib.contextmanager
    def _stalled(self, step: int) -> Iterator[None]:
        saved, start = self.last_saved, time.perf_counter()
        with self._recorder.lap("checkpoint"):
            yield
        self._stall_s += time.perf_counter() - start
        if self.last_saved != saved:
            stall = {
                "checkpoint/stall_s": self._stall_s,
                "checkpoint/write_s": self._checkpointer.write_s,
            }
            self._recorder.telemetry.log(step, stall)
            self._stall_s = 0.0

    def _finalize(self, step: int, report: bool = True) -> str | None:
        if not self._checkpointer.pending:
            return None
        written, problem = self._checkpointer.finish()
        self._failure_reported = False
        if not written:
            self._retry_at = step + max(1, self._every // 10)
        if problem and report:
            text = f"{problem}; the last good one is step {self.last_saved}"
            self._recorder.telemetry.event(step, "checkpoint failed", text)
        if written:
            self._recorder.telemetry.sync()  # a power cut must not take rows that this checkpoint has behind it
        self._recorder.goodput.note(step, self.last_saved)
        return problem
