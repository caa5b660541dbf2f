"""Losses that leap above what is usual in their stage of the curriculum. No torch."""

import math
from typing import Any


class SpikeDetector:
    """A loss above `factor` times the usual one of its stage is a spike; stages differ too much to
    be compared."""

    WINDOW = (
        100  # observations: its memory, and how many it takes before anything is called a spike
    )

    def __init__(self, factor: float):
        self.factor, self.mean_log, self.count, self.spikes = factor, 0.0, 0, 0

    @property
    def usual(self) -> float:
        """The running geometric mean, which a few leaps hardly move."""
        return math.exp(self.mean_log)

    def is_spike(self, loss: float) -> bool:
        return self.count >= self.WINDOW and loss > self.factor * self.usual

    def observe(self, loss: float) -> None:
        """Spikes too, or a loss that has risen for good would be called one for ever."""
        self.spikes += self.is_spike(loss)
        self.count += 1
        self.mean_log += (math.log(max(loss, 1e-30)) - self.mean_log) / min(self.count, self.WINDOW)

    def new_stage(self) -> None:
        self.mean_log, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean_log": self.mean_log, "count": self.count, "spikes": self.spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_log, self.count, self.spikes = state["mean_log"], state["count"], state["spikes"]
