"""Copies of packed data sets on a node's own disk, made by all processes of the node that want them.

STAGE/0123456789abcdef/     by the hash of the files' hashes: each set has a folder of its own
    shard_00000.arrow ...   each has its name once it is complete and has the manifest's hash
    shard_00001.arrow.tmp   being copied, or left by a process that was killed: made anew
    copying                 whose byte i is locked by the process that copies file i
    manifest.json           written last: the copy is a data set too

What another copy there has, such as that of the set before it has grown, is not copied again: the file
gets a second name (a hard link), so that each copy is whole, and either can be deleted. Files are
therefore never written to under their names.

Processes share the work by those locks alone: ranks of one job or of two, and one that is killed
leaves the rest to the others.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from largescale.config.schema import Config
from largescale.data.format import MANIFEST, all_files, read_manifest
from largescale.errors import DataError, LargescaleError, StorageError
from largescale.host.files import PERMANENT, fsync_dir, sha256, try_lock_byte, write_atomically
from largescale.host.launch import heartbeat
from largescale.host.signals import stop_requested
from largescale.host.sizes import size_text

_LOCKS = "copying"
_BYTES_A_READ = 2**22
# How often a process looks whether the files that others copy are there.
_LOOK_EVERY_S = 0.2


class StagedCopy:
    """The copy of one data set in a folder for copies."""

    def __init__(self, path: Path, stage: Path) -> None:
        """`path`: the data set. Nothing is written. Raises DataError where it is none."""
        self.path = path
        manifest = read_manifest(path)
        self._files = all_files(manifest["shards"], manifest.get("empty_caption"))
        self.nbytes = 0
        # Not the fingerprint: the same content may have been written as other bytes.
        digest = hashlib.sha256()
        for entry in self._files:
            self.nbytes += entry["bytes"]
            facts = entry["file"], entry["bytes"], entry["sha256"]
            digest.update(f"{json.dumps(facts)}\n".encode())
        self.folder = stage / digest.hexdigest()[:16]

    def missing(self) -> list[int]:
        """The numbers of the files that are not there yet."""
        return [number for number, entry in enumerate(self._files) if not self._has(entry)]

    def _has(self, entry: dict[str, Any]) -> bool:
        # Its hash was compared before it got its name. One that was cut short since is made anew.
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / entry["file"]).stat().st_size == entry["bytes"]
        return False

    def _has_manifest(self) -> bool:
        """Whether the copy has a manifest of its files. A disk that failed may have cut it short."""
        with contextlib.suppress(LargescaleError, OSError):
            manifest = read_manifest(self.folder)
            return all_files(manifest["shards"], manifest.get("empty_caption")) == self._files
        return False

    def bytes_to_copy(self) -> int:
        """The disk space that the copy still needs."""
        needed = 0
        for number in self.missing():
            entry = self._files[number]
            if entry["sha256"] in self._elsewhere:
                continue
            needed += entry["bytes"]
            # What is there of it will grow, or is overwritten.
            with contextlib.suppress(FileNotFoundError):
                needed -= self._temporary(entry).stat().st_size
        return max(0, needed)

    def files_to_link(self) -> int:
        """How many files that are not there yet another copy has."""
        missing = [self._files[number]["sha256"] for number in self.missing()]
        return sum(digest in self._elsewhere for digest in missing)

    @cached_property
    def _elsewhere(self) -> dict[str, Path]:
        """Files of this set that other copies in the folder have, by their hash in the manifests."""
        ours = {entry["sha256"]: entry["bytes"] for entry in self._files}
        found = {}
        for manifest in sorted(self.folder.parent.glob(f"*/{MANIFEST}")):
            if manifest.parent == self.folder:
                continue
            # A copy that cannot be used, or is being deleted, has nothing to give.
            with contextlib.suppress(LargescaleError, OSError):
                theirs = read_manifest(manifest.parent)
                for entry in all_files(theirs["shards"], theirs.get("empty_caption")):
                    file = manifest.parent / entry["file"]
                    if entry["sha256"] in ours and _is_our_own(file, ours[entry["sha256"]]):
                        found[entry["sha256"]] = file
        return found

    def fill(self, seconds: float) -> bool:
        """Copies files that no other process copies; whether all are there. Returns after about so
        many seconds, or when it is asked to stop.

        Raises StorageError for a disk that is full and for a file that cannot be read at present,
        DataError for one that is not the manifest's, and for a folder that cannot be written.
        """
        end = time.monotonic() + seconds
        if not self.missing() and self._has_manifest():
            return True
        try:
            self.folder.mkdir(exist_ok=True)
            with (self.folder / _LOCKS).open("a") as locks:
                while missing := self.missing():
                    copied = [number for number in missing if self._copy_free(number, locks, end)]
                    if stop_requested() or time.monotonic() > end:
                        return not self.missing()
                    # The others are at work on the rest.
                    if not copied:
                        time.sleep(_LOOK_EVERY_S)
                # One process writes it: the others would have the same temporary file.
                if try_lock_byte(locks, len(self._files)) and not self._has_manifest():
                    write_atomically(self.folder / MANIFEST, (self.path / MANIFEST).read_bytes())
        except StorageError:
            raise
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        return True

    def _copy_free(self, number: int, locks: Any, end: float) -> bool:
        """Copies a file unless another process does so, it is there, or the time is over."""
        entry = self._files[number]
        if stop_requested() or time.monotonic() > end or not try_lock_byte(locks, number):
            return False
        # Another process may have finished it a moment ago.
        if self._has(entry):
            return False
        if not self._link(entry):
            self._copy(entry)
        return True

    def _link(self, entry: dict[str, Any]) -> bool:
        """Takes a file from another copy, where one has it with the manifest's hash."""
        # Once: what cannot be taken counts as missing from here on.
        other = self._elsewhere.pop(entry["sha256"], None)
        if other is None:
            return False
        # What cannot be linked is copied from the data set: the other copy may be gone by now, and some
        # file systems have no links.
        with contextlib.suppress(OSError):
            # Hashed again: it may have been altered since it was copied.
            if sha256(other) == entry["sha256"]:
                file = self.folder / entry["file"]
                file.unlink(missing_ok=True)  # one that was cut short
                os.link(other, file)
                fsync_dir(self.folder)
                return True
        return False

    def _copy(self, entry: dict[str, Any]) -> None:
        """Copies a file, completely or not at all."""
        source = self.path / entry["file"]
        temporary = self._temporary(entry)
        try:
            with _opened(source) as reading, temporary.open("wb") as writing:
                while piece := _read(reading, source):
                    writing.write(piece)
                    heartbeat()
                writing.flush()
                os.fsync(writing.fileno())
            # The copy is read again: the disk may have failed as well as the source.
            if sha256(temporary) != entry["sha256"]:
                raise _differs(source, entry, temporary)
        # On a full disk a part of a file would only take space.
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(self.folder / entry["file"])
        fsync_dir(self.folder)

    def _temporary(self, entry: dict[str, Any]) -> Path:
        return self.folder / f"{entry['file']}.tmp"


