"""Blocks that are computed again in the backward pass: the same numbers to the bit, from less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from largescale.config.schema import ModelConfig
from largescale.models.build import blank_condition, build_model, latent_shape
from largescale.models.dit import Block, DiT
from tests.conftest import CAPTIONED, RunHere, assert_same_run, ds_json

LABELS = ModelConfig(input_size=8, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=10)
CAPTIONS = ModelConfig(input_size=8, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=0, max_caption_tokens=5,
                       caption_width=8, caption_pooled_width=6)


def model_of(config: ModelConfig, checkpoint_blocks: bool, dtype: torch.dtype = torch.float32) -> DiT:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # the gates are 0 at the start
    model.checkpoint_blocks = checkpoint_blocks
    return model.to(dtype)


def gradients(model: DiT, config: ModelConfig) -> dict[str, torch.Tensor]:
    x = torch.randn(3, *latent_shape(config), generator=torch.Generator().manual_seed(1))
    model(x, torch.tensor([0, 5, 9]), blank_condition(config, 3)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("told", ["labels", "captions"])
def test_the_same_run(precision: str, told: str, run_here: RunHere, captioned: Path, tmp_path: Path) -> None:
    settings: tuple[Any, ...] = ("--train.steps", 10, "--train.micro-batch-size", 4, "--train.ds-config", ds_json(precision, tmp_path))
    if told == "captions":
        settings = (*settings, "--data.path", captioned, *CAPTIONED)
    plain = run_here(*settings, output=tmp_path / "plain")
    again = run_here(*settings, "--train.activation-checkpointing", output=tmp_path / "again")
    assert (plain.code, again.code) == (0, 0), again.err
    assert_same_run(tmp_path / "again", tmp_path / "plain")


def test_the_setting_reaches_the_model(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs twice a step; not where nothing is to be learned from it."""
    calls = {True: 0, False: 0}
    forward = Block.forward

    def counted(self: Block, x: torch.Tensor, *args: Any) -> Any:
        if not x.is_meta:  # as in the estimate of the memory
            calls[torch.is_grad_enabled()] += 1
        return forward(self, x, *args)

    monkeypatch.setattr(Block, "forward", counted)
    look = ("--train.steps", 3, "--telemetry.reference-every", 3, "--telemetry.reference-images", 1)
    assert run_here(*look, "--train.activation-checkpointing").code == 0
    blocks = 2
    assert calls == {True: 3 * 2 * blocks, False: blocks}


@pytest.mark.parametrize("config", [LABELS, CAPTIONS], ids=["labels", "captions"])
def test_less_is_kept(config: ModelConfig) -> None:
    """Of the blocks, their inputs only."""
    def kept(model: DiT) -> int:
        sizes: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.zeros(1, *latent_shape(config)), torch.zeros(1, dtype=torch.long), blank_condition(config, 1))
        assert output.requires_grad
        return sum(sizes.values())

    def shallow(depth: int, checkpoint_blocks: bool) -> int:
        return kept(model_of(ModelConfig(**{**vars(config), "depth": depth}), checkpoint_blocks))

    block_input = 4 * 16 * 32  # float32, tokens, channels
    assert shallow(4, True) - shallow(2, True) == 2 * block_input
    assert shallow(4, False) - shallow(2, False) > 2 * 10 * block_input


@pytest.mark.parametrize("config", [LABELS, CAPTIONS], ids=["labels", "captions"])
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_with_compilation(config: ModelConfig, compiled: str) -> None:
    """As torch.compile traces it; that its kernels round elsewhere is not asked here."""
    torch._dynamo.reset()
    plain, again = model_of(config, False), model_of(config, True)
    for part in again.blocks if compiled == "blocks" else [again]:
        assert isinstance(part, nn.Module)
        part.compile(backend="aot_eager", fullgraph=True)
    expected, found = gradients(plain, config), gradients(again, config)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_it_is_no_part_of_the_model() -> None:
    plain, again = model_of(LABELS, False), model_of(LABELS, True)
    assert plain.state_dict().keys() == again.state_dict().keys()
    assert "checkpoint_blocks" not in vars(LABELS) and not build_model(LABELS).checkpoint_blocks
