"""Classifier-free guidance, Ho and Salimans, arXiv:2207.12598, with the scale as in DiT; also in an
interval of noise levels only, Kynkaanniemi et al., arXiv:2404.07724."""

import torch
from torch import Tensor

from largescale.condition import Condition, concat, drop
from largescale.diffusion.objective import Model
from largescale.errors import ConfigError


def at(model: "Model | ClassifierFreeGuidance", u: float) -> Model:
    """The model to ask at noise level u in (0, 1)."""
    return model.at(u) if isinstance(model, ClassifierFreeGuidance) else model


class ClassifierFreeGuidance:
    """A model that is guided: (x_t, t, y) -> output of the shape that the inner model gives.

    eps = uncond + cfg_scale * (cond - uncond); 1 is no guidance, 0 drops the condition. Variance
    channels stay the conditional ones. `channels`: guide the first so many only (DiT's released
    numbers: 3); None guides all channels. `interval`: the noise levels u, both ends included, at
    which `at` guides.
    """

    def __init__(
        self,
        model: Model,
        cfg_scale: float,
        null_label: int,
        channels: int | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ):
        # Not cfg_scale < 0, which is false for NaN too.
        if not cfg_scale >= 0:
            raise ConfigError(
                f"cfg_scale={cfg_scale} must be 0 or more; 1 is no guidance, the paper uses 1.5"
            )
        if channels is not None and channels < 1:
            raise ConfigError(
                f"channels={channels} leaves nothing to guide; use None to guide every channel"
            )
        lowest, highest = interval
        if not 0 <= lowest < highest <= 1:
            raise ConfigError(
                f"interval=({lowest}, {highest}) must rise from 0, clean, towards 1, noise, within "
                "both; use (0, 1) to guide everywhere, cfg_scale=1 to guide nowhere"
            )
        self.model = model
        self.cfg_scale = cfg_scale
        self.null_label = null_label
        self.channels = channels
        self.interval = lowest, highest

    def at(self, u: float) -> Model:
        """The model to ask at noise level u in (0, 1): outside the interval the conditional one,
        which is half the work."""
        lowest, highest = self.interval
        return self if lowest <= u <= highest else self.model

    def __call__(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The guided output at any noise level: x_t (N, C, H, W), t (N,), y for N images -> (N, C or
        2C, H, W)."""
        if self.cfg_scale == 1:
            return self.model(x_t, t, y)
        null = drop(y, torch.ones_like(t, dtype=torch.bool), self.null_label)
        guided = x_t.shape[1] if self.channels is None else min(self.channels, x_t.shape[1])

        # Without the condition one evaluation is enough, unless there is a variance.
        if self.cfg_scale == 0 and guided == x_t.shape[1]:
            uncond = self.model(x_t, t, null)
            if uncond.shape[1] == guided:
                return uncond
            # Only the output shows that there is a variance, which stays conditional. To remember
            # it and join the batches next time would change the rounding between the first call and
            # the others.
            return torch.cat([uncond[:, :guided], self.model(x_t, t, y)[:, guided:]], dim=1)

        # Both in one batch, which is faster than two.
        both = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), concat(y, null))
        cond, uncond = both.chunk(2)
        eps = uncond[:, :guided] + self.cfg_scale * (cond - uncond)[:, :guided]
        return torch.cat([eps, cond[:, guided:]], dim=1)
