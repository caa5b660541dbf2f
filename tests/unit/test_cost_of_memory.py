"""The memory that the cost model predicts, against what autograd keeps."""

from dataclasses import replace

import pytest
import torch

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.models.build import blank_condition, build_model, latent_shape
from largescale.planning.memory import activation_bytes, largest_micro_batch, memory
from tests.unit.costs import dit_l


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("told", ["labels", "captions"])
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, False)])
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, fused: bool, told: str, checkpointing: bool) -> None:
    """Of a real model on the CPU, whose kernel is fused in float32 and a product in bf16."""
    size = replace(PRESETS["dit_s2_coco256" if told == "captions" else "dit_s2_imagenet256"]().model, hidden_size=192, num_heads=3, depth=4)
    model = build_model(size).to(dtype)
    model.checkpoint_blocks = checkpointing
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    inputs: list[torch.Tensor] = []
    if checkpointing:  # what a block is given is kept by the checkpoint, out of autograd's sight
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(1, *latent_shape(size)), torch.zeros(1, dtype=torch.long), blank_condition(size, 1))
    assert output.requires_grad
    found = sum((kept | {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in inputs}).values())
    counted = activation_bytes(size, dtype, checkpointing=checkpointing, fused_attention=fused)
    if checkpointing:  # and one block in full, less its input
        one, two = (activation_bytes(replace(size, depth=d), dtype, checkpointing=False, fused_attention=fused) for d in (1, 2))
        found += two - one - 4 * 256 * 192
    assert counted == pytest.approx(found, rel=0.02)


def test_memory_by_hand() -> None:
    config, ds = dit_l()
    weights, gradients, buckets, states, activations = memory(config, ds, 8, 16).values()
    n = 457_840_672
    assert (weights, gradients, states) == (2 * n, 4 * n / 8, 16 * n / 8)
    assert buckets == 50_000_000 * (2 * 2 + 2 + 4)  # two in bf16, one of them flattened, and cast to fp32
    assert activations == 16 * activation_bytes(config.model, torch.bfloat16, checkpointing=False)
    small = PRESETS["debug"]()
    parts = memory(small, load_ds_config(small.train.ds_config), 2, 8)
    assert parts["buckets of gradients on their way"] == 50_000_000 * 2 * 4 + 2 * parts["gradients (this rank's part in fp32)"]


def test_memory_falls_with_ranks_and_checkpointing() -> None:
    config, ds = dit_l()
    few, many = (sum(memory(config, ds, n, 16).values()) for n in (2, 8))
    assert few - many == pytest.approx(20 * 457_840_672 * 3 / 8)
    less = replace(config, train=replace(config.train, activation_checkpointing=True))
    assert sum(memory(less, ds, 8, 16).values()) < many / 2


def test_largest_micro_batch() -> None:
    config, ds = dit_l()
    assert memory(config, ds, 1, 1)["buckets of gradients on their way"] == 0
    for gib in (12, 40, 79, 500):
        n = largest_micro_batch(config, ds, 1, gib * 2**30)
        assert n > 0 and sum(memory(config, ds, 1, n).values()) <= gib * 2**30
        assert n == 256 or sum(memory(config, ds, 1, 2 * n).values()) > gib * 2**30
    assert largest_micro_batch(config, ds, 1, 5 * 2**30) == 0
