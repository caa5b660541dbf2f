"""python docs/stage_ends.py RUN ...: did a stage of the curriculum end because the loss had converged, or
by chance?

A stage ends when `curriculum.patience` steps have not undercut its lowest loss. For each stage the
batch of that lowest loss is named, with its place among the stage's batches by the noise levels that
they drew, and by nothing else: by the mean over the batch of the loss that is to be expected at each
level, interpolated between the clusters' held-out losses at the first checkpoint behind the stage.
1: the batch with the easiest noise levels of the stage.

RUN: trained and scored by eval.compare, with the paper's curriculum and uniform noise levels.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import tyro

from eval.comparison.validation_loss import figure
from eval.curves.rows import Row, lines
from eval.score import RESULTS
from largescale.checkpoint.files import find_checkpoint
from largescale.config.command_line import parse_options, run_program
from largescale.config.derived import cluster_edges
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.curriculum import active_levels
from largescale.errors import ConfigError, DataError
from largescale.randomness import step_draws

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StageEnds:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""


def drawn(config: Config, step: int) -> Array:
    """The draws in (0, 1) from which the noise levels of a step follow, (batch,)."""
    draws = step_draws(
        config.train.seed,
        step,
        config.train.global_batch_size,
        (),
        dropout_prob=0.0,
        posterior=False,
        device=torch.device("cpu"),
    )
    return draws.v.numpy()


def expected_loss(u: Array, row: Row) -> Array:
    """The loss to be expected at noise levels, by the held-out losses of a checkpoint."""
    # Those of the measurement, which may be others than the curriculum's.
    edges = np.array(row["protocol"]["edges"])
    losses = []
    for i in range(1, len(edges)):
        losses.append(row["figures"][figure("raw weights", f" C{i}")]["value"])
    # Losses of clusters differ by factors: straight lines between their logarithms.
    return np.exp(np.interp(u, (edges[:-1] + edges[1:]) / 2, np.log(losses)))


def lowest_loss_at(end: int, patience: int) -> int:
    """The step, from 1 on, of the lowest loss of a stage that ended after step `end`."""
    # Patience + 1 steps did not undercut it.
    return end - patience - 1


def place(config: Config, row: Row, begin: int, end: int, index: int) -> int:
    """The place of the batch with a stage's lowest loss among its batches, by their noise levels. The
    stage is that of `index`, of the steps behind `begin` up to `end`."""
    edges = cluster_edges(config)
    low, high = active_levels(edges, index)
    expected = []
    # Step k has the draws of number k - 1.
    for number in range(begin, end):
        u = low + (high - low) * drawn(config, number)
        expected.append(expected_loss(u, row).mean())
    best = lowest_loss_at(end, config.curriculum.patience)
    return 1 + int(np.sum(np.array(expected) < expected[best - 1 - begin]))


def lines_of(run: Path) -> list[str]:
    """A line for each stage that has ended. Raises ConfigError for a run that this is not about, and
    DataError for one that is not scored far enough."""
    state = find_checkpoint(run).manifest()["state"]
    config = from_dict(state["config"])
    # What is computed here holds for these settings alone.
    curriculum = config.curriculum
    papers = replace(
        curriculum,
        pacing="patience",
        loss_smoothing=0.0,
        order="easy_first",
        stages="accumulating",
        only_cluster=0,
    )
    noise = replace(config.noise, sampling="uniform", weighting="none")
    if (curriculum, config.noise) != (papers, noise):
        raise ConfigError(
            f"{run} was not trained with the paper's curriculum and uniform, unweighted noise levels; give "
            "such a run"
        )
    rows = lines(run / "loss" / RESULTS)
    found = []
    begin = 0
    for end, index in state["curriculum"]["transitions"]:
        later = [row for row in rows if row["step"] >= end]
        if not later:
            raise DataError(
                f"{run} has no held-out loss behind step {end:,}; run eval.compare first"
            )
        # The index that a transition notes is that of the next stage.
        number = place(config, later[0], begin, end, index + 1)
        best = lowest_loss_at(end, curriculum.patience)
        found.append(
            f"{run}: the stage of steps {begin + 1:,} to {end:,} had its lowest loss in the batch of "
            f"step {best:,}, number {number} of {end - begin:,} by its noise levels"
        )
        begin = end
    return found or [f"{run}: no stage has ended yet"]


def main() -> int:
    options = parse_options(StageEnds, None, program="docs/stage_ends.py", description=__doc__)

    def show() -> None:
        if not options.runs:
            raise ConfigError("name at least one run directory")
        for run in options.runs:
            print("\n".join(lines_of(run)))

    return run_program(show, "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
