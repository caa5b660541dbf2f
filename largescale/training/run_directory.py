"""Checks of the run directory at start: that it is writable, that no other process trains it, that
it is this run's, and that its checkpoints still exist."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from largescale.checkpoint.checkpointer import rounding_facts
from largescale.checkpoint.files import (
    CheckpointDir,
    is_run,
    require_outside_checkpoints,
    step_folders,
)
from largescale.checkpoint.run_lock import RunLock
from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.config.serialise import differences, from_dict, to_dict
from largescale.data.format import normalization_of
from largescale.data.shards import ShardDataset
from largescale.errors import CheckpointError, StorageError, usable
from largescale.host.files import LOCK, PERMANENT, names_of, require_writable, try_lock, visible
from largescale.host.launch import heartbeat
from largescale.host.lease import LEASE, LeaseRequest
from largescale.host.signals import stop_requested
from largescale.monitoring.run_record import read_starts

# A lease of NFS outlives the machine that held it.
LOCK_WAIT_S = 180


def require_run_directory(run_dir: Path) -> None:
    """Raise CheckpointError where a run may not be trained in the folder: another program's files
    are there, or it lies in the checkpoints of another run."""
    require_outside_checkpoints(run_dir, "--output DIR")
    # Files first: where another process starts the run just now, its record comes before them.
    try:
        foreign = [path for path in visible(run_dir) if not _is_left_by_a_killed_start(path)]
        refused = bool(foreign) and not is_run(run_dir)
    except OSError as error:
        if error.errno in PERMANENT:
            raise CheckpointError(
                f"cannot read {run_dir}: {error.strerror}; choose another --output DIR"
            ) from error
        raise StorageError(f"{run_dir} cannot be read at present: {error}") from error
    if refused:
        raise CheckpointError(
            f"{run_dir} holds {names_of(foreign)} and no run: training could overwrite what is "
            "there; choose a new or an empty folder with --output DIR"
        )


def _is_left_by_a_killed_start(path: Path) -> bool:
    """Whether the file or folder may lie in a run directory before the first record of a start."""
    # A batch job's log, and what a file system has at its root, are nobody's work.
    if path.name in (LOCK, LEASE, "tensorboard", "trackers", "lost+found") or path.suffix in (
        ".log",
        ".out",
        ".err",
    ):
        return True
    # Rows of metrics come after the record, only events can come before it.
    if path.name == "metrics.jsonl":
        lines = path.read_bytes().splitlines()
        return all(re.match(rb'\{"step": \d+, "event": ', line) for line in lines)
    if path.name == "starts":
        return all(inner.name.endswith(".json.tmp") for inner in visible(path))
    if path.name == "checkpoints":
        unfinished = step_folders(path.parent)
        return len(unfinished) == len(visible(path)) and all(
            checkpoint.only_ours() for checkpoint in unfinished
        )
    return False


def check_writable(run_dir: Path) -> None:
    """Make the run directory, and prove that this rank can write there, existing files too. Raises
    CheckpointError where it never can, or where the folder is no run's."""
    # Files of an earlier start may belong to another user, though the folder is writable.
    require_writable(
        run_dir / LOCK,
        run_dir / LEASE,
        run_dir / "metrics.jsonl",
        run_dir / "checkpoints/new",
        run_dir / "starts/new",
        remedy="choose another --output",
    )
    require_run_directory(run_dir)
    # What fails now may succeed later, such as a file system that is full: a StorageError.
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {run_dir} at present: {error}") from error


def check_checkpoints_still_exist(run_dir: Path) -> None:
    """Raise CheckpointError where there were checkpoints once and none is found: a run is never
    started over silently."""
    # The record of each start has the newest step that it saved; -1 before the first one.
    saved = max((start.saved_step for start in read_starts(run_dir)), default=-1)
    if saved >= 0:
        raise CheckpointError(
            f"{run_dir} has no checkpoint any more, but step {saved} was saved: restore "
            f"{run_dir}/checkpoints; to begin again, delete {run_dir}, or give another --output DIR"
        )


