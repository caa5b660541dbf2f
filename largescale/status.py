"""python -m largescale.status RUN: how a run stands, from what lies in its folder. Needs no torch,
disturbs nothing.

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

SILENT_S = 900.0  # a run that steps gives a sign of life every few seconds; one that evaluates or starts up does not

Facts = dict[str, Any]


@dataclass(frozen=True)
class Status:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits."""
    verify: bool = True
    """Read every checkpoint and compare its hashes; otherwise only see whether all files are there
    in their sizes."""
    json: bool = False
    """Print everything, unrounded, as one JSON object; times are seconds since 1970."""


def facts(run_dir: Path, verify: bool = True) -> Facts:
    """What `describe` puts in words, as plain values. Raises CheckpointError where there is no
    run."""
    _require_run(run_dir)
    now, starts = time.time(), read_starts(run_dir)
    last = starts[-1] if starts else None
    rows, problems = _metrics(run_dir)
    if unread := len(list((run_dir / "starts").glob("start_*.json"))) - len(starts):
        problems.append(
            f"records in {run_dir / 'starts'} that cannot be read, and are left out: {unread}"
        )
    found, manifest = _checkpoints(run_dir, verify, last)
    config, whole = _at(manifest, "state", "config"), account(starts)
    logged = [row for row in rows if "loss" in row]
    # The greatest: a kill can come after a checkpoint, and before the log and the record of its
    # step.
    heard = [
        last.step if last else 0,
        *(row["step"] for row in rows[-1:]),
        *(c["step"] for c in found if c["usable"]),
    ]
    step, steps, batch = (
        max(heard),
        _at(config, "train", "steps"),
        _at(config, "train", "global_batch_size", default=0),
    )
    images, speed = ((steps or 0) - step) * batch, _at((logged or [{}])[-1], "images_per_s")
    seen_unix_s = last.seen_unix_s if last else _last_change(run_dir)
    patience_s = max(SILENT_S, _at(config, "train", "timeout_s", default=0.0))
    return {
        "run": str(run_dir),
        "name": _at(config, "name"),
        "step": step,
        "steps": steps,
        "problems": problems,
        "standing": _standing(
            last, now - seen_unix_s, patience_s, finished=step >= (steps or step + 1)
        ),
        "now_unix_s": now,
        "seen_unix_s": seen_unix_s,
        "to_go_s": images / speed if speed and images > 0 else None,
        "precision": _at(manifest, "state", "precision"),
        "global_batch_size": batch or None,
        "model": _at(config, "model"),
        "world_size": last.world_size if last else _at(manifest, "world_size"),
        "device": last.device if last else _at(config, "train", "device"),
        "curriculum": _curriculum(manifest, rows, logged[-1:]),
        "log": logged if len(logged) <= 6 else [logged[0], *logged[-5:]],
        "reference": [
            [row["step"], row["reference/loss"]] for row in rows if "reference/loss" in row
        ],
        "verified": verify,
        "checkpoints": found,
        "damaged": [c["step"] for c in found if c["problem"]],
        "skips": _at(manifest, "state", "skips", default=[]),
        "events": [row for row in rows if row.get("event", "transition") != "transition"],
        "starts": [dataclasses.asdict(start) for start in starts],
        "account": {"wall_s": whole.wall_s, "goodput": whole.goodput, "seconds": whole.seconds},
    }


def _require_run(run_dir: Path) -> None:
    if step_folders(run_dir) or any(
        (run_dir / name).exists() for name in ("metrics.jsonl", "starts")
    ):
        return
    runs = ", ".join(str(path.parent) for path in sorted(run_dir.glob("*/metrics.jsonl")))
    raise CheckpointError(
        f"{run_dir} {'is not a run' if run_dir.is_dir() else 'does not exist'}; give the folder "
        + (f"of one, such as {runs}" if runs else "that training wrote to, its --output")
    )


