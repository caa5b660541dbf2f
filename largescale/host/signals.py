"""Signals that ask a program to save and exit: TERM, INT, HUP (a terminal that is closed), and what
schedulers send before they kill, USR1, USR2 and XCPU."""

import os
import signal
from types import FrameType

# EX_TEMPFAIL: stopped in good order, the same command continues.
EXIT_REQUEUE = 75
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)

_requested = False
_terminals: list[int] = []


def _request(number: int, frame: FrameType | None) -> None:
    # Set once and for all, however often the signal comes.
    global _requested
    _requested = True
    # A terminal is closed: to write there would be an error, in the middle of the last save.
    for descriptor in _terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def serve_stop_signals() -> None:
    """From now on, record these signals instead of dying of them."""
    _terminals[:] = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    for number in STOP_SIGNALS:
        # HUP stays ignored where it is, as under nohup.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _request)


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _requested
