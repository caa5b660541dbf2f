"""largescale/models/fused_blocks.py: DiT's blocks by fused kernels are DiT's blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
from largescale.condition import Captions
from largescale.errors import ConfigError
from largescale.models.compile import Compiled, has_compiler
from largescale.models.dit import DiT
from largescale.models.fused_blocks import fuse_blocks
from tests.conftest import RunHere


def model_and_inputs(captions: bool, kind: torch.dtype) -> tuple[DiT, tuple[Any, ...]]:
    """With weights none of which is zero, as they are after training."""
    torch.manual_seed(0)
    told: dict[str, Any] = {"num_classes": 10}
    if captions:
        told = {"max_caption_tokens": 5, "caption_width": 8, "caption_pooled_width": 6, "num_classes": 0}
    model = DiT(patch_size=2, hidden_size=32, depth=3, num_heads=4, input_size=8, in_channels=1, class_dropout_prob=0.1,
                mlp_norm_eps=0.05, **told)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    y: Any = torch.arange(3)
    if captions:
        y = Captions(torch.randn(3, 5, 8), torch.tensor([5, 2, 3]), torch.randn(3, 6), null=torch.zeros(3, dtype=torch.bool))
    return model.to(kind), (torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 900]), y)


def output_and_gradients(model: DiT, inputs: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(*inputs)
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_same_output_and_gradients(kind: torch.dtype, captions: bool, checkpointing: bool) -> None:
    model, inputs = model_and_inputs(captions, kind)
    model.checkpoint_blocks = checkpointing
    plain = output_and_gradients(model, inputs)
    names = set(model.state_dict())
    fuse_blocks(model)
    assert set(model.state_dict()) == names
    fused = output_and_gradients(model, inputs)
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        limit = 2e-5 if kind == torch.float32 else 6e-2
        assert (fused[name].float() - value.float()).norm() <= limit * value.float().norm(), name


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_compiled() -> None:
    model, inputs = model_and_inputs(False, torch.float32)
    plain = output_and_gradients(model, inputs)
    fuse_blocks(model)
    Compiled(model, "blocks", "cpu")
    fused = output_and_gradients(model, inputs)
    for name, value in plain.items():
        assert (fused[name] - value).norm() <= 2e-5 * value.norm(), name


def test_a_run_with_fused_kernels(run_here: RunHere, tmp_path: Path) -> None:
    """Its losses are the other kernels' to rounding, in fp32 over 200 steps, and in bf16 as near to fp32 as theirs
    are. Later than 20 steps, bf16's rounding has been amplified: how far a loss is off is then chance."""
    losses: dict[tuple[str, str], torch.Tensor] = {}
    for precision, steps in (("fp32", 200), ("bf16", 20)):
        for kernels in ("inductor", "fused"):
            run = run_here("--train.steps", steps, "--train.ds-config", f"ds_configs/zero2_{precision}.json", "--train.kernels", kernels,
                           "--curriculum.pacing", "fixed", "--curriculum.interval", 20, output=tmp_path / f"{precision}_{kernels}")
            assert run.code == 0 and ("fused kernels" in run.err) == (kernels == "fused"), run.err
            losses[precision, kernels] = torch.tensor([row["loss"] for row in run.trace()])
    exact = losses.pop(("fp32", "inductor"))
    far = {name: (loss - exact[: len(loss)]).abs() / exact[: len(loss)] for name, loss in losses.items()}
    assert 0 < far["fp32", "fused"].max() < 1e-4
    assert far["bf16", "fused"].mean() < 1.2 * far["bf16", "inductor"].mean()


def test_another_network(run_here: RunHere) -> None:
    outcome = run_here("--train.kernels", "fused", preset="debug_edm")
    assert outcome.code == 2 and "train.kernels=fused is for model.architecture=dit" in outcome.err
    with pytest.raises(ConfigError):
        fuse_blocks(torch.nn.Linear(1, 1))
