"""What eval.curve shows of the scores of some runs: lines of words, and pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.curves.rows import (
    Row,
    best_row,
    curve_of,
    figure_text,
    main_figure,
    overlap,
    steps_to_match_best_of,
)


def summary(of_runs: dict[Path, list[Row]]) -> list[str]:
    """Lines on the best of each run, and on which run reaches another's best how much earlier."""
    scored = {run: rows for run, rows in of_runs.items() if rows}
    found = list(map(best_text, scored, scored.values()))
    for one, other in itertools.permutations(scored, 2):
        # Distances of two extractors have nothing to do with each other.
        if main_figure(scored[one]) != main_figure(scored[other]):
            continue
        if pair := steps_to_match_best_of(scored[one], scored[other]):
            found.append(f"{one} reaches the best of {other} {match_text(*pair)}")
    return found


def best_text(run: Path, rows: Sequence[Row]) -> str:
    """The best of one run, with the steps that it cannot be distinguished from."""
    name = main_figure(rows)
    best = best_row(rows)
    figure = best["figures"][name]
    text = f"{run}: best {name} {figure_text(figure)} at step {best['step']:,}"
    # The best of noisy scores is often chance: name what is as good within the errors.
    alike = []
    for row in rows:
        if row is not best and overlap(figure, row["figures"][name]):
            alike.append(f"{row['step']:,}")
    if alike:
        text += f", not told apart from step {', '.join(alike)}: errors overlap"
    return text


def match_text(reached: int, at: int) -> str:
    """When a run reached the best that another had at step `at`."""
    if reached < at:
        return f"at step {reached:,}, {at - reached:,} steps earlier ({1 - reached / at:.0%})"
    return f"at step {reached:,}, {reached - at:,} steps later"


def figure_names(of_runs: dict[Path, list[Row]]) -> list[str]:
    """The figures that any run has, in the order of the first that has them."""
    names: dict[str, None] = {}
    for row in itertools.chain.from_iterable(of_runs.values()):
        names.update(dict.fromkeys(row["figures"]))
    return list(names)


def plot(of_runs: dict[Path, list[Row]], path: Path) -> None:
    """One picture for each figure, three in a row; dotted lines are transitions of a run's stages,
    in its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = figure_names(of_runs)
    columns = min(3, len(names))
    down = -(-len(names) // columns)
    plots, axes = plt.subplots(
        down, columns, figsize=(5 * columns, 4 * down), squeeze=False, layout="constrained"
    )
    # A grid has more places than there are figures.
    for unused in axes.flat[len(names) :]:
        unused.set_axis_off()

    # With one batch size for all runs, a step is the same number of images everywhere.
    all_rows = itertools.chain.from_iterable(of_runs.values())
    batch_sizes = {row["images"] / row["step"] for row in all_rows if row["images"]}
    for name, axis in zip(names, axes.flat, strict=False):
        for run, rows in of_runs.items():
            plot_run(axis, run, rows, name)
        axis.set(xlabel="step", ylabel=name)
        if len(batch_sizes) == 1:
            add_image_axis(axis, *batch_sizes)
        axis.legend(fontsize="small")

    # Under another name until it is complete.
    temporary = path.with_name("curve.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)


def plot_run(axis: Any, run: Path, rows: Sequence[Row], name: str) -> None:
    """One run's curve of one figure, with the transitions of its stages."""
    # A run that was scored with other metrics has no point of this figure.
    c = curve_of(rows, name)
    if not c:
        return
    line = axis.errorbar(
        c.step, c.mean, c.high - c.mean, marker="o", markersize=3, capsize=2, label=str(run)
    )

    # Where a stage of the curriculum ended.
    for step, _index in rows[-1]["transitions"]:
        axis.axvline(step, color=line[0].get_color(), linestyle=":", linewidth=0.6)


def add_image_axis(axis: Any, batch_size: float) -> None:
    """A second x-axis, of images."""
    scales = (lambda step: step * batch_size, lambda images: images / batch_size)
    axis.secondary_xaxis("top", functions=scales).set_xlabel("images")
