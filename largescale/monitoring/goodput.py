"""What becomes of a run's time, told while it runs: rank 0 keeps the record of this start (see
run_record.py)."""

import math
import time
from dataclasses import replace

from largescale.monitoring import run_record
from largescale.monitoring.step_timer import StepTimer
from largescale.monitoring.telemetry import Telemetry

_EVERY_S = 10.0  # a kill costs at most so much of the account


class Goodput:
    """On ranks other than 0 every method does nothing."""

    def __init__(
        self,
        telemetry: Telemetry,
        timer: StepTimer,
        *,
        start_time: float,
        world_size: int,
        device: str,
        from_step: int,
    ):
        """`start_time`: when the program was started, in seconds since 1970; `from_step`: where it
        goes on."""
        self._telemetry, self._timer, self._active = telemetry, timer, telemetry.active
        self._written_s = -math.inf  # by a clock that nobody sets
        if self._active:
            run_dir = telemetry.run_dir
            self._earlier = run_record.read_starts(run_dir)
            if self._earlier and (killed := run_record.out_of_memory(self._earlier[-1])):
                self._earlier[-1].ended = killed
                telemetry.message(f"the start before was {killed}")
                with telemetry.tolerate_disk_errors():
                    run_record.write(run_dir, self._earlier[-1], seen=False)
            self._begin(
                run_record.begin(
                    run_dir,
                    began_unix_s=start_time,
                    world_size=world_size,
                    device=device,
                    from_step=from_step,
                )
            )

    def _begin(self, start: run_record.Start) -> None:
        """What became of the time before is settled then: a log line costs the same, however many
        starts there were."""
        self._start = start
        self._before = run_record.account(
            [*self._earlier, replace(start, seen_unix_s=start.began_unix_s, seconds={})]
        )

    def note(self, step: int, saved_step: int, ended: str | None = None) -> None:
        """Where the run stands. Written at once where that matters to the next start, else now and
        then."""
        if not self._active:
            return
        start, now = self._start, time.monotonic()
        due = (
            ended is not None or saved_step != start.saved_step or now - self._written_s > _EVERY_S
        )
        start.step, start.saved_step, start.ended = step, saved_step, ended
        start.seconds, start.seen_unix_s = dict(self._timer.lifetime), time.time()
        if due:
            self._written_s = now
            with self._telemetry.tolerate_disk_errors():
                run_record.write(self._telemetry.run_dir, start)

    def rolled_back(self, to_step: int, why: str) -> None:
        """What follows is a start of its own, but for the start-up."""
        if not self._active:
            return
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
        return (
            self._before + run_record.account([self._start])
            if self._active
            else run_record.account([])
        )

    def metrics(self) -> dict[str, float]:
        """Shares of the wall time since the first start."""
        account = self.account()
        if not account.wall_s:
            return {}
        return {
            "goodput/training": account.goodput,
            **{
                f"goodput/{kind}": s / account.wall_s
                for kind, s in account.seconds.items()
                if kind != "training"
            },
        }
