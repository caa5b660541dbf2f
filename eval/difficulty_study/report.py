"""What a difficulty study found: a table, three pictures, and one page with all of it."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from eval.difficulty_study.findings import Findings
from eval.difficulty_study.pictures import draw
from eval.difficulty_study.study import Row
from largescale.host.files import write_atomically

PICTURES = {
    "losses.png": "Loss of each M_i, trained on its interval only (figure A of the paper). Left: "
    "smoothed, and scaled to its own range. Middle: where it begins to oscillate "
    "(hatched: not before the end), and where 90 % of its fall are done. Right: how "
    "often the smoothed loss rises after step 100.",
    "denoising.png": "Samples drawn with M_i inside its interval and with the full model "
    "elsewhere; lower is better. The line is the full model everywhere. Hollow: "
    "the sampler asks for no noise level of the interval.",
    "relative_entropy.png": "Relative entropy of neighbouring noise levels (figure B of the "
    "paper), and how many images' kernels explain a noised image. Where "
    "that is one, the estimate is the one kernel's: an artefact of "
    "finitely many images, whatever they show, and only an upper bound. "
    "Where it is few, more images would give another value.",
}
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
    """report.html, report.json and the pictures; the one line that sums them up."""
    out.mkdir(parents=True, exist_ok=True)
    full = found.scored.get(0)
    table = {
        "study": found.study,
        "settings": settings,
        "edges": list(found.edges),
        "intervals": found.rows,
        "full": full and {key: full[key] for key in ("figure", "value", "error")},
        "rank correlations with the interval": found.correlations,
        "missing": found.missing,
    }
    write_atomically(out / "report.json", json.dumps(table, indent=1) + "\n")
    pictures = draw(found)
    for name, picture in pictures.items():
        write_atomically(out / name, picture)
    write_atomically(out / "report.html", page(found, pictures, settings))
    return f"{found.study}: {summary(found)}: {out / 'report.html'}"


def summary(found: Findings) -> str:
    said, last = [], len(found.edges) - 1
    if {1, last} <= found.convergence.keys():
        a, b = (found.convergence[i] for i in (1, last))
        said.append(
            f"the loss has done 90 % of its fall by step {a.falls_until:,} in C_1, "
            f"{b.falls_until:,} in C_{last}, and oscillates {step_text(a.oscillates_from)} in C_1, "
            f"{step_text(b.oscillates_from)} in C_{last}"
        )
    if {0, 1, last} <= found.scored.keys():
        of = found.scored
        said.append(
            f"{of[0]['figure']} {number(of[0]['value'])} of the full model, "
            f"{number(of[1]['value'])} with M_1, {number(of[last]['value'])} with M_{last}"
        )
    if found.entropy:
        shares = found.entropy["degenerate"]
        said.append(
            f"the relative entropy is one kernel's at {sum(shares):,} of {len(shares):,} timesteps"
        )
    if found.correlations:
        said.append(
            "rank correlation with the interval: "
            + ", ".join(f"{name} {value:+.2f}" for name, value in found.correlations.items())
        )
    return "; ".join(said or ["not all of it is there yet"])


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def step_text(step: int | None) -> str:
    return "nowhere" if step is None else f"from {step:,}"


def cells(row: Row) -> list[str]:
    c, d, e = row["convergence"], row["denoising"], row["relative_entropy"]
    low, high = row["u"]
    return [
        f"C_{row['interval']}",
        f"{low:.4g} to {high:.4g}",
        *(
            [""] * 5
            if c is None
            else [
                f"{c['final']:.4g}",
                f"{c['rises']:,}",
                f"{c['smoothed_rises']:,}",
                step_text(c["oscillates_from"]),
                f"{c['falls_until']:,}",
            ]
        ),
        *(
            [""] * 2
            if d is None
            else [
                f"{number(d['value'])} ± {d['error']:.2g}",
                f"{d['evaluations_inside']} of {d['evaluations']}",
            ]
        ),
        *(
            [""] * 3
            if e is None
            else [
                f"{e['value']:.3g}",
                f"{e['kernels'][0]:.3g} to {e['kernels'][1]:.3g}",
                f"{e['degenerate']:.0%}",
            ]
        ),
    ]


def page(found: Findings, pictures: dict[str, bytes], settings: Row) -> str:
    """HTML in one file."""

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    images = "".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<figcaption>{html.escape(PICTURES[name])}</figcaption></figure>"
        for name, picture in pictures.items()
    )
    lost = "".join(
        f"<li>{stage}: {', '.join(map(str, intervals)) or 'all'}</li>"
        for stage, intervals in found.missing.items()
    )
    notes = sorted({note for row in found.scored.values() for note in row["notes"]})
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Denoising difficulty: {html.escape(found.study)}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;font-size:13px}}td,th{{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}}
img{{max-width:100%}}figure{{margin:2em 0}}figcaption{{color:#444}}pre{{font-size:12px;white-space:pre-wrap}}</style>
</head><body><h1>Denoising difficulty: {html.escape(found.study)}</h1>
<p>{html.escape(summary(found))}.</p>
{f"<p>Missing (intervals, by stage):</p><ul>{lost}</ul>" if lost else ""}
{images}
<table>{line("th", COLUMNS)}{"".join(line("td", cells(row)) for row in found.rows)}</table>
<p>C_1 has the least noise. Final loss: smoothed, the mean of the last {window(found)} steps. Rises: steps after step
100 whose loss is above that of the step before; smoothed: the same of the smoothed loss. Oscillates: from the first
step whose smoothed loss is not undercut within {found.patience} steps. Falls until: the first step, after its largest
value, at which it has fallen by 90 % of its range. D_KL: nats, the mean over the timesteps of the interval. One kernel:
the share of them whose estimate is that of a single image's kernel. Section 4 and appendix C of arXiv:2403.10348.</p>
{"".join(f"<p>Note: {html.escape(note)}.</p>" for note in notes)}
<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>
</body></html>
"""


def window(found: Findings) -> str:
    return ", ".join(map(str, sorted({curve.window for curve in found.curves.values()}))) or "some"
