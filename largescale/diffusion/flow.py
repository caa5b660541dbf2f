"""Flow matching with a stochastic interpolant: velocity prediction as in SiT (Ma et al.,
arXiv:2401.08740).

SiT's time falls with the noise: t = 1 is data and t = 0 noise, so t = 1 - u. x_t = alpha(t) x_start
+ sigma(t) noise.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.diffusion.guidance import at
from largescale.diffusion.objective import (
    Losses,
    Model,
    SamplerName,
    check_draw,
    check_step_count,
    clamp_to_open_interval,
)
from largescale.diffusion.ode import Derivative, euler, heun, heun3
from largescale.errors import ConfigError
from largescale.registry import look_up

# SiT's length of the last step, which adds no noise.
LAST_STEP = 0.04

# alpha, sigma and their derivatives by t
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


class Interpolant(NamedTuple):
    """A path x_t = alpha(t) x_start + sigma(t) noise from noise at t = 0 to data at t = 1."""

    coefficients: Callable[[Tensor], Coefficients]
    """alpha, sigma and their derivatives by t, of t's shape."""
    sigma: Callable[[float], float]
    """sigma as `coefficients` has it, on the host."""
    determinant: float
    """alpha sigma' - sigma alpha', which does not depend on t."""
    log_snr_at: Callable[[float], float]
    """ln(alpha ** 2 / sigma ** 2) at a noise level u = 1 - t in the open (0, 1), on the host."""
    noise_level_of_snr: Callable[[Tensor], Tensor]
    """The inverse of `log_snr_at`."""


def _linear(t: Tensor) -> Coefficients:
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def _gvp(t: Tensor) -> Coefficients:
    angle = t * (math.pi / 2)
    return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()


INTERPOLANTS: dict[str, Interpolant] = {
    "linear": Interpolant(
        _linear,
        lambda t: 1 - t,
        -1.0,
        lambda u: 2 * (math.log1p(-u) - math.log(u)),
        lambda log_snr: torch.sigmoid(-0.5 * log_snr),
    ),
    "gvp": Interpolant(
        _gvp,
        lambda t: math.cos(math.pi / 2 * t),
        -math.pi / 2,
        lambda u: -2 * math.log(math.tan(math.pi / 2 * u)),
        lambda log_snr: (-0.5 * log_snr).exp().atan() * (2 / math.pi),
    ),
}


