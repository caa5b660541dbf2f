"""The samplers of Gaussian diffusion, over respaced timesteps: DDPM (arXiv:2006.11239, algorithm
2), DDIM (arXiv:2010.02502, eq. 12), DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), and Euler's
and Heun's methods on the probability flow ODE (arXiv:2206.00364, eq. 3).

A step of DDPM and DDIM is a pure function that returns the mean and the standard deviation of
x_{t-1}; `ancestral` adds the noise. The others are deterministic; their coefficients are floats,
from the float64 tables on the host.
"""

import bisect
import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from largescale.diffusion.diffusion_process import DiffusionProcess
from largescale.diffusion.ode import euler, heun
from largescale.errors import ConfigError
from largescale.noise_schedule import space_timesteps

Ask = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x_t, a timestep of the process) -> the model's output, and that timestep for each image."""


def kept_timesteps(sampler: str, steps: int | str, timesteps: int) -> np.ndarray:
    """The timesteps that a sampler visits, rising. Raises ConfigError for fewer than two."""
    if sampler == "dpm++2m" and str(steps).isdecimal() and int(steps) < timesteps:
        # As in diffusers: without t = 0, towards which the extrapolation would reach too far, and
        # halves rounded as there.
        spread = np.linspace(0, timesteps - 1, int(steps) + 1)
        kept = np.rint(spread).astype(np.int64)[1:]
    else:
        kept = space_timesteps(timesteps, steps)
    if len(kept) < 2:
        raise ConfigError(f"steps={steps} leaves nothing between noise and image; use 2 or more")
    return kept


