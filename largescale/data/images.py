"""From model space to pictures, and sheets of them."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

# Colours of the strips that text is drawn on
BACKGROUND = (32, 32, 32)
TEXT = (230, 230, 230)

# Notes on pictures of latents that the VAE has not decoded
UNDECODED = "latents, not decoded: colours and noise mean nothing"
LINEAR = "latents by a linear map to colours, not decoded: blurred and noisy"


def to_uint8(x: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8. One channel becomes grey; of more than three,
    the first three show (latents, seen without their decoder)."""
    x = x.detach().float().cpu()
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
    # [-1, 1] -> 0 .. 255, rounded to the nearest
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
    left = (image.width - resolution) // 2
    top = (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def grid(images: np.ndarray, columns: int, scale: int = 1, pad: int = 2) -> np.ndarray:
    """(N, H, W, 3) uint8 -> one picture, row by row, each image `scale` times enlarged."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 32, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = pad + row * (height + pad)
        left = pad + column * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def headed(sheet: np.ndarray, text: str) -> np.ndarray:
    """(H, W, 3) uint8 with the text above it, wrapped."""
    width = sheet.shape[1]
    line_height = 14
    # Only a picture's own Draw can measure text, so one of a pixel measures it before there is a
    # strip of the right height.
    lines = _wrapped(text, ImageDraw.Draw(Image.new("RGB", (1, 1))), width - 4)
    strip = Image.new("RGB", (width, line_height * len(lines)), BACKGROUND)
    for row, words in enumerate(lines):
        ImageDraw.Draw(strip).text((2, row * line_height), words, fill=TEXT)
    return np.concatenate([np.asarray(strip), sheet])


def titled(
    images: np.ndarray, titles: Sequence[str], columns: int, scale: int = 1, lines: int = 3
) -> np.ndarray:
    """(N, H, W, 3) uint8 -> one picture, with the title of each image below it, wrapped, cut after
    so many lines."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width = images.shape[2]
    line_height = 12

    # A strip of text of the same height below each image makes them tiles of one grid.
    strips = []
    for title in titles:
        strip = Image.new("RGB", (width, lines * line_height + 2), BACKGROUND)
        draw = ImageDraw.Draw(strip)
        for row, text in enumerate(_wrapped(title, draw, width - 2)[:lines]):
            draw.text((1, row * line_height), text, fill=TEXT)
        strips.append(np.asarray(strip))
    return grid(np.concatenate([images, np.stack(strips)], axis=1), columns)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, width: int) -> list[str]:
    """The lines of the text, at most `width` pixels wide unless one word is wider."""
    # Without accents, which PIL's own font does not have: NFKD makes them characters of their own.
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    lines = [""]
    for word in plain.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def balanced_labels(n: int, num_classes: int) -> Sequence[int]:
    """0, 1, ..., num_classes - 1, 0, 1, ...: each class as often as any other, to one."""
    return [i % num_classes for i in range(n)]
