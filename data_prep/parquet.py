"""Packs Parquet files that hold encoded images in a column, such as Hugging Face's data sets.

python -m data_prep.parquet --files train.parquet --label-column label --vae none --resolution 32
--out data/cifar10
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import packing, program
from data_prep.images import Unusable
from data_prep.listing import Listings
from data_prep.parquet_columns import Columns
from data_prep.parquet_files import largest_chunk, reading, text_of, version
from data_prep.source_files import SourceFile, other_content, seen, sizes
from data_prep.sources import (
    Item,
    Skips,
    clean,
    first_three,
    given,
    name_of,
    refuse_splits,
    refuse_twice,
    splits_in,
    unusable,
)
from largescale.errors import DataError

# Rows that are read at a time: images are large.
ROWS_READ = 64
# Bytes that are read at a time, if every value were as large as its column chunk.
BYTES_READ = 2**28


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

    def source(self, listings: Listings) -> "ParquetSource":
        return ParquetSource(
            self.files,
            self.image_column,
            self.label_column,
            self.caption_column,
            self.id_column,
            listings,
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
        self._names = {
            "image": image_column,
            "label": label_column,
            "caption": caption_column,
            "id": id_column,
        }
        self._columns = columns = Columns(self._files, self._names)
        self._starts = columns.starts
        self.size: int | None = self._starts[-1]
        if not self.size:
            raise DataError(f"there are no rows in {first_three(self._files)}; correct --files")

        self.name = f"parquet-{name_of(files[0])}"
        self.captioned = caption_column is not None
        self.skipped: Skips = []
        self.notes = columns.not_packed()
        splits = splits_in(self._files)
        if len(splits) > 1:
            self.notes.append(f"the splits {', '.join(splits)} together")

        # Labels and ids are read as streams, to be checked, by the rank that comes first; and with the
        # images of a part again.
        files_now = [[str(path), *version(path)] for path in self._files]
        key = {"program": "data_prep.parquet", "columns": self._names, "files": files_now}
        self._listing = (listings or Listings()).get(key, (), columns.check_values)
        found = self._listing.found
        self._label_of: dict[str, int] = found.facts["labels"]
        self.class_names: Sequence[str] = tuple(found.class_names)
        self.num_classes = found.num_classes
        self.notes += found.notes
        self.fingerprint: str = found.facts["fingerprint"]
        self.files: Sequence[SourceFile] = seen(map(str, self._files))
        self.facts = self._facts()

    def _facts(self) -> dict[str, Any]:
        return {
            "program": "data_prep.parquet",
            "files": list(map(str, self._files)),
            "rows": self.size,
            "bytes": sum(sizes(self.files)),
            "columns": self._names,
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
                with reading(file):
                    yield from self._rows(file, first, start, stop)

    def ids(self) -> Iterator[Sequence[str]]:
        return self._columns.ids()

    def changed(self) -> str | None:
        return other_content(self.files)

    def _rows(self, path: Path, row: int, start: int, stop: int) -> Iterator[Item]:
        """The items of the rows in [start, stop); `row` is the number of the file's first."""
        # Each once: two options may name the same column.
        columns = list(dict.fromkeys(filter(None, self._names.values())))
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if row < stop and start < row + group.num_rows:
                    # Fewer rows at a time where one value may be very large.
                    rows = min(ROWS_READ, BYTES_READ // largest_chunk(path, group, columns))
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
        id_column = self._names["id"]
        if id_column:
            ids = list(map(text_of, batch.column(id_column).cast(pa.large_string())))
        else:
            ids = [(str(at + i), True) for i in range(len(batch))]
        # By their text, whatever the column's type: _read_labels has read labels as text.
        label_column = self._names["label"]
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
            value = batch.column(self._names["image"])[i]
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
        if not self._names["caption"]:
            return ()
        try:
            value = batch.column(self._names["caption"])[i].as_py()
        except UnicodeDecodeError as error:
            raise Unusable(f"its caption is not UTF-8 ({error.reason})") from error
        texts = [value] if isinstance(value, str) else value or ()
        captions = clean(filter(None, texts))
        if not captions:
            raise Unusable("it has no caption")
        return captions


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


def main(args: list[str] | None = None) -> int:
    return program.main(Parquet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
