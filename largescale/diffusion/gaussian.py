"""Gaussian diffusion as an objective: epsilon prediction, with fixed variances (DDPM) or learned
ones (Improved DDPM).

Equations: Ho et al., arXiv:2006.11239 (DDPM); Nichol and Dhariwal, arXiv:2102.09672 (IDDPM).
"""

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.diffusion import gaussian_samplers
from largescale.diffusion.diffusion_process import DiffusionProcess
from largescale.diffusion.gaussian_samplers import kept_timesteps
from largescale.diffusion.guidance import at
from largescale.diffusion.objective import Losses, Model, SamplerName, check_draw


class GaussianDiffusion(DiffusionProcess):
    """DDPM's objective for images (N, C, H, W); timesteps t (N,) int64 in 0 .. T - 1, 0 = least
    noise."""

    samplers: ClassVar[tuple[SamplerName, ...]] = ("ddpm", "ddim", "dpm++2m", "euler", "heun")
    default_steps: ClassVar[int] = 250
    preview_sampler: ClassVar[SamplerName] = "ddim"
    clips_predictions: ClassVar[bool] = True

    # ---- the noise axis

    def _integers(self, low: float, high: float) -> tuple[int, int]:
        """The first and last of the timesteps whose noise level lies in [low, high); the nearest
        one where none does."""
        # The noise level of t is (t + 0.5) / T.
        first = math.ceil(low * self.timesteps_total - 0.5)
        end = math.ceil(high * self.timesteps_total - 0.5)
        first = min(first, self.timesteps_total - 1)
        return first, max(first, end - 1)

    def snap_to_timesteps(self, low: float, high: float) -> tuple[float, float]:
        first, last = self._integers(low, high)
        return first / self.timesteps_total, (last + 1) / self.timesteps_total

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """t, (N,) int64, uniform over the timesteps whose noise level lies in [low, high)."""
        check_draw(v, low, high)
        first, last = self._integers(low, high)
        # Rounding may give last + 1 for a v close to 1.
        return (first + (v * (last + 1 - first)).floor().long()).clamp(max=last)

    def noise_level(self, t: Tensor) -> Tensor:
        """The middle of the share of the noise axis that t stands for."""
        return (t.double() + 0.5) / self.timesteps_total

    def log_snr(self, t: Tensor) -> Tensor:
        return self._table("log_snr", t)

    def log_snr_at(self, u: float) -> float:
        return float(
            np.interp(
                u * self.timesteps_total, np.arange(self.timesteps_total + 1), self.edges_log_snr
            )
        )

    def noise_level_of_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr_at`: floor(u T) is the timestep whose log SNR is nearest."""
        edges = self.tables_on(log_snr.device)["edges_log_nsr"]  # rising
        right = torch.searchsorted(edges, -log_snr).clamp(1, self.timesteps_total)
        share = (-log_snr - edges[right - 1]) / (edges[right] - edges[right - 1])
        return ((right - 1 + share) / self.timesteps_total).clamp(0, 1)

    def x_start_weight(self, t: Tensor) -> Tensor:
        """The factor from the squared error of x_start to the mse: the SNR."""
        # x_start = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), so
        # |eps error|^2 = SNR |x_start error|^2.
        return self.log_snr(t).exp()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # From the float64 tables: those on the device are float32.
        alpha = torch.from_numpy(self.tables["sqrt_alphas_cumprod"]).to(t.device)
        sigma = torch.from_numpy(self.tables["sqrt_one_minus_alphas_cumprod"]).to(t.device)
        return alpha[t], sigma[t]

    def time_of_input(self, t: Tensor) -> Tensor:
        return t

    # ---- training

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, y: Condition
    ) -> Losses:
        """L_simple, DDPM eq. 14, and with a learned variance L_vlb (IDDPM, section 3.1). `x_start`,
        `noise`: (N, C, H, W). `model(x_t, t, y)`: (N, 2C or C, H, W) of any float type."""
        x_start, noise = x_start.float(), noise.float()
        x_t = self.q_sample(x_start, t, noise)
        model_output = self.model_output(model, x_t, t, y)
        eps, fraction = self._split(model_output, x_start.shape[1])
        mse = (noise - eps).square().flatten(1).mean(1)
        if fraction is None:
            return Losses(mse, mse, torch.zeros_like(mse))

        # IDDPM section 3.1: the gradient of vb reaches the variance only.
        frozen_mean = torch.cat([eps.detach(), fraction], dim=1)
        vb = self._variational_bound(frozen_mean, x_start, x_t, t)
        return Losses(mse + vb, mse, vb)

    def _variational_bound(
        self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """One term of the bound in bits per element, (N,): L_{t-1} of DDPM eq. 5, at t = 0 the
        decoder's L_0."""
        p = self.p_mean_variance(model_output, x_t, t)
        true_mean = self._posterior_mean(x_start, x_t, t)
        true_log_variance = self.at("min_log_variance", t)
        # KL divergence of two Gaussians, per element
        kl = 0.5 * (
            p.log_variance
            - true_log_variance
            - 1
            + (true_log_variance - p.log_variance).exp()
            + (true_mean - p.mean).square() * (-p.log_variance).exp()
        )
        nll = -discretized_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
        bits = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return bits / math.log(2)

    # ---- sampling

    def check_steps(self, sampler: str, steps: int | str) -> None:
        kept_timesteps(sampler, steps, self.timesteps_total)

    def evaluations(self, sampler: str, steps: int | str) -> int:
        count = len(kept_timesteps(sampler, steps, self.timesteps_total))
        return 2 * count - 1 if sampler == "heun" else count

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
        """x_0 from x_T at the last timestep, over the kept ones."""
        process = self.respaced(kept_timesteps(sampler, steps, self.timesteps_total))

        def ask(x_t: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
            t = torch.full((len(x_t),), timestep, device=x_t.device)
            # The noise level, as `noise_level` has it, but on the host.
            u = (int(process.timestep_map[timestep]) + 0.5) / self.timesteps_total
            model_output = process.model_output(at(model, u), x_t, t, y)
            tick()
            return model_output, t

        return gaussian_samplers.sample(
            process, ask, x_T, sampler=sampler, noise=noise, eta=eta, clip_denoised=clip_denoised
        )


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln of the Gaussian's mass in the bin of width 2/255 around x, open at -1 and 1 (DDPM eq.
    13)."""
    upper = standard_normal_cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = standard_normal_cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation with which guided-diffusion's losses, and so published ones, were
    computed."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
