"""Scores as a page: one HTML file that needs no network."""

import time
from collections.abc import Sequence
from pathlib import Path

from eval.curves.report import figure_names, summary
from eval.curves.rows import Row, curve_of, figure_text, figures_of_widths
from largescale.page.charts import Line, Stage
from largescale.page.figures import figure_of
from largescale.page.frame import frame
from largescale.page.markup import paragraphs, section, table

OfRuns = dict[Path, list[Row]]

_NOTE = "The shades are the errors of the scores."


def curve_page(of_runs: OfRuns) -> str:
    """Every figure against steps, of all runs."""
    scored = {run: rows for run, rows in of_runs.items() if rows}
    last_step = max(rows[-1]["step"] for rows in scored.values())
    stages, marks = _transitions(scored)
    note = _NOTE
    if stages:
        note += " Bands: the stages of the curriculum, with their index, which counts down to 0."
    if marks:
        note += " Lines on top: where a stage of a curriculum ended."
    figures: list[str] = []
    for name in figure_names(scored):
        lines = [Line(str(run), c) for run, rows in scored.items() if (c := curve_of(rows, name))]
        # The note is said once.
        figures.append(figure_of(name, lines, last_step, "" if figures else note, marks, stages))
    content = (
        paragraphs(*summary(of_runs))
        + section("Scores against steps", *figures, grid=True)
        + section("Checkpoints", *(_table(str(run), rows) for run, rows in scored.items()))
        + _protocol(scored)
    )
    return frame(f"Scores of {', '.join(map(str, scored))}", content, time.time())


def widths_page(of_runs: OfRuns, best: Sequence[str]) -> str:
    """The Frechet distance of each run, and its held-out loss where it was measured, against the
    width of the average. `best`: lines on the runs."""
    widest = max(row["ema_width"] for rows in of_runs.values() for row in rows)
    # Distances of two extractors have nothing to do with each other.
    of_names: dict[str, list[Line]] = {}
    for run, rows in of_runs.items():
        for name in figures_of_widths(rows):
            curve = curve_of(rows, name, "ema_width")
            if curve:
                line = Line(f"{run}, step {rows[-1]['step']:,}", curve)
                of_names.setdefault(name, []).append(line)
    note = f"{_NOTE} A width is a share of the training."
    figures: list[str] = []
    for name, lines in of_names.items():
        figures.append(figure_of(name, lines, widest, "" if figures else note, over="width"))
    content = (
        paragraphs(*best)
        + section("Scores against the width of the average", *figures, grid=True)
        + section("Widths", *(_table(str(run), rows) for run, rows in of_runs.items()))
        + _protocol(of_runs)
    )
    return frame(f"Widths of averages of {', '.join(map(str, of_runs))}", content, time.time())


def _transitions(scored: OfRuns) -> tuple[list[Stage], list[tuple[int, str]]]:
    """(the stages of the one run that there is, or where stages of several runs ended)."""
    if len(scored) > 1:
        marks = []
        for run, rows in scored.items():
            for step, index in rows[-1]["transitions"]:
                marks.append((step, f"{run} at step {step:,}: index {index} from here on"))
        return [], marks
    (rows,) = scored.values()
    last_step = rows[-1]["step"]
    transitions = rows[-1]["transitions"]
    if not transitions:
        return [], []
    # An index counts down by one.
    stages = []
    found = [(0, transitions[0][1] + 1), *transitions]
    for (first, index), (last, _) in zip(found, [*found[1:], (last_step, 0)], strict=True):
        stages.append(Stage(f"index {index}", index, first, max(first, last), None, None))
    return stages, []


def _table(title: str, rows: Sequence[Row]) -> str:
    names = figure_names({Path(title): list(rows)})
    widths = "ema_width" in rows[0]
    lines = []
    for row in rows:
        cells = [f"{row['step']:,}", f"{row['images']:,}" if row["images"] else "-"]
        if widths:
            cells.insert(0, f"{row['ema_width']:g}")
        for name in names:
            figure = row["figures"].get(name)
            cells.append(figure_text(figure, "±") if figure else "-")
        lines.append(cells)
    header = [*(["width"] if widths else []), "step", "images", *names]
    return table(title, header, lines)


def _protocol(scored: OfRuns) -> str:
    """How the samples were drawn and scored, and what is to be known of it."""
    notes: dict[str, None] = {}
    for rows in scored.values():
        for row in rows:
            notes.update(dict.fromkeys(row["notes"]))
    # All rows share it, but for the width.
    protocol = next(iter(scored.values()))[0]["protocol"]
    settings = []
    for key, value in protocol.items():
        if key != "ema_width":
            settings.append((key, "-" if value is None else value))
    return section(
        "Protocol", table("settings", ("setting", "value"), settings), paragraphs(*notes)
    )
