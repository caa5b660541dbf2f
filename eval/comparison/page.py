"""A comparison as a page: one HTML file that needs no network."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.comparison.statistics import OfRuns, Table, over_seeds
from largescale.page.charts import Line
from largescale.page.figures import figure_of
from largescale.page.frame import frame
from largescale.page.markup import figure, paragraphs, section, table, text
from largescale.page.previews import picture

# Of the samples of a method, in the page.
_WIDTH = 640


def page(
    title: str,
    notes: Sequence[str],
    command: str,
    tables: Mapping[str, Table],
    shown: Sequence[tuple[OfRuns, str]],
    grids: Mapping[str, Path],
) -> str:
    """`shown`: the figures that are drawn, each with its runs. `grids`: method -> its picture."""
    # Every figure has the same methods in the same order; the first is what is compared with.
    first = next(iter(shown[0][0]))
    written = []
    for heading, each in tables.items():
        written.append(table(heading, each.header, each.rows))
    samples = []
    for method, path in grids.items():
        samples.append(figure(method, picture(path, f"samples of {method}", _WIDTH)))
    content = (
        paragraphs(*notes)
        + section("Figures", *written)
        + section("Curves", *_figures(shown), grid=True)
        + section(f"Against {first}", *_figures(shown, relative=True), grid=True)
        + section("Samples of the last step, by the first seed", *samples, grid=True)
        + section("Command", f'<pre tabindex="0">{text(command)}</pre>')
    )
    return frame(title, content, time.time())


def _figures(shown: Sequence[tuple[OfRuns, str]], relative: bool = False) -> list[str]:
    figures: list[str] = []
    for runs, name in shown:
        lines = []
        for method in runs:
            curve = over_seeds(runs, method, name, relative)
            if curve:
                lines.append(Line(method, curve))
        if not lines:
            continue
        title = f"{name}, change in %" if relative else name
        # Said once.
        note = "" if figures else "The shades are one standard deviation over seeds."
        last_step = max(line.curve.step[-1] for line in lines)
        figures.append(figure_of(title, lines, last_step, note, percent=relative))
    return figures
