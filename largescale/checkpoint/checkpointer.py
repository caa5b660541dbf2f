"""Whole-or-absent checkpoints: snapshot to host memory, write in a thread, and a manifest last.

DeepSpeed's own `save_checkpoint` decides what is saved; where it goes is decided by a `Writer` put
in its place of a "checkpoint engine". A failed write never raises between two collectives, where it
would leave the other ranks hanging: ranks tell each other in `Checkpointer.finish`, and without a
manifest the checkpoint does not exist.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

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
from largescale.config.schema import CheckpointConfig
from largescale.config.serialise import flatten
from largescale.distributed.ranks import Ranks
from largescale.errors import CheckpointError, LargescaleError, NewerVersionError, StorageError
from largescale.host.files import LOCK, fsync_dir, located, sha256, try_lock, write_atomically
from largescale.host.launch import heartbeat

SEEN_LATER_S = (1.0, 5.0, 20.0, 40.0)
"""Pauses before a file is looked for again that other ranks see: by default NFS shows it within a
minute."""
_ERRORS = (CheckpointError, UnseenError, StorageError, NewerVersionError)  # the gravest last


class Engine(Protocol):
    """What is saved: see `largescale.engine.deepspeed_engine`."""

    def save(
        self, checkpoint: CheckpointDir, client_state: dict[str, Any], writer: "Writer"
    ) -> None: ...

    def weights_checksum(self) -> int: ...


class Writer:
    """What DeepSpeed calls a checkpoint engine, by duck type: takes states, writes them in order in
    one thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: list[Future[tuple[str, dict[str, Any]]]] = []
        self._error: str | None = None
        self.seconds = 0.0  # spent on this rank's files of one checkpoint, in the thread

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """`state_dict` must not change until it is written."""
        self._files.append(self._pool.submit(self._timed_write, state_dict, Path(path)))

    def _timed_write(self, state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
        start = time.perf_counter()
        try:
            return _write(state, path)
        finally:
            self.seconds += time.perf_counter() - start

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """RUN/checkpoints and what is in it; not RUN, which may have been renamed a moment ago."""
        for folder in (Path(path).parent, Path(path)):
            if "checkpoints" in (folder.name, folder.parent.name):
                self.attempt(lambda folder=folder: folder.mkdir(exist_ok=True))  # type: ignore[misc]

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def attempt(self, action: Callable[[], Any]) -> None:
        """What may fail for want of space, permission or a file system: then the checkpoint fails,
        not the run."""
        try:
            action()
        except OSError as error:
            self._error = str(error)

    @property
    def busy(self) -> bool:
        return not all(file.done() for file in self._files)

    @property
    def failed(self) -> bool:
        return self._error is not None or any(
            file.done() and file.exception() for file in self._files
        )

    def wait(self, timeout_s: float) -> bool:
        """Whether this rank's files are written, or have failed, by then."""
        return not wait(self._files, timeout_s).not_done

    def collect(self) -> tuple[dict[str, Any], str | None]:
        """Wait for this rank's files: ({name: {bytes, sha256}}, what went wrong if anything
        did)."""
        files, error = {}, self._error
        for future in self._files:
            try:
                name, facts = future.result()
                files[name] = facts
            except (
                Exception
            ) as failure:  # whatever it was, training goes on and the message says it
                error = f"{type(failure).__name__}: {failure}"
        self._files, self._error = [], None
        return files, error


def _write(state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(
                error.__context__, OSError
            ):  # the cause, which torch's count of bytes hides
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)}


