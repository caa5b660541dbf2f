"""What a denoiser is conditioned on: labels or captions, and what is done with them row by row."""

from typing import NamedTuple

import torch
from torch import Tensor


class Captions(NamedTuple):
    """The encoded captions of N images."""

    tokens: Tensor  # (N, L, width) of any float type; what stands in the padding does not matter
    length: Tensor  # (N,) int64, real tokens of each, 1 .. L
    pooled: Tensor  # (N, pooled_width) of any float type
    null: Tensor  # (N,) bool: the caption is dropped, the null caption stands in its place


# Labels (N,) int64, which an unconditional model ignores, or captions.
Condition = Tensor | Captions


def drop(y: Condition, dropped: Tensor, null_label: int) -> Condition:
    """`y` with the null condition where `dropped`, (N,) bool."""
    if isinstance(y, Captions):
        return y._replace(null=y.null | dropped)
    return torch.where(dropped, null_label, y)


def concat(one: Condition, two: Condition) -> Condition:
    """The rows of `one`, then those of `two`."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.cat([one, two])
    return Captions(*map(torch.cat, zip(one, two, strict=True)))


def select(y: Condition, index: Tensor | slice) -> Condition:
    """The rows `index` of `y`."""
    if isinstance(y, Captions):
        return Captions(y.tokens[index], y.length[index], y.pooled[index], y.null[index])
    return y[index]


def to_device(y: Condition, device: torch.device) -> Condition:
    """`y` on a device."""
    if isinstance(y, Captions):
        return Captions(*(part.to(device) for part in y))
    return y.to(device)
