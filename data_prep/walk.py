"""Lists folders of images as streams: what there is, and what of a list is missing. Nothing here
grows with the number of files."""

import os
import posixpath
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, starmap
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.spool import sorted_on_disk
from largescale.errors import DataError
from largescale.host.launch import env_rank

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# A folder that changed so short a time before it was listed may have changed again, and have the
# same time of its last change.
_RECENT_NS = 2 * 10**9
# Paths that are handed on together: one by one, ten million take a minute longer.
_AT_A_TIME = 1000

Listed = Callable[[str, int], None]
"""Told of each folder that is listed, with the time of its last change in nanoseconds; 0 where that
does not tell whether it changes again."""


def _nobody(folder: str, changed: int) -> None:
    pass


@dataclass
class Walk:
    """The image files below `root` by relative path, sorted; once they are read, what was seen.

    Links are followed, and names that begin with a dot are ignored. Raises DataError for a folder
    that cannot be listed. Where `folders` are given, another one in `root`, such as lost+found, is
    counted as a file instead.
    """

    root: Path
    folders: Container[str] | None = None
    scratch: Path | None = None
    """Where the names of a folder lie that do not fit in memory."""
    listed: Listed = _nobody
    others: int = 0
    """Files that are no images, and what else is no folder."""

    def __iter__(self) -> Iterator[list[str]]:
        """The paths, some of one folder at a time."""
        # A stack instead of recursion: folders may be nested more deeply than Python allows. Of
        # each folder the entries are sorted, which sorts the paths, as a folder's name ends in a
        # slash.
        with tqdm(desc=f"list {self.root}", unit="file", delay=2, disable=env_rank() != 0) as bar:
            stack = [self._folder("", frozenset(), bar)]
            while stack:
                prefix, above, entries = stack[-1]
                paths: list[str] = []
                for entry in entries:
                    if entry[-1] == "/":
                        break
                    paths.append(prefix + entry)
                    if len(paths) == _AT_A_TIME:
                        yield paths
                        paths = []
                else:
                    stack.pop()
                    entry = ""
                if paths:
                    yield paths
                if entry and (folder := self._open(prefix + entry, above, bar)):
                    stack.append(folder)

    def _open(
        self, prefix: str, above: frozenset[tuple[int, int]], bar: Any
    ) -> tuple[str, frozenset[tuple[int, int]], Iterator[str]] | None:
        """A folder's entries; None for one that cannot be listed and need not be."""
        try:
            return self._folder(prefix, above, bar)
        except _Unlistable:
            if self.folders is None or prefix.count("/") != 1 or prefix[:-1] in self.folders:
                raise
            self.others += 1
            return None

    def _folder(
        self, prefix: str, above: frozenset[tuple[int, int]], bar: Any
    ) -> tuple[str, frozenset[tuple[int, int]], Iterator[str]]:
        """A folder's path from `root`, the identities of it and those above, and its entries,
        sorted; those that are folders end in a slash."""
        folder = os.path.join(self.root, prefix)
        status, entries = scan(folder)
        # By device and inode: through a link to itself a folder has a new path each time.
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise DataError(f"{folder} is a link to a folder that it lies in; remove the link")
        self.listed(folder, changed_ns(status))
        names = sorted_on_disk(self._names(entries, bar), self.scratch)
        return prefix, above | {here}, names

    def _names(self, entries: Iterator[os.DirEntry[str]], bar: Any) -> Iterator[str]:
        count = 0
        for count, entry in enumerate(entries, start=1):
            name = entry.name
            if entry.is_dir():
                yield f"{name}/"
            # A link to nothing too: reading it will give the error.
            elif name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                yield name
            else:
                self.others += 1
            if count % _AT_A_TIME == 0:
                bar.update(_AT_A_TIME)
        bar.update(count % _AT_A_TIME)


class _Unlistable(DataError):
    """A folder that cannot be listed."""


def scan(folder: str) -> tuple[os.stat_result, Generator[os.DirEntry[str], None, None]]:
    """What a folder is, from before it is read, and its entries that do not begin with a dot.
    Raises DataError for one that cannot be listed."""
    try:
        # Asked first: a change while the folder is read then shows as a later time.
        status = os.stat(folder)
        return status, _visible(folder, os.scandir(folder))
    except OSError as error:
        raise _unlistable(folder, error) from error


