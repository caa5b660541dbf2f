"""Whole-or-absent checkpoints: snapshot to host memory, write in a thread, and a manifest last.

DeepSpeed's own `save_checkpoint` decides what is saved; where it goes is decided by a `Writer` put in its place of a
"checkpoint engine". A failed write never raises between two collectives, where it would leave the other ranks hanging:
ranks tell each other in `Checkpointer.finish`, and without a manifest the checkpoint does not exist.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint_files import (
    FORMAT,
    MANIFEST,
    CheckpointDir,
    checkpoints,
    newest_valid,
    step_folders,
)
from largescale.config import CheckpointConfig
from largescale.distributed import Ranks
from largescale.engine import Engine, plain
from largescale.errors import CheckpointError
from largescale.files import fsync_dir, sha256, write_atomically


class Writer:
    """What DeepSpeed calls a checkpoint engine, by duck type: takes states, writes them in order in one thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: list[Future[tuple[str, dict[str, Any]]]] = []
        self._error: str | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self._files.append(self._pool.submit(_write, plain(state_dict), Path(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._error = str(error)

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    @property
    def busy(self) -> bool:
        return not all(file.done() for file in self._files)

    def collect(self) -> tuple[dict[str, Any], str | None]:
        """Wait for this rank's files: ({name: {bytes, sha256}}, what went wrong if anything did)."""
        files, error = {}, self._error
        for future in self._files:
            try:
                name, facts = future.result()
                files[name] = facts
            except Exception as failure:  # whatever it was, training goes on and the message says it
                error = f"{type(failure).__name__}: {failure}"
        self._files, self._error = [], None
        return files, error


def _write(state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)}


class Checkpointer:
    """Every public method is collective: all ranks call it at the same step."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, ranks: Ranks):
        self.run_dir, self.config, self.ranks = run_dir, config, ranks
        self._writer = Writer()
        self._pending: tuple[CheckpointDir, dict[str, Any]] | None = None
        self._damaged: set[int] = set()  # steps
        self.last_saved = -1  # the step of the newest checkpoint that is on disk

    @property
    def writing(self) -> bool:
        """Whether this rank still writes. Not collective."""
        return self._writer.busy

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for `finish`. The same on every rank, not collective."""
        return self._pending is not None

    def save(self, step: int, state: dict[str, Any], engine: Engine) -> None:
        """Snapshot, and start to write; `finish` what was started before. `state`: plain values, equal on all ranks."""
        assert not self.pending
        if step == self.last_saved:
            return
        checkpoint = CheckpointDir.at(self.run_dir, step)
        if self.ranks.rank == 0 and checkpoint.path.exists():  # damaged, or never finished: or it would be `last_saved`
            _remove(checkpoint)
        self._damaged.discard(step)
        engine.save(checkpoint, state, self._writer)
        self._pending = checkpoint, state

    def finish(self) -> str | None:
        """Wait for the files of all ranks and make the checkpoint valid. Returns what went wrong, or None.

        Raises CheckpointError if the ranks' states are not the same: one of them has lost its way.
        """
        if self._pending is None:
            return None
        (checkpoint, state), self._pending = self._pending, None
        reports = self.ranks.all_gather_object((*self._writer.collect(), json.dumps(state, sort_keys=True)))
        _require_equal([text for _, _, text in reports])
        errors = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(reports) if error]
        if self.ranks.rank == 0 and not errors:
            try:
                _publish(checkpoint, state, {k: v for files, _, _ in reports for k, v in files.items()}, len(reports))
            except OSError as error:
                errors = [f"rank 0: {error}"]
        (errors, *_) = self.ranks.all_gather_object(errors)
        if errors:
            if self.ranks.rank == 0:
                _remove(checkpoint)  # on a full disk its remains would be in the way of the next
            return f"checkpoint of step {checkpoint.step} was not written: " + "; ".join(errors)
        self.last_saved = checkpoint.step
        if self.ranks.rank == 0:
            self._retain()
        return None

    def newest(self, say: Callable[[str], None]) -> CheckpointDir | None:
        """The newest checkpoint that every rank finds sound; ranks share the hashing.

        Raises CheckpointError where there are checkpoints and none can be used: never a silent restart.
        """
        ranks = self.ranks
        (steps, *_) = ranks.all_gather_object([c.step for c in checkpoints(self.run_dir)])

        def check(checkpoint: CheckpointDir) -> str | None:
            found = checkpoint.problem(slice(ranks.rank, None, ranks.world_size))
            return next(filter(None, ranks.all_gather_object(found)), None)

        found = (CheckpointDir.at(self.run_dir, step) for step in steps)
        newest, self._damaged = newest_valid(self.run_dir, found, say, check)
        if newest is not None:
            self.last_saved = newest.step
        return newest

    def _retain(self) -> None:
        """Keep the last k and every m-th; remove what never became valid. Only after a newer one is valid.

        One that was found damaged neither counts as kept nor is removed: somebody may want to repair it.
        """
        valid = [c for c in checkpoints(self.run_dir) if c.step not in self._damaged]
        every = self.config.keep_every
        keep = {c.step for c in valid[: self.config.keep_last]}
        keep |= {c.step for c in valid if c.step > 0 and every and c.step % every == 0}
        for checkpoint in step_folders(self.run_dir):
            if checkpoint.step not in keep | self._damaged:
                _remove(checkpoint)


def _publish(checkpoint: CheckpointDir, state: dict[str, Any], files: dict[str, Any], world_size: int) -> None:
    fsync_dir(checkpoint.path)
    manifest = {
        "format": FORMAT, "step": checkpoint.step, "world_size": world_size, "files": files,
        "written_unix_s": round(time.time()), "state": state,
    }
    write_atomically(checkpoint.path / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))


def _remove(checkpoint: CheckpointDir) -> None:
    (checkpoint.path / MANIFEST).unlink(missing_ok=True)  # first: from here on it does not exist
    shutil.rmtree(checkpoint.path, ignore_errors=True)


def _require_equal(states: list[str]) -> None:
    for rank, text in enumerate(states):
        if text != states[0]:
            first, other = json.loads(states[0]), json.loads(text)
            key = next(k for k in first if first[k] != other.get(k))
            error = CheckpointError(f"rank {rank} disagrees with rank 0 on {key}: {other.get(key)} and {first[key]}")
            error.agreed = True
            raise error
