"""What a source holds, in files: found once, by the rank that comes first, and read part by part,
so that no rank keeps it in memory.

OUT/packing/listing_KEY.rows      the images in order: file, and where there are ids, labels, captions
OUT/packing/listing_KEY.skipped   what is left out before any image is read, as skipped.jsonl has it
OUT/packing/listing_KEY.json      what follows from all of it
OUT/packing/listing_KEY.folders   the folders that were listed, and when each changed last; renamed last
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.fingerprints import fingerprint, not_utf8
from data_prep.source_files import SAMPLE, other_list, source_changed
from data_prep.walk import changed_ns
from largescale.errors import DataError, LargescaleError, Stopped
from largescale.host.files import from_json, is_unicode, system_reason, try_lock
from largescale.host.launch import env_rank
from largescale.host.signals import stop_requested

# Rows that are read and written at a time.
BATCH = 4096
COLUMNS = {
    "file": pa.string(),
    "id": pa.string(),
    "label": pa.int32(),
    "captions": pa.list_(pa.string()),
}


class Row(NamedTuple):
    """An image of a listing."""

    file: str
    id: str
    label: int = 0
    captions: tuple[str, ...] = ()


@dataclass
class Found:
    """What is known of a source once it is listed, besides its images; plain JSON."""

    facts: dict[str, Any]
    num_classes: int = 0
    class_names: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


class Writer:
    """Writes the rows of a listing, and what is left out. `columns`: which of id, label and
    captions its rows have."""

    def __init__(self, base: Path, columns: Sequence[str], scratch: Path) -> None:
        self.scratch = scratch  # for what does not fit in memory either
        self.rows = self.skipped = 0
        self.labels: tuple[int, int] | None = None  # the least and the greatest
        self._columns = ("file", *columns)
        self._pending: dict[str, list[Any]] = {}
        self._schema = pa.schema([])
        for name in self._columns:
            self._pending[name] = []
            self._schema = self._schema.append(pa.field(name, COLUMNS[name]))
        # If a file cannot be opened, the ones before it are closed.
        with ExitStack() as stack:
            sink = stack.enter_context(pa.OSFile(f"{base}.rows", "wb"))
            self._file = stack.enter_context(pa.ipc.new_file(sink, self._schema))
            self._skipped: IO[str] = stack.enter_context(open(f"{base}.skipped", "w"))
            self._folders: IO[str] = stack.enter_context(open(f"{base}.folders", "w"))
            self._open = stack.pop_all()

    def add(self, file: str, id: str = "", label: int = 0, captions: tuple[str, ...] = ()) -> None:
        """Adds an image; one whose name is not UTF-8 is left out."""
        if not is_unicode(file):
            self.skip(id or file, "its name is not UTF-8")
            return
        for name, values in self._pending.items():
            if name == "file":
                values.append(file)
            elif name == "label":
                values.append(label)
            else:
                values.append(id if name == "id" else captions)
        self._added(1, label, label)

    def extend(self, files: Sequence[str], labels: int | Sequence[int] = 0) -> None:
        """Adds images without ids and captions. `labels`: of each, or the one that all have."""
        if isinstance(labels, int):
            labels = [labels] * len(files)
        # All at once, unless one has such a name.
        if not is_unicode("".join(files)):
            for file, label in zip(files, labels, strict=True):
                self.add(file, label=label)
        elif files:
            self._pending["file"] += files
            if "label" in self._pending:
                self._pending["label"] += labels
            self._added(len(files), min(labels), max(labels))

    def _added(self, rows: int, least: int, greatest: int) -> None:
        self.rows += rows
        if "label" in self._pending:
            low, high = self.labels or (least, greatest)
            self.labels = (min(low, least), max(high, greatest))
        while len(self._pending["file"]) >= BATCH:
            self._write()

    def skip(self, id: str, reason: str) -> None:
        self._skipped.write(json.dumps({"id": id, "reason": reason}) + "\n")
        self.skipped += 1

    def listed(self, folder: str, changed: int) -> None:
        """Notes a folder that was listed, with the time of its last change."""
        self._folders.write(json.dumps([folder, changed]) + "\n")

    def _write(self) -> None:
        arrays = []
        for name, values in self._pending.items():
            try:
                arrays.append(pa.array(values[:BATCH], COLUMNS[name]))
            except UnicodeEncodeError as error:
                raise not_utf8(error) from error
            del values[:BATCH]
        self._file.write_batch(pa.record_batch(arrays, self._schema))

    def close(self) -> None:
        if self._pending["file"]:
            self._write()
        self._open.close()


class Skipped(Iterable[tuple[str, str]]):
    """What is left out before any image is read, (id, reason) each, in a file."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str]]:
        with self._path.open() as file:
            for line in file:
                entry = json.loads(line)
                yield entry["id"], entry["reason"]


