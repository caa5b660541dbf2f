"""Figures of curves: a picture, its legend, and its numbers for who cannot see it."""

from collections.abc import Sequence

import numpy as np

from largescale.page.charts import STYLES, Line, Stage, line_chart, place, short
from largescale.page.markup import figure, table, text

# Groups of points in the table below a chart.
_GROUPS = 10


def figure_of(
    title: str,
    lines: Sequence[Line],
    last_step: float,
    note: str = "",
    marks: Sequence[tuple[int, str]] = (),
    stages: Sequence[Stage] = (),
    log: bool = True,
    percent: bool = False,
    over: str = "step",
) -> str:
    """Curves in one picture, with a legend and their numbers; see `line_chart`."""
    picture = line_chart(title, lines, last_step, stages, marks, log, percent, over)
    if len(lines) > 1:
        picture += legend([line.name for line in lines])
    lost = sum(line.curve.not_finite for line in lines)
    if lost:
        note = f"{note} Not finite, and not shown: {lost:,}.".strip()
    numbers = "".join(numbers_of(line, over) for line in lines)
    return figure(title, picture, numbers, note)


def legend(names: Sequence[str]) -> str:
    items = []
    for number, name in enumerate(names):
        swatch = f'<svg viewBox="0 0 24 8" aria-hidden="true"><path class="line s{number % STYLES}" d="M0 4H24"/></svg>'
        items.append(f"<li>{swatch}{text(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def numbers_of(line: Line, over: str = "step") -> str:
    """The numbers of a curve as a table, in a few groups of points."""
    c = line.curve
    rows = []
    for some in np.array_split(np.arange(len(c.step)), min(_GROUPS, len(c.step))):
        steps = place(c.step[some[0]])
        if len(some) > 1:
            steps += f" to {place(c.step[some[-1]])}"
        rows.append(
            (
                steps,
                short(float(c.mean[some].mean())),
                short(float(c.low[some].min())),
                short(float(c.high[some].max())),
            )
        )
    return table(line.name, (f"{over}s", "mean", "lowest", "highest"), rows)
