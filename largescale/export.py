"""python -m largescale.export RUN: the EMA weights as safetensors with their config. Needs no
DeepSpeed."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from largescale.checkpoint.files import (
    checkpoints,
    find_checkpoint,
    named_weights,
    require_outside_checkpoints,
)
from largescale.checkpoint.weights import (
    EXPORT_CONFIG,
    EXPORT_METADATA,
    EXPORT_WEIGHTS,
    describe,
    is_export,
)
from largescale.config.command_line import parse_options, run_program
from largescale.config.serialise import from_dict
from largescale.config.validation import ema_note
from largescale.errors import CheckpointError
from largescale.host.files import names_of, require_writable, visible, write_atomically


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits."""
    out: Path | None = None
    """The folder to write to; by default RUN/export."""
    step: int | None = None
    """The step of the checkpoint to export; by default the newest valid one."""


def export(run: Path, out: Path | None = None, step: int | None = None) -> Path:
    """Write the EMA weights and the config of a run's checkpoint; returns the folder."""
    from safetensors.torch import save_file

    if out is None:
        out = run / "export"
    else:
        require_export_folder(out)
    weights_path = out / EXPORT_WEIGHTS
    config_path = out / EXPORT_CONFIG
    # Before the checkpoint is hashed, which takes long. A run without one is the clearer error.
    if checkpoints(run):
        require_writable(weights_path, config_path, remedy="choose another --out")
    checkpoint = find_checkpoint(run, step)
    description = describe(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in named_weights(checkpoint).items()}

    # Whole or absent under its name: a part of it could not be told from another's file.
    temporary = weights_path.with_name(f".{EXPORT_WEIGHTS}.tmp")
    try:
        save_file(weights, temporary, metadata=EXPORT_METADATA)
        # The config comes last: a folder that has one is complete.
        config_path.unlink(missing_ok=True)
        temporary.replace(weights_path)
    # On a full disk it would only take space.
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(config_path, json.dumps(description, indent=1))
    # safetensors makes its file readable for the owner alone.
    shutil.copymode(config_path, weights_path)
    return out


def require_export_folder(out: Path) -> None:
    """Raise CheckpointError where an export would overwrite the files of something else, or lie in
    the checkpoints of a run."""
    require_outside_checkpoints(out, "--out")
    # A file in its place is reported, with its owner, where the folder is tried out.
    there = visible(out) if out.is_dir() else []
    if there and not is_export(out):
        raise CheckpointError(
            f"{out} holds {names_of(there)} and no export of largescale, so it is not written to; "
            "choose a new or an empty folder with --out"
        )


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Export, args, program="largescale.export", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Export) -> None:
    out = export(options.run, options.out, options.step)
    # A short run's EMA may still contain much of the first weights.
    description = json.loads((out / EXPORT_CONFIG).read_text())
    if note := ema_note(from_dict(description["config"]), description["step"]):
        print(f"note: {note}", file=sys.stderr)
    print(f"EMA weights: {out / EXPORT_WEIGHTS}, config: {out / EXPORT_CONFIG}")


if __name__ == "__main__":
    sys.exit(main())
