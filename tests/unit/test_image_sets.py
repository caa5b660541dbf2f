"""Whatever form a set of images has, the same pixels are read from it; what is damaged or no such set is named."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.images import decode
from eval.scoring import npz as npz_files
from eval.scoring.image_sets import open_images
from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.errors import DataError
from largescale.host.sizes import size_text
from tests.unit.image_files import ORDER, PIXELS, H, N, W, alter, expected, npz

LABELS = np.arange(N) % 7
TEXTS = [f"text {i}" for i in range(N)]


def pack(path: Path, pixels: np.ndarray = PIXELS, labels: np.ndarray | None = LABELS, kind: str = "pixels") -> Path:
    images = pixels.transpose(0, 3, 1, 2)
    info = DatasetInfo("toy", kind, images.shape[1:], 0 if labels is None else 10)
    with ShardWriter(path, info, rows_per_shard=10) as writer:
        for i, image in enumerate(images):
            writer.write(id=f"{i:05d}", latent=image, label=0 if labels is None else int(labels[i]))
    return path


def files(path: Path, pixels: np.ndarray = PIXELS, suffix: str = ".png") -> Path:
    for i, image in enumerate(pixels):
        file = path / f"{i // 10}/{i:03d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


FORMS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "packed": pack,
    "png": files,
    "npz": lambda path, pixels: npz(path / "a.npz", pixels, LABELS),
    "compressed": lambda path, pixels: npz(path / "a.npz", pixels, LABELS, save=np.savez_compressed),
    "Fortran": lambda path, pixels: npz(path / "a.npz", np.asfortranarray(pixels), LABELS),
    "sampled": lambda path, pixels: npz(path / "samples.npz", pixels, LABELS).parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_pixels(form: str, tmp_path: Path) -> None:
    images = open_images(FORMS[form](tmp_path, PIXELS), verify=True)
    assert len(images) == N and images.resolution == (H, W)
    read = images.read(ORDER)
    assert read.dtype == torch.uint8 and read.is_contiguous() and torch.equal(read, expected(ORDER))
    assert torch.equal(images.read(np.arange(N)), expected(np.arange(N)))
    assert images.read(ORDER[:0]).shape == (0, 3, H, W)
    assert images.texts(ORDER) is None
    if form == "png":
        assert images.labels is None
    else:
        assert images.labels is not None and images.labels.dtype == np.int64 and np.array_equal(images.labels, LABELS)
    for wrong in ([-1], [0, N]):
        with pytest.raises(IndexError, match=r"\[0, 23\)"):
            images.read(np.array(wrong))
    read[:] = 0                                         # is the reader's own
    assert torch.equal(images.read(ORDER), expected(ORDER))


@pytest.mark.parametrize("form", FORMS)
def test_resized_as_it_is_packed(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path / "set", PIXELS)
    images = open_images(path, resize=5)
    assert images.resolution == (5, 5)
    for i, image in enumerate(images.read(ORDER)):
        Image.fromarray(PIXELS[ORDER[i]]).save(tmp_path / "one.png")
        assert np.array_equal(image.numpy(), decode((tmp_path / "one.png").read_bytes(), 5, 0))
    assert len({open_images(path, resize=side).fingerprint for side in (None, 5, 6)}) == 3
    with pytest.raises(DataError, match="cannot be resized to 0; give --resize"):
        open_images(path, resize=0)


def test_grey_becomes_three_channels(tmp_path: Path) -> None:
    grey = PIXELS[..., :1]
    images = open_images(pack(tmp_path / "packed", grey, None))
    assert torch.equal(images.read(ORDER), expected(ORDER, grey).expand(-1, 3, -1, -1)) and images.labels is None
    assert torch.equal(open_images(files(tmp_path / "png", grey[..., 0])).read(ORDER), images.read(ORDER))
    square = open_images(tmp_path / "packed", resize=6).read(ORDER)
    assert square.shape == (6, 3, 6, 6) and torch.equal(square[:, 0], square[:, 2])


def test_texts(tmp_path: Path, captioned: Path) -> None:
    assert open_images(npz(tmp_path / "a.npz", PIXELS, np.array(TEXTS))).texts(ORDER) == [[TEXTS[i]] for i in ORDER]
    assert open_images(tmp_path / "a.npz").labels is None
    assert open_images(captioned).texts(np.array([13, 2])) == [["kind 3, 0", "kind 3, 1"], ["kind 2, 0", "kind 2, 1", "kind 2, 2"]]
    assert open_images(captioned).labels is None
    info = DatasetInfo("c", "pixels", (3, H, W), 0, captions=CaptionInfo(2, 3, 4))
    assert info.captions


def test_labels_without_reading_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(pack(tmp_path))
    monkeypatch.setattr("largescale.data.shards.ShardDataset.gather", None)
    assert images.labels is not None and images.labels.tolist() == LABELS.tolist()


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_fingerprint_follows_the_images(form: str, tmp_path: Path) -> None:
    other = PIXELS.copy()
    other[3] = 0                                        # a PNG of another size, too
    a, b, c = (open_images(FORMS[form](tmp_path / name, pixels)) for name, pixels in {"a": PIXELS, "b": PIXELS, "c": other}.items())
    assert a.fingerprint == b.fingerprint != c.fingerprint and len(a.fingerprint) == 64
    assert a.fingerprint_of == {"packed": "contents", "png": "names and sizes of the files"}.get(form, "the file")


def test_fingerprint_of_a_folder_follows_names(tmp_path: Path) -> None:
    before = open_images(files(tmp_path)).fingerprint
    (tmp_path / "0/003.png").rename(tmp_path / "0/0033.png")
    assert open_images(tmp_path).fingerprint != before
    (tmp_path / "2/022.png").unlink()
    (tmp_path / "2/022.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot be used"):
        _ = open_images(tmp_path).fingerprint


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_is_listed_in_order(tmp_path: Path) -> None:
    for i, name in enumerate(["b/x.PNG", "a/z.jpeg", "a.png", "b/c/d.jpg", ".hidden.png", ".git/y.png", "b/._x.PNG", "notes.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / name, format="PNG") if "txt" not in name else (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(outside / "o.png")
    (tmp_path / "link").symlink_to(outside)
    images = open_images(tmp_path)
    assert images.read(np.arange(5))[:, 0, 0, 0].tolist() == [20, 10, 30, 0, 200]   # a.png, a/z, b/c/d, b/x, link/o
    assert len(images) == 5


def test_pictures_as_they_are_seen(tmp_path: Path) -> None:
    """As data_prep packs them: upright, on white."""
    upright = np.zeros((8, 12, 3), np.uint8)
    upright[:4, :6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "0.png", exif=exif)
    clear = np.concatenate([upright, np.full((8, 12, 1), 100, np.uint8)], axis=2)
    Image.fromarray(clear).save(tmp_path / "1.png")
    Image.fromarray(upright).convert("P").save(tmp_path / "2.png")
    Image.fromarray(upright[..., 0] > 0).save(tmp_path / "3.png")
    Image.fromarray(upright).convert("P").save(tmp_path / "4.png", transparency=0)
    images = open_images(tmp_path).read(np.arange(5))
    assert images.shape == (5, 3, 8, 12) and torch.equal(images[0], expected(np.array([0]), upright[None])[0])
    for i, image in enumerate(images):
        square = open_images(tmp_path, resize=8).read(np.array([i]))[0]
        assert np.array_equal(square, decode((tmp_path / f"{i}.png").read_bytes(), 8, 0))
        assert image.unique().tolist() == [[0, 255], [155, 255], [0, 255], [0, 255], [255]][i]


def test_sizes_that_differ(tmp_path: Path) -> None:
    files(tmp_path)
    Image.new("RGB", (10, 20)).save(tmp_path / "1/015.png")
    images = open_images(tmp_path)
    assert images.resolution == (H, W)
    with pytest.raises(DataError, match=r"1/015.png has 20 x 10 pixels \(height x width\), .*0/000.png 12 x 16; give --resize 10"):
        images.read(np.arange(N))
    assert open_images(tmp_path, resize=10).read(np.arange(N)).shape == (N, 3, 10, 10)


def test_damaged_pictures(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "1/011.png").write_bytes((tmp_path / "1/011.png").read_bytes()[:300])
    Image.fromarray(PIXELS[12]).save(tmp_path / "1/012.png", format="GIF")
    (tmp_path / "1/013.png").write_bytes(b"")
    Image.fromarray(np.full((H, W), 40_000, np.uint16)).save(tmp_path / "1/014.png")
    images = open_images(tmp_path)
    for i in (11, 12, 13, 14):
        with pytest.raises(DataError, match=rf"1/0{i}.png cannot be read as an image of 8 bits a channel \(.+\); replace or remove"):
            images.read(np.array([0, i, 1]))
    (tmp_path / "0/000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0/000.png cannot be read"):
        open_images(tmp_path)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for path, message in {"empty": r"holds no images; give a folder of files that end in .png, .jpg, .jpeg", "none": "does not exist; give",
                          "notes.txt": "is no set of images; give the folder", "none.npz": "does not exist"}.items():
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / path)


def test_a_folder_above_sets(tmp_path: Path) -> None:
    """eval.sample's own: each scale has a picture of its samples, which is no sample."""
    for name in ("cfg1.0", "cfg1.5"):
        npz(tmp_path / f"samples/{name}/samples.npz", PIXELS)
        Image.fromarray(PIXELS[0]).save(tmp_path / f"samples/{name}/grid.png")
    with pytest.raises(DataError, match=r"samples holds sets of images, such as .*cfg1.[05] with its samples.npz; give one of them"):
        open_images(tmp_path / "samples")
    assert len(open_images(tmp_path / "samples/cfg1.5")) == N
    pack(tmp_path / "packed/a")
    with pytest.raises(DataError, match="with its manifest.json"):
        open_images(tmp_path / "packed")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("/1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/1 cannot be listed \(Permission denied\)"):
        open_images(tmp_path)


