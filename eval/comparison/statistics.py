"""Means, spreads and paired differences of the runs of a comparison, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np

from eval.comparison.validation_loss import figure
from eval.curves.rows import Row, steps_to_match_best_of
from largescale.errors import DataError
from largescale.page.series import Curve

# Below this (adjusted) p-value a difference is called better or worse.
SIGNIFICANCE_LEVEL = 0.05

OfRuns = Mapping[str, Mapping[int, Sequence[Row]]]
"""method -> seed -> rows as of eval.curve, one a checkpoint. The first method is what the others
are compared with."""


@dataclass(frozen=True)
class Mean:
    """The mean of one number over seeds; `spread`: their standard deviation, None for one seed."""

    value: float
    spread: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.spread is None else f" ± {self.spread:.2g}")


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of a method's number less the first method's, and whether it is significant.

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
        # Less is better, of every figure that is compared.
        verdict = "no significant difference"
        if self.is_significant:
            verdict = "better" if self.value < 0 else "worse"
        # Both p-values are shown where they differ.
        p = f"p = {self.p_adjusted:.3g}"
        if self.p_adjusted != self.p_value:
            p += f", raw {self.p_value:.3g}"
        return f"{self.value:+.3g} ± {self.error:.2g}, {verdict} ({p})"


@dataclass(frozen=True)
class Standing:
    """How one method stands by one figure; less is better."""

    final: Mean
    best: Mean
    best_at: float  # steps, mean over seeds
    difference: Difference | None  # of the final one; None: this is the first method
    reached: tuple[int | None, ...]  # by seed: first step as good as the first method ever was
    speedup: float | None  # steps of that best over `reached`; None: a seed has not


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def markdown(self) -> list[str]:
        lines = [_line(self.header), "|---" * len(self.header) + "|"]
        return [*lines, *map(_line, self.rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean(values: Sequence[float]) -> Mean:
    return Mean(fmean(values), stdev(values) if len(values) > 1 else None)


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean difference of pairs; its p-value is not corrected."""
    each = [value - other for value, other in zip(values, others, strict=True)]
    value = fmean(each)
    seeds = len(each)
    if seeds == 1:
        return Difference(value, None, seeds, None, None)
    # The standard error of the mean of the pairs' differences.
    error = stdev(each) / math.sqrt(seeds)
    p_value = t_test(value, error, seeds)
    return Difference(value, error, seeds, p_value, p_value)


def t_test(mean: float, error: float, seeds: int) -> float:
    """The two-sided p-value of a mean with this standard error, by Student's t."""
    # Importing scipy.stats takes seconds, which --help should not cost.
    from scipy import stats

    # Runs that agree to the last digit differ by exactly 0, and have no spread to divide by.
    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / error, seeds - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of n is multiplied by n - k + 1, and none
    falls below a smaller one's."""
    adjusted = [0.0] * len(p_values)
    # From the smallest p-value to the largest.
    so_far = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted


