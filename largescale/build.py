"""The objects that a config describes."""

import torch

from largescale.config import DiffusionConfig, ModelConfig
from largescale.diffusion import schedule
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.models.conditioning import Captions, Condition
from largescale.models.dit import DiT


def build_model(config: ModelConfig) -> DiT:
    """Initialised from torch's global seed."""
    return DiT(**vars(config))


def build_diffusion(config: DiffusionConfig, learn_sigma: bool) -> GaussianDiffusion:
    return GaussianDiffusion(
        schedule.make_betas(config.schedule, config.timesteps),
        learn_sigma=learn_sigma,
        fixed_variance=config.fixed_variance,
    )


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
