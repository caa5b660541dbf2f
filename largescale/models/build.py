"""The network that a config describes, and what follows from its shapes."""

from collections.abc import Callable

import torch

from largescale.condition import Captions, Condition
from largescale.config.schema import ModelConfig, TrainConfig
from largescale.models import dit, unet
from largescale.models.dit import DiT
from largescale.models.unet import DDPMpp
from largescale.registry import look_up

Network = DiT | DDPMpp


def _dit(config: ModelConfig) -> DiT:
    # DiT's arguments have the names of the config's fields.
    fields = dict(vars(config))
    del fields["architecture"], fields["unet"]
    return DiT(**fields)


def _ddpmpp(config: ModelConfig) -> DDPMpp:
    return DDPMpp(
        input_size=config.input_size,
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        **vars(config.unet),
    )


ARCHITECTURES: dict[str, Callable[[ModelConfig], Network]] = {"dit": _dit, "ddpmpp": _ddpmpp}


def build_model(config: ModelConfig) -> Network:
    """The network, initialised from torch's global generator."""
    return look_up(ARCHITECTURES, config.architecture, "model.architecture")(config)


def set_up_blocks(model: Network, train: TrainConfig) -> None:
    """How the blocks of a network that is trained are computed: activation checkpointing, fused
    kernels. Raises ConfigError where it has none."""
    model.checkpoint_blocks = train.activation_checkpointing
    if train.kernels == "fused":
        # Triton, which they need, is not everywhere.
        from largescale.models.fused_blocks import fuse_blocks

        fuse_blocks(model)


def flops_per_image(model: Network) -> int:
    """Floating-point operations of one forward pass per image: two per multiply-add, matrix
    products only."""
    return dit.flops_per_image(model) if isinstance(model, DiT) else unet.flops_per_image(model)


def blank_condition(model: ModelConfig, n: int) -> Condition:
    """A condition of the right shapes for n images, on torch's default device: to count with, and
    for models that need none."""
    zeros = torch.zeros(n, dtype=torch.long)
    if not model.max_caption_tokens:
        return zeros
    # Captions of full length, none of them dropped.
    tokens = torch.zeros(n, model.max_caption_tokens, model.caption_width)
    pooled = torch.zeros(n, model.caption_pooled_width)
    return Captions(tokens, zeros + model.max_caption_tokens, pooled, null=zeros > 0)


def latent_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(C, H, W) of `x_start`."""
    return model.in_channels, model.input_size, model.input_size
