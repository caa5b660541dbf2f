"""Latents that others have packed, read without their libraries: the folders of REPA and EDM2, the
shards of LightningDiT, those of micro_diffusion (MDS), and `datasets` on disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from largescale.errors import ConfigError, DataError
from largescale.host.files import from_json

Array = npt.NDArray[Any]
# The names that a column of latents has, in the order of choice.
COLUMNS = ("latent", "latents", "moments", "latents_256", "latents_512")


@dataclass(frozen=True)
class LatentSource:
    """Rows of latents, in float32 or float16, as their own program stored them."""

    name: str
    format: str
    kind: Literal["latents", "moments"]
    shape: tuple[int, int, int]  # of a row's latent, as we store it
    rows: Callable[[], Iterator[dict[str, Any]]]
    """id, label, latent, and where there is one latent_mirror or captions."""
    size: int
    num_classes: int = 0
    scaled: bool = False
    """Whether the encoder's scaling_factor is already a factor of the latents."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Statistics that lie beside the latents, by which their own program normalises them."""
    facts: dict[str, Any] = field(default_factory=dict)


def open_source(
    folder: Path, column: str | None, shape: Sequence[int] | None, kind: str | None
) -> LatentSource:
    """The latents in a folder, whatever their format. `column`, `shape`, `kind`: what a column of
    MDS or `datasets` does not say. Raises DataError or ConfigError."""
    for inner in (folder, folder / "vae-sd"):
        if (inner / "dataset.json").is_file():
            return _numpy_folder(inner)
    # LightningDiT's shards; torch.save's files have the same keys nowhere.
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return _safetensors(folder, shards)
    if (folder / "index.json").is_file():
        return _mds(folder, column, shape, kind)
    if (folder / "state.json").is_file():
        return _datasets(folder, column, shape, kind)
    # A DatasetDict has a folder for each of its sets.
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json")["splits"]
        raise DataError(f"{folder} holds several sets; give one of its folders {', '.join(splits)}")
    raise DataError(
        f"{folder} has neither dataset.json with .npy files (REPA, EDM2), nor .safetensors "
        "(LightningDiT), nor index.json (MDS), nor state.json (datasets.save_to_disk); give the "
        "folder that holds one of them"
    )


def _numpy_folder(folder: Path) -> LatentSource:
    """REPA's and EDM2's: one .npy a row of mean and std, (2 C, H, W), and their labels."""
    entries = _json(folder / "dataset.json").get("labels")
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{folder / 'dataset.json'} lists no labels, by which the latents are found; restore it"
        )
    labels = {}
    for name, label in entries:
        if Path(name).suffix == ".npy":
            labels[str(name)] = int(label)
    if not labels:
        raise DataError(
            f"{folder / 'dataset.json'} lists images, not latents; give the folder that REPA's "
            "dataset_tools encode wrote"
        )
    names = sorted(labels)
    shape = _npy(folder / names[0]).shape
    if len(shape) != 3 or shape[0] % 2:
        raise DataError(
            f"{folder / names[0]} has shape {shape}, not mean and std of latents (2 C, H, W)"
        )

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            latent = _npy(folder / name).astype(np.float32)
            # It is the std that they store, and the log-variance that we do.
            half = len(latent) // 2
            with np.errstate(divide="ignore"):
                latent[half:] = (2 * np.log(latent[half:])).clip(-30, 20)
            yield {"id": name, "label": labels[name], "latent": latent}

    classes = max(labels.values()) + 1
    name = folder.parent.name if folder.name == "vae-sd" else folder.name
    return LatentSource(name, "REPA's .npy folder", "moments", shape, rows, len(names), classes)


