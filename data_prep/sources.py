"""Where images come from: what every program hands to data_prep.packing, and the checks that they
share."""

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.images import Unusable
from largescale.errors import DataError
from largescale.host.files import is_unicode
from largescale.host.launch import env_rank, printable

SPLIT = re.compile("(train|training|val|valid|validation|test|testing|dev)[0-9]*")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
SIZES = 1000  # files whose sizes tell two folders of the same names apart
MOST_CLASSES = 2**20  # a label beyond is an id, or damage
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

NOTES = {  # facts that count what a list does not hold, or should not
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
    """What a packing program reads. All that can be wrong with lists and labels is found when it is
    made."""

    name: str
    num_classes: int  # 0 without labels
    captioned: bool
    class_names: Sequence[str]  # () where unknown
    facts: dict[str, Any]  # for the manifest: what was read, plain JSON
    notes: list[str]  # what is odd about it, to be said before the work
    fingerprint: str  # of what determines content and order, not of the pixels
    skipped: list[tuple[str, str]]  # (id, reason): left out before any image is read
    size: int | None  # items in all; None where only reading tells

    def parts(self, rows_per_shard: int) -> int:
        """How many parts there are; one rank packs a part on its own."""

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        """The items of a part, the same each time, in the same order."""


class ListSource:
    """Image files below `root`, given by relative path; a part is `rows_per_shard` of them.
    Millions are bearable.

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
        self.name, self.num_classes, self.class_names = name, num_classes, class_names
        self.captioned, self.facts, self.skipped = captions is not None, facts, skipped or []
        self.notes = [
            f"{found:,} {what}" for key, what in NOTES.items() if (found := facts.get(key))
        ]
        self._root, self._files, self._ids = str(root), files, files if ids is None else ids
        self._labels, self._captions = labels, captions
        if odd := {i for i, name in enumerate(files) if not is_unicode(name)}:
            self._leave_out(odd, "its name is not UTF-8")
        if not self._files and self.skipped:
            raise DataError(
                f"not one of {len(self.skipped):,} images can be packed; the first: "
                + "; ".join(f"{id}: {reason}" for id, reason in self.skipped[:3])
            )
        if not self._files:
            raise DataError(
                f"no images were found to pack in {root}; correct the folder (files "
                f"that are read end in {', '.join(SUFFIXES)})"
            )
        if labels is not None and not 0 <= labels.min() <= labels.max() < num_classes:
            raise DataError(
                f"labels from {labels.min()} to {labels.max()} are not in [0, "
                f"num_classes={num_classes})"
            )
        some_files = self._files[:: -(-len(self._files) // SIZES)]
        facts["sizes"] = fingerprint(str(_size(os.path.join(root, file))) for file in some_files)
        texts = (
            f"{len(some)}" + "".join(f"\n{text}" for text in some) for some in self._captions or ()
        )
        self.size: int | None = len(self._files)
        self.fingerprint = fingerprint(
            self._files,
            self._ids if ids is not None else (),
            class_names,
            texts,
            b"" if self._labels is None else self._labels.astype("<i4").tobytes(),
        )

    def _leave_out(self, odd: set[int], reason: str) -> None:
        self.skipped += [(self._ids[i], reason) for i in sorted(odd)]
        kept = [i for i in range(len(self._files)) if i not in odd]
        self._files, self._ids = [self._files[i] for i in kept], [self._ids[i] for i in kept]
        self._labels = None if self._labels is None else self._labels[kept]
        self._captions = None if self._captions is None else [self._captions[i] for i in kept]

    def parts(self, rows_per_shard: int) -> int:
        return -(-len(self._files) // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        for i in range(
            number * rows_per_shard, min((number + 1) * rows_per_shard, len(self._files))
        ):
            yield Item(
                self._ids[i],
                partial(_read, os.path.join(self._root, self._files[i])),
                0 if self._labels is None else int(self._labels[i]),
                () if self._captions is None else self._captions[i],
            )


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


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
    digest = hashlib.sha256()
    for column in columns:
        length = 0
        for chunk in [column] if isinstance(column, bytes) else _chunks(column):
            digest.update(chunk)
            length += len(chunk)
        digest.update(f"#{length}".encode())
    return digest.hexdigest()


def _chunks(texts: Iterable[str], size: int = 10_000) -> Iterator[bytes]:
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
    """Relative paths of the image files below `root`, sorted, and the number of other files. Links
    are followed, names that begin with a dot passed over. Raises DataError for what cannot be
    listed, but where `folders` are given not for another one in `root`, such as lost+found."""
    found: list[str] = []
    others, stack = 0, [("", frozenset[tuple[int, int]]())]
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
                elif entry.name.lower().endswith(SUFFIXES) and (
                    entry.is_symlink() or entry.is_file()
                ):
                    found.append(
                        prefix + entry.name
                    )  # a link to nothing too: reading it will say so
                else:
                    others += 1
            bar.update(len(entries))
    return sorted(found), others


def _scan(folder: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            return (status.st_dev, status.st_ino), [
                entry for entry in entries if not entry.name.startswith(".")
            ]
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}); correct the path, or make it readable"
        ) from error


def missing_files(
    root: Path, names: Sequence[str], listed_in: Path, skip: bool
) -> tuple[set[str], int]:
    """Which of `names` are not files below `root`, and how many images beside the others are not
    named.

    Each folder is listed once, as asking for each of millions of files takes hours. Raises
    DataError, unless `skip`.
    """
    _scan(str(root))
    folders: dict[str, set[str]] = {}
    for folder in {posixpath.dirname(name) for name in names}:
        if os.path.isdir(path := os.path.join(root, folder)):
            folders[folder] = {entry.name for entry in _scan(path)[1] if entry.is_file()}
    missing = {
        name
        for name in names
        if posixpath.basename(name) not in folders.get(posixpath.dirname(name), ())
    }
    if missing and not skip:
        raise DataError(
            f"{listed_in} names {len(names):,} images, of which {len(missing):,} are not in {root}: "
            f"{first_three(sorted(missing))}; complete the folder, or pack the others with "
            "--skip-missing"
        )
    images = sum(name.lower().endswith(SUFFIXES) for files in folders.values() for name in files)
    return missing, images - (len(set(names)) - len(missing))


def relative_name(name: str, listed_in: object) -> str:
    """`name` in its shortest form. Raises DataError for one that does not lie below the folder of
    images."""
    short = posixpath.normpath(name)
    if not name or short.startswith("/") or short.split("/")[0] in (".", ".."):
        raise DataError(
            f"{listed_in}: {name!r} does not lie below --images; give file names relative to it"
        )
    return short


def class_index(label: str) -> int | None:
    """3 of "3" and, as pandas writes it, of "3.0"; None of what is no number. Raises ValueError for
    another number."""
    if not NUMBER.fullmatch(label):
        return None
    if not (number := float(label)).is_integer() or abs(number) >= MOST_CLASSES:
        raise ValueError(f"label {label} is not a whole number below {MOST_CLASSES:,}")
    return int(number)


def class_labels(
    counts: Mapping[str, int],
    names: Sequence[str],
    where: Callable[[str], str],
    remedy: str,
    only_numbers: bool = False,
) -> tuple[dict[str, int], Sequence[str], int]:
    """The class of each label in `counts`, which says how often it is there; the classes' names,
    and their number.

    Labels that are all numbers, or are said to be, are the classes' indices; others are names, of
    `names` where there are any, else numbered in the order of their code points. `where`: the place
    at which a label is first found. Raises DataError for numbers among names, numbers that are not
    whole, and labels outside the classes.
    """
    numeric = [label for label in counts if NUMBER.fullmatch(label)]
    if only_numbers or (len(numeric) == len(counts) and not set(numeric) & set(names)):
        labels = {}
        for label in counts:
            try:
                labels[label] = index if (index := class_index(label)) is not None else -1
            except ValueError as error:
                raise DataError(f"{where(label)}: {error}; {remedy}") from error
        count = len(names) or max(labels.values(), default=-1) + 1
    else:
        if numeric and not names:
            odd = next(label for label in counts if label not in numeric)
            raise DataError(f"{where(odd)}: label {odd!r} is not a number, as others are; {remedy}")
        names = names or sorted(counts)
        index_of = {name: index for index, name in enumerate(names)}
        labels, count = {label: index_of.get(label, -1) for label in counts}, len(names)
    if outside := [label for label, index in labels.items() if not 0 <= index < count]:
        if outside in (["-1"], ["-1.0"]):
            remedy = f"-1 often stands for no label, as in test splits: leave them out, or {remedy}"
        raise DataError(
            f"{where(outside[0])}: label {outside[0]!r} is none of the {count:,} classes "
            f"({sum(counts[label] for label in outside):,} such labels in all); {remedy}"
        )
    return labels, names, count


def refuse_twice(option: str, paths: Iterable[str | Path]) -> None:
    """Raises DataError for a file that is given a second time, by whatever name."""
    seen: set[Path] = set()
    for path in paths:
        if (file := Path(path).resolve()) in seen:
            raise DataError(f"{option} names a file twice: {path}; name each once")
        seen.add(file)


def splits_in(files: Iterable[str | Path]) -> list[str]:
    """train of train-00000-of-00002.parquet"""
    words = (re.split(r"[\W_]+", Path(file).stem.lower()) for file in files)
    found = {next((word for word in of_file if SPLIT.fullmatch(word)), "") for of_file in words}
    return sorted(found - {""})


def refuse_splits(where: object, splits: Iterable[str], remedy: str) -> None:
    """Raises DataError for more than one of train, val, test ...: they are not to be mixed by
    accident."""
    if len(found := sorted(set(splits))) > 1:
        raise DataError(
            f"{where} holds the splits {', '.join(found)}, which would become one data set; "
            f"{remedy}"
        )


def first_three(names: Iterable[object]) -> str:
    some = list(islice(names, 4))
    return ", ".join(str(name) for name in some[:3]) + (" ..." if len(some) > 3 else "")


def text_of(path: Path) -> str:
    """Raises DataError for a file that is missing, or not UTF-8."""
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
    Every source's go through here. Raises Unusable for one that is no text."""
    texts = tuple(text for caption in captions if (text := caption.removeprefix("\ufeff").strip()))
    for text in texts:
        if not is_unicode(text):
            raise Unusable(f"its caption is not Unicode: {printable(text[:60])}")
    return texts


def name_of(path: Path) -> str:
    return os.path.basename(os.path.abspath(path)).split(".")[0]
