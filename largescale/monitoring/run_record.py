"""One record for each start of a run, and what became of the time: RUN/starts/start_00001.json and
so on.

Rank 0 writes its record anew, whole, whenever it logs, so that a kill costs at most that much of
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
from largescale.host.machine import memory_bound

KINDS = ("training", "data", "evaluation", "checkpoint", "compile", "start-up")
"""Where a start's seconds go: steps; waiting for data; previews and reference losses; standing
still for checkpoints; the first step, in which kernels are loaded and compiled; everything before
that."""

_MOST = 1e11  # of a record's numbers: seconds since 1970 in the year 5138


@dataclass
class Start:
    number: int  # 1, 2, ...
    began_unix_s: float
    world_size: int
    device: str
    from_step: int  # the step that was resumed; 0 for a new run
    job: str | None = None  # Slurm's job id ...
    restart: int = 0  # ... and how often Slurm had started that job before
    host: str = ""  # rank 0's
    memory: str = ""  # its memory cgroup that has a limit ...
    oom_kills: int = (
        0  # ... and how many processes the kernel had killed there, or on the host, for memory
    )
    step: int = 0  # applied so far, as far as known
    saved_step: int = -1  # of the newest checkpoint that this start knew to be whole
    seen_unix_s: float = 0.0  # when this record was written last
    seconds: dict[str, float] = field(default_factory=dict)  # by KINDS
    ended: str | None = None  # how; None while it runs, and for good if it was killed

    @property
    def made_progress(self) -> bool:
        """Whether the next start finds a later step than this one did."""
        return self.saved_step > self.from_step


def read_starts(run_dir: Path) -> list[Start]:
    """In order. One that cannot be read, which a full disk can leave behind, is left out."""
    known = {f.name for f in dataclasses.fields(Start)}
    starts = []
    for path in sorted((run_dir / "starts").glob("start_*.json")):
        try:
            record: dict[str, Any] = from_json(path.read_text())
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
            words = (start.device, start.host, start.memory, start.job or "", start.ended or "")
            if all(-1 <= number < _MOST for number in numbers) and all(
                isinstance(word, str) for word in words
            ):
                starts.append(start)
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return sorted(starts, key=lambda start: start.number)


def begin(
    run_dir: Path, *, began_unix_s: float, world_size: int, device: str, from_step: int
) -> Start:
    """A record with the next number, not written yet."""
    numbers = [
        int(m[1])
        for p in (run_dir / "starts").glob("*")
        if (m := re.fullmatch(r"start_(\d+)\.json", p.name))
    ]
    bound = memory_bound()
    return Start(
        number=max(numbers, default=0) + 1,
        began_unix_s=began_unix_s,
        world_size=world_size,
        device=device,
        from_step=from_step,
        step=from_step,
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        host=socket.gethostname(),
        memory=str((bound and bound.folder) or ""),
        oom_kills=bound.kills() if bound else 0,
    )


def out_of_memory(start: Start) -> str | None:
    """What to say of a start that left no word of its end, where the kernel counts a kill for
    memory since it began."""
    bound = memory_bound()
    if start.ended is not None or bound is None:
        return None
    if (start.host, start.memory) != (socket.gethostname(), str(bound.folder or "")):
        return None
    return bound.killed_since(start.oom_kills)


def note_end(run_dir: Path, began_unix_s: float, ended: str) -> None:
    """How the start ended that was seen since `began_unix_s`, where rank 0 may be gone. Raises
    OSError."""
    last = read_starts(run_dir)[-1:]
    if last and last[0].ended is None and last[0].seen_unix_s >= began_unix_s:
        last[0].ended = ended
        write(run_dir, last[0], seen=False)


def write(run_dir: Path, start: Start, *, seen: bool = True) -> None:
    """`seen`: it runs at present. Raises OSError."""
    if seen:
        start.seen_unix_s = time.time()
    folder = run_dir / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / f"start_{start.number:05d}.json", json.dumps(dataclasses.asdict(start), indent=1)
    )


@dataclass(frozen=True)
class Account:
    """What became of a run's time, from its first start until it was last seen."""

    wall_s: float
    seconds: dict[str, float]
    """By KINDS, and: replayed (steps that a later start took again), idle (nothing ran), other."""

    def __add__(self, other: "Account") -> "Account":
        return Account(
            self.wall_s + other.wall_s,
            {kind: s + other.seconds[kind] for kind, s in self.seconds.items()},
        )

    @property
    def goodput(self) -> float:
        """The share of the wall time in which steps were taken that stayed."""
        return self.seconds["training"] / self.wall_s if self.wall_s > 0 else 0.0

    def __str__(self) -> str:
        lost = sorted(
            ((s, kind) for kind, s in self.seconds.items() if kind != "training"), reverse=True
        )
        shares = ", ".join(
            f"{kind} {s / self.wall_s:.1%}" for s, kind in lost if s > 5e-4 * self.wall_s
        )
        return f"goodput {self.goodput:.1%} of {duration(self.wall_s)}" + (
            f" ({shares})" if shares else ""
        )


def account(starts: Iterable[Start]) -> Account:
    """Nothing in it is negative, also where a clock was set back."""
    seconds = dict.fromkeys((*KINDS, "replayed", "idle", "other"), 0.0)
    wall_s, later, lowest = (
        0.0,
        None,
        math.inf,
    )  # lowest: where the one that fell back furthest went on
    for start in reversed(list(starts)):
        own = {kind: start.seconds.get(kind, 0.0) for kind in KINDS}
        span = max(start.seen_unix_s - start.began_unix_s, sum(own.values()))
        idle = max(0.0, later.began_unix_s - start.seen_unix_s) if later else 0.0
        wall_s += span + idle
        seconds["other"] += max(0.0, span - sum(own.values()))
        seconds["idle"] += idle
        lost = start.step - max(start.from_step, lowest)
        if lost > 0:  # taken again later: a share of the time in which steps were taken
            for kind in ("training", "data", "evaluation", "compile"):
                again = own[kind] * lost / (start.step - start.from_step)
                own[kind] -= again
                seconds["replayed"] += again
        for kind in KINDS:
            seconds[kind] += own[kind]
        later, lowest = start, min(lowest, start.from_step)
    return Account(wall_s, seconds)


def duration(seconds: float) -> str:
    """Such as '3 d 4 h', '2 h 5 min', '12 min', '8.0 s'."""
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
