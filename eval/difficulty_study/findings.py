"""What a difficulty study has measured so far, and what is still missing."""

from bisect import bisect_left
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

# The columns of denoising.jsonl that the report repeats.
DENOISING = ("figure", "value", "error", "evaluations", "evaluations_inside")


@dataclass(frozen=True)
class Findings:
    """All that a study has measured so far. Intervals are numbered 1 .. N from the least noise;
    0 is the full model."""

    study: str
    edges: Sequence[float]
    folders: dict[int, Path]
    """The folders of the runs, by interval: 0, the full model, and 1 .. N."""
    steps: int
    patience: int
    scored: dict[int, Row]
    """The rows of eval.difficulty's denoising.jsonl, by interval."""
    entropy: Row | None
    """The content of relative_entropy.json; None before it is measured."""

    @cached_property
    def intervals(self) -> range:
        return range(1, len(self.edges))

    @cached_property
    def curves(self) -> dict[int, LossCurve]:
        """The loss curves of the intervals that are trained to the end."""
        found = {}
        for i in self.intervals:
            # A curve that ends early would be compared with complete ones.
            curve = read_losses(self.folders[i])
            if len(curve.step) and curve.step[-1] >= self.steps:
                found[i] = curve
        return found

    @cached_property
    def convergence(self) -> dict[int, Convergence]:
        return {i: converge(curve, self.patience) for i, curve in self.curves.items()}

    @cached_property
    def missing(self) -> dict[Stage, list[int]]:
        """The stages that are not complete -> the intervals that lack; none for the relative
        entropy, which is one measurement over all of them."""
        found: dict[Stage, list[int]] = {}
        # The full model may be given instead of trained, so only the intervals count.
        if lost := set(self.intervals) - self.curves.keys():
            found["train"] = sorted(lost)
        if lost := {0, *self.intervals} - self.scored.keys():
            found["denoise"] = sorted(lost)
        if not self.entropy:
            found["entropy"] = []
        return found

    def entropy_of(self, i: int) -> Row | None:
        """Means over the pairs (t - 1, t) whose t lies in the interval."""
        if not self.entropy:
            return None
        # u rises with t, so the timesteps of an interval stand side by side.
        start = bisect_left(self.entropy["u"], self.edges[i - 1])
        end = bisect_left(self.entropy["u"], self.edges[i])
        if start == end:
            return None
        # The extremes, as a mean over timesteps would hide where the estimate fails.
        kernels = self.entropy["kernels"][start:end]
        return {
            "value": fmean(self.entropy["value"][start:end]),
            "kernels": [min(kernels), max(kernels)],
            "degenerate": fmean(self.entropy["degenerate"][start:end]),
            "biased": fmean(self.entropy["biased"][start:end]),
        }

    @cached_property
    def rows(self) -> list[Row]:
        """A row for each interval, as plain JSON; None stands for what is missing."""
        found = []
        for i in self.intervals:
            # What is missing is null, not left out: every row has the same keys.
            denoising = None
            if i in self.scored:
                denoising = {key: self.scored[i][key] for key in DENOISING}
            found.append(
                {
                    "interval": i,
                    "u": [self.edges[i - 1], self.edges[i]],
                    "run": str(self.folders[i]),
                    "convergence": plain(self.convergence[i]) if i in self.convergence else None,
                    "denoising": denoising,
                    "relative_entropy": self.entropy_of(i),
                }
            )
        return found

    @cached_property
    def correlations(self) -> dict[str, float]:
        """The rank correlation of each measurement with the interval's number, where all intervals
        have it: where harder tasks are those of less noise, near -1 for the steps, the distance and
        the relative entropy, near 1 for the smoothed rises."""
        columns: dict[str, list[float | None]] = {}
        # A correlation over some of the intervals would not be comparable with one over all.
        if len(self.convergence) == len(self.intervals):
            for name, field in (
                ("oscillates from", "oscillates_from"),
                ("falls until", "falls_until"),
                ("rises", "rises"),
                ("rises, smoothed", "smoothed_rises"),
            ):
                columns[name] = [getattr(self.convergence[i], field) for i in self.intervals]
        if self.scored.keys() >= set(self.intervals):
            columns["distance"] = [self.scored[i]["value"] for i in self.intervals]
        # A short noise axis has intervals without a timestep.
        entropies = list(map(self.entropy_of, self.intervals))
        if all(entropies):
            columns["D_KL a timestep"] = [entropy["value"] for entropy in entropies if entropy]

        found = {}
        for name, values in columns.items():
            correlation = rank_correlation(values)
            if correlation is not None:
                found[name] = correlation
        return found
