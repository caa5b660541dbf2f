"""python -m largescale.status RUN: how a run stands, from the files in its folder. Needs no torch,
and changes nothing.

Exit status: 0; 1 where a checkpoint is damaged; 2 where RUN is not a run.
"""

import contextlib
import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from largescale.checkpoint.files import CheckpointDir, step_folders
from largescale.config.command_line import parse_options, run_program
from largescale.curriculum import active_levels, stage
from largescale.errors import (
    CheckpointError,
    NewerVersionError,
    StorageError,
    usable,
)
from largescale.host.launch import printable_lines
from largescale.monitoring.run_record import (
    Account,
    Start,
    account,
    duration,
    out_of_memory,
    read_starts,
)
from largescale.monitoring.telemetry import read_metrics

# A run that takes steps updates its record every few seconds; one that evaluates or starts up does
# not.
SILENT_S = 900.0

Facts = dict[str, Any]


@dataclass(frozen=True)
class Status:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits."""
    verify: bool = True
    """Read every checkpoint and compare its hashes; otherwise only check that all files exist and
    have their sizes."""
    json: bool = False
    """Print everything, unrounded, as one JSON object; times are seconds since 1970."""


def facts(run_dir: Path, verify: bool = True) -> Facts:
    """How a run stands, as plain values, which `describe` puts in words. Raises CheckpointError
    where there is no run."""
    _require_run(run_dir)
    now = time.time()
    starts, rows, problems = _records(run_dir)
    last = starts[-1] if starts else None
    found, manifest = _checkpoints(run_dir, verify, last)

    # Where training is, and when it was seen last.
    config = _at(manifest, "state", "config")
    step = _latest_step(last, rows, found)
    steps = _at(config, "train", "steps")
    batch = _at(config, "train", "global_batch_size", default=0)
    logged, reference, events = _kinds_of_rows(rows)
    seen_unix_s = last.seen_unix_s if last else _last_change(run_dir)
    patience_s = max(SILENT_S, _at(config, "train", "timeout_s", default=0.0))
    finished = step >= (steps or step + 1)
    spent = account(starts)
    return {
        "run": str(run_dir),
        "name": _at(config, "name"),
        "step": step,
        "steps": steps,
        "problems": problems,
        "standing": _standing(last, now - seen_unix_s, patience_s, finished=finished),
        "now_unix_s": now,
        "seen_unix_s": seen_unix_s,
        "to_go_s": _seconds_to_go((steps or 0) - step, batch, logged),
        "precision": _at(manifest, "state", "precision"),
        "global_batch_size": batch or None,
        "model": _at(config, "model"),
        "world_size": last.world_size if last else _at(manifest, "world_size"),
        "device": last.device if last else _at(config, "train", "device"),
        "curriculum": _curriculum(manifest, rows, logged[-1:]),
        "log": logged if len(logged) <= 6 else [logged[0], *logged[-5:]],
        "reference": reference,
        "verified": verify,
        "checkpoints": found,
        "damaged": [c["step"] for c in found if c["problem"]],
        "skips": _at(manifest, "state", "skips", default=[]),
        "events": events,
        "starts": list(map(dataclasses.asdict, starts)),
        "account": {"wall_s": spent.wall_s, "goodput": spent.goodput, "seconds": spent.seconds},
    }


def _require_run(run_dir: Path) -> None:
    # Any of these is left by a run that has started.
    started = (run_dir / "metrics.jsonl").exists() or (run_dir / "starts").exists()
    if started or step_folders(run_dir):
        return
    what = "does not exist"
    if run_dir.is_dir():
        what = "is not a run"
    elif run_dir.exists():
        what = "is a file"
    runs = ", ".join(str(path.parent) for path in sorted(run_dir.glob("*/metrics.jsonl")))
    remedy = f"of one, such as {runs}" if runs else "that training wrote to, its --output"
    raise CheckpointError(f"{run_dir} {what}; give the folder {remedy}")


def _at(tree: Any, *keys: str, default: Any = None) -> Any:
    """A value of nested dictionaries; `default` where there is none, as in the manifest of another
    version."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return default if tree is None else tree


