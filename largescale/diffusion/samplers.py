"""`sample`, for any objective; and the samplers of Gaussian diffusion, over respaced timesteps:
DDPM (arXiv:2006.11239, algorithm 2), DDIM (arXiv:2010.02502, eq. 12), DPM-Solver++(2M)
(arXiv:2211.01095, algorithm 2), and Euler's and Heun's methods on the probability flow ODE
(arXiv:2206.00364, eq. 3).

A step of DDPM and DDIM is a pure function that returns the mean and the standard deviation of
x_{t-1}; `sample` adds the noise. The others are deterministic; their coefficients are floats, from
the float64 tables on the host.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.guidance import ClassifierFreeGuidance, at
from largescale.diffusion.objective import Model, SamplerName
from largescale.diffusion.ode import euler, heun
from largescale.errors import ConfigError
from largescale.noise_schedule import space_timesteps

AnyObjective = GaussianDiffusion | Flow | Edm

QUICK: dict[SamplerName, int] = {"ddim": 50, "heun": 18}  # good in so few steps


def quick_sampler(
    objective: AnyObjective,
    sampler: SamplerName | None = None,
    steps: int | None = None,
) -> tuple[SamplerName, int]:
    """What is asked for; by default, for scores along the way, DDIM in 50 steps, or Heun's method
    in 18 where the objective has no DDIM."""
    chosen = (
        next(name for name in objective.samplers if name in QUICK) if sampler is None else sampler
    )
    return chosen, steps or QUICK.get(chosen, objective.default_steps)


def _kept_timesteps(sampler: str, steps: int | str, timesteps: int) -> np.ndarray:
    if sampler == "dpm++2m" and str(steps).isdecimal() and int(steps) < timesteps:
        # As diffusers has it: without t = 0, towards which the extrapolation would reach too far.
        kept = space_timesteps(timesteps, int(steps) + 1)[1:]
    else:
        kept = space_timesteps(timesteps, steps)
    if len(kept) < 2:
        raise ConfigError(f"steps={steps} leaves nothing between noise and image; use 2 or more")
    return kept


def evaluations(objective: AnyObjective, sampler: SamplerName, steps: int | str) -> int:
    """How often `sample` asks the model. Raises ConfigError where `sample` would."""
    check_sampler(objective, sampler, steps, eta=0.0)
    if not isinstance(objective, GaussianDiffusion):
        return objective.evaluations(sampler, int(steps))
    count = len(_kept_timesteps(sampler, steps, objective.timesteps_total))
    return 2 * count - 1 if sampler == "heun" else count


def check_sampler(objective: AnyObjective, sampler: str, steps: int | str, eta: float) -> None:
    """Raises ConfigError for what `sample` could not do."""
    if sampler not in objective.samplers:
        raise ConfigError(
            f"unknown sampler={sampler!r} for {type(objective).__name__}; choose one of "
            f"{', '.join(objective.samplers)}"
        )
    if not 0 <= eta <= 1:
        raise ConfigError(
            f"eta={eta} must lie from 0, no noise, to 1, DDPM's; and be 0 but for sampler=ddim"
        )
    if sampler != "ddim" and eta:
        raise ConfigError(f"eta={eta} is a setting of ddim; leave it 0, or use sampler=ddim")
    if isinstance(objective, GaussianDiffusion):
        _kept_timesteps(sampler, steps, objective.timesteps_total)
    elif not str(steps).isdecimal() or int(steps) < 2:
        raise ConfigError(f"steps={steps!r} must be a count of 2 or more")


def ddpm_step(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; the chain ends at t = 0, so std is 0 there."""
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    return p.mean, (0.5 * p.log_variance).exp() * (t > 0)[:, None, None, None]


def ddim_step(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_t: Tensor,
    t: Tensor,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean and std of x_{t-1}; eta = 0 is deterministic, eta = 1 has DDPM's small variance."""
    pred_x_start = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised).pred_x_start
    eps = (
        (
            diffusion.at("sqrt_recip_alphas_cumprod", t) * x_t - pred_x_start
        )  # again, as clipping may have moved it
        / diffusion.at("sqrt_recipm1_alphas_cumprod", t)
    )
    variance = eta**2 * diffusion.at("posterior_variance", t)  # DDIM eq. 16; 0 at t = 0
    towards_x_t = (diffusion.at("one_minus_alphas_cumprod_prev", t) - variance).sqrt()
    return diffusion.at(
        "alphas_cumprod_prev", t
    ).sqrt() * pred_x_start + towards_x_t * eps, variance.sqrt()


