"""EDM: a denoiser behind preconditioning, at noise levels sigma (Karras et al.,
arXiv:2206.00364)."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import ClassVar

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
from largescale.diffusion.ode import edm_sigmas, euler, heun
from largescale.errors import ConfigError

# The noise level at which sampling starts; also edm_sigmas' default.
SIGMA_MAX = 80.0


class Edm:
    """EDM's objective for images (N, C, H, W) of standard deviation `sigma_data`; t (N,) float64 is
    sigma. x_t = x_start + sigma noise.

    ln(sigma) is normal in training, with `p_mean` and `p_std`, so ln(sigma) = p_mean + p_std
    Phi^-1(u). The model F is given c_in x_t and c_noise = ln(sigma) / 4, and D = c_skip x_t + c_out
    F (eq. 7, table 1).
    """

    samplers: ClassVar[tuple[SamplerName, ...]] = ("heun", "euler")
    default_steps: ClassVar[int] = 18
    preview_sampler: ClassVar[SamplerName] = "heun"
    clips_predictions: ClassVar[bool] = False

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5):
        if not (math.isfinite(p_mean) and 0 < p_std < math.inf and 0 < sigma_data < math.inf):
            raise ConfigError(
                f"p_mean={p_mean}, p_std={p_std}, sigma_data={sigma_data} make no noise levels; the "
                "last two must be positive, the paper has -1.2, 1.2 and 0.5"
            )
        self.p_mean, self.p_std, self.sigma_data = p_mean, p_std, sigma_data

    # ---- the noise axis

    def snap_to_timesteps(self, low: float, high: float) -> tuple[float, float]:
        return low, high

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        check_draw(v, low, high)
        u = clamp_to_open_interval(low + v * (high - low), low, high)
        return (self.p_mean + self.p_std * torch.special.ndtri(u)).exp()

    def noise_level(self, t: Tensor) -> Tensor:
        u = torch.special.ndtr((t.double().log() - self.p_mean) / self.p_std)
        return clamp_to_open_interval(u, 0.0, 1.0)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * t.double().log()

    def log_snr_at(self, u: float) -> float:
        if u in (0, 1):
            return math.copysign(math.inf, 0.5 - u)
        return -2 * (self.p_mean + self.p_std * NormalDist().inv_cdf(u))

    def noise_level_of_snr(self, log_snr: Tensor) -> Tensor:
        return torch.special.ndtr((-0.5 * log_snr - self.p_mean) / self.p_std)

    def x_start_weight(self, t: Tensor) -> Tensor:
        """The factor from the squared error of x_start to the mse: lambda(sigma) = 1 / c_out^2."""
        # Eq. 8: the error of F is that of D over c_out.
        sigma = t.double()
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return torch.ones_like(sigma), sigma

    def time_of_input(self, t: Tensor) -> Tensor:
        """The model is given ln(sigma) / 4."""
        return (4 * t.double()).exp()

    # ---- training

    def network(self, model: Model, x_t: Tensor, sigma: Tensor, y: Condition) -> Tensor:
        """The network's output F, float32."""
        # Table 1: c_in makes the input's variance 1, and c_noise = ln(sigma) / 4.
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        output = model(c_in.float()[:, None, None, None] * x_t, sigma.log() / 4, y).float()
        if output.shape != x_t.shape:
            raise ConfigError(
                f"the model returned {output.shape[1]} channels for {x_t.shape[1]}-channel images; "
                "EDM learns no variance, build the model with learn_sigma=False"
            )
        return output

    def denoised(self, model: Model, x_t: Tensor, sigma: Tensor, y: Condition) -> Tensor:
        """The denoised image D(x_t; sigma), float32. `sigma`: (N,) float64."""
        # Eq. 7 with the coefficients of table 1.
        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        x_t = x_t.float()
        skipped = c_skip.float()[:, None, None, None] * x_t
        return skipped + c_out.float()[:, None, None, None] * self.network(model, x_t, sigma, y)

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, y: Condition
    ) -> Losses:
        """The mean of lambda |D - x_start|^2 (eq. 8), as |F - target|^2."""
        # target = (x_start - c_skip x_t) / c_out, written out: for small sigma that difference
        # would cancel.
        x_start, noise = x_start.float(), noise.float()
        scale = 1 / (self.sigma_data * (t.square() + self.sigma_data**2).sqrt())
        of_x_start = (t * scale).float()[:, None, None, None]
        of_noise = (self.sigma_data**2 * scale).float()[:, None, None, None]
        target = of_x_start * x_start - of_noise * noise

        x_t = x_start + t.float()[:, None, None, None] * noise
        error = self.network(model, x_t, t, y) - target
        mse = error.square().flatten(1).mean(1)
        return Losses(mse, mse, torch.zeros_like(mse))

    # ---- sampling

    def check_steps(self, sampler: str, steps: int | str) -> None:
        check_step_count(steps)

    def evaluations(self, sampler: str, steps: int | str) -> int:
        return 2 * int(steps) - 1 if sampler == "heun" else int(steps)

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
        """Algorithm 1 from sigma_max x_T, over `steps` noise levels and 0. `noise` is not asked
        for."""

        def derivative(x: Tensor, sigma: float) -> Tensor:
            each = torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
            # The noise level, as `noise_level` has it, but on the host.
            u = 0.5 * math.erfc((self.p_mean - math.log(sigma)) / (self.p_std * math.sqrt(2)))
            output = (x - self.denoised(at(model, u), x, each, y)) / sigma
            tick()
            return output

        times = [*edm_sigmas(int(steps), sigma_max=SIGMA_MAX), 0.0]
        if sampler == "heun":
            return heun(derivative, SIGMA_MAX * x_T, times, euler_last=True)
        return euler(derivative, SIGMA_MAX * x_T, times)
