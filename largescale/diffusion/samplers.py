"""Samplers over respaced timesteps: DDPM (arXiv:2006.11239, algorithm 2) and DDIM (arXiv:2010.02502, eq. 12).

A step is a pure function that returns the mean and the standard deviation of x_{t-1}; `sample` adds the noise.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from largescale.diffusion.gaussian import GaussianDiffusion, Model
from largescale.diffusion.schedule import space_timesteps
from largescale.errors import ConfigError
from largescale.models.conditioning import Condition


def ddpm_step(diffusion: GaussianDiffusion, model_output: Tensor, x_t: Tensor, t: Tensor,
              clip_denoised: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; the chain ends at t = 0, so std is 0 there."""
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    return p.mean, (0.5 * p.log_variance).exp() * (t > 0)[:, None, None, None]


def ddim_step(diffusion: GaussianDiffusion, model_output: Tensor, x_t: Tensor, t: Tensor, eta: float = 0.0,
              clip_denoised: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; eta = 0 is deterministic, eta = 1 has DDPM's small variance."""
    pred_x_start = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised).pred_x_start
    eps = ((diffusion.at("sqrt_recip_alphas_cumprod", t) * x_t - pred_x_start)  # again, as clipping may have moved it
           / diffusion.at("sqrt_recipm1_alphas_cumprod", t))
    variance = eta**2 * diffusion.at("posterior_variance", t)                   # DDIM eq. 16; 0 at t = 0
    towards_x_t = (diffusion.at("one_minus_alphas_cumprod_prev", t) - variance).sqrt()
    return diffusion.at("alphas_cumprod_prev", t).sqrt() * pred_x_start + towards_x_t * eps, variance.sqrt()


@torch.no_grad()
def sample(
    diffusion: GaussianDiffusion,
    model: Model,
    x_T: Tensor,
    y: Condition,
    *,
    sampler: Literal["ddpm", "ddim"],
    steps: int | str,
    noise: Callable[[int], Tensor],
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Tensor:
    """x_0, (N, C, H, W) float32, from pure noise x_T (N, C, H, W) and conditions y.

    `diffusion`: the one trained with, over all T timesteps. `steps`: as `space_timesteps` takes them.
    `noise(i)`: noise of x_T's shape for the i-th step, i = 0 .. steps - 2 in the order taken; not asked for where it
    would not be used.
    """
    if sampler not in ("ddpm", "ddim") or not 0 <= eta <= 1:
        raise ConfigError(f"unknown sampler={sampler!r} with eta={eta}; use ddpm, or ddim with eta from 0 to 1")
    if sampler == "ddpm" and eta:
        raise ConfigError(f"eta={eta} is a setting of ddim; leave it 0, or use sampler=ddim")
    kept = space_timesteps(diffusion.timesteps_total, steps)
    if len(kept) < 2:
        raise ConfigError(f"steps={steps} leaves nothing between noise and image; use 2 or more")
    respaced = diffusion.respaced(kept)
    last = respaced.timesteps_total - 1
    x_t = x_T.float()
    for i in range(last + 1):
        t = torch.full((len(x_t),), last - i, device=x_t.device)
        model_output = respaced.model_output(model, x_t, t, y)
        if sampler == "ddpm":
            mean, std = ddpm_step(respaced, model_output, x_t, t, clip_denoised)
        else:
            mean, std = ddim_step(respaced, model_output, x_t, t, eta, clip_denoised)
        x_t = mean + std * noise(i) if i < last and (sampler == "ddpm" or eta) else mean
    return x_t
