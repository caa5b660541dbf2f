"""Samples from a model. Sample i depends on (seed, i), not on the batch that it is drawn in or the
number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.condition import Condition, to_device
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.diffusion.objective import Model, Objective, SamplerName
from largescale.diffusion.samplers import check_sampler, evaluations, sample
from largescale.errors import ConfigError, Stopped
from largescale.randomness import stream_seed


@dataclass(frozen=True)
class SamplingConfig:
    """Everything that samples depend on besides the weights; it is saved with them."""

    sampler: SamplerName = "ddpm"
    steps: int | str = 250
    """A count, or for Gaussian diffusion also ddim50, the timesteps of a fixed stride."""
    cfg_scale: float = 1.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide at these noise levels u only (arXiv:2404.07724); elsewhere the conditional model is used
    alone."""
    cfg_channels: int | None = None
    """Guide the first k channels only; by default all of the image's."""
    eta: float = 0.0
    """DDIM's noise: 0 is deterministic."""
    clip_denoised: bool = False
    """Clip the predicted x_start to [-1, 1]: for pixels, not for latents."""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model's matrix products; the sampler's own arithmetic is fp32."""

    def check(self, objective: Objective) -> None:
        """Raises ConfigError for settings that no sample can be drawn with."""
        check_sampler(objective, self.sampler, self.steps, self.eta)
        # Guidance checks its own settings when it is made.
        self.guided(lambda x_t, t, y: x_t, null_label=0)

    def guided(self, model: Model, null_label: int) -> ClassifierFreeGuidance:
        """The model with guidance as these settings ask for."""
        return ClassifierFreeGuidance(
            model, self.cfg_scale, null_label, self.cfg_channels, self.guidance_interval
        )


def check_guidance(
    scales: Iterable[float], channels: int | None, *, class_dropout_prob: float, in_channels: int
) -> None:
    """Raises ConfigError for guidance that a model of these settings was not trained for.
    `channels`: how many are guided; None: all."""
    # Guidance needs predictions without a condition, which training has to teach.
    if not class_dropout_prob and set(scales) != {1.0}:
        raise ConfigError(
            "the model was trained with class_dropout_prob=0 and knows no null label to guide "
            "with; set cfg_scale=1 (--cfg-scale 1)"
        )
    if (channels or 0) > in_channels:
        raise ConfigError(
            f"cfg_channels={channels} must be at most {in_channels}, the model's channels; leave it "
            "out to guide all of them"
        )


class SampleNoise:
    """The noise of samples `index`, each from a generator of its own."""

    def __init__(
        self, seed: int, index: Sequence[int], shape: tuple[int, ...], device: torch.device
    ):
        self._shape = shape
        self._device = device
        self._generators = []
        # On the device: it draws other noise than a CPU would, but nothing has to be copied to it.
        for i in index:
            seed_of_sample = stream_seed(seed, "sample", i)
            self._generators.append(torch.Generator(device).manual_seed(seed_of_sample))

    def __call__(self, step: int = 0) -> Tensor:
        """The next draw, (N, C, H, W); `step` only names it."""
        draws = []
        for generator in self._generators:
            draws.append(torch.randn(self._shape, device=self._device, generator=generator))
        return torch.stack(draws)


def draw_batches(
    model: Model,
    objective: Objective,
    config: SamplingConfig,
    *,
    index: Sequence[int],
    condition: Callable[[Sequence[int]], Condition],
    shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[float], Any] = lambda images: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Draws samples batch by batch: (their numbers, samples (N, C, H, W) float32 on the device, in
    the model's space).

    `condition`: of these sample numbers, on the CPU; called batch by batch. `progress` is called
    with the work done, in images, after each evaluation of the model. Raises ConfigError for a
    label outside the classes, and Stopped within one evaluation after `stop()` has become true.
    """

    def unless_stopped(*inputs: Any) -> Tensor:
        if stop():
            raise Stopped
        return model(*inputs)

    guided = config.guided(unless_stopped, num_classes)
    # Every evaluation of the model is an equal part of a batch's work.
    rounds = evaluations(objective, config.sampler, config.steps)
    for start in range(0, len(index), batch_size):
        part = index[start : start + batch_size]
        y = condition(part)
        _check_labels(y, num_classes)
        # The first draw of each generator is x_T, the others are the sampler's.
        noise = SampleNoise(config.seed, part, shape, device)
        samples = sample(
            objective,
            guided,
            noise(),
            to_device(y, device),
            sampler=config.sampler,
            steps=config.steps,
            noise=noise,
            eta=config.eta,
            clip_denoised=config.clip_denoised,
            tick=partial(progress, len(part) / rounds),
        )
        yield part, samples


def _check_labels(y: Condition, num_classes: int) -> None:
    """Raises ConfigError for a label outside the classes, also for the null label."""
    if not isinstance(y, Tensor) or not num_classes:
        return
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        raise ConfigError(
            f"label {y[outside][0]} lies outside the model's classes 0..{num_classes - 1}"
        )


def draw_samples(
    model: Model,
    objective: Objective,
    config: SamplingConfig,
    *,
    index: Sequence[int],
    shape: tuple[int, int, int],
    **how: Any,
) -> Tensor:
    """All samples of `draw_batches` at once: (N, C, H, W), on the CPU."""
    # So that no sample at all has the right shape too.
    drawn = [torch.empty(0, *shape)]
    for _, samples in draw_batches(model, objective, config, index=index, shape=shape, **how):
        drawn.append(samples.cpu())
    return torch.cat(drawn)
