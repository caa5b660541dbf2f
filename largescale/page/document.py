"""The whole page: one run, or several side by side."""

from collections.abc import Iterator, Sequence

from largescale.monitoring.run_record import duration
from largescale.monitoring.run_words import progress
from largescale.page.charts import Line, short
from largescale.page.figures import figure_of
from largescale.page.frame import frame
from largescale.page.markup import section, table, text
from largescale.page.previews import MOST
from largescale.page.sections import RunView, whole

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
    return frame(names, "".join(_runs(runs)), made_unix_s, refresh_s)


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
