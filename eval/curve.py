"""python -m eval.curve RUN ... --reference REFERENCE: a score for every kept checkpoint, against
steps and images.

    RUN/curve/results.jsonl     a row a checkpoint; it stays when the checkpoint goes
    RUN/curve/1a2b3c4d/         while drawing only (or with --keep-samples): samples; named by the
                                protocol
    curve.html, .png, .json     of all runs in one: the curves, with the transitions of their stages;
                                of averages (--ema-widths) widths.html, .png, .json

For a RUN that may only be read, OUT/RUN-5e6f/ takes the place of RUN/curve.

A small protocol, the same for all: 10,000 samples by DDIM in 50 steps (SiT and EDM: Heun, 18). A
checkpoint that has a row of this protocol is left alone: run it again while training continues, and
it adds what is new. Under torchrun or srun the ranks share the drawing, and rank 0 scores.
"""

import sys
from collections.abc import Sequence

from eval.curves.options import Curve
from eval.curves.scores import Curves
from eval.curves.widths import scan_widths
from largescale.config.command_line import parse_options, run_program
from largescale.errors import ConfigError
from largescale.host.launch import leave
from largescale.host.signals import serve_stop_signals


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Curve, args, program="eval.curve", description=__doc__)
    serve_stop_signals()

    def score() -> None:
        if not options.runs:
            raise ConfigError("name at least one run directory")
        # Averages of several widths are scored at the newest snapshot only, not along the run.
        if options.ema_widths:
            options.check()
            scan_widths(options)
            return
        curves = Curves(options)
        for note in curves.notes():
            print(f"note: {note}", file=sys.stderr, flush=True)
        curves()

    remedy = "what is scored stays: correct the cause, and run the same command again"
    return run_program(score, remedy)


if __name__ == "__main__":
    leave(main())
