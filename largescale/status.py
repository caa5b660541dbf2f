"""python -m largescale.status RUN [RUN...]: how runs stand, from the files in their folders, in
words or with --html as a page. Needs no torch, and changes nothing in a run.

Exit status: 0; 1 where a checkpoint is damaged; 2 where a RUN is no run.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from largescale.config.command_line import parse_options, run_program
from largescale.errors import ConfigError, usable
from largescale.host.files import write_atomically
from largescale.host.launch import printable_lines
from largescale.monitoring.run_facts import Facts, facts
from largescale.monitoring.run_log import LogReader
from largescale.monitoring.run_record import Account, duration
from largescale.monitoring.run_words import (
    checkpoint_row,
    checkpoints_summary,
    counted,
    curriculum_lines,
    date,
    event_row,
    network,
    number,
    on_one_line,
    progress,
    skip_row,
    start_row,
)
from largescale.page.document import page
from largescale.page.frame import DOCTYPE
from largescale.page.sections import RunView
from largescale.page.series import Series
from largescale.page.server import Server

# The page that is served is made anew at most so often, and asks for it as often.
_REFRESH_S = 20.0


@dataclass(frozen=True)
class Status:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The run directory, such as runs/digits; several stand side by side."""
    verify: bool = True
    """Read every checkpoint and compare its hashes; otherwise only check that all files exist and
    have their sizes."""
    json: bool = False
    """Print everything, unrounded, as one JSON object; times are seconds since 1970. Of several
    runs a list."""
    html: Path | None = None
    """Write a page to this file: curves, the curriculum, checkpoints, previews, settings. It needs
    no network."""
    follow: bool = False
    """Serve the page on 127.0.0.1 until Ctrl-C, and keep it current; hashes of checkpoints are not
    compared."""
    port: int = 8016
    """The port of --follow; 0 takes any that is free."""


def describe(f: Facts) -> str:
    """Tables for a person who looks once in the morning, and a line of summary."""
    lines = _head(f)
    lines += _section(
        "losses", "step|images/s|index|loss|mse|vb|grad norm", map(_log_row, f["log"])
    )
    # The first and the last ones show the progress; all are in metrics.jsonl.
    reference = [*f["reference"][:1], *f["reference"][1:][-5:]]
    lines += _section("loss on the reference set", "step|loss", map(_reference_row, reference))
    lines += _section(
        "checkpoints",
        "step|written|size|ranks|why|index|state",
        map(partial(checkpoint_row, f), f["checkpoints"]),
    )

    # What has gone wrong, and how each start ended.
    lines += _section(
        "data that were left out", "from step|inputs of|why", map(skip_row, f["skips"])
    )
    lines += _section("events", "step|what", map(event_row, f["events"][-10:]))
    lines += _section(
        "starts",
        "no.|began|job|ranks|from|to|lasted|ended",
        map(partial(start_row, f), f["starts"][-20:]),
    )

    # Where the time went.
    spent = Account(f["account"]["wall_s"], f["account"]["seconds"])
    shares = []
    if spent.wall_s > 0:
        for kind, seconds in spent.seconds.items():
            shares.append((f"{seconds / spent.wall_s:.1%}", duration(seconds), kind))
    lines += _section(str(spent), "share|time|for", shares)
    return "\n".join([*lines, "", _summary(f)])


def _head(f: Facts) -> list[str]:
    """The lines above the tables."""
    # The first line of the curriculum stands beside its name, the others below.
    now, *more = curriculum_lines(f["curriculum"])
    ago = duration(max(0.0, f["now_unix_s"] - f["seen_unix_s"]))
    to_go = ""
    if f["to_go_s"]:
        to_go = f"; {duration(f['to_go_s'])} to go at the speed of the last lines"
    lines = [
        f"run          {f['name'] or 'of unknown settings'}, in {f['run']}: {f['standing']}",
        f"last seen    {date(f['seen_unix_s'])}, {ago} ago",
        f"progress     {progress(f)}{to_go}",
    ]

    # Without a checkpoint the settings are not known.
    model = f["model"]
    if model:
        shape = f"({model['in_channels']}, {model['input_size']}, {model['input_size']})"
        lines.append(f"model        {network(model)}, on {shape}")
    lines.append(
        f"training     {f['precision']}, batch {f['global_batch_size']}, "
        f"on {f['world_size']} x {f['device']}"
    )
    lines.append(f"curriculum   {now}")
    for line in more:
        lines.append(f"             {line}")
    for problem in f["problems"]:
        lines.append(f"trouble      {problem}")
    return lines


