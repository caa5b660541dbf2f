"""How far each cell of the paper's rows is, and which command comes next."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from eval.reproduction.found_runs import FoundRuns
from eval.reproduction.rows import Cell, Row, Scale
from eval.reproduction.sample_steps import ScoreSamples
from eval.reproduction.steps import DONE, Standing, Step, Train, python


@dataclass(frozen=True)
class CellStanding:
    """How far one cell is."""

    row: Row
    cell: Cell
    standing: Standing
    next: Step | None
    """The step to do next; None where all are done, or where a person has to decide first."""
    notes: tuple[str, ...]
    """What lies there and does not count, and why."""


def survey(scale: Scale, found: FoundRuns) -> list[CellStanding]:
    """Every cell, in the order of the rows."""
    # A run that several rows share is looked at once.
    known: dict[Step, Standing] = {}
    cells = []
    for row in scale.rows:
        for cell in row.cells:
            cells.append(_cell_standing(row, cell, found, known))
    return cells


def _cell_standing(
    row: Row, cell: Cell, found: FoundRuns, known: dict[Step, Standing]
) -> CellStanding:
    notes: dict[str, None] = {}
    for step in cell.steps:
        if step not in known:
            known[step] = step.standing(found)
        standing = known[step]
        notes.update(dict.fromkeys(standing.notes))
        if standing.state == "refused":
            notes[standing.text] = None
        # The first step that is not done is where the cell stands.
        if standing.state != "done":
            waits = standing.state in ("refused", "running")
            return CellStanding(row, cell, standing, None if waits else step, tuple(notes))
    return CellStanding(row, cell, DONE, None, tuple(notes))


def notes_on(scale: Scale, found: FoundRuns, cells: list[CellStanding]) -> list[str]:
    """What lies below the root and is shown in no cell, and why, each once."""
    notes: dict[str, None] = {}
    for cell in cells:
        notes.update(dict.fromkeys(cell.notes))
    names = set()
    for train in trainings(scale.whole or scale):
        names.add((train.name, train.kind))
    # A run of another size or another project is worth a word: it may be a mistake.
    for run in found.runs:
        if (run.config.name, run.kind) not in names:
            notes[f"{run.folder} is of no row at this size: {run.config.name}, {run.kind}"] = None
    for folder, why in found.unreadable.items():
        notes[f"{folder} cannot be read: {why}"] = None
    return list(notes)


def trainings(scale: Scale) -> list[Train]:
    """Every training of the rows, once."""
    found: dict[Train, None] = {}
    for step in steps(scale):
        if isinstance(step, Train):
            found[step] = None
    return list(found)


def steps(scale: Scale) -> Iterator[Step]:
    """Every step of every cell, in order; those that cells share come again."""
    for row in scale.rows:
        for cell in row.cells:
            yield from cell.steps


def status_lines(scale: Scale, found: FoundRuns) -> list[str]:
    """How every cell stands, with the next command where one is missing; a summary last."""
    cells = survey(scale, found)
    at_paper_size = scale.name == "paper"
    lines = []
    for row in scale.rows:
        of_row = cells_of(row, cells)
        lines += ["", f"{row.name}: {count_done(of_row)} of {len(of_row)} done. {row.shows}"]
        width = max(len(cell.cell.name) for cell in of_row)
        for cell in of_row:
            lines.append(f"  {cell.cell.name:<{width}}  {_short(cell.standing)}")
            if cell.next:
                # At toy size this machine does what is a batch job at the paper's.
                step = cell.next
                command = step.job(found) if at_paper_size else python(*step.call(found))
                lines.append(f"  {'':<{width}}  next: {command}")

    notes = notes_on(scale, found, cells)
    if notes:
        lines += ["", "Not counted:"]
    for note in notes:
        lines.append(f"  {note}")
    done = f"{count_done(cells)} of {len(cells)} cells done"
    return [*lines, "", f"{found.root}: {done}, {len(notes)} notes"]


def cells_of(row: Row, cells: list[CellStanding]) -> list[CellStanding]:
    """The cells of one row."""
    return [cell for cell in cells if cell.row is row]


def count_done(cells: list[CellStanding]) -> int:
    """How many of these cells are done."""
    count = 0
    for cell in cells:
        count += cell.standing.state == "done"
    return count


def _short(standing: Standing) -> str:
    """A standing in a word; what is wrong is listed below."""
    return "not counted, see below" if standing.state == "refused" else standing.text


def with_row_filter(scale: Scale, names: tuple[str, ...]) -> Scale:
    """The scale with these rows only, and the data that they need."""
    # Without the data no other row could be made.
    kept = [row for row in scale.rows if row.name in ("Data", *names)]
    return dataclasses.replace(scale, rows=tuple(kept), whole=scale)


def score_of(cell: Cell) -> ScoreSamples | None:
    """The step that makes the figures of a cell of a table; None for a cell of something else."""
    last = cell.steps[-1]
    return last if isinstance(last, ScoreSamples) else None
