"""A CSV file of images and labels, however long it is, some rows at a time."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data_prep.sources import not_utf8_file, relative_name
from largescale.errors import DataError

# Rows that are read at a time: one by one, ten million take twice as long. More of them would have
# Python look for garbage among them.
AT_A_TIME = 512
# What a name has that is not in its shortest form, or does not lie below the folder of images; in
# names with a line's end around each. Some names that are fine have it too.
_ODD = ("\0", "//", "/.", "\n.", "\n/", "/\n")


@dataclass(frozen=True)
class Place:
    """Where a row is, for a message. `number`: of the row below the header, from 0; empty lines do
    not count."""

    path: Path
    number: int

    @property
    def line(self) -> int:
        """The row's last line, from 1; the file is read for it."""
        with self.path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text)
            next(islice(filter(None, reader), self.number + 1, None))
            return reader.line_num

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"


class Header(NamedTuple):
    """Which fields of a row are the file and the label, and how many there are."""

    file: int
    label: int
    width: int


def read_rows(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The files and the labels, some rows at a time, in the order of the file. Raises DataError for
    one that cannot be read or is not UTF-8, and for a row that lacks either, has more fields than the
    header, or names a file that is not below the folder of images."""
    # With newline="" csv itself finds the ends of lines, also inside quotes.
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text)
            try:
                header = _header(path, next(reader, []))
                start = 0
                rows = filter(None, reader)
                while some := list(islice(rows, AT_A_TIME)):
                    yield _plain(some, header) or _checked(path, some, start, header)
                    start += len(some)
            except csv.Error as error:  # a field of more than 131,072 characters
                raise DataError(
                    f"{path} is no CSV ({error}, line {reader.line_num}); give one line for each "
                    "image, and close every quote"
                ) from error
    except UnicodeDecodeError as error:
        raise not_utf8_file(path) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); correct the path") from error


def _header(path: Path, names: Sequence[str]) -> Header:
    if not names:
        raise DataError(
            f"{path} is empty, or begins with an empty line; its first line must name file and label"
        )
    if not {"file", "label"} <= set(names):
        raise DataError(
            f"{path} has the columns {', '.join(names)}; its first line must name file and label"
        )
    # Of a name that is given twice the last counts.
    place = {name: number for number, name in enumerate(names)}
    return Header(place["file"], place["label"], len(names))


def _plain(rows: list[list[str]], header: Header) -> tuple[list[str], list[str]] | None:
    """The files and labels of rows that have nothing odd; None where one may have."""
    # All rows at once. A row that is looked at by itself costs ten times as much.
    if set(map(len, rows)) != {header.width}:
        return None
    files = list(map(str.strip, map(itemgetter(header.file), rows)))
    labels = list(map(str.strip, map(itemgetter(header.label), rows)))
    text = "\n".join(["", *files, ""])
    if not all(files) or not all(labels) or any(odd in text for odd in _ODD):
        return None
    return files, labels


def _checked(
    path: Path, rows: list[list[str]], start: int, header: Header
) -> tuple[list[str], list[str]]:
    """The files and labels of rows, each of which is looked at; `start`: the number of the first."""
    files, labels = [], []
    for number, row in enumerate(rows, start):
        place = Place(path, number)
        # A comma at the end of a line makes an empty field.
        if any(map(str.strip, row[header.width :])):
            raise DataError(
                f"{place}: {len(row)} fields, and the header has {header.width}; put a name that has "
                "a comma in quotes"
            )
        complete = len(row) > max(header.file, header.label)
        file = row[header.file].strip() if complete else ""
        label = row[header.label].strip() if complete else ""
        if not file or not label:
            raise DataError(f"{place}: no file, or no label; complete the line, or remove it")
        files.append(relative_name(file, place))
        labels.append(label)
    return files, labels
