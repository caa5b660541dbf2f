"""One record for each start of a run, in RUN/starts/start_00001.json and so on, and the account of
the run's time.

Rank 0 writes its complete record again whenever it logs, so that a kill loses at most that much of
the account.
"""

import dataclasses
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largescale.host.files import from_json, write_atomically
from largescale.host.launch import env_int
from largescale.host.machine import memory_bound

# Where a start's seconds go: steps; waiting for data; previews and reference losses; standing still
# for checkpoints; the first step, in which kernels are loaded and compiled; everything before that.
KINDS = ("training", "data", "evaluation", "checkpoint", "compile", "start-up")

# The largest number that a record can have: seconds since 1970 in the year 5138.
_MOST = 1e11


@dataclass
class Start:
    """What is known of one start of a run."""

    # 1, 2, ...
    number: int
    began_unix_s: float
    world_size: int
    device: str
    # The step that was resumed; 0 for a new run.
    from_step: int
    # Slurm's job id, and how often Slurm had started that job before.
    job: str | None = None
    restart: int = 0
    # Rank 0's host, its memory cgroup that has a limit, and how many processes the kernel had
    # killed for memory there, or without such a cgroup on the host.
    host: str = ""
    memory: str = ""
    oom_kills: int = 0
    # Applied so far, as far as known.
    step: int = 0
    # The step of the newest checkpoint that this start knew to be valid.
    saved_step: int = -1
    # When this record was written last.
    seen_unix_s: float = 0.0
    # By KINDS.
    seconds: dict[str, float] = field(default_factory=dict)
    # How it ended; None while it runs, and for ever if it was killed.
    ended: str | None = None
    # Its settings, by section.
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def made_progress(self) -> bool:
        """Whether the next start finds a later step than this one did."""
        return self.saved_step > self.from_step


def read_starts(run_dir: Path) -> list[Start]:
    """A run's starts, in order, without records that cannot be read."""
    starts = []
    for path in sorted((run_dir / "starts").glob("start_*.json")):
        # A full disk can leave a damaged one behind.
        try:
            start = _start_of(from_json(path.read_text()))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
        starts.append(start)
    return sorted(starts, key=lambda start: start.number)


def _start_of(record: dict[str, Any]) -> Start:
    """The start that this record describes. Raises ValueError, TypeError or AttributeError where
    its values cannot be right."""
    # A newer version may have more fields.
    known = {f.name for f in dataclasses.fields(Start)}
    start = Start(**{key: value for key, value in record.items() if key in known})

    numbers = (
        start.number,
        start.world_size,
        start.restart,
        start.oom_kills,
        start.from_step,
        start.step,
        start.saved_step,
        start.began_unix_s,
        start.seen_unix_s,
        *start.seconds.values(),
    )
    # Not by min and max, which a NaN can escape.
    for number in numbers:
        if not -1 <= number < _MOST:
            raise ValueError(f"{number} is not a number of a record")
    job = "" if start.job is None else start.job
    ended = "" if start.ended is None else start.ended
    for word in (start.device, start.host, start.memory, job, ended):
        if not isinstance(word, str):
            raise TypeError(f"{word} is not a word")
    if not isinstance(start.settings, dict):
        raise TypeError(f"{start.settings} are not settings")
    return start


def begin(
    run_dir: Path,
    *,
    began_unix_s: float,
    world_size: int,
    device: str,
    from_step: int,
    settings: dict[str, Any],
) -> Start:
    """A record with the next number, not written yet."""
    # Records that cannot be read keep their numbers too.
    last = 0
    for path in (run_dir / "starts").glob("*"):
        match = re.fullmatch(r"start_(\d+)\.json", path.name)
        if match:
            last = max(last, int(match[1]))

    bound = memory_bound()
    return Start(
        number=last + 1,
        began_unix_s=began_unix_s,
        world_size=world_size,
        device=device,
        from_step=from_step,
        settings=settings,
        step=from_step,
        job=os.environ.get("SLURM_JOB_ID"),
        restart=env_int("SLURM_RESTART_COUNT", default=0),
        host=socket.gethostname(),
        memory=str((bound and bound.folder) or ""),
        oom_kills=bound.kills() if bound else 0,
    )


