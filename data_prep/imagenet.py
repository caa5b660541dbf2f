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
from typing import Any

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


def read(
    images: Path,
    labels: Path | None = None,
    classes: Path | None = None,
    skip_missing: bool = False,
) -> ListSource:
    """From class folders sorted by path, from a CSV in its order.

    Raises DataError for a label that is not in the label map, a file given twice, and images that
    are missing.
    """
    names = _class_names(classes) if classes else None
    facts: dict[str, Any] = {"program": "data_prep.imagenet", "images": str(images.resolve())}
    for key, path in {"labels": labels, "classes": classes}.items():
        if path:
            text_of(path)  # raises what is to be said of a file that is not there
            facts |= {key: str(path.resolve()), f"{key}_sha256": sha256(path)}
    if labels is None:
        return _from_folders(images, names, classes, facts)
    return _from_csv(images, labels, names, skip_missing, facts)


def _from_folders(
    images: Path, names: Sequence[str] | None, classes: Path | None, facts: dict[str, Any]
) -> ListSource:
    files, others = list_images(images, names)
    inside = [file for file in files if "/" in file]
    folders = sorted(
        entry.name
        for entry in os.scandir(images)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders or (files and not inside):
        raise DataError(
            f"{images} has no class folders with images; give --labels FILE, or for images without "
            "labels python -m data_prep.folder"
        )
    filled = {file.partition("/")[0] for file in inside}
    if names is None:
        splits = [folder for folder in folders if SPLIT.fullmatch(folder.lower())]
        refuse_splits(
            images, splits, "give one with --images, or if they are classes, --classes FILE"
        )
        if inside and (empty := [folder for folder in folders if folder not in filled]):
            raise DataError(
                f"{images} has {len(empty):,} folders without images, which would be classes: "
                f"{first_three(empty)}; remove them, or name the classes with --classes FILE"
            )
        names = folders
    elif unknown := sorted(filled - set(names)):
        raise DataError(
            f"{images} has {len(unknown)} folders that {classes} does not name: "
            f"{first_three(unknown)}; add them to it, or leave out --classes to take the folders' "
            "sorted names"
        )
    index = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((index[file.partition("/")[0]] for file in inside), np.int32, len(inside))
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
        lines = _rows(path)  # file: (line, label)
    except csv.Error as error:  # a field of more than 131,072 characters
        raise DataError(f"{path} is no CSV ({error}); give one line for each image") from error

    def where(label: str) -> str:
        return next(
            f"{path}, line {line} ({file})"
            for file, (line, found) in lines.items()
            if found == label
        )

    index_of, names, count = class_labels(
        Counter(label for _, label in lines.values()),
        names or (),
        where,
        "correct it, or give the label map with --classes FILE",
    )
    missing, unlisted = missing_files(images, list(lines), path, skip_missing)
    kept = [file for file in lines if file not in missing]
    facts |= {
        "images_listed": len(lines),
        "images_missing": len(missing),
        "images_not_listed": unlisted,
    }
    return _source(
        images,
        kept,
        np.array([index_of[lines[file][1]] for file in kept], np.int32),
        count,
        names,
        facts,
        [(file, "the file is missing") for file in lines if file in missing],
    )


def _source(
    images: Path,
    files: Sequence[str],
    labels: npt.NDArray[np.int32],
    num_classes: int,
    names: Sequence[str],
    facts: dict[str, Any],
    skipped: list[tuple[str, str]],
) -> ListSource:
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0).tolist()
    facts |= {
        "num_classes": num_classes,
        "classes_without_images": [names[i] if names else i for i in empty],
    }
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
    if empty := facts["classes_without_images"]:
        source.notes.append(f"{len(empty):,} classes without images ({first_three(empty)})")
    return source


def _class_names(path: Path) -> list[str]:
    names = [line.strip() for line in text_of(path).rstrip().split("\n")]
    if not all(names) or len(set(names)) != len(names):
        line = next(i for i, name in enumerate(names) if not name or name in names[:i]) + 1
        raise DataError(
            f"{path}, line {line}: {names[line - 1]!r} is empty or given twice; write each class "
            "name once, one a line"
        )
    return names


def _rows(path: Path) -> dict[str, tuple[int, str]]:
    """file -> (line, label), in the file's order."""
    rows: dict[str, tuple[int, str]] = {}
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
                f"{rows[file][0]}; keep one"
            )
        rows[file] = reader.line_num, row["label"].strip()
    if not rows:
        raise DataError(f"{path} lists no images; give one line for each")
    return rows


def main(args: list[str] | None = None) -> int:
    return packing.main(ImageNet, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