def _records(run_dir: Path) -> tuple[list[Start], list[Facts], list[str]]:
    """(the run's starts, the rows of its log, what of these could not be read)."""
    starts = read_starts(run_dir)
    rows, problems = _metrics(run_dir)
    unread = len(list((run_dir / "starts").glob("start_*.json"))) - len(starts)
    if unread:
        problems.append(
            f"records in {run_dir / 'starts'} that cannot be read, and are left out: {unread}"
        )
    return starts, rows, problems


def _metrics(run_dir: Path) -> tuple[list[Facts], list[str]]:
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        rows = read_metrics(run_dir)
    except OSError as error:
        return [], [f"{path} cannot be read: {error}"]
    if len(rows) >= lines:
        return rows, []
    return rows, [f"lines of {path} that are no rows, and are left out: {lines - len(rows)}"]


def _kinds_of_rows(rows: list[Facts]) -> tuple[list[Facts], list[list[Any]], list[Facts]]:
    """(rows of metrics, [step, loss] on the reference set, events) of the log."""
    logged: list[Facts] = []
    reference: list[list[Any]] = []
    events: list[Facts] = []
    for row in rows:
        if "loss" in row:
            logged.append(row)
        if "reference/loss" in row:
            reference.append([row["step"], row["reference/loss"]])
        # Transitions are shown with the curriculum.
        if row.get("event", "transition") != "transition":
            events.append(row)
    return logged, reference, events


def _latest_step(last: Start | None, rows: list[Facts], found: list[Facts]) -> int:
    """The greatest step that the record, the log or a usable checkpoint has."""
    # A kill can come after a checkpoint, and before the log and the record of its step.
    step: int = last.step if last else 0
    if rows:
        step = max(step, rows[-1]["step"])
    for checkpoint in found:
        if checkpoint["usable"]:
            step = max(step, checkpoint["step"])
    return step


def _seconds_to_go(steps: int, batch: int, logged: list[Facts]) -> float | None:
    """The time for so many steps at the speed of the last row; None where it is not known."""
    speed = _at(logged[-1], "images_per_s") if logged else None
    images = steps * batch
    return images / speed if speed and images > 0 else None


def _last_change(run_dir: Path) -> float:
    # For a run whose starts left no record.
    for path in (run_dir / "metrics.jsonl", run_dir / "checkpoints"):
        if path.exists():
            return path.stat().st_mtime
    return run_dir.stat().st_mtime


def _checkpoints(run_dir: Path, verify: bool, last: Start | None) -> tuple[list[Facts], Facts]:
    """(all, newest first; the manifest of the best one, or nothing)."""
    manifests = {folder: _manifest(folder) for folder in step_folders(run_dir)}
    problems = _problems(manifests, verify)
    found = []
    best: Facts = {}
    best_rank = (False, False, -1)
    for folder, manifest in manifests.items():
        finished = manifest is not None
        written = _at(manifest, "written_unix_s", default=0)
        # A run that trains meanwhile has removed it.
        if finished and not folder.exists:
            continue

        # The last start found an older checkpoint valid, and this one, which was there, not.
        skipped = (
            finished
            and last is not None
            and folder.step > last.from_step
            and written < last.began_unix_s - 1
        )
        usable = finished and folder not in problems and not skipped

        # The newest usable one, or at least one that has settings.
        rank = (usable, _at(manifest, "state") is not None, folder.step)
        if rank > best_rank:
            best_rank = rank
            best = manifest or {}
        found.append(
            {
                "step": folder.step,
                "written_unix_s": written or None,
                "bytes": sum(_sizes(manifest)),
                "world_size": _at(manifest, "world_size"),
                "reason": _at(manifest, "reason", default=""),
                "index": _at(manifest, "state", "curriculum", "pacing", "index"),
                "finished": finished,
                "problem": problems.get(folder),
                "passed_over": skipped,
                "usable": usable,
            }
        )
    return found, best


def _manifest(folder: CheckpointDir) -> Facts | None:
    """A checkpoint's manifest; None if there is none; empty if it cannot be read."""
    # `_problem` reports why.
    try:
        return folder.manifest() if folder.exists else None
    except (CheckpointError, StorageError):
        return {}