class Flow:
    """SiT's objective for images (N, C, H, W); t (N,) float64 in the open (0, 1), 1 = data. The
    model is given this t, as released SiT is.

    linear: alpha = t, sigma = 1 - t. gvp: alpha = sin(pi t / 2), sigma = cos(pi t / 2).
    """

    samplers: ClassVar[tuple[SamplerName, ...]] = ("sde", "euler", "heun", "heun3")
    default_steps: ClassVar[int] = 250
    preview_sampler: ClassVar[SamplerName] = "euler"
    clips_predictions: ClassVar[bool] = False

    def __init__(
        self, interpolant: Literal["linear", "gvp"] = "linear", *, learn_sigma: bool = False
    ):
        """`learn_sigma`: the model's output has 2C channels, and the last C are not used
        (released SiT's)."""
        self.learn_sigma = learn_sigma
        self.interpolant = look_up(INTERPOLANTS, interpolant, "diffusion.interpolant")
        self.coefficients = self.interpolant.coefficients
        self.determinant = self.interpolant.determinant

    # ---- the noise axis

    def snap_to_timesteps(self, low: float, high: float) -> tuple[float, float]:
        return low, high

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        check_draw(v, low, high)
        return 1 - clamp_to_open_interval(low + v * (high - low), low, high)

    def noise_level(self, t: Tensor) -> Tensor:
        return 1 - t.double()

    def log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def log_snr_at(self, u: float) -> float:
        if u in (0, 1):
            return math.copysign(math.inf, 0.5 - u)
        return self.interpolant.log_snr_at(u)

    def noise_level_of_snr(self, log_snr: Tensor) -> Tensor:
        return self.interpolant.noise_level_of_snr(log_snr)

    def x_start_weight(self, t: Tensor) -> Tensor:
        """The factor from the squared error of x_start to the mse."""
        # Where x_t is given, an error e of x_start is an error of the velocity of
        # |determinant| / sigma e.
        return (self.determinant / self.alpha_sigma(t)[1]).square()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, _, _ = self.coefficients(t.double())
        return alpha, sigma

    def time_of_input(self, t: Tensor) -> Tensor:
        return t

    # ---- training

    def interpolate(self, x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity dx_t/dt, float32."""
        alpha, sigma, d_alpha, d_sigma = map(_of_images, self.coefficients(t))
        x_start, noise = x_start.float(), noise.float()
        return alpha * x_start + sigma * noise, d_alpha * x_start + d_sigma * noise

    def velocity(self, model: Model, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The velocity that the model predicts, float32."""
        output = model(x_t, t, y).float()
        channels = x_t.shape[1]
        # Released SiT has C more channels, which nothing reads.
        if output.shape[1] != channels * (2 if self.learn_sigma else 1):
            raise ConfigError(
                f"the model returned {output.shape[1]} channels for {channels}-channel images with "
                f"learn_sigma={self.learn_sigma}; give model and diffusion the same learn_sigma"
            )
        return output[:, :channels]

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, y: Condition
    ) -> Losses:
        x_t, target = self.interpolate(x_start, t, noise)
        mse = (self.velocity(model, x_t, t, y) - target).square().flatten(1).mean(1)
        return Losses(mse, mse, torch.zeros_like(mse))

    def noise_of(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a velocity implies; the score is -noise / sigma (SiT, eq. 9)."""
        alpha, _, d_alpha, _ = map(_of_images, self.coefficients(t))
        return (alpha * velocity - d_alpha * x_t) / self.determinant

    # ---- sampling

    def check_steps(self, sampler: str, steps: int | str) -> None:
        check_step_count(steps)

    def evaluations(self, sampler: str, steps: int | str) -> int:
        return {"heun": 2, "heun3": 3}.get(sampler, 1) * int(steps)

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
        """Samples at t = 1 from noise x_T at t = 0. sde: Euler-Maruyama, over `steps` times; the
        others: that many steps of the probability flow ODE."""

        def velocity(x: Tensor, time: float) -> Tensor:
            # Guidance is by the noise level u = 1 - t.
            output = self.velocity(at(model, 1 - time), x, _of_each(x, time), y)
            tick()
            return output

        # The SDE needs the score, which the ODE's solvers do not.
        count = int(steps)
        if sampler == "sde":
            return self._euler_maruyama(velocity, x_T, count, noise)
        times = [i / count for i in range(count + 1)]
        return {"euler": euler, "heun": heun, "heun3": heun3}[sampler](velocity, x_T, times)

    def _euler_maruyama(
        self, velocity: Derivative, x: Tensor, steps: int, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """The SDE with SiT's diffusion coefficient, w = 2 sigma; the last step adds no noise."""

        def drift(x: Tensor, time: float) -> Tensor:
            # velocity + w / 2 score (SiT, eq. 4)
            v = velocity(x, time)
            return v - self.noise_of(v, x, _of_each(x, time))

        # Equal steps up to the last one, whose length is fixed.
        h = (1 - LAST_STEP) / (steps - 1)
        for i in range(steps - 1):
            scale = math.sqrt(2 * self.interpolant.sigma(h * i) * h)
            x = x + h * drift(x, h * i) + scale * noise(i)
        return x + LAST_STEP * drift(x, h * (steps - 1))


def _of_images(coefficient: Tensor) -> Tensor:
    """A coefficient of each image, (N,), as float32 (N, 1, 1, 1)."""
    return coefficient.float()[:, None, None, None]


def _of_each(x: Tensor, time: float) -> Tensor:
    """The same time for each image, (N,) float64."""
    return torch.full((len(x),), time, dtype=torch.float64, device=x.device)
