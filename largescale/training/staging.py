"""The data on a node's own disk, before a run reads them (data.stage)."""

import time
from collections.abc import Callable
from pathlib import Path

from largescale.config.schema import Config
from largescale.data.stage import StagedCopy, paths_to_copy, plan_copies
from largescale.distributed.ranks import Ranks
from largescale.host.sizes import size_text
from largescale.training.early_stop import asked_to_stop

# How long a rank copies before it meets the others: those of nodes that have finished wait here, and
# must not look dead.
_TURN_S = 20.0


def stage_data(config: Config, ranks: Ranks, log: Callable[[str], None]) -> dict[str, Path] | None:
    """The folders with copies of the run's data sets on this node's disk, by the config's paths;
    the node's ranks make them together. Nothing is copied where not all of it fits. Collective.

    None where a rank was asked to stop. Raises DataError and StorageError on all ranks.
    """
    stage = config.data.stage
    if stage is None:
        return {}
    paths = paths_to_copy(config)
    begin = time.monotonic()
    copies, to_copy = ranks.raise_on_all_ranks(lambda: plan_copies(paths, stage))
    filled = False
    while not filled:
        is_filled = ranks.raise_on_all_ranks(lambda: _fill(copies))
        if asked_to_stop(ranks, log, f"while data were copied to {stage}"):
            return None
        filled = not ranks.any(not is_filled)
        if not filled:
            left = sum(copy.bytes_to_copy() for copy in copies)
            links = sum(copy.files_to_link() for copy in copies)
            also = f", {links:,} files of other copies there are to be compared" if links else ""
            log(
                f"data: {size_text(left)} of {size_text(to_copy)} are to be copied to {stage}{also}"
            )

    for copy in copies:
        log(f"data: {copy.path} is read from {copy.folder}, {size_text(copy.nbytes)}")
    if to_copy:
        log(f"data: {size_text(to_copy)} copied in {time.monotonic() - begin:,.0f} s")
    return {path: copy.folder for path, copy in zip(paths, copies, strict=True)}


def _fill(copies: list[StagedCopy]) -> bool:
    return all(copy.fill(_TURN_S) for copy in copies)
