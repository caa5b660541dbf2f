"""From an image file's content to the square of pixels that is packed: ADM's centre crop, as DiT
uses it."""

import struct
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from largescale.data.images import center_crop

# PIL's own limit
MAX_PIXELS = 178_956_970
# Imported, they register what opens their format.
PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# EXIF's tag of the orientation, and what turns each of its values upright.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns of odd metadata, image by image. Silenced here, once for the process: a thread cannot
# silence warnings for itself.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unusable(Exception):
    """An image that is left out; str() is the reason."""


def decode(
    data: bytes, resolution: int, min_side: int, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """The centre crop of an image file's content, upright and on white where it is transparent:
    (3, resolution, resolution) RGB.

    An animation gives its first frame. The size is checked before anything is decoded. Raises
    Unusable for what is not an image, damaged, too large, too small, or has pixels without a known
    range.
    """
    if not data:
        raise Unusable("the file is empty")
    try:
        with _open(data) as image:
            _check_size(*image.size, resolution, min_side, max_pixels)
            image.load()
            upright = _orient(_to_rgb(image), image)
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        # Damaged content makes PIL raise errors of some ten types.
        raise Unusable(str(error) or repr(error)) from error
    return np.ascontiguousarray(np.asarray(center_crop(upright, resolution)).transpose(2, 0, 1))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Image.open without its check of the size, whose warning no thread can silence for itself, and
    for FORMATS only: other formats run programs (EPS) or hold no picture."""
    reason = f"not one of {', '.join(FORMATS)}"
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        # These errors mean, as in Image.open, that the file is not of this format.
        try:
            if accepts is None or accepts(data[:16]) is True:
                return factory(BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            reason = f"{name}: {error}"
    raise Unusable(f"cannot identify image file ({reason})")


def _check_size(width: int, height: int, resolution: int, min_side: int, max_pixels: int) -> None:
    """Raises Unusable for an image that is too large, too small, or would grow too large."""
    if width * height > max_pixels:
        raise Unusable(
            f"{width} x {height} = {width * height} pixels are more than max_pixels={max_pixels}"
        )
    short = min(width, height)
    if short < max(min_side, 1):
        raise Unusable(f"its short side of {short} is less than min_side={min_side}")

    # The short side is scaled to the resolution: 1 x 100000 would grow to 256 x 25600000.
    if width * height * (resolution / short) ** 2 > max_pixels:
        raise Unusable(
            f"{width} x {height} has more than max_pixels={max_pixels} pixels once "
            f"its short side is {resolution}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if image.mode == "F":
        raise Unusable("floating-point pixels (mode F) have no known range")
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    # A palette's transparency stands in info, not in the mode.
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """An image of the modes I;16 and I in 8 bits. Raises Unusable for pixels that do not fit in 16
    bits."""
    # PIL uses I for some 16-bit formats too. What does not fit in 16 bits has no known range.
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise Unusable(f"32-bit pixels from {pixels.min()} to {pixels.max()} have no known range")
    grey = np.rint(pixels / 257).astype(np.uint8)  # 65535 / 255 = 257
    grey[pixels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def _orient(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """The image turned upright, as its EXIF data state."""
    try:
        orientation = source.getexif().get(ORIENTATION)
    except Exception:
        # EXIF data that cannot be read state nothing, and the pixels are sound.
        return rgb
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def psnr(image: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two images in dB; 99 for equal ones."""
    error = np.square(image.astype(np.float64) - other).mean()
    return min(99.0, float(10 * np.log10(255**2 / error))) if error else 99.0


def round_trip_words(trip: dict[str, Any]) -> str:
    """The manifest's round_trip as words."""
    values = trip["psnr"]
    return f"{np.mean(values):.1f} dB ({min(values):.1f} to {max(values):.1f}) over {len(values)} images"
