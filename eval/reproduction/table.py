"""Table A, and the tables of the main text, beside the paper's figures."""

from dataclasses import dataclass
from typing import Any

from eval.reproduction.found_runs import FoundRuns
from eval.reproduction.progress import CellStanding, cells_of, notes_on, score_of, survey
from eval.reproduction.rows import FIGURES, Row, Scale
from eval.reproduction.sample_steps import reference_of


@dataclass(frozen=True)
class Scored:
    """The figures of one cell, by FIGURES, and the run that they are of."""

    values: dict[str, float]
    errors: dict[str, float]
    run: str


@dataclass(frozen=True)
class Tables:
    """What there is to show, and what there is besides."""

    scale: Scale
    cells: list[CellStanding]
    scored: dict[tuple[str, str], Scored]
    """By the names of row and cell."""
    notes: list[str]

    def plain(self) -> dict[str, Any]:
        """The figures as JSON values: row -> cell -> figure -> value, and the size that they are of."""
        rows: dict[str, Any] = {}
        for (row, cell), scored in self.scored.items():
            rows.setdefault(row, {})[cell] = {**scored.values, "run": scored.run}
        return {"scale": self.scale.name, "rows": rows}


def read_tables(scale: Scale, found: FoundRuns) -> Tables:
    """The figures of every cell whose run, samples and score are all the row's."""
    cells = survey(scale, found)
    notes = notes_on(scale, found, cells)
    scored = {}
    for row in scale.rows:
        # Of one table all samples are compared with the same images, and all runs saw the same data.
        first: dict[str, tuple[Any, Any]] = {}
        for cell in cells_of(row, cells):
            step = score_of(cell.cell)
            if step is None or cell.standing.state != "done":
                continue
            run = step.draw.train.chosen(found)
            result = step.row(found)
            assert run and result
            reference = reference_of(result)
            data = step.draw.train.data.name
            first_dataset, first_reference = first.setdefault(data, (run.dataset, reference))
            folder = step.draw.folder(found)
            if run.dataset != first_dataset:
                notes.append(f"{run.folder} was trained on other data than the table's first run")
            elif reference != first_reference:
                notes.append(f"{folder} was compared with other images than the table's first run")
            else:
                text = f"seed {run.config.train.seed}, {run.arithmetic}"
                names = scale.scoring.names(step.draw.num_samples)
                scored[row.name, cell.cell.name] = _scored(result["figures"], names, text)
    return Tables(scale, cells, scored, notes)


def _scored(figures: dict[str, Any], names: list[str], run: str) -> Scored:
    """The figures of a row of eval.score, under the paper's names. `names`: what they are called
    there, in the order of FIGURES."""
    values = {}
    errors = {}
    for short, name in zip(FIGURES, names, strict=True):
        figure = figures.get(name)
        # A distance that was not finite has no value.
        if figure and figure["value"] is not None:
            values[short] = figure["value"]
            errors[short] = figure["error"]
    return Scored(values, errors, run)


def table_lines(tables: Tables) -> list[str]:
    """All tables in Markdown, and what is not in them."""
    scale = tables.scale
    lines = [f"# The paper's tables, at {scale.name} size", ""]
    if scale.scoring.frechet != "FID":
        lines += [
            f"Toy models, toy data, and the distance {scale.scoring.frechet}, which is no FID: nothing "
            "here compares with the paper. It shows that every row can be made.",
            "",
        ]
    for row in scale.rows:
        # The cells of a row end with one kind of step: all of them are scores, or none is.
        if score_of(row.cells[0]):
            lines += row_lines(row, tables)
    if tables.notes:
        lines += ["## Not in the tables", ""]
        for note in tables.notes:
            lines.append(f"- {note}")
        lines.append("")
    return lines


def row_lines(row: Row, tables: Tables) -> list[str]:
    """One table: the paper's figures, empty where they are in the main text, and those here, empty
    where a run, its samples or its score are missing."""
    step = score_of(row.cells[0])
    assert step
    # Beside each other as in the paper, whose FID is of 50,000 samples: here it may be of fewer.
    names = tables.scale.scoring.names(step.draw.num_samples)
    head = [""]
    for short, name in zip(("FID-50K", *FIGURES[1:]), names, strict=True):
        head += [f"{short}, paper", f"{name}, here"]
    lines = [
        f"## {row.name}",
        "",
        row.shows,
        "",
        f"| {' | '.join([*head, 'run'])} |",
        f"|---{'|---:' * (len(head) - 1)}|---|",
    ]
    for cell in row.cells:
        scored = tables.scored.get((row.name, cell.name))
        words = [cell.name]
        for short in FIGURES:
            published = cell.published.get(short)
            words.append("" if published is None else f"{published:.2f}")
            words.append(_here(scored, short))
        words.append(scored.run if scored else "")
        lines.append(f"| {' | '.join(words)} |")
    return [*lines, ""]


def _here(scored: Scored | None, short: str) -> str:
    """A figure with its error; empty where it is missing."""
    if scored is None or short not in scored.values:
        return ""
    return f"{scored.values[short]:.2f} ± {scored.errors[short]:.2g}"
