"""The progress of a data set that several ranks make. Ranks coordinate through these files only:

OUT/packing/job.json             what is being made; the first rank writes it, the others must
                                 want the same
OUT/packing/part_00000.json ...  what is done of each part
OUT/packing/rank_0.lock ...      held while a rank works: two processes must not be the same rank
OUT/packing/ranks.lock           held by all who work, who must agree on what it says: how many ranks
                                 there are, or which engine deals the parts out
OUT/packing/part_00000.lock ...  with an engine: held while a process makes the part
OUT/packing/failed_1 ...         why a rank failed, so that rank 0 does not wait for it
"""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from largescale.config.serialise import flatten
from largescale.data.format import MANIFEST, read_manifest
from largescale.data.shards import ShardDataset
from largescale.errors import DataError, Stopped, usable
from largescale.host.files import from_json, lock_shared, try_lock, write_atomically
from largescale.host.launch import env_int, printable
from largescale.host.signals import stop_requested

JOB = "packing/job.json"
# The key of a job that adds to a set which is there.
APPEND = "append"
Flat = Mapping[str, Any]  # a job by dotted keys
# Seconds without a new part, after which rank 0 looks which ranks still work.
_GONE_S = 300.0
# Seconds of waiting for a lock, after which that is said.
_TELL_S = 5.0
# Seconds between reports of what rank 0 waits for.
_REPORT_S = 60.0


