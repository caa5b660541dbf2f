"""largescale/engine/fused_adamw.py: AdamW, EMA and cast, the same numbers as torch's in double precision; and a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
from largescale.config.schema import OptimizerConfig
from largescale.engine import fused_adamw
from largescale.engine.fused_adamw import FusedAdamW
from largescale.engine.optimizer import build_optimizer
from tests.conftest import RunHere, Train, assert_same_run, cut, ds_json, final_state, trace
from tests.triton_kernels import CAPABILITIES, INTERPRETED, Compile

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "ema_decay": 0.9}
NUMEL = 1100  # a block and a part of one


def flag(value: float) -> Tensor:
    return torch.tensor(value)


def made(numel: int = NUMEL) -> tuple[FusedAdamW, torch.nn.Parameter, Tensor]:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(numel))
    return FusedAdamW([p], **HYPER), p, torch.zeros(numel, dtype=torch.bfloat16)


def test_three_updates_are_torchs_in_double_precision() -> None:
    optimizer, p, half = made()
    exact = torch.nn.Parameter(p.detach().double())
    config = OptimizerConfig(**HYPER)
    theirs = build_optimizer([exact], config, "cpu", lambda: torch.optim.AdamW)
    for _ in range(3):
        grad = torch.randn(NUMEL)
        optimizer.update(p, grad, half, finite=flag(1.0), factor=flag(0.25))
        optimizer.count(p)
        exact.grad = 0.25 * grad.double()
        theirs.step()
    for name, limit in (("exp_avg", 1e-6), ("exp_avg_sq", 1e-6), ("ema", 1e-6)):
        torch.testing.assert_close(optimizer.state[p][name].double(), theirs.state[exact][name], rtol=limit, atol=1e-7)
    torch.testing.assert_close(p.detach().double(), exact.detach(), rtol=1e-6, atol=1e-7)
    # Triton's interpreter cuts where a GPU rounds to bf16.
    torch.testing.assert_close(half.float(), p.detach(), rtol=2**-7 if INTERPRETED else 2**-8, atol=0)
    assert optimizer.state[p]["step"] == 3


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    optimizer, p, half = made()
    optimizer.update(p, torch.randn(NUMEL), half, finite=flag(1.0), factor=flag(1.0))
    optimizer.count(p)
    before = [each.detach().clone() for each in (p, half, *optimizer.state[p].values())]
    optimizer.update(p, torch.full((NUMEL,), torch.inf), half, finite=flag(0.0), factor=flag(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, (p, half, *optimizer.state[p].values()), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see test_triton_interpreter.py")
def test_the_bytes_that_the_kernel_touches(touched: set[int]) -> None:
    """38 an element, as the module says, and the two numbers that are on the device."""
    optimizer, p, half = made()
    optimizer.update(p, torch.randn(NUMEL), half, finite=flag(1.0), factor=flag(1.0))
    # Master, moments and EMA are read and written at the same address.
    assert len(touched) == (4 * 4 + 4 + 2) * NUMEL + 8


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_for_a_gpu_that_is_not_here(capability: int, compiled: Compile) -> None:
    kernel = fused_adamw.adamw_kernel
    tensors = {"master", "grad", "exp_avg", "exp_avg_sq", "ema", "finite", "factor"}
    types = {name: "*fp32" if name in tensors else "*bf16" if name == "half" else "i32" if name == "numel" else "fp32"
             for name in kernel.arg_names}
    constants = {"has_half": True, "block": fused_adamw.BLOCK}
    found = compiled(kernel, types, constants, capability, num_warps=fused_adamw.WARPS)
    assert found.spilled == 0 and found.registers <= 96 and found.shared <= 4096


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_a_run(precision: str, limit: float, run_here: RunHere, tmp_path: Path) -> None:
    """With clipping, and in fp16 with a loss scale that overflows at the start and again: the steps that are skipped, the
    scale and the norms are those of torch's kernel, and it goes on bitwise where it was."""
    args = ("--train.steps", 24, "--checkpoint.every", 8, "--checkpoint.keep-last", 100, "--curriculum.pacing", "fixed",
            "--curriculum.interval", 5, "--optimizer.clip-grad-norm", 0.3, "--telemetry.log-every", 1,
            "--train.ds-config", ds_json(precision, tmp_path, initial_scale_power=24, loss_scale_window=3))
    plain, fused = (run_here(*args, "--optimizer.kernel", kernel, output=tmp_path / kernel) for kernel in ("torch", "fused"))
    assert (plain.code, fused.code) == (0, 0), fused.err
    of_plain, of_fused = plain.trace(), fused.trace()
    for name in ("optimizer/skipped_steps", "optimizer/loss_scale"):
        assert [row.get(name) for row in of_fused] == [row.get(name) for row in of_plain]
    assert (of_plain[-1]["optimizer/skipped_steps"] > 3) == (precision == "fp16")
    for name in ("loss", "optimizer/grad_norm"):
        assert [row[name] for row in of_fused] == pytest.approx([row[name] for row in of_plain], rel=limit)
    theirs = final_state(tmp_path / "torch")
    for name, value in final_state(tmp_path / "fused").items():
        assert (value - theirs[name]).norm() <= 10 * limit * theirs[name].norm(), name
    cut(tmp_path / "fused", tmp_path / "run", 8)
    assert run_here(*args, "--optimizer.kernel", "fused", output=tmp_path / "run").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "fused")


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_two_ranks(train: Train, tmp_path: Path) -> None:
    args: tuple[Any, ...] = ("--train.steps", 12, "--telemetry.log-every", 1, "--optimizer.clip-grad-norm", 0.3)
    for kernel in ("torch", "fused"):
        done = train(*args, "--optimizer.kernel", kernel, "--output", tmp_path / kernel)
        assert [each.returncode for each in done] == [0, 0], done[0].stderr
    plain, fused = (trace(tmp_path / kernel) for kernel in ("torch", "fused"))
    for name in ("loss", "optimizer/grad_norm"):
        assert [row[name] for row in fused] == pytest.approx([row[name] for row in plain], rel=1e-5)
