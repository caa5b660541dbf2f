"""Which job a folder is of, and whether that is the one that is wanted.

OUT/packing/job.json             what is being made; the first rank writes it, the others must
                                 want the same
OUT/manifest.json                names the job too, once it is done
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from largescale.config.serialise import flatten
from largescale.data.format import MANIFEST, read_manifest
from largescale.data.shards import ShardDataset
from largescale.errors import DataError, Stopped
from largescale.host.files import from_json, try_lock
from largescale.host.signals import stop_requested

JOB = "packing/job.json"
# The key of a job that adds to a set which is there.
APPEND = "append"
_SHA256 = re.compile("[0-9a-f]{64}")
Flat = Mapping[str, Any]  # a job by dotted keys
# What a folder of another job holds, and what to do about it.
OTHER_JOB = "another data set, or a part of one; give another --out, or delete the folder"
# Seconds without a sign of life from another rank, after which it may be gone.
GONE_S = 300.0


class JobFolder:
    """The folder of a data set that several ranks make, and the job that says what they make.

    places: from the flat keys of the job found here and of this one, those whose values may differ.
    A job that was started before is continued, and `job` is then that one.
    """

    def __init__(
        self,
        out: Path,
        job: dict[str, Any],
        rank: int,
        places: Callable[[Flat, Flat], Collection[str]] = lambda found, ours: (),
        *,
        other: str = OTHER_JOB,
    ) -> None:
        """`other`: what a folder of another job holds, for a message, as OTHER_JOB."""
        self.out, self.rank = out, rank
        # As JSON has it, to be compared with what is read.
        self.job: dict[str, Any] = json.loads(json.dumps(job))
        self.folder = out / "packing"
        self._places, self._other = places, other
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
        # Programs note other things about their sources: that the program is another says it all.
        program = "source.program"
        is_other = theirs.get(program) != ours.get(program)
        differences = []
        for key in theirs | ours:
            if is_other and key.startswith("source.") and key != program:
                continue
            there, here = theirs.get(key), ours.get(key)
            if there != here and key not in places:
                differences.append(difference(key, there, here))
        # Values that may differ stay as the job was started with, also in the manifest.
        if not differences:
            self.job = found
        return differences

    def differing(self) -> list[str]:
        """What differs between this job and that of the folder, a line each; nothing where the folder
        has none."""
        with suppress(DataError, OSError):
            return self._differences(self._job_in_folder())
        return []

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
            if time.monotonic() - started > GONE_S:
                raise DataError(
                    f"rank 0 has not removed what lies in {self.out}; see its messages, and run "
                    "again"
                )
            time.sleep(0.2)

    @property
    def finished(self) -> bool:
        return (self.out / MANIFEST).exists()

    def _check_finished(self) -> None:
        """Raises DataError unless the finished set here is this job's, with all of its files."""
        self._compare(self._job_in_folder())
        if not is_complete(self.out):
            raise DataError(
                f"{self.out} lacks a shard, or has one of another size; restore it, or to pack "
                f"it anew, delete {self.out} first"
            )

    def _begin(self) -> None:
        """Writes this job into the folder, unless one is there. Raises DataError for another one."""
        self._require_no_stray_shards()
        # All ranks try to create the file, and then compare with the one that came first.
        self.folder.mkdir(parents=True, exist_ok=True)
        _create(self.out / JOB, json.dumps(self.job, indent=1))
        self._compare(self._job_in_folder())

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

    def _compare(self, found: dict[str, Any]) -> None:
        """Raises DataError where the job found in the folder is another one."""
        if differ := self._differences(found):
            raise DataError(
                f"{self.out} holds {self._other}. What differs:\n  " + "\n  ".join(differ)
            )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def difference(key: str, there: object, here: object) -> str:
    """A line on what two jobs have otherwise."""
    # Hashes tell a reader nothing else.
    if any(isinstance(value, str) and _SHA256.fullmatch(value) for value in (there, here)):
        return f"{key}: not the same"
    return f"{key}: {there} there, {here} here"


def is_complete(out: Path) -> bool:
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
