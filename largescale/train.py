"""python -m largescale.train PRESET [--section.field VALUE ...]

Under torchrun or srun, one process a rank. To resume, run the same command again.
"""

import faulthandler
import re
import sys
import time

from largescale.config.presets import PRESETS, find_preset
from largescale.config.ranges import ranges_in_help
from largescale.config.schema import Config
from largescale.errors import LargescaleError
from largescale.host.launch import arguments, env_rank, leave, print_error
from largescale.host.machine import check_process_memory
from largescale.host.signals import serve_stop_signals

LOCAL_RANK_ARGUMENT = r"--local[-_]rank=\d+"
"""What DeepSpeed's launcher and torch.distributed.launch put first. They set the variable
LOCAL_RANK too."""


def parse(args: list[str]) -> Config:
    """Typed overrides of a preset. Exits with a message for an unknown key, naming the nearest one,
    or a wrong type."""
    import tyro

    name, *overrides = [arg for arg in args if not re.fullmatch(LOCAL_RANK_ARGUMENT, arg)] or [
        "--help"
    ]
    if name in ("-h", "--help"):
        print(__doc__ + "\nPresets:\n  " + "\n  ".join(PRESETS) + "\n\nIts settings: PRESET --help")
        sys.exit(0)
    # One rank speaks for all.
    return tyro.cli(
        Config,
        default=find_preset(name),
        args=overrides,
        prog=f"python -m largescale.train {name}",
        config=(tyro.conf.AvoidSubcommands,),
        console_outputs=env_rank() == 0,
        registry=ranges_in_help(),
    )


def main(args: list[str] | None = None) -> int:
    began_unix_s = time.time()
    serve_stop_signals()
    try:
        config = parse(arguments(args))
        if config.dry_run:
            from largescale.training.dry_run import dry_run

            return dry_run(config) if env_rank() == 0 else 0
        warned = check_process_memory(config.train.device)
        from largescale.training.startup import run  # loads torch

        return run(config, began_unix_s, warned_of_memory=warned)
    except LargescaleError as error:
        print_error(error)
        return error.exit_status


if __name__ == "__main__":
    faulthandler.enable()  # a shard that is cut short while it is mapped is a bus error, which Python does not see
    leave(main())
