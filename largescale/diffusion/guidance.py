"""Classifier-free guidance, Ho and Salimans, arXiv:2207.12598, with the scale as DiT writes it."""

import torch
from torch import Tensor

from largescale.diffusion.gaussian import Model
from largescale.errors import ConfigError
from largescale.models.conditioning import Condition, drop, joined


class ClassifierFreeGuidance:
    """A model that is guided: (x_t, t, y) -> output of the shape that the inner model gives.

    eps = uncond + cfg_scale * (cond - uncond); 1 is no guidance, 0 drops the condition. Variance channels stay the
    conditional ones. `channels`: guide the first so many only (DiT's released numbers: 3); None guides the whole image.
    """

    def __init__(self, model: Model, cfg_scale: float, null_label: int, channels: int | None = None):
        if not cfg_scale >= 0:
            raise ConfigError(f"cfg_scale={cfg_scale} must be 0 or more; 1 is no guidance, the paper uses 1.5")
        if channels is not None and channels < 1:
            raise ConfigError(f"channels={channels} leaves nothing to guide; use None to guide every channel")
        self.model, self.cfg_scale, self.null_label, self.channels = model, cfg_scale, null_label, channels

    def __call__(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """x_t (N, C, H, W), t (N,), y for N images -> (N, C or 2C, H, W)."""
        if self.cfg_scale == 1:
            return self.model(x_t, t, y)
        both = joined(y, drop(y, torch.ones_like(t, dtype=torch.bool), self.null_label))
        cond, uncond = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        guided = x_t.shape[1] if self.channels is None else min(self.channels, x_t.shape[1])
        eps = uncond[:, :guided] + self.cfg_scale * (cond - uncond)[:, :guided]
        return torch.cat([eps, cond[:, guided:]], dim=1)
