"""Packs labelled images: class folders as ImageNet has them, or a CSV of files and labels.

    python -m data_prep.imagenet --images ILSVRC2012/train --vae stabilityai/sd-vae-ft-ema --out
      data/imagenet256
    python -m data_prep.imagenet --images pictures --labels labels.csv --classes classes.txt --vae
      none --out data/mine

Without --labels the folders in --images are the classes, in sorted order, as torchvision has it:
ImageNet's 0 .. 999.
"""

import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep import packing, program
from data_prep.labels_csv import Place, read_rows
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import (
    MOST_CLASSES,
    SPLIT,
    ListSource,
    class_labels,
    first_three,
    name_of,
    refuse_splits,
    require_file,
    require_outside,
    some_missing,
    text_of,
)
from data_prep.spool import Spool
from data_prep.walk import Missing, Walk, missing_files, scan
from largescale.errors import DataError
from largescale.host.files import sha256


@dataclass(frozen=True, kw_only=True)
class ImageNet(packing.Packing):
    images: Path
    """The folder of class folders, or the one that the files of --labels lie in."""
    labels: Path | None = None
    """A CSV file with a header that has file (relative to --images) and label: whole numbers, or
    class names, which are numbered in sorted order without --classes."""
    classes: Path | None = None
    """A file with one class name a line, such as n01440764; the line's number, from 0, is the
    label. Folders without images that it does not name are ignored."""
    skip_missing: bool = False
    """Pack what is there when images that the CSV file names are missing; without this they are an
    error."""

    def source(self, listings: Listings) -> ListSource:
        # A list names its images, wherever the set lies.
        if self.labels is None:
            require_outside(self.out, self.images)
        return read(self.images, self.labels, self.classes, self.skip_missing, listings)


# Some rows of the CSV file: the files, and which of the labels each has.
Rows = tuple[list[str], list[int]]


def read(
    images: Path,
    labels: Path | None = None,
    classes: Path | None = None,
    skip_missing: bool = False,
    listings: Listings | None = None,
) -> ListSource:
    """Labelled images: from class folders sorted by path, from a CSV in its order.

    Raises DataError for a label that is not in the label map, a file given twice, and images that
    are missing.
    """
    names = _class_names(classes) if classes else None
    facts: dict[str, Any] = {"program": "data_prep.imagenet", "images": str(images.resolve())}
    # Lists are identified by their content, wherever they are.
    for key, path in {"labels": labels, "classes": classes}.items():
        if path:
            require_file(path)
            facts |= {key: str(path.resolve()), f"{key}_sha256": sha256(path)}

    def make(writer: Writer) -> Found:
        if labels is None:
            return _from_folders(writer, images, names, classes, facts)
        return _from_csv(writer, images, labels, names, skip_missing, facts)

    asked = facts | {"skip_missing": skip_missing}
    listing = (listings or Listings()).get(asked, ("label",), make)
    return ListSource(f"imagenet-{name_of(images)}", images, listing)


def _from_folders(
    writer: Writer,
    images: Path,
    names: Sequence[str] | None,
    classes: Path | None,
    facts: dict[str, Any],
) -> Found:
    folders = _folders_in(images)
    # A label is the place of a folder's name in the list of classes, or among all folders, sorted.
    known = dict(zip(names or folders, range(len(names or folders)), strict=True))
    walk = Walk(images, names, writer.scratch, writer.listed)

    # The folder of an image is its class. Images beside the folders have none: they are counted, and
    # not packed.
    counts: Counter[str] = Counter()
    outside = 0
    for files in walk:
        folder, slash, _ = files[0].partition("/")
        if slash:
            counts[folder] += len(files)
            # -1 is never packed: _check_folders refuses all such folders in one message.
            writer.extend(files, known.get(folder, -1))
        else:
            outside += len(files)
    if not folders or (outside and not counts):
        raise DataError(
            f"{images} has no class folders with images; give --labels FILE, or for images without "
            "labels python -m data_prep.folder"
        )
    _check_folders(images, folders, set(counts), names, classes)
    facts = facts | {
        "images_listed": counts.total() + outside,
        "images_outside_classes": outside,
        "other_files": walk.others,
    }
    return _found(facts, {known[folder] for folder in counts}, len(known), list(known))


def _folders_in(images: Path) -> list[str]:
    """The folders in one, sorted. Raises DataError where it cannot be listed."""
    _, entries = scan(str(images))
    return sorted(entry.name for entry in chain.from_iterable(entries) if entry.is_dir())


def _check_folders(
    images: Path,
    folders: Sequence[str],
    filled: set[str],
    names: Sequence[str] | None,
    classes: Path | None,
) -> None:
    """Raises DataError for folders that are probably no classes, and for images of none."""
    if names is None:
        # A folder without images would shift the labels behind it: probably a mistake.
        splits = [folder for folder in folders if SPLIT.fullmatch(folder.lower())]
        refuse_splits(
            images, splits, "give one with --images, or if they are classes, --classes FILE"
        )
        empty = sorted(set(folders) - filled)
        if filled and empty:
            raise DataError(
                f"{images} has {len(empty):,} folders without images, which would be classes: "
                f"{first_three(empty)}; remove them, or name the classes with --classes FILE"
            )
    elif unknown := sorted(filled - set(names)):
        # Images of a class without a label cannot be left out silently.
        raise DataError(
            f"{images} has {len(unknown)} folders that {classes} does not name: "
            f"{first_three(unknown)}; add them to it, or leave out --classes to take the folders' "
            "sorted names"
        )


