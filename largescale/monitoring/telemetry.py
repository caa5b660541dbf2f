"""What a run logs: metrics.jsonl, trackers such as TensorBoard, and a progress bar, all from rank 0."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from largescale.errors import TakenOverError
from largescale.host.files import located
from largescale.host.launch import printable_lines
from largescale.monitoring.run_log import parse_row
from largescale.monitoring.trackers.service import Ended
from largescale.monitoring.trackers.tensorboard import Board

# Dense half-precision peaks in FLOP/s, from the makers' data sheets; elsewhere MFU is not reported.
# The first name that a device's name contains counts, so "H100 PCIe" comes before "H100".
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


# How training begins a row.
_BEGIN = re.compile(rb'\{"step": (\d{1,18}), ')


def peak_flops(device_name: str, precision: str) -> float | None:
    """The peak of a device in FLOP/s; None where it is not known."""
    if precision == "fp32":
        return None
    for name, peak in _PEAK_FLOPS.items():
        if name in device_name:
            return peak
    return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without lines that are no rows."""
    # A crash can cut a line short.
    path = run_dir / "metrics.jsonl"
    rows = map(parse_row, path.read_bytes().splitlines() if path.exists() else [])
    return [row for row in rows if row is not None]


def rows_from(run_dir: Path, step: int) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl from a step on, one after the other: there may be millions."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = _row_from(line, step)
            if row:
                yield row


def _row_from(line: bytes, step: int) -> dict[str, Any] | None:
    """The row on this line, if it is one of that step or a later one."""
    # Nearly all rows of a long log are of earlier steps, and so need not be parsed.
    begins = _BEGIN.match(line)
    if begins and int(begins[1]) < step:
        return None
    row = parse_row(line)
    return row if row and row["step"] >= step else None


def _end_of_step(path: Path, step: int) -> int:
    """The length of the file up to the first row of a later step, or up to a half line at its
    end."""
    # The file is cut there, which takes no space on a full disk.
    end = 0
    with path.open("rb") as file:
        for line in file:
            if _row_from(line, step + 1):
                break
            if line.endswith(b"\n"):
                end += len(line)
    return end


