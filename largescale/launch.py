"""What the launcher (torchrun, srun) says of this process, before anything is initialised."""

import os
import sys
from typing import NoReturn

from largescale.errors import LargescaleError


def env_rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def env_world_size() -> int:
    # Not SLURM_NTASKS: that is set for the batch script too, which is one process.
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))


def env_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def leave(status: int) -> NoReturn:
    """End the process with nothing left to do. Not by the interpreter's way out: now and then a thread of a process
    group or its store is still there then, and aborts the process with another status (seen with torch 2.15)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def print_error(error: LargescaleError) -> None:
    """One line, once: from rank 0 what all ranks know, from any other what it alone met."""
    if env_rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not error.agreed:
        print(f"error on rank {env_rank()}: {error}", file=sys.stderr, flush=True)
