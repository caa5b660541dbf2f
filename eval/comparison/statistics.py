"""Means, spreads and paired differences of the runs of a comparison, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from eval.comparison.validation_loss import figure
from eval.curve import Row, steps_to_match_best_of
from largescale.errors import DataError

SIGNIFICANCE_LEVEL = 0.05

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
    """Mean over seeds of a method's number less the first method's, and whether it is significant.

    Runs of one seed share data, draws and weights at the start, so much of the noise between seeds
    is not in it. Where several methods are compared with the first, `p_adjusted` is `p_value` with
    Holm's correction."""

    value: float
    error: float | None  # its standard error; None for one seed
    seeds: int
    p_value: float | None  # of the paired t-test; None for one seed
    p_adjusted: float | None

    @property
    def is_significant(self) -> bool:
        return self.p_adjusted is not None and self.p_adjusted < SIGNIFICANCE_LEVEL

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.value:+.3g}"
        verdict = "no significant difference"
        if self.is_significant:
            verdict = "better" if self.value < 0 else "worse"
        p = f"p = {self.p_adjusted:.3g}"
        if self.p_adjusted != self.p_value:
            p += f", raw {self.p_value:.3g}"
        return f"{self.value:+.3g} ± {self.error:.2g}, {verdict} ({p})"


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
    """The mean difference of pairs; its p-value is not corrected."""
    each = [value - other for value, other in zip(values, others, strict=True)]
    value, seeds = fmean(each), len(each)
    if seeds == 1:
        return Difference(value, None, seeds, None, None)
    error = stdev(each) / math.sqrt(seeds)
    p_value = t_test(value, error, seeds)
    return Difference(value, error, seeds, p_value, p_value)


def t_test(mean: float, error: float, seeds: int) -> float:
    """The two-sided p-value of a mean with this standard error, by Student's t."""
    from scipy import stats  # seconds

    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, seeds - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of n is multiplied by n - k + 1, and none
    falls below a smaller one's."""
    adjusted = [0.0] * len(p_values)
    so_far = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted


def against_first(finals: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """Of each method but the first, with Holm's correction over all of them."""
    first, *others = finals
    found = {method: paired(finals[method], finals[first]) for method in others}
    p_values = [d.p_value for d in found.values() if d.p_value is not None]
    if not p_values:  # one seed
        return found
    adjusted = zip(found.items(), holm(p_values), strict=True)
    return {method: replace(difference, p_adjusted=p) for (method, difference), p in adjusted}


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
    curves: dict[str, list[list[tuple[int, float]]]] = {}  # of each method, by seed
    finals: dict[str, list[float]] = {}
    for method, of_seed in runs.items():
        curves[method] = [points(of_seed[seed], name) for seed in of_first]
        finals[method] = [curve[-1][1] for curve in curves[method]]
    differences = against_first(finals)
    best_of_first = fmean(at_best(curve)[0] for curve in curves[first])
    found = {}
    for method, of_seed in runs.items():
        best = [at_best(curve) for curve in curves[method]]
        reached = [
            steps_to_match_best_of(of_figure(of_seed[seed], name), of_first[seed])
            for seed in of_first
        ]
        steps = [pair and pair[0] for pair in reached]
        all_reached = [step for step in steps if step is not None]
        found[method] = Standing(
            final=mean(finals[method]),
            best=mean([value for _, value in best]),
            best_at=fmean(step for step, _ in best),
            difference=differences.get(method),
            reached=tuple(steps),
            speedup=best_of_first / fmean(all_reached) if len(all_reached) == len(steps) else None,
        )
    return found


def at_best(curve: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """(step, value) where the value is least."""
    return min(curve, key=lambda point: point[1])


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