def out_of_memory(start: Start) -> str | None:
    """How a start ended that recorded no end, where the kernel has counted a kill for memory since;
    else None."""
    bound = memory_bound()
    if start.ended is not None or bound is None:
        return None
    # The count is that of this machine and cgroup: of another one nothing is known.
    if (start.host, start.memory) != (socket.gethostname(), str(bound.folder or "")):
        return None
    return bound.killed_since(start.oom_kills)


def note_end(run_dir: Path, began_unix_s: float, ended: str) -> None:
    """Record how the start ended that was seen since `began_unix_s`, for rank 0, which may be gone.
    Raises OSError."""
    starts = read_starts(run_dir)
    if not starts:
        return
    # Not an earlier start's record, nor one that rank 0 has ended itself.
    last = starts[-1]
    if last.ended is None and last.seen_unix_s >= began_unix_s:
        last.ended = ended
        write(run_dir, last, seen=False)


def write(run_dir: Path, start: Start, *, seen: bool = True) -> None:
    """Write the record of a start. `seen`: it runs at present. Raises OSError."""
    if seen:
        start.seen_unix_s = time.time()
    folder = run_dir / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps(dataclasses.asdict(start), indent=1)
    write_atomically(folder / f"start_{start.number:05d}.json", record)


@dataclass(frozen=True)
class Account:
    """How a run's time was spent, from its first start until it was last seen."""

    wall_s: float
    # By KINDS, and: replayed (steps that a later start took again), idle (nothing ran), other.
    seconds: dict[str, float]

    def __add__(self, other: "Account") -> "Account":
        seconds = {kind: s + other.seconds[kind] for kind, s in self.seconds.items()}
        return Account(self.wall_s + other.wall_s, seconds)

    @property
    def goodput(self) -> float:
        """The share of the wall time in which steps were taken that were not replayed."""
        return self.seconds["training"] / self.wall_s if self.wall_s > 0 else 0.0

    def __str__(self) -> str:
        # What cost most comes first, and what would be shown as 0.0 % is not.
        shares = []
        for kind in sorted(self.seconds, key=lambda kind: (self.seconds[kind], kind), reverse=True):
            seconds = self.seconds[kind]
            if kind != "training" and seconds > 5e-4 * self.wall_s:
                shares.append(f"{kind} {seconds / self.wall_s:.1%}")
        text = f"goodput {self.goodput:.1%} of {duration(self.wall_s)}"
        return f"{text} ({', '.join(shares)})" if shares else text


def account(starts: Iterable[Start]) -> Account:
    """Account for the time of these starts. Nothing in it is negative, also where a clock was set
    back."""
    seconds = dict.fromkeys((*KINDS, "replayed", "idle", "other"), 0.0)
    wall_s = 0.0
    # From the last start to the first: the start after this one, and the lowest step from which a
    # later one continued.
    later: Start | None = None
    lowest = math.inf
    for start in reversed(list(starts)):
        # The time that this start took, and until the next one.
        own = {kind: start.seconds.get(kind, 0.0) for kind in KINDS}
        span = max(start.seen_unix_s - start.began_unix_s, sum(own.values()))
        idle = max(0.0, later.began_unix_s - start.seen_unix_s) if later else 0.0
        wall_s += span + idle
        seconds["other"] += max(0.0, span - sum(own.values()))
        seconds["idle"] += idle

        # Steps that were taken again later: their share of the time in which steps were taken.
        lost = start.step - max(start.from_step, lowest)
        if lost > 0:
            for kind in ("training", "data", "evaluation", "compile"):
                again = own[kind] * lost / (start.step - start.from_step)
                own[kind] -= again
                seconds["replayed"] += again

        for kind in KINDS:
            seconds[kind] += own[kind]
        later = start
        lowest = min(lowest, start.from_step)
    return Account(wall_s, seconds)


def duration(seconds: float) -> str:
    """A time in words, such as '3 d 4 h', '2 h 5 min', '12 min', '8.0 s'."""
    # Above, it would be rounded to 60.0 s.
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
