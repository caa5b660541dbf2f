"""The object that a training loop holds."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from largescale.curriculum.pacing import Pacing, PacingState
from largescale.errors import CheckpointError, ConfigError


class Curriculum:
    """Which noise levels training draws from, and when that changes.

    A loop draws `u` uniformly from [`lowest`, 1) and calls `observe(loss)` once per optimizer step that was applied.
    """

    def __init__(self, edges: Sequence[float], pacing: Pacing):
        """`edges`: N + 1 increasing noise levels from 0 to 1, see `largescale.curriculum.clusters`."""
        edges = tuple(float(edge) for edge in edges)
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ConfigError(f"cluster edges must rise from 0 to 1, got {edges}")
        self.edges, self.pacing = edges, pacing
        self.state: PacingState = pacing.start(self.n_clusters)
        self.observations = 0
        self.transitions: list[tuple[int, int]] = []  # (observations so far, index from then on), at most N of them

    @property
    def n_clusters(self) -> int:
        return len(self.edges) - 1

    @property
    def index(self) -> int:
        """The curriculum index: N at the start, 0 when the curriculum is complete."""
        return self.state.index

    @property
    def lowest(self) -> float:
        """The lowest active noise level: stage n trains on the n easiest clusters C_{N-n+1} .. C_N."""
        return self.edges[max(self.index, 1) - 1]

    def observe(self, loss: float) -> bool:
        """Take the loss of one applied step, averaged over the global batch; True if a transition followed."""
        if not math.isfinite(loss):
            raise ValueError(f"the pacing was shown loss={loss}; only finite losses of applied steps may reach it")
        before = self.index
        self.state = self.pacing.advance(self.state, loss)
        self.observations += 1
        if self.index != before:
            self.transitions.append((self.observations, self.index))
        return self.index != before

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: strict JSON and weights-only torch files both take it."""
        pacing = asdict(self.state)
        return {
            "edges": list(self.edges),
            "pacing": {**pacing, "best_loss": pacing["best_loss"] if math.isfinite(pacing["best_loss"]) else None},
            "observations": self.observations,
            "transitions": [list(transition) for transition in self.transitions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if tuple(state["edges"]) != self.edges:
            raise CheckpointError(
                f"this curriculum has {self.n_clusters} clusters with edges {self.edges}, the saved state has "
                f"{len(state['edges']) - 1} with {tuple(state['edges'])}; go on with the clusters of the saved run"
            )
        best = state["pacing"]["best_loss"]
        self.state = PacingState(**{**state["pacing"], "best_loss": math.inf if best is None else best})
        self.observations = state["observations"]
        self.transitions = [(observations, index) for observations, index in state["transitions"]]
