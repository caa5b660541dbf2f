"""Packs Parquet files that hold encoded images in a column, such as Hugging Face's data sets.

    python -m data_prep.parquet --files train.parquet --label-column label --vae none --resolution 32 --out data/cifar10
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import packing
from data_prep.sources import Item, clean, fingerprint, first_three, given, name_of, unusable
from largescale.errors import DataError

ROWS_READ = 64                                          # at a time: images are large


@dataclass(frozen=True, kw_only=True)
class Parquet(packing.Packing):
    files: tuple[Path, ...]
    """Parquet files, or folders of them."""
    image_column: str = "image"
    """Of encoded images: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = None
    """Of integers; the classes' names are taken from the schema where it has them."""
    caption_column: str | None = None
    """Of strings, or lists of strings."""
    id_column: str | None = None
    """By default rows are numbered."""

    def source(self) -> "ParquetSource":
        return ParquetSource(self.files, self.image_column, self.label_column, self.caption_column, self.id_column)


class ParquetSource:
    """Rows of all files, one after the other; a part is `rows_per_shard` rows, and reads only their row groups.

    Raises DataError for files that cannot be read, a missing or unfit column, labels outside the classes, and ids that
    are given twice.
    """

    def __init__(self, files: Sequence[Path], image_column: str = "image", label_column: str | None = None,
                 caption_column: str | None = None, id_column: str | None = None) -> None:
        self._files = [file for given_ in files for file in (sorted(given_.glob("*.parquet")) if given_.is_dir()
                                                              else [given_])]
        if not self._files:
            raise DataError(f"there are no *.parquet in {first_three(files)}; correct --files")
        self._columns = {"image": image_column, "label": label_column, "caption": caption_column, "id": id_column}
        rows = [self._check(file) for file in self._files]
        self._starts = [0, *accumulate(rows)]
        self.size: int | None = self._starts[-1]
        if not self.size:
            raise DataError(f"{first_three(self._files)} hold no rows; correct --files")
        self.name, self.captioned = f"parquet-{name_of(files[0])}", caption_column is not None
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.class_names: Sequence[str] = ()
        self.num_classes = 0
        self._labels = self._read_labels() if label_column else None
        self._ids = self._read_ids() if id_column else None
        self.facts: dict[str, Any] = {
            "program": "data_prep.parquet", "files": [str(file) for file in self._files], "rows": self.size,
            "bytes": sum(file.stat().st_size for file in self._files), "columns": self._columns,
            "num_classes": self.num_classes}
        self.fingerprint = fingerprint(
            (name or "" for name in self._columns.values()), self.class_names, map(str, rows),
            b"" if self._labels is None else self._labels.astype("<i4").tobytes(),
            () if self._ids is None else (id.as_py() for id in self._ids), *map(_footer, self._files))

    def parts(self, rows_per_shard: int) -> int:
        return -(-self._starts[-1] // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        start = number * rows_per_shard
        stop = min(start + rows_per_shard, self._starts[-1])
        for file, first, last in zip(self._files, self._starts, self._starts[1:], strict=False):
            if first < stop and start < last:
                try:
                    yield from self._rows(file, first, start, stop)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"{file} cannot be read ({error}); restore it, or leave it out of --files") \
                        from error

    def _rows(self, path: Path, row: int, start: int, stop: int) -> Iterator[Item]:
        """Items of the rows in [start, stop); `row` is the number of the file's first."""
        columns = [name for key in ("image", "caption") if (name := self._columns[key])]
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row < stop and start < row + count:
                    at = row
                    for batch in file.iter_batches(ROWS_READ, row_groups=[group], columns=columns):
                        for i in range(max(start - at, 0), min(stop - at, len(batch))):
                            yield self._item(at + i, batch, i)
                        at += len(batch)
                        if at >= stop:
                            return
                row += count

    def _item(self, row: int, batch: pa.RecordBatch, i: int) -> Item:
        image = batch.column(self._columns["image"])[i].as_py()
        captions: tuple[str, ...] = ()
        if isinstance(image, dict):
            image = image["bytes"]
        if self._columns["caption"]:
            value = batch.column(self._columns["caption"])[i].as_py()
            captions = clean(text for text in ([value] if isinstance(value, str) else value or ()) if text)
        read = unusable("it has no image bytes") if image is None else given(image)
        if self.captioned and not captions:
            read = unusable("it has no caption")
        return Item(str(row) if self._ids is None else self._ids[row].as_py(), read,
                    0 if self._labels is None else int(self._labels[row]), captions)

    def _check(self, path: Path) -> int:
        """Raises DataError for a column that is missing, or of a type that does not fit; returns the number of rows."""
        try:
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as Parquet ({error}); correct --files") from error
        for key, name in self._columns.items():
            if name is not None and (name not in schema.names or not _fits(key, schema.field(name).type)):
                what = f"is {schema.field(name).type}, not {NEEDED[key]}" if name in schema.names else "does not exist"
                has = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise DataError(f"{path}: column {name} {what}; it has {has}: give one with --{key}-column")
        return int(rows)

    def _read(self, key: str, type: pa.DataType) -> pa.ChunkedArray:
        name = self._columns[key]
        chunks = [chunk for file in self._files
                  for chunk in pq.ParquetFile(file).read(columns=[name]).column(name).cast(type).chunks]
        column = pa.chunked_array(chunks, type)
        if column.null_count:
            raise DataError(f"column {name} has no value in {column.null_count:,} rows; complete them, or leave out "
                            f"--{key}-column")
        return column

    def _read_labels(self) -> npt.NDArray[np.int32]:
        """Sets num_classes and class_names too."""
        labels, name = self._read("label", pa.int64()).to_numpy(), self._columns["label"]
        of_files = [_class_names(file, str(name)) for file in self._files]
        for file, names in zip(self._files, of_files, strict=True):
            if names != of_files[0]:
                raise DataError(f"{file} has other names of classes than {self._files[0]}; pack them each on its own")
        count = len(of_files[0]) or int(labels.max()) + 1
        if len(outside := np.flatnonzero((labels < 0) | (labels >= count))):
            raise DataError(f"column {name}: {len(outside):,} labels are not in [0, {count}), the first "
                            f"{labels[outside[0]]} in row {outside[0]}; correct them, or leave out --label-column")
        self.class_names, self.num_classes = of_files[0], count
        return labels.astype(np.int32)

    def _read_ids(self) -> pa.Array:
        ids = self._read("id", pa.large_string()).combine_chunks()
        if len(counts := pc.value_counts(ids)) < len(ids):
            twice = [count["values"].as_py() for count in counts if count["counts"].as_py() > 1]
            raise DataError(f"column {self._columns['id']}: {len(twice):,} ids are given more than once: "
                            f"{first_three(twice)}; give another --id-column, or none to number the rows")
        return ids


