"""Where images come from: the sources that programs give to data_prep.packing, and the checks that
they share."""

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.images import Unusable
from largescale.errors import DataError
from largescale.host.files import is_unicode
from largescale.host.launch import env_rank, printable

T = TypeVar("T")

# Words in file names, and numbers as they stand in tables.
SPLIT = re.compile("(train|training|val|valid|validation|test|testing|dev)[0-9]*")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
# Files whose sizes distinguish two folders of the same names: all of millions would take hours.
SIZES = 1000
# A label beyond this is an id, or damage.
MOST_CLASSES = 2**20
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

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
    skipped: list[tuple[str, str]]  # (id, reason): left out before any image is read
    size: int | None  # items in all; None where only reading tells

    def parts(self, rows_per_shard: int) -> int:
        """How many parts there are; one rank packs a part on its own."""

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        """The items of a part, the same each time, in the same order."""


class ListSource:
    """Image files below `root`, given by relative path; a part is `rows_per_shard` of them. There
    may be millions.

    ids: the paths, unless given. Raises DataError where there are none, and for a label outside [0,
    num_classes).
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        *,
        ids: Sequence[str] | None = None,
        labels: npt.NDArray[np.int32] | None = None,
        num_classes: int = 0,
        class_names: Sequence[str] = (),
        captions: Sequence[tuple[str, ...]] | None = None,
        facts: dict[str, Any],
        skipped: list[tuple[str, str]] | None = None,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.class_names = class_names
        self.captioned = captions is not None
        self.facts = facts
        self.skipped = skipped or []
        self.notes = []
        for key, what in NOTES.items():
            if facts.get(key):
                self.notes.append(f"{facts[key]:,} {what}")

        # What the items are made from. The lists are not copied: they may have millions of entries.
        self._root = str(root)
        self._files = files
        self._ids = files if ids is None else ids
        self._labels = labels
        self._captions = captions
        odd = {i for i, file in enumerate(files) if not is_unicode(file)}
        if odd:
            self._leave_out(odd, "its name is not UTF-8")
        self._check(root)

        # A list is identified by names, labels and captions, and its images by some of their sizes.
        some_files = self._files[:: -(-len(self._files) // SIZES)]
        paths = map(partial(os.path.join, root), some_files)
        facts["sizes"] = fingerprint(map(str, map(_size, paths)))
        self.size: int | None = len(self._files)
        self.fingerprint = fingerprint(
            self._files,
            self._ids if ids is not None else (),
            class_names,
            map(_joined, self._captions or ()),
            b"" if self._labels is None else self._labels.astype("<i4").tobytes(),
        )

    def _check(self, root: Path) -> None:
        """Raises DataError where there is nothing to pack, and for labels outside the classes."""
        labels = self._labels
        # Where all images are skipped, the reasons help more than the folder.
        if not self._files and self.skipped:
            raise DataError(
                f"not one of {len(self.skipped):,} images can be packed; the first: "
                f"{first_reasons(self.skipped)}"
            )
        if not self._files:
            raise DataError(
                f"no images were found to pack in {root}; correct the folder (files "
                f"that are read end in {', '.join(SUFFIXES)})"
            )
        if labels is not None and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise DataError(
                f"labels from {labels.min()} to {labels.max()} are not in [0, "
                f"num_classes={self.num_classes})"
            )

    def _leave_out(self, odd: set[int], reason: str) -> None:
        """Moves files, by number, to those that are skipped."""
        for i in sorted(odd):
            self.skipped.append((self._ids[i], reason))
        # Files, ids, labels and captions stay in step.
        kept = sorted(set(range(len(self._files))) - odd)
        self._files = _chosen(self._files, kept)
        self._ids = _chosen(self._ids, kept)
        if self._labels is not None:
            self._labels = self._labels[kept]
        if self._captions is not None:
            self._captions = _chosen(self._captions, kept)

    def parts(self, rows_per_shard: int) -> int:
        return -(-len(self._files) // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        # Nothing is read here: a worker's thread reads the file when it decodes the item.
        first = number * rows_per_shard
        for i in range(first, min(first + rows_per_shard, len(self._files))):
            yield Item(
                self._ids[i],
                partial(_read, os.path.join(self._root, self._files[i])),
                0 if self._labels is None else int(self._labels[i]),
                () if self._captions is None else self._captions[i],
            )


def _chosen(values: Sequence[T], numbers: Iterable[int]) -> list[T]:
    return [values[i] for i in numbers]


def _size(path: str) -> int:
    """A file's size; -1 for one that is missing, which may be skipped later."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _joined(captions: Sequence[str]) -> str:
    """An image's captions as one text, from which no other captions give the same."""
    return "\n".join([str(len(captions)), *captions])


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def given(data: bytes) -> Callable[[], bytes]:
    """The `read` of an item whose content is at hand."""
    return partial(bytes, data)