class Parts:
    """The parts of a job in a folder; part p is made by rank p % world_size.

    places: from the flat keys of the job found here and of this one, those whose values may differ.
    A job that was started before is continued, and `job` is then that one.

    With an engine any of its processes makes any part. The one that was started claims the job, as
    rank 0 of 1; the others join it.
    """

    engine: str | None = None
    """What deals the parts out instead of ranks, in a word."""

    def __init__(
        self,
        out: Path,
        job: dict[str, Any],
        parts: int,
        rank: int,
        world_size: int,
        places: Callable[[Flat, Flat], Collection[str]] = lambda found, ours: (),
        *,
        other: str = "another data set, or a part of one; give another --out, or delete the folder",
    ) -> None:
        """`other`: what a folder of another job holds, and what to do about it."""
        self.out, self.parts, self.rank, self.world_size = out, parts, rank, world_size
        # As JSON has it, to be compared with what is read.
        self.job: dict[str, Any] = json.loads(json.dumps(job))
        self.folder = out / "packing"
        self._places, self._other = places, other
        self._lock: IO[str] | None = None
        self._together: IO[str] | None = None
        self._is_this_job()  # takes over a job that was started before

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()

    def _job_in_folder(self) -> dict[str, Any]:
        """The job that is done or started in the folder. Raises DataError or OSError where there is
        none."""
        if self.finished:
            manifest = read_manifest(self.out)
            job = manifest.get("job")
            return job if isinstance(job, dict) else {"info": manifest["info"].plain()}
        try:
            return dict(from_json((self.out / JOB).read_text()))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self.out / JOB} cannot be used ({error}); delete {self.out}, and run again"
            ) from error

    def _differences(self, found: dict[str, Any]) -> list[str]:
        """What differs between this job and `found`, which this one becomes where nothing does."""
        theirs = dict(flatten(found))
        ours = dict(flatten(self.job))
        places = self._places(theirs, ours)
        differences = []
        for key in theirs | ours:
            there, here = theirs.get(key), ours.get(key)
            if there != here and key not in places:
                differences.append(f"{key}: {there} there, {here} here")
        # Values that may differ stay as the job was started with, also in the manifest.
        if not differences:
            self.job = found
        return differences

    @property
    def mine(self) -> range:
        """The parts that this rank makes."""
        return range(self.rank, self.parts, self.world_size)

    def claim(self) -> bool:
        """Takes this rank's parts. Returns False where this very job is finished already. Raises
        DataError for a folder of another job."""
        try:
            return self._claim()
        except (DataError, FileNotFoundError):
            if self.finished and self._is_this_job() and _is_complete(self.out):
                return False  # rank 0 has finished while this late rank was looking
            raise

    def _is_this_job(self) -> bool:
        """Whether the folder is this job's, finished or started."""
        with suppress(DataError, OSError):
            return not self._differences(self._job_in_folder())
        return False

    def make_room(self) -> None:
        """Removes, on rank 0, what another job has left here; the other ranks wait for that. Raises
        DataError while a process still works on that job."""
        if self._is_this_job():
            return
        if self.rank == 0:
            self._replace_other_job()
        else:
            self._wait_for_this_job()

    def _replace_other_job(self) -> None:
        for path in sorted(self.folder.glob("rank_*.lock")):
            lock = try_lock(path)
            if lock is None:
                raise DataError(
                    f"a process still works in {self.out}; wait for it or stop it, before its "
                    "work is replaced"
                )
            lock.close()

        # The manifest first: there is no data set from here on.
        for path in (self.out / MANIFEST, *self.out.glob("shard_*.arrow")):
            path.unlink(missing_ok=True)
        self.remove()
        self.folder.mkdir(parents=True)
        _create(self.out / JOB, json.dumps(self.job, indent=1))

    def _wait_for_this_job(self) -> None:
        started = time.monotonic()
        while not self._is_this_job():
            if stop_requested():
                raise Stopped
            if time.monotonic() - started > _GONE_S:
                raise DataError(
                    f"rank 0 has not removed what lies in {self.out}; see its messages, and run "
                    "again"
                )
            time.sleep(0.2)

    @property
    def finished(self) -> bool:
        return (self.out / MANIFEST).exists()

    def _claim(self) -> bool:
        job_file = self.out / JOB
        if self.finished:
            self._compare(self._job_in_folder())
            if not _is_complete(self.out):
                raise DataError(
                    f"{self.out} lacks a shard, or has one of another size; restore it, or to pack "
                    f"it anew, delete {self.out} first"
                )
            # Left by a kill after the manifest was written; or of an addition that is under way.
            if self.rank == 0 and (APPEND in self.job or not self._is_growing()):
                self.remove()
            return False

        self._require_no_stray_shards()
        # All ranks try to create the file, and then compare with the one that came first.
        self.folder.mkdir(parents=True, exist_ok=True)
        _create(job_file, json.dumps(self.job, indent=1))
        self._compare(self._job_in_folder())
        name = f"{self.engine or f'rank_{self.rank}'}.lock"
        self._lock = _lock_within(self.folder / name, _patience_s())
        if self._lock is None and self.engine:
            raise DataError(
                f"another program packs into {self.out} on {self.engine}; wait for it or stop it"
            )
        if self._lock is None:
            raise DataError(
                f"another process packs into {self.out} as the same rank; wait for it or stop it (a "
                "launcher other than torchrun and srun must set RANK and WORLD_SIZE)"
            )

        self._join()

        # Failures of the last start are not this one's.
        if self.rank == 0:
            for failed in self.folder.glob("failed_*"):
                failed.unlink(missing_ok=True)
        return True

    def _is_growing(self) -> bool:
        """Whether another job is adding to the set."""
        with suppress(OSError, ValueError, TypeError):
            return APPEND in from_json((self.out / JOB).read_text())
        return False

    def _require_no_stray_shards(self) -> None:
        """Raises DataError for shards of an unknown job, which would be overwritten one by one."""
        stray = list(self.out.glob("shard_*.arrow"))
        if stray and not (self.out / JOB).exists():
            raise DataError(
                f"{self.out} holds {stray[0].name}, and nothing that says whose they are; give "
                "another --out, or delete the folder"
            )

    def shard_name(self, name: str) -> str:
        """The name of a shard's file, of which `name` is unique among those of this job."""
        return name

    def _join(self) -> None:
        """Raises DataError where others work here as another number of ranks: each of two packers
        would take parts of the other."""
        layout = self.engine or f"{self.world_size} ranks"
        end = time.monotonic() + _patience_s()
        while (found := self._layout_beside(layout)) != layout:
            if stop_requested():
                raise Stopped
            if time.monotonic() > end:
                raise DataError(
                    f"another packer works in {self.out}, as {found}, and this one as {layout}; wait "
                    "for it or stop it, or give another --out"
                )
            time.sleep(0.2)

    def _layout_beside(self, layout: str) -> str:
        """What all who work here agree on, `layout` where this process is the first."""
        path = self.folder / "ranks.lock"
        if self._together:
            self._together.close()
        # The first of all says how many there are. Read again under the shared lock: between the two
        # another may have been the first.
        if first := try_lock(path):
            first.truncate(0)
            first.write(layout)
            first.close()
        self._together = lock_shared(path)
        return path.read_text() if self._together else layout

    def join(self) -> None:
        """Takes part in the work of the process that has claimed this job. Raises DataError where
        this one would make something else."""
        if differ := self._differences(self._job_in_folder()):
            raise DataError(
                f"this process would not make the set that was begun in {self.out}. What differs:\n  "
                + "\n  ".join(differ)
            )
        self._join()

    @contextmanager
    def hold(self, part: int) -> Iterator[None]:
        """No other process makes the part until the block ends: one on a machine that was given up
        may still be at work. Waits for its end, for some minutes."""
        # A machine that lost its power may hold a lock for ever. A process that works after minutes
        # without its engine would write the same bytes.
        lock = _lock_within(self.folder / f"part_{part:05d}.lock", _GONE_S)
        try:
            yield
        finally:
            if lock:
                lock.close()

    def _compare(self, found: dict[str, Any]) -> None:
        """Raises DataError where the job found in the folder is another one."""
        if differ := self._differences(found):
            raise DataError(
                f"{self.out} holds {self._other}. What differs:\n  " + "\n  ".join(differ)
            )

    def record(self, part: int) -> dict[str, Any]:
        """The progress of a part; none where one of its shards is not as it was written."""
        nothing: dict[str, Any] = {
            "done": False,
            "items": 0,
            "captions": 0,
            "columns": [],
            "shards": [],
            "skipped": [],
            "hashes": "",
        }
        try:
            record: dict[str, Any] = from_json(self._path(part).read_text())
        except (FileNotFoundError, ValueError):
            return nothing
        with usable(self._path(part)):
            # Saved by a process that had not noticed that its job was replaced.
            if record.get("job", self._digest) != self._digest:
                return nothing
            for shard in record["shards"]:
                file = self.out / shard["file"]
                if not file.is_file() or file.stat().st_size != shard["bytes"]:
                    return nothing
        return record

    def save(self, part: int, record: dict[str, Any]) -> None:
        write_atomically(self._path(part), json.dumps(record | {"job": self._digest}))

    def _path(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.json"

    def wait_for_all(self) -> None:
        """Waits until all parts are done. Raises DataError when a rank has failed, or has died."""
        missing = list(range(self.parts))
        reported = progressed = time.monotonic()
        with tqdm(
            total=self.parts,
            desc="wait for the other ranks",
            unit="part",
            delay=2,
            dynamic_ncols=True,
        ) as bar:
            while missing:
                before = len(missing)
                missing = [part for part in missing if not self.record(part)["done"]]
                bar.update(before - len(missing))
                if len(missing) < before:
                    progressed = time.monotonic()
                if not missing:
                    break

                # A failure is reported at once, a death only after a while without progress.
                self._check_failures(missing)
                if time.monotonic() - reported > _REPORT_S:
                    reported = time.monotonic()
                    ranks = ", ".join(map(str, self._owners(missing)[:8]))
                    tqdm.write(f"waiting for {len(missing)} parts, of ranks {ranks}", sys.stderr)
                if stop_requested():
                    raise Stopped
                if time.monotonic() - progressed > _GONE_S:
                    self._check_at_work(missing)
                time.sleep(0.5)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all parts, once they are done, in order. They are read one by one: all of
        them may list millions of images that were left out."""
        for part in range(self.parts):
            record = self.record(part)
            if not record["done"]:
                raise _changed(part)
            yield record

    def all_records(self) -> list[dict[str, Any]]:
        """The records of all parts in order; waits until all are done. Raises DataError when a rank
        has failed, or has died."""
        self.wait_for_all()
        return list(self.records())

    def _owners(self, parts: list[int]) -> list[int]:
        """The ranks that make these parts, rising."""
        return sorted({part % self.world_size for part in parts})

    def _check_failures(self, missing: list[int]) -> None:
        """Raises DataError where a rank that still has to make a part has failed."""
        # Rank 0 has made its own parts before it waits for the others'.
        broken = [part for part in missing if part in self.mine]
        if broken:
            raise _changed(broken[0])

        # Files of ranks that owe nothing were left by another job.
        for rank in self._owners(missing):
            reason = self.folder / f"failed_{rank}"
            if reason.exists():
                raise DataError(
                    f"rank {rank} has failed: {reason.read_text()}; correct that, and run "
                    "again to go on"
                )

    def _check_at_work(self, missing: list[int]) -> None:
        """Raises DataError for ranks that owe parts and hold no lock: they died, or never
        started."""
        gone = []
        for rank in self._owners(missing):
            if lock := try_lock(self.folder / f"rank_{rank}.lock"):
                lock.close()
                gone.append(rank)
        if gone:
            raise DataError(
                f"rank {gone[0]} is not at work, and has not packed its parts (ranks "
                f"{gone[:8]}); see its messages, correct that, and run again to go on"
            )

    def failed(self, error: BaseException) -> None:
        """Reports this rank's failure to rank 0."""
        if self.rank == 0:
            return
        # Not where another process holds the lock: it works as this rank, and has not failed.
        with suppress(OSError):  # the folder is gone where rank 0 has finished
            if self._lock or try_lock(self.folder / f"rank_{self.rank}.lock"):
                (self.folder / f"failed_{self.rank}").write_text(
                    printable(str(error) or repr(error))
                )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        for lock in (self._lock, self._together):
            if lock:
                lock.close()


def _patience_s() -> float:
    """How long a start waits for locks that are held. One that Slurm has requeued may find those of
    its own last start, on a node that was lost: the file system frees them after a while."""
    return _GONE_S if env_int("SLURM_RESTART_COUNT", default=0) else 0.0


def _lock_within(path: Path, seconds: float) -> IO[str] | None:
    """The lock, as soon as it is free; None where it is not by then."""
    start = time.monotonic()
    told = False
    while not (lock := try_lock(path)) and time.monotonic() - start < seconds:
        if stop_requested():
            raise Stopped
        if time.monotonic() - start > _TELL_S and not told:
            told = True
            tqdm.write(f"another process holds {path}: waiting for its end", sys.stderr)
        time.sleep(0.2)
    return lock


def engine_at_work(folder: Path) -> str | None:
    """The engine that deals out the parts of a job in this folder, or did so last; None for ranks."""
    with suppress(OSError):
        layout = (folder / "ranks.lock").read_text()
        return None if layout.endswith(" ranks") else layout or None
    return None


def _changed(part: int) -> DataError:
    return DataError(f"the shards of part {part} were changed while packing; run again")


def _is_complete(out: Path) -> bool:
    """Whether a finished data set has all of its files."""
    try:
        ShardDataset(out)
    except DataError:
        return False
    return True


def _create(path: Path, text: str) -> None:
    """Creates the file with its complete content, unless another process has done so."""
    # A link either appears or fails, whoever else tries at the same time.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text)
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
