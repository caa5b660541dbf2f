"""A torch.profiler trace of a few steps, for Perfetto and TensorBoard, and a list of what took
longest in them."""

import contextlib
import gzip
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from largescale.monitoring.telemetry import Telemetry

# Steps before it begins, in which kernels are loaded and compiled and the allocator finds its size.
SKIPPED = 5
# Steps of the profiler's own warm-up.
WARM_UP = 1
# A trace of more steps is too large for a browser.
RECORDED = 3


class Profile:
    """Records a trace of a few steps; the loop calls `step` after each one.

    RUN/profile/step_00000009.pt.trace.json.gz shows the steps up to 9, with the parts of a step as
    named ranges, and step_00000009.txt the ten largest operations. Costs nothing where it is not
    wanted, nor once it is written.
    """

    def __init__(
        self,
        lap: Callable[[str], AbstractContextManager[None]],
        telemetry: Telemetry,
        *,
        wanted: bool,
        cuda: bool,
    ):
        """`lap` times what the profiler itself takes."""
        self._lap = lap
        self._telemetry = telemetry
        self._cuda = cuda
        # On rank 0 only.
        self._wanted = wanted and telemetry.active
        # Steps that were tried, and the step counter, which some do not move.
        self._taken = 0
        self._step = 0
        self._profiler: Any = None

    def step(self, step: int) -> None:
        """Count a step that was tried. `step`: how many are applied."""
        if not self._wanted:
            return
        self._taken += 1
        self._step = step
        if self._taken == SKIPPED:
            self._begin()
        elif self._taken == SKIPPED + WARM_UP + RECORDED:
            self._end()
        elif self._profiler is not None:
            self._profiler.step()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
        else:
            # Without a GPU the profiler would print that as an error.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        steps = schedule(wait=0, warmup=WARM_UP, active=RECORDED)
        with self._lap("profile"):
            self._profiler = profile(activities=activities, schedule=steps, record_shapes=True)
            self._profiler.start()

    def annotate(self, name: str) -> AbstractContextManager[Any]:
        """A named range of the trace, while one is recorded."""
        return record_function(name) if self._profiler is not None else contextlib.nullcontext()

    def _end(self) -> None:
        """Write what was recorded."""
        # Even if it fails, it is not tried again.
        profiler = self._profiler
        self._profiler = None
        self._wanted = False
        with self._lap("profile"):
            profiler.stop()
            if self._taken > SKIPPED + WARM_UP:
                self._write(profiler)

    def _write(self, profiler: Any) -> None:
        with self._telemetry.tolerate_disk_errors():
            folder = self._telemetry.run_dir / "profile"
            folder.mkdir(exist_ok=True)
            name = f"step_{self._step:08d}"
            packed = folder / f"{name}.pt.trace.json.gz"
            listed = folder / f"{name}.txt"
            _export_trace(profiler, folder / f"{name}.unfinished", packed)
            listed.write_text(self._largest(profiler))
            self._telemetry.message(
                f"profiled the steps up to {self._step}: open {packed} at https://ui.perfetto.dev, "
                f"or the folder with tensorboard --logdir {folder} (and pip install "
                f"torch-tb-profiler); the largest operations: {listed}"
            )

    def _largest(self, profiler: Any) -> str:
        """A table of the operations that took longest, without the named ranges around them."""
        operations = EventList(
            (event for event in profiler.key_averages() if not event.is_user_annotation),
            use_device="cuda" if self._cuda else None,
        )
        where = "device" if self._cuda else "cpu"
        table: str = operations.table(sort_by=f"self_{where}_time_total", row_limit=10)
        return table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self._wanted and self._taken <= SKIPPED + WARM_UP:
            self._telemetry.message(
                f"too few steps for a profile, which begins after {SKIPPED + WARM_UP}"
            )
        # An error of the loop must not be hidden by one of the profiler's.
        if self._profiler is not None:
            with contextlib.suppress(RuntimeError) if kind else contextlib.nullcontext():
                self._end()


def _export_trace(profiler: Any, unfinished: Path, packed: Path) -> None:
    """Write the trace, compressed, as `packed`, by way of `unfinished`. Raises OSError."""
    try:
        # The profiler reports no error where this fails: a complete trace ends with a brace.
        profiler.export_chrome_trace(str(unfinished))
        trace = unfinished.read_bytes() if unfinished.exists() else b""
        if not trace.rstrip().endswith(b"}"):
            raise OSError(f"{packed} would not be complete; is the disk full?")
        unfinished.write_bytes(gzip.compress(trace))
        unfinished.replace(packed)
    finally:
        # Also the profiler's own temporary file, which has another ending.
        for left in unfinished.parent.glob(unfinished.name + "*"):
            left.unlink()
