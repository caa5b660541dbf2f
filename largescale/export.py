"""python -m largescale.export RUN: the EMA weights as safetensors with their config. Needs no
DeepSpeed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from largescale.checkpoint.export_folder import (
    require_export_folder,
    require_writable_export,
    write_export,
)
from largescale.checkpoint.files import checkpoints, named_weights
from largescale.checkpoint.weights import EXPORT_CONFIG, EXPORT_WEIGHTS, describe, find_checkpoint
from largescale.config.command_line import parse_options, run_program
from largescale.config.serialise import from_dict
from largescale.config.validation import ema_note


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
    if out is None:
        out = run / "export"
    else:
        require_export_folder(out)
    # Before the checkpoint is hashed, which takes long. A run without one is the clearer error.
    if checkpoints(run):
        require_writable_export(out)
    checkpoint = find_checkpoint(run, step)
    description = describe(checkpoint)
    write_export(out, named_weights(checkpoint), description)
    return out


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
