"""python docs/draw_curriculum.py RUN [OUT]: a run's curriculum as a picture, from its metrics.jsonl.

Above, which noise levels were trained at each step; below, the loss that the pacing watched and the
patience count. The run must log every step. docs/curriculum.png shows the run of

    python -m largescale.train digits --telemetry.log-every 1 --curriculum.n-clusters 20 --curriculum.patience 12 \\
        --train.steps 1000
"""

import sys
from pathlib import Path

import matplotlib

from largescale.monitoring.telemetry import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(run: Path, out: Path) -> None:
    rows = [row for row in read_metrics(run) if "loss" in row]
    step = [row["step"] for row in rows]
    lowest = [row["curriculum/lowest"] for row in rows]
    patience = [row["curriculum/patience"] for row in rows]
    ends = [row["step"] for row in read_metrics(run) if row.get("event") == "transition"]

    plots, (levels, losses) = plt.subplots(
        2, 1, figsize=(9, 4.6), sharex=True, layout="constrained", height_ratios=[1.1, 1]
    )
    levels.fill_between(step, lowest, 1, step="pre", color="#4477aa", alpha=0.85, linewidth=0)
    levels.fill_between(step, 0, lowest, step="pre", color="#dddddd", linewidth=0)
    levels.set(ylim=(0, 1), ylabel="noise level u", yticks=[0, 0.5, 1])
    levels.set_yticklabels(["0: clean", "0.5", "1: noise"])
    levels.text(
        0.98, 0.5, "trained", transform=levels.transAxes, ha="right", color="white", size=12
    )
    levels.text(
        0.02, 0.12, "not yet: the hard, almost clean levels", transform=levels.transAxes, size=10
    )

    losses.plot(step, [row["loss"] for row in rows], color="#4477aa", linewidth=0.8)
    losses.set(ylabel="loss", xlabel="step", yscale="log", xlim=(0, step[-1]))
    counts = losses.twinx()
    counts.plot(step, patience, color="#ee6677", linewidth=0.7)
    counts.set_ylabel("patience count", color="#ee6677")
    for end in ends:
        losses.axvline(end, color="#999999", linewidth=0.5, linestyle=":")
    plots.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/curriculum.png"))
