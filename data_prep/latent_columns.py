"""Latents that others have packed in a column of a table, which does not say what they are:
micro_diffusion's MDS, and `datasets` on disk; both read without their libraries."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.latent_sources import Array, Kind, RowFiles, inside, json_of, no_rows, reading
from data_prep.sources import Item, given, unusable
from largescale.errors import ConfigError, DataError

# The names that a column of latents has, in the order of choice.
COLUMNS = ("latent", "latents", "moments", "latents_256", "latents_512")


class Mds(RowFiles):
    """Streaming's shards, as micro_diffusion writes them: float16 bytes of latents that are already
    multiplied by the encoder's scaling_factor, and captions."""

    format = "MDS"
    dtype = np.float16

    def __init__(
        self, folder: Path, column: str | None, shape: Sequence[int] | None, kind: Kind | None
    ) -> None:
        index = folder / "index.json"
        with reading(index):
            self._shards: list[dict[str, Any]] = json_of(index)["shards"]
            names = self._shards[0]["column_names"]
            files, rows = [], []
            # A shard that cannot be read is found now, and not after hours of packing.
            for shard in self._shards:
                if shard["format"] != "mds" or shard["compression"]:
                    raise DataError(
                        f"{folder} has shards of format {shard['format']}, compression "
                        f"{shard['compression']}; only uncompressed MDS is read: decompress them "
                        "first"
                    )
                if shard["column_names"] != names:
                    raise DataError(
                        f"{index} has shards of the columns {names} and {shard['column_names']}; "
                        "give a folder of one set"
                    )
                files.append(folder / inside(shard["raw_data"]["basename"], index))
                rows.append(int(shard["samples"]))
        self.kind = kind or "latents"
        self.scaled = self.kind != "moments"
        self.captioned = "caption" in names
        self._column = _column(folder, column, names)
        number = next((i for i, count in enumerate(rows) if count), None)
        if number is None:
            raise no_rows(folder)
        # The index does not say how large a latent is; the first row does, at two bytes a value.
        with reading(files[number]):
            first = next(_mds_rows(files[number], self._shards[number], 0, 1))
        values = len(first[self._column]) // 2
        self.shape = _shape(shape, values, f"the column {self._column} of {folder}")
        self._describe(folder, files, rows, column=self._column, shape=self.shape)

    def _rows(self, number: int, first: int, last: int) -> Iterator[Item]:
        rows = _mds_rows(self._files[number], self._shards[number], first, last)
        for row, columns in enumerate(rows, first):
            yield self._item(self._id(number, row), columns)

    def _item(self, id: str, columns: Mapping[str, bytes]) -> Item:
        data = columns[self._column]
        captions: tuple[str, ...] = ()
        try:
            if self.captioned:
                captions = (columns["caption"].decode(),)
        except UnicodeDecodeError:
            return Item(id, unusable("its caption is not UTF-8"))
        return Item(id, given(data), captions=captions, held=len(data))


def _mds_rows(
    path: Path, shard: Mapping[str, Any], first: int, last: int
) -> Iterator[dict[str, bytes]]:
    """The columns of the rows in [first, last) of a shard. It has the number of rows, where each
    begins and ends, and the rows."""
    # Mapped, so that of a large shard only a row at a time is in memory.
    data = np.memmap(path, np.uint8, "r")
    count = int(data[:4].view(np.uint32)[0])
    bounds = data[4 : 4 * (count + 2)].view(np.uint32).tolist()
    # Bounds end with the size of the file, which shows a copy that was cut short.
    if count != shard["samples"] or bounds[-1] != len(data):
        raise DataError(f"{path} is cut short, or not the index's; restore it")
    for row in range(first, last):
        yield _mds_columns(bytes(data[bounds[row] : bounds[row + 1]]), shard)


def _mds_columns(data: bytes, shard: Mapping[str, Any]) -> dict[str, bytes]:
    """The columns of a row: the sizes of those without a fixed one come first."""
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


class OnDisk(RowFiles):
    """What datasets.save_to_disk wrote: Arrow streams, a column of latents, flat or nested, and
    perhaps one of labels."""

    format = "datasets on disk"

    def __init__(
        self, folder: Path, column: str | None, shape: Sequence[int] | None, kind: Kind | None
    ) -> None:
        state = folder / "state.json"
        with reading(state):
            entries = json_of(state)["_data_files"]
            files = [folder / inside(entry["filename"], state) for entry in entries]
        self.kind = kind or "latents"
        rows: list[int] = []
        first: pa.RecordBatch | None = None
        # Streams have no index of their rows: the heads of all batches are read.
        for path in files:
            rows.append(0)
            for batch in _batches(path):
                rows[-1] += batch.num_rows
                first = first or (batch if batch.num_rows else None)
        if first is None:
            raise no_rows(folder)
        self._column = _column(folder, column, first.schema.names)
        # A nested column tells its shape; a flat one only how many values there are.
        with reading(files[0]):
            value = np.array(first.column(self._column)[0].as_py(), np.float32)
        if shape is None and value.ndim == 3:
            shape = value.shape
        self.shape = _shape(shape, value.size, f"the column {self._column} of {folder}")
        self._labelled = "label" in first.schema.names
        self.class_names = _class_names(folder) if self._labelled else ()
        labels = (array for path in files for array in self._labels(path))
        settings = {"column": self._column, "shape": self.shape}
        self._describe(folder, files, rows, labels if self._labelled else (), **settings)

    def _labels(self, path: Path) -> Iterator[Array]:
        for batch in _batches(path):
            yield self._labels_of(batch, path)

    def _labels_of(self, batch: pa.RecordBatch, path: Path) -> Array:
        if not self._labelled:
            return np.zeros(batch.num_rows, np.int64)
        column = batch.column("label")
        if column.null_count or not pa.types.is_integer(column.type):
            raise DataError(
                f"{path}: the column label is {column.type} with {column.null_count} rows without "
                "a value, not whole numbers; correct or remove it"
            )
        labels: Array = np.from_dlpack(column.cast(pa.int64()))
        return labels

    def _rows(self, number: int, first: int, last: int) -> Iterator[Item]:
        path, at = self._files[number], 0
        for batch in _batches(path):
            begin, end = max(first - at, 0), min(last - at, batch.num_rows)
            if begin < end:
                yield from self._items(batch.slice(begin, end - begin), number, at + begin)
            at += batch.num_rows
            if at >= last:
                return

    def _items(self, batch: pa.RecordBatch, number: int, row: int) -> Iterator[Item]:
        """The items of a batch that begins at a row of a file."""
        flat = batch.column(self._column)
        # Levels of lists, or an extension over them, come off one by one: as Python's lists the
        # values would take many times the memory.
        while isinstance(flat, pa.ExtensionArray) or pa.types.is_nested(flat.type):
            flat = flat.storage if isinstance(flat, pa.ExtensionArray) else flat.flatten()
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
        labels = self._labels_of(batch, self._files[number]).tolist()
        for i, latent in enumerate(values.reshape(len(labels), -1)):
            data = latent.tobytes()
            yield Item(self._id(number, row + i), given(data), labels[i], (), len(data))


def _class_names(folder: Path) -> Sequence[str]:
    """The names of a ClassLabel, by which classes are counted that no row has."""
    path = folder / "dataset_info.json"
    features = json_of(path).get("features") if path.is_file() else None
    label = (features or {}).get("label")
    names = label.get("names") if isinstance(label, dict) else None
    return names if isinstance(names, list) else ()


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with reading(path), pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def _column(folder: Path, asked: str | None, names: Sequence[str]) -> str:
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
