"""From an image file's content to the packed square: every mode, orientation, size and kind of damage."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from data_prep.images import MAX_PIXELS, Unusable, center_crop, decode

RNG = np.random.default_rng(0)
BAD_EXIF = [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\0\0\0\1"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")     # PIL's, of metadata


def content(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def pixel(image: Image.Image, **options: Any) -> tuple[int, ...]:
    """What a plain image becomes; of the same size, so that nothing is resampled."""
    decoded = decode(content(image, **options), image.width, 1)
    assert decoded.shape == (3, image.height, image.width) and decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous and np.ptp(decoded, axis=(1, 2)).max() == 0
    return tuple(int(value) for value in decoded[:, 0, 0])


def adm(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The published algorithm, step by step, on an array."""
    while True:
        width, height = image.size
        if min(width, height) < 2 * size:
            break
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(width, height)
    array = np.array(image.resize((round(width * scale), round(height * scale)), resample=Image.Resampling.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y:y + size, x:x + size]


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 13), (15, 33), (16, 16), (17, 40), (31, 31), (33, 32), (64, 101),
                                  (5, 6), (3, 21), (100, 7)])
def test_center_crop_is_adms(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert np.array_equal(np.asarray(center_crop(image, 8)), adm(image, 8))
    assert np.array_equal(decode(content(image), 8, 1), adm(image, 8).transpose(2, 0, 1))


def test_center_crop_by_hand() -> None:
    pixels = np.asarray(noise(2, 5))
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 2)), pixels[:, 1:3])   # (5 - 2) // 2 = 1
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels.transpose(1, 0, 2).copy()), 2)),
                          pixels.transpose(1, 0, 2)[1:3])
    blocks = np.kron(pixels[:, :2], np.ones((4, 4, 1), np.uint8))   # two halvings by averaging give the blocks back
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(blocks), 2)), pixels[:, :2])
    quarters = np.array([[[0], [100]], [[50], [250]]], np.uint8).repeat(3, 2)
    assert np.asarray(center_crop(Image.fromarray(quarters), 1)).tolist() == [[[100, 100, 100]]]


@pytest.mark.parametrize("mode, colour, expected", [
    ("1", 1, (255,) * 3), ("L", 77, (77,) * 3), ("RGB", (1, 2, 3), (1, 2, 3)),
    ("LA", (100, 0), (255,) * 3), ("LA", (100, 255), (100,) * 3), ("LA", (0, 51), (204,) * 3),
    ("RGBA", (10, 20, 30, 0), (255,) * 3), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("RGBA", (0, 255, 0, 51), (204, 255, 204)),
    ("I;16", 65535, (255,) * 3), ("I;16", 257 * 100, (100,) * 3), ("I;16", 256 * 100, (100,) * 3), ("I;16", 128, (0,) * 3),
])
def test_modes(mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    assert pixel(Image.new(mode, (8, 8), colour)) == expected


@pytest.mark.parametrize("transparent", [None, 0, 1, bytes([255, 51])])
def test_palettes(transparent: Any) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 0, 255, 0])
    options = {} if transparent is None else {"transparency": transparent}
    expected = {None: (0, 255, 0), 0: (0, 255, 0), 1: (255,) * 3}.get(transparent, (204, 255, 204))
    assert pixel(image, **options) == expected


def test_transparency_beside_the_pixels() -> None:
    assert pixel(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)) == (255,) * 3
    assert pixel(Image.new("L", (8, 8), 5), transparency=5) == (255,) * 3
    assert pixel(Image.new("L", (8, 8), 5), transparency=6) == (5,) * 3
    assert pixel(Image.new("I;16", (8, 8), 500), transparency=500) == (255,) * 3


def test_cmyk() -> None:
    assert pixel(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format="TIFF") == (255, 0, 0)
    red = decode(content(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), 8, 1)
    assert red[0].min() > 250 and red[1:].max() < 5


