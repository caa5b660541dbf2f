"""Where images come from: the sources that programs give to data_prep.packing, and the checks that
they share."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

from data_prep.fingerprints import fingerprint
from data_prep.images import Unusable
from data_prep.listing import Listing
from data_prep.source_files import SourceFile, other_content, seen, sizes, source_changed
from data_prep.walk import SUFFIXES, Missing
from largescale.errors import DataError
from largescale.host.files import is_unicode
from largescale.host.launch import printable

# Words in file names, and numbers as they stand in tables.
SPLIT = re.compile("(train|training|val|valid|validation|test|testing|dev)[0-9]*")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
# A label beyond this is an id, or damage.
MOST_CLASSES = 2**20

# Facts that count what a list does not hold, or should not; and what they are called in a note.
NOTES = {
    "images_outside_classes": "images outside class folders",
    "images_missing": "listed images missing",
    "images_not_listed": "images not listed",
    "images_without_caption": "images without a caption",
    "captions_empty": "empty captions",
    "other_files": "other files",
}


@dataclass(frozen=True, slots=True)
class Item:
    """An image to pack. `read` gives the file's content; it raises OSError, or Unusable with the
    reason."""

    id: str  # unique in the data set
    read: Callable[[], bytes]
    label: int = 0
    captions: tuple[str, ...] = ()
    held: int = 0  # bytes that it holds in memory until it is read


class Source(Protocol):
    """The images that a packing program reads. Everything that can be wrong with lists and labels
    is found when a source is made."""

    name: str
    num_classes: int  # 0 without labels
    captioned: bool
    class_names: Sequence[str]  # () where unknown
    facts: dict[str, Any]  # for the manifest: what was read, plain JSON
    notes: list[str]  # what is odd about it, to be printed before the work
    fingerprint: str  # of what determines content and order, not of the pixels
    skipped: "Skips"  # left out before any image is read
    size: int | None  # items in all; None where only reading tells
    files: Sequence[SourceFile]  # that are looked at, to find whether it changes

    def parts(self, rows_per_shard: int) -> int:
        """How many parts there are; one rank packs a part on its own."""

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        """The items of a part, the same each time, in the same order."""

    def ids(self) -> Iterator[Sequence[str]] | None:
        """The ids of all items in their order, some at a time; None where only reading tells."""

    def changed(self) -> str | None:
        """What is no longer as it was when the source was made; None where nothing is known to
        be. What is gone does not count."""


class Skips(Protocol):
    """What is left out before any image is read, (id, reason) each. There may be millions."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[str, str]]: ...


