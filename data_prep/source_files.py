"""The files that a source is read from, and whether they are as they were.

OUT/packing/files.json    those that are looked at, as they were when packing began
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

from largescale.data.parts import Parts
from largescale.errors import DataError
from largescale.host.files import from_json

# Files of a folder of images that are looked at: all of millions would take hours.
SAMPLE = 1000
# Bytes at the start and at the end of a file that stand for its content.
_END = 2**16
FILES = "files.json"


class SourceFile(NamedTuple):
    path: str
    size: int  # in bytes; -1 for one that is missing, which may be skipped later
    ends: str = ""  # the hash of its first and last bytes; empty where they are not looked at


def seen(paths: Iterable[str]) -> list[SourceFile]:
    """Files as they are now."""
    return [SourceFile(path, _size(path)) for path in paths]


def sizes(files: Iterable[SourceFile]) -> list[int]:
    return [file.size for file in files]


def with_ends(files: Sequence[SourceFile]) -> list[SourceFile]:
    """The same files; of up to SAMPLE of them the ends too, by which one that was written anew with as
    many bytes is found. Not by its time, which copies may not have."""
    step = -(-len(files) // SAMPLE) or 1
    found = []
    for number, file in enumerate(files):
        found.append(file if number % step else file._replace(ends=_ends(file.path)))
    return found


def _ends(path: str) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(_END)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            return hashlib.sha256(start + file.read(_END)).hexdigest()
    except OSError:
        return ""


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def whole_tars(paths: Iterable[str]) -> list[SourceFile]:
    """Tar files as they are now. Raises DataError for one that is empty, or ends within a block, as most
    that are not whole do: before packing begins, since from then on none may have another size."""
    files = seen(paths)
    for file in files:
        if not file.size or (file.size % BLOCKSIZE and _ends_in_content(file)):
            raise DataError(
                f"{file.path} is cut short: it ends after {file.size:,} bytes, and not with the mark "
                "of an archive's end; restore or download it again, or leave it out of --shards"
            )
    return files


def _ends_in_content(file: SourceFile) -> bool:
    """Whether it is a tar file, not a compressed one, and its last bytes are not those of the mark
    that ends an archive, of which a part is enough."""
    with suppress(OSError), open(file.path, "rb") as opened:
        is_tar = opened.read(BLOCKSIZE)[257:262] == b"ustar"
        opened.seek(file.size - file.size % BLOCKSIZE)
        return is_tar and any(opened.read(BLOCKSIZE))
    return False


def other_content(files: Iterable[SourceFile]) -> str | None:
    """The first of the files that is not as it was seen, in words; None where there is none. One that
    is gone does not count."""
    for file in files:
        size = _size(file.path)
        if file.size < 0 <= size:
            return f"{file.path} is there now, and was missing when packing began"
        if size not in (file.size, -1):
            return f"{file.path} has {size:,} bytes, and had {file.size:,} when packing began"
        if file.ends and _ends(file.path) not in (file.ends, ""):
            return f"{file.path} has other content than when packing began, in as many bytes"
    return None


def note_files(folder: Path, files: Sequence[SourceFile]) -> None:
    """Notes in the folder of a job what its source is read from. For one process."""
    # Whole or not at all; not synced, as nothing depends on it but words.
    temporary = folder / f"{FILES}.tmp"
    temporary.write_text(json.dumps(files))
    os.rename(temporary, folder / FILES)


def refuse_changed(parts: Parts, files: Sequence[SourceFile]) -> None:
    """Raises DataError, with the name of a file, where the source of the job that was begun in the
    folder has changed since. `files`: those of the source now."""
    differ = parts.differing()
    if not differ or not all(line.startswith("source.") for line in differ):
        return
    before = []
    # Older versions have noted nothing.
    with suppress(OSError, TypeError, ValueError):
        before = [SourceFile(*file) for file in from_json((parts.folder / FILES).read_bytes())]
    if what := _difference(before, files, differ):
        raise source_changed(what)


def _difference(
    before: Sequence[SourceFile], now: Sequence[SourceFile], differ: Sequence[str]
) -> str | None:
    """What differs between the files of two starts, in words; None where that is not known. `differ`:
    what does between their jobs."""
    there = {file.path for file in before}
    here = {file.path for file in now}
    # None in common: it was moved, or is another one.
    if not there & here:
        return None
    if what := other_content(before):
        return what
    for file in before:
        if file.size >= 0 and _size(file.path) < 0:
            return f"{file.path} is gone"
    # Of more files than are looked at, other ones are looked at once one of them is gone.
    if len(before) < SAMPLE and len(now) < SAMPLE:
        for path in sorted(here - there):
            return f"{path} is in it now, and was not when packing began"
        for path in sorted(there - here):
            return f"{path} was in it when packing began, and is not now"
    if any(line.startswith("source.sample:") for line in differ):
        return f"{now[0].path}, or a file beside it, has other latents than when packing began"
    return None


def other_list(before: Iterable[Any], now: Iterable[Any], counts: str) -> str:
    """The first row that differs between two lists of images, in words. `counts`: of their rows."""
    for number, (there, here) in enumerate(zip_longest(before, now), start=1):
        if there == here:
            continue
        if there is None:
            return (
                f"image {number:,} is {here.file}, and there was none when packing began {counts}"
            )
        if here is None:
            return (
                f"there is no image {number:,}, which was {there.file} when packing began {counts}"
            )
        if there.file == here.file:
            return f"the label or the captions of {here.file} are not those of when packing began"
        return f"image {number:,} is {here.file}, and was {there.file} when packing began {counts}"
    return "the names of the classes are not those of when packing began"


def source_changed(what: str) -> DataError:
    """The error of a source that is not as it was listed. `what`: what is other now."""
    return DataError(
        f"{what}: the source changed while it was packed; put it back as it was and run again, or "
        "delete --out and pack it anew"
    )
