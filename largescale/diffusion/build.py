"""The objective and the draw of noise levels that a config describes."""

from collections.abc import Callable

from largescale import noise_schedule
from largescale.config.schema import Config
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.noise_levels import make_noise_sampler
from largescale.diffusion.noise_sampler import NoiseSampler
from largescale.diffusion.objective import Objective
from largescale.registry import look_up


def _gaussian(config: Config) -> GaussianDiffusion:
    d = config.diffusion
    return GaussianDiffusion(
        noise_schedule.make_betas(d.schedule, d.timesteps),
        learn_sigma=config.model.learn_sigma,
        fixed_variance=d.fixed_variance,
    )


def _flow(config: Config) -> Flow:
    return Flow(config.diffusion.interpolant, learn_sigma=config.model.learn_sigma)


def _edm(config: Config) -> Edm:
    d = config.diffusion
    return Edm(d.p_mean, d.p_std, d.sigma_data)


# The values of diffusion.objective
OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "gaussian": _gaussian,
    "flow": _flow,
    "edm": _edm,
}


def build_objective(config: Config) -> Objective:
    """The training objective of a config."""
    return look_up(OBJECTIVES, config.diffusion.objective, "diffusion.objective")(config)


def build_noise_sampler(config: Config, objective: Objective) -> NoiseSampler:
    """The draw of noise levels of a config, which depends on the objective's SNRs."""
    return make_noise_sampler(config.noise, objective, config.diffusion.timesteps)
