"""Sets of images to score, wherever they come from: what data_prep packed as pixels (eval.sample's
too), folders of PNG and JPEG, ADM's npz.
"""

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eval.scoring import npz
from eval.scoring.npz import Array
from largescale.data.format import MANIFEST
from largescale.data.images import center_crop
from largescale.data.shards import ShardDataset
from largescale.errors import DataError
from largescale.host.files import sha256

SUFFIXES = (".png", ".jpg", ".jpeg")
SAMPLES, LATENTS = "samples.npz", "latents.npz"  # eval.sample's
THREADS = 8

Indices = npt.NDArray[np.int64]


class ImageSet(ABC):
    """Images of one size, which are read when asked for."""

    fingerprint_of: str  # what `fingerprint` is a sha256 of

    def __init__(self, path: Path, resize: int | None, stored: tuple[int, int]) -> None:
        self.path, self.resize = path, resize
        self.resolution = (resize, resize) if resize else stored  # (H, W)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _content(self) -> str:
        """The fingerprint of what is stored."""

    @abstractmethod
    def _images(self, indices: Indices) -> Array:
        """(B, C, H, W) uint8, C = 1 or 3, as stored."""

    @property
    def labels(self) -> Indices | None:
        """(N,), where there are any."""
        return None

    def texts(self, indices: Indices) -> list[list[str]] | None:
        """All captions of each of these images, or the text that it was asked for, where there are
        any."""
        return None

    @cached_property
    def fingerprint(self) -> str:
        """Two sets of images with the same are the same, as far as `fingerprint_of` tells."""
        content = self._content()
        return (
            hashlib.sha256(f"{content} {self.resize}".encode()).hexdigest()
            if self.resize
            else content
        )

    def read(self, indices: Indices) -> Tensor:
        """These images, (B, 3, H, W) uint8. Raises IndexError outside [0, len), DataError for what
        cannot be read."""
        if len(indices) == 0:
            return torch.zeros(0, 3, *self.resolution, dtype=torch.uint8)
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"indices from {indices.min()} to {indices.max()} do not lie in [0, {len(self)})"
            )
        images = self._images(indices)
        if images.shape[1] == 1:
            images = images.repeat(3, axis=1)
        if self.resize and images.shape[2:] != self.resolution:
            pictures = [
                Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images
            ]
            images = np.stack([to_array(center_crop(picture, self.resize)) for picture in pictures])
        return torch.from_numpy(np.ascontiguousarray(images))


def open_images(path: Path, verify: bool = False, resize: int | None = None) -> ImageSet:
    """The images at `path`, of which no more than the start is read yet.

        a folder with manifest.json     pixels that were packed; `verify` hashes every shard
        FILE.npz                        arr_0 (N, H, W, 3) uint8, and labels or texts in arr_1, as
                                        ADM and eval.sample have them; or the folder with
                                        samples.npz; `verify` reads it all and checks its CRCs
        a folder of PNG and JPEG        at any depth, sorted by path, read upright, on white where
                                        transparent

    `resize`: ADM's centre crop to a square of that side. Raises DataError for all else, and what is
    damaged.
    """
    path = Path(path).expanduser()
    if resize is not None and resize < 1:
        raise DataError(
            f"images cannot be resized to {resize}; give --resize the side of a square, e.g. 256"
        )
    if path.is_dir():
        if (
            (path / MANIFEST).exists()
            or (path / "packing").is_dir()
            or any(path.glob("shard_*.arrow"))
        ):
            return _Packed(path, verify, resize)
        if (path / SAMPLES).exists():
            return _Npz(path / SAMPLES, verify, resize)
        if (path / LATENTS).exists():
            raise DataError(
                f"{path} holds latents, not images; sample with eval.sample --vae, which decodes "
                "them"
            )
        return _Folder(path, resize)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a packed data set, a folder of PNG or JPEG files, or "
            "ADM's .npz"
        )
    if path.suffix != ".npz":
        raise DataError(
            f"{path} is no set of images; give the folder that it lies in, or ADM's .npz"
        )
    return _Npz(path, verify, resize)


class _Packed(ImageSet):
    fingerprint_of = "contents"

    def __init__(self, path: Path, verify: bool, resize: int | None) -> None:
        self.data = ShardDataset(path, verify)
        info = self.data.info
        if info.kind != "pixels":
            raise DataError(
                f"{path} holds {info.kind}, not images; as a reference give the images themselves, "
                "with eval.score --reference FOLDER --resize SIDE; decode samples with eval.sample "
                "--vae"
            )
        if info.shape[0] not in (1, 3):
            raise DataError(
                f"{path} holds images of {info.shape[0]} channels; pack grey or RGB ones"
            )
        super().__init__(path, resize, info.shape[1:])

    def __len__(self) -> int:
        return len(self.data)

    def _content(self) -> str:
        return self.data.fingerprint

    def _images(self, indices: Indices) -> Array:
        return self.data.gather(indices)["latent"]

    @cached_property
    def labels(self) -> Indices | None:
        if not self.data.info.num_classes:
            return None
        shards = (self.data._shard(number) for number in range(len(self.data.manifest["shards"])))
        return np.concatenate([shard.label for shard in shards]).astype(np.int64)

    def texts(self, indices: Indices) -> list[list[str]] | None:
        return self.data.texts(indices) if "captions" in self.data.manifest["columns"] else None


