"""Rows of scores, one a checkpoint, as JSON lines: which there are, which is best, and which are
missing."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from largescale.checkpoint.files import checkpoints
from largescale.errors import DataError
from largescale.host.files import from_json
from largescale.page.series import Curve

Row = dict[str, Any]

HELD_OUT_LOSS = "held-out loss"
"""The figure of eval.curve --ema-widths --validation: unweighted, over all noise levels."""


def lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; a line that was cut short is left out."""
    found = []
    # A crash while writing leaves a part of the last line.
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            row = from_json(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def is_scored(row: Row, name: str) -> bool:
    """Whether a row has this figure, as eval.score and eval.curve write it: with a value and an error,
    which are null where they are not finite."""
    figures = row.get("figures")
    figure = figures.get(name) if isinstance(figures, dict) else None
    if not isinstance(figure, dict) or not {"value", "error"} <= figure.keys():
        return False
    return all(isinstance(figure[key], float | int | None) for key in ("value", "error"))


def require_same_reference(rows: Iterable[Row], facts: Row, file: Path) -> None:
    """Raises DataError where rows of `file` are against other images than the reference of these
    `facts`, which has the same path."""
    for row in rows:
        before = row.get("reference")
        if before and before["fingerprint"] != facts["fingerprint"]:
            raise DataError(
                f"{file} has scores against other images in {before['path']} than there are now, and "
                "distances to both are not comparable; put the former back, or give these another name"
            )


def rows_of_protocol(path: Path, protocol: Row) -> list[Row]:
    """The rows of one protocol in a file, in the order of steps; of two of one step, the later."""
    found = {}
    for row in lines(path):
        if row.get("protocol") == protocol:
            found[row["step"]] = row
    return [found[step] for step in sorted(found)]


def steps_of(rows: Sequence[Row]) -> list[int]:
    """The steps of some rows."""
    return [row["step"] for row in rows]


def rows_at(rows: Sequence[Row], every: int, last: int) -> list[Row]:
    """The rows at multiples of `every`, and at step `last`."""
    return [row for row in rows if row["step"] % every == 0 or row["step"] == last]


def steps_to_score(run: Path, known: Sequence[int], every: int) -> list[int]:
    """The steps of a run's checkpoints that are not `known`: multiples of `every`, and the newest,
    but never step 0, at which nothing is trained."""
    steps = sorted([checkpoint.step for checkpoint in checkpoints(run)])
    found = []
    for step in steps:
        wanted = step % every == 0 or step == steps[-1]
        if wanted and step > 0 and step not in known:
            found.append(step)
    return found


def main_figure(rows: Sequence[Row]) -> str:
    """The Frechet distance, by the name that it has for this extractor; without samples, the held-out
    loss."""
    return next(iter(rows[0]["figures"]))


def figures_of_widths(rows: Sequence[Row]) -> list[str]:
    """What is shown against the width: the Frechet distance, and the held-out loss; each where it was
    measured."""
    names = [main_figure(rows)]
    if HELD_OUT_LOSS in rows[0]["figures"]:
        names.append(HELD_OUT_LOSS)
    return list(dict.fromkeys(names))


def steps_to_match_best_of(one: Sequence[Row], other: Sequence[Row]) -> tuple[int, int] | None:
    """The first step at which `one` is at least as good as `other` ever was, and the step of that
    best of the other; None where it never is."""
    name = main_figure(other)
    best = best_row(other)
    for row in one:
        if value_of(row, name) <= value_of(best, name):
            return row["step"], best["step"]
    return None


def best_row(rows: Sequence[Row], name: str = "") -> Row:
    """The row with the least of a figure, by default the Frechet distance."""
    name = name or main_figure(rows)
    return min(rows, key=lambda row: value_of(row, name))


def value_of(row: Row, name: str) -> float:
    """One figure of a row; infinite where it was not finite, which JSON cannot hold."""
    value = row["figures"][name]["value"]
    return math.inf if value is None else float(value)


def curve_of(rows: Sequence[Row], name: str, over: str = "step") -> Curve | None:
    """One figure of the rows that have it, with its error; None where it is finite in none."""
    having = [row for row in rows if name in row["figures"]]
    figures = [row["figures"][name] for row in having]
    places = np.array([row[over] for row in having], float)
    values = np.array([figure["value"] for figure in figures], float)
    errors = np.array([figure["error"] for figure in figures], float)
    finite = np.isfinite(values) & np.isfinite(errors)
    if not finite.any():
        return None
    places, values, errors = places[finite], values[finite], errors[finite]
    return Curve(places, values - errors, values, values + errors, int((~finite).sum()))


def figure_text(figure: Row, sign: str = "+-") -> str:
    """A figure with its error; a held-out loss, which has none, without."""
    if figure["value"] is None or figure["error"] is None:
        return "not finite"
    if not figure["error"]:
        return f"{figure['value']:.5g}"
    return f"{figure['value']:.5g} {sign} {figure['error']:.2g}"


def overlap(one: Row, other: Row) -> bool:
    """Whether two figures, with their errors, leave open which is the greater."""
    if None in (one["value"], other["value"], one["error"], other["error"]):
        return False
    return bool(abs(one["value"] - other["value"]) <= one["error"] + other["error"])