def _sizes(manifest: Facts | None) -> list[int]:
    """Bytes of a checkpoint's files, in the order in which `CheckpointDir.check` counts them."""
    files = _at(manifest, "files")
    if type(files) is not dict:
        return []
    return [_at(files[name], "bytes", default=0) for name in sorted(files)]


def _problems(
    manifests: dict[CheckpointDir, Facts | None], verify: bool
) -> dict[CheckpointDir, str]:
    """What is wrong with checkpoints, by folder. With `verify`, files are hashed."""
    # Files and sizes first; what is wrong then need not be hashed.
    problems: dict[CheckpointDir, str] = {}
    files: list[tuple[CheckpointDir, int, int]] = []
    for folder, manifest in manifests.items():
        # Without a manifest it is not finished, which is no damage.
        if manifest is None:
            continue
        problem = _problem(folder, slice(0))
        if problem:
            problems[folder] = problem
        elif verify:
            for number, size in enumerate(_sizes(manifest)):
                files.append((folder, number, size))

    # Hashing releases the interpreter's lock, and waits for the disk: four files at a time.
    terminal = sys.stderr.isatty()
    pool = ThreadPoolExecutor(4)
    bar = tqdm(
        total=sum(map(itemgetter(2), files)),
        desc="hashing",
        unit="B",
        unit_scale=True,
        leave=False,
        delay=0 if terminal else 3,
        mininterval=0.1 if terminal else 20,
        ascii=not terminal,
    )
    try:
        hashed = pool.map(lambda file: _problem(file[0], slice(file[1], file[1] + 1)), files)
        for (folder, _, size), problem in zip(files, hashed, strict=True):
            bar.update(size)
            if problem:
                problems.setdefault(folder, problem)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return problems


def _problem(folder: CheckpointDir, part: slice) -> str | None:
    """What is wrong with a checkpoint, or that it cannot be read at present; else None. Raises
    NewerVersionError."""
    error = folder.check(part)
    if isinstance(error, NewerVersionError):
        raise error
    return str(error) if error else None


def _standing(last: Start | None, silence_s: float, patience_s: float, *, finished: bool) -> str:
    """Whether the run trains, has ended or hangs, in words."""
    # How the last start ended, if it recorded that.
    if last and last.ended is not None:
        return " ".join(last.ended.split())
    if finished:
        return "finished"
    if not last:
        return "running or not, its starts left no record"

    # A start that was killed, or that hangs, records nothing.
    if silence_s < patience_s:
        return "running"
    return out_of_memory(last) or f"killed, or it hangs: no sign of life for {duration(silence_s)}"


def _curriculum(manifest: Facts, rows: list[Facts], last: list[Facts]) -> Facts:
    """The curriculum at the latest step at which it is known: of the log, the checkpoint or a
    transition. `last`: the last row of metrics, if any."""
    config = _at(manifest, "state", "config", "curriculum")
    state = _at(manifest, "state", "curriculum")
    edges = _at(state, "edges")
    saved_step = _at(manifest, "step", default=-1)
    keys = ("index", "lowest", "highest", "patience", "best_loss")

    # Of the same step, the first of these counts.
    known = []
    for row in last:
        known.append((row["step"], [row.get(f"curriculum/{key}") for key in keys]))
    known.append((saved_step, _saved_curriculum(state)))

    # The checkpoint has the transitions before it, and the log those since.
    transitions = list(_at(state, "transitions", default=[]))
    newest: Facts | None = None
    for row in rows:
        if row.get("event") == "transition" and row["step"] > saved_step:
            transitions.append([row["step"], row.get("index")])
            newest = row
    if newest:
        values = [newest.get("index"), newest.get("lowest"), newest.get("highest", 1), 0, None]
        known.append((newest["step"], values))
    _, latest = max(known, key=itemgetter(0))
    return {
        **dict(zip(keys, latest, strict=True)),
        "n_clusters": len(edges) - 1 if edges else None,
        "pacing": _at(config, "pacing"),
        "max_patience": _at(config, "patience"),
        "transitions": transitions,
    }