# --- packed ----------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_found(tmp_path: Path) -> None:
    shard = pack(tmp_path) / "shard_00001.arrow"
    alter(shard, shard.stat().st_size // 2)
    open_images(tmp_path)
    with pytest.raises(DataError, match="shard_00001.arrow was altered"):
        open_images(tmp_path, verify=True)


def test_latents_are_no_images(tmp_path: Path) -> None:
    pack(tmp_path / "packed", PIXELS.astype(np.float16), kind="latents")
    npz(tmp_path / "sampled/latents.npz", np.zeros((2, 4, 8, 8), np.float32))
    for name in ("packed", "sampled"):
        with pytest.raises(DataError, match=r"holds latents, not images.*eval.sample --vae"):
            open_images(tmp_path / name)
    with pytest.raises(DataError, match="holds images of 4 channels; pack grey or RGB ones"):
        open_images(pack(tmp_path / "four", np.concatenate([PIXELS, PIXELS[..., :1]], axis=3)))


def test_packing_that_is_not_done(tmp_path: Path) -> None:
    pack(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="has no manifest.json"):
        open_images(tmp_path)
    (tmp_path / "packing").mkdir()
    (tmp_path / "started/packing").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "started"):
        with pytest.raises(DataError, match="not packed to the end"):
            open_images(path)


