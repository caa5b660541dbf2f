"""python -m largescale.train PRESET [--config FILE] [--section.field VALUE ...]

FILE: settings in YAML or JSON, such as RUN/config.yaml of another run, or what --print-config prints;
options of the command line come after them. A file that names its preset stands for it too. Under
torchrun or srun, one process a rank. To resume, run the same command again.
"""

import faulthandler
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from largescale.config.command_line import parse_options
from largescale.config.derived import largest_world_size
from largescale.config.presets import PRESETS, find_preset
from largescale.config.schema import Config
from largescale.config.serialise import with_current_options
from largescale.config.yaml_files import read_options, to_yaml
from largescale.errors import ConfigError, LargescaleError
from largescale.host.extras import require_trackers, require_training
from largescale.host.launch import (
    arguments,
    check_place_among_ranks,
    env_rank,
    leave,
    print_error,
    tolerate_lost_output,
)
from largescale.host.machine import check_process_memory
from largescale.host.signals import serve_stop_signals

# DeepSpeed's launcher and torch.distributed.launch put this first. They set the variable LOCAL_RANK
# too, which is what is read.
LOCAL_RANK_ARGUMENT = r"--local[-_]rank=\d+"


def parse(args: Sequence[str] | None) -> Config:
    """The config of a command line: a preset with typed overrides. Exits with a message for an
    unknown key, naming the nearest one, or a wrong type."""
    given = [arg for arg in arguments(args) if not re.fullmatch(LOCAL_RANK_ARGUMENT, arg)]
    files, given = config_files(given)
    preset = None
    settings: list[str] = []
    for file in files:
        of_file, options = read_options(file)
        preset = of_file or preset
        settings += options
    # The preset of the file, where none is given.
    if preset is not None and (not given or given[0].startswith("--")) and "--help" not in given:
        given = [preset, *given]
    if files and (not given or given[0].startswith("--")) and "--help" not in given:
        raise ConfigError(f"--config {files[0]} names no preset; give one before it, as in digits")
    name, *overrides = given or ["--help"]
    # Without a preset there are no settings to show, only the presets.
    if name in ("-h", "--help"):
        presets = "\n  ".join(PRESETS)
        print(f"{__doc__}\nPresets:\n  {presets}\n\nIts settings: PRESET --help")
        sys.exit(0)
    if name.startswith("-"):
        raise ConfigError(f"no preset is given before {name}; give one, as in digits {name}")
    program = f"largescale.train {name}"
    default = find_preset(name)
    config = parse_options(
        Config,
        with_current_options([*settings, *overrides]),
        program=program,
        description=None,
        default=default,
    )
    # Without a folder of its own a sister run would go on as the run whose settings it has.
    for file in files:
        if config.run_dir.resolve() == file.resolve().parent:
            raise ConfigError(
                f"--config {file} is of the run in {config.run_dir}; give another one --output DIR, "
                "and resume this one with its own command"
            )
    return config


def config_files(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Splits a command line into the files of --config and the rest. Raises ConfigError."""
    files: list[Path] = []
    rest: list[str] = []
    words = iter(given)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        path = value if equals else next(words, "")
        # An option where the file should be: the file was forgotten.
        if not path or path.startswith("--"):
            raise ConfigError("--config needs a file, such as runs/digits/config.yaml")
        files.append(Path(path))
    return files, rest


def main(args: Sequence[str] | None = None) -> int:
    # Before anything that takes time: a signal may come while torch is loaded.
    start_time = time.time()
    serve_stop_signals()
    try:
        check_place_among_ranks()
        config = parse(args)
        if config.dry_run:
            from largescale.training.dry_run import dry_run

            return dry_run(config) if env_rank() == 0 else 0
        if config.print_config:
            if env_rank() == 0:
                print(to_yaml(config), end="")
            return 0
        if config.fit_ranks:
            print(largest_world_size(config, config.fit_ranks))
            return 0

        require_training()
        require_trackers(config.telemetry.trackers)
        # This import loads torch, during which a small limit of memory may kill.
        warned = check_process_memory(config.train.device)
        from largescale.training.startup import start

        return start(config, start_time, warned_of_memory=warned)
    except LargescaleError as error:
        print_error(error)
        return error.exit_status


if __name__ == "__main__":
    tolerate_lost_output()
    # A shard that is cut short while it is mapped is a bus error, which is no Python exception.
    faulthandler.enable()
    leave(main())
