"""Accounts for a run's time while it runs: rank 0 keeps the record of this start (see
run_record.py)."""

import math
import time
from dataclasses import replace
from typing import Any

from largescale.monitoring import run_record
from largescale.monitoring.step_timer import StepTimer
from largescale.monitoring.telemetry import Telemetry

# A kill loses at most so much of the account.
_EVERY_S = 10.0


class Goodput:
    """Keeps the record of this start, and the account of the run's time.

    On ranks other than 0 every method does nothing.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        timer: StepTimer,
        *,
        start_time: float,
        world_size: int,
        device: str,
        from_step: int,
        settings: dict[str, Any],
    ):
        """`start_time`: when the program was started, in seconds since 1970; `from_step`: the step
        from which it continues; `settings`: its config as plain values."""
        self._telemetry = telemetry
        self._timer = timer
        self._active = telemetry.active
        # By the monotonic clock, which nobody sets.
        self._written_s = -math.inf
        if not self._active:
            return

        # A start that was killed could not record why; the kernel's count shows it afterwards.
        run_dir = telemetry.run_dir
        self._earlier = run_record.read_starts(run_dir)
        if self._earlier:
            before = self._earlier[-1]
            killed = run_record.out_of_memory(before)
            if killed:
                before.ended = killed
                telemetry.message(f"the start before was {killed}")
                with telemetry.tolerate_disk_errors():
                    telemetry.require_lock()
                    run_record.write(run_dir, before, seen=False)

        self._begin(
            run_record.begin(
                run_dir,
                began_unix_s=start_time,
                world_size=world_size,
                device=device,
                from_step=from_step,
                settings=settings,
            )
        )

    def _begin(self, start: run_record.Start) -> None:
        """Make this the present start, and settle the account of the time before it."""
        self._start = start
        # Settled once, so that a log line costs the same, however many starts there were. The
        # present start takes part with no time, since it decides which steps were replayed.
        without_time = replace(start, seen_unix_s=start.began_unix_s, seconds={})
        self._before = run_record.account([*self._earlier, without_time])

    def note(self, step: int, saved_step: int, ended: str | None = None) -> None:
        """Record where the run stands."""
        if not self._active:
            return
        # Written at once where it matters to the next start, else every few seconds.
        start = self._start
        now = time.monotonic()
        due = (
            ended is not None or saved_step != start.saved_step or now - self._written_s > _EVERY_S
        )

        start.step = step
        start.saved_step = saved_step
        start.ended = ended
        start.seconds = dict(self._timer.lifetime)
        start.seen_unix_s = time.time()
        if due:
            self._written_s = now
            with self._telemetry.tolerate_disk_errors():
                self._telemetry.require_lock()
                run_record.write(self._telemetry.run_dir, start)

    def rolled_back(self, to_step: int, why: str) -> None:
        """End the record of this start, and begin another one at step `to_step`."""
        if not self._active:
            return
        # A rolled back run is accounted for as one that was started again, without a start-up.
        self.note(self._start.step, self._start.saved_step, ended=why)
        self._earlier.append(self._start)
        self._timer.lifetime.clear()
        self._begin(
            replace(
                self._start,
                number=self._start.number + 1,
                began_unix_s=time.time(),
                from_step=to_step,
                step=to_step,
                saved_step=to_step,
                ended=None,
                seconds={},
            )
        )

    def account(self) -> run_record.Account:
        """The account of the run's time so far; empty on other ranks than 0."""
        if not self._active:
            return run_record.account([])
        return self._before + run_record.account([self._start])

    def metrics(self) -> dict[str, float]:
        """Shares of the wall time since the first start."""
        account = self.account()
        if not account.wall_s:
            return {}
        shares = {"goodput/training": account.goodput}
        for kind, seconds in account.seconds.items():
            if kind != "training":
                shares[f"goodput/{kind}"] = seconds / account.wall_s
        return shares
