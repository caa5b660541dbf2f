"""From model space to pictures, and sheets of them."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

UNDECODED = "latents, not decoded: colours and noise mean nothing"
LINEAR = "latents by a linear map to colours, not decoded: blurred and noisy"


def to_uint8(x: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8. One channel becomes grey; of more than three,
    the first three show (latents, seen without their decoder)."""
    x = x.detach().float().cpu()
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def linear_rgb(x: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """(N, C, H, W) -> (N, 3, H, W): each latent's channels, and 1, times the (C + 1, 3) of
    `Vae.fit_rgb`."""
    m = torch.tensor(matrix, dtype=x.dtype, device=x.device)
    return torch.einsum("nchw,cd->ndhw", x, m[:-1]) + m[-1][:, None, None]


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's: halve with a box filter while twice too large, bicubic to the short side, cut out the
    centre."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


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


def headed(sheet: np.ndarray, text: str) -> np.ndarray:
    """(H, W, 3) uint8 with the text above it, wrapped."""
    width, line = sheet.shape[1], 14
    lines = _wrapped(text, ImageDraw.Draw(Image.new("RGB", (1, 1))), width - 4)
    strip = Image.new("RGB", (width, line * len(lines)), (32, 32, 32))
    for row, words in enumerate(lines):
        ImageDraw.Draw(strip).text((2, row * line), words, fill=(230, 230, 230))
    return np.concatenate([np.asarray(strip), sheet])


def titled(
    images: np.ndarray, titles: Sequence[str], columns: int, scale: int = 1, lines: int = 3
) -> np.ndarray:
    """(N, H, W, 3) uint8 -> one picture, with the title of each image below it, wrapped, cut after
    so many lines."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width, line = images.shape[2], 12
    below = []
    for title in titles:
        strip = Image.new("RGB", (width, lines * line + 2), (32, 32, 32))
        draw = ImageDraw.Draw(strip)
        for row, text in enumerate(_wrapped(title, draw, width - 2)[:lines]):
            draw.text((1, row * line), text, fill=(230, 230, 230))
        below.append(np.asarray(strip))
    return grid(np.concatenate([images, np.stack(below)], axis=1), columns)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, width: int) -> list[str]:
    # without accents, which PIL's own font does not have
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    lines = [""]
    for word in plain.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = (
            [*lines[:-1], longer]
            if draw.textlength(longer) <= width or not lines[-1]
            else [*lines, word]
        )
    return lines


def balanced_labels(n: int, num_classes: int) -> Sequence[int]:
    """0, 1, ..., num_classes - 1, 0, 1, ...: each class as often as any other, to one."""
    return [i % num_classes for i in range(n)]
