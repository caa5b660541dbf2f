"""python -m largescale.requeue RUN --status S: whether a batch script should have Slurm start its
job again.

Exit status 0: yes; 1: no; the reason is one line on stderr. Whether it crashed or was stopped in
good order, a job is started again as long as its starts make progress. Their number is known from
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
from largescale.host.launch import env_int
from largescale.host.machine import KILL
from largescale.host.signals import EXIT_REQUEUE
from largescale.monitoring.run_record import Start, out_of_memory, read_starts

# How many times as many starts without progress may follow each other where they are asked to stop.
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
    # Where another start would change nothing, or cannot be asked for.
    if status == 0:
        return False, "the run is finished"
    if status == 2:
        text = (
            "status 2 is an error that another start would repeat; correct what is reported above"
        )
        return False, text
    if job is None:
        text = "SLURM_JOB_ID is not set, so this is not a job of Slurm; run the same command again"
        return False, f"{text} to continue"

    # A job that is preempted while it starts makes no progress, and is not at fault.
    if status == EXIT_REQUEUE:
        max_restarts *= PATIENCE_WITH_STOPS
    without_progress = restart - last_start_with_progress(run_dir, job)
    killed = _kill_for_memory(run_dir)
    if without_progress >= max_restarts:
        starts = "a start" if without_progress == 1 else f"{without_progress} starts in a row"
        return False, (
            f"{starts} of job {job} ended without a new checkpoint (the last with status {status}); "
            f"look at the log above, correct the cause, and sbatch again{killed}"
        )

    how = "stopped in good order" if status == EXIT_REQUEUE else f"ended with status {status}"
    progress = "with a new checkpoint"
    if without_progress:
        progress = (
            f"{without_progress} in a row without a new checkpoint, {max_restarts} are too many"
        )
    return True, f"this one of job {job} {how}, {progress}{killed}"


def _kill_for_memory(run_dir: Path) -> str:
    """What to add where the last start was killed for memory, or nothing."""
    starts = read_starts(run_dir)
    if not starts:
        return ""
    end = starts[-1].ended or out_of_memory(starts[-1]) or ""
    return f"; {end}" if KILL in end else ""


def last_start_with_progress(run_dir: Path, job: str) -> int:
    """The `restart` of the job's last start that made progress; -1 if none did."""
    starts = read_starts(run_dir)
    last = -1
    for start, later in itertools.zip_longest(starts, starts[1:]):
        # The step from which the next start continued decides; of the last one it is predicted.
        progress = later.from_step > start.from_step if later else _has_saved(run_dir, start)
        if progress and start.job == job:
            last = max(last, start.restart)
    return last


def _has_saved(run_dir: Path, start: Start) -> bool:
    """Whether a start has saved a checkpoint from which the next one can continue."""
    if start.made_progress:
        return True
    # A kill can come after the checkpoint and before the record. A later step that is older than
    # the start was skipped as damaged, and is nobody's progress: else a run that never gets beyond
    # it would be started for ever.
    for checkpoint in checkpoints(run_dir):
        # The time in a manifest is rounded to seconds.
        written_since = _written_unix_s(checkpoint) >= start.began_unix_s - 1
        if checkpoint.step > start.from_step and written_since:
            return True
    return False


def _written_unix_s(checkpoint: CheckpointDir) -> float:
    """When the checkpoint was written; 0 where its manifest cannot be read."""
    try:
        return float(checkpoint.manifest()["written_unix_s"])
    except (CheckpointError, StorageError, LookupError, TypeError, ValueError, OverflowError):
        return 0.0


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Requeue, args, program="largescale.requeue", description=__doc__)
    return run_program(lambda: run(options), "when it can be read, sbatch again")


def run(options: Requeue) -> int:
    """Print the decision; the exit status, 1 if no other start is wanted."""
    check_counts(options, "max_restarts")
    job = os.environ.get("SLURM_JOB_ID")
    restart = env_int("SLURM_RESTART_COUNT", default=0)
    # A run directory that cannot be read would not be written either.
    try:
        again, why = decide(options.run, options.status, options.max_restarts, job, restart)
    except OSError as error:
        again = False
        why = f"{options.run} cannot be read: {error}; when it can, sbatch again"
    print(f"{'asking' if again else 'not asking'} for another start: {why}", file=sys.stderr)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
