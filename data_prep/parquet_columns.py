"""The columns of Parquet files that are packed: whether they fit, and their labels and ids."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.fingerprints import fingerprint
from data_prep.hashes import Hashes, given_twice
from data_prep.listing import Found, Writer
from data_prep.parquet_files import (
    TEXTS_READ,
    class_names,
    fits,
    footer,
    is_text,
    largest_chunk,
    reading,
    text_of,
    texts_of_group,
)
from data_prep.sources import class_labels, first_three
from largescale.errors import DataError

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


class Columns:
    """The columns of all files; rows are counted through them. `names`: the name of the column of each
    key in NEEDED, or None.

    Raises DataError for a column that is missing, or of a type that does not fit.
    """

    def __init__(self, files: Sequence[Path], names: Mapping[str, str | None]) -> None:
        self._files, self._names = files, names
        # Every file's columns are checked before the labels of any are read.
        self._rows = list(map(self._check, files))
        self.starts = [0, *accumulate(self._rows)]
        self._label_of: dict[str, int] = {}

    def check_values(self, writer: Writer) -> Found:
        """What is known once all labels and ids are read. Raises DataError for bad ones."""
        found = Found({})
        if self._names["label"]:
            self._label_of = self._read_labels(found)
        if self._names["id"]:
            self._check_ids(writer.scratch)
        # The files' footers stand for their content, which would take hours to hash.
        found.facts["fingerprint"] = fingerprint(
            (name or "" for name in self._names.values()),
            found.class_names,
            map(str, self._rows),
            self._labels() if self._names["label"] else b"",
            chain.from_iterable(self.ids()) if self._names["id"] else (),
            *map(footer, self._files),
        )
        found.facts["labels"] = self._label_of
        return found

    def _check(self, path: Path) -> int:
        """Raises DataError for a column that is missing, or of a type that does not fit; returns
        the number of rows."""
        with reading(path), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            rows = int(file.metadata.num_rows)
        # The message lists the columns that there are: their names differ between data sets.
        for key, name in self._names.items():
            if name is None:
                continue
            if name not in schema.names:
                what = "does not exist"
            elif not fits(key, schema.field(name).type):
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
        name = str(self._names[key])
        nulls, first_null = 0, ""
        row = 0
        for path in self._files:
            with reading(path), pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    # Sizes are checked before a column is expanded. Asked for a file as a whole,
                    # pyarrow keeps what it has read until the end.
                    largest_chunk(path, file.metadata.row_group(group), [name])
                    for column in texts_of_group(file, group, name):
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
        number = bisect(self.starts, row) - 1
        return f"{self._files[number]}, row {row - self.starts[number]}"

    def not_packed(self) -> list[str]:
        """Notes on columns that look like labels or captions and were not asked for."""
        schema = pq.read_schema(self._files[0])
        notes = []
        for key, names in LIKELY.items():
            if self._names[key] is not None:
                continue
            for field in schema:
                if field.name.lower() in names and fits(key, field.type):
                    column = f"column {field.name} ({field.type})"
                    notes.append(f"{column} is not packed (--{key}-column {field.name})")
        return notes

    def _read_labels(self, found: Found) -> dict[str, int]:
        """The number of each label, as it stands in the column; the classes are added to `found`."""
        name = str(self._names["label"])
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
                text, is_utf8 = text_of(value)
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
        numeric = not any(is_text(pq.read_schema(file).field(name).type) for file in self._files)
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
        first = class_names(self._files[0], column)
        for file in self._files[1:]:
            if class_names(file, column) != first:
                raise DataError(
                    f"{file} has other names of classes than {self._files[0]}; pack them each on "
                    "its own"
                )
        return first

    def ids(self) -> Iterator[list[str]]:
        """The ids of all rows, many at a time: their numbers, where no column has them. Bytes that are
        not UTF-8 stand as \\xNN."""
        if not self._names["id"]:
            for start in range(0, self.starts[-1], TEXTS_READ):
                yield list(map(str, range(start, min(start + TEXTS_READ, self.starts[-1]))))
            return
        for column in self._read("id"):
            # All at once is faster. It fails where an id is not UTF-8.
            try:
                ids = column.to_pylist()
            except UnicodeDecodeError:
                ids = [text for text, _ in map(text_of, column)]
            yield ids

    def _check_ids(self, scratch: Path) -> None:
        """Raises DataError for ids that are given more than once."""
        hashes = Hashes(scratch)
        for ids in self.ids():
            hashes.add(ids)
        count, twice = given_twice(hashes, self.ids)
        if count:
            raise DataError(
                f"column {self._names['id']}: {count:,} ids are given more than once: "
                f"{first_three(id for _, _, id in twice)}; give another --id-column, or none to number "
                "the rows"
            )
