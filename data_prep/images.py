"""From an image file's content to the square of pixels that is packed: ADM's centre crop, as DiT
uses it."""

import struct
import warnings
from io import BytesIO

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

MAX_PIXELS = 178_956_970  # PIL's own limit
PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)  # imported, they register what opens their format
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
ORIENTATION = 0x0112  # EXIF's tag, and what turns each of its values upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PIL warns of odd metadata, image by image. Here once for the process: a thread cannot silence
# warnings for itself.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unusable(Exception):
    """An image that is left out; str() is the reason."""


def decode(
    data: bytes, resolution: int, min_side: int, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """An image file's content -> (3, resolution, resolution) RGB: upright, on white where
    transparent, centre crop.

    Of an animation the first frame. The size is checked before anything is decoded. Raises Unusable
    for what is no image, damaged, too large, too small, or of pixels without a known range.
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
    except Exception as error:  # damaged content makes PIL raise some ten kinds
        raise Unusable(str(error) or repr(error)) from error
    return np.ascontiguousarray(np.asarray(center_crop(upright, resolution)).transpose(2, 0, 1))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Image.open without its check of the size, whose warning no thread can silence for itself, and
    of FORMATS only: other formats run programs (EPS) or hold no picture."""
    reason = f"not one of {', '.join(FORMATS)}"
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(data[:16]) is True:
                return factory(BytesIO(data), "")
        except (
            SyntaxError,
            IndexError,
            TypeError,
            struct.error,
        ) as error:  # as Image.open: not of this format
            reason = f"{name}: {error}"
    raise Unusable(f"cannot identify image file ({reason})")


def _check_size(width: int, height: int, resolution: int, min_side: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unusable(
            f"{width} x {height} = {width * height} pixels are more than max_pixels={max_pixels}"
        )
    if (short := min(width, height)) < max(min_side, 1):
        raise Unusable(f"its short side of {short} is less than min_side={min_side}")
    if (
        width * height * (resolution / short) ** 2 > max_pixels
    ):  # 1 x 100000 would grow to 256 x 25600000
        raise Unusable(
            f"{width} x {height} has more than max_pixels={max_pixels} pixels once "
            f"its short side is {resolution}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unusable("floating-point pixels (mode F) have no known range")
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Modes I;16 and I. PIL uses I for some 16-bit formats too; what does not fit in 16 bits has no
    known range."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise Unusable(f"32-bit pixels from {pixels.min()} to {pixels.max()} have no known range")
    grey = np.rint(pixels / 257).astype(np.uint8)  # 65535 / 255 = 257
    grey[pixels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def _orient(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        orientation = source.getexif().get(ORIENTATION)
    except Exception:  # EXIF that cannot be read says nothing; the pixels are sound
        return rgb
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
