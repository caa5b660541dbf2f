"""Lists folders of images as streams: what there is, and what of a list is missing. Nothing here
grows with the number of files."""

import os
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.hashes import Hashes, Texts, given_twice, lacking, texts_at
from data_prep.spool import sorted_on_disk
from largescale.errors import DataError
from largescale.host.launch import env_rank

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# A folder that changed so short a time before it was listed may have changed again, and have the
# same time of its last change.
_RECENT_NS = 2 * 10**9
# Paths that are handed on together: one by one, ten million take a minute longer.
_AT_A_TIME = 1000
# Folders of a list that are remembered, so as to be sorted once.
_MOST_FOLDERS = 2**17

Entries = Generator[list[os.DirEntry[str]], None, None]
"""What a folder holds, some at a time."""
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

    def _names(self, entries: Entries, bar: Any) -> Iterator[str]:
        for some in entries:
            for entry in some:
                name = entry.name
                is_image = name.lower().endswith(SUFFIXES)
                if is_image and entry.is_file():
                    yield name
                elif entry.is_dir():
                    yield f"{name}/"
                # A link to nothing: reading it will give the error.
                elif is_image and entry.is_symlink():
                    yield name
                else:
                    self.others += 1
            bar.update(len(some))


class _Unlistable(DataError):
    """A folder that cannot be listed."""


def scan(folder: str) -> tuple[os.stat_result, Entries]:
    """What a folder is, from before it is read, and its entries that do not begin with a dot.
    Raises DataError for one that cannot be listed."""
    try:
        # Asked first: a change while the folder is read then shows as a later time.
        status = os.stat(folder)
        return status, _visible(folder, os.scandir(folder))
    except OSError as error:
        raise _unlistable(folder, error) from error


def _visible(folder: str, entries: Any) -> Entries:
    try:
        with entries:
            found = iter(entries)
            while some := list(islice(found, _AT_A_TIME)):
                yield [entry for entry in some if entry.name[0] != "."]
    except OSError as error:
        raise _unlistable(folder, error) from error


def _unlistable(folder: str, error: OSError) -> DataError:
    if isinstance(error, NotADirectoryError):
        return _Unlistable(f"{folder.rstrip('/')} is a file; give the folder that holds the images")
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

    count: int
    first: list[str]  # a few, for a message
    unlisted: int  # images in the same folders that the list does not name
    twice: tuple[int, int, str] | None  # the numbers of a name that is given twice, and the name
    _bits: npt.NDArray[np.uint8]

    def among(self, start: int, count: int) -> list[bool]:
        """Which of `count` names are missing, from the number `start` on."""
        # A bit for each: a set of a million numbers would take a hundred megabytes.
        first = start // 8
        bits = np.unpackbits(self._bits[first : first + count // 8 + 2], bitorder="little")
        some: list[bool] = bits[start - 8 * first :][:count].astype(bool).tolist()
        return some


def missing_files(
    root: Path,
    names: Iterable[Sequence[str]],
    again: Texts,
    scratch: Path | None = None,
    listed: Listed = _nobody,
) -> Missing:
    """Which of the names, some at a time and counted from 0, are not files below `root`. `again`: the
    same names once more. Raises DataError where `root` cannot be listed."""
    # An unreadable root is an error of its own.
    status, entries = scan(str(root))
    next(entries, None)
    entries.close()
    listed(str(root), changed_ns(status))

    # Each folder is listed once, as asking for each of millions of files takes hours.
    asked, there = Hashes(scratch), Hashes(scratch)
    images = 0
    for folder, _ in groupby(sorted_on_disk(_folders(names, asked), scratch)):
        images += _add_files(root, folder, there, listed)

    count = 0
    first: list[int] = []
    bits = np.zeros(len(asked) // 8 + 2, np.uint8)
    for numbers in lacking(asked, there):
        count += len(numbers)
        first = sorted([*first, *numbers[:4].tolist()])[:4]
        np.bitwise_or.at(bits, numbers // 8, (1 << numbers % 8).astype(np.uint8))
    _, twice = given_twice(asked, again)
    return Missing(
        count,
        list(texts_at(again(), first).values()),
        images - (len(asked) - count),
        twice[0] if twice else None,
        bits,
    )


def _folders(names: Iterable[Sequence[str]], asked: Hashes) -> Iterator[str]:
    """The folders of the names, few of them more than once; the names are added to `asked`."""
    seen: set[str] = set()
    for some in names:
        asked.add(some)
        new = {name[: name.rfind("/") + 1] for name in some} - seen
        yield from new
        # Not of a list that has another folder for each of millions of files.
        if len(seen) > _MOST_FOLDERS:
            seen.clear()
        seen |= new


def _add_files(root: Path, folder: str, there: Hashes, listed: Listed) -> int:
    """Adds the paths of a folder's files; returns how many of them are images. `folder`: relative
    to `root`, with a slash behind it, or empty."""
    path = os.path.join(root, folder.removesuffix("/"))
    # A list may name files in a folder that is not there: they are missing, which is no error yet.
    if not os.path.isdir(path):
        listed(path, 0)  # it may come
        return 0
    status, entries = scan(path)
    listed(path, changed_ns(status))
    images = 0
    for some in entries:
        names = [entry.name for entry in some if entry.is_file()]
        there.add([folder + name for name in names])
        # All at once: no name has a slash in it.
        text = "/".join([*names, ""]).lower()
        images += sum(text.count(f"{suffix}/") for suffix in SUFFIXES)
    return images
