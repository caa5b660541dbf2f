"""Copies of tensors in host memory, for checkpoints: training stands still while they are made."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Pinned memory, which a GPU writes several times as fast as ordinary memory. To pin all of a
# checkpoint, at each save, would cost more than it gains.
STAGING_BYTES = 256 * 2**20


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; of a tensor on the CPU too, since training changes it before it is
    written."""
    return tensor.detach().to("cpu", copy=True)


@dataclass
class _Part:
    """A part of a tensor on its way through a half of the staging block. All are bytes."""

    source: Tensor
    half: Tensor
    target: Tensor
    # After the GPU's copy from `source` to `half`.
    event: Any


class StagedCopies:
    """Copies from a GPU through one pinned block that stays: while the GPU fills one half of it, on
    a stream of its own, the host empties the other."""

    def __init__(self, size: int = STAGING_BYTES):
        """`size`: of the block, in bytes."""
        self._block = self._pinned(size)
        self._half_size = size // 2
        # Parts that the GPU copies at present, in order: one for each half at most.
        self._on_the_way: list[_Part] = []
        self._number = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, which is complete after `finish`."""
        tensor = tensor.detach()
        # Another order of the elements is kept by torch's own copy.
        if tensor.device.type == "cpu" or not tensor.is_contiguous():
            return to_host(tensor)
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        sources = _bytes_of(tensor).split(self._half_size)
        targets = _bytes_of(target).split(self._half_size)
        for source, part in zip(sources, targets, strict=True):
            if source.numel():
                self._send(source, part)
        return target

    def _send(self, source: Tensor, target: Tensor) -> None:
        if len(self._on_the_way) == 2:
            self._receive()
        start = self._number % 2 * self._half_size
        self._number += 1
        half = self._block[start : start + source.numel()]
        self._on_the_way.append(_Part(source, half, target, self._start(source, half)))

    def _receive(self) -> None:
        """Empty the half that was filled first."""
        part = self._on_the_way.pop(0)
        part.event.synchronize()
        part.target.copy_(part.half)

    def finish(self) -> None:
        """Complete every copy."""
        while self._on_the_way:
            self._receive()

    # What needs a GPU.

    def _pinned(self, size: int) -> Tensor:
        self._stream: Any = torch.cuda.Stream()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _start(self, source: Tensor, half: Tensor) -> Any:
        """Have the GPU copy a part, after all that it was asked for before; the event after it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            half.copy_(source, non_blocking=True)
            return self._stream.record_event()


def _bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, flat."""
    return tensor.reshape(-1).view(torch.uint8)