def against_first(finals: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """The difference of each method but the first, with Holm's correction over all of them."""
    first, *others = finals
    found = {}
    p_values = []
    for method in others:
        found[method] = difference = paired(finals[method], finals[first])
        # One seed has no spread, so there is no p-value to correct.
        if difference.p_value is not None:
            p_values.append(difference.p_value)
    if not p_values:
        return found
    for method, adjusted in zip(others, holm(p_values), strict=True):
        found[method] = replace(found[method], p_adjusted=adjusted)
    return found


def of_figure(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows with this figure only; a row whose distance was not finite is left out."""
    found = []
    for row in rows:
        # The scorer writes None for a distance that is not finite.
        figures = row["figures"]
        if figures.get(name, {}).get("value") is not None:
            found.append({"step": row["step"], "figures": {name: figures[name]}})
    return found


def points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of one figure, where it is finite."""
    return [(row["step"], row["figures"][name]["value"]) for row in of_figure(rows, name)]


def over_seeds(runs: OfRuns, method: str, name: str, relative: bool = False) -> Curve | None:
    """The curve of one method: means over seeds, from one standard deviation below to one above;
    None without a finite value. `relative`: against the first method's of the same seed and step,
    in percent of it."""
    first = next(iter(runs))
    # By step, the value of each seed.
    each: dict[int, list[float]] = {}
    for seed, rows in runs[method].items():
        base = dict(points(runs[first][seed], name))
        for step, value in points(rows, name):
            if not relative:
                each.setdefault(step, []).append(value)
            elif step in base:
                each.setdefault(step, []).append(100 * (value / base[step] - 1))
    if not each:
        return None

    points_of: list[tuple[float, float, float]] = []
    for step in sorted(each):
        m = mean(each[step])
        points_of.append((step, m.value, m.spread or 0.0))
    steps, middle, spread = np.array(points_of).T
    return Curve(steps, middle - spread, middle, middle + spread, 0)


def curves_of(runs: OfRuns, name: str) -> dict[str, list[list[tuple[int, float]]]]:
    """The curve of one figure: method -> one a seed, in the order of the first method's seeds.

    Raises DataError for a run whose figure was never finite."""
    first = next(iter(runs))
    # In the order of one method's seeds, so that values of the same seed can be paired.
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for method, of_seed in runs.items():
        curves[method] = [points(of_seed[seed], name) for seed in runs[first]]
        if not all(curves[method]):
            raise DataError(
                f"{name} was finite at no checkpoint of a run; score more samples: --num-samples"
            )
    return curves


def standings(runs: OfRuns, name: str) -> dict[str, Standing]:
    """How each method stands by one figure. Raises DataError for one that was never finite."""
    first = next(iter(runs))
    curves = curves_of(runs, name)

    # The final value of each seed, and its difference from the first method's of the same seed.
    finals: dict[str, list[float]] = {}
    for method, of_method in curves.items():
        finals[method] = list(map(last_value, of_method))
    differences = against_first(finals)
    # Against which a speed-up is measured.
    best_step_of_first, _ = mean_best(curves[first])

    found = {}
    for method, of_seed in runs.items():
        best_step, best = mean_best(curves[method])
        reached = steps_to_match_first(of_seed, runs[first], name)
        # A speed-up over the seeds that got there would leave out the slow ones.
        known = known_steps(reached)
        speedup = best_step_of_first / fmean(known) if len(known) == len(reached) else None
        found[method] = Standing(
            final=mean(finals[method]),
            best=best,
            best_at=best_step,
            difference=differences.get(method),
            reached=reached,
            speedup=speedup,
        )
    return found


def mean_best(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[float, Mean]:
    """Means over seeds of the step at which each curve is least, and of its value there."""
    steps, values = zip(*map(at_best, curves), strict=True)
    return fmean(steps), mean(values)


def steps_to_match_first(
    of_seed: Mapping[int, Sequence[Row]], of_first: Mapping[int, Sequence[Row]], name: str
) -> tuple[int | None, ...]:
    """By seed, the first step as good as the first method ever was; None where it never is."""
    reached: list[int | None] = []
    for seed, rows in of_first.items():
        # Rows with this figure only, as the first figure of a row is what is compared.
        pair = steps_to_match_best_of(of_figure(of_seed[seed], name), of_figure(rows, name))
        reached.append(pair and pair[0])
    return tuple(reached)


def known_steps(reached: Sequence[int | None]) -> list[int]:
    """The steps of the seeds that got there."""
    return [step for step in reached if step is not None]


def last_value(curve: Sequence[tuple[int, float]]) -> float:
    """The value at the last step."""
    return curve[-1][1]


def at_best(curve: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """(step, value) where the value is least."""
    return min(curve, key=lambda point: point[1])


def table(found: Mapping[str, Standing]) -> Table:
    """The standings by one figure."""
    first = next(iter(found))
    header = (
        "method",
        "final",
        "best",
        f"final, less {first}'s of the same seed",
        f"steps to {first}'s best",
        "times as fast",
    )
    rows = []
    for method, s in found.items():
        speedup = "" if s.speedup is None else f"{s.speedup:.2f}"
        difference = str(s.difference or "")
        rows.append((method, str(s.final), str(s.best), difference, steps_text(s.reached), speedup))
    return Table(header, tuple(rows))


def steps_text(reached: Sequence[int | None]) -> str:
    """The mean of the steps, and of how many seeds it is where some did not get there."""
    known = known_steps(reached)
    if not known:
        return "not reached"
    text = f"{fmean(known):,.0f}"
    if len(known) < len(reached):
        text += f" ({len(known)} of {len(reached)} seeds)"
    return text


def cluster_table(runs: OfRuns, n_clusters: int, weights: str) -> Table:
    """Final losses per cluster against the first method's of the same seed, in percent."""
    first = next(iter(runs))
    columns = [f"C{i}" for i in range(1, n_clusters + 1)]
    finals = final_losses(runs, columns, weights)
    rows = []
    for method in runs:
        cells = []
        for column in columns:
            losses = finals[method][column]
            # The first method is shown in absolute numbers, which the percentages are of.
            if method == first:
                cells.append(f"{fmean(losses):.4g}")
            else:
                cells.append(percent_change(losses, finals[first][column]))
        rows.append((method, *cells))
    return Table(("method", *columns), tuple(rows))


def final_losses(
    runs: OfRuns, columns: Sequence[str], weights: str
) -> dict[str, dict[str, list[float]]]:
    """The last validation loss: method -> cluster -> one a seed, in the first method's order."""
    first = next(iter(runs))
    found: dict[str, dict[str, list[float]]] = {}
    for method, of_seed in runs.items():
        found[method] = {}
        for column in columns:
            name = figure(weights, f" {column}")
            found[method][column] = [points(of_seed[seed], name)[-1][1] for seed in runs[first]]
    return found


def percent_change(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean over seeds of the change from `theirs`, with its standard error."""
    # As shares of 100, so that the error is one of percents.
    shares = 100 * np.array(ours) / np.array(theirs)
    change = paired(shares.tolist(), [100.0] * len(ours))
    text = f"{change.value:+.2f} %"
    if change.error is not None:
        text += f" ± {change.error:.2f}"
    return text


def summary(found: Mapping[str, Standing], name: str, step: int) -> str:
    """One line that compares the final values of all methods."""
    first, *others = found
    parts = [f"at step {step:,}, {name} is {found[first].final} by {first}"]
    for method in others:
        s = found[method]
        when = f"at step {steps_text(s.reached)}" if any(s.reached) else "never"
        parts.append(
            f"{s.final} by {method} (difference {s.difference}; reaches {first}'s best {when})"
        )
    return "; ".join(parts)
