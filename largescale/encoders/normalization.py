"""How a latent as it is stored becomes the x_start that a network learns, and back."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normalization:
    """x_start = (latent - mean) / std * scale_factor, with a mean and a std for each channel, or
    without both."""

    scale_factor: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def apply(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) float32 as stored -> x_start, on the same device. No host synchronisation
        but at the first call on a device."""
        if self.mean is not None and self.std is not None:
            device = latent.device
            latent = (latent - _channels(self.mean, device)) / _channels(self.std, device)
        return latent * self.scale_factor

    def undo(self, x_start: Tensor) -> Tensor:
        """What `apply` made x_start of."""
        latent = x_start / self.scale_factor
        if self.mean is not None and self.std is not None:
            device = latent.device
            latent = latent * _channels(self.std, device) + _channels(self.mean, device)
        return latent


@functools.lru_cache(16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) on the device. Copied once: each step would wait for a copy."""
    # A decoder may ask first, in inference mode, whose tensors training cannot take.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
