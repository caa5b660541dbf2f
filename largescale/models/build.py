"""The objects that a config describes."""

import numpy as np
import torch

from largescale import noise_schedule
from largescale.config.schema import Config, ModelConfig
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.noise_levels import NoiseSampler, make_noise_sampler
from largescale.diffusion.samplers import AnyObjective
from largescale.models import dit, unet
from largescale.models.dit import DiT
from largescale.models.embedders import Captions, Condition
from largescale.models.unet import DDPMpp

Network = DiT | DDPMpp


def build_model(config: ModelConfig) -> Network:
    """Initialised from torch's global seed."""
    fields = {key: value for key, value in vars(config).items() if key not in ("architecture", "unet")}
    if config.architecture == "dit":
        return DiT(**fields)
    common = ("input_size", "in_channels", "num_classes")
    return DDPMpp(**{key: fields[key] for key in common}, **vars(config.unet))


def flops_per_image(model: Network) -> int:
    """Floating-point operations of one forward pass per image: two per multiply-add, matrix products only."""
    return dit.flops_per_image(model) if isinstance(model, DiT) else unet.flops_per_image(model)


def build_objective(config: Config) -> AnyObjective:
    d = config.diffusion
    if d.objective == "flow":
        return Flow(d.interpolant, learn_sigma=config.model.learn_sigma)
    if d.objective == "edm":
        return Edm(d.p_mean, d.p_std, d.sigma_data)
    betas = noise_schedule.make_betas(d.schedule, d.timesteps)
    return GaussianDiffusion(betas, learn_sigma=config.model.learn_sigma, fixed_variance=d.fixed_variance)


def build_noise_sampler(config: Config, objective: AnyObjective) -> NoiseSampler:
    bins = config.diffusion.timesteps
    middle = torch.from_numpy((np.arange(bins) + 0.5) / bins)
    return make_noise_sampler(config.noise, bins, objective.log_snr(objective.draw(middle)).numpy())


def blank_condition(model: ModelConfig, n: int) -> Condition:
    """Of the right shapes for n images, on torch's default device: for counting, and for models that need none."""
    zeros = torch.zeros(n, dtype=torch.long)
    if not model.caption_tokens:
        return zeros
    tokens = torch.zeros(n, model.caption_tokens, model.caption_width)
    pooled = torch.zeros(n, model.caption_pooled_width)
    return Captions(tokens, zeros + model.caption_tokens, pooled, null=zeros > 0)


def latent_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(C, H, W) of `x_start`."""
    return model.in_channels, model.input_size, model.input_size
