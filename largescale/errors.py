"""What can go wrong by a user's hand. The programs print these as one line; anything else keeps its traceback."""


class LargescaleError(Exception):
    """Base of every error whose message says what to do about it."""

    agreed = False
    """Whether every rank raises it, so that one rank's word is enough."""


class ConfigError(LargescaleError, ValueError):
    """A setting, or two that contradict each other. All ranks have the same settings."""

    agreed = True


class DeviceError(LargescaleError, RuntimeError):
    """A device that this rank lacks; others may have theirs."""


class DataError(LargescaleError, ValueError):
    """A data set that is missing, damaged, or not the one that the run needs."""


class CheckpointError(LargescaleError, RuntimeError):
    """A run directory or checkpoint that cannot be used."""


class NonFiniteError(LargescaleError, RuntimeError):
    """A loss or gradient that is not finite; nothing was saved over the last good state."""

    agreed = True
