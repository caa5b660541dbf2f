"""What a service that shows runs must be able to do, and what it is told of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Ended = Literal["finished", "stopped", "failed"]
"""How a start ended; `stopped`: the same command continues the run."""


@dataclass(frozen=True)
class RunInfo:
    """What a service is told of a run, in every start."""

    id: str
    """The same in every start, in all services."""
    name: str
    config: dict[str, Any]
    folder: Path
    """For files of the service's own."""


@dataclass(frozen=True)
class Moment:
    """When something was logged."""

    step: int
    branch: int
    """How often the run has gone back to an earlier step and taken another way from there: of two
    values at one step, that of the higher branch counts."""
    number: int
    """Counts what is sent, over all starts of the run."""
    unix_s: float


class Service(Protocol):
    """A client of one service. All methods are called in one thread, which may wait; an error is
    raised, and the call is tried again later."""

    settle_s: float
    """Seconds after a call in which a kill can still lose what was sent."""

    def start(self, run: RunInfo) -> str | None:
        """Continue the run that has this id, or make it. Returns what a person should know, if
        anything."""

    def log(self, at: Moment, metrics: Mapping[str, float]) -> None: ...

    def event(self, at: Moment, kind: str, text: str) -> None: ...

    def image(self, at: Moment, name: str, image: np.ndarray) -> None:
        """`image`: (H, W, 3) uint8."""

    def finish(self, ended: Ended, summary: Mapping[str, Any]) -> None: ...
