"""Detects spikes: losses far above what is usual in their stage of the curriculum. No torch."""

import math
from typing import Any


class SpikeDetector:
    """Calls a loss above `factor` times the usual one of its stage a spike; stages differ too much
    to be compared."""

    # Observations: the memory of the mean, and how many come before any is called a spike.
    WINDOW = 100

    def __init__(self, factor: float):
        self.factor = factor
        self.mean_log = 0.0
        self.count = 0
        self.spikes = 0

    @property
    def usual(self) -> float:
        """The running geometric mean of the stage, which a few leaps hardly move."""
        return math.exp(self.mean_log)

    def is_spike(self, loss: float) -> bool:
        return self.count >= self.WINDOW and loss > self.factor * self.usual

    def observe(self, loss: float) -> None:
        """Count an applied step's loss."""
        self.spikes += self.is_spike(loss)
        self.count += 1
        # Spikes enter the mean too, or a loss that has risen for good would be one for ever.
        self.mean_log += (math.log(max(loss, 1e-30)) - self.mean_log) / min(self.count, self.WINDOW)

    def new_stage(self) -> None:
        self.mean_log = 0.0
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean_log": self.mean_log, "count": self.count, "spikes": self.spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_log = state["mean_log"]
        self.count = state["count"]
        self.spikes = state["spikes"]
