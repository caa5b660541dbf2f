"""Samples from a model: sample i depends on (seed, i), not on the batch it is drawn in or the number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.diffusion.samplers import sample
from largescale.draws import stream_seed
from largescale.errors import ConfigError, Stopped
from largescale.models.conditioning import Condition, moved


@dataclass(frozen=True)
class SamplingConfig:
    """Everything that samples depend on besides the weights; written beside them."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 250
    cfg_scale: float = 1.5
    cfg_channels: int | None = None
    """Guide the first k channels only; by default all of the image's."""
    eta: float = 0.0
    """DDIM's noise: 0 is deterministic."""
    clip_denoised: bool = False
    """Clip the predicted x_start to [-1, 1]: for pixels, not for latents."""
    seed: int = 0


class SampleNoise:
    """The noise of samples `index`, each from a generator of its own."""

    def __init__(self, seed: int, index: Sequence[int], shape: tuple[int, ...], device: torch.device):
        self._shape, self._device = shape, device
        self._generators = [torch.Generator(device).manual_seed(stream_seed(seed, "sample", i)) for i in index]

    def __call__(self, step: int = 0) -> Tensor:
        """The next draw, (N, C, H, W); `step` only names it."""
        return torch.stack([torch.randn(self._shape, device=self._device, generator=g) for g in self._generators])


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    config: SamplingConfig,
    *,
    index: Sequence[int],
    condition: Callable[[Sequence[int]], Condition],
    shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], Any] = lambda n: None,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Samples number `index[k]`: (N, C, H, W) in the model's space, on the CPU.

    `condition`: what the model is told of these sample numbers, on the CPU; asked for batch by batch.
    `progress(n)` is told of n more finished samples. Raises ConfigError for a label outside the classes, and Stopped
    within one step of the sampler after `stop()` has become true.
    """
    def unless_stopped(*inputs: Any) -> Tensor:
        if stop():
            raise Stopped
        output: Tensor = model(*inputs)
        return output

    guided = ClassifierFreeGuidance(unless_stopped, config.cfg_scale, num_classes, config.cfg_channels)
    finished = []
    for start in range(0, len(index), batch_size):
        part = slice(start, start + batch_size)
        y = condition(index[part])
        if isinstance(y, Tensor) and num_classes and (outside := (y < 0) | (y >= num_classes)).any():
            raise ConfigError(f"label {y[outside][0]} lies outside the model's classes 0..{num_classes - 1}")
        noise = SampleNoise(config.seed, index[part], shape, device)
        x = sample(
            diffusion, guided, noise(), moved(y, device), sampler=config.sampler, steps=config.steps, noise=noise,
            eta=config.eta, clip_denoised=config.clip_denoised,
        )
        finished.append(x.cpu())
        progress(len(x))
    return torch.cat(finished) if finished else torch.empty(0, *shape)
