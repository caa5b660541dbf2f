"""python -m largescale.requeue RUN --status S: whether a batch script shall have Slurm start its
job again.

Exit status 0: yes; 1: no; the reason is one line on stderr. Crashed or stopped in good order, a job
goes on for as long as its starts get further. How many there were is known from
SLURM_RESTART_COUNT, what they reached from RUN. Without SLURM_JOB_ID there is no job to start
again: no.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from largescale.checkpoint.files import CheckpointDir, checkpoints
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.errors import CheckpointError, StorageError
from largescale.host.machine import KILL
from largescale.host.signals import EXIT_REQUEUE
from largescale.monitoring.run_record import Start, out_of_memory, read_starts

PATIENCE_WITH_STOPS = 4


@dataclass(frozen=True)
class Requeue:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/dit_l2_imagenet256. One that is missing counts as one without
    checkpoints."""
    status: int
    """The exit status of the training program."""
    max_restarts: int = 5
    """How many starts in a row may bring no new checkpoint before a human must look; four times as
    many where the last one was asked to stop, as when it is preempted while it starts."""


def decide(
    run_dir: Path, status: int, max_restarts: int, job: str | None, restart: int
) -> tuple[bool, str]:
    """(whether to start `job` again, why). `restart`: how often Slurm has done so before. Raises
    OSError."""
    if status == 0:
        return False, "the run is finished"
    if status == 2:
        return (
            False,
            "status 2 is an error that another start would meet again; what to correct is said "
            "above",
        )
    if job is None:
        return (
            False,
            "SLURM_JOB_ID is not set, so this is no job of Slurm's; run the same command again to "
            "go on",
        )
    starts_without_progress = restart - last_start_with_progress(run_dir, job)
    ends = [start.ended or out_of_memory(start) or "" for start in read_starts(run_dir)[-1:]]
    killed = "".join(f"; {end}" for end in ends if KILL in end)
    if status == EXIT_REQUEUE:
        max_restarts *= PATIENCE_WITH_STOPS
    if starts_without_progress >= max_restarts:
        row = (
            "a start"
            if starts_without_progress == 1
            else f"{starts_without_progress} starts in a row"
        )
        return False, (
            f"{row} of job {job} ended without a new checkpoint (the last with status {status}); "
            f"look at the log above, correct the cause, and sbatch again{killed}"
        )
    how = "stopped in good order" if status == EXIT_REQUEUE else f"ended with status {status}"
    brought = (
        f"{starts_without_progress} in a row without a new checkpoint, {max_restarts} are too many"
        if starts_without_progress
        else "with a new checkpoint"
    )
    return True, f"this one of job {job} {how}, {brought}{killed}"


def last_start_with_progress(run_dir: Path, job: str) -> int:
    """The `restart` of the job's last start that brought the run further; -1 if none did."""
    starts = read_starts(run_dir)
    fruitful = [-1]
    for start, later in itertools.zip_longest(starts, starts[1:]):
        # Where the next start went on is the truth; only for the last one must it be foreseen.
        further = later.from_step > start.from_step if later else _has_saved(run_dir, start)
        if further and start.job == job:
            fruitful.append(start.restart)
    return max(fruitful)


def _has_saved(run_dir: Path, start: Start) -> bool:
    # A kill can come after the checkpoint and before the record. A later step that is older than
    # the start was passed over as damaged, and is nobody's progress: else a run that never gets
    # beyond it would be started for ever.
    return start.made_progress or any(
        checkpoint.step > start.from_step
        and _written_unix_s(checkpoint) >= start.began_unix_s - 1  # s, rounded
        for checkpoint in checkpoints(run_dir)
    )


def _written_unix_s(checkpoint: CheckpointDir) -> float:
    """0 where the manifest cannot tell."""
    try:
        return float(checkpoint.manifest()["written_unix_s"])
    except (CheckpointError, StorageError, LookupError, TypeError, ValueError, OverflowError):
        return 0.0


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Requeue, args, program="largescale.requeue", description=__doc__)
    return run_program(lambda: run(options), "when it can be read, sbatch again")


def run(options: Requeue) -> int:
    """1 if no other start is wanted."""
    check_counts(options, "max_restarts")
    job = os.environ.get("SLURM_JOB_ID")
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    try:
        again, why = decide(options.run, options.status, options.max_restarts, job, restart)
    except OSError as error:
        again, why = False, f"{options.run} cannot be read: {error}; when it can, sbatch again"
    print(f"{'asking' if again else 'not asking'} for another start: {why}", file=sys.stderr)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
