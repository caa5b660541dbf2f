"""The training runs of a comparison: what each is, whether it is there, and how it is started."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.checkpoint.files import checkpoints
from largescale.config.command_line import parse_options
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.presets import find_preset
from largescale.config.schema import Config
from largescale.config.serialise import (
    FREE_ON_RESUME,
    flatten,
    from_dict,
    to_dict,
    with_current_options,
)
from largescale.errors import CheckpointError, LargescaleError, Stopped
from largescale.host.signals import EXIT_REQUEUE, stop_requested

# What two runs of a comparison may differ in. Of what a resumed run may change, not the schedule of
# checkpoints, which are what is compared, nor the type of device, on which the draws depend, nor
# the first weights.
_COMPARED = ("checkpoint.", "train.device", "train.init_from", "train.init_new")
_FREE = tuple(key for key in FREE_ON_RESUME if key not in _COMPARED)
_POLL_S = 0.5


class TrainingFailed(LargescaleError, RuntimeError):
    """The training program ended with another status than 0; its error is printed above."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        # A status that a job script acts on is passed on: 2 needs a human, the other a requeue.
        self.exit_status = status if status in (2, EXIT_REQUEUE) else 1


@dataclass(frozen=True)
class Run:
    """One training run of a comparison or a study."""

    method: str
    seed: int
    config: Config
    """The config that the training program makes of `arguments`."""
    arguments: tuple[str, ...]
    """The preset, and options of the training program."""

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def finished(self) -> bool:
        """Whether its newest checkpoint is that of its last step."""
        found = checkpoints(self.folder)
        return bool(found) and found[0].step >= self.config.train.steps

    def command(self, nproc: int) -> list[str]:
        """The command that starts or continues it; with torchrun for more than one process."""
        words = [sys.executable]
        # By address: the machine's own name may not resolve.
        if nproc > 1:
            words += ["-m", "torch.distributed.run", "--standalone"]
            words += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc)]
        return [*words, "-m", "largescale.train", *self.arguments]

    def train(self, nproc: int) -> None:
        """Train to the end, from the newest checkpoint. Stop signals are passed on. Raises Stopped,
        TrainingFailed."""
        # By default torchrun gives its ranks 30 s to save.
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **os.environ}
        process = subprocess.Popen(self.command(nproc), env=env)

        # A second signal would make the training program give up its last checkpoint.
        terminated = False
        status = None
        while status is None:
            if stop_requested() and not terminated:
                process.terminate()
                terminated = True
            try:
                status = process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
        if stop_requested():
            raise Stopped
        if status:
            raise TrainingFailed(
                f"training {self.folder} ended with status {status}; correct the error printed "
                "above, and run the same command again to continue",
                status,
            )

    def discard(self) -> None:
        """Remove all checkpoints but the newest."""
        for checkpoint in checkpoints(self.folder)[1:]:
            checkpoint.remove()


def configure(preset: str, arguments: Sequence[str]) -> Config:
    """The config that the training program makes of a preset and options. Raises ConfigError for an
    unknown preset; exits for options that are wrong."""
    default = find_preset(preset)
    program = f"largescale.train {preset}"
    # A comparison continues by its old command, whose options may have the names of an older
    # version.
    current = with_current_options(arguments)
    return parse_options(Config, current, program=program, description=None, default=default)


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The settings that differ, as 'key: found -> wanted', but for those that make no difference to
    a comparison."""
    now = dict(flatten(wanted))
    before = dict(flatten(found))
    changed = []
    for key in sorted(now.keys() | before.keys()):
        if key.startswith(_FREE) or now.get(key) in (before.get(key), "auto"):
            continue
        changed.append(f"{key}: {before.get(key)} -> {now.get(key)}")
    return changed


def check_same(run: Run, nproc: int, dataset: str) -> None:
    """Raises CheckpointError for a run in the folder that was started with other settings: it can
    neither be compared nor continued."""
    if not (found := checkpoints(run.folder)):
        return
    # Both with the defaults of today: a field that is newer than the run is no difference.
    state = found[0].manifest()["state"]
    saved = to_dict(from_dict(state["config"]))
    saved |= {"precision": state["precision"], "dataset": state["dataset"]}
    wanted = to_dict(run.config)
    wanted |= {"precision": precision(final_ds_config(run.config, nproc)), "dataset": dataset}
    if changed := differences(wanted, saved):
        raise CheckpointError(
            f"{run.folder} was started with other settings, and does not compare:\n  "
            + "\n  ".join(changed)
            + "\ngive the settings it was started with, or choose another --out"
        )
