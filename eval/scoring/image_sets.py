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
# The files that eval.sample --also npz writes.
SAMPLES = "samples.npz"
LATENTS = "latents.npz"
# Threads that decode the files of a folder, at most.
THREADS = 8

Indices = npt.NDArray[np.int64]


class ImageSet(ABC):
    """Images of one size, which are read when asked for."""

    fingerprint_of: str  # what `fingerprint` is a sha256 of

    def __init__(self, path: Path, resize: int | None, stored: tuple[int, int]) -> None:
        self.path = path
        self.resize = resize
        # (H, W), after resizing.
        self.resolution = (resize, resize) if resize else stored

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _content(self) -> str:
        """The fingerprint of what is stored."""

    @abstractmethod
    def _images(self, indices: Indices) -> Array:
        """These images (B, C, H, W) uint8, C = 1 or 3, as stored."""

    @property
    def labels(self) -> Indices | None:
        """The label of each image, (N,); None where there are none."""
        return None

    def texts(self, indices: Indices) -> list[list[str]] | None:
        """All captions of each of these images, or the text that it was asked for; None where there
        are none."""
        return None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the set: two sets with the same one are the same, as far as `fingerprint_of`
        covers it."""
        content = self._content()
        # The same images at another size give other features.
        if not self.resize:
            return content
        return hashlib.sha256(f"{content} {self.resize}".encode()).hexdigest()

    def read(self, indices: Indices) -> Tensor:
        """These images, (B, 3, H, W) uint8. Raises IndexError outside [0, len), DataError for what
        cannot be read."""
        if len(indices) == 0:
            return torch.zeros(0, 3, *self.resolution, dtype=torch.uint8)
        # A negative index would silently count from the end.
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"indices from {indices.min()} to {indices.max()} do not lie in [0, {len(self)})"
            )
        images = self._images(indices)
        # Grey images are shown to networks as RGB ones.
        if images.shape[1] == 1:
            images = images.repeat(3, axis=1)
        if self.resize and images.shape[2:] != self.resolution:
            resized = []
            for image in images:
                picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                resized.append(to_array(center_crop(picture, self.resize)))
            images = np.stack(resized)
        return torch.from_numpy(np.ascontiguousarray(images))


def open_images(path: Path, verify: bool = False, resize: int | None = None) -> ImageSet:
    """Open the images at `path`, of which no more than the start is read yet.

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
        return _open_folder(path, verify, resize)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a packed data set, a folder of PNG or JPEG files, or "
            "ADM's .npz"
        )
    # A single image is no set.
    if path.suffix != ".npz":
        raise DataError(
            f"{path} is no set of images; give the folder that it lies in, or ADM's .npz"
        )
    return _Npz(path, verify, resize)


def _open_folder(path: Path, verify: bool, resize: int | None) -> ImageSet:
    """The images in a folder. Raises DataError."""
    # Shards without a manifest are a data set too: one that is not complete, which is the error.
    packed = (path / MANIFEST).exists() or (path / "packing").is_dir()
    if packed or any(path.glob("shard_*.arrow")):
        return _Packed(path, verify, resize)
    if (path / SAMPLES).exists():
        return _Npz(path / SAMPLES, verify, resize)
    if (path / LATENTS).exists():
        raise DataError(
            f"{path} holds latents, not images; sample with eval.sample --vae, which decodes them"
        )
    return _Folder(path, resize)


class _Packed(ImageSet):
    """Pixels that data_prep or eval.sample packed."""

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
        # Networks take RGB; grey is shown as such.
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
        # All at once: labels are small beside pixels.
        numbers = range(len(self.data.manifest["shards"]))
        labels = [self.data._shard(number).label for number in numbers]
        return np.concatenate(labels).astype(np.int64)

    def texts(self, indices: Indices) -> list[list[str]] | None:
        return self.data.texts(indices) if "captions" in self.data.manifest["columns"] else None


