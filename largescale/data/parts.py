"""What is done of a data set that several ranks make, kept in the file system, where they meet.

OUT/packing/job.json             what is being made; the first rank writes it, the others must
                                 want the same
OUT/packing/part_00000.json ...  what is done of each part
OUT/packing/rank_0.lock ...      held while a rank works: two processes must not be the same rank
OUT/packing/failed_1 ...         why a rank failed, so that rank 0 does not wait for it
"""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from largescale.config.serialise import flatten
from largescale.data.format import MANIFEST, read_manifest
from largescale.data.shards import ShardDataset
from largescale.errors import DataError, Stopped, usable
from largescale.host.files import from_json, try_lock, write_atomically
from largescale.host.launch import printable
from largescale.host.signals import stop_requested

JOB = "packing/job.json"
Flat = Mapping[str, Any]  # a job by dotted keys
_GONE_S = 300.0  # without a new part, before rank 0 looks who still works


class Parts:
    """Part p is rank p % world_size's.

    places: of the flat keys of a job found here and of this one, those that do not tell the two
    apart. What was begun as the same job goes on as that, and `job` is that one.
    """

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
        self.job: dict[str, Any] = json.loads(json.dumps(job))
        self.folder = out / "packing"
        self._places, self._other = places, other
        self._lock: IO[str] | None = None
        self._is_this_job()

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()

    def _begun(self) -> dict[str, Any]:
        """The job that is done here, or begun. Raises DataError or OSError where there is none."""
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
        """What differs between this job and that; where nothing does, this one becomes that."""
        theirs, ours = dict(flatten(found)), dict(flatten(self.job))
        places = self._places(theirs, ours)
        differ = [
            f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in theirs | ours
            if theirs.get(key) != ours.get(key) and key not in places
        ]
        if not differ:
            self.job = found
        return differ

    @property
    def mine(self) -> range:
        return range(self.rank, self.parts, self.world_size)

    def claim(self) -> bool:
        """Whether there is something to do: False where this very job is done. Raises DataError for
        another's."""
        try:
            return self._claim()
        except (DataError, FileNotFoundError):
            if self.finished and self._is_this_job() and _is_whole(self.out):
                return False  # rank 0 has finished while this late rank was looking
            raise

    def _is_this_job(self) -> bool:
        """Whether what lies here is this job's, done or begun."""
        with suppress(DataError, OSError):
            return not self._differences(self._begun())
        return False

    def make_room(self) -> None:
        """What another job has left here is removed, by rank 0; the others wait for that. Raises
        DataError while that other job is at work."""
        if self._is_this_job():
            return
        if self.rank == 0:
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
            return
        waited = time.monotonic()
        while not self._is_this_job():
            if stop_requested():
                raise Stopped
            if time.monotonic() - waited > _GONE_S:
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
            self._compare(self._begun())
            if not _is_whole(self.out):
                raise DataError(
                    f"{self.out} lacks a shard, or has one of another size; restore it, or to pack "
                    f"it anew, delete {self.out} first"
                )
            if self.rank == 0:
                self.remove()  # left by a kill after the manifest was written
            return False
        if not job_file.exists() and (stray := next(self.out.glob("shard_*.arrow"), None)):
            raise DataError(
                f"{self.out} holds {stray.name}, and nothing that says of which data set; give "
                "another --out, or delete the folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _create(job_file, json.dumps(self.job, indent=1))
        self._compare(self._begun())  # another rank's may have been first
        self._lock = try_lock(self.folder / f"rank_{self.rank}.lock")
        if self._lock is None:
            raise DataError(
                f"another process packs into {self.out} as the same rank; wait for it or stop it (a "
                "launcher other than torchrun and srun must set RANK and WORLD_SIZE)"
            )
        for failed in self.folder.glob("failed_*") if self.rank == 0 else ():
            failed.unlink(missing_ok=True)
        return True

    def _compare(self, found: dict[str, Any]) -> None:
        if differ := self._differences(found):
            raise DataError(
                f"{self.out} holds {self._other}. What differs:\n  " + "\n  ".join(differ)
            )

    def record(self, part: int) -> dict[str, Any]:
        """What is done of a part: nothing, where a shard is not as it was written."""
        nothing: dict[str, Any] = {
            "done": False,
            "items": 0,
            "captions": 0,
            "columns": [],
            "shards": [],
            "skipped": [],
        }
        try:
            record: dict[str, Any] = from_json(self._path(part).read_text())
        except (FileNotFoundError, ValueError):
            return nothing
        with usable(self._path(part)):
            if record.get("job", self._digest) != self._digest:
                return nothing  # by a process that had not noticed that its job was replaced
            files = ((self.out / shard["file"], shard["bytes"]) for shard in record["shards"])
            return (
                record
                if all(f.is_file() and f.stat().st_size == size for f, size in files)
                else nothing
            )

    def save(self, part: int, record: dict[str, Any]) -> None:
        write_atomically(self._path(part), json.dumps(record | {"job": self._digest}))

    def _path(self, part: int) -> Path:
        return self.folder / f"part_{part:05d}.json"

    def all_records(self) -> list[dict[str, Any]]:
        """Of every part in order; waits until all are done. Raises DataError when a rank has
        failed."""
        records: dict[int, dict[str, Any]] = {}
        said = moved = time.monotonic()
        with tqdm(
            total=self.parts,
            desc="wait for the other ranks",
            unit="part",
            delay=2,
            dynamic_ncols=True,
        ) as bar:
            while missing := [part for part in range(self.parts) if part not in records]:
                found = {part: record for part in missing if (record := self.record(part))["done"]}
                records |= found
                moved = time.monotonic() if found else moved
                bar.update(len(found))
                missing = [part for part in missing if part not in found]
                if broken := [part for part in missing if part in self.mine]:
                    raise DataError(
                        f"the shards of part {broken[0]} were changed while packing; run again"
                    )
                for rank in sorted(
                    {part % self.world_size for part in missing}
                ):  # others' words are not of this job
                    if (word := self.folder / f"failed_{rank}").exists():
                        raise DataError(
                            f"rank {rank} has failed: {word.read_text()}; correct that, and run "
                            "again to go on"
                        )
                if missing and time.monotonic() - said > 60:
                    said = time.monotonic()
                    ranks = ", ".join(
                        str(rank)
                        for rank in sorted({part % self.world_size for part in missing})[:8]
                    )
                    tqdm.write(f"waiting for {len(missing)} parts, of ranks {ranks}", sys.stderr)
                if missing and stop_requested():
                    raise Stopped
                if (
                    missing
                    and time.monotonic() - moved > _GONE_S
                    and (gone := self._not_at_work(missing))
                ):
                    raise DataError(
                        f"rank {gone[0]} is not at work, and has not packed its parts (ranks "
                        f"{gone[:8]}); see its messages, correct that, and run again to go on"
                    )
                if missing:
                    time.sleep(0.5)
        return [records[part] for part in range(self.parts)]

    def _not_at_work(self, missing: list[int]) -> list[int]:
        """Ranks that owe parts and hold no lock: they died, or never began."""
        gone = []
        for rank in sorted({part % self.world_size for part in missing}):
            if lock := try_lock(self.folder / f"rank_{rank}.lock"):
                lock.close()
                gone.append(rank)
        return gone

    def failed(self, error: BaseException) -> None:
        """Leaves word for rank 0; not where another process works as this rank, which has not
        failed."""
        if self.rank == 0:
            return
        with suppress(OSError):  # the folder is gone where rank 0 has finished
            if self._lock or try_lock(self.folder / f"rank_{self.rank}.lock"):
                (self.folder / f"failed_{self.rank}").write_text(
                    printable(str(error) or repr(error))
                )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self._lock:
            self._lock.close()


def _is_whole(out: Path) -> bool:
    try:
        ShardDataset(out)
    except DataError:
        return False
    return True


def _create(path: Path, text: str) -> None:
    """The first of several processes makes the file, whole; for the others nothing happens."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text)
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