def _visible(folder: str, entries: Any) -> Generator[os.DirEntry[str], None, None]:
    try:
        with entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise _unlistable(folder, error) from error


def _unlistable(folder: str, error: OSError) -> DataError:
    return _Unlistable(
        f"{folder} cannot be listed ({error.strerror}); correct the path, or make it readable"
    )


def changed_ns(status: os.stat_result) -> int:
    """When a folder changed last; 0 for one that may change once more at the same time."""
    changed = status.st_mtime_ns
    return changed if changed < time.time_ns() - _RECENT_NS else 0


def list_images(root: Path, folders: Container[str] | None = None) -> tuple[list[str], int]:
    """Relative paths of the image files below `root`, sorted, and the number of other files, as
    Walk has them."""
    walk = Walk(root, folders)
    return list(chain.from_iterable(walk)), walk.others


@dataclass
class Missing:
    """What of a list of files is not there."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # a few, for a message
    unlisted: int = 0  # images in the same folders that the list does not name
    twice: tuple[int, int] | None = None  # the numbers of a name that is given twice
    _bits: bytearray = field(default_factory=bytearray)

    def add(self, number: int, name: str) -> None:
        self.count += 1
        if len(self.first) < 4:
            self.first.append(name)
        byte, bit = divmod(number, 8)
        self._bits.extend(bytes(max(byte + 1 - len(self._bits), 0)))
        self._bits[byte] |= 1 << bit

    def __contains__(self, number: int) -> bool:
        # A bit for each: a set of a million numbers would take a hundred megabytes.
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)


def missing_files(
    root: Path,
    names: Iterable[tuple[int, str]],
    scratch: Path | None = None,
    listed: Listed = _nobody,
) -> Missing:
    """Which of the names, each with its number, are not files below `root`. Raises DataError where
    `root` cannot be listed."""
    # An unreadable root is an error of its own.
    status, entries = scan(str(root))
    next(entries, None)
    entries.close()
    listed(str(root), changed_ns(status))
    found = Missing()
    # Sorted by folder: each is listed once, as asking for each of millions of files takes hours.
    keys = sorted_on_disk(starmap(_key, names), scratch)
    for folder, group in groupby(keys, key=lambda key: key.partition("\0")[0]):
        there, images = _files(root, folder, scratch, listed)
        present = _compare(folder, group, there, found)
        found.unlisted += images() - present
    return found


def _key(number: int, name: str) -> str:
    """Folder, name and number as one text: what is sorted by it, is sorted by folder."""
    folder, _, file = name.rpartition("/")
    return f"{folder}\0{file}\0{number:012d}"


def _files(
    root: Path, folder: str, scratch: Path | None, listed: Listed
) -> tuple[Iterator[str], Callable[[], int]]:
    """The names of a folder's files, sorted, and what tells how many of them are images."""
    images = 0

    def names(entries: Iterator[os.DirEntry[str]]) -> Iterator[str]:
        nonlocal images
        for entry in entries:
            if entry.is_file():
                images += entry.name.lower().endswith(SUFFIXES)
                yield entry.name

    path = os.path.join(root, folder)
    # A list may name files in a folder that is not there: they are missing, which is no error yet.
    if not os.path.isdir(path):
        listed(path, 0)  # it may come
        return iter(()), lambda: 0
    status, entries = scan(path)
    listed(path, changed_ns(status))
    return sorted_on_disk(names(entries), scratch), lambda: images


def _compare(folder: str, keys: Iterator[str], there: Iterator[str], found: Missing) -> int:
    """Compares the sorted keys of one folder with the sorted names that are there; returns how many
    of the keys are."""
    # Both are sorted: they are read side by side, one name of each in memory.
    present = 0
    last, last_number, there_now = None, 0, next(there, None)
    for key in keys:
        _, name, digits = key.split("\0")
        number = int(digits)
        if name == last:
            # Of several such names the one that a reader of the list meets first.
            if found.twice is None or number < found.twice[1]:
                found.twice = (last_number, number)
            continue
        last, last_number = name, number
        while there_now is not None and there_now < name:
            there_now = next(there, None)
        if there_now == name:
            present += 1
        else:
            found.add(number, posixpath.join(folder, name))
    return present
