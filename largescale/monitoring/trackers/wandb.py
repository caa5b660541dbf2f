"""Weights & Biases. Project, entity, host and mode are wandb's own variables (WANDB_PROJECT, ...),
and so is the key, which nothing here reads."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from largescale.monitoring.trackers.service import Ended, Moment, RunInfo

# Seconds for which wandb may keep what it was given in memory, where a kill loses it.
FLUSH_S = 1.0
# Seconds after which a server that does not answer is given up, and the start is written offline.
INIT_S = 30.0


class Wandb:
    """One run for all starts. Where the server cannot be reached, a start is written to a file in
    the run directory, which `wandb sync` sends.

    History rows cannot be overwritten: the axis is `step`, and of two rows at one step that with
    the higher `branch` counts.
    """

    # What was sent longer ago than this is on disk.
    settle_s = 2 * FLUSH_S

    def __init__(self) -> None:
        self._run: Any = None
        # What there is to say, training says, and nobody else is told of errors.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

    def start(self, run: RunInfo) -> str | None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        why = ""
        try:
            # Without a key, wandb would ask for one on the terminal.
            if mode == "online" and not wandb.login(prompt=False):
                mode, why = "offline", "wandb has no API key: "
            self._init(run, mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            # A server that does not answer may do so at the next start.
            why = f"wandb cannot be reached ({type(error).__name__}): "
            mode = "offline"
            self._init(run, mode)
        if mode != "offline":
            return None
        folder = run.folder / "wandb"
        return f"{why}wandb writes to {folder}; to send it: wandb sync {folder}/offline-*"

    def _init(self, run: RunInfo, mode: str) -> None:
        import wandb

        # No names of files, machines, users or remotes, no output, and no stop from elsewhere.
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=INIT_S,
            stop_fn=lambda: None,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_S,
        )
        self._run = wandb.init(
            id=run.id,
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", "largescale"),
            config=run.config,
            dir=str(run.folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow",
            settings=settings,
        )
        self._run.config.update(run.config, allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, at: Moment, metrics: Mapping[str, Any]) -> None:
        # wandb's own counter goes on over all starts, since it passes over what goes back.
        row = {"step": at.step, "branch": at.branch, **metrics}
        self._run.log(row, step=at.number, commit=True)

    def event(self, at: Moment, kind: str, text: str) -> None:
        self.log(at, {f"event/{kind}": text})

    def image(self, at: Moment, name: str, image: np.ndarray) -> None:
        import wandb

        self.log(at, {name: wandb.Image(image)})

    def finish(self, ended: Ended, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        if ended == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ended == "finished" else 1)
