"""Atomic checkpoints: snapshot to host memory, write in a thread, and a manifest last.

DeepSpeed's own `save_checkpoint` decides what is saved; a `Writer`, which takes the place of
DeepSpeed's "checkpoint engine", decides where. A failed write never raises between two collectives,
where it would leave the other ranks hanging: ranks exchange their errors in `Checkpointer.finish`,
and without a manifest the checkpoint does not exist.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.files import (
    FORMAT,
    MANIFEST,
    CheckpointDir,
    UnseenError,
    checkpoints,
    newest_valid,
    seal,
    step_folders,
)
from largescale.checkpoint.run_lock import RunLock
from largescale.checkpoint.writer import Engine, Writer
from largescale.config.schema import CheckpointConfig
from largescale.config.serialise import flatten
from largescale.distributed.ranks import Ranks
from largescale.errors import (
    CheckpointError,
    LargescaleError,
    NewerVersionError,
    StorageError,
    TakenOverError,
)
from largescale.host.files import fsync_dir, write_atomically
from largescale.host.launch import heartbeat

# Pauses before a file is looked for again that other ranks see: by default NFS shows it within a
# minute.
SEEN_LATER_S = (1.0, 5.0, 20.0, 40.0)
# The gravest last.
_ERRORS = (CheckpointError, UnseenError, StorageError, NewerVersionError)


class Checkpointer:
    """Saves a run's checkpoints, finds the newest valid one, and removes old ones.

    Every public method is collective: all ranks call it at the same step.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        patience_s: float,
        lock: RunLock | None = None,
    ):
        """`patience_s`: how long `finish` waits for a file system that does not answer; `lock`:
        on the run directory, which rank 0 holds."""
        self.run_dir = run_dir
        self.config = config
        self.ranks = ranks
        self._patience_s = patience_s
        self._lock = lock
        self._writer = Writer()
        self._pending: Pending | None = None
        # Steps whose checkpoints were found damaged.
        self._damaged: set[int] = set()
        # The step of the newest checkpoint that is on disk.
        self.last_saved = -1
        # Steps at which the validation loss fell, where the best checkpoint is kept.
        self.best_steps: Callable[[], Sequence[int]] = tuple

    @property
    def writing(self) -> bool:
        """Whether this rank still writes. Not collective."""
        return self._writer.busy

    @property
    def failed(self) -> bool:
        """Whether this rank's part has failed. Not collective."""
        return self._writer.failed

    @property
    def taken_over(self) -> bool:
        """Whether this rank knows that another process trains the run since. Not collective."""
        return self._lock is not None and self._lock.lost

    @property
    def write_s(self) -> float:
        """Seconds that this rank's thread spent on the last checkpoint."""
        return self._writer.seconds

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for `finish`. The same on every rank, not collective."""
        return self._pending is not None

    def save(self, step: int, state: dict[str, Any], engine: Engine, reason: str) -> None:
        """Take a snapshot, and start to write it, after `finish` of the one before.

        `state`: plain values, equal on all ranks. `reason`: 'start', 'schedule', 'best', 'stop' (a
        signal) or 'end'. Nothing is done where `step` is saved already.
        """
        assert not self.pending
        if step == self.last_saved:
            return
        self._writer.seconds = 0.0
        self._find_run_dir()

        # A folder of this step is damaged or was never finished: else it would be `last_saved`.
        checkpoint = CheckpointDir.at(self.run_dir, step)
        if self.ranks.rank == 0:
            self._writer.attempt(partial(self._remove, checkpoint))
        self._damaged.discard(step)

        # The checksum is of the weights that the snapshot has.
        engine.save(checkpoint, state, self._writer)
        self._pending = Pending(checkpoint, state, reason, engine.weights_checksum())

    def finish(self) -> tuple[bool, str | None]:
        """Wait for the files of all ranks and make the checkpoint valid: (whether it is valid, the
        same on all ranks; what went wrong or None, complete on rank 0).

        Where the file system does not answer in time, it stays pending. Raises CheckpointError if
        the ranks' states are not the same: one of them computes something else.
        """
        pending = self._pending
        assert pending is not None
        ranks = self.ranks
        what = f"checkpoint of step {pending.checkpoint.step}"

        # A rank whose file system hangs must not leave the others waiting for ever.
        done = ranks.all_gather_json(self._writer.wait(self._patience_s))
        late = [rank for rank, is_done in enumerate(done) if not is_done]
        if late:
            waited = f"{self._patience_s:g} s"
            return False, f"{what} is still not written after {waited}, on ranks {late[:8]}"
        self._pending = None

        # All ranks learn what each has written, and compare their states.
        own = {**pending.state, "weights (checksum)": pending.weights}
        reports = ranks.all_gather_json((*self._writer.collect(), json.dumps(own, sort_keys=True)))
        files: dict[str, Any] = {}
        errors: list[str] = []
        states: list[str] = []
        for rank, (rank_files, error, rank_state) in enumerate(reports):
            files.update(rank_files)
            states.append(rank_state)
            if error:
                errors.append(f"rank {rank}: {error}")
        _require_equal(states)

        # Rank 0 writes the manifest, which makes the checkpoint valid, and broadcasts the outcome.
        if ranks.rank == 0 and not errors:
            errors = _try_to_publish(pending, files, len(reports), self._lock)
        self.require_lock()
        (errors, *_) = ranks.all_gather_json(errors)
        if not errors:
            self.last_saved = pending.checkpoint.step
        problem = self._clean_up(pending.checkpoint, failed=bool(errors))
        if errors:
            return False, f"{what} was not written: " + "; ".join(errors)
        if problem:
            return True, f"{what} is written, but {problem}"
        return True, None

    def _clean_up(self, checkpoint: CheckpointDir, *, failed: bool) -> str | None:
        """On rank 0, remove what is not needed any more; what went wrong, or None."""
        if self.ranks.rank != 0:
            return None
        # On a full disk the remains of a failed checkpoint would take the next one's space.
        try:
            if failed:
                self._remove(checkpoint)
            else:
                self._retain()
        except (OSError, TakenOverError) as error:
            return f"what is not needed any more cannot be removed: {error}"
        return None

    def newest(self, log: Callable[[str], None]) -> CheckpointDir | None:
        """The newest checkpoint that every rank finds valid; ranks share the hashing.

        Raises as `newest_valid` where there are checkpoints and none can be used: a run is never
        started over silently.
        """
        self._find_run_dir()
        # On a network file system a rank alone may see a new checkpoint yet: all of them count.
        own = self.ranks.raise_on_all_ranks(lambda: [c.step for c in checkpoints(self.run_dir)])
        listed = self.ranks.all_gather_json(own)
        steps = sorted(set().union(*listed), reverse=True)

        found = [CheckpointDir.at(self.run_dir, step) for step in steps]
        newest, self._damaged = newest_valid(self.run_dir, found, log, self._check)
        self.last_saved = -1 if newest is None else newest.step
        return newest

    def require_lock(self) -> None:
        """Raise TakenOverError, on all ranks, where another process trains the run since."""

        def require() -> None:
            # A file system that fails at present is reported by what is written next.
            with contextlib.suppress(OSError):
                if self._lock is not None:
                    self._lock.require()

        self.ranks.raise_on_all_ranks(require)

    def _find_run_dir(self) -> None:
        """Find the run directory under its present name; where it was deleted, make and lock it
        again. Raises an error on all ranks where another process trains there since."""

        def find() -> tuple[str, str]:
            if self._lock is None:
                return str(self.run_dir), ""
            return str(self._lock.find()), self._lock.token

        # Only rank 0 has the lock, so its path counts.
        found = self.ranks.all_gather_json(self.ranks.raise_on_all_ranks(find))
        run_dir, self._writer.token = found[0]
        self.run_dir = Path(run_dir)

    def _check(self, checkpoint: CheckpointDir) -> LargescaleError | None:
        """The gravest error that the ranks find. A file that only some of them see is waited
        for."""
        ranks = self.ranks
        part = slice(ranks.rank, None, ranks.world_size)
        own = ranks.raise_on_all_ranks(lambda: checkpoint.check(part))
        unseen = _ERRORS.index(UnseenError)
        for pause in (*SEEN_LATER_S, None):
            reports = ranks.all_gather_json((_ERRORS.index(type(own)), str(own)) if own else None)
            kinds = {report[0] if report else None for report in reports}
            # No file is missing, or every rank misses one: waiting will not change it.
            if pause is None or unseen not in kinds or kinds == {unseen}:
                break
            heartbeat()
            time.sleep(pause)
            if isinstance(own, UnseenError):
                own = checkpoint.check(part)

        # Of equally grave errors, that of the first rank.
        errors = list(filter(None, reports))
        if not errors:
            return None
        kind, text = max(errors, key=itemgetter(0))
        return _ERRORS[kind](text)

    def _retain(self) -> None:
        """Remove checkpoints that the config does not keep, and folders that never became valid.
        Only after a newer one is valid.

        Kept are the last k, every m-th, the best by the validation loss, and the last that was
        written on a stop, so that preemptions do not push the others out. A damaged one is neither counted nor removed:
        somebody may want to repair it.
        """
        keep = set(self._damaged)
        every = self.config.keep_every
        regular: list[int] = []
        on_stop: list[int] = []
        for checkpoint in checkpoints(self.run_dir):
            step = checkpoint.step
            if step in self._damaged:
                continue
            if every and step > 0 and step % every == 0:
                keep.add(step)
                regular.append(step)
                continue
            # Old ones were not checked at the start; without a reason one is damaged too.
            reason = _reason(checkpoint)
            if reason is None:
                keep.add(step)
            # It has no other claim than being the best.
            elif reason == "best":
                continue
            elif reason == "stop":
                on_stop.append(step)
            else:
                regular.append(step)

        # The last step at which the validation loss fell and whose checkpoint could be written.
        exist = {checkpoint.step for checkpoint in checkpoints(self.run_dir)} - {*self._damaged}
        best = [step for step in self.best_steps() if step in exist]
        keep.update(best[-1:])
        # The newest come first.
        keep.update(regular[: self.config.keep_last])
        keep.update(on_stop[:1])
        for checkpoint in step_folders(self.run_dir):
            if checkpoint.step not in keep:
                self._remove(checkpoint)

    def _remove(self, checkpoint: CheckpointDir) -> None:
        """Remove a checkpoint, unless another process trains the run since."""
        if self._lock is not None:
            self._lock.require()
        checkpoint.remove()


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    checkpoint: CheckpointDir
    state: dict[str, Any]
    reason: str
    weights: int


def _try_to_publish(
    pending: Pending, files: dict[str, Any], world_size: int, lock: RunLock | None
) -> list[str]:
    """Write the manifest: the errors, one or none."""
    try:
        if lock is not None:
            lock.renew()
        _publish(pending, files, world_size)
    except (OSError, ValueError, TakenOverError) as error:
        return [f"rank 0: {error}"]
    return []


def _publish(pending: Pending, files: dict[str, Any], world_size: int) -> None:
    checkpoint = pending.checkpoint
    # Each folder holds the name of the one before, which a power cut would otherwise take back.
    *ours, above = (checkpoint.path, *checkpoint.path.parents[:3])
    for folder in ours:
        fsync_dir(folder)
    # The folder above the run directory may be another user's.
    with contextlib.suppress(PermissionError):
        fsync_dir(above)

    # The manifest comes last: with it the checkpoint exists.
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "reason": pending.reason,
        "world_size": world_size,
        "files": files,
        "written_unix_s": round(time.time()),
        **rounding_facts(),
        "state": pending.state,
    }
    write_atomically(checkpoint.path / MANIFEST, seal(manifest))


def rounding_facts() -> dict[str, Any]:
    """What decides, besides the settings, in which order and by which instructions a CPU adds
    numbers."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _reason(checkpoint: CheckpointDir) -> str | None:
    """Why the checkpoint was written; None if its manifest cannot be read."""
    try:
        return str(checkpoint.manifest().get("reason"))
    except (CheckpointError, StorageError):
        return None


def _require_equal(states: list[str]) -> None:
    """Raise CheckpointError where a rank's state, as JSON, is not rank 0's."""
    for rank, text in enumerate(states):
        if text != states[0]:
            key, first, other = _first_difference(states[0], text)
            error = CheckpointError(
                f"rank {rank} disagrees with rank 0 on {key}: {other} and {first}; nothing was "
                "saved, and the same command continues from the last checkpoint; if it happens "
                "again, suspect that rank's machine"
            )
            # As after a crash: a requeue starts the run again.
            error.agreed = True
            error.exit_status = 1
            raise error


def _first_difference(state: str, other_state: str) -> tuple[str, Any, Any]:
    """(key, value, other value) of two states, as JSON, that differ."""
    values = dict(flatten(json.loads(state)))
    other_values = dict(flatten(json.loads(other_state)))
    for key in values | other_values:
        value = values.get(key)
        other = other_values.get(key)
        if value != other:
            return key, value, other
    raise AssertionError