class Checkpointer:
    """Every public method is collective: all ranks call it at the same step."""

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        patience_s: float,
        lock: IO[str] | None = None,
    ):
        """`patience_s`: how long `finish` waits for a file system that does not answer; `lock`:
        RUN/lock, which rank 0 holds, and by which it is found where the run directory is
        renamed."""
        self.run_dir, self.config, self.ranks, self._patience_s = run_dir, config, ranks, patience_s
        self._lock = lock
        self._writer = Writer()
        self._pending: Pending | None = None
        self._damaged: set[int] = set()  # steps
        self.last_saved = -1  # the step of the newest checkpoint that is on disk

    @property
    def writing(self) -> bool:
        """Whether this rank still writes. Not collective."""
        return self._writer.busy

    @property
    def failed(self) -> bool:
        """Whether this rank's part has failed. Not collective."""
        return self._writer.failed

    @property
    def write_s(self) -> float:
        """Seconds that this rank's thread spent on the last checkpoint."""
        return self._writer.seconds

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for `finish`. The same on every rank, not collective."""
        return self._pending is not None

    def save(self, step: int, state: dict[str, Any], engine: Engine, reason: str) -> None:
        """Snapshot, and start to write; `finish` what was started before. `state`: plain values,
        equal on all ranks.

        `reason`: 'start', 'schedule', 'stop' (a signal) or 'end'. Nothing is done where `step` is
        saved already."""
        assert not self.pending
        if step == self.last_saved:
            return
        self._writer.seconds = 0.0
        self._find_run_dir()
        checkpoint = CheckpointDir.at(self.run_dir, step)
        if (
            self.ranks.rank == 0
        ):  # what is there is damaged, or was never finished: or it would be `last_saved`
            self._writer.attempt(lambda: _remove(checkpoint))
        self._damaged.discard(step)
        engine.save(checkpoint, state, self._writer)
        self._pending = Pending(checkpoint, state, reason, engine.weights_checksum())

    def finish(self) -> tuple[bool, str | None]:
        """Wait for the files of all ranks and make the checkpoint valid: (whether it is, which all
        ranks know alike; what went wrong, which rank 0 knows best).

        Where the file system does not answer in time, it stays pending. Raises CheckpointError if
        the ranks' states are not the same: one of them has lost its way.
        """
        pending = self._pending
        assert pending is not None
        ranks, what = self.ranks, f"checkpoint of step {pending.checkpoint.step}"
        late = [
            r
            for r, done in enumerate(ranks.all_gather_json(self._writer.wait(self._patience_s)))
            if not done
        ]
        if late:
            return (
                False,
                f"{what} is still not written after {self._patience_s:g} s, on ranks {late[:8]}",
            )
        self._pending = None
        own = {**pending.state, "weights (checksum)": pending.weights}
        reports = ranks.all_gather_json((*self._writer.collect(), json.dumps(own, sort_keys=True)))
        _require_equal([text for _, _, text in reports])
        errors = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(reports) if error]
        if ranks.rank == 0 and not errors:
            try:
                _publish(
                    pending,
                    {k: v for files, _, _ in reports for k, v in files.items()},
                    len(reports),
                )
            except (OSError, ValueError) as error:
                errors = [f"rank 0: {error}"]
        (errors, *_) = ranks.all_gather_json(errors)
        problem = None
        if errors:
            problem = f"{what} was not written: " + "; ".join(errors)
        else:
            self.last_saved = pending.checkpoint.step
        if ranks.rank == 0:
            try:  # on a full disk the remains of a failed one would be in the way of the next
                _remove(pending.checkpoint) if errors else self._retain()
            except OSError as error:
                problem = (
                    problem
                    or f"{what} is written, but what is not needed any more cannot be removed: "
                    f"{error}"
                )
        return not errors, problem

    def newest(self, say: Callable[[str], None]) -> CheckpointDir | None:
        """The newest checkpoint that every rank finds sound; ranks share the hashing.

        Raises as `newest_valid` where there are checkpoints and none can be used: never a silent
        restart.
        """
        self._find_run_dir()
        listed = self.ranks.all_gather_json(
            self.ranks.raise_on_all_ranks(lambda: [c.step for c in checkpoints(self.run_dir)])
        )
        steps = sorted(
            {step for of_rank in listed for step in of_rank}, reverse=True
        )  # also what one alone sees yet
        found = (CheckpointDir.at(self.run_dir, step) for step in steps)
        newest, self._damaged = newest_valid(self.run_dir, found, say, self._check)
        self.last_saved = -1 if newest is None else newest.step
        return newest

    def _find_run_dir(self) -> None:
        """Under its name of now; made anew, and locked, where it was deleted. Raises
        CheckpointError where another process has begun to train there since."""

        def find() -> str:
            lock = self._lock
            if lock is not None:
                self.run_dir = located(self.run_dir / LOCK, lock.fileno()).parent
                with contextlib.suppress(
                    OSError
                ):  # as long as nothing can be written there: the save says so
                    if not os.fstat(lock.fileno()).st_nlink:
                        self.run_dir.mkdir(parents=True, exist_ok=True)
                        self._lock = try_lock(self.run_dir / LOCK)
                if self._lock is None:
                    raise CheckpointError(
                        f"{self.run_dir} was deleted, and another process trains there now; start "
                        "another run with --output DIR"
                    )
            return str(self.run_dir)

        (run_dir, *_) = self.ranks.all_gather_json(self.ranks.raise_on_all_ranks(find))
        self.run_dir = Path(run_dir)

    def _check(self, checkpoint: CheckpointDir) -> LargescaleError | None:
        """The gravest of what the ranks find. A file that only some of them see is waited for."""
        ranks = self.ranks
        part = slice(ranks.rank, None, ranks.world_size)
        own = ranks.raise_on_all_ranks(lambda: checkpoint.check(part))
        for pause in (*SEEN_LATER_S, None):
            reports = ranks.all_gather_json((_ERRORS.index(type(own)), str(own)) if own else None)
            kinds = [_ERRORS[report[0]] if report else None for report in reports]
            if (
                pause is None
                or UnseenError not in kinds
                or all(kind is UnseenError for kind in kinds)
            ):
                break
            heartbeat()
            time.sleep(pause)
            if isinstance(own, UnseenError):
                own = checkpoint.check(part)
        number, text = max(filter(None, reports), key=lambda report: report[0], default=(None, ""))
        return None if number is None else _ERRORS[number](text)

    def _retain(self) -> None:
        """Keep the last k, every m-th, and the last that was written on a stop, so that preemptions
        do not push the others out; remove what never became valid. Only after a newer one is valid.

        One that this process found damaged neither counts as kept nor is removed: somebody may want
        to repair it.
        """
        valid = [c for c in checkpoints(self.run_dir) if c.step not in self._damaged]
        every = self.config.keep_every
        keep = {
            c.step for c in valid if c.step > 0 and every and c.step % every == 0
        } | self._damaged
        reasons = {c: _reason(c) for c in valid if c.step not in keep}
        unread = [
            c for c, reason in reasons.items() if reason is None
        ]  # damaged too: nobody looked at old ones
        stops = [c for c, reason in reasons.items() if reason == "stop"]
        others = [c for c in valid if c not in stops and c not in unread]
        keep |= {c.step for c in others[: self.config.keep_last] + stops[:1] + unread}
        for checkpoint in step_folders(self.run_dir):
            if checkpoint.step not in keep:
                _remove(checkpoint)


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    checkpoint: CheckpointDir
    state: dict[str, Any]
    reason: str
    weights: int


def _publish(pending: Pending, files: dict[str, Any], world_size: int) -> None:
    checkpoint = pending.checkpoint
    *ours, above = (checkpoint.path, *checkpoint.path.parents[:3])
    for folder in ours:  # each holds the name of the one before, which a power cut would take back
        fsync_dir(folder)
    with contextlib.suppress(PermissionError):  # somebody else's
        fsync_dir(above)
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
    """What else than the settings decides in which order, and by which instructions, a CPU adds
    numbers."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _reason(checkpoint: CheckpointDir) -> str | None:
    """Why it was written; None if its manifest cannot be read."""
    try:
        return str(checkpoint.manifest().get("reason"))
    except (CheckpointError, StorageError):
        return None


def _remove(checkpoint: CheckpointDir) -> None:
    """Of a link, the link only. Raises OSError where it is still a checkpoint afterwards."""
    if checkpoint.path.is_symlink():
        checkpoint.path.unlink()
        return
    with contextlib.suppress(IsADirectoryError):
        (checkpoint.path / MANIFEST).unlink(
            missing_ok=True
        )  # first: from here on it does not exist
    shutil.rmtree(checkpoint.path, ignore_errors=True)


def _require_equal(states: list[str]) -> None:
    first = dict(flatten(json.loads(states[0])))
    for rank, text in enumerate(states):
        if text != states[0]:
            other = dict(flatten(json.loads(text)))
            key = next(k for k in first | other if first.get(k) != other.get(k))
            error = CheckpointError(
                f"rank {rank} disagrees with rank 0 on {key}: {other.get(key)} and "
                f"{first.get(key)}; nothing was saved, and the same command continues from the last "
                "checkpoint; if it comes again, suspect that rank's machine"
            )
            error.agreed, error.exit_status = True, 1  # as after a crash
            raise error
