"""How a run stands, from the files in its folder, as plain values. Changes nothing."""

import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from largescale.checkpoint.files import CheckpointDir, step_folders
from largescale.config.serialise import flatten
from largescale.curriculum import active_levels
from largescale.errors import CheckpointError, NewerVersionError, StorageError
from largescale.monitoring.run_log import LogReader
from largescale.monitoring.run_record import (
    Start,
    account,
    duration,
    out_of_memory,
    read_starts,
)

# A run that takes steps updates its record every few seconds; one that evaluates or starts up does
# not.
SILENT_S = 900.0

Facts = dict[str, Any]

# Noise levels of a stage, in events and in rows of metrics.
_LEVELS = ("lowest", "highest", "curriculum/lowest", "curriculum/highest")
_KINDS_OF_VALUES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("event", "text"), (str,)),
    **dict.fromkeys(("index", "curriculum/index", "curriculum/patience"), (int,)),
    **dict.fromkeys(("images_per_s", *_LEVELS), (int, float)),
}


def facts(run_dir: Path, verify: bool = True, log: LogReader | None = None) -> Facts:
    """How a run stands, as plain values. Raises CheckpointError where there is no run.

    `log`: what reads the run's log, where it is read again later or its numbers are wanted too."""
    _require_run(run_dir)
    now = time.time()
    starts, rows, problems = _records(run_dir, log or LogReader(run_dir))
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
    # The last step may still wait for room on a full disk.
    saved = max((c["step"] for c in found if c["usable"]), default=-1)
    finished = bool(steps) and saved >= steps
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
        "starts": _starts(starts),
        "settings": _settings(starts, manifest),
        "account": {"wall_s": spent.wall_s, "goodput": spent.goodput, "seconds": spent.seconds},
    }


def _starts(starts: list[Start]) -> list[Facts]:
    """The records of all starts; in place of each one's settings what it changed."""
    found = []
    before: Facts = {}
    for start in starts:
        record = dataclasses.asdict(start)
        settings = dict(flatten(record.pop("settings")))
        record["changed"] = []
        # A start of an older version recorded none.
        if before and settings:
            for key in sorted(before.keys() | settings.keys()):
                if before.get(key) != settings.get(key):
                    change = f"{key}: {before.get(key)} -> {settings.get(key)}"
                    record["changed"].append(change)
        before = settings or before
        found.append(record)
    return found


def _settings(starts: list[Start], manifest: Facts) -> Facts:
    """The settings of the last start that recorded them, or of the best checkpoint, by their full
    names."""
    for start in reversed(starts):
        if start.settings:
            return dict(flatten(start.settings))
    config = _at(manifest, "state", "config", default={})
    return dict(flatten(config)) if isinstance(config, dict) else {}


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


def _records(run_dir: Path, log: LogReader) -> tuple[list[Start], list[Facts], list[str]]:
    """(the run's starts, the rows of its log, what of these could not be read)."""
    starts = read_starts(run_dir)
    rows, problems = _metrics(run_dir, log)
    unread = len(list((run_dir / "starts").glob("start_*.json"))) - len(starts)
    if unread > 0:
        problems.append(
            f"records in {run_dir / 'starts'} that cannot be read, and are left out: {unread}"
        )
    return starts, rows, problems


def _metrics(run_dir: Path, log: LogReader) -> tuple[list[Facts], list[str]]:
    path = run_dir / "metrics.jsonl"
    try:
        found = log.read()
    except OSError as error:
        return [], [f"{path} cannot be read: {error}"]
    rows = list(filter(_is_ours, found.rows))
    odd = found.problems + len(found.rows) - len(rows)
    return rows, [f"lines of {path} that are no rows, and are left out: {odd}"] * (odd > 0)


def _is_ours(row: Facts) -> bool:
    """Whether a row has what training writes in what is shown as more than a number of a curve."""
    for key, kinds in _KINDS_OF_VALUES.items():
        if key in row and type(row[key]) not in kinds:
            return False
    return all(0 <= row.get(key, 0) <= 1 for key in _LEVELS)


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
        "stages": _stages(state, rows, latest[:3], transitions),
        **dict(zip(keys, latest, strict=True)),
        "n_clusters": len(edges) - 1 if edges else None,
        "pacing": _at(config, "pacing"),
        "max_patience": _at(config, "patience"),
        "transitions": transitions,
    }


def _stages(
    state: Any, rows: list[Facts], latest: list[Any], transitions: list[Any]
) -> list[list[Any]]:
    """[first step, index, lowest, highest active noise level] of each stage so far; levels that are
    not known are None. `latest`: what is known of the present one."""
    levels = {latest[0]: latest[1:]}
    for row in rows:
        index = row.get("index", row.get("curriculum/index"))
        for prefix in ("", "curriculum/"):
            if f"{prefix}lowest" in row:
                highest = row.get(f"{prefix}highest", 1.0)
                levels[index] = [row[f"{prefix}lowest"], highest]

    # The clusters of the checkpoint say it of every index. An index counts down by one.
    clusters = len(_at(state, "edges", default=())) - 1
    first = transitions[0][1] + 1 if transitions else latest[0]
    stages = []
    for step, index in [[0, first], *transitions]:
        if index is None:
            continue
        known = levels.get(index, [None, None])
        if 0 <= index <= clusters:
            _, lowest, highest, *_ = _saved_curriculum({**state, "pacing": {"index": index}})
            known = [lowest, highest]
        stages.append([step, index, *known])
    return stages


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
