"""The objects that a config describes."""

import torch

from largescale.condition import Captions, Condition
from largescale.config.schema import ModelConfig
from largescale.models import dit, unet
from largescale.models.dit import DiT
from largescale.models.unet import DDPMpp

Network = DiT | DDPMpp


def build_model(config: ModelConfig) -> Network:
    """Initialised from torch's global seed."""
    fields = {
        key: value for key, value in vars(config).items() if key not in ("architecture", "unet")
    }
    if config.architecture == "dit":
        return DiT(**fields)
    common = ("input_size", "in_channels", "num_classes")
    return DDPMpp(**{key: fields[key] for key in common}, **vars(config.unet))


def flops_per_image(model: Network) -> int:
    """Floating-point operations of one forward pass per image: two per multiply-add, matrix
    products only."""
    return dit.flops_per_image(model) if isinstance(model, DiT) else unet.flops_per_image(model)


def blank_condition(model: ModelConfig, n: int) -> Condition:
    """Of the right shapes for n images, on torch's default device: for counting, and for models
    that need none."""
    zeros = torch.zeros(n, dtype=torch.long)
    if not model.max_caption_tokens:
        return zeros
    tokens = torch.zeros(n, model.max_caption_tokens, model.caption_width)
    pooled = torch.zeros(n, model.caption_pooled_width)
    return Captions(tokens, zeros + model.max_caption_tokens, pooled, null=zeros > 0)


def latent_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(C, H, W) of `x_start`."""
    return model.in_channels, model.input_size, model.input_size
