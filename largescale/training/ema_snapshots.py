"""Writes snapshots of the power-function averages while training."""

import torch

from largescale.checkpoint import ema_snapshots
from largescale.config.schema import Config
from largescale.distributed.ranks import Ranks
from largescale.engine.deepspeed_engine import Engine
from largescale.monitoring.telemetry import Telemetry
from largescale.power_ema import Profile, state_key


def snapshot_every(config: Config) -> int:
    """Steps between snapshots; 0 where no averages are kept."""
    if not config.optimizer.ema_widths:
        return 0
    c = config.checkpoint
    return c.ema_snapshot_every or c.keep_every or c.every


class EmaSnapshots:
    """The snapshots of one run. Only rank 0 writes; the others give it their parts."""

    def __init__(self, config: Config, engine: Engine, ranks: Ranks, telemetry: Telemetry):
        self._config = config
        self._engine = engine
        self._ranks = ranks
        self._telemetry = telemetry
        self._every = snapshot_every(config)

    def due(self, step: int) -> bool:
        """Whether a snapshot is written at this step: the last one always is."""
        if not self._every:
            return False
        return step % self._every == 0 or step == self._config.train.steps

    def write(self, step: int) -> None:
        """Write a snapshot of each average. Collective. An error of the disk is logged: the next
        snapshot may succeed."""
        for width in self._config.optimizer.ema_widths:
            # In half precision before it is gathered: half the bytes.
            part = self._engine.partition(state_key(width)).half()
            flat = self._ranks.all_gather_flat(part)[: self._engine.numel]
            if self._ranks.rank == 0:
                self._write(Profile(step, width), flat.cpu())

    def _write(self, profile: Profile, flat: torch.Tensor) -> None:
        weights = {}
        offset = 0
        for name, p in self._engine.module.named_parameters():
            # One after another, as the optimizer has them, and without those that are fixed.
            if p.requires_grad:
                weights[name] = flat[offset : offset + p.numel()].view(p.shape)
                offset += p.numel()
        run_dir = self._telemetry.run_dir
        try:
            # Another start may have taken over the run, whose snapshots these would replace.
            self._telemetry.require_lock()
            ema_snapshots.write(run_dir, profile, weights)
            ema_snapshots.remove(run_dir, newest=self._config.checkpoint.ema_snapshots)
        except OSError as error:
            text = f"step {profile.step}: no snapshot of width {profile.width:g}: {error}"
            self._telemetry.event(profile.step, "snapshot failed", text)

    def drop_later(self, step: int) -> None:
        """Remove snapshots of later steps than `step`, where the run continues: they are of weights
        that are trained again, and perhaps otherwise."""
        if self._ranks.rank == 0 and self._every:
            with self._telemetry.tolerate_disk_errors():
                self._telemetry.require_lock()
                ema_snapshots.remove(self._telemetry.run_dir, after=step)
