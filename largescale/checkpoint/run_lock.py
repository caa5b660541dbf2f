"""The lock of a run directory: one process trains the run at a time."""

import contextlib
import os
from pathlib import Path
from typing import IO, Self

from largescale.errors import CheckpointError
from largescale.host.files import LOCK, located, try_lock
from largescale.host.lease import LEASE, Lease


class RunLock:
    """A run directory that this process alone trains, until it is left: by a lock of the file
    system, and by a lease, since some file systems have no locks, or none between machines."""

    def __init__(self, run_dir: Path, file: IO[str], lease: Lease):
        """`file`: RUN/lock, which is locked."""
        self._run_dir = run_dir
        self._file: IO[str] | None = file
        self._lease = lease

    @property
    def token(self) -> str:
        """What the other ranks recognise the lease by."""
        return self._lease.token

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken over. Touches no file."""
        return self._lease.lost is not None

    def require(self) -> None:
        """Before something is written: raise TakenOverError where another process has taken over,
        OSError where that cannot be found out. Mostly touches no file."""
        self._lease.require()

    def renew(self) -> None:
        """As `require`, and look at the files in any case: for what is rare and must not be
        lost."""
        self._lease.renew()

    def find(self) -> Path:
        """The run directory under its present name; where it was deleted, it is made and locked
        again. Raises TakenOverError, and CheckpointError, where another process trains there
        since."""
        file = self._file
        if file is not None:
            self._run_dir = located(self._run_dir / LOCK, file.fileno()).parent
            # Where nothing can be written at present, the save that follows reports it.
            with contextlib.suppress(OSError):
                # A lock file without links was deleted, and the directory with it.
                if not os.fstat(file.fileno()).st_nlink:
                    self._run_dir.mkdir(parents=True, exist_ok=True)
                    self._file = try_lock(self._run_dir / LOCK)
                    self._lease.move(self._run_dir / LEASE)
        if self._file is None:
            raise CheckpointError(
                f"{self._run_dir} was deleted, and another process trains there now; start another "
                "run with --output DIR"
            )
        with contextlib.suppress(OSError):
            self._lease.renew()
        return self._run_dir

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lease.release()
        # The lock last: who waits for it finds the lease free.
        if self._file is not None:
            self._file.close()