class _Npz(ImageSet):
    fingerprint_of = "the file"

    def __init__(self, path: Path, verify: bool, resize: int | None) -> None:
        with npz.reading(path), zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                what = (
                    "statistics"
                    if "mu.npy" in archive.namelist()
                    else ", ".join(archive.namelist()) or "nothing"
                )
                raise DataError(
                    f"{path} holds {what}, but no images (arr_0); give one with images (N, H, W, 3) "
                    "uint8, as eval.sample and ADM write them"
                )
            if verify and (damaged := archive.testzip()):
                raise ValueError(f"the CRC of {damaged} is not that of its content")
            stored = npz.mapped(path, archive, "arr_0.npy")
            if (
                stored.dtype != np.uint8
                or stored.ndim != 4
                or stored.shape[3] != 3
                or not all(stored.shape)
            ):
                raise DataError(
                    f"arr_0 of {path} is {stored.dtype} of shape {stored.shape}; images are uint8 "
                    "(N, H, W, 3), so convert them"
                )
            self._extra = (
                npz.load(archive, "arr_1.npy") if "arr_1.npy" in archive.namelist() else None
            )
        if self._extra is not None and self._extra.shape != stored.shape[:1]:
            raise DataError(
                f"arr_1 of {path} has shape {self._extra.shape}, and there are {len(stored)} "
                "images; give one label or text for each, or leave it out"
            )
        self._stored = stored
        super().__init__(path, resize, stored.shape[1:3])

    def __len__(self) -> int:
        return len(self._stored)

    def _content(self) -> str:
        return sha256(self.path)

    def _images(self, indices: Indices) -> Array:
        return self._stored[indices].transpose(0, 3, 1, 2)

    @property
    def labels(self) -> Indices | None:
        return (
            None
            if self._extra is None or self._extra.dtype.kind not in "iu"
            else self._extra.astype(np.int64)
        )

    def texts(self, indices: Indices) -> list[list[str]] | None:
        return (
            None
            if self._extra is None or self._extra.dtype.kind != "U"
            else self._extra[indices, None].tolist()
        )


class _Folder(ImageSet):
    fingerprint_of = (
        "names and sizes of the files"  # not of their content, which takes minutes to read
    )

    def __init__(self, path: Path, resize: int | None) -> None:
        self.path, self.files = path, _list(path)
        first = self._decode(0)
        super().__init__(path, resize, (first.height, first.width))

    def __len__(self) -> int:
        return len(self.files)

    def _content(self) -> str:
        digest = hashlib.sha256()
        with npz.reading(self.path):
            for file in self.files:
                digest.update(
                    f"{file}\0{(self.path / file).stat().st_size}\n".encode(
                        "utf-8", "surrogateescape"
                    )
                )
        return digest.hexdigest()

    def _images(self, indices: Indices) -> Array:
        with ThreadPoolExecutor(min(THREADS, len(indices), os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._read, indices.tolist())))

    def _read(self, index: int) -> Array:
        image = self._decode(index)
        if self.resize:
            return to_array(center_crop(image, self.resize))
        if (found := (image.height, image.width)) != self.resolution:
            height, width = self.resolution
            raise DataError(
                f"{self.path / self.files[index]} has {found[0]} x {found[1]} pixels (height x "
                f"width), {self.path / self.files[0]} {height} x {width}; give --resize "
                f"{min(*found, *self.resolution)}, which cuts a square out of each"
            )
        return to_array(image)

    def _decode(self, index: int) -> Image.Image:
        file = self.path / self.files[index]
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                elif image.mode.startswith("I"):
                    raise ValueError(
                        "it has 16 bits a channel"
                    )  # of which convert() would keep the lowest
                return image.convert("RGB")
        except Exception as error:  # damaged content makes PIL raise some ten kinds
            raise DataError(
                f"{file} cannot be read as an image of 8 bits a channel ({error}); replace or "
                "remove it"
            ) from error


def to_array(image: Image.Image) -> Array:
    """(3, H, W) uint8 of an RGB image."""
    return np.asarray(image).transpose(2, 0, 1)


def _list(root: Path) -> list[str]:
    """Image files below `root`, sorted; names that begin with a dot are passed over, links followed
    once."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_raise):
        if (
            real := os.path.realpath(folder)
        ) in seen:  # a link to what was listed, or is a part of itself
            below[:] = []
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if folder != str(root) and (inside := {MANIFEST, SAMPLES, LATENTS} & set(names)):
            raise DataError(
                f"{root} holds sets of images, such as {folder} with its {inside.pop()}; give one "
                "of them"
            )
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        raise DataError(
            f"{root} holds no images; give a folder of files that end in {', '.join(SUFFIXES)}, a "
            "packed data set, or ADM's .npz"
        )
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}); correct the path"
    ) from error