def _is_our_own(file: Path, size: int) -> bool:
    """Whether it is there, has this size, and can be linked: Linux mostly forbids links to files of
    other users."""
    with contextlib.suppress(OSError):
        facts = file.stat()
        return facts.st_size == size and facts.st_uid == os.geteuid()
    return False


def paths_to_copy(config: Config) -> list[str]:
    """The data sets of a run."""
    return list(filter(None, (config.data.path, config.data.validation)))


def plan_copies(paths: Sequence[str], stage: str) -> tuple[list[StagedCopy], int]:
    """The copies of these data sets in the folder `stage`, which is made, and the bytes that are
    not there yet. Nothing is copied. Raises DataError where they do not fit on its disk, with the
    sizes."""
    folder = Path(stage)
    if (folder / MANIFEST).exists():
        raise DataError(
            f"--data.stage {folder} is a packed data set; give a folder for copies, on the node's "
            "own disk"
        )
    # Another start would find it again: no reason to be requeued.
    if folder.exists() and not folder.is_dir():
        raise DataError(
            f"--data.stage {folder} is a file; give a folder for copies, on the node's own disk"
        )
    copies = [StagedCopy(Path(path), folder) for path in paths]
    # Not the folders above it: a disk that is not mounted would be made a folder of another disk.
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(folder, error) from error
    needed = total = 0
    for copy in copies:
        needed += copy.bytes_to_copy()
        total += copy.nbytes
    if needed > free:
        raise DataError(
            f"--data.stage {folder} on {socket.gethostname()} has {size_text(free)} free, and "
            f"{size_text(needed)} of {' and '.join(paths)} "
            f"({size_text(total)}) are not there yet; give a folder on a larger disk, delete "
            f"what is not needed any more in {folder}{_others(folder, copies)}, or leave it out "
            "and take --data.order blocks"
        )
    return copies, needed


def _others(folder: Path, copies: list[StagedCopy]) -> str:
    """A remark on copies of other data sets in the folder."""
    names = []
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        if manifest.parent not in [copy.folder for copy in copies]:
            with contextlib.suppress(LargescaleError, OSError):
                names.append(
                    f"{manifest.parent.name}: {read_manifest(manifest.parent)['info'].name}"
                )
    return f" ({', '.join(names)})" if names else ""


def _opened(source: Path) -> Any:
    try:
        return source.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise DataError(f"{source} is missing; restore the file") from error
    except OSError as error:
        raise StorageError(f"{source} cannot be read at present: {error}") from error


def _read(file: Any, source: Path) -> bytes:
    try:
        piece: bytes = file.read(_BYTES_A_READ)
    except OSError as error:
        raise StorageError(f"{source} cannot be read at present: {error}") from error
    return piece


def _differs(source: Path, entry: dict[str, Any], copy: Path) -> DataError | StorageError:
    """The error for a copy that has not the manifest's hash."""
    if sha256(source) != entry["sha256"]:
        return DataError(f"{source} was altered: its hash is not the manifest's; restore the file")
    return StorageError(
        f"{copy} is not what was written to it, on {socket.gethostname()}; its disk is damaged: "
        "give another folder as --data.stage"
    )


def _cannot_write(folder: Path, error: OSError) -> DataError | StorageError:
    """The error for a folder for copies in which nothing can be written."""
    text = f"cannot write to --data.stage {folder} on {socket.gethostname()}: {error.strerror}"
    if error.errno in PERMANENT or isinstance(error, FileNotFoundError):
        return DataError(f"{text}; give a folder on the node's own disk that is there")
    # A disk that has failed may be read-only since: on another node the same command may go on.
    if error.errno == errno.EROFS:
        return StorageError(f"{text}; give another folder, or take another node")
    return StorageError(
        f"{text}; free space there, or give another folder: what is copied stays, and the same "
        "command copies the rest"
    )
