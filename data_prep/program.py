"""The main program of every packer: options, engine, exit status."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from data_prep.packer import Packer
from data_prep.packing import PackerOptions
from data_prep.ray_engine import pack_on_ray
from largescale.config.command_line import parse_options, run_program
from largescale.host.signals import serve_stop_signals


def main(program: type[PackerOptions], args: Sequence[str] | None, description: str | None) -> int:
    """Packs as the command line says. `program`: its options."""
    name = Path(inspect.getfile(program)).stem
    options = parse_options(program, args, program=f"data_prep.{name}", description=description)
    # From here on a signal stops between two batches.
    serve_stop_signals()

    def pack() -> None:
        line = pack_on_ray(options) if options.engine == "ray" else Packer(options)()
        if line:
            print(line, flush=True)

    return run_program(pack, "what is packed stays: correct the cause, and run again")
