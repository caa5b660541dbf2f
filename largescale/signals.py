"""A polite stop: SIGTERM, SIGUSR1 and SIGINT ask a program to save and leave, however often they come."""

import signal
from types import FrameType

EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped in good order, start the same command again to go on

_requested = False


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def serve_stop_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _request)


def stop_requested() -> bool:
    return _requested
