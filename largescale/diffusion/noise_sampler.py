"""What a density of noise levels must answer, and what its implementations share.

A sampler bends v, uniform in the open (0, 1), so that u = low + v (high - low) has the sampler's
density, restricted to the active [low, high) and renormalised. All that is random stays in v, so a
resumed run draws as it would have.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.errors import CheckpointError


class NoiseSampler:
    """A density of noise levels."""

    name: str
    needs_losses = False

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """v bent, (N,) float64 in the open (0, 1), and (N,) float32 factors on the samples' losses.
        `v`: (N,) float64 in the open (0, 1); `low`, `high`: the active noise levels, from
        `Objective.snap_to_timesteps`."""
        raise NotImplementedError

    def observe(self, bins: list[int], losses: list[float]) -> None:
        """Takes the losses of an applied step, the same on every rank: of each row of the global
        batch, in order, floor(u n_bins) and the loss before the factor of `warp`. Without effect
        unless `needs_losses`."""

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, which strict JSON and weights-only torch files both take."""
        return {"sampling": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises CheckpointError for that of another sampler."""
        if state["sampling"] != self.name:
            raise CheckpointError(
                f"this run draws noise levels by {self.name}, the saved state is of "
                f"{state['sampling']}; go on with --noise.sampling {state['sampling']}"
            )


def share_of(u: Tensor, low: float, high: float) -> Tensor:
    """u as a share of [low, high), inside the open (0, 1), whose ends rounding may reach."""
    # The smallest and the largest v that are drawn.
    return ((u - low) / (high - low)).clamp(2.0**-53, 1 - 2.0**-53)


def unit_importance(v: Tensor) -> Tensor:
    """The factors of a density that is meant to change the mean loss: 1 for each sample."""
    return torch.ones_like(v, dtype=torch.float32)


def copied_to(device: torch.device, table: np.ndarray) -> Tensor:
    """A table on a device; the host does not wait for the copy."""
    copy = torch.from_numpy(table)
    # From pinned memory the copy does not wait for the GPU.
    if device.type == "cuda":
        copy = copy.pin_memory()
    return copy.to(device, non_blocking=True)
