"""What a comparison writes: table.md, results.json and pictures."""

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import largescale
from eval.comparison.statistics import (
    SIGNIFICANCE_LEVEL,
    OfRuns,
    Standing,
    cluster_table,
    mean,
    points,
    standings,
    summary,
    table,
)
from eval.comparison.validation_loss import WEIGHTS, figure
from eval.curve import Row, main_figure
from eval.training_runs import Run
from largescale.checkpoint.files import checkpoints
from largescale.config.validation import ema_note
from largescale.errors import DataError
from largescale.host.files import write_atomically
from largescale.host.machine import cores
from largescale.monitoring.run_record import KINDS, read_starts


@dataclass(frozen=True)
class Findings:
    """All that a comparison found, of whole seeds."""

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
        found: dict[str, dict[int, Sequence[Row]]] = {}
        for run in self.runs:
            found.setdefault(run.method, {})[run.seed] = rows[run.folder]
            steps, first = ([row["step"] for row in rows[r.folder]] for r in (run, self.runs[0]))
            if steps != first:
                raise DataError(
                    f"{run.folder} was scored at steps {steps}, {self.runs[0].folder} at {first}, "
                    "and the checkpoints of the others are gone; score as before, or choose "
                    "another --out"
                )
        return found


def write_report(f: Findings) -> None:
    """And prints it. Of runs that are all trained and scored. Raises DataError."""
    loss, n_clusters = f.of_runs(f.loss), len(f.loss_protocol["edges"]) - 1
    figures = {figure(weights): loss for weights in WEIGHTS}
    name = figure("EMA")
    if f.frechet:
        frechet = f.of_runs(f.frechet)
        name = main_figure(f.frechet[f.runs[0].folder])
        figures = {name: frechet, **figures}
        multiples(frechet, [name], f.out / "frechet.png")
    names = [figure("EMA"), *(figure("EMA", f" C{i}") for i in range(1, n_clusters + 1))]
    multiples(loss, names, f.out / "curves.png")
    multiples(loss, names, f.out / "relative.png", relative=True)
    if f.grids:
        side_by_side(
            {
                method: np.asarray(Image.open(path).convert("RGB"))
                for method, path in f.grids.items()
            },
            f.out / "samples.png",
        )
    found = {key: standings(runs, key) for key, runs in figures.items()}
    lines = [*heading(f, name), *same_as_first(loss)]
    for key, standing in found.items():
        lines += ["", f"## {key}: lower is better", "", *table(standing)]
    lines += [
        "",
        f"## {figure('EMA')} at the last step, by noise cluster",
        "",
        *cluster_table(loss, n_clusters, "EMA"),
        "",
        "## Stages",
        "",
        *stages(f),
    ]
    said = summary(found[name], name, f.runs[0].config.train.steps)
    write_atomically(f.out / "table.md", "\n".join([*lines, "", said, ""]))
    write_atomically(f.out / "results.json", json.dumps(results(f, found), indent=1) + "\n")
    print(
        "\n".join([*lines, "", f"{f.out / 'table.md'}, results.json and pictures", said]),
        flush=True,
    )


def heading(f: Findings, name: str) -> list[str]:
    """What the numbers are of."""
    config, p, done = f.runs[0].config, f.frechet_protocol, len({run.seed for run in f.runs})
    seeds = f"{done} seed{'s' if done > 1 else ''}" + (
        "" if done == f.seeds else f" of {f.seeds}, so far"
    )
    spread = "One seed tells nothing of the spread: a difference may be chance."
    if done > 1:
        spread = (
            "± is the standard deviation over seeds; of differences, of runs of the same seed, the "
            "standard error of their mean. Better and worse are significant at the "
            f"{SIGNIFICANCE_LEVEL:.0%} level by the paired t-test, whose p is adjusted by Holm's "
            "correction where several methods are compared with the first (raw: without it)."
        )
    lines = [
        f"# {config.name}: {', '.join(dict.fromkeys(run.method for run in f.runs))}",
        "",
        f"{seeds}; {config.train.steps:,} steps of {config.train.global_batch_size} images; scored "
        f"every {config.checkpoint.every:,} steps, which is how finely steps are told. {spread}",
        "",
        f"Validation loss: unweighted, of {f.loss_protocol['images']} images a cluster that were "
        + ("not trained on." if f.held_out else "trained on (no --validation was given)."),
    ]
    if p:
        lines += [
            "",
            f"{name}: {p['num_samples']:,} samples of the EMA by {p['sampler']} in {p['steps']} "
            f"steps, cfg_scale {p['cfg_scale']}, seed {p['seed']}, against {p['reference']}, by "
            f"{p['extractor']}, at steps "
            + ", ".join(f"{row['step']:,}" for row in f.frechet[f.runs[0].folder])
            + ".",
        ]
    if note := ema_note(config):
        lines += ["", note]
    return [*lines, "", f"    {f.command}"]


