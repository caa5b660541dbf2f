"""Sampling with any objective: checks of the settings, the amount of work, and the samples.

The samplers themselves are part of each objective.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.diffusion.objective import Model, Objective, SamplerName
from largescale.errors import ConfigError

# Samplers that are good in few steps, and how many.
QUICK: dict[SamplerName, int] = {"ddim": 50, "heun": 18}


def quick_sampler(
    objective: Objective,
    sampler: SamplerName | None = None,
    steps: int | None = None,
) -> tuple[SamplerName, int]:
    """The sampler and steps that are asked for; by default those for scores along the way: DDIM in
    50 steps, Heun's method in 18 where the objective has no DDIM, or else its own default."""
    if sampler is None:
        quick = [name for name in objective.samplers if name in QUICK]
        sampler = (quick or objective.samplers)[0]
    return sampler, steps or QUICK.get(sampler, objective.default_steps)


def evaluations(objective: Objective, sampler: SamplerName, steps: int | str) -> int:
    """How often `sample` asks the model. Raises ConfigError where `sample` would."""
    check_sampler(objective, sampler, steps, eta=0.0)
    return objective.evaluations(sampler, steps)


def check_sampler(objective: Objective, sampler: str, steps: int | str, eta: float) -> None:
    """Raises ConfigError for settings that `sample` does not take."""
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
    objective.check_steps(sampler, steps)


@torch.no_grad()
def sample(
    objective: Objective,
    model: Model,
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
    """Samples x_0, (N, C, H, W) float32, from pure noise x_T (N, C, H, W) and conditions y.

    `objective`: the one trained with, over all T timesteps. `model`: guidance is asked for the
    model of each noise level. `steps`: a count; for Gaussian diffusion as `space_timesteps` takes
    them. `noise(i)`: noise of x_T's shape for the i-th step, i = 0 .. steps - 2 in the order taken;
    not asked for where it would not be used, so only by ddpm, ddim with `eta`, and sde. `eta`:
    ddim's, 0 to 1. `clip_denoised`: holds every predicted image in [-1, 1], where the objective
    `clips_predictions`. `tick` is called after each of the `evaluations`.
    """
    check_sampler(objective, sampler, steps, eta)
    # A setting that is silently ignored would be written beside the samples as if it had counted.
    if clip_denoised and not objective.clips_predictions:
        raise ConfigError(
            f"clip_denoised=True is no setting of {type(objective).__name__}; leave it off"
        )
    return objective.sample(
        model,
        x_T.float(),
        y,
        sampler=sampler,
        steps=steps,
        noise=noise,
        eta=eta,
        clip_denoised=clip_denoised,
        tick=tick,
    )