def unusable(reason: str) -> Callable[[], bytes]:
    """The `read` of an item that is known to lack something."""
    return partial(_raise, reason)


def _raise(reason: str) -> NoReturn:
    raise Unusable(reason)


def fingerprint(*columns: bytes | Iterable[str]) -> str:
    """sha256 of columns of text, read as streams, and of bytes."""
    # Streams, as the texts of millions of files would take gigabytes.
    digest = hashlib.sha256()
    for column in columns:
        length = 0
        for chunk in [column] if isinstance(column, bytes) else _chunks(column):
            digest.update(chunk)
            length += len(chunk)
        # The end of the column: what follows is not part of it.
        digest.update(f"#{length}".encode())
    return digest.hexdigest()


def _chunks(texts: Iterable[str], size: int = 10_000) -> Iterator[bytes]:
    """The bytes of many texts, each with its length before it."""
    texts = iter(texts)
    while some := list(islice(texts, size)):
        try:
            yield "".join(f"{len(text)}:{text}" for text in some).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{error.object[max(error.start - 40, 0) : error.end + 10]!r}: a name that is not "
                "UTF-8; rename the file"
            ) from error


def list_images(root: Path, folders: Container[str] | None = None) -> tuple[list[str], int]:
    """Relative paths of the image files below `root`, sorted, and the number of other files.

    Links are followed, and names that begin with a dot are ignored. Raises DataError for a folder
    that cannot be listed. Where `folders` are given, another one in `root`, such as lost+found, is
    counted as a file instead.
    """
    # A stack instead of recursion: folders may be nested more deeply than Python allows.
    found: list[str] = []
    others = 0
    # Folders to list: the path from `root`, and the identities of the folders above it.
    stack = [("", frozenset[tuple[int, int]]())]
    with tqdm(desc=f"list {root}", unit="file", delay=2, disable=env_rank() != 0) as bar:
        while stack:
            prefix, above = stack.pop()
            folder = os.path.join(root, prefix)
            try:
                here, entries = _scan(folder)
            except DataError:
                if folders is None or prefix.count("/") != 1 or prefix[:-1] in folders:
                    raise
                others += 1
                continue
            if here in above:
                raise DataError(f"{folder} is a link to a folder that it lies in; remove the link")

            for entry in entries:
                if entry.is_dir():
                    stack.append((f"{prefix}{entry.name}/", above | {here}))
                elif not entry.name.lower().endswith(SUFFIXES):
                    others += 1
                elif entry.is_symlink() or entry.is_file():
                    # A link to nothing too: reading it will give the error.
                    found.append(prefix + entry.name)
                else:
                    others += 1
            bar.update(len(entries))
    return sorted(found), others


def _scan(folder: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """A folder's identity, and its entries that do not begin with a dot."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        return (status.st_dev, status.st_ino), visible
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}); correct the path, or make it readable"
        ) from error


def missing_files(
    root: Path, names: Sequence[str], listed_in: Path, skip: bool
) -> tuple[set[str], int]:
    """Which of `names` are not files below `root`, and how many images in the same folders are not
    named. Raises DataError for missing files, unless `skip`."""
    # An unreadable root is an error of its own.
    _scan(str(root))

    # Each folder is listed once: asking for each of millions of files takes hours.
    files: set[str] = set()
    for folder in set(map(posixpath.dirname, names)):
        path = os.path.join(root, folder)
        if os.path.isdir(path):
            for entry in _scan(path)[1]:
                if entry.is_file():
                    files.add(posixpath.join(folder, entry.name))

    missing = set(names) - files
    if missing and not skip:
        raise DataError(
            f"{listed_in} names {len(names):,} images, and {len(missing):,} are not in {root}: "
            f"{first_three(sorted(missing))}; complete the folder, or pack the others with "
            "--skip-missing"
        )
    images = sum(file.lower().endswith(SUFFIXES) for file in files)
    return missing, images - (len(set(names)) - len(missing))


def relative_name(name: str, listed_in: object) -> str:
    """`name` in its shortest form. Raises DataError for one that is not below the folder of
    images."""
    # A name that leads out of the folder could read any file.
    short = posixpath.normpath(name)
    if not name or short.startswith("/") or short.split("/")[0] in (".", ".."):
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


def first_reasons(skipped: Sequence[Sequence[str]]) -> str:
    """Why the first images were skipped, (id, reason) each, for a message."""
    return "; ".join(f"{id}: {reason}" for id, reason in skipped[:3])


def text_of(path: Path) -> str:
    """A file's text. Raises DataError for a file that is missing, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} cannot be read: line {line} is not UTF-8; save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); correct the path") from error


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