def same_as_first(loss: OfRuns) -> list[str]:
    """Markdown, of methods that cannot have done anything."""
    (first, of_first), *others = (
        (method, {seed: [row["figures"] for row in rows] for seed, rows in of_seed.items()})
        for method, of_seed in loss.items()
    )
    same = [method for method, of_method in others if of_method == of_first]
    return (
        [
            "",
            f"The same as {first} to the last digit, and so without effect in these steps: "
            f"{', '.join(same)}. (loss_second_moment is uniform until each active timestep has been "
            "drawn 10 times.)",
        ]
        if same
        else []
    )


def stages(f: Findings) -> list[str]:
    """Markdown: when each method's curriculum was complete."""
    lines = ["| method | curriculum complete at step |", "|---|---|"]
    for method in dict.fromkeys(run.method for run in f.runs):
        ends, of_method = list[int](), [run for run in f.runs if run.method == method]
        for run in of_method:
            ends += [step for step, index in transitions(run) if index == 0]
        said = "none" if of_method[0].config.curriculum.pacing == "none" else "not in this run"
        if ends:
            said = str(mean(ends)) + (
                f" ({len(ends)} of {len(of_method)} seeds)" if len(ends) < len(of_method) else ""
            )
        lines.append(f"| {method} | {said} |")
    return lines


def transitions(run: Run) -> list[tuple[int, int]]:
    """(step, curriculum index from then on)."""
    found: list[tuple[int, int]] = checkpoints(run.folder)[0].manifest()["state"]["curriculum"][
        "transitions"
    ]
    return found


def results(f: Findings, found: Mapping[str, Mapping[str, Standing]]) -> dict[str, Any]:
    config = f.runs[0].config
    return {
        "command": f.command,
        "preset": config.name,
        "steps": config.train.steps,
        "standings": {
            name: {method: asdict(s) for method, s in of.items()} for name, of in found.items()
        },
        "protocol": {
            "loss": f.loss_protocol,
            "frechet": f.frechet_protocol,
            "held_out": f.held_out,
        },
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "command": shlex.join(["python", *run.command(f.nproc)[1:]]),
                "transitions": transitions(run),
                "loss": f.loss[run.folder],
                "frechet": f.frechet.get(run.folder, []),
                "seconds": {
                    key: round(
                        sum(start.seconds.get(key, 0.0) for start in read_starts(run.folder)), 1
                    )
                    for key in KINDS
                },
            }
            for run in f.runs
        ],
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


def multiples(runs: OfRuns, names: Sequence[str], path: Path, relative: bool = False) -> None:
    """A panel for each figure: means over seeds, shaded by the standard deviation. `relative`: less
    the first method's of the same seed and step, in percent of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, columns = next(iter(runs)), min(4, len(names))
    plots, axes = plt.subplots(
        -(-len(names) // columns),
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(4.2 * columns + 1, 3.2 * -(-len(names) // columns)),
    )
    for unused in axes.flat[len(names) :]:
        unused.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        for method, of_seed in runs.items():
            each: dict[int, list[float]] = {}
            for seed, rows in of_seed.items():
                base = dict(points(runs[first][seed], name))
                for step, value in points(rows, name):
                    if not relative or step in base:
                        each.setdefault(step, []).append(
                            100 * (value / base[step] - 1) if relative else value
                        )
            curve = [(step, mean(values)) for step, values in sorted(each.items())]
            steps, middle = [step for step, _ in curve], [m.value for _, m in curve]
            line = axis.plot(steps, middle, marker=".", label=method)
            low, high = ([m.value + sign * (m.spread or 0.0) for _, m in curve] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=line[0].get_color(), alpha=0.2, linewidth=0)
        axis.set_title(name, fontsize="small")
        axis.set(xlabel="step", ylabel=f"against {first}, %" if relative else "")
        if relative:  # early differences are hundreds, late ones few percent
            axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            axis.set_yscale("symlog", linthresh=5)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set(xscale="log", yscale="log")
    axes.flat[0].legend(fontsize="x-small")
    save(plots, path)


def side_by_side(pictures: Mapping[str, Any], path: Path) -> None:
    """`pictures`: method -> (H, W, 3) uint8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height, width = np.max([picture.shape[:2] for picture in pictures.values()], axis=0)
    plots, axes = plt.subplots(
        1,
        len(pictures),
        squeeze=False,
        layout="constrained",
        figsize=(5 * len(pictures), 5 * height / width + 0.4),
    )
    for (method, picture), axis in zip(pictures.items(), axes.flat, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(method)
        axis.set_axis_off()
    save(plots, path)


def save(plots: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    temporary = path.with_name(f"{path.stem}.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)
