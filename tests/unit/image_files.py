"""Pixels of a set of images, and files of arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

N, H, W = 23, 12, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (N, H, W, 3), np.uint8)
ORDER = np.array([22, 0, 9, 10, 0, 11])


def expected(indices: np.ndarray, pixels: np.ndarray = PIXELS) -> torch.Tensor:
    return torch.from_numpy(pixels[indices].transpose(0, 3, 1, 2).copy())


def npz(path: Path, *arrays: Any, save: Callable[..., None] = np.savez, **named: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, *arrays, **named)
    return path


def alter(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