def lock_run_dir(run_dir: Path, log: Callable[[str], None]) -> RunLock:
    """Lock the run directory, so that only one process trains the run.

    Waits for a process that is about to end, as after a requeue, or whose lease runs out. Raises
    StorageError where it does not end.
    """
    request = LeaseRequest(run_dir / LEASE)
    file = None
    try:
        for second in range(LOCK_WAIT_S):
            # The lock first: where it works, only one process of several asks for the lease.
            file = file or try_lock(run_dir / LOCK)
            lease = request.try_take() if file else None
            if file and lease:
                return RunLock(run_dir, file, lease)
            if stop_requested():
                break
            if second == 0:
                who = f" ({request.owner})" if request.owner else ""
                log(f"another process trains {run_dir}{who}: waiting for it, for {LOCK_WAIT_S} s")
            # The other ranks wait for this one, so it must not look dead.
            heartbeat()
            time.sleep(1)
    except OSError as error:
        raise StorageError(f"cannot write to {run_dir} at present: {error}") from error
    if file:
        file.close()
    raise StorageError(
        f"another process trains {run_dir}; stop it, or start another run with --output DIR"
    )


def finished_message(config: Config, checkpoint: CheckpointDir) -> str:
    return (
        f"finished already: {config.run_dir} is at step {checkpoint.step} of "
        f"train.steps={config.train.steps}; to train on, raise --train.steps; for another run, "
        "--output DIR"
    )


def check_same_run(
    checkpoint: CheckpointDir,
    identity: dict[str, Any],
    dataset: ShardDataset | None,
    log: Callable[[str], None],
) -> None:
    """Refuse, with a CheckpointError, settings that would make the checkpoint's run another one;
    log the settings that may change and have."""
    with usable(checkpoint.path):
        saved = checkpoint.manifest()["state"]
        # The same images can have another fingerprint: packed anew, or under another name.
        name = saved.get("data_info", {}).get("name", "")
        if dataset and dataset.has_fingerprint(saved["dataset"], name):
            saved["dataset"] = identity["dataset"]
        elif dataset and (rows := dataset.rows_when(saved["dataset"], name)) is not None:
            _check_grown(checkpoint, identity, dataset, rows)
            saved["dataset"] = identity["dataset"]
        # A dry run without the data does not know it.
        identity = {"data_info": saved.get("data_info"), **identity}
        refused, allowed = differences(_comparable(saved), _comparable(identity))

    if refused:
        raise CheckpointError(
            f"{checkpoint.path.parent.parent} belongs to a run that differs in what may not "
            "change:\n  "
            + "\n  ".join(refused)
            + "\nresume it with its own settings, or start another run with --output DIR"
        )
    for change in allowed:
        log(f"changed on resume, in force from here on: {change}")


def _check_grown(
    checkpoint: CheckpointDir, identity: dict[str, Any], dataset: ShardDataset, rows: int
) -> None:
    """Raise CheckpointError for a data set that has grown, unless the run may go on with it."""
    if identity["config"]["data"]["grown"] == "refuse":
        raise CheckpointError(
            f"{dataset.path} has grown from {rows:,} to {len(dataset):,} rows since "
            f"{checkpoint.path} was written; to go on, set --data.grown next_epoch: the epoch is "
            "finished in the old order, and the next one has all rows"
        )


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, from its state in a checkpoint."""
    # Fields that are newer than the checkpoint get their defaults.
    config = to_dict(from_dict(state["config"]))
    normalization = asdict(normalization_of(state.get("data_info") or {}))
    return {
        **config,
        "precision": state["precision"],
        "dataset": state["dataset"],
        "normalization": normalization,
    }


def rounding_changes(
    manifest: dict[str, Any], config: Config, world_size: int, micro: int
) -> Iterator[str]:
    """What has changed since the checkpoint was written in the order in which numbers are added."""
    saved = from_dict(manifest["state"]["config"])
    before = manifest["world_size"]

    # The micro batch follows from the number of ranks. With dropout it changes the draws as well,
    # which `differences` reports.
    dropout = config.model.architecture == "ddpmpp" and config.model.unet.dropout > 0
    if before != world_size:
        yield f"ranks: {before} -> {world_size}"
    elif not dropout and saved.train.micro_batch_size != "auto":
        saved_micro, _ = batch_layout(saved, before)
        if saved_micro != micro:
            yield f"micro batch: {saved_micro} -> {micro}"

    # These facts matter to what a CPU computes.
    if config.train.device != "cpu":
        return
    names = {"cpu": "the CPU's instructions", "threads": "threads of a rank", "torch": "torch"}
    for key, now in rounding_facts().items():
        # Absent in a checkpoint of an older version.
        if manifest.get(key, now) != now:
            yield f"{names[key]}: {manifest[key]} -> {now}"