NEEDED = {"image": "binary", "label": "an integer", "caption": "a string, or a list of them",
          "id": "a string or an integer"}


def _fits(key: str, type: pa.DataType) -> bool:
    is_text = pa.types.is_string(type) or pa.types.is_large_string(type)
    if key == "image":
        if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0:
            type = type.field("bytes").type
        return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type))
    if key == "caption" and (pa.types.is_list(type) or pa.types.is_large_list(type)):
        return _fits(key, type.value_type)
    return bool(is_text if key == "caption" else pa.types.is_integer(type) or (is_text and key == "id"))


def _class_names(path: Path, label_column: str) -> tuple[str, ...]:
    """From the schema's own `classes`, or Hugging Face's description of the column; () where it has neither."""
    metadata = pq.read_schema(path).metadata or {}
    try:
        if b"classes" in metadata:
            text = metadata[b"classes"].decode()
            return tuple(map(str, json.loads(text) if text.lstrip().startswith("[") else text.split(",")))
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return tuple(map(str, features.get(label_column, {}).get("names") or ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the names of classes in its schema cannot be read ({error!r}); write it anew") \
            from error


def _footer(path: Path) -> bytes:
    """What Parquet says of its columns at the file's end: places, sizes and statistics, which tell contents apart."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read(length)


def main(args: list[str] | None = None) -> int:
    return packing.main(Parquet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