class _Npz(ImageSet):
    """ADM's npz: images arr_0, and labels or texts arr_1."""

    fingerprint_of = "the file"

    def __init__(self, path: Path, verify: bool, resize: int | None) -> None:
        with npz.reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                # Statistics are the usual mistake: they are .npz files too.
                what = "statistics" if "mu.npy" in names else ", ".join(names) or "nothing"
                raise DataError(
                    f"{path} holds {what}, but no images (arr_0); give one with images (N, H, W, 3) "
                    "uint8, as eval.sample and ADM write them"
                )
            if verify and (damaged := archive.testzip()):
                raise ValueError(f"the CRC of {damaged} is not that of its content")

            # Mapped, not loaded; any other layout than ADM's is refused, not guessed.
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
            self._extra = npz.load(archive, "arr_1.npy") if "arr_1.npy" in names else None
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
        if self._extra is None or self._extra.dtype.kind not in "iu":
            return None
        return self._extra.astype(np.int64)

    def texts(self, indices: Indices) -> list[list[str]] | None:
        if self._extra is None or self._extra.dtype.kind != "U":
            return None
        # One text each, where a data set may have several captions.
        found: list[list[str]] = self._extra[indices, None].tolist()
        return found


class _Folder(ImageSet):
    """Files of PNG and JPEG in a folder and below."""

    # Not of their content, which takes minutes to read.
    fingerprint_of = "names and sizes of the files"

    def __init__(self, path: Path, resize: int | None) -> None:
        self.path = path
        self.files = _list(path)
        # All have to be of the size of the first, unless they are resized.
        first = self._decode(0)
        super().__init__(path, resize, (first.height, first.width))

    def __len__(self) -> int:
        return len(self.files)

    def _content(self) -> str:
        digest = hashlib.sha256()
        with npz.reading(self.path):
            for file in self.files:
                # Names of files need not be UTF-8, nor free of white space.
                line = f"{file}\0{(self.path / file).stat().st_size}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _images(self, indices: Indices) -> Array:
        with ThreadPoolExecutor(min(THREADS, len(indices), os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._read, indices.tolist())))

    def _read(self, index: int) -> Array:
        """One image, (3, H, W) uint8. Raises DataError for one of another size."""
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
        """One file as an RGB image, upright, on white. Raises DataError."""
        file = self.path / self.files[index]
        # Damaged content makes PIL raise some ten kinds of error.
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as opened:
                image = ImageOps.exif_transpose(opened)
                # Of 16 bits a channel convert() would keep the lowest 8.
                if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                elif image.mode.startswith("I"):
                    raise ValueError("it has 16 bits a channel")
                return image.convert("RGB")
        except Exception as error:
            raise DataError(
                f"{file} cannot be read as an image of 8 bits a channel ({error}); replace or "
                "remove it"
            ) from error


def to_array(image: Image.Image) -> Array:
    """An RGB image as an array (3, H, W) uint8."""
    return np.asarray(image).transpose(2, 0, 1)


def _list(root: Path) -> list[str]:
    """The image files below `root`, sorted; names that start with a dot are skipped, and links are
    followed once. Raises DataError."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_raise):
        # A link to a folder that was listed before, or that it lies in itself.
        real = os.path.realpath(folder)
        if real in seen:
            below[:] = []
            continue
        seen.add(real)
        # os.walk continues with what is left in `below`, in this order.
        below[:] = sorted([name for name in below if not name.startswith(".")])
        if folder != str(root) and (inside := {MANIFEST, SAMPLES, LATENTS} & set(names)):
            raise DataError(
                f"{root} holds sets of images, such as {folder} with its {inside.pop()}; give one "
                "of them"
            )
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(folder, name), root))
    if not found:
        raise DataError(
            f"{root} holds no images; give a folder of files that end in {', '.join(SUFFIXES)}, a "
            "packed data set, or ADM's .npz"
        )
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    # os.walk would skip a folder that it cannot list.
    raise DataError(
        f"{error.filename} cannot be listed ({error.strerror}); correct the path"
    ) from error
