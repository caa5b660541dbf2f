"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar, all from rank 0."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from largescale.files import write_atomically

# Dense half-precision peaks in FLOP/s, from the makers' data sheets; elsewhere MFU is not reported.
_PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device_name: str, precision: str) -> float | None:
    if precision == "fp32":
        return None
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. A last line that a crash cut short is left out."""
    rows = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Telemetry:
    """On ranks other than 0 every method does nothing."""

    def __init__(self, run_dir: Path, *, active: bool, tensorboard: bool, step: int, steps: int):
        """`step`: where the run stands. Rows of later steps, written before an interruption, are dropped."""
        self.active = active
        if not active:
            return
        self.run_dir, self._said_failing, self._tensorboard = run_dir, False, tensorboard
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open(step)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, ascii=not terminal,
            mininterval=0.5 if terminal else 20,
        )

    def _open(self, step: int) -> None:
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.run_dir) if row["step"] <= step]
        write_atomically(self.run_dir / "metrics.jsonl", "".join(kept))
        self._file = (self.run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten = b""
        self._board: Any = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def go_back(self, step: int) -> None:
        """Rows of later steps are dropped."""
        if not self.active:
            return
        with self.going_on():
            self._close()
            self._open(step)
        self._bar.n = step
        self._bar.refresh()

    def progress(self, step: int, **shown: Any) -> None:
        if self.active:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Values that are None (unknown here) are left out."""
        if not self.active:
            return
        known = {key: value for key, value in metrics.items() if value is not None}
        self._write({"step": step, **known})
        with self.going_on():
            for key, value in known.items() if self._board else ():
                self._board.add_scalar(key, value, step)

    def event(self, step: int, kind: str, text: str, **facts: Any) -> None:
        if not self.active:
            return
        self._write({"step": step, "event": kind, "text": text, **facts})
        with self.going_on():
            if self._board:
                self._board.add_text(kind, text, step)
        self.say(text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image`: (H, W, 3) uint8, to TensorBoard and as RUN/NAME/step_00001000.png."""
        if not self.active:
            return
        with self.going_on():
            path = self.run_dir / name / f"step_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
            if self._board:
                self._board.add_image(name, image, step, dataformats="HWC")

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def _write(self, row: dict[str, Any]) -> None:
        self._unwritten += json.dumps(row).encode() + b"\n"
        with self.going_on():
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """A full disk does not end the run: rank 0 must not leave the others in a collective."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a file that could not be opened anew is a closed one
            if not self._said_failing:
                self.say(f"telemetry cannot be written, training goes on: {error}")
            self._said_failing = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            self._bar.close()
            self._close()

    def _close(self) -> None:
        with self.going_on():
            self._file.close()
        with self.going_on():
            if self._board:
                self._board.close()
