"""What a difficulty study found: numbers, pictures, and one page with all of it."""

import json
import time
from pathlib import Path

from eval.difficulty_study.charts import denoising, entropy, losses
from eval.difficulty_study.findings import Findings
from eval.difficulty_study.pictures import draw
from eval.difficulty_study.study import Row
from largescale.host.files import write_atomically
from largescale.page.frame import frame
from largescale.page.markup import paragraphs, section, table, text

# The head of the table, in the order of `cells`.
COLUMNS = (
    "interval",
    "u",
    "final loss",
    "rises",
    "rises, smoothed",
    "oscillates",
    "falls until",
    "distance",
    "evaluations inside",
    "D_KL a timestep",
    "kernels",
    "one kernel",
)


def write_report(found: Findings, out: Path, settings: Row) -> str:
    """Write report.html, report.json and the pictures; returns one line that sums them up."""
    out.mkdir(parents=True, exist_ok=True)
    full = None
    if 0 in found.scored:
        full = {key: found.scored[0][key] for key in ("figure", "value", "error")}
    numbers = {
        "study": found.study,
        "settings": settings,
        "edges": list(found.edges),
        "intervals": found.rows,
        "full": full,
        "rank correlations with the interval": found.correlations,
        "missing": found.missing,
    }
    write_atomically(out / "report.json", json.dumps(numbers, indent=1) + "\n")

    # The page has its own pictures; these are for papers and slides.
    for name, picture in draw(found).items():
        write_atomically(out / name, picture)
    write_atomically(out / "report.html", page(found, settings))
    return f"{found.study}: {summary(found)}: {out / 'report.html'}"


def summary(found: Findings) -> str:
    """One line on the easiest and the hardest interval, as far as they are measured."""
    parts = []
    last = len(found.edges) - 1
    # The two ends of the noise axis show whether difficulty falls with the noise.
    if {1, last} <= found.convergence.keys():
        a = found.convergence[1]
        b = found.convergence[last]
        parts.append(
            f"the loss has done 90 % of its fall by step {a.falls_until:,} in C_1, "
            f"{b.falls_until:,} in C_{last}, and oscillates {step_text(a.oscillates_from)} in C_1, "
            f"{step_text(b.oscillates_from)} in C_{last}"
        )
    if {0, 1, last} <= found.scored.keys():
        of = found.scored
        parts.append(
            f"{of[0]['figure']} {number(of[0]['value'])} of the full model, "
            f"{number(of[1]['value'])} with M_1, {number(of[last]['value'])} with M_{last}"
        )
    if found.entropy:
        # One kernel's relative entropy says nothing about the data.
        degenerate = found.entropy["degenerate"]
        parts.append(
            f"the relative entropy is one kernel's at {sum(degenerate):,} of "
            f"{len(degenerate):,} timesteps"
        )
    # One number for what the table shows.
    if found.correlations:
        each = [f"{name} {value:+.2f}" for name, value in found.correlations.items()]
        parts.append(f"rank correlation with the interval: {', '.join(each)}")
    return "; ".join(parts or ["not all of it is there yet"])


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def step_text(step: int | None) -> str:
    return "nowhere" if step is None else f"from {step:,}"


def cells(row: Row) -> list[str]:
    """One interval's row of the table, in the order of COLUMNS; empty where nothing is measured."""
    low, high = row["u"]
    found = [f"C_{row['interval']}", f"{low:.4g} to {high:.4g}"]

    # How fast the loss converged.
    if (c := row["convergence"]) is None:
        found += [""] * 5
    else:
        found += [
            f"{c['final']:.4g}",
            f"{c['rises']:,}",
            f"{c['smoothed_rises']:,}",
            step_text(c["oscillates_from"]),
            f"{c['falls_until']:,}",
        ]

    # How well its model denoises.
    if (d := row["denoising"]) is None:
        found += [""] * 2
    else:
        found += [
            f"{number(d['value'])} ± {d['error']:.2g}",
            f"{d['evaluations_inside']} of {d['evaluations']}",
        ]

    # How far apart neighbouring noise levels are.
    if (e := row["relative_entropy"]) is None:
        found += [""] * 3
    else:
        found += [
            f"{e['value']:.3g}",
            f"{e['kernels'][0]:.3g} to {e['kernels'][1]:.3g}",
            f"{e['degenerate']:.0%}",
        ]
    return found


def page(found: Findings, settings: Row) -> str:
    """The report as one HTML file."""
    missing = []
    for stage, intervals in found.missing.items():
        missing.append((stage, ", ".join(map(str, intervals)) or "all"))
    # The same note of several intervals is shown once.
    notes = set()
    for row in found.scored.values():
        notes.update(row["notes"])
    content = (
        paragraphs(f"{summary(found)}.", *(f"Note: {note}." for note in sorted(notes)))
        + table("missing", ("stage", "intervals"), missing)
        + section("Loss of each M_i, trained on its interval only", *losses(found), grid=True)
        + section("Denoising and relative entropy", *denoising(found), *entropy(found), grid=True)
        + section(
            "Intervals",
            table("intervals", COLUMNS, map(cells, found.rows)),
            paragraphs(legend(found)),
        )
        + section("Settings", f'<pre tabindex="0">{text(json.dumps(settings, indent=1))}</pre>')
    )
    return frame(f"Denoising difficulty: {found.study}", content, time.time())


def legend(found: Findings) -> str:
    """What the columns of the table mean."""
    return (
        f"C_1 has the least noise. Final loss: smoothed, the mean of the last {window(found)} "
        "steps. Rises: steps after step 100 whose loss is above that of the step before; smoothed: "
        "the same of the smoothed loss. Oscillates: from the first step whose smoothed loss is not "
        f"undercut within {found.patience} steps. Falls until: the first step, after its largest "
        "value, at which it has fallen by 90 % of its range. D_KL: nats, the mean over the "
        "timesteps of the interval. One kernel: the share of them whose estimate is that of a "
        "single image's kernel. Section 4 and appendix C of arXiv:2403.10348."
    )


def window(found: Findings) -> str:
    """How many steps the smoothed losses are means of; runs of several lengths have several."""
    windows = {curve.window for curve in found.curves.values()}
    return ", ".join(map(str, sorted(windows))) or "some"
