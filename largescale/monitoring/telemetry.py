"""What a run logs: metrics.jsonl, TensorBoard, and a progress bar, all from rank 0."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from largescale.errors import TakenOverError
from largescale.host.files import from_json, located
from largescale.host.launch import printable_lines

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
    rows = map(_row, path.read_bytes().splitlines() if path.exists() else [])
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row on this line; None where it is no object with a number for a step."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _end_of_step(path: Path, step: int) -> int:
    """The length of the file up to the first row of a later step, or up to a half line at its
    end."""
    # The file is cut there, which takes no space on a full disk.
    end = 0
    with path.open("rb") as file:
        for line in file:
            row = _row(line)
            if row and row["step"] > step:
                break
            if line.endswith(b"\n"):
                end += len(line)
    return end


class Telemetry:
    """Writes metrics.jsonl and TensorBoard, and shows the progress bar.

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
    ):
        """`step`: where the run stands. Rows of later steps, written before an interruption, are
        dropped. `require_lock`: raises TakenOverError where another process trains the run since,
        OSError where that cannot be found out."""
        self.active = active
        if not active:
            return
        # Called before anything is written, within `tolerate_disk_errors`.
        self.require_lock = require_lock
        require_lock()
        self._run_dir = run_dir
        self._tensorboard = tensorboard
        self._failure_reported = False
        # Open, so that the run directory is found under another name too.
        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(run_dir, os.O_RDONLY)

        # Unbuffered: what could not be written is kept in `_unwritten`, not in a buffer.
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._file.truncate(_end_of_step(run_dir / "metrics.jsonl", step))
        self._unwritten = b""
        self._board: Any = None
        self._open_board(step)

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

    def _open_board(self, step: int) -> None:
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard drops what it has of later steps itself.
            with self.tolerate_disk_errors():
                self.require_lock()
                self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def _on_board(self, step: int, add: Callable[[Any], Any]) -> None:
        """Add something to TensorBoard."""
        # Its writer cannot be used after an error: another one is made.
        if self._board is None:
            self._open_board(step)
        board = self._board
        self._board = None
        with self.tolerate_disk_errors():
            self.require_lock()
            if board:
                add(board)
            self._board = board

    def roll_back(self, step: int) -> None:
        """Drop rows of steps later than `step`."""
        if not self.active:
            return
        with self.tolerate_disk_errors():
            self.require_lock()
            self._file.truncate(_end_of_step(self.run_dir / "metrics.jsonl", step))
        self._unwritten = b""
        # Another writer, since only a new one drops what there is of later steps.
        self._close_board()
        self._board = None
        self._open_board(step)
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

        def add(board: Any) -> None:
            for key, value in known.items():
                board.add_scalar(key, value, step)

        self._on_board(step, add)

    def event(self, step: int, kind: str, text: str, **facts: Any) -> None:
        """Log an event, and print its text."""
        if not self.active:
            return
        self._write({"step": step, "event": kind, "text": text, **facts})
        self._on_board(step, lambda board: board.add_text(kind, text, step))
        self.message(text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log an image, (H, W, 3) uint8, to TensorBoard and as RUN/NAME/step_00001000.png."""
        if not self.active:
            return
        with self.tolerate_disk_errors():
            self.require_lock()
            path = self.run_dir / name / f"step_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        self._on_board(step, lambda board: board.add_image(name, image, step, dataformats="HWC"))

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

    def __exit__(self, *error: object) -> None:
        if self.active:
            self._bar.close()
            self._file.close()
            os.close(self._folder)
            self._close_board()

    def _close_board(self) -> None:
        with self.tolerate_disk_errors():
            if self._board:
                self._board.close()