def _from_csv(
    writer: Writer,
    images: Path,
    path: Path,
    names: Sequence[str] | None,
    skip_missing: bool,
    facts: dict[str, Any],
) -> Found:
    # Read once, for the labels that there are and the images that are missing; then once to write.
    seen = Labels(path)
    rows: Spool[Rows] = Spool((), writer.scratch)

    def files() -> Iterator[list[str]]:
        for some in seen.read():
            rows.add(some)
            yield some[0]

    again = partial(map, itemgetter(0), rows)
    missing = missing_files(images, files(), again, writer.scratch, writer.listed)
    if not seen.counts:
        raise DataError(f"{path} lists no images; give one line for each")
    if missing.twice:
        first, second, file = missing.twice
        raise DataError(
            f"{Place(path, second)}: {file} is given a second time, first in line "
            f"{Place(path, first).line}; keep one"
        )

    # Numbers are labels; words are sorted, or looked up in --classes.
    index_of, names, count = class_labels(
        seen.counts,
        names or (),
        seen.where,
        "correct it, or give the label map with --classes FILE",
    )
    if missing.count and not skip_missing:
        raise some_missing(missing, seen.counts.total(), path, images)

    filled = _write(writer, rows, [index_of[label] for label in seen.counts], missing)
    facts = facts | {
        "images_listed": seen.counts.total(),
        "images_missing": missing.count,
        "images_not_listed": missing.unlisted,
    }
    return _found(facts, filled, count, names)


class Labels:
    """The labels of a CSV file, in the order in which each first comes: how often, and where."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._numbers: dict[str, int] = {}
        self._first: list[tuple[Place, str]] = []

    def read(self) -> Iterator[Rows]:
        """All rows of the file, with the numbers of the labels."""
        start = 0
        for files, labels in read_rows(self._path):
            self.counts.update(labels)
            if len(self.counts) > len(self._numbers):
                self._add(start, files, labels)
            yield files, list(map(self._numbers.__getitem__, labels))
            start += len(files)

    def _add(self, start: int, files: list[str], labels: list[str]) -> None:
        """Numbers the labels that are new."""
        for i, label in enumerate(labels):
            if label not in self._numbers:
                self._numbers[label] = len(self._numbers)
                self._first.append((Place(self._path, start + i), files[i]))
        # Each is in memory. So many are ids, or the names of files.
        if len(self._numbers) > MOST_CLASSES:
            raise DataError(
                f"{self._path} has more than {MOST_CLASSES:,} labels; the column label must name "
                "classes"
            )

    def where(self, label: str) -> str:
        """The place at which a label first comes."""
        place, file = self._first[self._numbers[label]]
        return f"{place} ({file})"


def _write(writer: Writer, rows: Iterable[Rows], classes: list[int], missing: Missing) -> set[int]:
    """Writes the rows in the order of the file, which is that of the data set; returns the classes
    that have images. `classes`: of each number of a label."""
    filled: set[int] = set()
    start = 0
    for files, numbers in rows:
        labels = [classes[number] for number in numbers]
        if missing.count:
            gone = missing.among(start, len(files))
            there = [not is_gone for is_gone in gone]
            for file in compress(files, gone):
                writer.skip(file, "the file is missing")
            start += len(files)
            files, labels = list(compress(files, there)), list(compress(labels, there))
        filled.update(labels)
        writer.extend(files, labels)
    return filled


def _found(
    facts: dict[str, Any], filled: Container[int], num_classes: int, names: Sequence[str]
) -> Found:
    """What is known of the images, with a note on classes that have none."""
    # Folders without images are errors before this; a list of classes may name some.
    empty: list[Any] = []
    for number in range(num_classes):
        if number not in filled:
            empty.append(names[number] if names else number)
    facts |= {"num_classes": num_classes, "classes_without_images": empty}
    notes = []
    if empty:
        notes.append(f"{len(empty):,} classes without images ({first_three(empty)})")
    return Found(facts, num_classes, list(names), notes)


def _class_names(path: Path) -> list[str]:
    """The names in a file, one a line. Raises DataError for one that is empty or given twice."""
    # A dict for its order: a line's number is the label.
    names: dict[str, None] = {}
    for number, line in enumerate(text_of(path).rstrip().split("\n"), start=1):
        name = line.strip()
        if not name or name in names:
            raise DataError(
                f"{path}, line {number}: {name!r} is empty or given twice; write each class name "
                "once, one a line"
            )
        names[name] = None
    return list(names)


def main(args: list[str] | None = None) -> int:
    return program.main(ImageNet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
