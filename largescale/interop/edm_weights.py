"""What the weights of EDM's DDPM++ say of their network."""

import re
from collections.abc import Mapping

from torch import Tensor

from largescale.config.schema import ModelConfig, UNetConfig
from largescale.errors import CheckpointError
from largescale.interop.dit_weights import shape_of


def is_edm(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of EDM's U-Nets."""
    return "map_layer0.weight" in weights and any(name.startswith("enc.") for name in weights)


def ddpmpp_config(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The network of the weights by their names and shapes. Raises CheckpointError for another of
    EDM's networks."""
    resolutions = _resolutions(weights)
    first = resolutions[0]
    channels, image_channels, _, _ = shape_of(weights, f"enc.{first}x{first}_conv.weight", 4)
    classes = augment = 0
    if "map_label.weight" in weights:
        _, classes = shape_of(weights, "map_label.weight", 2)
    if "map_augment.weight" in weights:
        _, augment = shape_of(weights, "map_augment.weight", 2)

    factors = []
    for side in resolutions:
        outputs, *_ = shape_of(weights, f"enc.{side}x{side}_block0.conv0.weight", 4)
        factors.append(outputs // max(channels, 1))
    return ModelConfig(
        architecture="ddpmpp",
        input_size=first,
        in_channels=image_channels,
        num_classes=classes,
        # Nothing in the weights says so, and EDM's released ones drop none.
        class_dropout_prob=0.0,
        learn_sigma=False,
        unet=UNetConfig(
            model_channels=channels,
            channel_mult=tuple(factors),
            num_blocks=_blocks(weights, first),
            attn_resolutions=tuple(
                side for side in resolutions if f"enc.{side}x{side}_block0.qkv.weight" in weights
            ),
            augment_dim=augment,
        ),
    )


def _resolutions(weights: Mapping[str, Tensor]) -> list[int]:
    """The sides of the images on the way down, the largest first."""
    found = set()
    for name in weights:
        if match := re.match(r"enc\.(\d+)x\1_", name):
            found.add(int(match[1]))
    if not found:
        raise CheckpointError(
            "the weights have an encoder without resolutions in its names, so they are none of EDM's"
        )
    return sorted(found, reverse=True)


def _blocks(weights: Mapping[str, Tensor], side: int) -> int:
    """How many residual blocks each resolution has."""
    blocks = set()
    for name in weights:
        if match := re.match(rf"enc\.{side}x{side}_block(\d+)\.", name):
            blocks.add(match[1])
    return len(blocks)