def _npy(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it") from error
    return array


def _safetensors(folder: Path, shards: list[Path]) -> LatentSource:
    """LightningDiT's: latents, latents_flip and labels, and beside them latents_stats.pt."""
    from safetensors import SafetensorError, safe_open

    labels, shape, mirrored = [], None, True
    for path in shards:
        try:
            with safe_open(path, framework="np") as file:
                missing = {"latents", "labels"} - set(file.keys())
                if missing:
                    raise DataError(f"{path} has no {sorted(missing)[0]}, as LightningDiT's have")
                found = tuple(file.get_slice("latents").get_shape())
                labels.append(file.get_tensor("labels").astype(np.int64))
                # Either every shard has mirrors, or none are packed: rows have the same columns.
                mirrored &= "latents_flip" in file.keys()  # noqa: SIM118, it is no dict
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); restore it") from error
        if len(found) != 4 or shape not in (None, found[1:]) or len(labels[-1]) != found[0]:
            raise DataError(
                f"{path} has latents {found} and {len(labels[-1])} labels, others {shape}; give a "
                "folder of one extraction"
            )
        shape = found[1:]
    assert shape

    def rows() -> Iterator[dict[str, Any]]:
        for path, of_file in zip(shards, labels, strict=True):
            with safe_open(path, framework="np") as file:
                # A slice at a time: a shard has 10,000 images.
                latents = file.get_slice("latents")
                mirrors = file.get_slice("latents_flip") if mirrored else None
                for i, label in enumerate(of_file.tolist()):
                    row = {"id": f"{path.stem}/{i:05d}", "label": label, "latent": latents[i]}
                    if mirrors is not None:
                        row["latent_mirror"] = mirrors[i]
                    yield row

    mean, std = _stats(folder / "latents_stats.pt", shape[0])
    size = sum(map(len, labels))
    classes = int(max(map(np.max, labels))) + 1
    return LatentSource(
        folder.name, "LightningDiT's safetensors", "latents", shape, rows, size, classes,
        mean=mean, std=std,
    )  # fmt: skip


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


def _mds(
    folder: Path, column: str | None, shape: Sequence[int] | None, kind: str | None
) -> LatentSource:
    """Streaming's shards, as micro_diffusion writes them: float16 bytes of latents that are already
    multiplied by the encoder's scaling_factor, and captions."""
    shards = _json(folder / "index.json")["shards"]
    # A shard that cannot be read is found now, and not after hours of packing.
    for shard in shards:
        if shard["format"] != "mds" or shard["compression"]:
            raise DataError(
                f"{folder} has shards of format {shard['format']}, compression "
                f"{shard['compression']}; only uncompressed MDS is read: decompress them first"
            )
    names = shards[0]["column_names"]
    column = _column(folder, column, names)
    # The index does not say how large a latent is; the first sample does, at two bytes a value.
    first = next(_mds_samples(folder, shards[:1]))
    number = len(first[column]) // 2
    shape = _shape(shape, number, f"the column {column} of {folder}")

    def rows() -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(_mds_samples(folder, shards)):
            latent = np.frombuffer(sample[column], np.float16).reshape(shape)
            row = {"id": f"{i:09d}", "label": 0, "latent": latent}
            if "caption" in sample:
                row["captions"] = [sample["caption"].decode()]
            yield row

    size = sum(shard["samples"] for shard in shards)
    return LatentSource(
        folder.name, "MDS", _kind(kind), shape, rows, size, scaled=kind != "moments"
    )


def _mds_samples(folder: Path, shards: list[dict[str, Any]]) -> Iterator[dict[str, bytes]]:
    """The columns of each sample. A shard has the number of samples, where each begins and ends,
    and the samples: the sizes of columns without a fixed one, then the columns."""
    for shard in shards:
        path = folder / shard["raw_data"]["basename"]
        try:
            # Mapped, so that of a large shard only a sample at a time is in memory.
            data = np.memmap(path, np.uint8, "r")
            count = int(data[:4].view(np.uint32)[0])
            bounds = data[4 : 4 * (count + 2)].view(np.uint32).tolist()
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{path} cannot be read ({error}); restore it") from error
        # Bounds end with the size of the file, which shows a copy that was cut short.
        if count != shard["samples"] or bounds[-1] != len(data):
            raise DataError(f"{path} is cut short, or not the index's; restore it")
        for begin, end in pairwise(bounds):
            yield _mds_columns(bytes(data[begin:end]), shard)


