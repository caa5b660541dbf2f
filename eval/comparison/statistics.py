"""Means, spreads and paired differences of the runs of a comparison, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from eval.comparison.validation_loss import figure
from eval.curve import Row, steps_to_match_best_of
from largescale.errors import DataError

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; further on, the last: wider than
# need be
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

OfRuns = Mapping[str, Mapping[int, Sequence[Row]]]
"""method -> seed -> rows as of eval.curve, one a checkpoint. The first method is what the others
are compared with."""


@dataclass(frozen=True)
class Mean:
    """Of one number of several seeds; `spread`: their standard deviation, None for one seed."""

    value: float
    spread: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.spread is None else f" ± {self.spread:.2g}")


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of a method's number less the first method's; `error`: its standard error,
    None for one seed.

    Runs of one seed share data, draws and weights at the start, so much of the noise between seeds
    is not in it."""

    value: float
    error: float | None
    seeds: int

    @property
    def is_significant(self) -> bool:
        """From 0, with 95 % confidence by Student's t."""
        return (
            self.error is not None
            and abs(self.value) > T95[min(self.seeds - 1, len(T95)) - 1] * self.error
        )

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.value:+.3g}"
        verdict = (
            ("better" if self.value < 0 else "worse") if self.is_significant else "not told apart"
        )
        return f"{self.value:+.3g} ± {self.error:.2g}, {verdict}"


@dataclass(frozen=True)
class Standing:
    """One method by one figure, of which less is better."""

    final: Mean
    best: Mean
    best_at: float  # steps, mean over seeds
    difference: Difference | None  # of the final one; None: this is the first method
    reached: tuple[int | None, ...]  # by seed: first step as good as the first method ever was
    speedup: float | None  # steps of that best over `reached`; None: a seed has not


def mean(values: Sequence[float]) -> Mean:
    return Mean(fmean(values), stdev(values) if len(values) > 1 else None)


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    each = [value - other for value, other in zip(values, others, strict=True)]
    return Difference(
        fmean(each), stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None, len(each)
    )


def of_figure(rows: Sequence[Row], name: str) -> list[Row]:
    """With this figure only; a distance that was not finite is left out."""
    return [
        {"step": row["step"], "figures": {name: row["figures"][name]}}
        for row in rows
        if row["figures"].get(name, {}).get("value") is not None
    ]


def points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row["figures"][name]["value"]) for row in of_figure(rows, name)]


def standings(runs: OfRuns, name: str) -> dict[str, Standing]:
    first = next(iter(runs))
    of_first = {seed: of_figure(rows, name) for seed, rows in runs[first].items()}
    if not all(points(rows, name) for of_seed in runs.values() for rows in of_seed.values()):
        raise DataError(
            f"{name} was finite at no checkpoint of a run; score more samples: --num-samples"
        )
    best_of_first = {
        seed: min(points(rows, name), key=lambda point: point[1]) for seed, rows in of_first.items()
    }
    found = {}
    for method, of_seed in runs.items():
        each = [points(of_seed[seed], name) for seed in of_first]
        best = [min(curve, key=lambda point: point[1]) for curve in each]
        final = [curve[-1][1] for curve in each]
        reached = [
            steps_to_match_best_of(of_figure(of_seed[seed], name), of_first[seed])
            for seed in of_first
        ]
        steps = [pair and pair[0] for pair in reached]
        all_reached = [step for step in steps if step is not None]
        best_at = fmean(step for step, _ in best_of_first.values())
        found[method] = Standing(
            final=mean(final),
            best=mean([value for _, value in best]),
            best_at=fmean(step for step, _ in best),
            difference=None
            if method == first
            else paired(final, [points(rows, name)[-1][1] for rows in of_first.values()]),
            reached=tuple(steps),
            speedup=best_at / fmean(all_reached) if len(all_reached) == len(steps) else None,
        )
    return found


def table(found: Mapping[str, Standing]) -> list[str]:
    """Markdown."""
    first = next(iter(found))
    lines = [
        f"| method | final | best | final, less {first}'s of the same seed | steps to {first}'s "
        "best | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for method, s in found.items():
        lines.append(
            f"| {method} | {s.final} | {s.best} | {s.difference or ''} | {steps_text(s.reached)} | "
            + ("" if s.speedup is None else f"{s.speedup:.2f}")
            + " |"
        )
    return lines


def steps_text(reached: Sequence[int | None]) -> str:
    known = [step for step in reached if step is not None]
    if not known:
        return "not reached"
    return f"{fmean(known):,.0f}" + (
        "" if len(known) == len(reached) else f" ({len(known)} of {len(reached)} seeds)"
    )


def cluster_table(runs: OfRuns, n_clusters: int, weights: str) -> list[str]:
    """Markdown: final losses per cluster against the first method's of the same seed, in
    percent."""
    first, columns = next(iter(runs)), [f"C{i}" for i in range(1, n_clusters + 1)]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (n_clusters + 1) + "|"]
    for method, of_seed in runs.items():
        cells = []
        for column in columns:
            name = figure(weights, f" {column}")
            ours, theirs = (
                [points(of[seed], name)[-1][1] for seed in runs[first]]
                for of in (of_seed, runs[first])
            )
            if method == first:
                cells.append(f"{fmean(ours):.4g}")
                continue
            change = paired(
                [100 * a / b for a, b in zip(ours, theirs, strict=True)], [100.0] * len(ours)
            )
            cells.append(
                f"{change.value:+.2f} %"
                + ("" if change.error is None else f" ± {change.error:.2f}")
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def summary(found: Mapping[str, Standing], name: str, step: int) -> str:
    """One line."""
    first, *others = found
    said = [f"at step {step:,}, {name} is {found[first].final} by {first}"]
    for method in others:
        s = found[method]
        when = f"at step {steps_text(s.reached)}" if any(s.reached) else "never"
        said.append(
            f"{s.final} by {method} (difference {s.difference}; reaches {first}'s best {when})"
        )
    return "; ".join(said)