# --- npz -------------------------------------------------------------------------------------------------------------


def test_an_npz_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one whose zip has 64-bit sizes, as those beyond 4 GB, which must not be read as a whole."""
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, PIXELS)
    npz(tmp_path / "plain.npz", PIXELS)
    npz(tmp_path / "compressed.npz", PIXELS, save=np.savez_compressed)
    with monkeypatch.context() as patch:
        patch.setattr(npz_files, "load", None)
        for name in ("large", "plain"):
            assert torch.equal(open_images(tmp_path / f"{name}.npz").read(ORDER), expected(ORDER))
    assert capsys.readouterr().err == ""
    open_images(tmp_path / "compressed.npz")
    assert f"arr_0.npy is compressed, so all of its {size_text(PIXELS.nbytes + 128)} are read into memory" in capsys.readouterr().err


def test_bad_npz(tmp_path: Path) -> None:
    good = npz(tmp_path / "good.npz", PIXELS).read_bytes()
    (tmp_path / "cut.npz").write_bytes(good[:5000])
    (tmp_path / "text.npz").write_text("hello")
    short = bytearray(good)
    at = short.index(b"(23, 12, 16, 3)")
    short[at:at + 15] = b"(99, 12, 16, 3)"
    (tmp_path / "short.npz").write_bytes(short)
    for name, arrays, named in [("float", [PIXELS.astype(np.float32)], {}), ("first", [PIXELS.transpose(0, 3, 1, 2)], {}),
                                ("grey", [PIXELS[..., :1]], {}), ("empty", [PIXELS[:0]], {}), ("flat", [PIXELS[0]], {}),
                                ("other", [], {"images": PIXELS}), ("stats", [], {"mu": np.zeros(3), "sigma": np.eye(3)}),
                                ("labels", [PIXELS, LABELS[:5]], {}), ("objects", [PIXELS, np.array([None] * N)], {})]:
        npz(tmp_path / f"{name}.npz", *arrays, **named)
    for name, message in {
        "cut": r"cannot be used \(File is not a zip file\); make it anew", "text": "cannot be used", "short": "bytes, which are not an array",
        "float": r"arr_0 of .* is float32 of shape .*; images are uint8 \(N, H, W, 3\)", "first": r"shape \(23, 3, 12, 16\)",
        "grey": r"shape \(23, 12, 16, 1\)", "empty": r"shape \(0, 12", "flat": "images are uint8",
        "other": r"holds images.npy, but no images \(arr_0\)", "stats": "holds statistics, but no images",
        "labels": r"arr_1 of .* has shape \(5,\), and there are 23 images", "objects": "cannot be used"}.items():
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / f"{name}.npz")


def test_an_npz_that_expands_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images compress threefold at best, zeros a thousandfold."""
    zeros = npz(tmp_path / "zeros.npz", np.zeros((10, 64, 64, 3), np.uint8), save=np.savez_compressed)
    random = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    noise = npz(tmp_path / "noise.npz", random, save=np.savez_compressed)
    assert len(open_images(zeros)) == 10
    monkeypatch.setattr("eval.scoring.npz.MOST_BYTES", 100_000)
    with pytest.raises(DataError, match=r"zeros\.npz cannot be used \(arr_0\.npy expands from [0-9,]+ bytes to 123,008, more than 100,000\)"):
        open_images(zeros)
    assert len(open_images(noise)) == 10


def test_a_damaged_npz_is_found(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", PIXELS)
    alter(path, path.stat().st_size // 2)
    open_images(path)
    with pytest.raises(DataError, match="cannot be used"):
        open_images(path, verify=True)