def _dpm_solver_2m(
    diffusion: GaussianDiffusion, x_start_at: Callable[[Tensor, int], Tensor], x_t: Tensor
) -> Tensor:
    """x_0 by DPM-Solver++(2M), from x_t at the last timestep; `x_start_at(x_t, t)` is the predicted
    image.

    The first step and the one from t = 0 to the image are of first order, the latter at any count
    of steps: lambda is infinite at the image, and diffusers with final_sigmas_type="zero" does the
    same.
    """
    alpha_bar = diffusion.tables["alphas_cumprod"]
    alpha, sigma = np.sqrt(alpha_bar).tolist(), np.sqrt(1 - alpha_bar).tolist()
    before: tuple[Tensor, float] | None = None  # x_start and h of the step before
    for t in range(len(alpha) - 1, 0, -1):
        x_start = x_start_at(x_t, t)
        h = math.log(alpha[t - 1] / sigma[t - 1]) - math.log(alpha[t] / sigma[t])
        ahead = (
            x_start if before is None else x_start + h / (2 * before[1]) * (x_start - before[0])
        )  # D_i
        x_t = sigma[t - 1] / sigma[t] * x_t - alpha[t - 1] * math.expm1(-h) * ahead
        before = x_start, h
    return x_start_at(x_t, 0)


def _probability_flow(
    diffusion: GaussianDiffusion,
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
    sigma = diffusion.tables["sqrt_recipm1_alphas_cumprod"].tolist()
    turn = min((t for t in range(len(sigma)) if sigma[t] >= 1), default=len(sigma) - 1)
    above = {
        1 / sigma[t]: t for t in range(len(sigma) - 1, turn - 1, -1)
    }  # times in the order taken, and whose
    below = {sigma[t]: t for t in range(turn, -1, -1)}

    def dz(z: Tensor, time: float) -> Tensor:
        return x_start_at(z / math.hypot(1, time), above[time])

    def dx(x: Tensor, time: float) -> Tensor:
        return (x - x_start_at(x / math.hypot(1, time), below[time])) / time

    z = x_t * math.hypot(1, 1 / sigma[-1])
    if second_order:
        return heun(dx, heun(dz, z, list(above)) * sigma[turn], [*below, 0.0], euler_last=True)
    return euler(dx, euler(dz, z, list(above)) * sigma[turn], [*below, 0.0])


@torch.no_grad()
def sample(
    objective: AnyObjective,
    model: Model | ClassifierFreeGuidance,
    x_T: Tensor,
    y: Condition,
    *,
    sampler: SamplerName,
    steps: int | str,
    noise: Callable[[int], Tensor],
    eta: float = 0.0,
    clip_denoised: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """x_0, (N, C, H, W) float32, from pure noise x_T (N, C, H, W) and conditions y.

    `objective`: the one trained with, over all T timesteps. `model`: guidance is asked for the
    model of each noise level. `steps`: a count; for Gaussian diffusion as `space_timesteps` takes
    them. `noise(i)`: noise of x_T's shape for the i-th step, i = 0 .. steps - 2 in the order taken;
    not asked for where it would not be used, so only by ddpm, ddim with `eta`, and sde. `eta`:
    ddim's, 0 to 1. `clip_denoised`: holds every predicted image in [-1, 1]; of Gaussian diffusion
    only. `tick` is called after each of the `evaluations`.
    """
    check_sampler(objective, sampler, steps, eta)
    if not isinstance(objective, GaussianDiffusion):
        if clip_denoised:
            raise ConfigError(
                f"clip_denoised is a setting of Gaussian diffusion; {type(objective).__name__} has "
                "none"
            )
        return objective.sample(
            model, x_T.float(), y, sampler=sampler, steps=int(steps), noise=noise, tick=tick
        )
    diffusion = objective
    respaced = diffusion.respaced(_kept_timesteps(sampler, steps, diffusion.timesteps_total))
    last = respaced.timesteps_total - 1

    def asked(x_t: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """What the model says at one of the kept timesteps, and that timestep for each image."""
        t = torch.full((len(x_t),), timestep, device=x_t.device)
        u = (
            int(respaced.timestep_map[timestep]) + 0.5
        ) / diffusion.timesteps_total  # on the host; see noise_level
        model_output = respaced.model_output(at(model, u), x_t, t, y)
        tick()
        return model_output, t

    def x_start_at(x_t: Tensor, timestep: int) -> Tensor:
        model_output, t = asked(x_t, timestep)
        return respaced.p_mean_variance(model_output, x_t, t, clip_denoised).pred_x_start

    x_t = x_T.float()
    if sampler == "dpm++2m":
        return _dpm_solver_2m(respaced, x_start_at, x_t)
    if sampler in ("euler", "heun"):
        return _probability_flow(respaced, x_start_at, x_t, second_order=sampler == "heun")
    for i in range(last + 1):
        model_output, t = asked(x_t, last - i)
        if sampler == "ddpm":
            mean, std = ddpm_step(respaced, model_output, x_t, t, clip_denoised)
        else:
            mean, std = ddim_step(respaced, model_output, x_t, t, eta, clip_denoised)
        x_t = mean + std * noise(i) if i < last and (sampler == "ddpm" or eta) else mean
    return x_t
