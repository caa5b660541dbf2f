"""The weights of a DiT under diffusers' names and under ours, as pure functions of state dicts.

Ours are those of facebookresearch/DiT. diffusers' `DiTTransformer2DModel` has the same weights, but
gives each block its own copy of the embedders of timestep and label, keeps q, k and v apart, and
computes the position embedding anew.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from largescale.errors import CheckpointError
from largescale.interop.names import require_names
from largescale.models.dit import sincos_position

OUR_POSITION = "pos_embed"
# Older versions of diffusers may have stored it; newer ones compute it from the sizes.
THEIR_POSITION = "pos_embed.pos_embed"
# How far a position embedding may be from the one that diffusers computes.
POSITION_TOLERANCE = 1e-4

# Layers with weight and bias: our name, diffusers' name.
_OUTSIDE_THE_BLOCKS = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("final_layer.adaLN_modulation.1", "proj_out_1"),
    ("final_layer.linear", "proj_out_2"),
)
_OF_EACH_BLOCK = (
    ("adaLN_modulation.1", "norm1.linear"),
    ("attn.proj", "attn1.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
)
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# Single tensors of which each of diffusers' blocks has a copy.
_COPIED = (
    ("t_embedder.mlp.0.weight", "norm1.emb.timestep_embedder.linear_1.weight"),
    ("t_embedder.mlp.0.bias", "norm1.emb.timestep_embedder.linear_1.bias"),
    ("t_embedder.mlp.2.weight", "norm1.emb.timestep_embedder.linear_2.weight"),
    ("t_embedder.mlp.2.bias", "norm1.emb.timestep_embedder.linear_2.bias"),
    ("y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight"),
)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of ours and what diffusers has in its place."""

    ours: str
    theirs: tuple[str, ...]
    relation: Literal["copies", "parts"] = "copies"
    """Each of theirs is a copy of ours, or they are its parts in order along the first axis."""


def _tensors(depth: int) -> list[_Tensor]:
    """All tensors of a DiT of that depth, but for its position embedding."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    table = [_Tensor(ours, tuple(f"{b}.{theirs}" for b in blocks)) for ours, theirs in _COPIED]
    for kind in ("weight", "bias"):
        for ours, theirs in _OUTSIDE_THE_BLOCKS:
            table.append(_Tensor(f"{ours}.{kind}", (f"{theirs}.{kind}",)))
        for i, block in enumerate(blocks):
            for ours, theirs in _OF_EACH_BLOCK:
                table.append(_Tensor(f"blocks.{i}.{ours}.{kind}", (f"{block}.{theirs}.{kind}",)))
            parts = tuple(f"{block}.{name}.{kind}" for name in _QKV)
            table.append(_Tensor(f"blocks.{i}.attn.qkv.{kind}", parts, "parts"))
    return table


def _depth(names: Mapping[str, Tensor], blocks: str) -> int:
    """How many blocks the names speak of."""
    numbers = [re.match(rf"{blocks}\.(\d+)\.", name) for name in names]
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def from_diffusers(weights: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """Our names for the weights of a `DiTTransformer2DModel` or of the `Transformer2DModel` that it
    was published as, for latents of `input_size` (diffusers' sample_size). Types are kept. Raises
    CheckpointError, with the names, where weights are missing or unknown, or where the blocks' copies
    of an embedder differ."""
    depth = _depth(weights, "transformer_blocks")
    table = _tensors(depth)
    expected = [name for each in table for name in each.theirs]
    found = weights.keys() - {THEIR_POSITION}
    require_names(found, expected, f"diffusers' DiT of {depth} blocks")

    ours: dict[str, Tensor] = {}
    for each in table:
        theirs = [weights[name] for name in each.theirs]
        if each.relation == "parts":
            ours[each.ours] = torch.cat(theirs)
            continue
        for name, copy in zip(each.theirs, theirs, strict=True):
            if not torch.equal(copy, theirs[0]):
                raise CheckpointError(
                    f"the weights have {each.theirs[0]} and another {name}, and a DiT has one "
                    f"{each.ours} for all blocks; this is a model that was trained further in "
                    "diffusers with its blocks' embedders apart, which no DiT of ours can hold"
                )
        ours[each.ours] = theirs[0]
    ours[OUR_POSITION] = _position(ours["x_embedder.proj.weight"], input_size)
    # One that was stored is the file's own.
    if THEIR_POSITION in weights:
        ours[OUR_POSITION] = weights[THEIR_POSITION]
    return ours


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names for the weights of a DiT with labels: all that `DiTTransformer2DModel` has,
    each tensor with memory of its own, of the type that ours has. Raises CheckpointError for the
    weights of another network, and for a position embedding that diffusers would not compute."""
    depth = _depth(weights, "blocks")
    table = _tensors(depth)
    expected = [OUR_POSITION, *(each.ours for each in table)]
    require_names(weights, expected, f"a DiT of {depth} blocks with labels, as diffusers has it")
    _require_sincos(weights)

    theirs: dict[str, Tensor] = {}
    for each in table:
        tensor = weights[each.ours]
        parts = tensor.chunk(len(each.theirs)) if each.relation == "parts" else None
        for i, name in enumerate(each.theirs):
            # Tensors that share their memory would be saved once only.
            theirs[name] = (parts[i] if parts else tensor).clone()
    return theirs


def _position(patches: Tensor, input_size: int) -> Tensor:
    """The position embedding of a DiT whose patch projection has these weights."""
    return sincos_position(len(patches), input_size // patches.shape[-1])


def _require_sincos(weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where the position embedding is another than diffusers computes."""
    position = weights[OUR_POSITION].float()
    side = round(position.shape[1] ** 0.5)
    expected = sincos_position(position.shape[2], side)
    off = float("inf") if position.shape != expected.shape else (position - expected).abs().max()
    if not off <= POSITION_TOLERANCE:
        raise CheckpointError(
            f"{OUR_POSITION} is up to {off:.2g} from the sines and cosines that diffusers computes "
            "in its place, and diffusers stores none; export these weights in largescale's own format"
        )
