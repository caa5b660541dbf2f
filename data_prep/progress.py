"""How far packing has come, over all ranks, and when it will end.

OUT/packing/plan.json        how many images and parts there are
OUT/packing/rank_0.json ...  what each rank has done in the last minutes
"""

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largescale.data.format import MANIFEST
from largescale.data.job_folder import APPEND, JOB
from largescale.data.parts import engine_at_work
from largescale.host.files import from_json
from largescale.host.lease import identity, is_gone

# Seconds between two reports of a rank, the time that a rate is of, and that after which a rank that
# reports nothing is no longer at work.
EVERY_S = 5.0
WINDOW_S = 300.0
SILENT_S = 120.0

Fact = tuple[str, str]


class Progress:
    """What a rank tells of its work: in a file, and on its progress bar."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        bar: Any,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bar = bar
        self._file = folder / f"rank_{rank}.json"
        self._about = {"rank": rank, "world_size": world_size, "process": identity()}
        self._clock = clock
        self.images = 0  # counted so far
        # (time, images until then) in the last minutes.
        self._history = deque([(clock(), 0)])
        self._write()

    def update(self, images: int = 1) -> None:
        """Counts images that are packed, or left out."""
        self._bar.update(images)
        self.images += images
        now = self._clock()
        if now - self._history[-1][0] >= EVERY_S:
            self._history.append((now, self.images))
            # Only the last minutes count: the rate says how fast packing is now.
            while now - self._history[0][0] > WINDOW_S:
                self._history.popleft()
            self._write()

    def left_out(self, images: int) -> None:
        """Shows how many images of this part were left out."""
        self._bar.set_postfix(skipped=images, refresh=False)

    def _write(self) -> None:
        report = {**self._about, "time": self._clock()}
        # It is no loss where it cannot be written: the disk may be full, or the folder gone.
        temporary = self._file.with_suffix(".json.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(report | {"history": list(self._history)}))
            os.rename(temporary, self._file)


def write_plan(folder: Path, images: int | None, parts: int, skipped: int) -> None:
    """Notes how much there is to do. `skipped`: what was left out before any image is read."""
    plan = {"images": images, "parts": parts, "skipped": skipped}
    # All ranks write the same plan, each by a file of its own; two nodes may have the same process id.
    temporary = folder / f"plan.json.{uuid.uuid4().hex}.tmp"
    temporary.write_text(json.dumps(plan))
    os.rename(temporary, folder / "plan.json")


@dataclass
class _Done:
    """What the records of all parts add up to."""

    images: int = 0
    parts: set[int] = field(default_factory=set)  # that are done
    of_whole_parts: int = 0  # images of the parts that are done
    skipped: int = 0


def counted(folder: Path, rank: int) -> int:
    """How many images a rank has reported since it began; 0 where it has reported nothing."""
    report = _read(folder / f"rank_{rank}.json")
    return int(report["history"][-1][1]) if report else 0


def is_being_packed(out: Path) -> bool:
    """Whether the folder's set, or an addition to it, is not done."""
    if not (out / JOB).is_file():
        return False
    # Left by a kill after the manifest was written.
    return not (out / MANIFEST).exists() or APPEND in (_read(out / JOB) or {})


def describe_packing(out: Path, now: float | None = None) -> list[Fact]:
    """Names and values of how far packing into a folder has come."""
    folder = out / "packing"
    now = time.time() if now is None else now
    job = _read(out / JOB) or {}
    plan = _read(folder / "plan.json") or {}
    done = _count(folder)
    ranks = sorted(filter(None, map(_read, folder.glob("rank_*.json"))), key=lambda r: r["rank"])

    what = "adding to it" if APPEND in job else "packing"
    total, of_parts = plan.get("images"), plan.get("parts")
    facts = [(what, f"{job.get('info', {}).get('name', '')}{_of(done, total, of_parts)}")]
    # An end that is expected, from the parts where the images are not counted before they are read.
    expected = total
    if total is None and of_parts and done.parts:
        expected = done.of_whole_parts * of_parts // len(done.parts)
    facts.append(("rate", _rate(ranks, now, done, expected)))
    facts.append(("ranks", _ranks(folder, ranks, now, done.parts, of_parts or 0)))
    facts.append(("left out", f"{done.skipped + plan.get('skipped', 0):,} so far"))
    return facts


