"""The objective and the draw of noise levels that a config describes."""

import numpy as np
import torch

from largescale import noise_schedule
from largescale.config.schema import Config
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.noise_levels import NoiseSampler, make_noise_sampler
from largescale.diffusion.samplers import AnyObjective


def build_objective(config: Config) -> AnyObjective:
    d = config.diffusion
    if d.objective == "flow":
        return Flow(d.interpolant, learn_sigma=config.model.learn_sigma)
    if d.objective == "edm":
        return Edm(d.p_mean, d.p_std, d.sigma_data)
    betas = noise_schedule.make_betas(d.schedule, d.timesteps)
    return GaussianDiffusion(
        betas, learn_sigma=config.model.learn_sigma, fixed_variance=d.fixed_variance
    )


def build_noise_sampler(config: Config, objective: AnyObjective) -> NoiseSampler:
    bins = config.diffusion.timesteps
    middle = torch.from_numpy((np.arange(bins) + 0.5) / bins)
    return make_noise_sampler(config.noise, bins, objective.log_snr(objective.draw(middle)).numpy())
