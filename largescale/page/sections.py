"""The sections of the page on one run."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from largescale.curriculum import stage
from largescale.monitoring.run_facts import Facts
from largescale.monitoring.run_record import KINDS, Account, duration
from largescale.monitoring.run_words import (
    checkpoint_row,
    checkpoints_summary,
    curriculum_lines,
    date,
    event_row,
    network,
    progress,
    skip_row,
    start_row,
)
from largescale.page.charts import (
    Line,
    Stage,
    curriculum_chart,
    heat_map,
    short,
    stacked_bar,
)
from largescale.page.figures import figure_of, numbers_of
from largescale.page.markup import Markup, figure, folded, section, table, text
from largescale.page.previews import strip
from largescale.page.series import Series

# Rows of a table; of more the last ones are shown.
_MOST = 200
# Starts that are not folded.
_RECENT = 12
# What happens in the normal course of a run.
_NO_MARK = ("transition",)


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    # Its folder, as short as tells it from the other runs.
    name: str
    facts: Facts
    series: Series

    @property
    def last_step(self) -> int:
        return max(self.series.last_step, self.facts["step"], 1)

    def line(self, key: str, name: str = "") -> Line | None:
        curve = self.series.curve(key)
        return Line(name or key, curve) if curve else None

    @property
    def stages(self) -> list[Stage]:
        """The stages of the curriculum so far."""
        found = self.facts["curriculum"]["stages"]
        clusters = self.facts["curriculum"]["n_clusters"]
        ends = [first for first, *_ in found[1:]] + [self.last_step]
        stages = []
        # Nothing may be known yet.
        for (first, index, lowest, highest), last in zip(found, ends, strict=False):
            name = f"index {index}"
            if clusters:
                name += f", {stage(index, clusters)}"
            stages.append(Stage(name, index, first, max(first, last), lowest, highest))
        return stages


def overview(run: RunView) -> str:
    """How far the run is, in numbers."""
    f = run.facts
    ago = duration(max(0.0, f["now_unix_s"] - f["seen_unix_s"]))
    shown = {
        "progress": progress(f),
        "to go": duration(f["to_go_s"]) if f["to_go_s"] else "-",
        "state": f["standing"],
        "last seen": f"{ago} ago, {date(f['seen_unix_s'])}",
        "curriculum": curriculum_lines(f["curriculum"])[0],
    }
    for key, name in (
        ("loss", "loss"),
        ("reference/loss", "loss on the reference set"),
        ("validation/ema", "validation, EMA"),
        ("validation/raw", "validation, raw weights"),
        ("images_per_s", "images/s"),
        ("mfu", "MFU"),
    ):
        curve = run.series.curve(key)
        if curve:
            shown[name] = _plain(float(curve.mean[-1]))
    if f["starts"]:
        shown["goodput"] = f"{f['account']['goodput']:.1%}"
        shown["starts"] = _starts_summary(f)
    shown["checkpoints"] = checkpoints_summary(f)
    if f["model"]:
        shown["model"] = network(f["model"])
    shown["training"] = (
        f"{f['precision']}, batch {f['global_batch_size']}, on {f['world_size']} x {f['device']}"
    )

    cards = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in shown.items()
    )
    bar = ""
    if f["steps"]:
        bar = (
            f'<progress aria-label="steps taken" max="{f["steps"]}" value="{f["step"]}"></progress>'
        )
    troubles = "".join(f'<p class="trouble">{text(problem)}</p>' for problem in f["problems"])
    width = run.series.width
    note = ""
    if width > 1:
        note = (
            f'<p class="note">A point of a curve stands for {width:,} steps: the line is the mean of what '
            "was logged in them, the shade goes from its lowest to its highest.</p>"
        )
    return f'{bar}<dl class="cards">{cards}</dl>{troubles}{note}'


def _plain(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e9 else short(value)


def _starts_summary(f: Facts) -> str:
    """How many starts there were, and how those before the last one ended."""
    ends = Counter(_end(start) for start in f["starts"][:-1])
    words = ", ".join(f"{count:,} {end}" for end, count in ends.most_common())
    return f"{len(f['starts']):,}" + (f" (before the last: {words})" if words else "")


def _end(start: Facts) -> str:
    """How a start that is over ended, in a word or two."""
    ended = start["ended"]
    if ended is None:
        return "killed"
    if ended == "stopped":
        return "stopped or preempted"
    return "finished" if ended == "finished" else "failed"


def losses(run: RunView) -> str:
    """The loss and its parts, on the stages of the curriculum."""
    marks = [
        (row["step"], f"step {row['step']:,}: {event_row(row)[1]}")
        for row in run.facts["events"][-100:]
        if row.get("event") not in _NO_MARK
    ]
    stages = run.stages
    note = ""
    if len(stages) > 1:
        note = "Bands: the stages of the curriculum, with their index, which counts down to 0. "
    if marks:
        note += "Red lines on top: events, listed below."
    parts = []
    for key, name in (("loss", "training loss"), ("mse", "mse"), ("vb", "vb")):
        line = run.line(key, name)
        # Where the variance is fixed, vb is 0 throughout, and mse is the loss.
        if line and line.curve.high.max() > 0:
            parts.append(chart(run, name, [line], note if key == "loss" else "", marks, stages))
    return section("Loss", *parts, grid=True)


def chart(
    run: RunView,
    title: str,
    lines: Sequence[Line | None],
    note: str = "",
    marks: Sequence[tuple[int, str]] = (),
    stages: Sequence[Stage] = (),
    log: bool = True,
) -> str:
    """Curves of the run in one picture, with their numbers; nothing where there are none."""
    known = [line for line in lines if line is not None]
    if not known:
        return ""
    return figure_of(title, known, run.last_step, note, marks, stages, log)


def curriculum(run: RunView) -> str:
    """The noise levels that were trained on, over steps."""
    stages = run.stages
    if not stages:
        return ""
    known = any(stage.lowest is not None for stage in stages)
    rows = []
    for s in stages:
        levels = "not known"
        if s.lowest is not None and s.highest is not None:
            levels = f"[{s.lowest:.3g}, {s.highest:.3g})"
        rows.append((s.name, f"{s.first:,}", f"{s.last:,}", levels))
    clusters = run.facts["curriculum"]["n_clusters"] or 0
    title = "noise levels that were trained on"
    numbers = table("stages", ("stage", "from step", "to step", "noise levels u"), rows)
    picture = curriculum_chart(title, stages, run.last_step, clusters) if known else ""
    return section(
        "Curriculum",
        figure(title, picture, numbers),
        chart(run, "patience used up", [run.line("curriculum/patience")], stages=stages),
        grid=True,
    )


def clusters(run: RunView) -> str:
    """The loss of each noise cluster over steps."""
    return section(
        "Loss per noise cluster",
        _cluster_map(run, "training loss per cluster", r"cluster/C(\d+)"),
        _cluster_map(run, "reference set, per cluster", r"reference/C(\d+)"),
        _cluster_map(run, "validation per cluster, EMA", r"validation/ema_C(\d+)"),
        _cluster_map(run, "validation per cluster, raw weights", r"validation/raw_C(\d+)"),
        grid=True,
    )


def _cluster_map(run: RunView, title: str, pattern: str) -> str:
    keys: list[tuple[int, str]] = []
    for key in run.series.keys:
        match = re.fullmatch(pattern, key)
        if match and run.series.curve(key):
            keys.append((int(match[1]), key))
    if not keys:
        return ""
    keys.sort()
    steps, values = run.series.means([key for _, key in keys])
    names = [f"C{number}" for number, _ in keys]
    rows = []
    for name, (_, key) in zip(names, keys, strict=True):
        c = run.series.curve(key)
        assert c is not None
        figures = (c.mean[0], c.low.min(), c.high.max(), c.mean[-1])
        rows.append((name, *(short(float(value)) for value in figures)))
    numbers = table(title, ("cluster", "first", "lowest", "highest", "last"), rows)
    picture = heat_map(title, names, steps, values, run.last_step)
    note = (
        "Colour: the mean of each point's steps. C1 is the hardest cluster, with the least noise."
    )
    return figure(title, picture, numbers, note)


def validation(run: RunView) -> str:
    """The losses that can be compared over stages: on held-out images, and on a fixed part of the
    training images."""
    return section(
        "Validation",
        chart(
            run,
            "loss on held-out and on training images",
            [
                run.line("validation/ema", "validation, EMA"),
                run.line("validation/raw", "validation, raw weights"),
                run.line("reference/loss", "training images, raw weights"),
            ],
            "The same images, noise levels and noise every time.",
        ),
        chart(
            run,
            "validation at eight noise levels",
            [
                run.line("validation/ema_8_levels", "EMA"),
                run.line("validation/raw_8_levels", "raw weights"),
            ],
        ),
        grid=True,
    )


def optimisation(run: RunView) -> str:
    """Learning rate, gradients, and what went wrong with them."""
    return section(
        "Optimisation",
        chart(run, "learning rate", [run.line("optimizer/lr", "learning rate")], log=False),
        chart(run, "gradient norm", [run.line("optimizer/grad_norm", "gradient norm")]),
        chart(run, "loss scale", [run.line("optimizer/loss_scale", "loss scale")]),
        chart(
            run,
            "spikes and skipped steps so far",
            [
                run.line("anomaly/spikes", "spikes"),
                run.line("optimizer/skipped_steps", "steps whose gradients overflowed"),
                run.line("anomaly/skips", "roll-backs that left data out"),
            ],
        ),
        grid=True,
    )


def speed(run: RunView) -> str:
    """How fast the run is, and what it takes."""
    laps = [key for key in run.series.keys if re.fullmatch(r"time/\w+_ms", key)]
    return section(
        "Speed",
        chart(run, "images per second", [run.line("images_per_s", "images/s")], log=False),
        chart(run, "MFU", [run.line("mfu", "MFU")], log=False),
        chart(run, "memory, GiB", [run.line("memory_gib", "peak so far")]),
        chart(
            run,
            "shares of the time of a step",
            [
                run.line("time/data_wait_share", "waiting for data"),
                run.line("time/overhead_share", "outside forward, backward and optimizer"),
            ],
            log=False,
        ),
        grid=True,
    ) + folded("milliseconds a step", "".join(_lap(run, key) for key in laps))


def _lap(run: RunView, key: str) -> str:
    line = run.line(key, key.removeprefix("time/").removesuffix("_ms"))
    return numbers_of(line) if line else ""


def time_spent(run: RunView) -> str:
    """Where the wall time went: in all, and start by start."""
    f = run.facts
    if not f["starts"]:
        return ""
    spent = Account(f["account"]["wall_s"], f["account"]["seconds"])
    names = list(spent.seconds)
    shares = []
    rows = []
    for style, (kind, seconds) in enumerate(spent.seconds.items()):
        share = seconds / spent.wall_s if spent.wall_s > 0 else 0.0
        shares.append((style, kind, share))
        rows.append((kind, f"{share:.1%}", duration(seconds)))
    keys = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="k{style}" width="10" '
        f'height="10"/></svg>{text(name)}</li>'
        for style, name in enumerate(names)
    )
    total = figure(
        str(spent),
        stacked_bar(shares) + f'<ul class="legend">{keys}</ul>',
        table("where the time went", ("for", "share", "time"), rows),
    )
    return section("Where the time went", total, _starts(f, names))


def _starts(f: Facts, names: list[str]) -> str:
    """A row for each start, with a bar as long as it lasted."""
    longest = max(1e-9, *(_lasted(start) for start in f["starts"]))
    rows = []
    for start in f["starts"][-_MOST:]:
        seconds = {kind: start["seconds"].get(kind, 0.0) for kind in KINDS}
        seconds["other"] = max(0.0, _lasted(start) - sum(seconds.values()))
        whole = max(1e-9, sum(seconds.values()))
        shares = [(names.index(kind), kind, s / whole) for kind, s in seconds.items()]
        bar = stacked_bar(shares, max(0.02, min(1.0, whole / longest)))
        rows.append((*start_row(f, start), Markup(bar)))

    # The last ones are of interest every day.
    header = ("no.", "began", "job", "ranks", "from", "to", "lasted", "ended", "spent on")
    earlier = rows[:-_RECENT]
    title = _last_of("earlier starts", len(rows), len(f["starts"]))
    return folded(f"{len(earlier):,} earlier starts", table(title, header, earlier)) + table(
        "starts" if not earlier else "the last starts", header, rows[-_RECENT:]
    )


def _lasted(start: Facts) -> float:
    return max(0.0, start["seen_unix_s"] - start["began_unix_s"])


def _last_of(things: str, shown: int, total: int) -> str:
    return things if shown == total else f"{things}: the last {shown:,} of {total:,}"


def checkpoints(run: RunView) -> str:
    """The checkpoints, newest first, and their state."""
    f = run.facts
    header = ("step", "written", "size", "ranks", "why", "index", "state")
    shown = f["checkpoints"][:_MOST]
    title = _last_of("checkpoints", len(shown), len(f["checkpoints"]))
    return section("Checkpoints", table(title, header, (checkpoint_row(f, c) for c in shown)))


def previews(run: RunView, most: int) -> str:
    """Sample grids over training."""
    return section("Previews", strip(Path(run.facts["run"]), most))


def events(run: RunView) -> str:
    """What happened: anomalies, roll-backs, checkpoints that could not be written."""
    f = run.facts
    shown = f["events"][-_MOST:]
    title = _last_of("events", len(shown), len(f["events"]))
    return section(
        "Events",
        table(title, ("step", "what"), map(event_row, shown)),
        table(
            "data that were left out", ("from step", "inputs of", "why"), map(skip_row, f["skips"])
        ),
    )


def settings(run: RunView) -> str:
    """The config, and what each start changed."""
    f = run.facts
    changes = itertools.chain.from_iterable(_changes(start) for start in f["starts"])
    flat = sorted((key, _value(value)) for key, value in f["settings"].items())
    file = _config_file(Path(f["run"]))
    written = f'<pre tabindex="0">{text(file)}</pre>' if file else ""
    return section(
        "Settings",
        table("what changed", ("start", "from step", "change"), list(changes)[-_MOST:]),
        folded("config.yaml", written, printed=True),
        folded("all settings", table("settings", ("setting", "value"), flat), printed=not file),
    )


def _changes(start: Facts) -> Iterator[tuple[str, str, str]]:
    for change in start["changed"]:
        yield str(start["number"]), f"{start['from_step']:,}", change


def _value(value: object) -> str:
    return "-" if value is None else str(value)


def _config_file(run_dir: Path) -> str:
    """The run's config.yaml; empty where there is none, or where it is no text."""
    try:
        with (run_dir / "config.yaml").open(encoding="utf-8") as file:
            return file.read(100_000)
    except (OSError, UnicodeDecodeError):
        return ""


def whole(run: RunView, pictures: int) -> str:
    """All sections of a run. `pictures`: at most so many previews."""
    return "".join(
        (
            overview(run),
            losses(run),
            curriculum(run),
            clusters(run),
            validation(run),
            previews(run, pictures),
            optimisation(run),
            speed(run),
            time_spent(run),
            checkpoints(run),
            events(run),
            settings(run),
        )
    )
