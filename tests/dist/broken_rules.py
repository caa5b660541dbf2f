"""Rules of writing checkpoints, broken on purpose: each must be found out."""

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint import checkpointer as product
from largescale.checkpoint import writer
from largescale.checkpoint.files import MANIFEST, MODEL_FILE, CheckpointDir, checkpoints
from largescale.host import files
from tests.dist.writer_alone import OPTIMIZER_FILE, files_of, kept


def break_rule(rule: str) -> Callable[[str], bool]:
    """Patch this process; returns whether a sync of that name is left out."""
    publish, stash = product._publish, []

    def facts_only(state: Any, path: Path) -> Any:
        content = io.BytesIO()
        torch.save(state, content)
        stash.append((path, content.getvalue()))
        facts = {"bytes": len(content.getvalue()), "sha256": hashlib.sha256(content.getvalue()).hexdigest()}
        return path.name, facts

    def publish_first(*args: Any) -> None:
        publish(*args)
        while stash:
            path, content = stash.pop()
            path.write_bytes(content)

    def retain_first(pending: Any, *args: Any) -> None:
        step = pending.checkpoint.step
        there = [c.step for c in checkpoints(pending.checkpoint.path.parents[1]) if c.problem() is None]
        for other in set(there) - kept([*there, step]):
            CheckpointDir.at(pending.checkpoint.path.parents[1], other).remove()
        publish(pending, *args)

    def in_place(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        files.fsync_dir(path.parent)

    def unsynced(path: Path, text: str) -> None:
        in_place(path.with_suffix(".tmp"), text)
        path.with_suffix(".tmp").replace(path)

    if rule == "the manifest before the files":
        writer._write, product._publish = facts_only, publish_first  # type: ignore[assignment]
    elif rule == "old ones removed before the new one is valid":
        product._publish = retain_first  # type: ignore[assignment]
    elif rule == "the manifest written in place":
        product.write_atomically = in_place  # type: ignore[attr-defined]
    elif rule == "removed with the manifest last":
        def remove(checkpoint: CheckpointDir) -> None:
            for name in (*files_of(0), MANIFEST):
                (checkpoint.path / name).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=True)

        CheckpointDir.remove = remove  # type: ignore[method-assign]
    elif rule == "hashes not checked":
        CheckpointDir.check = lambda self, part=None: None  # type: ignore[method-assign, assignment]
    elif rule == "no sync of the step's folder before the manifest":
        product.fsync_dir = lambda path: None if path.name.startswith("step_") else files.fsync_dir(path)
    elif rule == "no sync of the step's folder after the manifest":
        product.write_atomically = unsynced
    return lambda name: name in UNSYNCED.get(rule, ())


UNSYNCED = {
    "no sync of the files": (MODEL_FILE, OPTIMIZER_FILE),
    "no sync of the manifest": (MANIFEST + ".tmp",),
    "no sync of the folder of checkpoints": ("checkpoints",),
    "no sync of the run's folder": ("run",),
    "no sync of the folder above": (".", ""),
}
# What of the unsynced is to be lost to see it, and which calls are worth a kill.
RULES = {
    "the manifest before the files": ("nothing", ""), "old ones removed before the new one is valid": ("nothing", ""),
    "the manifest written in place": ("nothing", "manifest.json$"), "removed with the manifest last": ("nothing", "unlink"),
    "hashes not checked": ("nothing", ""),
    "no sync of the step's folder before the manifest": ("some", "fsync .*step_N$"),
    "no sync of the step's folder after the manifest": ("all", ""), **dict.fromkeys(UNSYNCED, ("all", "")),
}