def _saved_curriculum(state: Any) -> list[Any]:
    """[index, lowest, highest, patience, best loss] of a checkpoint's state of the curriculum."""
    pacing = _at(state, "pacing", default={})
    edges = _at(state, "edges")
    index = _at(pacing, "index")
    lowest = highest = None
    if edges and index is not None:
        # A checkpoint of an older version lacks some of these.
        ways = {}
        for key in ("order", "stages", "only_cluster"):
            if key in state:
                ways[key] = state[key]
        lowest, highest = active_levels(edges, index, **ways)
    return [index, lowest, highest, pacing.get("patience_count"), pacing.get("best_loss")]


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
        map(partial(_checkpoint_row, f), f["checkpoints"]),
    )

    # What has gone wrong, and how each start ended.
    lines += _section(
        "data that were left out", "from step|inputs of|why", map(_skip_row, f["skips"])
    )
    lines += _section("events", "step|what", map(_event_row, f["events"][-10:]))
    lines += _section(
        "starts",
        "no.|began|job|ranks|from|to|lasted|ended",
        map(partial(_start_row, f), f["starts"][-20:]),
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
    now, *more = _curriculum_lines(f["curriculum"])
    ago = duration(max(0.0, f["now_unix_s"] - f["seen_unix_s"]))
    to_go = ""
    if f["to_go_s"]:
        to_go = f"; {duration(f['to_go_s'])} to go at the speed of the last lines"
    lines = [
        f"run          {f['name'] or 'of unknown settings'}, in {f['run']}: {f['standing']}",
        f"last seen    {_date(f['seen_unix_s'])}, {ago} ago",
        f"progress     {_progress(f)}{to_go}",
    ]

    # Without a checkpoint the settings are not known.
    model = f["model"]
    if model:
        shape = f"({model['in_channels']}, {model['input_size']}, {model['input_size']})"
        lines.append(f"model        {_model(model)}, on {shape}")
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
        _number(row.get("images_per_s"), ",.1f"),
        _number(row.get("curriculum/index"), "d"),
        _number(row.get("loss")),
        _number(row.get("mse")),
        _number(row.get("vb")),
        _number(row.get("optimizer/grad_norm")),
    )


def _reference_row(entry: tuple[int, float]) -> tuple[str, ...]:
    step, loss = entry
    return f"{step:,}", _number(loss)


def _skip_row(skip: Facts) -> tuple[str, ...]:
    return f"{skip['at']:,}", _n(skip["count"], "step"), skip["why"]


def _event_row(row: Facts) -> tuple[str, ...]:
    return f"{row['step']:,}", row["text"] if "text" in row else row["event"]


def _checkpoint_row(f: Facts, c: Facts) -> tuple[str, ...]:
    return (
        f"{c['step']:,}",
        _date(c["written_unix_s"]),
        _size(c["bytes"]),
        _number(c["world_size"], "d"),
        c["reason"],
        _number(c["index"], "d"),
        _state(c, f),
    )


def _start_row(f: Facts, start: Facts) -> tuple[str, ...]:
    # Only of the newest start it can be open how it ends.
    newest = start in f["starts"][-1:]
    return (
        str(start["number"]),
        _date(start["began_unix_s"]),
        f"{start['job']}/{start['restart']}" if start["job"] else "-",
        str(start["world_size"]),
        f"{start['from_step']:,}",
        f"{start['step']:,}",
        duration(max(0.0, start["seen_unix_s"] - start["began_unix_s"])),
        start["ended"] or (f["standing"] if newest else "killed"),
    )


def _model(m: Facts) -> str:
    if m.get("architecture") == "ddpmpp":
        u = m["unet"]
        channels = f"{u['model_channels']} channels times {u['channel_mult']}"
        return f"DDPM++, {u['num_blocks']} blocks a resolution, {channels}"
    return (
        f"DiT, {m['depth']} blocks of width {m['hidden_size']}, {m['num_heads']} heads, patches of "
        f"{m['patch_size']}"
    )


