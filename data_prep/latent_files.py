"""Latents that others have packed in files that say what they hold: the .npy folders of REPA and
EDM2, and LightningDiT's safetensors; and which format a folder is in."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data_prep.fingerprints import fingerprint
from data_prep.latent_columns import Mds, OnDisk
from data_prep.latent_sources import (
    SAMPLE,
    Array,
    Kind,
    LatentSource,
    RowFiles,
    inside,
    json_of,
    name_of_folder,
    reading,
)
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import Item, ListSource, given
from largescale.errors import ConfigError, DataError
from largescale.host.files import sha256

# Rows that are read at a time.
ROWS_READ = 64


class NpyFolder(ListSource, LatentSource):
    """REPA's and EDM2's: one .npy a row of mean and std, (2 C, H, W), and their labels."""

    format = "REPA's .npy folder"
    kind: Kind = "moments"

    def __init__(self, folder: Path, listings: Listings) -> None:
        self._folder = folder
        index = folder / "dataset.json"
        # The hash of the index identifies the list, wherever the folder is.
        facts = self.state_facts(folder) | {"dataset_json_sha256": sha256(index)}

        def make(writer: Writer) -> Found:
            # One JSON document, which only the rank that lists has in memory.
            labels = _labels_of(index)
            for name in sorted(labels):
                writer.add(name, label=labels[name])
            return Found(facts | {"rows": len(labels)}, num_classes=max(labels.values()) + 1)

        name = name_of_folder(folder.parent if folder.name == "vae-sd" else folder)
        super().__init__(name, folder, listings.get(facts, ("label",), make))
        # Of many files some are looked at: the others are read hours later.
        for file in self.files:
            if file.size < 0:
                raise DataError(f"{file.path} is missing, and {index} lists it; restore it")
        first = next(self.part(0, 1))
        shape = self._array(first.id, first.read()).shape
        if len(shape) != 3 or shape[0] % 2:
            raise DataError(
                f"{folder / first.id} has shape {shape}, not mean and std of latents (2 C, H, W)"
            )
        self.shape = (shape[0], shape[1], shape[2])
        self.facts["sample"] = fingerprint(self.some())

    def changed(self) -> str | None:
        return super().changed() or self.other_latents()

    def some(self) -> Iterator[bytes]:
        step = -(-len(self._listing.sample) // SAMPLE)
        for file in self._listing.sample[::step]:
            yield (self._folder / file).read_bytes()

    def latents(self, id: str, data: bytes) -> Sequence[Array]:
        latent = self._array(id, data)
        if latent.shape != self.shape or latent.dtype.kind != "f":
            raise DataError(
                f"{self._folder / id} has {latent.dtype} {latent.shape}, others have floats of "
                f"{self.shape}; give a folder of one extraction"
            )
        latent = latent.astype(np.float32)
        # It is the std that they store, and the log-variance that we do.
        half = len(latent) // 2
        with np.errstate(divide="ignore"):
            latent[half:] = (2 * np.log(latent[half:])).clip(-30, 20)
        return [latent]

    def _array(self, id: str, data: bytes) -> Array:
        with reading(self._folder / id):
            array: Array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        return array


def _labels_of(index: Path) -> dict[str, int]:
    """The label of each .npy file that the index lists. Raises DataError."""
    entries = json_of(index).get("labels")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{index} lists no labels, by which the latents are found; restore it")
    labels = {}
    with reading(index):
        # The index of images has the same form.
        for name, label in entries:
            if Path(name).suffix == ".npy":
                labels[inside(name, index)] = int(label)
    if not labels:
        raise DataError(
            f"{index} lists images, not latents; give the folder that REPA's dataset_tools encode "
            "wrote"
        )
    return labels


class Safetensors(RowFiles):
    """LightningDiT's: latents, latents_flip and labels, and beside them latents_stats.pt."""

    format = "LightningDiT's safetensors"

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        shapes = [_shapes(path) for path in files]
        first = shapes[0]["latents"]
        for path, of_file in zip(files, shapes, strict=True):
            latents, labels = of_file["latents"], of_file["labels"]
            mirrors = of_file.get("latents_flip", latents)
            if not len(latents) == 4 or latents[1:] != first[1:] or labels != latents[:1]:
                raise DataError(
                    f"{path} has latents {latents} and labels {labels}, the first file has latents "
                    f"{first}; give a folder of one extraction"
                )
            if mirrors != latents:
                raise DataError(
                    f"{path} has latents {latents}, and {mirrors} of mirrored images; restore it"
                )
        self.shape = (first[1], first[2], first[3])
        # Either every file has mirrors, or none are packed: rows have the same columns.
        mirrored = all("latents_flip" in of_file for of_file in shapes)
        self._names = ("latents", "latents_flip") if mirrored else ("latents",)
        self.per_row = len(self._names)
        self.mean, self.std = _stats(folder / "latents_stats.pt", first[1])
        rows = [of_file["latents"][0] for of_file in shapes]
        self._describe(folder, files, rows, map(_labels, files), mirrored=mirrored)

    def _rows(self, number: int, first: int, last: int) -> Iterator[Item]:
        path = self._files[number]
        with _opened(path) as file:
            images, labels = list(map(file.get_slice, self._names)), file.get_slice("labels")
            # Some rows at a time: a file has 10,000.
            for start in range(first, last, ROWS_READ):
                stop = min(start + ROWS_READ, last)
                # By torch, as NumPy has no bfloat16.
                arrays = [image[start:stop].float().numpy() for image in images]
                for i, label in enumerate(labels[start:stop].long().tolist()):
                    data = b"".join(array[i].tobytes() for array in arrays)
                    yield Item(self._id(number, start + i), given(data), label, (), len(data))

    def _id(self, number: int, row: int) -> str:
        return f"{self._files[number].stem}/{row:05d}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of safetensors. Errors in the block are DataErrors that name it."""
    with reading(path, SafetensorError), safe_open(path, framework="pt") as file:
        yield file


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what LightningDiT's files have, by its names."""
    found = {}
    with _opened(path) as file:
        names = file.keys()
        for name in ("latents", "labels", "latents_flip"):
            if name in names:
                found[name] = tuple(file.get_slice(name).get_shape())
            elif name != "latents_flip":
                raise DataError(f"{path} has no {name}, as LightningDiT's have")
    return found


