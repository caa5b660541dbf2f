"""What the launcher (torchrun, srun) says of this process, before anything is initialised."""

import contextlib
import json
import multiprocessing.util
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from largescale.errors import ConfigError, LargescaleError


def arguments(args: Sequence[str] | None = None) -> list[str]:
    """The command line's by default. ~ is the home directory, also where the shell leaves it: in
    --output=~/runs/x."""
    given = sys.argv[1:] if args is None else args
    return [
        re.sub(r"^(--[\w.-]+=)?(~.*)$", lambda m: (m[1] or "") + os.path.expanduser(m[2]), arg)
        for arg in given
    ]


def env_rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def env_world_size() -> int:
    # Not SLURM_NTASKS: that is set for the batch script too, which is one process.
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))


def env_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def local_world_size(env: Mapping[str, str]) -> int:
    """Ranks on this machine; where the launcher does not say, all of them count as being here."""
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    if listed := env.get(
        "SLURM_STEP_TASKS_PER_NODE"
    ):  # as 4(x2),3: four on each of two nodes, three on the next
        parts = [part.rstrip(")").split("(x") for part in listed.split(",")]
        nodes = [
            int(part[0]) for part in parts for _ in range(int(part[1]) if len(part) > 1 else 1)
        ]
        return nodes[int(env.get("SLURM_NODEID", 0))]
    return int(env.get("WORLD_SIZE", 1))


def threads_per_rank(asked: int | None, env: Mapping[str, str], cores: int) -> int:
    """Threads of a rank on a CPU: what was asked for, else $OMP_NUM_THREADS, else its share of this
    machine's `cores`.

    torchrun sets OMP_NUM_THREADS=1 for several ranks where the user sets nothing. That cannot be
    told from a user's own 1, so under torchrun 1 asks for the share; one thread is then
    --train.threads 1. Raises ConfigError for more than two threads a core.
    """
    ranks, torchrun = local_world_size(env), "TORCHELASTIC_RUN_ID" in env
    share = max(1, cores // ranks)
    if asked is not None:
        if asked > 2 * cores:
            raise ConfigError(
                f"train.threads={asked} is more than two threads a core: this machine has {cores} "
                f"for its {ranks} rank{'s' if ranks > 1 else ''}; try --train.threads {share}"
            )
        return asked
    omp = (
        env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    )  # a list where parallel regions are nested
    if omp.isdecimal() and int(omp) > 0 and not (torchrun and ranks > 1 and omp == "1"):
        return int(omp)
    if (
        "SLURM_CPUS_PER_TASK" in env and not torchrun
    ):  # this rank's own, by its affinity: not to be shared again
        return max(1, min(int(env["SLURM_CPUS_PER_TASK"]), cores))
    return share


def heartbeat() -> None:
    """Said now and then by what takes long outside of collectives, such as hashing: this process
    does not hang."""
    if on_heartbeat:
        on_heartbeat()


on_heartbeat: Callable[[], None] | None = None


def leave(status: int) -> NoReturn:
    """End the process with nothing left to do. Not by the interpreter's way out: now and then a
    thread of a process group or its store is still there then, and aborts the process with another
    status (seen with torch 2.15)."""
    util: Any = multiprocessing.util
    util._run_finalizers(
        0
    )  # tqdm's lock is a semaphore, which from Python 3.14 on has a name that must be taken back
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def printable(text: object) -> str:
    """`text` on one line that a terminal shows and does not obey: control characters (its escapes,
    line breaks), invisible ones and halves of surrogate pairs are spelt as Python spells them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable_lines(text: object) -> str:
    """`printable`, but that lines stay lines."""
    return "\n".join(map(printable, str(text).split("\n")))


def tell_torchrun(text: str) -> None:
    """Of a process that ends with another status than 0: torchrun shows this as the last line of
    its report, where it otherwise says that no error file was found."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            extra = {
                "timestamp": int(time.time())
            }  # of several ranks torchrun shows the one that ended first
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def print_error(error: LargescaleError) -> None:
    """Once: from rank 0 what all ranks know, from any other what it alone met."""
    text = printable_lines(error)  # names from outside stand in it
    tell_torchrun(text)
    if env_rank() == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif not error.agreed:
        print(f"error on rank {env_rank()}: {text}", file=sys.stderr, flush=True)
