"""A scan of the widths of power-function averages: each is scored at the newest snapshot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.curves.options import Curve
from eval.curves.pages import widths_page
from eval.curves.rows import (
    HELD_OUT_LOSS,
    Row,
    best_row,
    curve_of,
    figure_text,
    figures_of_widths,
)
from eval.curves.scores import Curves
from eval.held_out_loss import HeldOutLoss, held_out_set, training_set
from eval.log_axis import plain_log_axis
from eval.score import Scorer
from largescale.checkpoint.ema_snapshots import newest_step, snapshots
from largescale.checkpoint.weights import Trained, load_trained
from largescale.config.derived import cluster_edges
from largescale.data.fixed_noise_set import over_all
from largescale.data.format import read_manifest
from largescale.data.shards import ShardDataset
from largescale.distributed.ranks import local_device
from largescale.host.files import write_atomically
from largescale.host.launch import env_rank
from largescale.power_ema import Profile, reconstruct, residual_note


class ScoresOfWidth(Curves):
    """The scores of the average of one width, at the newest snapshot of each run."""

    def __init__(
        self,
        options: Curve,
        width: float,
        steps: Mapping[Path, int],
        losses: Mapping[Path, HeldOutLoss],
        scorer: Scorer | None = None,
    ) -> None:
        """`steps`: of each run, that of its newest snapshot. `losses`: of each run, where its held-out
        loss is measured too."""
        super().__init__(options, scorer)
        self.width = width
        self._steps = steps
        self._losses = losses
        # Other images, or more of them, under the same name are another protocol.
        self._validation = None
        if options.validation:
            self._validation = read_manifest(options.validation)["fingerprint"]

    def exists(self, run: Path, step: int) -> bool:
        # Of an average that cannot be made any more, its own error says why.
        return True

    def protocol(self) -> Row:
        protocol = super().protocol() | {"ema_width": self.width}
        if self._validation:
            protocol["validation"] = self._validation
        return protocol

    def prepare(self, run: Path, step: int) -> None:
        if self.options.num_samples:
            super().prepare(run, step)

    def score_samples(self, run: Path, step: int) -> tuple[Trained, Row]:
        if self.options.num_samples:
            return super().score_samples(run, step)
        none: Row = {"figures": {}, "notes": [], "extractor": None, "n": 0, "reference": None}
        return load_trained(run, step, ema_width=self.width), none

    def more_figures(self, run: Path, trained: Trained) -> Row:
        if run not in self._losses:
            return {}
        loss = self._losses[run]
        # In fp32, whatever the samples were drawn in.
        clusters = loss(trained.model.to(loss.device), trained.objective)
        # All widths have the same images and noise, so there is no error between them.
        return {HELD_OUT_LOSS: {"value": over_all(clusters, loss.edges), "error": 0.0}}

    def missing(self, run: Path) -> list[int]:
        return [] if self.newest(run) else [self._steps[run]]

    def newest(self, run: Path) -> list[Row]:
        """The row of the newest snapshot, if it has been scored."""
        return [row for row in self.rows(run) if row["step"] == self._steps[run]]


def scan_widths(options: Curve) -> None:
    """Score the averages of all widths of all runs, and write widths.json, widths.png and
    widths.html."""
    # Once for all widths: a run that is trained meanwhile has newer ones at each look.
    steps = {run: newest_step(run) for run in options.runs}
    notes = residual_notes(options, steps)
    losses = held_out_losses(options)
    scorer = None
    found: dict[Path, list[Row]] = {run: [] for run in options.runs}
    for width in options.widths():
        scores = ScoresOfWidth(options, width, steps, losses, scorer)
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
    best = [f"note: {note}" for note in notes]
    for run, rows in found.items():
        best += best_texts(run, rows)
    write_atomically(out / "widths.html", widths_page(found, best))
    for line in best:
        print(line, flush=True)
    print(f"{len(options.widths())} widths of {len(found)} runs: {out / 'widths.png'}", flush=True)


def residual_notes(options: Curve, steps: Mapping[Path, int]) -> list[str]:
    """Notes on widths of which the snapshots give no good average, each with a run that it is of."""
    found: dict[str, Path] = {}
    for width in options.widths():
        for run, step in steps.items():
            kept = [each for each in snapshots(run) if each.step <= step]
            note = residual_note(width, reconstruct(kept, Profile(step, width)).residual)
            # Runs that are compared mostly have the same snapshots.
            if note:
                found.setdefault(note, run)
    return [f"{run}: {note}" for note, run in found.items()]


def held_out_losses(options: Curve) -> dict[Path, HeldOutLoss]:
    """The held-out loss of each run: as many images a cluster as it was trained with. On rank 0, which
    alone scores. Raises DataError for a set that is not like the training set, or shares rows with
    it."""
    found: dict[Path, HeldOutLoss] = {}
    if not options.validation or env_rank() != 0:
        return found
    # Runs are mostly of the same data, whose ids need to be compared only once.
    opened: dict[tuple[str, str], ShardDataset] = {}
    for run in options.runs:
        config, training = training_set(run)
        key = (config.data.path, config.data.normalize)
        if key not in opened:
            opened[key] = held_out_set(options.validation, config, training)
        found[run] = HeldOutLoss(
            opened[key],
            config,
            cluster_edges(config),
            config.telemetry.validation_images,
            options.batch_size or 32,
            local_device(options.device),
        )
    return found


def best_texts(run: Path, rows: list[Row]) -> list[str]:
    """The best width of one run, by each figure."""
    found = []
    for name in figures_of_widths(rows):
        best = best_row(rows, name)
        found.append(
            f"{run}: best {name} {figure_text(best['figures'][name])} at width "
            f"{best['ema_width']:g} of step {best['step']:,}"
        )
    return found


def plot_widths(of_runs: dict[Path, list[Row]], path: Path) -> None:
    """Each shown figure of each run against the width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # The runs' distances may be of two extractors; their losses have one axis.
    panels = max(len(figures_of_widths(rows)) for rows in of_runs.values())
    plots, axes = plt.subplots(
        1, panels, figsize=(5 * panels + 1, 4), layout="constrained", squeeze=False
    )
    for run, rows in of_runs.items():
        for axis, name in zip(axes[0], figures_of_widths(rows), strict=False):
            draw_widths(axis, f"{run}, step {rows[-1]['step']:,}", rows, name)
    for axis in axes[0]:
        axis.set_xscale("log")
        plain_log_axis(axis.xaxis)
        axis.legend(fontsize="small")
    temporary = path.with_name("widths.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)


def draw_widths(axis: Any, label: str, rows: list[Row], name: str) -> None:
    """One figure of one run against the width."""
    c = curve_of(rows, name, "ema_width")
    if c:
        error = c.high - c.mean
        axis.errorbar(c.step, c.mean, error, marker="o", markersize=3, capsize=2, label=label)
    axis.set(xlabel="width of the average (share of the training)", ylabel=name)
