"""The names of diffusers and ours, both ways, against diffusers' own class."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.errors import CheckpointError
from largescale.interop.diffusers_weights import THEIR_POSITION, from_diffusers, to_diffusers
from largescale.models.dit import DiT
from tests.diffusers_models import their_dit


def their_weights(**sizes: Any) -> dict[str, Tensor]:
    return dict(their_dit(**sizes).state_dict())


SIZES: list[dict[str, Any]] = [{}, {"learn_sigma": False, "patch_size": 4}, {"heads": 1, "depth": 1, "sample_size": 16, "classes": 1000}]


@pytest.mark.parametrize("sizes", SIZES)
def test_there_and_back_is_bitwise(sizes: dict[str, Any]) -> None:
    theirs = their_weights(**sizes)
    ours = from_diffusers(theirs, sizes.get("sample_size", 8))
    model = DiT(patch_size=sizes.get("patch_size", 2), hidden_size=8 * sizes.get("heads", 3), depth=sizes.get("depth", 3),
                num_heads=1, input_size=sizes.get("sample_size", 8), num_classes=sizes.get("classes", 10), learn_sigma=sizes.get("learn_sigma", True))
    assert model.load_state_dict(ours).missing_keys == []
    back = to_diffusers(ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == len(back)


def test_types_stay() -> None:
    theirs = {name: tensor.half() for name, tensor in their_weights().items()}
    ours = from_diffusers(theirs, 8)
    assert {tensor.dtype for name, tensor in ours.items() if name != "pos_embed"} == {torch.float16}
    assert {tensor.dtype for tensor in to_diffusers(ours).values()} == {torch.float16}


def test_a_position_embedding_that_is_stored_is_kept() -> None:
    theirs = their_weights()
    position = torch.ones(1, 16, 24)
    ours = from_diffusers({**theirs, THEIR_POSITION: position}, 8)
    assert torch.equal(ours["pos_embed"], position)
    with pytest.raises(CheckpointError, match="pos_embed is up to .* diffusers stores none"):
        to_diffusers(ours)


def test_copies_that_differ_are_named() -> None:
    theirs = their_weights()
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    theirs[name] = theirs[name] + 1e-6
    with pytest.raises(CheckpointError, match=rf"transformer_blocks\.0\..*another {re.escape(name)}"):
        from_diffusers(theirs, 8)


def test_missing_and_unknown_names_are_named() -> None:
    theirs = their_weights()
    del theirs["proj_out_2.bias"]
    with pytest.raises(CheckpointError, match="lack proj_out_2.bias"):
        from_diffusers(theirs, 8)
    with pytest.raises(CheckpointError, match="have something else besides"):
        from_diffusers({**their_weights(), "something else": torch.ones(1)}, 8)
    # diffusers has no DiT without labels.
    ours = from_diffusers(their_weights(), 8)
    del ours["y_embedder.embedding_table.weight"]
    with pytest.raises(CheckpointError, match="lack y_embedder.embedding_table.weight"):
        to_diffusers(ours)
