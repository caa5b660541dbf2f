"""Packs Parquet files that hold encoded images in a column, such as Hugging Face's data sets.

python -m data_prep.parquet --files train.parquet --label-column label --vae none --resolution 32
--out data/cifar10
"""

import os
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import packing, program
from data_prep.images import Unusable
from data_prep.listing import Found, Listings, Writer, fingerprint
from data_prep.sources import (
    Item,
    Skips,
    class_labels,
    clean,
    file_size,
    first_three,
    given,
    name_of,
    other_size,
    refuse_splits,
    refuse_twice,
    splits_in,
    unusable,
)
from data_prep.spool import sorted_on_disk
from largescale.errors import DataError
from largescale.host.files import from_json

# Rows that are read at a time: images are large.
ROWS_READ = 64
# Labels or ids that are read at a time.
TEXTS_READ = 2**16
# Bytes that are read at a time, if every value were as large as its column chunk.
BYTES_READ = 2**28
# Bytes of a column chunk that is less than a hundredth of it when compressed.
MOST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Parquet(packing.Packing):
    files: tuple[Path, ...]
    """Parquet files, or folders of them; a folder with several splits (train-*, test-*) is
    refused."""
    image_column: str = "image"
    """The column of encoded images: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = None
    """The column of labels: whole numbers, with the names of the classes from the schema where it
    has them; or names, which are numbered in sorted order."""
    caption_column: str | None = None
    """The column of captions: strings, or lists of strings."""
    id_column: str | None = None
    """The column of unique ids; by default rows are numbered."""

    def source(self) -> "ParquetSource":
        return ParquetSource(
            self.files,
            self.image_column,
            self.label_column,
            self.caption_column,
            self.id_column,
            self.listings,
        )


class ParquetSource:
    """The rows of all files, one file after the other. A part is `rows_per_shard` rows, and reads
    only their row groups.

    Raises DataError for files that cannot be read or are given twice, splits in one folder, a
    missing or unfit column, labels outside the classes, and ids that are given twice.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str = "image",
        label_column: str | None = None,
        caption_column: str | None = None,
        id_column: str | None = None,
        listings: Listings | None = None,
    ) -> None:
        self._files = _expand(files)
        self._columns = {
            "image": image_column,
            "label": label_column,
            "caption": caption_column,
            "id": id_column,
        }

        # Every file's columns are checked before the labels of any are read.
        rows = list(map(self._check, self._files))
        self._starts = [0, *accumulate(rows)]
        self.size: int | None = self._starts[-1]
        if not self.size:
            raise DataError(f"{first_three(self._files)} hold no rows; correct --files")

        self.name = f"parquet-{name_of(files[0])}"
        self.captioned = caption_column is not None
        self.skipped: Skips = []
        self.notes = self._not_packed()
        splits = splits_in(self._files)
        if len(splits) > 1:
            self.notes.append(f"the splits {', '.join(splits)} together")

        # Labels and ids are read as streams, to be checked, by the rank that comes first; and with the
        # images of a part again.
        self._label_of: dict[str, int] = {}
        files_now = [[str(path), *_version(path)] for path in self._files]
        key = {"program": "data_prep.parquet", "columns": self._columns, "files": files_now}
        self._listing = (listings or Listings()).get(key, (), partial(self._check_columns, rows))
        found = self._listing.found
        self._label_of = found.facts["labels"]
        self.class_names: Sequence[str] = tuple(found.class_names)
        self.num_classes = found.num_classes
        self.notes += found.notes
        self.fingerprint: str = found.facts["fingerprint"]
        self._sizes = list(map(os.path.getsize, self._files))
        self.facts = self._facts()

    def _check_columns(self, rows: Sequence[int], writer: Writer) -> Found:
        """What is known once all labels and ids are read. Raises DataError for bad ones."""
        found = Found({})
        if self._columns["label"]:
            self._label_of = self._read_labels(found)
        if self._columns["id"]:
            self._check_ids(writer.scratch)
        # The files' footers stand for their content, which would take hours to hash.
        found.facts["fingerprint"] = fingerprint(
            (name or "" for name in self._columns.values()),
            found.class_names,
            map(str, rows),
            self._labels() if self._columns["label"] else b"",
            (text for text, _ in self._ids()) if self._columns["id"] else (),
            *map(_footer, self._files),
        )
        found.facts["labels"] = self._label_of
        return found

    def _facts(self) -> dict[str, Any]:
        return {
            "program": "data_prep.parquet",
            "files": list(map(str, self._files)),
            "rows": self.size,
            "bytes": sum(self._sizes),
            "columns": self._columns,
            "num_classes": self.num_classes,
        }

    def parts(self, rows_per_shard: int) -> int:
        return -(-self._starts[-1] // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        # A part may begin in one file and end in another.
        start = number * rows_per_shard
        stop = min(start + rows_per_shard, self._starts[-1])
        for file, (first, last) in zip(self._files, pairwise(self._starts), strict=True):
            if first < stop and start < last:
                with _reading(file):
                    yield from self._rows(file, first, start, stop)

    def changed(self) -> str | None:
        return other_size(map(str, self._files), self._sizes, map(file_size, map(str, self._files)))

    def discard(self) -> None:
        self._listing.discard()

    def _rows(self, path: Path, row: int, start: int, stop: int) -> Iterator[Item]:
        """The items of the rows in [start, stop); `row` is the number of the file's first."""
        # Each once: two options may name the same column.
        columns = list(dict.fromkeys(filter(None, self._columns.values())))
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if row < stop and start < row + group.num_rows:
                    # Fewer rows at a time where one value may be very large.
                    rows = min(ROWS_READ, BYTES_READ // _largest(path, group, columns))
                    at = row
                    for batch in file.iter_batches(
                        max(rows, 1), row_groups=[number], columns=columns
                    ):
                        yield from self._items(batch, at, start, stop)
                        at += len(batch)
                        if at >= stop:
                            return
                row += group.num_rows

    def _items(self, batch: pa.RecordBatch, at: int, start: int, stop: int) -> Iterator[Item]:
        """The items of a batch, whose first row is `at`, that lie in [start, stop)."""
        numbers = range(max(start - at, 0), min(stop - at, len(batch)))
        id_column = self._columns["id"]
        if id_column:
            ids = list(map(_text, batch.column(id_column).cast(pa.large_string())))
        else:
            ids = [(str(at + i), True) for i in range(len(batch))]
        # By their text, whatever the column's type: _read_labels has read labels as text.
        label_column = self._columns["label"]
        labels = [0] * len(batch)
        if label_column:
            texts = batch.column(label_column).cast(pa.large_string()).to_pylist()
            labels = [self._label_of[text] for text in texts]
        for i in numbers:
            yield self._item(*ids[i], labels[i], batch, i)

    def _item(self, id: str, is_utf8: bool, label: int, batch: pa.RecordBatch, i: int) -> Item:
        """The item of row i of a batch; one that cannot be read where something is missing."""
        try:
            if not is_utf8:
                raise Unusable("its id is not UTF-8")
            captions = self._captions(batch, i)
            value = batch.column(self._columns["image"])[i]
            # Hugging Face's struct of bytes and path
            if pa.types.is_struct(value.type) and value.is_valid:
                value = value["bytes"]
            image = value.as_py()
            if image is None:
                raise Unusable("it has no image bytes")
        except Unusable as error:
            return Item(id, unusable(str(error)), label)
        return Item(id, given(image), label, captions, len(image))

    def _captions(self, batch: pa.RecordBatch, i: int) -> tuple[str, ...]:
        """The captions of row i of a batch. Raises Unusable where there are none."""
        if not self._columns["caption"]:
            return ()
        try:
            value = batch.column(self._columns["caption"])[i].as_py()
        except UnicodeDecodeError as error:
            raise Unusable(f"its caption is not UTF-8 ({error.reason})") from error
        texts = [value] if isinstance(value, str) else value or ()
        captions = clean(filter(None, texts))
        if not captions:
            raise Unusable("it has no caption")
        return captions

    def _check(self, path: Path) -> int:
        """Raises DataError for a column that is missing, or of a type that does not fit; returns
        the number of rows."""
        with _reading(path), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            rows = int(file.metadata.num_rows)
        # The message lists the columns that there are: their names differ between data sets.
        for key, name in self._columns.items():
            if name is None:
                continue
            if name not in schema.names:
                what = "does not exist"
            elif not _fits(key, schema.field(name).type):
                what = f"is {schema.field(name).type}, not {NEEDED[key]}"
            else:
                continue
            has = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{path}: column {name} {what}; it has {has}: give one with --{key}-column"
            )
        return rows

    def _read(self, key: str) -> Iterator[pa.Array]:
        """A column of all files as text, many rows at a time. Raises DataError, at the end, where a
        row has no value."""
        name = str(self._columns[key])
        nulls, first_null = 0, ""
        row = 0
        for path in self._files:
            with _reading(path), pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    # Sizes are checked before a column is expanded. Asked for a file as a whole,
                    # pyarrow keeps what it has read until the end.
                    _largest(path, file.metadata.row_group(group), [name])
                    for column in _large_texts(file, group, name):
                        if column.null_count and not nulls:
                            is_null = column.is_null().to_numpy(zero_copy_only=False)
                            first_null = self._where(row + int(np.argmax(is_null)))
                        nulls += column.null_count
                        row += len(column)
                        if not nulls:
                            yield column
        if nulls:
            raise DataError(
                f"{first_null}: column {name} has no value ({nulls:,} such rows in all); "
                f"complete them, or leave out --{key}-column"
            )

    def _where(self, row: int) -> str:
        """The file and the row in it, for a message."""
        number = bisect(self._starts, row) - 1
        return f"{self._files[number]}, row {row - self._starts[number]}"

    def _not_packed(self) -> list[str]:
        """Notes on columns that look like labels or captions and were not asked for."""
        schema = pq.read_schema(self._files[0])
        notes = []
        for key, names in LIKELY.items():
            if self._columns[key] is not None:
                continue
            for field in schema:
                if field.name.lower() in names and _fits(key, field.type):
                    column = f"column {field.name} ({field.type})"
                    notes.append(f"{column} is not packed (--{key}-column {field.name})")
        return notes

    def _read_labels(self, found: Found) -> dict[str, int]:
        """The number of each label, as it stands in the column; the classes are added to `found`."""
        name = str(self._columns["label"])
        names = self._stored_class_names(name)

        # Of millions of rows only the distinct labels are kept, how often each occurs, and where it
        # occurs first.
        counts: Counter[str] = Counter()
        first: dict[str, int] = {}
        row = 0
        for column in self._read("label"):
            encoded = column.dictionary_encode()
            numbers = encoded.indices.to_numpy()
            often = np.bincount(numbers, minlength=len(encoded.dictionary)).tolist()
            for number, (value, count) in enumerate(zip(encoded.dictionary, often, strict=True)):
                text, is_utf8 = _text(value)
                if not is_utf8:
                    raise DataError(
                        f"column {name}: {text!r} is not UTF-8; correct it, or leave out "
                        "--label-column"
                    )
                if text not in first:
                    first[text] = row + int(np.argmax(numbers == number))
                counts[text] += count
            row += len(column)

        # Numbers that are stored as text may be names; numbers that are stored as such are not.
        numeric = not any(_is_text(pq.read_schema(file).field(name).type) for file in self._files)
        labels, found.class_names, found.num_classes = class_labels(
            counts,
            names,
            lambda label: self._where(first[label]),
            "correct the column, or leave out --label-column",
            numeric,
        )
        if found.class_names and not names:
            found.notes.append("classes numbered in the sorted order of their names")
        return labels

    def _labels(self) -> Iterator[bytes]:
        """The numbers of all rows' labels, many at a time."""
        for column in self._read("label"):
            # Each label is looked up once a batch, and not once a row.
            encoded = column.dictionary_encode()
            numbers = [self._label_of[text] for text in encoded.dictionary.to_pylist()]
            yield np.array(numbers, "<i4")[encoded.indices.to_numpy()].tobytes()

    def _stored_class_names(self, column: str) -> tuple[str, ...]:
        """The names of the classes that the files' schemas have. Raises DataError where they
        differ."""
        # Otherwise one label would stand for two classes.
        first = _class_names(self._files[0], column)
        for file in self._files[1:]:
            if _class_names(file, column) != first:
                raise DataError(
                    f"{file} has other names of classes than {self._files[0]}; pack them each on "
                    "its own"
                )
        return first

    def _ids(self) -> Iterator[tuple[str, bool]]:
        """The ids of all rows, and whether each is UTF-8."""
        for column in self._read("id"):
            # All at once is faster. It fails, before anything is yielded, where an id is not UTF-8.
            try:
                for text in column.to_pylist():
                    yield text, True
            except UnicodeDecodeError:
                yield from map(_text, column)

    def _check_ids(self, scratch: Path) -> None:
        """Raises DataError for ids that are given more than once."""
        # Sorted, equal ids are neighbours: memory does not grow with the number of rows.
        twice = 0
        some: list[str] = []
        last, times = None, 1
        for id, _ in sorted_on_disk(self._ids(), scratch):
            times = times + 1 if id == last else 1
            last = id
            # An id counts once, however often it is given.
            if times == 2:
                twice += 1
                some += [id] if len(some) < 4 else []
        if twice:
            raise DataError(
                f"column {self._columns['id']}: {twice:,} ids are given more than once: "
                f"{first_three(some)}; give another --id-column, or none to number the rows"
            )


# What a column has to be, for a message.
NEEDED = {
    "image": "binary",
    "label": "numbers or strings",
    "caption": "a string, or a list of them",
    "id": "a string or an integer",
}
# Names of columns that are probably labels or captions.
LIKELY = {
    "label": ("label", "labels", "class", "class_id", "cls", "target", "fine_label"),
    "caption": ("caption", "captions", "text", "txt", "prompt"),
}


def _expand(given_files: Sequence[Path]) -> list[Path]:
    """The files, and those of the folders. Raises DataError for none, and for one given twice."""
    files: list[Path] = []
    for path in given_files:
        files += _in_folder(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"there are no *.parquet in {first_three(given_files)}; correct --files")
    refuse_twice("--files", files)
    return files


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder. Raises DataError where they are of several splits."""
    files = sorted(folder.glob("*.parquet"))
    refuse_splits(folder, splits_in(files), "give the files of one with --files")
    return files


def _large_texts(file: pq.ParquetFile, group: int, name: str) -> Iterator[pa.Array]:
    for batch in file.iter_batches(TEXTS_READ, row_groups=[group], columns=[name]):
        yield batch.column(name).cast(pa.large_string())


def _version(path: Path) -> tuple[int, int]:
    """A file's size, and when it was written."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(
        pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
    )


