"""When a checkpoint is made valid, and what is done about one that cannot be written: training
continues, and logs it."""

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

# Pause between tries of the last checkpoint of a finished run, for as long as it takes.
RETRY_S = 30.0
# A run that is asked to stop may be about to lose its machine: few tries, close together.
RETRY_ON_STOP_S = 5.0
TRIES_ON_STOP = 3


class CheckpointPolicy:
    """Every public method but `due` is collective."""

    def __init__(self, checkpointer: Checkpointer, engine: Engine, recorder: Recorder):
        self._checkpointer = checkpointer
        self._engine = engine
        self._recorder = recorder
        self._every = checkpointer.config.every
        # The step of the next try after a checkpoint that failed.
        self._retry_at = -1
        # Of the checkpoint that is being written: is its error logged, and how long has training
        # stood still for it?
        self._failure_reported = False
        self._stall_s = 0.0

    @property
    def last_saved(self) -> int:
        return self._checkpointer.last_saved

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._retry_at

    def save(self, step: int, state: dict[str, Any], reason: str) -> None:
        """Start to write a checkpoint, once the one before is valid or has failed."""
        with self._stalled(step):
            self._finalize(step)
            # Still pending: the file system does not answer, and a second one would wait too.
            if not self._checkpointer.pending:
                self._checkpointer.save(step, state, self._engine, reason)

    def save_first(self, step: int, state: dict[str, Any]) -> None:
        """Prove, before GPU time is spent, that the run can be saved. Raises CheckpointError where
        it cannot."""
        self.save(step, state, "start")
        with self._stalled(step):
            problem = self._finalize(step, report=False)
        if self.last_saved != step:
            error = CheckpointError(f"{problem}; free space or correct --output, and run again")
            # Every rank raises it, so rank 0 alone prints it.
            error.agreed = True
            raise error

    def poll(self, step: int, report: StepReport) -> None:
        """After each step: log an error of writing, and make a checkpoint valid once every rank has
        written its part."""
        # Ranks learn of each other's errors from the report of the next step; one line is enough.
        if report.cannot_write and not self._failure_reported:
            self._failure_reported = True
            ranks = report.cannot_write[:8]
            self._recorder.telemetry.message(
                f"step {step}: a checkpoint cannot be written on ranks {ranks}"
            )
        if self._checkpointer.pending and not report.writing:
            self.finalize(step)

    def finalize(self, step: int) -> None:
        """Make the checkpoint that is being written valid."""
        with self._stalled(step):
            self._finalize(step)

    def save_on_exit(self, step: int, state: dict[str, Any], reason: str) -> None:
        """Save the last checkpoint. One that cannot be written is tried again for as long as there
        is time."""
        stopped = reason == "stop"
        tries = 0
        while True:
            self.save(step, state, reason)
            self.finalize(step)
            tries += 1
            if self.last_saved == step:
                return

            # A finished run tries until a rank is asked to stop: its last steps are worth waiting.
            give_up = tries == TRIES_ON_STOP
            if not stopped:
                give_up = self._checkpointer.ranks.any(stop_requested())
            if give_up:
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
        """Time for which training stands still; logged once the checkpoint is valid."""
        saved = self.last_saved
        start = time.perf_counter()
        with self._recorder.lap("checkpoint"):
            yield
        self._stall_s += time.perf_counter() - start

        # One checkpoint can stall training several times: at its start, while polled, at its end.
        if self.last_saved != saved:
            stall = {
                "checkpoint/step": self.last_saved,
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

        # After a failure the next try comes sooner than the next regular checkpoint.
        if not written:
            self._retry_at = step + max(1, self._every // 10)
        if problem and report:
            text = f"{problem}; the last good one is step {self.last_saved}"
            self._recorder.telemetry.event(step, "checkpoint failed", text)

        # A power cut must not lose rows of the log from before this checkpoint.
        if written:
            self._recorder.telemetry.sync()
        self._recorder.goodput.note(step, self.last_saved)
        return problem
