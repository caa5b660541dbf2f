"""From model space to pictures, and sheets of them."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def to_uint8(x: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8. One channel becomes grey; of more than three, the first three show
    (latents, seen without their decoder)."""
    x = x.detach().float().cpu()
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def grid(images: np.ndarray, columns: int, scale: int = 1, pad: int = 2) -> np.ndarray:
    """(N, H, W, 3) uint8 -> one picture, row by row, each image `scale` times enlarged."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 32, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def balanced_labels(n: int, num_classes: int) -> Sequence[int]:
    """0, 1, ..., num_classes - 1, 0, 1, ...: each class as often as any other, to one."""
    return [i % num_classes for i in range(n)]