def _fits(key: str, type: pa.DataType) -> bool:
    """Whether a column of this type can be the images, the labels, the captions or the ids."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    if key == "image":
        # Hugging Face's struct of bytes and path
        if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0:
            type = type.field("bytes").type
        return bool(
            pa.types.is_binary(type)
            or pa.types.is_large_binary(type)
            or pa.types.is_binary_view(type)
        )
    if key == "caption":
        lists = (
            pa.types.is_list(type)
            or pa.types.is_large_list(type)
            or pa.types.is_fixed_size_list(type)
        )
        return _is_text(type.value_type if lists else type)
    return bool(
        _is_text(type)
        or pa.types.is_integer(type)
        or (key == "label" and pa.types.is_floating(type))
    )


def _text(value: pa.Scalar) -> tuple[str, bool]:
    """The text of a large_string, and whether it is UTF-8, which Arrow does not check."""
    # Bytes that are not UTF-8 are shown as \xNN, so that ids stay different.
    data = value.cast(pa.large_binary()).as_py()
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode(errors="backslashreplace"), False


def _largest(path: Path, group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """Bytes of the largest chunk of these columns that shrinks to a quarter when compressed; at
    least 1. Raises DataError for one that is made huge so."""
    # Images do not shrink. A dictionary may repeat one large value in every row.
    largest = 1
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        size = column.total_uncompressed_size
        stored = column.total_compressed_size
        if size > MOST_BYTES and size > 100 * stored:
            raise DataError(
                f"{path}: column {column.path_in_schema} expands from {stored:,} bytes to "
                f"{size:,}, more than {MOST_BYTES:,}; write smaller row groups, or leave it out "
                "of --files"
            )
        if size > 4 * stored:
            largest = max(largest, size)
    return largest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes errors of reading a file a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}); restore it, or leave it out of --files"
        ) from error


def _class_names(path: Path, label_column: str) -> tuple[str, ...]:
    """The names of the classes, from the schema's own `classes` or Hugging Face's description of
    the column; () where it has neither."""
    metadata = pq.read_schema(path).metadata or {}
    # Whatever else stands there is not ours to read, and may be anything.
    try:
        # Written as a JSON list, or as names with commas between them.
        if b"classes" in metadata:
            text = metadata[b"classes"].decode()
            names = from_json(text) if text.lstrip().startswith("[") else text.split(",")
            return tuple(map(str, names))
        description = from_json(metadata.get(b"huggingface", b"{}"))
        features = description.get("info", {}).get("features", {})
        return tuple(map(str, features.get(label_column, {}).get("names") or ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: the names of classes in its schema cannot be read ({error!r}); write it anew"
        ) from error


def _footer(path: Path) -> bytes:
    """The description of a file's columns at its end: places, sizes and statistics, which differ
    where the content does."""
    # The last 8 bytes are the footer's length and a magic number.
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read(length)


def main(args: list[str] | None = None) -> int:
    return program.main(Parquet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
