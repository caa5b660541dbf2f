"""What the weights of a DiT or SiT say of their network, and REPA's made SiT's."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from largescale.config.schema import ModelConfig
from largescale.errors import CheckpointError, ConfigError
from largescale.interop.names import listed
from largescale.models.dit import sincos_position
from largescale.models.embedders import sinusoid

# Heads by width, of every published DiT and SiT: S, B, L and XL.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Published names by (depth, width).
PUBLISHED_NAMES = {(12, 384): "S", (12, 768): "B", (24, 1024): "L", (28, 1152): "XL"}
# How far half precision rounds the values of a position embedding, which are at most 1.
ROUNDED_BY = 2**-8
# Of a network's weights only in training: REPA's, which compare features with another network's.
PROJECTORS = "projectors."


def is_dit(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of facebookresearch/DiT, which SiT and REPA have too."""
    return "x_embedder.proj.weight" in weights


def shape_of(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one of the weights. Raises CheckpointError where it is missing, or has another
    number of dimensions."""
    if name not in weights:
        raise CheckpointError(
            f"the weights lack {name}, and have {listed(weights)}; give the complete weights of a "
            "model"
        )
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions:
        raise CheckpointError(
            f"{name} has the shape {shape}, of {len(shape)} dimensions instead of {dimensions}: "
            "this is another network, which cannot be converted"
        )
    return shape


def dit_config(
    weights: Mapping[str, Tensor], num_heads: int | None, class_dropout_prob: float
) -> ModelConfig:
    """The network of the weights by their shapes, and by `num_heads`, by default that of the
    published network of this width. Raises CheckpointError, or ConfigError where the heads are not
    known."""
    width, channels, patch, _ = shape_of(weights, "x_embedder.proj.weight", 4)
    _, tokens, _ = shape_of(weights, "pos_embed", 3)
    mlp, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = shape_of(weights, "final_layer.linear.weight", 2)
    grid = round(tokens**0.5)
    if grid**2 != tokens:
        raise CheckpointError(
            f"pos_embed has {tokens} positions, which are no square; only square images are known"
        )
    if outputs not in (patch**2 * channels, patch**2 * 2 * channels):
        raise CheckpointError(
            f"final_layer.linear.weight has {outputs} outputs, and patches of {patch} x {patch} "
            f"with {channels} channels have {patch**2 * channels}, or twice as many with a learned "
            "variance; this is another network, which cannot be converted"
        )
    labels = 0
    if "y_embedder.embedding_table.weight" in weights:
        labels, _ = shape_of(weights, "y_embedder.embedding_table.weight", 2)
    return ModelConfig(
        input_size=grid * patch,
        in_channels=channels,
        patch_size=patch,
        hidden_size=width,
        depth=depth_of(weights),
        num_heads=num_heads or _published_heads(width),
        mlp_ratio=mlp / width,
        # The last row is the null label, where labels were dropped.
        num_classes=labels - (labels > 0 and class_dropout_prob > 0),
        class_dropout_prob=class_dropout_prob if labels else 0.0,
        learn_sigma=outputs == patch**2 * 2 * channels,
    )


def depth_of(weights: Mapping[str, Tensor]) -> int:
    """How many blocks there are."""
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in weights]
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def _published_heads(width: int) -> int:
    if width not in PUBLISHED_HEADS:
        raise ConfigError(
            f"the weights do not say how many attention heads they have, and no published DiT has "
            f"their width of {width}; give --num-heads, such as {max(1, width // 64)} of 64 channels"
        )
    return PUBLISHED_HEADS[width]


def with_exact_position(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The weights with the position embedding computed anew where they have it rounded to half
    precision, and whether it was."""
    position = weights["pos_embed"]
    exact = sincos_position(position.shape[2], round(position.shape[1] ** 0.5))
    if exact.shape != position.shape or (exact - position).abs().max() > ROUNDED_BY:
        return dict(weights), False
    return {**weights, "pos_embed": exact}, True


def from_repa(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """REPA's weights under SiT's names, without its projectors, and the names of what was left out.

    Its oldest checkpoints number the blocks behind the projectors anew.
    """
    left_out = sorted(name for name in weights if name.startswith(PROJECTORS))
    first = depth_of(weights)
    renamed = {}
    for name, tensor in weights.items():
        if name in left_out:
            continue
        if match := re.match(r"decoder_blocks\.(\d+)\.(.+)", name):
            name = f"blocks.{first + int(match[1])}.{match[2]}"
        renamed[name] = tensor
    return renamed, left_out


def reverse_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A velocity network v whose time has noise at 1, as REPA's has, as one whose time has data at
    1, as SiT's has: -v(x, 1 - t), to rounding.

    The cosine and sine of 1 - t are those of t, rotated and mirrored, so the first layer of the
    timestep's embedding takes it in; the last layer takes in the sign.
    """
    reversed_ = dict(weights)
    # In float64, so that only the result is rounded.
    first = weights["t_embedder.mlp.0.weight"].double()
    half = first.shape[1] // 2
    one = sinusoid(torch.ones(1), first.shape[1]).double()[0]
    cos, sin = one[:half], one[half:]
    of_cos, of_sin = first[:, :half], first[:, half:]
    mirrored = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    reversed_["t_embedder.mlp.0.weight"] = mirrored.float()
    for kind in ("weight", "bias"):
        reversed_[f"final_layer.linear.{kind}"] = -weights[f"final_layer.linear.{kind}"]
    return reversed_
