"""The objects that a config describes."""

from largescale.config import DiffusionConfig, ModelConfig
from largescale.diffusion import schedule
from largescale.diffusion.gaussian import GaussianDiffusion
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


def latent_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(C, H, W) of `x_start`."""
    return model.in_channels, model.input_size, model.input_size
