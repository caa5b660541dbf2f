"""The augmentation pipeline of EDM, Karras et al., arXiv:2206.00364, appendix F.2, with its
settings for CIFAR-10.

Non-leaky: the network gets nine labels of what was done to its image, and with all labels 0 it makes
images as they are. Image and labels are a function of given random numbers, row by row.

Images that are scaled, rotated, stretched or moved are interpolated once, bicubically, where EDM
goes through twice the resolution with the filters of a wavelet (sym6): given the same draws, 248
images of CIFAR-10 differed by 4 % of their standard deviation, in a fiftieth of a CPU's time. As in
EDM an image is mirrored beyond its edge, about the middle of its last pixels, and may be led a
little out of [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from largescale.errors import ConfigError

AUGMENT_DIM = 9
"""Number of labels, in EDM's order: x-flip and y-flip, 0 or 1; scaling, normal; rotation, cos - 1
and sin; stretching, normal, times cos and sin of its axis; translation in x and in y, normal."""
AUGMENT_UNIFORMS = 9
"""Uniform numbers that an image needs, in this order, for whether it is: x-flipped, y-flipped,
scaled, rotated (and the angle), stretched, that along another axis (and its angle), moved."""
AUGMENT_NORMALS = 4
"""Normal numbers that an image needs, for how far: scaling, stretching, translation in x and y."""
SCALE_STD = 0.2  # of log2 of the factor
STRETCH_STD = 0.2  # the same; across its axis the image shrinks by as much
TRANSLATE_STD = 0.125  # of width and height


def augment(x: Tensor, uniform: Tensor, normal: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) in [-1, 1] of any float type, `uniform` (N, AUGMENT_UNIFORMS) in (0, 1) and
    `normal` (N, AUGMENT_NORMALS) standard normal -> x augmented, and labels (N, AUGMENT_DIM), both
    float32.

    Scaling, rotation, stretching and translation are done with probability p each, a y-flip with p
    / 2. An x-flip is done with 1/2 for every p above 0, as in EDM, and so takes the place of the
    loader's. p = 0: x as it is, labels 0. Raises ConfigError for arrays of other shapes and for a p
    that is not a probability.
    """
    _check_arguments(x, uniform, normal, p)
    x = x.float()
    if p == 0:
        return x, x.new_zeros(len(x), AUGMENT_DIM)

    # What is done to each image, and how far; 0 where it is not done.
    u = uniform.double().unbind(1)  # (N,) each
    w = normal.double().unbind(1)
    x_flip = u[0] < 1 / 2
    y_flip = u[1] < p / 2
    scale = w[0] * (u[2] < p)
    angle = math.pi * (2 * u[4] - 1) * (u[3] < p)
    stretch = w[1] * (u[5] < p)
    axis = math.pi * (2 * u[7] - 1) * (u[6] < 1 / 2)
    move_x = w[2] * (u[8] < p)
    move_y = w[3] * (u[8] < p)
    labels = torch.stack(
        [
            x_flip,
            y_flip,
            scale,
            angle.cos() - 1,
            angle.sin(),
            stretch * axis.cos(),
            stretch * axis.sin(),
            move_x,
            move_y,
        ],
        dim=1,
    )  # (N, AUGMENT_DIM)

    # Flips move whole pixels, so they need no interpolation.
    x = torch.where(x_flip[:, None, None, None], x.flip(3), x)
    x = torch.where(y_flip[:, None, None, None], x.flip(2), x)

    # All else is one affine map, from a pixel to its place in the source.
    to_source = _to_source(scale, angle, stretch, axis)
    move = TRANSLATE_STD * torch.stack([x.shape[3] * move_x, x.shape[2] * move_y], dim=1)

    # An image that is not moved stays bitwise as it is, which interpolation would not ensure.
    moved = (labels[:, 2:] != 0).any(1)
    return torch.where(moved[:, None, None, None], warped(x, to_source, move), x), labels.float()


def _check_arguments(x: Tensor, uniform: Tensor, normal: Tensor, p: float) -> None:
    n = len(x)
    if (
        x.ndim != 4
        or uniform.shape != (n, AUGMENT_UNIFORMS)
        or normal.shape != (n, AUGMENT_NORMALS)
    ):
        raise ConfigError(
            f"images (N, C, H, W) are augmented with (N, {AUGMENT_UNIFORMS}) uniform and (N, "
            f"{AUGMENT_NORMALS}) normal numbers, got {tuple(x.shape)}, {tuple(uniform.shape)} and "
            f"{tuple(normal.shape)}; draw AUGMENT_UNIFORMS and AUGMENT_NORMALS for each image"
        )
    if not 0 <= p <= 1:
        raise ConfigError(f"augment={p} is not a probability; EDM uses 0.12 for CIFAR-10, 0 is off")


def _to_source(scale: Tensor, angle: Tensor, stretch: Tensor, axis: Tensor) -> Tensor:
    """The inverse of scaling, rotating and stretching an image, (N, 2, 2); the arguments are (N,)
    each."""
    shrink = 2 ** (-SCALE_STD * scale)
    squeeze = 2 ** (-STRETCH_STD * stretch)
    along = torch.diag_embed(torch.stack([squeeze, 1 / squeeze], dim=1))
    return shrink[:, None, None] * (rotation(angle) @ rotation(-axis) @ along @ rotation(axis))


def rotation(angle: Tensor) -> Tensor:
    """Rotation matrices, (N,) -> (N, 2, 2)."""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def warped(x: Tensor, to_source: Tensor, move: Tensor) -> Tensor:
    """Images (N, C, H, W) whose every pixel is that of x at to_source (pixel - move), (N, 2, 2) and
    (N, 2), counted in pixels (x, y) from the image's centre."""
    height, width = x.shape[2:]
    target_x = (_from_centre(width, move) - move[:, :1])[:, None]  # (N, 1, W)
    target_y = (_from_centre(height, move) - move[:, 1:])[:, :, None]  # (N, H, 1)

    # The product of matrix and pixel, written out over the grid of pixels.
    xx, xy, yx, yy = to_source.flatten(1)[..., None, None].unbind(1)  # (N, 1, 1) each
    # grid_sample counts from -1, the middle of the first pixel, to 1, that of the last.
    grid = torch.stack(
        [
            (xx * target_x + xy * target_y) * 2 / (width - 1),
            (yx * target_x + yy * target_y) * 2 / (height - 1),
        ],
        dim=-1,
    )  # (N, H, W, 2)
    return F.grid_sample(
        x, grid.float(), mode="bicubic", padding_mode="reflection", align_corners=True
    )


def _from_centre(size: int, like: Tensor) -> Tensor:
    """The pixels of a side, (size,), counted from its middle."""
    return torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
