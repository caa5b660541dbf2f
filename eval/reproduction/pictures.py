"""The paper's figures, in its layout, of what there is so far."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.comparison.report import plot_side_by_side, save
from eval.curves.report import plot_run
from eval.difficulty_study.pictures import draw
from eval.drawing.sample_set import GRID, PROVENANCE, pictures
from eval.reproduction.found_runs import FoundRuns
from eval.reproduction.rows import Cell, Row, Scale
from eval.reproduction.sample_steps import Draw, ScoreOverTraining, reference_of
from eval.reproduction.study_steps import StudyStage
from largescale.config.serialise import flatten
from largescale.data.images import grid
from largescale.data.shards import ShardDataset
from largescale.errors import usable
from largescale.host.files import from_json, write_atomically

# Side of an image of 32 pixels or less in a picture, at least.
SIDE = 64
# The picture of a study that each row is about.
OF_STUDY = {
    "Figure A": "losses.png",
    "Figure B": "losses.png",
    "Section B": "denoising.png",
    "Section C": "relative_entropy.png",
}


# The files that were written, and what is missing or could not be drawn.
Written = tuple[list[Path], list[str]]


def write_pictures(scale: Scale, found: FoundRuns, out: Path) -> Written:
    """Write every picture for which something is there."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    missing: list[str] = []
    for row in scale.rows:
        # The cells of a row end with one kind of step, which tells what its picture is.
        write = WRITERS.get(type(row.cells[0].steps[-1]))
        if write:
            paths, lacks = write(row, found, out)
            written += paths
            missing += lacks
    return written, missing


def _file(row: Row, *more: str) -> str:
    """Figure A, DiT-B/2 -> figure_a_dit_b_2.png."""
    words = " ".join([row.name, *more]).lower()
    # Names have slashes and commas, which files must not.
    return "_".join(re.findall("[a-z0-9]+", words)) + ".png"


def _done(row: Row, found: FoundRuns) -> tuple[list[Cell], list[str]]:
    """The cells of which everything is there, and a line for each of the others."""
    done = []
    missing = []
    for cell in row.cells:
        for step in cell.steps:
            standing = step.standing(found)
            # The steps that follow need this one, so one line is enough.
            if standing.state != "done":
                missing.append(f"{row.name}, {cell.name}: {standing.text}")
                break
        else:
            done.append(cell)
    return done, missing


# ---- which noise levels are hard


def _write_study(row: Row, found: FoundRuns, out: Path) -> Written:
    """Figures A and B, sections B and C: the picture of eval.difficulty."""
    done, missing = _done(row, found)
    written = []
    for cell in done:
        step = cell.steps[-1]
        assert isinstance(step, StudyStage)
        # Section B has a picture of each of its models.
        several = (cell.name,) if len(row.cells) > 1 else ()
        path = out / _file(row, *several)
        write_atomically(path, draw(step.findings())[OF_STUDY[row.name]])
        written.append(path)
    return written, missing


# ---- samples


def _write_samples(row: Row, found: FoundRuns, out: Path) -> Written:
    """Figures C to E, a picture of each method side by side; figures G to K, one of each class."""
    done, missing = _done(row, found)
    if not done:
        return [], missing
    # One method, so there is nothing to set side by side.
    if row.name == "Figures G to K":
        return _write_classes(row, _draw_of(done[0]), found, out), missing

    folders = {}
    grids = {}
    for cell in done:
        folders[cell.name] = _draw_of(cell).folder(found)
        grids[cell.name] = folders[cell.name] / GRID
    # Pictures on other noise or of other classes would show more than the method.
    if differs := _other_draws(folders):
        return [], [*missing, f"{row.name}: {differs}"]
    path = out / _file(row)
    plot_side_by_side(grids, path)
    return [path], missing


def _draw_of(cell: Cell) -> Draw:
    """The step that draws the samples of a cell of pictures."""
    step = cell.steps[-1]
    assert isinstance(step, Draw)
    return step


def _other_draws(folders: dict[str, Path]) -> str | None:
    """How the draws of several sample sets differ; None where they do not."""
    first: dict[str, Any] | None = None
    for name, folder in folders.items():
        with usable(folder / PROVENANCE):
            facts = dict(flatten(from_json((folder / PROVENANCE).read_text())))
        # Named even where they are absent: what one set lacks, another may have.
        drawn = dict.fromkeys(("device", "labels", "classes", "captions", "dataset"))
        for key, value in facts.items():
            if key in drawn or key.startswith("sampling."):
                drawn[key] = value
        first = first or drawn
        for key, value in drawn.items():
            if first.get(key) != value:
                return f"{name} was drawn with {key}={value}, another with {first.get(key)}"
    return None


def _write_classes(row: Row, step: Draw, found: FoundRuns, out: Path) -> list[Path]:
    """A sheet of each class: sample i is of the class i modulo their number, none is left out."""
    data = ShardDataset(step.folder(found))
    written = []
    for i, label in enumerate(step.classes):
        chosen = np.arange(i, len(data), len(step.classes))
        images = pictures(data.gather(chosen))
        scale = max(1, SIDE // images.shape[2])
        path = out / _file(row, f"class {label}")
        sheet = Image.fromarray(grid(images, min(8, len(images)), scale))
        # Under another name until it is complete.
        temporary = path.with_suffix(".tmp")
        sheet.save(temporary, "PNG")
        temporary.replace(path)
        written.append(path)
    return written


# ---- over training


def _write_curves(row: Row, found: FoundRuns, out: Path) -> Written:
    """Figure F: a panel for each model, a curve for each method, with its transitions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, list[Any]]] = {}
    missing = []
    figure = ""
    for cell in row.cells:
        step = cell.steps[-1]
        assert isinstance(step, ScoreOverTraining)
        rows = step.rows(found)
        standing = step.standing(found)
        # A curve grows with its run: a part of it is worth a look.
        if standing.state != "done":
            missing.append(f"{row.name}, {cell.name}: {standing.text}")
        if not rows:
            continue
        model, _, method = cell.name.rpartition(", ")
        panel = panels.setdefault(model, {})
        curve = [rows[number] for number in sorted(rows)]
        # Distances to other images have another scale.
        first = next(iter(panel.values()), curve)
        if reference_of(curve[0]) != reference_of(first[0]):
            missing.append(f"{row.name}, {cell.name}: against other images than the panel's first")
            continue
        panel[method] = curve
        figure = step.figure
    if not panels:
        return [], missing

    plots, axes = plt.subplots(
        1, len(panels), squeeze=False, layout="constrained", figsize=(5 * len(panels), 4)
    )
    for (model, methods), axis in zip(panels.items(), axes.flat, strict=True):
        for method, curve in methods.items():
            plot_run(axis, Path(method), curve, figure)
        axis.set(title=model, xlabel="step", ylabel=figure)
        axis.legend(fontsize="small")
    path = out / _file(row)
    save(plots, path)
    return [path], missing


WRITERS: dict[type, Callable[[Row, FoundRuns, Path], Written]] = {
    StudyStage: _write_study,
    Draw: _write_samples,
    ScoreOverTraining: _write_curves,
}