def _labels(path: Path) -> Array:
    with _opened(path) as file:
        labels: Array = file.get_tensor("labels").long().numpy()
    return labels


def _stats(path: Path, channels: int) -> tuple[Any, Any]:
    """Mean and std of each channel from LightningDiT's file, each (1, C, 1, 1); None without it."""
    if not path.is_file():
        return None, None
    try:
        # weights_only: the file is somebody else's, and a pickle may run code.
        found = torch.load(path, map_location="cpu", weights_only=True)
        mean = found["mean"].double().flatten().tolist()
        std = found["std"].double().flatten().tolist()
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}); restore or remove it") from error
    # Latents are divided by their std, which must not be 0.
    if not len(mean) == len(std) == channels or not min(std) > 0:
        raise DataError(
            f"{path} has statistics of {len(mean)} channels, the latents have {channels}: they are "
            "another encoder's; restore or remove the file"
        )
    return tuple(mean), tuple(std)


def open_source(
    folder: Path,
    column: str | None,
    shape: Sequence[int] | None,
    kind: Kind | None,
    listings: Listings,
) -> NpyFolder | RowFiles:
    """The latents in a folder, whatever their format. `column`, `shape`, `kind`: what a column of
    MDS or `datasets` does not say. Raises DataError or ConfigError."""
    # REPA's encoder writes into a folder of this name beside the images.
    for inner in (folder, folder / "vae-sd"):
        if (inner / "dataset.json").is_file():
            _refuse_options(NpyFolder.format, column=column, shape=shape, kind=kind)
            return NpyFolder(inner, listings)
    # LightningDiT's shards; torch.save's files have the same keys nowhere.
    if any(folder.glob("*.safetensors")):
        _refuse_options(Safetensors.format, column=column, shape=shape, kind=kind)
        return Safetensors(folder)
    if (folder / "index.json").is_file():
        return Mds(folder, column, shape, kind)
    if (folder / "state.json").is_file():
        return OnDisk(folder, column, shape, kind)
    # A DatasetDict has a folder for each of its sets.
    if (folder / "dataset_dict.json").is_file():
        splits = json_of(folder / "dataset_dict.json")["splits"]
        raise DataError(f"{folder} holds several sets; give one of its folders {', '.join(splits)}")
    raise DataError(
        f"{folder} has neither dataset.json with .npy files (REPA, EDM2), nor .safetensors "
        "(LightningDiT), nor index.json (MDS), nor state.json (datasets.save_to_disk); give the "
        "folder that holds one of them"
    )


def _refuse_options(format: str, **given: object) -> None:
    """Raises ConfigError for what a format says itself."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name} is for MDS and datasets, and these are {format}; omit it")
