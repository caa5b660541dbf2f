"""Errors that a user can correct. The programs print these as one line; anything else keeps its
traceback."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager


class LargescaleError(Exception):
    """Base of every error whose message says what to do about it."""

    agreed = False
    """Whether every rank raises it, so that one rank's message is enough."""
    exit_status = 2
    """The program's exit status: 2 needs a person, and a batch script does not start it again."""


class ConfigError(LargescaleError, ValueError):
    """A setting, or two that contradict each other. All ranks have the same settings."""

    agreed = True


class DeviceError(LargescaleError, RuntimeError):
    """A device that this rank lacks; others may have theirs."""


class DataError(LargescaleError, ValueError):
    """A data set that is missing, damaged, or not the one that the run needs."""


class CheckpointError(LargescaleError, RuntimeError):
    """A run directory or checkpoint that cannot be used."""


class NewerVersionError(CheckpointError):
    """Files that a newer version of largescale wrote. They are not damaged, so an older checkpoint
    is not used instead."""


class StorageError(LargescaleError, OSError):
    """Files that cannot be read or written at present: the same command may continue later."""

    agreed = True
    exit_status = 75  # signals.EXIT_REQUEUE


class TakenOverError(LargescaleError, RuntimeError):
    """A run directory that another process trains since: this one may not write there any more."""

    exit_status = 75


class Stopped(LargescaleError):
    """A request to stop, by a signal; what is complete stays."""

    agreed = True
    exit_status = 75

    def __init__(self, text: str = "asked to stop; run the same command again to go on") -> None:
        super().__init__(text)


class LostRankError(LargescaleError, RuntimeError):
    """A rank that is gone or hangs: a crash, after which the same command continues from the last
    checkpoint."""

    exit_status = 1


class NonFiniteError(LargescaleError, RuntimeError):
    """A loss or gradient that is not finite; nothing was saved over the last good state."""

    agreed = True


# What unpickling, parsing and indexing raise for content of another kind.
_FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@contextmanager
def usable(what: object) -> Iterator[None]:
    """While the content of `what`, a path, is read: any error because it is not what our programs
    write (another type, a missing key, a pickle of something else) is one CheckpointError that
    names it."""
    try:
        yield
    except LargescaleError:
        raise
    except _FOREIGN as error:
        # torch's is a RuntimeError, and says nothing about the content. This module does not
        # import torch.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{what} cannot be used, its content is not what largescale writes "
            f"({type(error).__name__}: {reason})"
        ) from error
