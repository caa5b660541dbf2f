"""What a comparison writes: table.md, report.html, results.json and pictures."""

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import largescale
from eval.comparison.page import page
from eval.comparison.statistics import (
    SIGNIFICANCE_LEVEL,
    OfRuns,
    Standing,
    Table,
    cluster_table,
    mean,
    over_seeds,
    standings,
    summary,
    table,
)
from eval.comparison.validation_loss import WEIGHTS, figure
from eval.curves.rows import Row, main_figure, steps_of
from eval.log_axis import plain_log_axis
from eval.training_runs import Run
from largescale.checkpoint.files import checkpoints
from largescale.config.validation import ema_note
from largescale.errors import DataError
from largescale.host.files import write_atomically
from largescale.host.machine import cores
from largescale.monitoring.run_record import KINDS, read_starts

# Of a scale that is linear between -5 and 5 % and logarithmic beyond.
PERCENT_TICKS = (-50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Findings:
    """All that a comparison found, of the seeds whose runs are all trained and scored."""

    out: Path
    command: str
    runs: Sequence[Run]  # of each seed all methods
    seeds: int  # that were asked for
    nproc: int
    held_out: bool  # whether the validation set is not the training set
    loss: Mapping[Path, Sequence[Row]]  # run -> rows, as of eval.curve
    loss_protocol: Row
    frechet: Mapping[Path, Sequence[Row]]  # empty: none were asked for
    frechet_protocol: Row
    grids: Mapping[str, Path]  # method -> picture

    def of_runs(self, rows: Mapping[Path, Sequence[Row]]) -> OfRuns:
        """Raises DataError where runs were scored at different steps, and so cannot be compared."""
        # All runs must have the steps of the first: curves of other steps have no differences.
        found: dict[str, dict[int, Sequence[Row]]] = {}
        for run in self.runs:
            found.setdefault(run.method, {})[run.seed] = rows[run.folder]
            steps = steps_of(rows[run.folder])
            first = steps_of(rows[self.runs[0].folder])
            if steps != first:
                raise DataError(
                    f"{run.folder} was scored at steps {steps}, {self.runs[0].folder} at {first}, "
                    "and the checkpoints of the others are gone; score as before, or choose "
                    "another --out"
                )
        return found


def write_report(f: Findings) -> None:
    """Write table.md, report.html, results.json and the pictures, and print the table. Raises
    DataError."""
    loss = f.of_runs(f.loss)
    n_clusters = len(f.loss_protocol["edges"]) - 1

    # The Frechet distance comes first where there is one; the summary is about it.
    name = figure("EMA")
    figures = {}
    if f.frechet:
        # Its name says which network it is of.
        name = main_figure(f.frechet[f.runs[0].folder])
        figures[name] = f.of_runs(f.frechet)
        plot_panels(figures[name], [name], f.out / "frechet.png")
    for weights in WEIGHTS:
        figures[figure(weights)] = loss

    # A panel for all noise levels, then one a cluster.
    names = [figure("EMA")]
    names += [figure("EMA", f" C{i}") for i in range(1, n_clusters + 1)]
    plot_panels(loss, names, f.out / "curves.png")
    plot_panels(loss, names, f.out / "relative.png", relative=True)
    if f.grids:
        plot_side_by_side(f.grids, f.out / "samples.png")

    # Every number is computed before table.md, report.html and results.json are written.
    found = {}
    tables = {}
    for key, runs in figures.items():
        found[key] = standings(runs, key)
        tables[f"{key}: lower is better"] = table(found[key])
    by_cluster = f"{figure('EMA')} at the last step, by noise cluster"
    tables[by_cluster] = cluster_table(loss, n_clusters, "EMA")
    tables["Stages"] = stages(f)
    conclusion = summary(found[name], name, f.runs[0].config.train.steps)
    title = f"{f.runs[0].config.name}: {', '.join(methods_of(f.runs))}"
    notes = [*about(f, name), *same_as_first(loss)]
    lines = markdown(title, notes, f.command, tables)
    numbers = results(f, found)
    shown = [(figures[name], name)] if f.frechet else []
    shown += [(loss, each) for each in names]
    made = page(title, [conclusion, *notes], f.command, tables, shown, f.grids)
    write_atomically(f.out / "table.md", "\n".join([*lines, "", conclusion, ""]))
    write_atomically(f.out / "report.html", made)
    write_atomically(f.out / "results.json", json.dumps(numbers, indent=1) + "\n")
    lines += ["", f"{f.out / 'report.html'}, table.md, results.json and pictures", conclusion]
    print("\n".join(lines), flush=True)


def markdown(
    title: str, notes: Sequence[str], command: str, tables: Mapping[str, Table]
) -> list[str]:
    """The lines of table.md, but for the last."""
    lines = [f"# {title}"]
    for note in notes:
        lines += ["", note]
    lines += ["", f"    {command}"]
    for heading, each in tables.items():
        lines += ["", f"## {heading}", "", *each.markdown]
    return lines


def about(f: Findings, name: str) -> list[str]:
    """What was trained, and how it was measured."""
    config = f.runs[0].config
    lines = [
        f"{seeds_text(f)}; {config.train.steps:,} steps of {config.train.global_batch_size} "
        f"images; scored every {config.checkpoint.every:,} steps, which is how exactly steps are "
        f"known. {spread_text(f)}",
        f"Validation loss: unweighted, of {f.loss_protocol['images']} images a cluster that were "
        + ("not trained on." if f.held_out else "trained on (no --validation was given)."),
    ]
    if f.frechet_protocol:
        lines.append(f"{name}: {frechet_text(f)}")
    if note := ema_note(config):
        lines.append(note)
    return lines


def methods_of(runs: Sequence[Run]) -> list[str]:
    """The methods of some runs, in their order."""
    return list(dict.fromkeys(run.method for run in runs))


def seeds_of(runs: Sequence[Run]) -> set[int]:
    """The seeds of some runs."""
    return {run.seed for run in runs}


def seeds_text(f: Findings) -> str:
    """How many seeds the numbers are of."""
    done = len(seeds_of(f.runs))
    text = f"{done} seed{'s' if done > 1 else ''}"
    return text if done == f.seeds else f"{text} of {f.seeds}, so far"


def spread_text(f: Findings) -> str:
    """How to read the numbers behind ±."""
    # Without a second seed there is neither a deviation nor a test.
    if len(seeds_of(f.runs)) == 1:
        return "One seed tells nothing of the spread: a difference may be chance."
    return (
        "± is the standard deviation over seeds; of differences, of runs of the same seed, the "
        "standard error of their mean. Better and worse are significant at the "
        f"{SIGNIFICANCE_LEVEL:.0%} level by the paired t-test, whose p is adjusted by Holm's "
        "correction where several methods are compared with the first (raw: without it)."
    )


def frechet_text(f: Findings) -> str:
    """How the samples of the Frechet distance were drawn, and at which steps."""
    p = f.frechet_protocol
    # All runs have the steps of the first.
    steps = [f"{step:,}" for step in steps_of(f.frechet[f.runs[0].folder])]
    return (
        f"{p['num_samples']:,} samples of the EMA by {p['sampler']} in {p['steps']} "
        f"steps, cfg_scale {p['cfg_scale']}, seed {p['seed']}, against {p['reference']}, by "
        f"{p['extractor']}, at steps {', '.join(steps)}."
    )


def same_as_first(loss: OfRuns) -> list[str]:
    """A note on methods that cannot have done anything."""
    # The numbers alone: rows also hold what differs between any two runs.
    numbers: dict[str, dict[int, list[Row]]] = {}
    for method, of_seed in loss.items():
        numbers[method] = {}
        for seed, rows in of_seed.items():
            numbers[method][seed] = list(map(itemgetter("figures"), rows))

    first, *others = numbers
    same = []
    for method in others:
        if numbers[method] == numbers[first]:
            same.append(method)
    if not same:
        return []
    return [
        f"The same as {first} to the last digit, and so without effect in these steps: "
        f"{', '.join(same)}. (loss_second_moment is uniform until each active timestep has been "
        "drawn 10 times.)",
    ]


def stages(f: Findings) -> Table:
    """The steps at which each method's curriculum was complete."""
    rows = []
    for method in methods_of(f.runs):
        # Curriculum index 0 trains on the complete noise axis.
        of_method = []
        ends = []
        for run in f.runs:
            if run.method != method:
                continue
            of_method.append(run)
            for step, index in transitions(run):
                if index == 0:
                    ends.append(step)

        # A run can end before the last stage.
        text = "none" if of_method[0].config.curriculum.pacing == "none" else "not in this run"
        if ends:
            text = str(mean(ends))
        if ends and len(ends) < len(of_method):
            text += f" ({len(ends)} of {len(of_method)} seeds)"
        rows.append((method, text))
    return Table(("method", "curriculum complete at step"), tuple(rows))


def transitions(run: Run) -> list[tuple[int, int]]:
    """The stages of a run: (step, curriculum index from then on)."""
    # The newest checkpoint has all transitions of the run.
    state = checkpoints(run.folder)[0].manifest()["state"]
    found: list[tuple[int, int]] = state["curriculum"]["transitions"]
    return found


def results(f: Findings, found: Mapping[str, Mapping[str, Standing]]) -> dict[str, Any]:
    """The content of results.json."""
    config = f.runs[0].config
    # Dataclasses are no JSON.
    plain: dict[str, dict[str, Any]] = {}
    for name, of_methods in found.items():
        plain[name] = {}
        for method, standing in of_methods.items():
            plain[name][method] = asdict(standing)
    return {
        "command": f.command,
        "preset": config.name,
        "steps": config.train.steps,
        "standings": plain,
        "protocol": {
            "loss": f.loss_protocol,
            "frechet": f.frechet_protocol,
            "held_out": f.held_out,
        },
        "runs": [run_results(f, run) for run in f.runs],
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "largescale": largescale.__version__,
        },
        "hardware": {
            "trained_on": config.train.device,
            "scored_on": f.frechet_protocol.get("device"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu": platform.processor() or platform.machine(),
            "cores": cores(),
        },
    }


def run_results(f: Findings, run: Run) -> dict[str, Any]:
    """The entry of one run in results.json."""
    starts = read_starts(run.folder)
    seconds = {}
    for kind in KINDS:
        # Over all starts: a run that was stopped has several.
        spent = sum(start.seconds.get(kind, 0.0) for start in starts)
        seconds[kind] = round(spent, 1)
    return {
        "method": run.method,
        "seed": run.seed,
        # By its name: the path of the interpreter is that of this machine.
        "command": shlex.join(["python", *run.command(f.nproc)[1:]]),
        "transitions": transitions(run),
        "loss": f.loss[run.folder],
        "frechet": f.frechet.get(run.folder, []),
        "seconds": seconds,
    }


def plot_panels(runs: OfRuns, names: Sequence[str], path: Path, relative: bool = False) -> None:
    """A panel for each figure: means over seeds, shaded by the standard deviation. `relative`: less
    the first method's of the same seed and step, in percent of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    first = next(iter(runs))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    plots, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(4.2 * columns + 1, 3.2 * rows),
    )
    # The last line of panels may have room to spare.
    for unused in axes.flat[len(names) :]:
        unused.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        for method in runs:
            plot_method(axis, runs, method, name, relative)
        axis.set_title(name, fontsize="small")
        axis.set(xlabel="step", ylabel=f"against {first}, %" if relative else "")
        # Early differences are hundreds of percent, late ones a few.
        if relative:
            axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            axis.set_yscale("symlog", linthresh=5)
            axis.yaxis.set_major_locator(FixedLocator(PERCENT_TICKS))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set_yscale("log")
            plain_log_axis(axis.yaxis)
    lines, methods = axes.flat[0].get_legend_handles_labels()
    plots.legend(lines, methods, loc="outside lower center", ncols=columns, fontsize="small")
    save(plots, path)


def plot_method(axis: Any, runs: OfRuns, method: str, name: str, relative: bool) -> None:
    """One method's curve of one figure, shaded by the standard deviation over seeds."""
    c = over_seeds(runs, method, name, relative)
    if not c:
        return
    line = axis.plot(c.step, c.mean, marker=".", label=method)
    axis.fill_between(c.step, c.low, c.high, color=line[0].get_color(), alpha=0.2, linewidth=0)


def plot_side_by_side(grids: Mapping[str, Path], path: Path) -> None:
    """One picture with the samples of each method; `grids`: method -> its picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Of one size for all methods, by the largest picture.
    pictures = {}
    for method, grid in grids.items():
        pictures[method] = np.asarray(Image.open(grid).convert("RGB"))
    height, width = np.max([picture.shape[:2] for picture in pictures.values()], axis=0)
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    plots, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(5 * columns, rows * (5 * height / width + 0.4)),
    )
    # The last line of panels may have room to spare.
    for unused in axes.flat[len(pictures) :]:
        unused.set_axis_off()
    for (method, picture), axis in zip(pictures.items(), axes.flat, strict=False):
        # Pixels as they are: interpolation would flatter the samples.
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(method)
        axis.set_axis_off()
    save(plots, path)


def save(plots: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    # Under another name until it is complete: whoever looks sees the picture before, or this one.
    temporary = path.with_name(f"{path.stem}.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)
