"""The run directory at start: writable, one process's, this run's, and with its checkpoints still
there."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from largescale.checkpoint.checkpointer import rounding_facts
from largescale.checkpoint.files import CheckpointDir
from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.config.serialise import differences, from_dict, to_dict
from largescale.data.shards import ShardDataset
from largescale.errors import CheckpointError, StorageError, usable
from largescale.host.files import LOCK, require_writable, try_lock
from largescale.host.launch import heartbeat
from largescale.host.signals import stop_requested
from largescale.monitoring.run_record import read_starts

LOCK_WAIT_S = 180  # a lease of NFS outlives the machine that held it


def check_writable(run_dir: Path) -> None:
    """Make the run directory, and prove that this rank can write there, also what lies there.
    Raises CheckpointError where it never can."""
    names = (LOCK, "metrics.jsonl", *(f"{folder}/new" for folder in ("checkpoints", "starts")))
    require_writable(*(run_dir / name for name in names), remedy="choose another --output")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {run_dir} at present: {error}") from error


def check_checkpoints_still_exist(run_dir: Path) -> None:
    """Never a silent restart: checkpoints that were there once, and are not found, stop the run."""
    if (saved := max((start.saved_step for start in read_starts(run_dir)), default=-1)) >= 0:
        raise CheckpointError(
            f"{run_dir} has no checkpoint any more, but step {saved} was saved: restore "
            f"{run_dir}/checkpoints; to begin again, delete {run_dir}, or give another --output DIR"
        )


def lock_run_dir(run_dir: Path, say: Callable[[str], None]) -> IO[str]:
    """Of two processes only one may train a run. Waits for one that is about to end, as after a
    requeue.

    Raises StorageError where it does not end."""
    for second in range(LOCK_WAIT_S):
        if lock := try_lock(run_dir / LOCK):
            return lock
        if stop_requested():
            break
        if second == 0:
            say(f"another process trains {run_dir}: waiting for it, for {LOCK_WAIT_S} s")
        heartbeat()
        time.sleep(1)
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
    say: Callable[[str], None],
) -> None:
    """A run directory belongs to one run: refuse what would make it another, say what is
    changed."""

    def comparable(state: dict[str, Any]) -> dict[str, Any]:
        config = to_dict(
            from_dict(state["config"])
        )  # fields that are new since then have their defaults
        return {**config, "precision": state["precision"], "dataset": state["dataset"]}

    with usable(checkpoint.path):
        saved = checkpoint.manifest()["state"]
        if dataset and dataset.has_fingerprint(
            saved["dataset"], saved.get("data_info", {}).get("name", "")
        ):
            saved["dataset"] = identity["dataset"]  # packed anew, or under another name
        refused, said = differences(comparable(saved), comparable(identity))
    if refused:
        raise CheckpointError(
            f"{checkpoint.path.parent.parent} belongs to a run that differs in what may not "
            "change:\n  "
            + "\n  ".join(refused)
            + "\nresume it with its own settings, or start another run with --output DIR"
        )
    for change in said:
        say(f"changed on resume, in force from here on: {change}")


def rounding_changes(
    manifest: dict[str, Any], config: Config, world_size: int, micro: int
) -> Iterator[str]:
    """What is not as it was when the checkpoint was written, and changes the order in which numbers
    are added."""
    saved, before = from_dict(manifest["state"]["config"]), manifest["world_size"]
    # What dropout draws differs by micro batch too, which `differences` says.
    dropout = config.model.architecture == "ddpmpp" and config.model.unet.dropout > 0
    if before != world_size:
        yield f"ranks: {before} -> {world_size}"
    elif (
        not dropout
        and saved.train.micro_batch_size != "auto"
        and (was := batch_layout(saved, before)[0]) != micro
    ):
        yield f"micro batch: {was} -> {micro}"
    names = {"cpu": "the CPU's instructions", "threads": "threads of a rank", "torch": "torch"}
    for key, now in rounding_facts().items() if config.train.device == "cpu" else ():
        if manifest.get(key, now) != now:  # absent: written by an older version
            yield f"{names[key]}: {manifest[key]} -> {now}"