class Tracker(Protocol):
    """Where a run is shown besides metrics.jsonl. Its methods may raise OSError, and wait for no
    network."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, step: int, kind: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def roll_back(self, step: int) -> None:
        """What was logged of steps later than `step` does not count any more."""

    def close(self, ended: Ended, summary: Mapping[str, Any]) -> None: ...


# Starts trackers, given the run directory under its present name and what prints a line.
StartTrackers = Callable[[Callable[[], Path], Callable[[str], None]], Sequence[Tracker]]


def _no_trackers(run_dir: object, message: object) -> Sequence[Tracker]:
    return ()


class Telemetry:
    """Writes metrics.jsonl, hands everything on to the trackers, and shows the progress bar.

    On ranks other than 0 every method does nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        active: bool,
        tensorboard: bool,
        step: int,
        steps: int,
        require_lock: Callable[[], None] = lambda: None,
        trackers: StartTrackers = _no_trackers,
    ):
        """`step`: where the run stands. Rows of later steps, written before an interruption, are
        dropped. `trackers`: starts those besides TensorBoard. `require_lock`: raises TakenOverError
        where another process trains the run since, OSError where that cannot be found out."""
        self.active = active
        if not active:
            return
        # Called before anything is written, within `tolerate_disk_errors`.
        self.require_lock = require_lock
        require_lock()
        self._run_dir = run_dir
        self._failure_reported = False
        # Open, so that the run directory is found under another name too.
        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(run_dir, os.O_RDONLY)

        # Unbuffered: what could not be written is kept in `_unwritten`, not in a buffer.
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._file.truncate(_end_of_step(run_dir / "metrics.jsonl", step))
        self._unwritten = b""
        self._ended: Ended = "stopped"
        self._summary: dict[str, Any] = {}

        # In a log file a bar is only a line now and then.
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            ascii=not terminal,
            mininterval=0.5 if terminal else 20,
        )
        self._trackers: list[Tracker] = []
        if tensorboard:
            board = Board(lambda: self.run_dir / "tensorboard")
            self._trackers.append(board)
            self._track(lambda tracker: board.start(step))
        self._trackers += trackers(lambda: located(run_dir, self._folder), self.message)

    @property
    def run_dir(self) -> Path:
        """The run directory under its present name: it may be renamed while the run trains."""
        run_dir = located(self._run_dir, self._folder)
        if run_dir != self._run_dir:
            self.message(
                f"{self._run_dir} was moved: continuing in {run_dir}; a later start needs --output "
                f"{run_dir}"
            )
            self._run_dir = run_dir
        return run_dir

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """Hand something on to every tracker, unless another process trains the run since."""
        for tracker in self._trackers:
            with self.tolerate_disk_errors():
                self.require_lock()
                call(tracker)

    def roll_back(self, step: int) -> None:
        """Drop rows of steps later than `step`."""
        if not self.active:
            return
        with self.tolerate_disk_errors():
            self.require_lock()
            self._file.truncate(_end_of_step(self.run_dir / "metrics.jsonl", step))
        self._unwritten = b""
        self._track(lambda tracker: tracker.roll_back(step))
        with contextlib.suppress(OSError):
            self._bar.n = step
            self._bar.refresh()

    def progress(self, step: int, **shown: Any) -> None:
        if self.active:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log a row of metrics, without those that are None (unknown here)."""
        if not self.active:
            return
        known = {key: value for key, value in metrics.items() if value is not None}
        self._write({"step": step, **known})
        self._track(lambda tracker: tracker.log(step, known))

    def event(self, step: int, kind: str, text: str, **facts: Any) -> None:
        """Log an event, and print its text."""
        if not self.active:
            return
        self._write({"step": step, "event": kind, "text": text, **facts})
        self._track(lambda tracker: tracker.event(step, kind, text))
        self.message(text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image, (H, W, 3) uint8, to the trackers and as RUN/NAME/step_00001000.png."""
        if not self.active:
            return
        with self.tolerate_disk_errors():
            self.require_lock()
            path = self.run_dir / name / f"step_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        self._track(lambda tracker: tracker.image(step, name, image))

    def summarise(self, ended: Ended, **facts: Any) -> None:
        """Set what trackers are told at the end of this start."""
        if self.active:
            self._ended = ended
            self._summary = facts

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        # The disk that is full may be the one to which stderr is written.
        if self.active:
            with contextlib.suppress(OSError):
                tqdm.write(printable_lines(text), file=sys.stderr)

    def sync(self) -> None:
        """Wait until what was logged so far is on disk, where it survives a power cut."""
        if self.active:
            with self.tolerate_disk_errors():
                os.fsync(self._file.fileno())

    def _write(self, row: dict[str, Any]) -> None:
        # After an error the rest of the row is written with the next one.
        self._unwritten += json.dumps(row).encode() + b"\n"
        with self.tolerate_disk_errors():
            self.require_lock()
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    @contextlib.contextmanager
    def tolerate_disk_errors(self) -> Iterator[None]:
        """Report an error of the disk instead of raising it."""
        # Rank 0 must not leave the others waiting in a collective.
        try:
            yield
        # Nothing is written then, and all ranks together end the run at the next step.
        except TakenOverError:
            pass
        except OSError as error:
            self._report_failure(error)

    def _report_failure(self, error: OSError) -> None:
        if not self._failure_reported:
            self.message(f"telemetry cannot be written, training continues: {error}")
        self._failure_reported = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.active:
            ended: Ended = "failed" if kind else self._ended
            self._track(lambda tracker: tracker.close(ended, self._summary))
            self._bar.close()
            self._file.close()
            os.close(self._folder)
