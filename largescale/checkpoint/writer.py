"""Writes the files of a checkpoint, in order, in a thread of their own."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from largescale.checkpoint.files import CheckpointDir
from largescale.errors import TakenOverError
from largescale.host.files import sha256
from largescale.host.lease import require_owner


class Engine(Protocol):
    """What is saved: see `largescale.engine.deepspeed_engine`."""

    def save(
        self, checkpoint: CheckpointDir, client_state: dict[str, Any], writer: "Writer"
    ) -> None: ...

    def weights_checksum(self) -> int: ...


class Writer:
    """Takes states and writes them, in order, in one thread. By duck type it is what DeepSpeed
    calls a checkpoint engine."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: list[Future[tuple[str, dict[str, Any]]]] = []
        self._error: str | None = None
        # Spent in the thread on this rank's files of one checkpoint.
        self.seconds = 0.0
        # Of the lease that rank 0 holds on the run directory; empty where there is none.
        self.token = ""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """`state_dict` must not change until it is written."""
        self._files.append(self._pool.submit(self._timed_write, state_dict, Path(path)))

    def _timed_write(self, state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
        start = time.perf_counter()
        try:
            # RUN/checkpoints/step_00001000/FILE may be a valid checkpoint's by now, if this process
            # was suspended and another one trains the run.
            if self.token:
                require_owner(path.parents[2], self.token)
            return _write(state, path)
        finally:
            self.seconds += time.perf_counter() - start

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make RUN/checkpoints and the folder of a checkpoint in it."""
        # Not RUN itself, which may have been renamed a moment ago.
        for folder in (Path(path).parent, Path(path)):
            if "checkpoints" in (folder.name, folder.parent.name):
                self.attempt(partial(folder.mkdir, exist_ok=True))

    # What DeepSpeed calls besides, and needs no work here.

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do what may fail without space, permission or a file system: then the checkpoint fails,
        not the run."""
        try:
            action()
        except (OSError, TakenOverError) as error:
            self._error = str(error)

    @property
    def busy(self) -> bool:
        return not all(map(Future.done, self._files))

    @property
    def failed(self) -> bool:
        for file in self._files:
            if file.done() and file.exception():
                return True
        return self._error is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether this rank's files are written, or have failed, after `timeout_s` at most."""
        return not wait(self._files, timeout_s).not_done

    def collect(self) -> tuple[dict[str, Any], str | None]:
        """Wait for this rank's files: ({name: {bytes, sha256}}, the last error or None)."""
        files = {}
        error = self._error
        for future in self._files:
            try:
                name, facts = future.result()
                files[name] = facts
            # Whatever it was, training continues and the message names it.
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
        # Ready for the next checkpoint.
        self._files = []
        self._error = None
        return files, error


def _write(state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Write a state, and wait until it is on disk: (name, {bytes, sha256})."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # The cause, such as a full disk, which torch hides behind its count of bytes.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)}
