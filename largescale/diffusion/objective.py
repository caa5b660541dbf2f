"""The interface of training objectives, which the trainer, the evaluations and the samplers use.
`build.OBJECTIVES` has the objectives.

Each has its own time: Gaussian diffusion's integer timesteps 0 .. T - 1 rise with the noise; SiT's
t falls from 1, data, to 0; EDM has sigma. All of them map to one noise axis: u in the open (0, 1),
0 towards no noise, uniform in ordinary training.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.errors import ConfigError

# (x_t, t, y) -> model_output
Model = Callable[[Tensor, Tensor, Condition], Tensor]

SamplerName = Literal["ddpm", "ddim", "dpm++2m", "euler", "heun", "heun3", "sde"]


class Losses(NamedTuple):
    """The losses of each sample, (N,) float32: loss = mse + vb, before any weighting. mse per
    element; vb in bits per element, 0 without `learn_sigma`."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


class Objective(Protocol):
    """A training objective. `t` is its own time, (N,)."""

    samplers: ClassVar[tuple[SamplerName, ...]]
    """The samplers that `sample` has; the first is the default."""
    default_steps: ClassVar[int]
    """Steps of the default sampler."""
    preview_sampler: ClassVar[SamplerName]
    """The sampler of the images shown while training: deterministic, so that they can be
    compared."""
    clips_predictions: ClassVar[bool]
    """Whether `sample` can hold the predicted images in [-1, 1]."""

    def snap_to_timesteps(self, low: float, high: float) -> tuple[float, float]:
        """The part of the noise axis that times between two noise levels stand for: wider or
        narrower than they where times are integers."""
        ...

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """t from v, (N,) float64 uniform in the open (0, 1): uniform over the noise levels in [low,
        high)."""
        ...

    def noise_level(self, t: Tensor) -> Tensor:
        """The noise level u in (0, 1) of a time, (N,) float64."""
        ...

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(signal power / noise power), (N,) float64, for data of unit variance; it falls as u
        rises."""
        ...

    def log_snr_at(self, u: float) -> float:
        """`log_snr` at a noise level in [0, 1], on the host; infinite where it is at an end.
        Continuous and falling: between integer times, where nothing is drawn, it is interpolated.
        """
        ...

    def noise_level_of_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr_at`, (N,) float64."""
        ...

    def x_start_weight(self, t: Tensor) -> Tensor:
        """The factor from the squared error of the predicted x_start to the mse, (N,) float64."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x_t = alpha x_start + sigma noise, (N,) float64 each."""
        ...

    def time_of_input(self, t: Tensor) -> Tensor:
        """The time at which the model's input is `t`; another one where the model is given a
        function of the time."""
        ...

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, y: Condition
    ) -> Losses:
        """The losses of each sample. `x_start`, `noise`: (N, C, H, W)."""
        ...

    def check_steps(self, sampler: str, steps: int | str) -> None:
        """Raises ConfigError for a number of steps that one of its `samplers` cannot take."""
        ...

    def evaluations(self, sampler: str, steps: int | str) -> int:
        """How often `sample` asks the model."""
        ...

    def sample(
        self,
        model: Model,
        x_T: Tensor,
        y: Condition,
        *,
        sampler: str,
        steps: int | str,
        noise: Callable[[int], Tensor],
        eta: float,
        clip_denoised: bool,
        tick: Callable[[], object],
    ) -> Tensor:
        """The samples that `samplers.sample` returns, with settings that it has checked: `eta` is 0
        except for ddim, `clip_denoised` is False unless the objective `clips_predictions`."""
        ...


def clamp_to_open_interval(u: Tensor, low: float, high: float) -> Tensor:
    """Moves u, float64, back into [low, high) and the open (0, 1), which rounding can leave."""
    return u.clamp(max(low, 2.0**-53), math.nextafter(high, 0.0))


def middle_of_bins(n: int) -> Tensor:
    """The noise level in the middle of each of n equal shares of the noise axis, (n,) float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def check_step_count(steps: int | str) -> None:
    """Raises ConfigError unless `steps` is a count of 2 or more."""
    if not str(steps).isdecimal() or int(steps) < 2:
        raise ConfigError(f"steps={steps!r} must be a count of 2 or more")


def check_draw(v: Tensor, low: float, high: float) -> None:
    """Raises ConfigError for arguments that no noise level can be drawn from."""
    # float32 cannot represent draws as close to 1 as 1 - 2**-53.
    if v.dtype != torch.float64 or not 0 <= low < high <= 1:
        raise ConfigError(
            f"noise levels are drawn from float64 v and 0 <= low < high <= 1, got {v.dtype} and "
            f"[{low}, {high}); draw v in float64, take the others from Curriculum.active"
        )
