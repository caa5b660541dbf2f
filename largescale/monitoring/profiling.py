"""A torch.profiler trace of a few steps, for Perfetto and TensorBoard, and a list of what took
longest in them."""

import contextlib
import gzip
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from largescale.monitoring.telemetry import Telemetry

SKIPPED = 5  # steps before it begins: kernels are loaded and compiled, the allocator finds its size
WARM_UP = 1  # the profiler's own
RECORDED = 3  # a trace of more is too large for a browser


class Profile:
    """Around the loop, which says `step` after each one. Costs nothing where it is not wanted, nor
    once it is written.

    RUN/profile/step_00000009.pt.trace.json.gz shows the steps up to 9, with the parts of a step as
    named ranges, and step_00000009.txt the ten largest operations."""

    def __init__(
        self,
        lap: Callable[[str], AbstractContextManager[None]],
        telemetry: Telemetry,
        *,
        wanted: bool,
        cuda: bool,
    ):
        """`lap` times what the profiler itself takes."""
        self._lap, self._telemetry, self._cuda = lap, telemetry, cuda
        self._wanted = wanted and telemetry.active  # on rank 0
        self._taken = self._step = 0
        self._profiler: Any = None

    def step(self, step: int) -> None:
        """One more was tried; `step`: how many are applied."""
        if not self._wanted:
            return
        self._taken, self._step = self._taken + 1, step
        if self._taken == SKIPPED:
            self._begin()
        elif self._taken == SKIPPED + WARM_UP + RECORDED:
            self._end()
        elif self._profiler is not None:
            self._profiler.step()

    def _begin(self) -> None:
        if not self._cuda:  # where it finds no GPU, it calls that an error
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        steps = schedule(wait=0, warmup=WARM_UP, active=RECORDED)
        with self._lap("profile"):
            self._profiler = profile(activities=activities, schedule=steps, record_shapes=True)
            self._profiler.start()

    def annotate(self, name: str) -> AbstractContextManager[Any]:
        """A named range of the trace, while one is recorded."""
        return record_function(name) if self._profiler is not None else contextlib.nullcontext()

    def _end(self) -> None:
        """Write what was recorded."""
        profiler, self._profiler, self._wanted = self._profiler, None, False
        with self._lap("profile"):
            profiler.stop()
            if self._taken > SKIPPED + WARM_UP:
                self._write(profiler)

    def _write(self, profiler: Any) -> None:
        with self._telemetry.tolerate_disk_errors():
            folder = self._telemetry.run_dir / "profile"
            folder.mkdir(exist_ok=True)
            name = f"step_{self._step:08d}"
            packed, listed, unfinished = (
                folder / (name + end) for end in (".pt.trace.json.gz", ".txt", ".unfinished")
            )
            try:
                profiler.export_chrome_trace(str(unfinished))  # says nothing where it fails
                trace = unfinished.read_bytes() if unfinished.exists() else b""
                if not trace.rstrip().endswith(b"}"):
                    raise OSError(f"{packed} would not be whole; is the disk full?")
                unfinished.write_bytes(gzip.compress(trace))
                unfinished.replace(packed)
            finally:
                for left in folder.glob(unfinished.name + "*"):  # its own file of another name, too
                    left.unlink()
            listed.write_text(self._largest(profiler))
            self._telemetry.message(
                f"profiled the steps up to {self._step}: open {packed} at https://ui.perfetto.dev, "
                f"or the folder with tensorboard --logdir {folder} (and pip install "
                f"torch-tb-profiler); the largest operations: {listed}"
            )

    def _largest(self, profiler: Any) -> str:
        operations = EventList(
            (event for event in profiler.key_averages() if not event.is_user_annotation),
            use_device="cuda" if self._cuda else None,
        )
        table: str = operations.table(
            sort_by=f"self_{'device' if self._cuda else 'cpu'}_time_total", row_limit=10
        )
        return table

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self._wanted and self._taken <= SKIPPED + WARM_UP:
            self._telemetry.message(
                f"too few steps for a profile, which begins after {SKIPPED + WARM_UP}"
            )
        if self._profiler is not None:
            with (
                contextlib.suppress(RuntimeError) if kind else contextlib.nullcontext()
            ):  # that error is the news
                self._end()