def test_32_bits() -> None:
    image = Image.new("I", (8, 8), 65535)
    assert pixel(image, format="TIFF") == (255,) * 3
    assert pixel(Image.new("I", (8, 8), 257 * 7), format="TIFF") == (7,) * 3
    for value in -1, 65536:
        with pytest.raises(Unusable, match=f"32-bit pixels from 65535 to {value}|from {value} to 65535"):
            image.putpixel((0, 0), value)
            decode(content(image, "TIFF"), 8, 1)
    with pytest.raises(Unusable, match=r"floating-point pixels \(mode F\)"):
        decode(content(Image.new("F", (8, 8), 0.5), "TIFF"), 8, 1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = content(noise(24, 40), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert expected.size == ((24, 40) if 5 <= orientation <= 8 else (40, 24))
    assert np.array_equal(decode(data, 8, 1), adm(expected.convert("RGB"), 8).transpose(2, 0, 1))


def test_unreadable_exif_leaves_a_sound_image_in() -> None:
    image = noise(16, 16)
    for data in (content(image, format, exif=exif) for exif in BAD_EXIF for format in ("JPEG", "PNG", "WEBP")):
        assert np.array_equal(decode(data, 16, 1), np.asarray(Image.open(BytesIO(data))).transpose(2, 0, 1))


def test_odd_metadata_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own, as pytest resets the filters of warnings."""
    for i, exif in enumerate(BAD_EXIF):
        (tmp_path / f"{i}.jpg").write_bytes(content(noise(16, 16), "JPEG", exif=exif))
    program = "import sys; from data_prep.images import decode; [decode(open(f, 'rb').read(), 8, 1) for f in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", program, *map(str, tmp_path.iterdir())], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    assert not done.stdout + done.stderr


def test_no_draft() -> None:
    """A JPEG decoded at an eighth, as PIL offers for small sizes, has other pixels."""
    data = content(noise(128, 128), "JPEG")
    whole = Image.open(BytesIO(data)).convert("RGB")
    draft = Image.open(BytesIO(data))
    draft.draft("RGB", (16, 16))
    assert not np.array_equal(adm(draft.convert("RGB"), 16), adm(whole, 16))
    assert np.array_equal(decode(data, 16, 1), adm(whole, 16).transpose(2, 0, 1))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = content(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
    assert Image.open(BytesIO(data)).n_frames == 2
    assert decode(data, 8, 1)[:, 0, 0].tolist() == [255, 0, 0]


def test_too_small() -> None:
    data = content(noise(20, 12))
    assert decode(data, 16, 12).shape == (3, 16, 16)
    with pytest.raises(Unusable, match="its short side of 12 is less than min_side=13"):
        decode(data, 16, 13)


def test_too_large() -> None:
    data = content(noise(20, 12))
    assert decode(data, 8, 1, max_pixels=240).shape == (3, 8, 8)
    with pytest.raises(Unusable, match="12 x 20 = 240 pixels are more than max_pixels=239"):
        decode(data, 8, 1, max_pixels=239)
    with pytest.raises(Unusable, match="1 x 100 has more than max_pixels=9999 pixels once its short side is 10"):
        decode(content(noise(100, 1)), 10, 1, max_pixels=9999)
    assert decode(content(noise(100, 1)), 10, 1, max_pixels=10000).shape == (3, 10, 10)


def huge(width: int, height: int) -> bytes:
    """The header of a PNG and no pixels: whoever decodes it fails."""
    from struct import pack
    from zlib import crc32

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    header = chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_the_size_is_known_before_decoding(recwarn: pytest.WarningsRecorder) -> None:
    settings = Image.MAX_IMAGE_PIXELS
    for width, height in (10_000, 10_000), (20_000, 20_000):   # PIL warns of the first and refuses the second
        with pytest.raises(Unusable, match=f"{width} x {height} = {width * height} pixels are more than max_pixels=1000"):
            decode(huge(width, height), 8, 1, max_pixels=1000)
    with pytest.raises(Unusable, match=f"more than max_pixels={MAX_PIXELS}"):
        decode(huge(20_000, 20_000), 8, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unusable, match="is less than min_side=20000"):   # and no word of a bomb
            decode(huge(10_000, 10_000), 8, 20_000)
    assert not recwarn.list and settings == Image.MAX_IMAGE_PIXELS


def test_damage() -> None:
    with pytest.raises(Unusable, match="the file is empty"):
        decode(b"", 8, 1)
    for data in b"hello", b"\0" * 1000, b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n":
        with pytest.raises(Unusable, match=r"cannot identify image file \(not one of JPEG, PNG"):
            decode(data, 8, 1)
    with pytest.raises(Unusable, match=r"cannot identify image file \(PNG: broken PNG file"):
        decode(content(noise(8, 8))[:8] + b"\0" * 100, 8, 1)
    with pytest.raises(Unusable, match="image file is truncated"):
        decode(content(noise(8, 8), "JPEG")[:-50], 8, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_every_cut_is_noticed(format: str) -> None:
    """Or, of a file whose end holds no pixels, the image is whole."""
    data = content(noise(24, 24), format)
    whole = decode(data, 24, 1)
    noticed = 0
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert np.array_equal(decode(data[:length], 24, 1), whole), length
        except Unusable as reason:
            assert str(reason) and "0x" not in str(reason)
            noticed += 1
    assert noticed >= 40


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"])
def test_noise_in_a_file_is_no_other_error(format: str) -> None:
    data = np.frombuffer(content(noise(16, 16), format), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[RNG.integers(0, len(data), 8)] = RNG.integers(0, 256, 8)
        try:
            assert decode(damaged.tobytes(), 8, 1, max_pixels=10_000).shape == (3, 8, 8)
        except Unusable as reason:
            assert str(reason)


def test_threads() -> None:
    files = [content(noise(30 + i, 40), ["JPEG", "PNG", "WEBP"][i % 3]) for i in range(24)]
    alone = [decode(data, 16, 1) for data in files]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(lambda data: decode(data, 16, 1), files * 4), alone * 4))