def _at(tree: Any, *keys: str, default: Any = None) -> Any:
    """`default` where nothing is there, as in the manifest of another version."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return default if tree is None else tree


def _metrics(run_dir: Path) -> tuple[list[Facts], list[str]]:
    path = run_dir / "metrics.jsonl"
    try:
        whole, rows = path.read_bytes().count(b"\n") if path.exists() else 0, read_metrics(run_dir)
    except OSError as error:
        return [], [f"{path} cannot be read: {error}"]
    unread = f"lines of {path} that are no rows, and are left out: {whole - len(rows)}"
    return rows, [unread] if len(rows) < whole else []


def _last_change(run_dir: Path) -> float:
    files = (run_dir / "metrics.jsonl", run_dir / "checkpoints", run_dir)
    return next(path for path in files if path.exists()).stat().st_mtime


def _checkpoints(run_dir: Path, verify: bool, last: Start | None) -> tuple[list[Facts], Facts]:
    """(all, newest first; the manifest of the one to go by, or nothing)."""
    manifests = {folder: _manifest(folder) for folder in step_folders(run_dir)}
    problems = _problems({folder: m for folder, m in manifests.items() if m is not None}, verify)
    found, known = [], []
    for folder, manifest in manifests.items():
        finished, written = manifest is not None, _at(manifest, "written_unix_s", default=0)
        if finished and not folder.exists:
            continue  # the run, which goes on meanwhile, has removed it
        passed_over = (
            finished
            and last is not None
            and folder.step > last.from_step
            and written < last.began_unix_s - 1
        )
        usable = finished and folder not in problems and not passed_over
        known.append((usable, _at(manifest, "state") is not None, folder.step, manifest or {}))
        found.append(
            {
                "step": folder.step,
                "written_unix_s": written or None,
                "bytes": sum(size for _, size in _files(manifest)),
                "world_size": _at(manifest, "world_size"),
                "reason": _at(manifest, "reason", default=""),
                "index": _at(manifest, "state", "curriculum", "pacing", "index"),
                "finished": finished,
                "problem": problems.get(folder),
                "passed_over": passed_over,
                "usable": usable,
            }
        )
    return found, max(known, key=lambda entry: entry[:3], default=({},))[-1]


def _manifest(folder: CheckpointDir) -> Facts | None:
    """None if there is none; empty if it cannot be read: `problem` says why."""
    try:
        return folder.manifest() if folder.exists else None
    except (CheckpointError, StorageError):
        return {}


def _files(manifest: Facts | None) -> list[tuple[str, int]]:
    """Names and bytes, in the order in which `problem` counts them."""
    files = _at(manifest, "files")
    return (
        sorted((name, _at(file, "bytes", default=0)) for name, file in files.items())
        if type(files) is dict
        else []
    )


def _problems(manifests: dict[CheckpointDir, Facts], verify: bool) -> dict[CheckpointDir, str]:
    problems = {folder: problem for folder in manifests if (problem := _problem(folder, slice(0)))}
    sound = [folder for folder in manifests if verify and folder not in problems]
    files = [
        (folder, i, size)
        for folder in sound
        for i, (_, size) in enumerate(_files(manifests[folder]))
    ]
    terminal, pool = sys.stderr.isatty(), ThreadPoolExecutor(4)
    bar = tqdm(
        total=sum(size for *_, size in files),
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
    """Also that it cannot be read at present. Raises NewerVersionError."""
    error = folder.check(part)
    if isinstance(error, NewerVersionError):
        raise error
    return str(error) if error else None


def _standing(last: Start | None, silence_s: float, patience_s: float, *, finished: bool) -> str:
    if last and last.ended is not None:
        return " ".join(last.ended.split())
    if finished or not last:
        return "finished" if finished else "running or not, its starts left no record"
    if silence_s < patience_s:
        return "running"
    return out_of_memory(last) or f"killed, or it hangs: no sign of life for {duration(silence_s)}"


def _curriculum(manifest: Facts, rows: list[Facts], last: list[Facts]) -> Facts:
    """As it was when it was last heard of: in the log, the checkpoint or a transition."""
    state, config = (
        _at(manifest, "state", "curriculum"),
        _at(manifest, "state", "config", "curriculum"),
    )
    edges, saved_step, index = (
        _at(state, "edges"),
        _at(manifest, "step", default=-1),
        _at(state, "pacing", "index"),
    )
    ways = {key: state[key] for key in ("order", "stages", "only_cluster") if key in (state or {})}
    lowest, highest = (
        active_levels(edges, index, **ways) if edges and index is not None else (None, None)
    )
    later = [row for row in rows if row.get("event") == "transition" and row["step"] > saved_step]
    keys = ("index", "lowest", "highest", "patience", "best_loss")
    pacing = _at(state, "pacing", default={})
    known = [
        *((row["step"], [row.get(f"curriculum/{key}") for key in keys]) for row in last),
        (
            saved_step,
            [index, lowest, highest, pacing.get("patience_count"), pacing.get("best_loss")],
        ),
        *(
            (row["step"], [row.get("index"), row.get("lowest"), row.get("highest", 1), 0, None])
            for row in later[-1:]
        ),
    ]
    return {
        **dict(
            zip(keys, max(known, key=lambda entry: entry[0])[1], strict=True)
        ),  # of the same step, the first
        "n_clusters": len(edges) - 1 if edges else None,
        "pacing": _at(config, "pacing"),
        "max_patience": _at(config, "patience"),
        "transitions": [
            *_at(state, "transitions", default=[]),
            *([row["step"], row.get("index")] for row in later),
        ],
    }


def describe(f: Facts) -> str:
    """Tables for a person who looks once in the morning, and a line of summary."""
    lines = _head(f)
    lines += _section(
        "losses", "step images/s index loss mse vb grad_norm", map(_log_row, f["log"])
    )
    reference = [*f["reference"][:1], *f["reference"][1:][-5:]]
    lines += _section(
        "loss on the reference set",
        "step loss",
        ((f"{step:,}", _number(loss)) for step, loss in reference),
    )
    lines += _section(
        "checkpoints",
        "step written size ranks why index state",
        (_checkpoint_row(c, f) for c in f["checkpoints"]),
    )
    lines += _section(
        "data that were left out",
        "from_step inputs_of why",
        ((f"{skip['at']:,}", _n(skip["count"], "step"), skip["why"]) for skip in f["skips"]),
    )
    lines += _section(
        "events",
        "step what",
        ((f"{row['step']:,}", row.get("text", row["event"])) for row in f["events"][-10:]),
    )
    lines += _section(
        "starts",
        "no. began job ranks from to lasted ended",
        (_start_row(start, f) for start in f["starts"][-20:]),
    )
    whole = Account(f["account"]["wall_s"], f["account"]["seconds"])
    kinds = whole.seconds.items() if whole.wall_s > 0 else ()
    lines += _section(
        str(whole),
        "share time for",
        ((f"{s / whole.wall_s:.1%}", duration(s), kind) for kind, s in kinds),
    )
    return "\n".join([*lines, "", _summary(f)])


def _head(f: Facts) -> list[str]:
    """The lines above the tables."""
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
    if m := f["model"]:
        shape = f"({m['in_channels']}, {m['input_size']}, {m['input_size']})"
        lines.append(f"model        {_model(m)}, on {shape}")
    lines += [
        f"training     {f['precision']}, batch {f['global_batch_size']}, "
        f"on {f['world_size']} x {f['device']}",
        f"curriculum   {now}",
    ]
    lines += [f"             {line}" for line in more]
    lines += [f"trouble      {problem}" for problem in f["problems"]]
    return lines


def _log_row(row: Facts) -> tuple[str, ...]:
    return (
        f"{row['step']:,}",
        _number(row.get("images_per_s"), ",.1f"),
        _number(row.get("curriculum/index"), "d"),
        *(_number(row.get(key)) for key in ("loss", "mse", "vb", "optimizer/grad_norm")),
    )


def _checkpoint_row(c: Facts, f: Facts) -> tuple[str, ...]:
    return (
        f"{c['step']:,}",
        _date(c["written_unix_s"]),
        _size(c["bytes"]),
        _number(c["world_size"], "d"),
        c["reason"],
        _number(c["index"], "d"),
        _state(c, f),
    )


def _start_row(start: Facts, f: Facts) -> tuple[str, ...]:
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
    return f"DiT, {m['depth']} blocks of width {m['hidden_size']}, {m['num_heads']} heads, patches of {m['patch_size']}"


def _curriculum_lines(c: Facts) -> list[str]:
    if c["index"] is None:
        return ["nothing is known yet"]
    now = f"index {c['index']}, "
    if c["index"] and c["n_clusters"]:
        now += f"{stage(c['index'], c['n_clusters'])}, "
    some = c["index"] or (c["lowest"], c["highest"]) not in ((0, 1), (None, None), (0, None))
    levels = f"[{_number(c['lowest'], '.3g')}, {_number(1 if c['highest'] is None else c['highest'], '.3g')})"
    now += f"training on u in {levels}" if some else "complete: all noise levels"
    if c["index"] and c["pacing"] == "patience":
        now += f", patience {_number(c['patience'], 'd')} of {c['max_patience']}, best loss {_number(c['best_loss'])}"
    history = ", ".join(f"{index} at {step:,}" for step, index in c["transitions"])
    return [
        now,
        *textwrap.wrap(f"transitions: {history}" if history else "no transition so far", 105),
    ]


def _state(c: Facts, f: Facts) -> str:
    if not c["finished"]:
        return "not finished"
    if c["problem"]:
        return "DAMAGED: " + c["problem"].replace(f"{Path(f['run'], 'checkpoints')}/", "")
    sound = "valid" if f["verified"] else "sizes right, hashes not checked"
    return (
        f"{sound}, but start {f['starts'][-1]['number']} passed it over"
        if c["passed_over"]
        else sound
    )


def _progress(f: Facts) -> str:
    return f"step {f['step']:,}" + (
        f" of {f['steps']:,} ({100 * f['step'] / f['steps']:.1f} %)" if f["steps"] else ""
    )


def _summary(f: Facts) -> str:
    done, index = [c for c in f["checkpoints"] if c["finished"]], f["curriculum"]["index"]
    sound = "all valid" if f["verified"] else "sizes right, hashes not checked"
    what = f"damaged: {', '.join(f'{step:,}' for step in f['damaged'])}" if f["damaged"] else sound
    newest = next((f"newest {c['step']:,}" for c in done if c["usable"]), "none can be used")
    return ", ".join(
        [
            f"{f['run']}: {_progress(f)}",
            *([f"curriculum index {index}"] if index is not None else []),
            _n(len(f["starts"]), "start") if f["starts"] else "starts not recorded",
            f"{_n(len(done), 'checkpoint')} ({what}; {newest})" if done else "no checkpoint yet",
            *([f"goodput {f['account']['goodput']:.0%}"] if f["starts"] else []),
        ]
    )


def _section(title: str, header: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table, each row on one line, the last column to the left; nothing where there are no
    rows."""
    table = [[name.replace("_", " ") for name in header.split()]]
    table += ([" ".join(cell.split()) for cell in row] for row in rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    laid = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in table]
    return ["", title, *(f"  {line}" for line in laid)] if len(table) > 1 else []


def _n(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _number(value: Any, how: str = ".4f") -> str:
    return format(value, how) if isinstance(value, int | float) else "-"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _date(unix_s: float | None) -> str:
    with contextlib.suppress(OverflowError, ValueError, OSError):  # of a year that there is not
        return datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S") if unix_s else "-"
    return "-"


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Status, args, program="largescale.status", description=__doc__)
    return run_program(lambda: run(options), "when it can be read, run again")


def run(options: Status) -> int:
    """1 if a checkpoint is damaged."""
    with usable(options.run):
        found = facts(options.run, options.verify)
        if options.json:
            # JSON has neither NaN nor infinity: these become words
            strict = json.loads(json.dumps(found), parse_constant=str)
            text = json.dumps(strict, indent=1)
        else:
            text = printable_lines(describe(found))
    print(text)
    return 1 if found["damaged"] else 0


if __name__ == "__main__":
    sys.exit(main())
