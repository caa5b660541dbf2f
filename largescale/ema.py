"""python -m largescale.ema RUN --width 0.075: the power-function average of any width, as an export.

Of a run that was trained with --optimizer.ema-widths, whose snapshots are added up by least squares
(arXiv:2312.02696, section 3.2). eval.curve --ema-widths scans many widths; eval.sample and
largescale.export take --ema-width too.
"""

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
from largescale.checkpoint.weights import EXPORT_WEIGHTS, read_weights
from largescale.config.command_line import parse_options, run_program
from largescale.interop.model_card import remove_card
from largescale.power_ema import residual_note


@dataclass(frozen=True)
class Ema:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits."""
    width: float
    """The average's width: its standard deviation as a share of the training up to its step, above
    0 and at most 0.28."""
    step: int | None = None
    """The step at which the average ends, that of a snapshot; by default the newest."""
    out: Path | None = None
    """The folder to write to; by default RUN/ema_WIDTH."""


def run(options: Ema) -> None:
    """Write the export, and print how exact it is."""
    out = options.out or options.run / f"ema_{options.width:g}"
    require_export_folder(out)
    require_writable_export(out)
    description, weights = read_weights(options.run, options.step, ema_width=options.width)
    write_export(out, weights, description)
    remove_card(out)
    residual = description["ema"]["residual"]
    how = "exact" if residual == 0 else f"its profile is off by {residual:.2%}"
    print(
        f"average of width {options.width:g} at step {description['step']:,}: "
        f"{out / EXPORT_WEIGHTS}, from {description['ema']['snapshots']} snapshots; {how}"
    )
    if note := residual_note(options.width, residual):
        print(f"note: {note}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Ema, args, program="largescale.ema", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