def _log_row(row: Facts) -> tuple[str, ...]:
    return (
        f"{row['step']:,}",
        number(row.get("images_per_s"), ",.1f"),
        number(row.get("curriculum/index"), "d"),
        number(row.get("loss")),
        number(row.get("mse")),
        number(row.get("vb")),
        number(row.get("optimizer/grad_norm")),
    )


def _reference_row(entry: tuple[int, float]) -> tuple[str, ...]:
    step, loss = entry
    return f"{step:,}", number(loss)


def _summary(f: Facts) -> str:
    """The last line: how far the run is, and whether its checkpoints are valid."""
    starts = len(f["starts"])
    parts = [f"{f['run']}: {progress(f)}"]
    index = f["curriculum"]["index"]
    if index is not None:
        parts.append(f"curriculum index {index}")
    parts.append(counted(starts, "start") if starts else "starts not recorded")
    parts.append(checkpoints_summary(f))
    if starts:
        parts.append(f"goodput {f['account']['goodput']:.0%}")
    return ", ".join(parts)


def _section(title: str, header: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table, each row on one line, the last column to the left; nothing where there are no
    rows."""
    table = [header.split("|")]
    for row in rows:
        table.append(list(map(on_one_line, row)))
    if len(table) == 1:
        return []

    # All columns but the last are numbers or dates, which end at the same place.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["", title]
    for cells in table:
        padded = [*map(str.rjust, cells[:-1], widths), cells[-1]]
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Status, args, program="largescale.status", description=__doc__)
    return run_program(lambda: run(options), "when it can be read, run again")


def run(options: Status) -> int:
    """Print how the runs stand, or make a page of it; the exit status, 1 if a checkpoint is
    damaged."""
    if not options.runs:
        raise ConfigError("no run was given; name a run directory, such as runs/digits")
    if options.json and (options.html or options.follow):
        raise ConfigError(
            "--json prints what --html and --follow show as a page; ask for one of them at a time"
        )
    code = _write_page(options, options.html) if options.html else 0
    if options.follow:
        return _follow(options)
    if options.html:
        return code

    found = []
    for run_dir in options.runs:
        # A file that another program has written there may have any content.
        with usable(run_dir):
            found.append(facts(run_dir, options.verify))
            if not options.json:
                print(printable_lines(describe(found[-1])))
    if options.json:
        # JSON has neither NaN nor infinity: these become words.
        plain = found[0] if len(found) == 1 else found
        strict = json.loads(json.dumps(plain), parse_constant=str)
        print(json.dumps(strict, indent=1))
    return int(any(f["damaged"] for f in found))


def _write_page(options: Status, path: Path) -> int:
    _require_no_other_file(path)
    views = Watched(options.runs).views(options.verify)
    made = page(views, time.time())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, made)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; choose another --html") from error
    print(f"{path}: {', '.join(map(str, options.runs))}")
    return int(any(view.facts["damaged"] for view in views))


def _require_no_other_file(path: Path) -> None:
    """Raise ConfigError where the page would take the place of what is no page."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(DOCTYPE))
        if start in (b"", DOCTYPE.encode()):
            return
    if path.exists():
        raise ConfigError(f"--html {path} is there and is no page; choose another name")


class Watched:
    """Some runs, of whose logs only what was added is read when they are looked at again."""

    def __init__(self, runs: Sequence[Path]):
        self._runs = runs
        self._series = [Series() for _ in runs]
        self._logs = []
        for run_dir, series in zip(runs, self._series, strict=True):
            self._logs.append(LogReader(run_dir, series.take, series.clear))

    def views(self, verify: bool) -> list[RunView]:
        """The runs as the page shows them."""
        # The last parts of their paths, where these differ.
        names = [run.resolve().name for run in self._runs]
        views = []
        for run_dir, name, series, log in zip(
            self._runs, names, self._series, self._logs, strict=True
        ):
            with usable(run_dir):
                found = facts(run_dir, verify, log)
            views.append(RunView(name if names.count(name) == 1 else str(run_dir), found, series))
        return views


def followed(watched: Watched) -> str:
    """The page as it is served."""
    return page(watched.views(verify=False), time.time(), _REFRESH_S)


def _follow(options: Status) -> int:
    """Serve the page until it is interrupted."""
    watched = Watched(options.runs)
    # What is no run is said at once.
    followed(watched)
    with Server(lambda: followed(watched), options.port, _REFRESH_S / 2) as server:
        runs = ", ".join(map(str, options.runs))
        print(f"{server.address} shows {runs}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
