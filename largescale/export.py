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

from largescale.checkpoint.files import checkpoints, named_weights
from largescale.checkpoint.weights import EXPORT_CONFIG, EXPORT_WEIGHTS, describe, find_checkpoint
from largescale.config.command_line import parse_options, run_program
from largescale.config.serialise import from_dict
from largescale.config.validation import ema_note
from largescale.host.files import require_writable, write_atomically


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits."""
    out: Path | None = None
    """The folder to write to; by default RUN/export."""
    step: int | None = None
    """The step of the checkpoint to export; by default the newest valid one."""


def export(run: Path, out: Path | None = None, step: int | None = None) -> Path:
    from safetensors.torch import save_file

    out = out or run / "export"
    if checkpoints(run):  # that there are none is the better thing to say
        require_writable(out / EXPORT_WEIGHTS, out / EXPORT_CONFIG, remedy="choose another --out")
    checkpoint = find_checkpoint(run, step)
    description = describe(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in named_weights(checkpoint).items()}
    # The config last: a folder with one is whole.
    (out / EXPORT_CONFIG).unlink(missing_ok=True)
    save_file(weights, out / EXPORT_WEIGHTS, metadata={"format": "pt", "weights": "ema"})
    write_atomically(out / EXPORT_CONFIG, json.dumps(description, indent=1))
    shutil.copymode(
        out / EXPORT_CONFIG, out / EXPORT_WEIGHTS
    )  # which safetensors makes for its owner alone
    return out


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Export, args, program="largescale.export", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Export) -> None:
    out = export(options.run, options.out, options.step)
    description = json.loads((out / EXPORT_CONFIG).read_text())
    if note := ema_note(from_dict(description["config"]), description["step"]):
        print(f"note: {note}", file=sys.stderr)
    print(f"EMA weights: {out / EXPORT_WEIGHTS}, config: {out / EXPORT_CONFIG}")


if __name__ == "__main__":
    sys.exit(main())
