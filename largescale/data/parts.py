"""The progress of a data set that several ranks make. Ranks coordinate through these files only:

OUT/packing/job.json             what is being made (job_folder.py)
OUT/packing/part_00000.json ...  what is done of each part
OUT/packing/rank_0.lock ...      held while a rank works: two processes must not be the same rank
OUT/packing/ranks.lock           held by all who work, who must agree on what it says: how many ranks
                                 there are, or which engine deals the parts out
OUT/packing/part_00000.lock ...  with an engine: held while a process makes the part
OUT/packing/failed_1 ...         why a rank failed, so that rank 0 does not wait for it
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from largescale.data.job_folder import APPEND, GONE_S, OTHER_JOB, Flat, JobFolder, is_complete
from largescale.errors import DataError, Stopped, usable
from largescale.host.files import from_json, lock_shared, try_lock, write_atomically
from largescale.host.launch import env_int, printable
from largescale.host.signals import stop_requested

# Seconds of waiting for a lock, after which that is said.
_TELL_S = 5.0
# Seconds between reports of what rank 0 waits for.
_REPORT_S = 60.0


class Parts(JobFolder):
    """The parts of a job in a folder; part p is made by rank p % world_size.

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
        other: str = OTHER_JOB,
    ) -> None:
        super().__init__(out, job, rank, places, other=other)
        self.parts, self.world_size = parts, world_size
        self._lock: IO[str] | None = None
        self._together: IO[str] | None = None

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
            if self.finished and self._is_this_job() and is_complete(self.out):
                return False  # rank 0 has finished while this late rank was looking
            raise

    def _claim(self) -> bool:
        if self.finished:
            self._check_finished()
            # Left by a kill after the manifest was written; or of an addition that is under way.
            if self.rank == 0 and (APPEND in self.job or not self._is_growing()):
                self.remove()
            return False

        self._begin()
        name = f"{self.engine or f'rank_{self.rank}'}.lock"
        self._lock = _lock_within(self.folder / name, _patience_s())
        if self._lock is None and self.engine:
            raise DataError(
                f"another program packs into {self.out} on {self.engine}; wait for it or stop it"
            )
        if self._lock is None:
            raise DataError(
                f"another process packs into {self.out} as the same rank; wait for it or stop it "
                "(a launcher other than torchrun and srun must set RANK and WORLD_SIZE)"
            )

        self._join()

        # Failures of the last start are not this one's.
        if self.rank == 0:
            for failed in self.folder.glob("failed_*"):
                failed.unlink(missing_ok=True)
        return True

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
                    f"another packer works in {self.out}, as {found}, and this one as {layout}; "
                    "wait for it or stop it, or give another --out"
                )
            time.sleep(0.2)

    def _layout_beside(self, layout: str) -> str:
        """What all who work here agree on, `layout` where this process is the first."""
        path = self.folder / "ranks.lock"
        if self._together:
            self._together.close()
        # The first of all says how many there are. Read again under the shared lock: between the
        # two another may have been the first.
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
                f"this process would not make the set that was begun in {self.out}. What "
                "differs:\n  " + "\n  ".join(differ)
            )
        self._join()

    @contextmanager
    def hold(self, part: int) -> Iterator[None]:
        """No other process makes the part until the block ends: one on a machine that was given up
        may still be at work. Waits for its end, for some minutes."""
        # A machine that lost its power may hold a lock for ever. A process that works after minutes
        # without its engine would write the same bytes.
        lock = _lock_within(self.folder / f"part_{part:05d}.lock", GONE_S)
        try:
            yield
        finally:
            if lock:
                lock.close()

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
                if time.monotonic() - progressed > GONE_S:
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

    def close(self) -> None:
        for lock in (self._lock, self._together):
            if lock:
                lock.close()


def _patience_s() -> float:
    """How long a start waits for locks that are held. One that Slurm has requeued may find those of
    its own last start, on a node that was lost: the file system frees them after a while."""
    return GONE_S if env_int("SLURM_RESTART_COUNT", default=0) else 0.0


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