def _mds_columns(data: bytes, shard: dict[str, Any]) -> dict[str, bytes]:
    sizes, at = [], 0
    for size in shard["column_sizes"]:
        if not size:
            size = int.from_bytes(data[at : at + 4], "little")
            at += 4
        sizes.append(size)
    columns = {}
    for name, size in zip(shard["column_names"], sizes, strict=True):
        columns[name] = data[at : at + size]
        at += size
    return columns


def _datasets(
    folder: Path, column: str | None, shape: Sequence[int] | None, kind: str | None
) -> LatentSource:
    """What datasets.save_to_disk wrote: Arrow streams, a column of latents, flat or nested, and
    perhaps one of labels."""
    files = [folder / each["filename"] for each in _json(folder / "state.json")["_data_files"]]
    batches = partial(_batches, files)
    first = next(batches())
    column = _column(folder, column, first.schema.names)
    # A nested column tells its shape; a flat one only how many values there are.
    value = first.column(column)[0].as_py()
    found = np.array(value, np.float32)
    if shape is None and found.ndim == 3:
        shape = found.shape
    shape = _shape(shape, found.size, f"the column {column} of {folder}")
    labelled = "label" in first.schema.names
    # A pass for the labels alone: a set states its classes before its first row is written.
    size, classes = 0, len(_class_names(folder))
    for batch in batches():
        size += batch.num_rows
        if labelled and batch.num_rows:
            classes = max(classes, max(batch.column("label").to_pylist()) + 1)

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        for batch in batches():
            flat = batch.column(column)
            # Levels of lists, or an extension over them, come off one by one: as Python's lists the
            # values would take many times the memory.
            while not pa.types.is_floating(flat.type):
                flat = (flat.storage if isinstance(flat, pa.ExtensionArray) else flat).flatten()
            latents = flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)
            labels = batch.column("label").to_pylist() if labelled else [0] * len(latents)
            for label, latent in zip(labels, latents, strict=True):
                yield {"id": f"{number:09d}", "label": label, "latent": latent}
                number += 1

    return LatentSource(folder.name, "datasets on disk", _kind(kind), shape, rows, size, classes)


def _class_names(folder: Path) -> list[str]:
    """The names of a ClassLabel, by which classes are counted that no row has; none without them."""
    path = folder / "dataset_info.json"
    features = _json(path).get("features") if path.is_file() else None
    label = (features or {}).get("label")
    names = label.get("names") if isinstance(label, dict) else None
    return names if isinstance(names, list) else []


def _batches(files: list[Path]) -> Iterator[pa.RecordBatch]:
    for path in files:
        try:
            with pa.memory_map(str(path)) as file:
                yield from pa.ipc.open_stream(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} cannot be read ({error}); restore it") from error


def _kind(kind: str | None) -> Literal["latents", "moments"]:
    return "moments" if kind == "moments" else "latents"


def _column(folder: Path, asked: str | None, names: list[str]) -> str:
    """The column of latents: the one asked for, or the first of a usual name."""
    wanted = (asked,) if asked else COLUMNS
    for name in wanted:
        if name in names:
            return name
    raise ConfigError(
        f"{folder} has the columns {', '.join(names)}, none of them {' or '.join(wanted)}; name "
        "the one with the latents by --column"
    )


def _shape(shape: Sequence[int] | None, number: int, what: str) -> tuple[int, int, int]:
    """(C, H, W) of so many values: as given, or 4 channels of a square."""
    if shape is None:
        side = int((number / 4) ** 0.5)
        shape = (4, side, side)
        if 4 * side * side != number:
            raise ConfigError(f"{what} has {number} values a row; give their --shape C H W")
    if len(shape) != 3 or int(np.prod(shape)) != number:
        raise ConfigError(f"{what} has {number} values a row, which --shape {shape} does not fit")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it") from error
    return found
