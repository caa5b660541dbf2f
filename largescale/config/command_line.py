"""The shell of every program: options from the command line, errors as one line, an exit status."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from largescale.config.ranges import ranges_in_help
from largescale.errors import ConfigError, LargescaleError, StorageError
from largescale.host.launch import arguments, env_rank, print_error

Options = TypeVar("Options")


def parse_options(
    kind: type[Options],
    args: Sequence[str] | None,
    *,
    program: str,
    description: str | None,
    default: Options | None = None,
) -> Options:
    """Reads the fields of the dataclass `kind` as command-line options. Exits with a message for an
    unknown option, naming the nearest one, or a wrong type.

    `args`: the command line's by default. `program`: such as "eval.sample". `description`: the
    head of --help.
    """
    # Imported here, as a program's --help and a bad option are the only users of tyro.
    import tyro

    try:
        rank = env_rank()
    except ConfigError as error:
        print_error(error)
        sys.exit(error.exit_status)

    return tyro.cli(
        kind,
        default=tyro.MISSING_NONPROP if default is None else default,
        args=arguments(args),
        prog=f"python -m {program}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        console_outputs=rank == 0,  # one rank prints for all
        registry=ranges_in_help(),
    )


def split_at_dashes(args: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits a command line at `--` into the program's own arguments and training's."""
    given = arguments(args)
    cut = given.index("--") if "--" in given else len(given)
    return given[:cut], given[cut + 1 :]


def run_program(action: Callable[[], int | None], remedy: str) -> int:
    """Runs `action` and returns the exit status: what it returns (None is 0), or that of its error,
    which is printed.

    `remedy`: what to do when files cannot be read or written.
    """
    # Any other exception is a bug of ours, and keeps its traceback.
    try:
        return action() or 0
    except LargescaleError as error:
        print_error(error)
        return error.exit_status
    except OSError as error:
        # A disk that fails is not the user's mistake, but has a remedy all the same.
        print_error(StorageError(f"{error}; {remedy}"))
        return 2
    except KeyboardInterrupt:
        # Of programs that do not wait for a good moment to stop.
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def check_counts(options: Any, *names: str) -> None:
    """Raises ConfigError unless each of these fields is None or at least 1."""
    # Programs other than training have no ranges on their fields.
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1; set --{name.replace('_', '-')}")
