"""This process: its command line, its place among the ranks by the launcher's (torchrun's, srun's)
variables, its messages and its end."""

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
    """The arguments, by default of the command line, with ~ as the home directory."""
    return list(map(_expand_home, sys.argv[1:] if args is None else args))


def _expand_home(argument: str) -> str:
    # A shell does not expand it inside of an argument, as in --output=~/runs/x.
    match = re.fullmatch(r"(--[\w.-]+=)?(~.*)", argument)
    if match is None:
        return argument
    return (match[1] or "") + os.path.expanduser(match[2])


def env_int(
    *names: str, default: int, at_least: int = 0, env: Mapping[str, str] = os.environ
) -> int:
    """The first of these variables that is set and not empty. Raises ConfigError for one that is no
    whole number, or too small."""
    for name in names:
        text = env.get(name, "").strip()
        if not text:
            continue
        # Not by int() alone, which takes +1 and 1_0 too.
        if not text.isdecimal() or int(text) < at_least:
            raise ConfigError(
                f"{name}={text!r} in the environment must be a whole number of at least {at_least}; "
                "torchrun and srun set it, otherwise leave it unset"
            )
        return int(text)
    return default


def env_rank() -> int:
    return env_int("RANK", "SLURM_PROCID", default=0)


def env_world_size() -> int:
    # Not SLURM_NTASKS: that is set for the batch script too, which is one process.
    return env_int("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1, at_least=1)


def env_local_rank() -> int:
    return env_int("LOCAL_RANK", "SLURM_LOCALID", default=0)


def check_place_among_ranks() -> None:
    """Raise ConfigError for a launcher's variables that contradict each other or are no numbers."""
    rank = env_rank()
    world_size = env_world_size()
    env_local_rank()
    if rank >= world_size:
        error = ConfigError(
            f"RANK={rank} must be below WORLD_SIZE={world_size}; ranks are counted from 0, and "
            "torchrun and srun set both"
        )
        # There may be no rank 0 that prints it.
        error.agreed = False
        raise error


def local_world_size(env: Mapping[str, str]) -> int:
    """The number of ranks on this machine; all of them where the launcher sets none."""
    if env.get("LOCAL_WORLD_SIZE"):
        return env_int("LOCAL_WORLD_SIZE", default=1, at_least=1, env=env)

    # Slurm's is such as 4(x2),3: four on each of two nodes, three on the next.
    listed = env.get("SLURM_STEP_TASKS_PER_NODE")
    if listed:
        tasks_of_nodes: list[int] = []
        for part in listed.split(","):
            tasks, _, nodes = part.rstrip(")").partition("(x")
            tasks_of_nodes += [int(tasks)] * int(nodes or 1)
        return tasks_of_nodes[env_int("SLURM_NODEID", default=0, env=env)]
    return env_int("WORLD_SIZE", default=1, at_least=1, env=env)


def threads_per_rank(asked: int | None, env: Mapping[str, str], cores: int) -> int:
    """Threads of a rank on a CPU: what was asked for, else $OMP_NUM_THREADS, else its share of this
    machine's `cores`.

    Under torchrun OMP_NUM_THREADS=1 asks for the share; one thread is then --train.threads 1.
    Raises ConfigError for more than two threads a core.
    """
    ranks = local_world_size(env)
    torchrun = "TORCHELASTIC_RUN_ID" in env
    share = max(1, cores // ranks)
    if asked is not None:
        if asked > 2 * cores:
            raise ConfigError(
                f"train.threads={asked} is more than two threads a core: this machine has {cores} "
                f"for its {ranks} rank{'s' if ranks > 1 else ''}; try --train.threads {share}"
            )
        return asked

    # torchrun sets 1 for several ranks where the user sets nothing, which looks like a user's own
    # 1. It is a list where parallel regions are nested.
    omp = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    set_by_torchrun = torchrun and ranks > 1 and omp == "1"
    if omp.isdecimal() and int(omp) > 0 and not set_by_torchrun:
        return int(omp)

    # These are this rank's own cores, by its affinity: not to be shared again.
    if env.get("SLURM_CPUS_PER_TASK") and not torchrun:
        own = env_int("SLURM_CPUS_PER_TASK", default=1, at_least=1, env=env)
        return max(1, min(own, cores))
    return share


def heartbeat() -> None:
    """Show that this process does not hang; called now and then by what takes long outside of
    collectives, such as hashing."""
    if on_heartbeat:
        on_heartbeat()


on_heartbeat: Callable[[], None] | None = None


def leave(status: int) -> NoReturn:
    """End the process at once, with nothing left to do."""
    # tqdm's lock is a semaphore, which from Python 3.14 on has a name that must be removed.
    util: Any = multiprocessing.util
    util._run_finalizers(0)
    # Not by the interpreter's usual exit: now and then a thread of a process group or its store
    # still runs then, and aborts the process with another status (seen with torch 2.15).
    for stream in (sys.stdout, sys.stderr):
        # There is none where it was closed at the start, and nobody may read it any more.
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def tolerate_lost_output() -> None:
    """From now on this process works on whatever happens to its standard output and error: closed
    from the start, a full disk, a reader that is gone."""
    # A file that is opened later would take the number of a closed one, and what is printed.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        setattr(sys, name, _Tolerant(stream))


class _Tolerant:
    """A stream to which writing never fails."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: object) -> str:
    """The text on one line that a terminal shows and does not obey: characters that are not
    printable are spelt as Python spells them."""
    # These are control characters (escapes, line breaks), invisible ones, and halves of surrogate
    # pairs.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable_lines(text: object) -> str:
    """The text as by `printable`, but each line stays a line."""
    return "\n".join(map(printable, str(text).split("\n")))


def tell_torchrun(text: str) -> None:
    """Give torchrun the reason for an exit status other than 0: the last line of its report, which
    otherwise is that no error file was found."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # By the time, torchrun shows that of the rank which ended first.
        extra = {"timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def print_error(error: LargescaleError) -> None:
    """Print an error once: rank 0 those that all ranks have, any other rank only its own."""
    # It can contain names of files from elsewhere.
    text = printable_lines(error)
    tell_torchrun(text)
    try:
        rank = env_rank()
    except ConfigError:
        rank = 0  # the error may be about that
    if rank == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif not error.agreed:
        print(f"error on rank {rank}: {text}", file=sys.stderr, flush=True)
