"""What a difficulty study has measured so far, and what is still missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from eval.difficulty_study.convergence import (
    Convergence,
    LossCurve,
    converge,
    plain,
    rank_correlation,
    read_losses,
)
from eval.difficulty_study.study import Row, Stage


@dataclass(frozen=True)
class Findings:
    study: str
    edges: Sequence[float]
    folders: dict[int, Path]
    """Of the runs: of 0, the full model, and 1 .. N."""
    steps: int
    patience: int
    scored: dict[int, Row]
    """Of eval.difficulty's denoising.jsonl, by interval."""
    entropy: Row | None
    """relative_entropy.json."""

    @cached_property
    def intervals(self) -> range:
        return range(1, len(self.edges))

    @cached_property
    def curves(self) -> dict[int, LossCurve]:
        """Of the intervals that are trained to the end."""
        read = {i: read_losses(self.folders[i]) for i in self.intervals}
        return {
            i: curve
            for i, curve in read.items()
            if len(curve.step) and curve.step[-1] >= self.steps
        }

    @cached_property
    def convergence(self) -> dict[int, Convergence]:
        return {i: converge(curve, self.patience) for i, curve in self.curves.items()}

    @cached_property
    def missing(self) -> dict[Stage, list[int]]:
        """Stage -> intervals; none for the relative entropy, which has none."""
        found: dict[Stage, list[int]] = {}
        if lost := [i for i in self.intervals if i not in self.curves]:
            found["train"] = lost
        if lost := [i for i in (0, *self.intervals) if i not in self.scored]:
            found["denoise"] = lost
        if not self.entropy:
            found["entropy"] = []
        return found

    def entropy_of(self, i: int) -> Row | None:
        """Means over the pairs (t - 1, t) whose t lies in the interval."""
        if not self.entropy:
            return None
        at = [k for k, u in enumerate(self.entropy["u"]) if self.edges[i - 1] <= u < self.edges[i]]
        if not at:
            return None
        return {
            "value": fmean(self.entropy["value"][k] for k in at),
            "kernels": [
                min(self.entropy["kernels"][k] for k in at),
                max(self.entropy["kernels"][k] for k in at),
            ],
            "degenerate": fmean(self.entropy["degenerate"][k] for k in at),
            "biased": fmean(self.entropy["biased"][k] for k in at),
        }

    @cached_property
    def rows(self) -> list[Row]:
        """One an interval, JSON; None is what is missing."""
        wanted = ("figure", "value", "error", "evaluations", "evaluations_inside")
        return [
            {
                "interval": i,
                "u": [self.edges[i - 1], self.edges[i]],
                "run": str(self.folders[i]),
                "convergence": plain(self.convergence[i]) if i in self.convergence else None,
                "denoising": {key: self.scored[i][key] for key in wanted}
                if i in self.scored
                else None,
                "relative_entropy": self.entropy_of(i),
            }
            for i in self.intervals
        ]

    @cached_property
    def correlations(self) -> dict[str, float]:
        """With the interval's number, of what is there for all: where harder tasks are those of
        less noise, near -1 for the steps, the distance and the relative entropy, near 1 for the
        smoothed rises."""
        columns: dict[str, list[float | None]] = {}
        if len(self.convergence) == len(self.intervals):
            of = [self.convergence[i] for i in self.intervals]
            columns |= {
                "oscillates from": [c.oscillates_from for c in of],
                "falls until": [c.falls_until for c in of],
                "rises": [c.rises for c in of],
                "rises, smoothed": [c.smoothed_rises for c in of],
            }
        if all(i in self.scored for i in self.intervals):
            columns["distance"] = [self.scored[i]["value"] for i in self.intervals]
        if self.entropy and all(row["relative_entropy"] for row in self.rows):
            columns["D_KL a timestep"] = [row["relative_entropy"]["value"] for row in self.rows]
        found = {name: rank_correlation(values) for name, values in columns.items()}
        return {name: value for name, value in found.items() if value is not None}
