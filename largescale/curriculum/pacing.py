"""When the curriculum moves on to the next stage. Every rule is a pure function of (state,
loss)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from largescale.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PacingState:
    """Where a curriculum stands. `index` counts N down to 0; at 0 the curriculum is complete and
    training covers all noise levels."""

    index: int
    best_loss: float = math.inf  # L_best, of this stage
    patience_count: int = 0  # tau: observations in a row without improvement
    observations: int = 0  # in this stage
    average: float | None = None  # of this stage's losses, where the pacing smooths them

    def next_stage(self) -> "PacingState":
        return PacingState(index=self.index - 1)


class Pacing(Protocol):
    """A rule that ends stages."""

    @property
    def shortest_stage(self) -> int:
        """Observations that a stage takes at least; 0 where there are no stages."""
        ...

    def start(self, n_clusters: int) -> PacingState: ...

    def advance(self, state: PacingState, loss: float) -> PacingState: ...


@dataclass(frozen=True, slots=True)
class PatiencePacing:
    """Algorithms 1 and 2 of arXiv:2403.10348: a stage ends at the (patience + 1)-th observation in
    a row that does not improve on the stage's best loss.

    With `loss_smoothing` s, which is not the paper's, the average of the stage's losses so far takes
    the place of the loss: the one of k observations ago has s ** k times the weight of the newest.
    It counts from the `memory`-th observation on; before, it would be as noisy as the losses.
    """

    patience: int  # tau_max
    loss_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.loss_smoothing < 1:
            raise ConfigError(
                f"loss_smoothing={self.loss_smoothing} must be in [0, 1); 0 is none, 0.99 an "
                "average of about 100 losses"
            )

    @property
    def memory(self) -> int:
        """Losses that the average is about as long as."""
        return round(1 / (1 - self.loss_smoothing))

    @property
    def shortest_stage(self) -> int:
        # The first loss is the best so far, and the (patience + 1)-th that is not ends the stage.
        return self.memory - 1 + self.patience + 2

    def start(self, n_clusters: int) -> PacingState:
        return PacingState(index=n_clusters)

    def advance(self, state: PacingState, loss: float) -> PacingState:
        if state.index == 0:
            return state
        state = replace(state, observations=state.observations + 1)
        if self.loss_smoothing:
            loss = self._average(state, loss)
            state = replace(state, average=loss)
            if state.observations < self.memory:
                return state
        # Algorithm 2: a new best loss resets tau, and tau > tau_max ends the stage.
        if loss < state.best_loss:
            return replace(state, best_loss=loss, patience_count=0)
        if state.patience_count + 1 > self.patience:
            return state.next_stage()
        return replace(state, patience_count=state.patience_count + 1)

    def _average(self, state: PacingState, loss: float) -> float:
        """The average with this loss, the newest of `state.observations`."""
        # The newest weight over the sum of all: 1 for the first observation of a stage.
        weight = (1 - self.loss_smoothing) / (1 - self.loss_smoothing**state.observations)
        before = loss if state.average is None else state.average
        return before + weight * (loss - before)


@dataclass(frozen=True, slots=True)
class FixedPacing:
    """NaiveCL, the paper's baseline: every stage lasts `interval` observations, whatever the
    loss."""

    interval: int

    @property
    def shortest_stage(self) -> int:
        return self.interval

    def start(self, n_clusters: int) -> PacingState:
        return PacingState(index=n_clusters)

    def advance(self, state: PacingState, loss: float) -> PacingState:
        if state.index == 0:
            return state
        if state.observations + 1 >= self.interval:
            return state.next_stage()
        # The best loss is kept for the log only.
        return replace(
            state, best_loss=min(loss, state.best_loss), observations=state.observations + 1
        )


@dataclass(frozen=True, slots=True)
class NoPacing:
    """Vanilla training: every noise level from the first step."""

    @property
    def shortest_stage(self) -> int:
        return 0

    def start(self, n_clusters: int) -> PacingState:
        return PacingState(index=0)

    def advance(self, state: PacingState, loss: float) -> PacingState:
        return state


PACINGS: dict[str, Callable[..., Pacing]] = {
    "patience": PatiencePacing,
    "fixed": FixedPacing,
    "none": NoPacing,
}
"""The rules by name, as curriculum.pacing has them."""
