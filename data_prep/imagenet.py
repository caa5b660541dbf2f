"""Packs labelled images: class folders as ImageNet has them, or a CSV of files and labels.

    python -m data_prep.imagenet --images ILSVRC2012/train --vae stabilityai/sd-vae-ft-ema --out
      data/imagenet256
    python -m data_prep.imagenet --images pictures --labels labels.csv --classes classes.txt --vae
      none --out data/mine

Without --labels the folders in --images are the classes, in sorted order, as torchvision has it:
ImageNet's 0 .. 999.
"""

import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep import packing
from data_prep.sources import (
    SPLIT,
    ListSource,
    class_labels,
    first_three,
    list_images,
    missing_files,
    name_of,
    refuse_splits,
    relative_name,
    text_of,
)
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

    def source(self) -> ListSource:
        return read(self.images, self.labels, self.classes, self.skip_missing)


class Row(NamedTuple):
    """A row of the CSV file."""

    line: int
    label: str


def read(
    images: Path,
    labels: Path | None = None,
    classes: Path | None = None,
    skip_missing: bool = False,
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
            text_of(path)  # raises the error of a file that is missing
            facts |= {key: str(path.resolve()), f"{key}_sha256": sha256(path)}
    if labels is None:
        return _from_folders(images, names, classes, facts)
    return _from_csv(images, labels, names, skip_missing, facts)


def _from_folders(
    images: Path, names: Sequence[str] | None, classes: Path | None, facts: dict[str, Any]
) -> ListSource:
    # Images beside the folders have no class. They are counted, and not packed.
    files, others = list_images(images, names)
    inside = [file for file in files if "/" in file]
    folders = []
    for entry in os.scandir(images):
        if entry.is_dir() and not entry.name.startswith("."):
            folders.append(entry.name)
    folders.sort()
    if not folders or (files and not inside):
        raise DataError(
            f"{images} has no class folders with images; give --labels FILE, or for images without "
            "labels python -m data_prep.folder"
        )

    # The folder of an image is its class.
    class_of = [file.partition("/")[0] for file in inside]
    filled = set(class_of)
    if names is None:
        # A folder without images would shift the labels behind it: probably a mistake.
        splits = [folder for folder in folders if SPLIT.fullmatch(folder.lower())]
        refuse_splits(
            images, splits, "give one with --images, or if they are classes, --classes FILE"
        )
        empty = sorted(set(folders) - filled)
        if inside and empty:
            raise DataError(
                f"{images} has {len(empty):,} folders without images, which would be classes: "
                f"{first_three(empty)}; remove them, or name the classes with --classes FILE"
            )
        names = folders
    elif unknown := sorted(filled - set(names)):
        # Images of a class without a label cannot be left out silently.
        raise DataError(
            f"{images} has {len(unknown)} folders that {classes} does not name: "
            f"{first_three(unknown)}; add them to it, or leave out --classes to take the folders' "
            "sorted names"
        )

    # A class's label is its place in the list.
    index = dict(zip(names, range(len(names)), strict=True))
    labels = np.fromiter(map(index.__getitem__, class_of), np.int32, len(class_of))
    facts |= {
        "images_listed": len(files),
        "images_outside_classes": len(files) - len(inside),
        "other_files": others,
    }
    return _source(images, inside, labels, len(names), names, facts, [])


def _from_csv(
    images: Path, path: Path, names: Sequence[str] | None, skip_missing: bool, facts: dict[str, Any]
) -> ListSource:
    try:
        rows = _rows(path)
    except csv.Error as error:  # a field of more than 131,072 characters
        raise DataError(f"{path} is no CSV ({error}); give one line for each image") from error

    # How often each label occurs, and the file that has it first.
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for file, row in rows.items():
        counts[row.label] += 1
        first.setdefault(row.label, file)

    def where(label: str) -> str:
        return f"{path}, line {rows[first[label]].line} ({first[label]})"

    # Numbers are labels; words are sorted, or looked up in --classes.
    index_of, names, count = class_labels(
        counts, names or (), where, "correct it, or give the label map with --classes FILE"
    )

    # In the order of the file, which is that of the data set.
    missing, unlisted = missing_files(images, list(rows), path, skip_missing)
    kept: list[str] = []
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    for file, row in rows.items():
        if file in missing:
            skipped.append((file, "the file is missing"))
        else:
            kept.append(file)
            labels.append(index_of[row.label])
    facts |= {
        "images_listed": len(rows),
        "images_missing": len(missing),
        "images_not_listed": unlisted,
    }
    return _source(images, kept, np.array(labels, np.int32), count, names, facts, skipped)


def _source(
    images: Path,
    files: Sequence[str],
    labels: npt.NDArray[np.int32],
    num_classes: int,
    names: Sequence[str],
    facts: dict[str, Any],
    skipped: list[tuple[str, str]],
) -> ListSource:
    """The source, with a note on classes that have no images."""
    # Folders without images are errors before this; a list of classes may name some.
    numbers = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist()
    empty = list(map(names.__getitem__, numbers)) if names else numbers
    facts |= {"num_classes": num_classes, "classes_without_images": empty}
    source = ListSource(
        f"imagenet-{name_of(images)}",
        images,
        files,
        labels=labels if len(labels) else None,
        num_classes=num_classes,
        class_names=names,
        facts=facts,
        skipped=skipped,
    )
    if empty:
        source.notes.append(f"{len(empty):,} classes without images ({first_three(empty)})")
    return source


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


def _rows(path: Path) -> dict[str, Row]:
    """The rows by file name, in the order of the CSV file."""
    rows: dict[str, Row] = {}
    # With newline="" csv itself finds the ends of lines, also inside quotes.
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""))
    if not {"file", "label"} <= set(reader.fieldnames or ()):
        raise DataError(
            f"{path} has the columns {', '.join(reader.fieldnames or ())}; its first line must name "
            "file and label"
        )
    for row in reader:
        if not row["file"] or not (row["label"] or "").strip():
            raise DataError(
                f"{path}, line {reader.line_num}: no file, or no label; complete the line, or "
                "remove it"
            )
        file = relative_name(row["file"].strip(), f"{path}, line {reader.line_num}")
        if file in rows:
            raise DataError(
                f"{path}, line {reader.line_num}: {file} is given a second time, first in line "
                f"{rows[file].line}; keep one"
            )
        rows[file] = Row(reader.line_num, row["label"].strip())
    if not rows:
        raise DataError(f"{path} lists no images; give one line for each")
    return rows


def main(args: list[str] | None = None) -> int:
    return packing.main(ImageNet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
