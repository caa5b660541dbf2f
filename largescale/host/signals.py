"""A polite stop: TERM, INT, HUP (a terminal that is closed) and what schedulers send before they
kill, USR1, USR2 and XCPU, ask a program to save and leave, however often they come."""

import os
import signal
from types import FrameType

EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped in good order, start the same command again to go on
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
    global _requested
    _requested = True
    for descriptor in _terminals:
        if not os.isatty(
            descriptor
        ):  # closed: to write there would be an error, in the middle of the last save
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def serve_stop_signals() -> None:
    """HUP stays ignored where it is, as under nohup."""
    _terminals[:] = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _request)


def stop_requested() -> bool:
    return _requested