def ddpm_step(
    process: DiffusionProcess,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; the chain ends at t = 0, so std is 0 there."""
    p = process.p_mean_variance(model_output, x_t, t, clip_denoised)
    return p.mean, (0.5 * p.log_variance).exp() * (t > 0)[:, None, None, None]


def ddim_step(
    process: DiffusionProcess,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; eta = 0 is deterministic, eta = 1 has DDPM's small variance."""
    pred_x_start = process.p_mean_variance(model_output, x_t, t, clip_denoised).pred_x_start

    # Not the model's eps: clipping may have moved the image that it implies.
    off = process.at("sqrt_recip_alphas_cumprod", t) * x_t - pred_x_start
    eps = off / process.at("sqrt_recipm1_alphas_cumprod", t)

    # DDIM eq. 12
    variance = eta**2 * process.at("posterior_variance", t)  # DDIM eq. 16; 0 at t = 0
    towards_x_t = (process.at("one_minus_alphas_cumprod_prev", t) - variance).sqrt()
    mean = process.at("alphas_cumprod_prev", t).sqrt() * pred_x_start + towards_x_t * eps
    return mean, variance.sqrt()


def dpm_solver_2m(
    process: DiffusionProcess, x_start_at: Callable[[Tensor, int], Tensor], x_t: Tensor
) -> Tensor:
    """x_0 by DPM-Solver++(2M), from x_t at the last timestep; `x_start_at(x_t, t)` is the predicted
    image.

    The first step and the one from t = 0 to the image are of first order, the latter at any count
    of steps: lambda is infinite at the image, and diffusers with final_sigmas_type="zero" does the
    same.
    """
    alpha_bar = process.tables["alphas_cumprod"]
    alpha = np.sqrt(alpha_bar).tolist()
    sigma = np.sqrt(1 - alpha_bar).tolist()
    before: tuple[Tensor, float] | None = None  # x_start and h of the step before
    for t in range(len(alpha) - 1, 0, -1):
        x_start = x_start_at(x_t, t)
        # The step in lambda = ln(alpha / sigma)
        h = math.log(alpha[t - 1] / sigma[t - 1]) - math.log(alpha[t] / sigma[t])
        # D_i: x_start extrapolated by half a step, from the last two.
        ahead = x_start
        if before is not None:
            ahead = x_start + h / (2 * before[1]) * (x_start - before[0])
        x_t = sigma[t - 1] / sigma[t] * x_t - alpha[t - 1] * math.expm1(-h) * ahead
        before = x_start, h
    return x_start_at(x_t, 0)


def probability_flow(
    process: DiffusionProcess,
    x_start_at: Callable[[Tensor, int], Tensor],
    x_t: Tensor,
    second_order: bool,
) -> Tensor:
    """x_0 by Euler's or Heun's method, from x_t at the last timestep; `x_start_at(x_t, t)` is the
    predicted image.

    The ODE in EDM's variables x = x_t / sqrt(alpha_bar) and sigma = sqrt((1 - alpha_bar) /
    alpha_bar): dx/dsigma = (x - x_start) / sigma = eps; and the same with z = x / sigma while sigma
    >= 1: dz/d(1/sigma) = x_start. Euler's step is the same in both. Heun's is not: the cosine
    schedule's first step falls from sigma = 20000 to about 30, and half of that times the
    difference of two eps would be most of x.
    """
    sigma = process.tables["sqrt_recipm1_alphas_cumprod"].tolist()
    last = len(sigma) - 1
    # The first timestep with sigma >= 1, at which z becomes x; sigma rises with t.
    turn = min(bisect.bisect_left(sigma, 1.0), last)
    # Times in the order taken, and the timestep of each.
    above = {1 / sigma[t]: t for t in range(last, turn - 1, -1)}
    below = {sigma[t]: t for t in range(turn, -1, -1)}

    def dz(z: Tensor, time: float) -> Tensor:
        return x_start_at(z / math.hypot(1, time), above[time])

    def dx(x: Tensor, time: float) -> Tensor:
        return (x - x_start_at(x / math.hypot(1, time), below[time])) / time

    # x_t in the variable z; the state's factors come from x_t = x / sqrt(1 + sigma^2).
    z = x_t * math.hypot(1, 1 / sigma[-1])
    if second_order:
        return heun(dx, heun(dz, z, list(above)) * sigma[turn], [*below, 0.0], euler_last=True)
    return euler(dx, euler(dz, z, list(above)) * sigma[turn], [*below, 0.0])


def ancestral(
    process: DiffusionProcess,
    ask: Ask,
    x_t: Tensor,
    *,
    sampler: str,
    noise: Callable[[int], Tensor],
    eta: float,
    clip_denoised: bool,
) -> Tensor:
    """x_0 by steps of DDPM or DDIM, from x_t at the last timestep."""
    last = process.timesteps_total - 1
    for i in range(last + 1):
        model_output, t = ask(x_t, last - i)
        if sampler == "ddpm":
            mean, std = ddpm_step(process, model_output, x_t, t, clip_denoised)
        else:
            mean, std = ddim_step(process, model_output, x_t, t, eta, clip_denoised)
        # The last step ends at the image, and DDIM without eta is deterministic.
        adds_noise = i < last and (sampler == "ddpm" or eta)
        x_t = mean + std * noise(i) if adds_noise else mean
    return x_t


def sample(
    process: DiffusionProcess,
    ask: Ask,
    x_T: Tensor,
    *,
    sampler: str,
    noise: Callable[[int], Tensor],
    eta: float,
    clip_denoised: bool,
) -> Tensor:
    """x_0 from x_T at the last timestep of a process that keeps the timesteps to visit."""

    def x_start_at(x_t: Tensor, timestep: int) -> Tensor:
        model_output, t = ask(x_t, timestep)
        return process.p_mean_variance(model_output, x_t, t, clip_denoised).pred_x_start

    # The deterministic samplers need the predicted image only.
    if sampler == "dpm++2m":
        return dpm_solver_2m(process, x_start_at, x_T)
    if sampler in ("euler", "heun"):
        return probability_flow(process, x_start_at, x_T, second_order=sampler == "heun")
    return ancestral(
        process, ask, x_T, sampler=sampler, noise=noise, eta=eta, clip_denoised=clip_denoised
    )
