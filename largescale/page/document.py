"""The whole page: one run, or several side by side."""

import base64
import hashlib
from collections.abc import Iterator, Sequence

from largescale.monitoring.run_record import duration
from largescale.monitoring.run_words import date, progress
from largescale.page.charts import Line, short
from largescale.page.markup import section, table, text
from largescale.page.previews import MOST
from largescale.page.sections import RunView, figure_of, whole
from largescale.page.style import REFRESH, STYLE

# Lines that are compared between runs.
_COMPARED = (
    ("loss", "training loss"),
    ("validation/ema", "validation, EMA"),
    ("validation/raw", "validation, raw weights"),
    ("reference/loss", "loss on the reference set"),
    ("curriculum/index", "curriculum index"),
    ("optimizer/lr", "learning rate"),
    ("optimizer/grad_norm", "gradient norm"),
    ("images_per_s", "images per second"),
)
# ... of which a factor tells more than a difference.
_LOG = ("loss", "validation/ema", "validation/raw", "reference/loss", "optimizer/grad_norm")


def page(runs: Sequence[RunView], made_unix_s: float, refresh_s: float | None = None) -> str:
    """The page, which loads nothing from elsewhere. `refresh_s`: it is served, and asks for itself
    again after so many seconds."""
    names = ", ".join(run.name for run in runs) if len(runs) > 1 else _heading(runs[0])
    script = ""
    allowed = "default-src 'none';style-src 'unsafe-inline';img-src data:"
    if refresh_s:
        script = REFRESH.replace("EVERY", str(round(1e3 * refresh_s)))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f";script-src 'sha256-{digest}';connect-src 'self'"
        script = f"<script>{script}</script>"
        script += f'<noscript><meta http-equiv="refresh" content="{refresh_s:g}"></noscript>'
    lines = "".join(
        f".line.s{i}{{stroke:var(--s{i})}}.range.s{i},circle.s{i}{{fill:var(--s{i})}}"
        for i in range(8)
    ) + "".join(f".k{i}{{fill:var(--k{i})}}" for i in range(9))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(names)}</title><style>{STYLE.replace('LINES', lines)}</style></head><body>"
        f'<a class="skip" href="#runs">to the runs</a><header><h1>{text(names)}</h1>'
        f'<p class="trouble" id="lost" role="status"></p></header><main id="runs">'
        f'<p class="soft">made {date(made_unix_s)}</p>{"".join(_runs(runs))}</main>{script}'
        "</body></html>\n"
    )


def _runs(runs: Sequence[RunView]) -> Iterator[str]:
    if len(runs) > 1:
        links = "".join(f'<a href="#run{i}">{text(run.name)}</a>' for i, run in enumerate(runs))
        yield f'<nav aria-label="runs">{links}</nav>{_side_by_side(runs)}'
    for i, run in enumerate(runs):
        heading = f"<h2>{text(_heading(run))}</h2>" if len(runs) > 1 else ""
        # However many runs there are, the page stays small.
        content = whole(run, max(2, MOST // len(runs)))
        yield f'<article id="run{i}">{heading}{content}</article>'


def _heading(run: RunView) -> str:
    return f"{run.facts['name'] or 'of unknown settings'}, in {run.facts['run']}"


def _side_by_side(runs: Sequence[RunView]) -> str:
    """What several runs have in common, in one table and one picture each."""
    header = ("run", "state", "progress", "to go", "loss", "validation", "goodput")
    rows = []
    for run in runs:
        f = run.facts
        validation = run.series.curve("validation/ema")
        loss = run.series.curve("loss")
        rows.append(
            (
                run.name,
                f["standing"],
                progress(f),
                duration(f["to_go_s"]) if f["to_go_s"] else "-",
                short(loss.mean[-1]) if loss else "-",
                short(validation.mean[-1]) if validation else "-",
                f"{f['account']['goodput']:.1%}" if f["starts"] else "-",
            )
        )
    last_step = max(run.last_step for run in runs)
    pictures = []
    for key, title in _COMPARED:
        lines: list[Line] = []
        for run in runs:
            line = run.line(key, run.name)
            if line:
                lines.append(line)
        if lines:
            log = key in _LOG
            pictures.append(figure_of(title, lines, last_step, log=log))
    return (
        section("Side by side", table("runs", header, rows))
        + section("Compared", *pictures, grid=True)
        + section("Settings that differ", _differences(runs))
    )


def _differences(runs: Sequence[RunView]) -> str:
    """The settings in which the runs differ, but for where they are."""
    keys = sorted(set().union(*(run.facts["settings"] for run in runs)) - {"name", "output"})
    rows = []
    for key in keys:
        values = [str(run.facts["settings"].get(key, "-")) for run in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return table("settings that differ", ("setting", *(run.name for run in runs)), rows)