class ListSource:
    """Image files below `root`, of a listing; a part is `rows_per_shard` of them. There may be
    millions, of which only a part is in memory.

    Raises DataError where there are none, and for a label outside [0, num_classes).
    """

    def __init__(self, name: str, root: Path, listing: Listing) -> None:
        found = listing.found
        self.name = name
        self.num_classes = found.num_classes
        self.class_names = found.class_names
        self.captioned = "captions" in listing.columns
        self.facts = dict(found.facts)
        self.skipped: Skips = listing.skipped
        self.notes = []
        for key, what in NOTES.items():
            if self.facts.get(key):
                self.notes.append(f"{self.facts[key]:,} {what}")
        self.notes += found.notes
        self._root = str(root)
        self._listing = listing
        self._check(root)

        # A list is identified by names, labels and captions, and its images by some of their sizes.
        paths = map(partial(os.path.join, self._root), listing.sample)
        self.files: Sequence[SourceFile] = seen(paths)
        self.facts["sizes"] = fingerprint(map(str, sizes(self.files)))
        self.size: int | None = listing.rows
        self.fingerprint = listing.fingerprint

    def _check(self, root: Path) -> None:
        """Raises DataError where there is nothing to pack, and for labels outside the classes."""
        labels = self._listing.labels
        # Where all images are skipped, the reasons help more than the folder.
        if not self._listing.rows and len(self.skipped):
            raise DataError(
                f"not one of {len(self.skipped):,} images can be packed; the first: "
                f"{first_reasons(self.skipped)}"
            )
        if not self._listing.rows:
            raise DataError(
                f"no images were found to pack in {root}; correct the folder (files "
                f"that are read end in {', '.join(SUFFIXES)})"
            )
        if labels is not None and not 0 <= labels[0] <= labels[1] < self.num_classes:
            raise DataError(
                f"labels from {labels[0]} to {labels[1]} are not in [0, "
                f"num_classes={self.num_classes})"
            )

    def parts(self, rows_per_shard: int) -> int:
        return -(-self._listing.rows // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        # Nothing is read here: a worker's thread reads the file when it decodes the item.
        first = number * rows_per_shard
        for row in self._listing.read(first, min(first + rows_per_shard, self._listing.rows)):
            path = os.path.join(self._root, row.file)
            yield Item(row.id, partial(_read, path), row.label, row.captions)

    def ids(self) -> Iterator[Sequence[str]]:
        return self._listing.ids()

    def changed(self) -> str | None:
        return other_content(self.files)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        # A link to nothing is left out. A file that is gone was there when the source was listed.
        if os.path.islink(path):
            raise
        raise source_changed(f"{path} is gone") from error


def given(data: bytes) -> Callable[[], bytes]:
    """The `read` of an item whose content is at hand."""
    return partial(bytes, data)


def unusable(reason: str) -> Callable[[], bytes]:
    """The `read` of an item that is known to lack something."""
    return partial(_raise, reason)


def _raise(reason: str) -> NoReturn:
    raise Unusable(reason)


def some_missing(missing: Missing, names: int, listed_in: Path, root: Path) -> DataError:
    """The error of a list of so many names, of which some are no files."""
    return DataError(
        f"{listed_in} names {names:,} images, and {missing.count:,} are not in {root}: "
        f"{first_three(missing.first)}; complete the folder, or pack the others with "
        "--skip-missing"
    )


def relative_name(name: str, listed_in: object) -> str:
    """`name` in its shortest form. Raises DataError for one that is not below the folder of
    images."""
    # A name that leads out of the folder could read any file.
    short = posixpath.normpath(name)
    if not name or "\0" in name or short.startswith("/") or short.split("/")[0] in (".", ".."):
        raise DataError(
            f"{listed_in}: {name!r} does not lie below --images; give file names relative to it"
        )
    return short


def class_index(label: str) -> int | None:
    """The whole number that a label is: 3 for "3" and, as pandas writes it, for "3.0"; None for one
    that is not a number. Raises ValueError for another number."""
    if not NUMBER.fullmatch(label):
        return None
    number = float(label)
    if not number.is_integer() or abs(number) >= MOST_CLASSES:
        raise ValueError(f"label {label} is not a whole number below {MOST_CLASSES:,}")
    return int(number)


def class_labels(
    counts: Mapping[str, int],
    names: Sequence[str],
    where: Callable[[str], str],
    remedy: str,
    only_numbers: bool = False,
) -> tuple[dict[str, int], Sequence[str], int]:
    """The class of each label in `counts`, which has how often each occurs; the classes' names, and
    their number.

    Labels that are all numbers, or are stated to be, are the classes' indices; others are names, of
    `names` where there are any, else numbered in the order of their code points. `where`: the place
    at which a label is first found. Raises DataError for numbers among names, numbers that are not
    whole, and labels outside the classes.
    """
    # Numbers are indices, unless some of them are among the names of a list.
    numeric = set(filter(NUMBER.fullmatch, counts))
    if only_numbers or (len(numeric) == len(counts) and not numeric & set(names)):
        labels = _numbers(counts, where, remedy)
        count = len(names) or max(labels.values(), default=-1) + 1
    else:
        # Numbers among names are most likely damage, unless a list of classes has them.
        text = [label for label in counts if label not in numeric]
        if numeric and not names:
            raise DataError(
                f"{where(text[0])}: label {text[0]!r} is not a number, as others are; {remedy}"
            )
        names = names or sorted(counts)
        count = len(names)
        index_of = dict(zip(names, range(count), strict=True))
        labels = {label: index_of.get(label, -1) for label in counts}

    outside = [label for label, index in labels.items() if not 0 <= index < count]
    if outside:
        if outside in (["-1"], ["-1.0"]):
            remedy = f"-1 often stands for no label, as in test splits: leave them out, or {remedy}"
        total = sum(map(counts.__getitem__, outside))
        raise DataError(
            f"{where(outside[0])}: label {outside[0]!r} is none of the {count:,} classes "
            f"({total:,} such labels in all); {remedy}"
        )
    return labels, names, count


def _numbers(labels: Iterable[str], where: Callable[[str], str], remedy: str) -> dict[str, int]:
    """Each label as the whole number that it is; -1 for one that is not a number. Raises DataError
    for another number."""
    # -1 is outside all classes, so that the caller reports such a label.
    numbers = {}
    for label in labels:
        try:
            index = class_index(label)
        except ValueError as error:
            raise DataError(f"{where(label)}: {error}; {remedy}") from error
        numbers[label] = -1 if index is None else index
    return numbers


def refuse_twice(option: str, paths: Iterable[str | Path]) -> None:
    """Raises DataError for a file that is given a second time, by whatever name."""
    # Resolved: a link is the same file.
    seen: set[Path] = set()
    for path in paths:
        file = Path(path).resolve()
        if file in seen:
            raise DataError(f"{option} names a file twice: {path}; name each once")
        seen.add(file)


def splits_in(files: Iterable[str | Path]) -> list[str]:
    """The splits that file names have in them, such as train of train-00000-of-00002.parquet,
    sorted."""
    splits = set()
    for file in files:
        words = re.split(r"[\W_]+", Path(file).stem.lower())
        # The first word that is a split: a name may have "test" in it twice.
        for word in words:
            if SPLIT.fullmatch(word):
                splits.add(word)
                break
    return sorted(splits)


def refuse_splits(where: object, splits: Iterable[str], remedy: str) -> None:
    """Raises DataError for more than one of train, val, test ..., which are easily mixed by
    accident."""
    found = sorted(set(splits))
    if len(found) > 1:
        raise DataError(
            f"{where} holds the splits {', '.join(found)}, which would become one data set; "
            f"{remedy}"
        )


def first_three(names: Iterable[object]) -> str:
    """The first of many names, for a message."""
    some = list(islice(names, 4))
    return ", ".join(map(str, some[:3])) + (" ..." if len(some) > 3 else "")


def first_reasons(skipped: Iterable[Sequence[str]]) -> str:
    """Why the first images were skipped, (id, reason) each, for a message."""
    return "; ".join(f"{id}: {reason}" for id, reason in islice(skipped, 3))


def text_of(path: Path) -> str:
    """A file's text. Raises DataError for a file that is missing, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _line_not_utf8(path, line) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); correct the path") from error


def require_outside(out: Path, images: Path) -> None:
    """Raises DataError for a set that would lie in the folder whose images are packed: its pictures
    would be images of the source at the next start."""
    if out.resolve().is_relative_to(images.resolve()):
        raise DataError(
            f"--out {out} lies in --images {images}, all of whose images are packed, so those of the "
            "set's card too; give an --out outside of it"
        )


def require_file(path: Path) -> None:
    """Raises DataError for a file that cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); correct the path") from error


def not_utf8_file(path: Path) -> DataError:
    """The error of a text file that is not UTF-8, with the line."""
    number = 0
    with path.open("rb") as file, suppress(UnicodeDecodeError):
        for line in file:
            number += 1
            line.decode()
    return _line_not_utf8(path, number)


def _line_not_utf8(path: Path, line: int) -> DataError:
    return DataError(f"{path} cannot be read: line {line} is not UTF-8; save it as UTF-8")


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without a byte order mark and the white space around them; empty ones are dropped.
    Every source's captions go through here. Raises Unusable for one that is not Unicode."""
    # A byte order mark is what some editors write at the start of a text file.
    stripped = [caption.removeprefix("\ufeff").strip() for caption in captions]
    texts = tuple(filter(None, stripped))
    for text in texts:
        if not is_unicode(text):
            raise Unusable(f"its caption is not Unicode: {printable(text[:60])}")
    return texts


def name_of(path: Path) -> str:
    """The name of a file or folder without its suffixes."""
    return os.path.basename(os.path.abspath(path)).split(".")[0]
