"""The figures on the page of a difficulty study."""

from collections.abc import Mapping

import numpy as np

from eval.difficulty_study.findings import Findings
from eval.difficulty_study.relative_entropy import FEW_KERNELS, ONE_KERNEL
from largescale.page.charts import Line, heat_map
from largescale.page.figures import figure_of
from largescale.page.markup import figure, table
from largescale.page.series import Curve, Series


def losses(found: Findings) -> list[str]:
    """How fast the loss of each M_i converged; nothing before any is trained to the end."""
    if not found.curves:
        return []
    series = Series()
    rows = []
    for i, curve in found.curves.items():
        series.take({"step": curve.step.astype(float), f"C_{i}": curve.normalised})
        c = found.convergence[i]
        rows.append((f"C_{i}", f"{curve.smoothed.max():.4g}", f"{c.final:.4g}"))
    names = list(map("C_{}".format, found.curves))
    title = "loss, smoothed, scaled to its own range"
    # Colours show the order of the intervals; the numbers are in the table.
    shown = [
        figure(
            title,
            heat_map(title, names, *series.means(names), found.steps),
            table(title, ("interval", "largest loss", "final loss"), rows),
            "Figure A of the paper, as colours.",
        )
    ]

    last = len(found.edges) - 1
    oscillates: dict[int, float] = {}
    falls: dict[int, float] = {}
    rises: dict[int, float] = {}
    # An interval that never oscillates has no step to draw: the note names it.
    still = []
    for i, c in found.convergence.items():
        falls[i] = float(c.falls_until)
        rises[i] = float(c.smoothed_rises)
        if c.oscillates_from is None:
            still.append(f"C_{i}")
        else:
            oscillates[i] = float(c.oscillates_from)
    note = f"Does not oscillate before the end: {', '.join(still)}." if still else ""
    lines = [Line("90 % of its fall are done", by_interval(falls))]
    if oscillates:
        lines.append(Line("it begins to oscillate", by_interval(oscillates)))
    line = Line("rises", by_interval(rises))
    return [
        *shown,
        figure_of("step at which ...", lines, last, note, log=False, over="interval"),
        figure_of(
            "rises of the smoothed loss after step 100", [line], last, log=False, over="interval"
        ),
    ]


def denoising(found: Findings) -> list[str]:
    """The distance of samples with M_i inside its interval; nothing before any is scored."""
    last = len(found.edges) - 1
    values, errors, outside = {}, {}, []
    for i, row in found.scored.items():
        # A distance that was not finite has no place on the axis.
        if i and row["value"] is not None:
            values[i] = row["value"]
            errors[i] = row["error"]
        if i and not row["evaluations_inside"]:
            outside.append(f"C_{i}")
    lines = [Line("M_i inside its interval", by_interval(values, errors))] if values else []
    # The full model has no interval: its level is drawn from the first to the last.
    full = found.scored.get(0)
    if full and full["value"] is not None:
        ends = (1, last)
        level = dict.fromkeys(ends, float(full["value"]))
        error = dict.fromkeys(ends, float(full["error"]))
        lines.append(Line("the full model everywhere", by_interval(level, error)))
    if not lines:
        return []
    note = "Lower is better; the shade is the error."
    if outside:
        note += f" The sampler asks for no noise level of {', '.join(outside)}."
    name = next(iter(found.scored.values()))["figure"]
    return [figure_of(name, lines, last, note, log=False, over="interval")]


def entropy(found: Findings) -> list[str]:
    """The relative entropy of neighbouring noise levels; nothing before it is measured."""
    if not found.entropy:
        return []
    columns = {}
    for key in ("value", "single", "kernels"):
        values = np.array(found.entropy[key], float)
        # Their axis is logarithmic.
        values[values <= 0] = np.nan
        columns[key] = values
    series = Series()
    series.take({"step": np.array(found.entropy["t"], float), **columns})

    shown = []
    for title, names, note in (
        (
            "D_KL(p_{t-1} || p_t), nats",
            {"value": "estimate", "single": "of one kernel: an upper bound"},
            "Figure B of the paper.",
        ),
        (
            "kernels that explain a noised image",
            {"kernels": "kernels"},
            f"Below {ONE_KERNEL:g} the estimate is the one kernel's: an artefact of finitely many "
            "images, whatever they show, and only an upper bound. Below "
            f"{FEW_KERNELS:g} more images would give another value.",
        ),
    ):
        drawn = []
        for key, name in names.items():
            curve = series.curve(key)
            if curve:
                drawn.append(Line(name, curve))
        # All values of one may lie at or below 0.
        if drawn:
            shown.append(figure_of(title, drawn, series.last_step, note, over="timestep"))
    return shown


def by_interval(values: Mapping[int, float], errors: Mapping[int, float] | None = None) -> Curve:
    """A number of each interval, with its error."""
    # Rows stand in the order in which they were scored.
    intervals = sorted(values)
    middle = np.array([values[i] for i in intervals], float)
    error = np.array([errors[i] if errors else 0.0 for i in intervals], float)
    return Curve(np.array(intervals, float), middle - error, middle, middle + error, 0)