class Listing:
    """A list of images in a file, of which a part is read at a time."""

    def __init__(self, base: Path, found: Mapping[str, Any], listings: "Listings") -> None:
        self._base = base
        self._listings = listings  # a temporary folder goes with it
        self.rows: int = found["rows"]
        self.columns: Sequence[str] = found["columns"]
        self.labels: Sequence[int] | None = found["labels"]
        self.fingerprint: str = found["fingerprint"]
        self.sample: list[str] = found["sample"]  # files whose sizes are compared
        self.found = Found(**found["found"])
        self.skipped = Skipped(Path(f"{base}.skipped"), found["skipped"])

    def ids(self) -> Iterator[list[str]]:
        """The ids of all rows, many at a time."""
        for array in _column(self._base, "id" if "id" in self.columns else "file"):
            yield array.to_pylist()

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows in [start, stop)."""
        with pa.OSFile(f"{self._base}.rows") as source, pa.ipc.open_file(source) as file:
            # All batches but the last have BATCH rows, so that a row's number tells where it is.
            for number in range(start // BATCH, -(-stop // BATCH)):
                first = number * BATCH
                batch = file.get_batch(number)[max(start - first, 0) : stop - first]
                columns = {name: batch.column(name).to_pylist() for name in self.columns}
                files = columns["file"]
                ids = columns.get("id", files)
                labels = columns.get("label") or [0] * len(files)
                captions = columns.get("captions") or [()] * len(files)
                for file_, id, label, texts in zip(files, ids, labels, captions, strict=True):
                    yield Row(file_, id, label, tuple(texts))


class Listings:
    """Listings in a folder, by default in one that goes with the process. Those of a packer's ranks
    lie in OUT/packing, which goes when the set is packed."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.mkdtemp(prefix="listing"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # What this process has made; of the folders the innermost is the last.
        self._files: list[Path] = []
        self._folders: list[Path] = []

    def get(
        self, key: Mapping[str, Any], columns: Sequence[str], make: Callable[[Writer], Found]
    ) -> Listing:
        """The listing of what `key` names: the one that is there, while the folders are as they
        were, or one that `make` writes now. Raises DataError where it cannot be written."""
        digest = hashlib.sha256(json.dumps([key, columns], sort_keys=True).encode()).hexdigest()
        base = self._folder / f"listing_{digest[:16]}"
        try:
            # Without the lock at first: ranks that find a listing need not wait for each other.
            found = _usable(base)
            if found is None:
                self._make_folders()
                # Another rank may make it while this one waits.
                with self._lock():
                    found = _usable(base) or self._make(base, columns, make)
        except OSError as error:
            raise _cannot_write(base, error) from error
        return Listing(base, found, self)

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """The path of a file in the folder: the one that is there, or one that `make` writes now, under
        the path that it is given. Raises DataError where it cannot be written."""
        path = self._folder / name
        try:
            if not path.exists():
                self._make_folders()
                with self._lock():
                    if not path.exists():
                        mine = path.with_name(f"{name}.{env_rank()}")
                        make(mine)
                        os.rename(mine, path)
                        self._files.append(path)
        except LargescaleError:
            raise
        except OSError as error:
            raise _cannot_write(path, error) from error
        return path

    def _make_folders(self) -> None:
        for folder in (*reversed(self._folder.parents), self._folder):
            # Noted one by one, so that only what this process has made is removed again.
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._folders.append(folder)

    def _lock(self) -> IO[str]:
        """Waits until no other rank lists."""
        path = self._folder / "listing.lock"
        self._files.append(path)
        # Polled: while it waited for the lock, a rank would not notice that it is asked to stop.
        while not (lock := try_lock(path)):
            if stop_requested():
                raise Stopped
            time.sleep(0.2)
        return lock

    def _make(
        self, base: Path, columns: Sequence[str], make: Callable[[Writer], Found]
    ) -> dict[str, Any]:
        # A name of each rank's own: a file system without locks would mix two ranks' files.
        mine = base.with_name(f"{base.name}.{env_rank()}")
        names = (".rows", ".skipped", ".json", ".folders")
        try:
            writer = Writer(mine, columns, self._folder)
            try:
                found = make(writer)
            finally:
                writer.close()
            listing = _describe(mine, writer, found, columns)
            # The same as is there, but for the times of folders: another rank may be reading that.
            text = json.dumps(listing)
            before = _read(base)
            if before is not None and before == json.loads(text):
                os.rename(f"{mine}.folders", f"{base}.folders")
                return before
            self._refuse_other(base, before, mine, listing)
            Path(f"{mine}.json").write_text(text)
            # The .folders come last: without them, or with those of before, the others are no listing.
            for name in names:
                os.rename(f"{mine}{name}", f"{base}{name}")
                self._files.append(Path(f"{base}{name}"))
            return dict(json.loads(text))
        finally:
            for name in names:
                Path(f"{mine}{name}").unlink(missing_ok=True)

    def _refuse_other(
        self, base: Path, before: dict[str, Any] | None, mine: Path, found: dict[str, Any]
    ) -> None:
        """Raises DataError for a list that is not that of the job which was begun here: processes that
        work on it read that one."""
        job = None
        with suppress(OSError, LookupError, TypeError, ValueError):
            job = from_json((self._folder / "job.json").read_text())["source"]["fingerprint"]
        if before is None or before["fingerprint"] != job or found["fingerprint"] == job:
            return
        there, here = Listing(base, before, self), Listing(mine, found, self)
        counts = f"({here.rows:,} images, and {there.rows:,} then)"
        raise source_changed(other_list(there.read(0, there.rows), here.read(0, here.rows), counts))

    def discard(self) -> None:
        """Removes what this process has made, unless a job has begun in the folder."""
        if (self._folder / "job.json").exists():
            return
        # A folder in which something else lies cannot be removed. This one goes with the last rank that
        # is refused, whichever made it.
        for path in self._files:
            with suppress(OSError):
                path.unlink()
        for folder in (self._folder, *reversed(self._folders)):
            with suppress(OSError):
                folder.rmdir()


