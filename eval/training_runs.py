"""The training runs of a comparison: what each is, whether it is there, and how it is started."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.checkpoint.files import MANIFEST, checkpoints
from largescale.config.command_line import parse_options
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.presets import find_preset
from largescale.config.schema import Config
from largescale.config.serialise import FREE_ON_RESUME, flatten, from_dict, to_dict
from largescale.errors import CheckpointError, LargescaleError, Stopped
from largescale.host.signals import EXIT_REQUEUE, stop_requested

# What two runs of a comparison may differ in. Of what a resumed run may change, not the schedule of
# checkpoints, which are what is compared, nor the type of device, on which the draws depend.
_FREE = tuple(key for key in FREE_ON_RESUME if key not in ("checkpoint.", "train.device"))
_POLL_S = 0.5


class TrainingFailed(LargescaleError, RuntimeError):
    """The training program ended with another status than 0; what it said stands above."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.exit_status = status if status in (2, EXIT_REQUEUE) else 1


@dataclass(frozen=True)
class Run:
    method: str
    seed: int
    config: Config  # what the training program makes of ...
    arguments: tuple[str, ...]  # ... its arguments

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def finished(self) -> bool:
        found = checkpoints(self.folder)
        return bool(found) and found[0].step >= self.config.train.steps

    def command(self, nproc: int) -> list[str]:
        """With torchrun for more than one process."""
        # By address: the machine's own name may not resolve.
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            str(nproc),
        ]
        return [
            sys.executable,
            *(launcher if nproc > 1 else []),
            "-m",
            "largescale.train",
            *self.arguments,
        ]

    def train(self, nproc: int) -> None:
        """To the end, from where it is. Stop signals are passed on. Raises Stopped,
        TrainingFailed."""
        # torchrun gives its ranks 30 s to save, unless told
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **os.environ}
        process = subprocess.Popen(self.command(nproc), env=env)
        told, status = False, None
        while status is None:
            if stop_requested() and not told:
                process.terminate()
                told = True
            try:
                status = process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
        if stop_requested():
            raise Stopped
        if status:
            raise TrainingFailed(
                f"training {self.folder} ended with status {status}; correct what it said above, "
                "and run the same command again to go on",
                status,
            )

    def discard(self) -> None:
        """Remove all checkpoints but the newest."""
        for checkpoint in checkpoints(self.folder)[1:]:
            (checkpoint.path / MANIFEST).unlink(
                missing_ok=True
            )  # first: from here on it does not exist
            shutil.rmtree(checkpoint.path)


def configure(preset: str, arguments: Sequence[str]) -> Config:
    """As the training program reads them. Raises ConfigError for an unknown preset, exits for other
    arguments."""
    default = find_preset(preset)
    program = f"largescale.train {preset}"
    return parse_options(Config, arguments, program=program, description=None, default=default)


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """As 'key: found -> wanted', but for what makes no difference to a comparison."""
    now, before = dict(flatten(wanted)), dict(flatten(found))
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) not in (before.get(key), "auto") and not key.startswith(_FREE)
    ]


def check_same(run: Run, nproc: int, dataset: str) -> None:
    """Refuse to compare, or to go on with, a run that lies in the folder and is another one. Raises
    CheckpointError."""
    if not (found := checkpoints(run.folder)):
        return
    state = found[0].manifest()["state"]
    saved = {
        **to_dict(from_dict(state["config"])),
        "precision": state["precision"],
        "dataset": state["dataset"],
    }
    wanted = {
        **to_dict(run.config),
        "precision": precision(final_ds_config(run.config, nproc)),
        "dataset": dataset,
    }
    if changed := differences(wanted, saved):
        raise CheckpointError(
            f"{run.folder} was begun with other settings, and does not compare:\n  "
            + "\n  ".join(changed)
            + "\ngive the settings it was begun with, or choose another --out"
        )