def _count(folder: Path) -> _Done:
    done = _Done()
    for path in folder.glob("part_*.json"):
        # Rank 0 may remove these files meanwhile, once all is packed.
        record = _read(path) or {}
        images = record.get("items", 0)
        done.images += images
        done.skipped += len(record.get("skipped", ()))
        if record.get("done"):
            done.parts.add(int(path.stem.removeprefix("part_")))
            done.of_whole_parts += images
    return done


def _of(done: _Done, total: int | None, parts: int | None) -> str:
    images = f": {done.images:,}"
    if total:
        images += f" of {total:,} images ({done.images / total:.1%})"
    else:
        images += " images"
    return f"{images}, {len(done.parts):,} of {parts:,} parts" if parts else images


def _rate(ranks: list[dict[str, Any]], now: float, done: _Done, expected: int | None) -> str:
    """Images a second of the ranks at work, and how long the rest takes them."""
    rate, span = 0.0, 0.0
    # Ranks work side by side, so that their rates add up; one that is silent adds nothing.
    for rank in ranks:
        (begin, before), (end, after) = rank["history"][0], rank["history"][-1]
        if _is_at_work(rank, now) and end > begin:
            rate += (after - before) / (end - begin)
            span = max(span, end - begin)
    if not rate:
        fresh = any(_is_at_work(rank, now) for rank in ranks)
        return "not known yet" if fresh else "none: no rank is at work"
    text = f"{rate:,.1f} images/s over the last {span / 60:.1f} minutes"
    if expected is None:
        return text
    # The expected number may be an estimate, and more be packed by now.
    left = max(expected - done.images, 0) / rate
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + left))
    return f"{text}; done in about {_duration(left)}, at {at}"


def _is_at_work(report: dict[str, Any], now: float) -> bool:
    """Whether a rank works, by its last report: one of this machine while its process runs. Reports of
    older versions, and of other machines, tell no more than when they were written."""
    return now - report["time"] < SILENT_S and not is_gone(report.get("process", {}))


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 1:
        return "a minute"
    days, minutes = divmod(minutes, 24 * 60)
    hours, minutes = divmod(minutes, 60)
    named = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join(f"{number} {unit}" for number, unit in named if number)


def _ranks(
    folder: Path, ranks: list[dict[str, Any]], now: float, done: set[int], parts: int
) -> str:
    """Which ranks are at work, are done, or are heard of no more."""
    # Those of an earlier start, with more ranks, are not expected.
    newest = max(ranks, key=lambda rank: rank["time"], default=None)
    world_size = newest["world_size"] if newest else 0
    here = {rank["rank"]: rank for rank in ranks if rank["world_size"] == world_size}
    engine = engine_at_work(folder)
    if engine:
        # It deals parts out: none is expected of a worker that is gone, or has nothing to do.
        working = sum(_is_at_work(rank, now) for rank in here.values())
        return f"{working} of {world_size} workers of {engine} at work"
    working, ended, lost = 0, 0, []
    for number in range(world_size):
        failed = folder / f"failed_{number}"
        if failed.exists():
            lost.append(f"rank {number} has failed: {failed.read_text()}")
        elif done.issuperset(range(number, parts, world_size)):
            ended += 1
        elif number not in here:
            lost.append(f"rank {number} has not begun")
        elif _is_at_work(here[number], now):
            working += 1
        elif is_gone(here[number].get("process", {})):
            lost.append(f"rank {number} has ended")
        else:
            silent = _duration(now - here[number]["time"])
            lost.append(f"rank {number} silent for {silent}, dead or stuck")
    text = f"{working} of {world_size} at work"
    if ended:
        text += f", {ended} done"
    # A machine that is gone takes all of its ranks along; a few of them are enough to find it.
    return "; ".join([text, *lost[:8]])


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = from_json(path.read_bytes())
        return found if isinstance(found, dict) else None
    return None
