"""The curriculum as an object: which noise levels are active, and the losses that change that."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from largescale.curriculum.pacing import Pacing, PacingState
from largescale.errors import CheckpointError, ConfigError

Order = Literal["easy_first", "hard_first"]
Stages = Literal["accumulating", "separate"]
# The paper's choices, which stand for those that an older state does not have.
_PAPER = {"order": "easy_first", "stages": "accumulating", "only_cluster": 0}


def active_levels(
    edges: Sequence[float],
    index: int,
    order: str = "easy_first",
    stages: str = "accumulating",
    only_cluster: int = 0,
) -> tuple[float, float]:
    """The active noise levels [low, high) at a curriculum index; `Curriculum.active` says which."""
    n_clusters = len(edges) - 1
    # At index 0 everything is active: C_1 .. C_N.
    first, last = 1, n_clusters
    if only_cluster:
        first = last = only_cluster
    elif index > 0:
        # Stage n = N - index + 1 adds C_{N-n+1} = C_index, or in the reverse order C_n.
        newest = index if order == "easy_first" else n_clusters - index + 1
        if order == "easy_first" or stages == "separate":
            first = newest
        if order == "hard_first" or stages == "separate":
            last = newest
    return edges[first - 1], edges[last]


def stage(index: int, n_clusters: int) -> str:
    """The stage of an index that counts down, as 'stage 3 of 20'; 'complete' at 0."""
    return f"stage {n_clusters - index + 1} of {n_clusters}" if index else "complete"


class Curriculum:
    """Which noise levels training draws from, and when that changes.

    A loop draws `u` uniformly from `active`, [low, high), and calls `observe(loss)` once per
    optimizer step that was applied.
    """

    def __init__(
        self,
        edges: Sequence[float],
        pacing: Pacing,
        order: Order = "easy_first",
        stages: Stages = "accumulating",
        only_cluster: int = 0,
    ):
        """`edges`: N + 1 increasing noise levels from 0 to 1, see `largescale.curriculum.clusters`.
        `order`: the paper's, from the most noise, or its reverse. `stages`: a stage keeps the
        clusters of those before it, as in the paper, or has its own cluster only. `only_cluster`: k
        trains on C_k alone, with NoPacing.
        """
        # Plain floats, so that a saved state compares equal.
        edges = tuple(float(edge) for edge in edges)
        if (
            len(edges) < 2
            or edges[0] != 0
            or edges[-1] != 1
            or any(a >= b for a, b in itertools.pairwise(edges))
        ):
            raise ConfigError(f"cluster edges must rise from 0 to 1, got {edges}")
        if order not in ("easy_first", "hard_first"):
            raise ConfigError(f"unknown order {order!r}; choose easy_first or hard_first")
        if stages not in ("accumulating", "separate"):
            raise ConfigError(f"unknown stages {stages!r}; choose accumulating or separate")
        if only_cluster not in range(len(edges)):
            raise ConfigError(
                f"only_cluster={only_cluster} must be one of the clusters 1..{len(edges) - 1}, or 0 "
                "for those that pacing activates"
            )

        # Only a pacing without stages is at index 0 from the start.
        self.edges, self.pacing = edges, pacing
        self.order, self.stages, self.only_cluster = order, stages, only_cluster
        self.state: PacingState = pacing.start(self.n_clusters)
        if only_cluster and self.index > 0:
            raise ConfigError(
                f"only_cluster={only_cluster} stays on that cluster, and {pacing} would move on; "
                "set --curriculum.pacing none"
            )
        self.observations = 0
        # (observations so far, index from then on), at most N of them
        self.transitions: list[tuple[int, int]] = []

    @property
    def n_clusters(self) -> int:
        return len(self.edges) - 1

    @property
    def index(self) -> int:
        """The curriculum index: N at the start, 0 when the curriculum is complete."""
        return self.state.index

    @property
    def active(self) -> tuple[float, float]:
        """The active noise levels, [low, high). Easy first, stage n brings C_{N-n+1}: the paper's
        stages are the unions C_{N-n+1} .. C_N. Hard first it brings C_n. At index 0 all levels are
        active."""
        return active_levels(self.edges, self.index, self.order, self.stages, self.only_cluster)

    @property
    def lowest(self) -> float:
        """The lowest active noise level. In the paper's order it is enough, as the highest is
        always 1."""
        return self.active[0]

    def observe(self, loss: float) -> bool:
        """Takes the loss of one applied step, averaged over the global batch; returns True if a
        transition followed."""
        # A NaN is never below the best loss, so it would count as patience that is used up.
        if not math.isfinite(loss):
            raise ValueError(
                f"the pacing was shown loss={loss}; only finite losses of applied steps may reach "
                "it"
            )
        before = self.index
        self.state = self.pacing.advance(self.state, loss)
        self.observations += 1
        if self.index != before:
            self.transitions.append((self.observations, self.index))
        return self.index != before

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, which strict JSON and weights-only torch files both take."""
        pacing = asdict(self.state)
        # Before the first loss of a stage the best one is infinite, which JSON does not have.
        return {
            "edges": list(self.edges),
            **{name: getattr(self, name) for name in _PAPER},
            "pacing": {
                **pacing,
                "best_loss": pacing["best_loss"] if math.isfinite(pacing["best_loss"]) else None,
            },
            "observations": self.observations,
            "transitions": [list(transition) for transition in self.transitions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises CheckpointError for that of another curriculum."""
        if tuple(state["edges"]) != self.edges:
            raise CheckpointError(
                f"this curriculum has {self.n_clusters} clusters with edges {self.edges}, the saved "
                f"state has {len(state['edges']) - 1} with {tuple(state['edges'])}; go on with the "
                "clusters of the saved run"
            )
        for name, paper in _PAPER.items():
            # Absent in a state that was saved when there was only the paper's choice.
            mine, saved = getattr(self, name), state.get(name, paper)
            if mine != saved:
                raise CheckpointError(
                    f"this curriculum has {name}={mine}, the saved state has {name}={saved}; go on "
                    f"with --curriculum.{name.replace('_', '-')} {saved}"
                )
        # The inverse of `state_dict`.
        best = state["pacing"]["best_loss"]
        self.state = PacingState(
            **{**state["pacing"], "best_loss": math.inf if best is None else best}
        )
        self.observations = state["observations"]
        self.transitions = [(observations, index) for observations, index in state["transitions"]]