def _cannot_write(path: Path, error: OSError) -> DataError:
    what = f"{error.filename or path.parent}: {system_reason(error)}"
    return DataError(f"cannot write {what}; free space, or correct --out, and run again")


def _describe(base: Path, writer: Writer, found: Found, columns: Sequence[str]) -> dict[str, Any]:
    """The content of a listing's .json."""
    about: dict[str, Any] = {
        "rows": writer.rows,
        "skipped": writer.skipped,
        "labels": writer.labels,
        "columns": ["file", *columns],
        "found": asdict(found),
    }
    columns_of = partial(_column, base)
    # The files whose sizes are looked at come by the way.
    sample: list[str] = []
    step = -(-writer.rows // SAMPLE) or 1

    def files() -> Iterator[pa.Array]:
        start = 0
        for array in columns_of("file"):
            for i in range(-start % step, len(array), step):
                sample.append(array[i].as_py())
            yield array
            start += len(array)

    # Read back from the file, a batch at a time: all rows together may not fit in memory.
    about["fingerprint"] = fingerprint(
        files(),
        columns_of("id") if "id" in columns else (),
        found.class_names,
        map(_joined, _lists(columns_of("captions"))) if "captions" in columns else (),
        map(_label_bytes, columns_of("label")) if "label" in columns else b"",
    )
    return about | {"sample": sample}


def _column(base: Path, name: str) -> Iterator[pa.Array]:
    """A column of a listing, a batch at a time."""
    with pa.OSFile(f"{base}.rows") as source, pa.ipc.open_file(source) as file:
        for number in range(file.num_record_batches):
            yield file.get_batch(number).column(name)


def _lists(arrays: Iterable[pa.Array]) -> Iterator[list[str]]:
    for array in arrays:
        yield from array.to_pylist()


def _label_bytes(array: pa.Array) -> bytes:
    return np.from_dlpack(array).astype("<i4").tobytes()


def _joined(captions: Sequence[str]) -> str:
    """An image's captions as one text, from which no other captions give the same."""
    return "\n".join([str(len(captions)), *captions])


def _read(base: Path) -> dict[str, Any] | None:
    """The content of a listing's .json; None where there is none."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = from_json(Path(f"{base}.json").read_bytes())
        return found
    return None


def _usable(base: Path) -> dict[str, Any] | None:
    """A listing that is there, and whose folders have not changed since."""
    found = _read(base)
    with suppress(OSError, ValueError), open(f"{base}.folders") as file:
        for line in file:
            folder, changed = json.loads(line)
            # 0: it changed so shortly before it was listed that its time tells nothing.
            if not changed or changed_ns(os.stat(folder)) != changed:
                return None
        return found
    return None