def _curriculum_lines(c: Facts) -> list[str]:
    """Where the curriculum stands, on one line, and then its transitions, on one or more."""
    index = c["index"]
    if index is None:
        return ["nothing is known yet"]
    now = f"index {index}, "
    if index and c["n_clusters"]:
        now += f"{stage(index, c['n_clusters'])}, "

    # At index 0 training is on all levels, unless it is restricted to a cluster. Where no highest
    # level was recorded it is 1.
    lowest = c["lowest"]
    highest = c["highest"]
    if index or (lowest, highest) not in ((0, 1), (None, None), (0, None)):
        end = 1 if highest is None else highest
        now += f"training on u in [{_number(lowest, '.3g')}, {_number(end, '.3g')})"
    else:
        now += "complete: all noise levels"
    if index and c["pacing"] == "patience":
        patience = f"{_number(c['patience'], 'd')} of {c['max_patience']}"
        now += f", patience {patience}, best loss {_number(c['best_loss'])}"

    history = ", ".join(f"{index} at {step:,}" for step, index in c["transitions"])
    transitions = f"transitions: {history}" if history else "no transition so far"
    return [now, *textwrap.wrap(transitions, 105)]


def _state(c: Facts, f: Facts) -> str:
    if not c["finished"]:
        return "not finished"
    if c["problem"]:
        return "DAMAGED: " + c["problem"].replace(f"{Path(f['run'], 'checkpoints')}/", "")
    state = "valid" if f["verified"] else "sizes right, hashes not checked"
    if c["passed_over"]:
        state += f", but start {f['starts'][-1]['number']} skipped it"
    return state


def _progress(f: Facts) -> str:
    step = f["step"]
    steps = f["steps"]
    if not steps:
        return f"step {step:,}"
    return f"step {step:,} of {steps:,} ({100 * step / steps:.1f} %)"


def _summary(f: Facts) -> str:
    """The last line: how far the run is, and whether its checkpoints are valid."""
    starts = len(f["starts"])
    parts = [f"{f['run']}: {_progress(f)}"]
    index = f["curriculum"]["index"]
    if index is not None:
        parts.append(f"curriculum index {index}")
    parts.append(_n(starts, "start") if starts else "starts not recorded")
    parts.append(_checkpoints_summary(f))
    if starts:
        parts.append(f"goodput {f['account']['goodput']:.0%}")
    return ", ".join(parts)


def _checkpoints_summary(f: Facts) -> str:
    done = [c for c in f["checkpoints"] if c["finished"]]
    if not done:
        return "no checkpoint yet"
    state = "all valid" if f["verified"] else "sizes right, hashes not checked"
    if f["damaged"]:
        steps = ", ".join(map("{:,}".format, f["damaged"]))
        state = f"damaged: {steps}"

    # The newest comes first.
    newest = "none can be used"
    for c in done:
        if c["usable"]:
            newest = f"newest {c['step']:,}"
            break
    return f"{_n(len(done), 'checkpoint')} ({state}; {newest})"


def _section(title: str, header: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table, each row on one line, the last column to the left; nothing where there are no
    rows."""
    table = [header.split("|")]
    for row in rows:
        table.append(list(map(_on_one_line, row)))
    if len(table) == 1:
        return []

    # All columns but the last are numbers or dates, which end at the same place.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["", title]
    for cells in table:
        padded = [*map(str.rjust, cells[:-1], widths), cells[-1]]
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def _on_one_line(text: str) -> str:
    # The message of an error may have several lines.
    return " ".join(text.split())


def _n(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _number(value: Any, how: str = ".4f") -> str:
    return format(value, how) if isinstance(value, int | float) else "-"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _date(unix_s: float | None) -> str:
    # A damaged record can have a year that does not exist.
    with contextlib.suppress(OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S") if unix_s else "-"
    return "-"


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Status, args, program="largescale.status", description=__doc__)
    return run_program(lambda: run(options), "when it can be read, run again")


def run(options: Status) -> int:
    """Print how the run stands; the exit status, 1 if a checkpoint is damaged."""
    # A file that another program has written there may have any content.
    with usable(options.run):
        found = facts(options.run, options.verify)
        if options.json:
            # JSON has neither NaN nor infinity: these become words.
            strict = json.loads(json.dumps(found), parse_constant=str)
            text = json.dumps(strict, indent=1)
        else:
            text = printable_lines(describe(found))
    print(text)
    return 1 if found["damaged"] else 0


if __name__ == "__main__":
    sys.exit(main())
