"""A scan of the widths of power-function averages: each is scored at the newest snapshot."""

import json
from pathlib import Path

from eval.curves.options import Curve
from eval.curves.pages import widths_page
from eval.curves.rows import Row, best_row, curve_of, figure_text, main_figure
from eval.curves.scores import Curves
from eval.score import Scorer
from largescale.checkpoint.ema_snapshots import snapshots
from largescale.errors import CheckpointError
from largescale.host.files import write_atomically
from largescale.host.launch import env_rank


class ScoresOfWidth(Curves):
    """The scores of the average of one width, at the newest snapshot of each run."""

    def __init__(self, options: Curve, width: float, scorer: Scorer | None = None) -> None:
        super().__init__(options, scorer)
        self.width = width

    def exists(self, run: Path, step: int) -> bool:
        # Of an average that cannot be made any more, its own error says why.
        return True

    def protocol(self) -> Row:
        return super().protocol() | {"ema_width": self.width}

    def missing(self, run: Path) -> list[int]:
        return [] if self.newest(run) else [newest_snapshot(run)]

    def newest(self, run: Path) -> list[Row]:
        """The row of the newest snapshot, if it has been scored."""
        newest = newest_snapshot(run)
        return [row for row in self.rows(run) if row["step"] == newest]


def scan_widths(options: Curve) -> None:
    """Score the averages of all widths of all runs, and write widths.json, widths.png and
    widths.html."""
    scorer = None
    found: dict[Path, list[Row]] = {run: [] for run in options.runs}
    for width in options.widths():
        scores = ScoresOfWidth(options, width, scorer)
        scores.score()
        # The reference's features are computed once.
        scorer = scores.shared_scorer
        for run in options.runs:
            for row in scores.newest(run):
                found[run].append({**row, "ema_width": width})
    if env_rank() != 0:
        return
    out = options.out or options.runs[0] / "curve"
    out.mkdir(parents=True, exist_ok=True)
    plain = {str(run): rows for run, rows in found.items()}
    write_atomically(out / "widths.json", json.dumps(plain, indent=1) + "\n")
    plot_widths(found, out / "widths.png")
    best = [best_text(run, rows) for run, rows in found.items()]
    write_atomically(out / "widths.html", widths_page(found, best))
    for line in best:
        print(line, flush=True)
    print(f"{len(options.widths())} widths of {len(found)} runs: {out / 'widths.png'}", flush=True)


def best_text(run: Path, rows: list[Row]) -> str:
    """The best width of one run."""
    name = main_figure(rows)
    best = best_row(rows)
    figure = best["figures"][name]
    return (
        f"{run}: best {name} {figure_text(figure)} at width {best['ema_width']:g} of step "
        f"{best['step']:,}"
    )


def newest_snapshot(run: Path) -> int:
    """The step of a run's newest snapshot of averages. Raises CheckpointError where there is
    none."""
    kept = snapshots(run)
    if not kept:
        raise CheckpointError(
            f"{run} has no snapshots of averages; train with --optimizer.ema-widths 0.05 0.1"
        )
    return kept[-1].step


def plot_widths(of_runs: dict[Path, list[Row]], path: Path) -> None:
    """The main figure of each run against the width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run, rows in of_runs.items():
        name = main_figure(rows)
        c = curve_of(rows, name, "ema_width")
        label = f"{run}, step {rows[-1]['step']:,}"
        if c:
            error = c.high - c.mean
            axis.errorbar(c.step, c.mean, error, marker="o", markersize=3, capsize=2, label=label)
        axis.set(xlabel="width of the average (share of the training)", ylabel=name)
    axis.set_xscale("log")
    axis.legend(fontsize="small")
    temporary = path.with_name("widths.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)
