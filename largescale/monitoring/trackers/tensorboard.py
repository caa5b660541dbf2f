"""TensorBoard."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """Writes RUN/tensorboard, where what there is of later steps than the run's is dropped.

    Its methods raise OSError.
    """

    def __init__(self, folder: Callable[[], Path]):
        """`folder`: where to write at present."""
        self._folder = folder
        self._writer: Any = None

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what it has of later steps itself.
        self._writer = SummaryWriter(str(self._folder()), purge_step=step + 1)

    def _add(self, step: int, add: Callable[[Any], Any]) -> None:
        # Its writer cannot be used after an error: another one is made.
        if self._writer is None:
            self.start(step)
        writer = self._writer
        self._writer = None
        add(writer)
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        def add(writer: Any) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        self._add(step, add)

    def event(self, step: int, kind: str, text: str) -> None:
        self._add(step, lambda writer: writer.add_text(kind, text, step))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._add(step, lambda writer: writer.add_image(name, image, step, dataformats="HWC"))

    def roll_back(self, step: int) -> None:
        # Another writer, since only a new one drops what there is of later steps.
        writer = self._writer
        self._writer = None
        if writer:
            writer.close()
        self.start(step)

    def close(self, ended: object, summary: object) -> None:
        if self._writer:
            self._writer.close()
