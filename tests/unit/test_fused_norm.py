"""largescale/models/fused_norm.py: the same numbers as plain PyTorch, in its eager form, in Triton's interpreter, and
compiled for GPUs that are not here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
import triton

from largescale.models import fused_norm
from largescale.models.fused_norm import residual_norm, residual_norm_eager
from tests.triton_kernels import CAPABILITIES, INTERPRETED, Compile

PARTS = {
    "everything": ("bias", "gate", "shift", "scale"),
    "no bias": ("gate", "shift", "scale"),
    "no gate": ("bias", "shift", "scale"),
    "neither gate nor modulation, as after cross-attention": ("bias",),
    "no modulation": ("bias", "gate"),
}
SHAPES = {"S/2's width": (1, 4, 384), "XL/2's width": (1, 2, 1152), "13 tokens": (2, 13, 24)}


def given(parts: tuple[str, ...], shape: tuple[int, ...], branch_type: torch.dtype) -> dict[str, Any]:
    """gate, shift and scale are columns of one tensor, as in a block."""
    generator = torch.Generator().manual_seed(0)
    images, _, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    modulation = draw(images, 6 * width).to(branch_type)
    values = {"bias": draw(width).to(branch_type), "gate": modulation[:, :width],
              "shift": modulation[:, width : 2 * width], "scale": modulation[:, 2 * width : 3 * width]}
    return {"x": draw(*shape).float() + 3, "branch": draw(*shape).to(branch_type), **{name: values[name] for name in parts}}


def values_and_gradients(function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    x_new, y = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(out.shape, generator=generator).to(y_type).to(out.dtype)
             for out, y_type in ((x_new, torch.float32), (y, torch.bfloat16))]
    torch.autograd.backward([x_new, y], outer)
    return {"x_new": x_new.detach(), "y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("keep_input", [True, False])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("branch_type", [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES["13 tokens"]] if INTERPRETED else SHAPES.values())
def test_the_same_as_in_double_precision(
    shape: tuple[int, ...], branch_type: torch.dtype, parts: tuple[str, ...], keep_input: bool
) -> None:
    inputs = given(parts, shape, branch_type)
    exact = values_and_gradients(residual_norm_eager, {name: value.double() for name, value in inputs.items()})
    found = values_and_gradients(lambda **these: residual_norm(**these, keep_input=keep_input), inputs)
    for name, value in found.items():
        in_stream = name in ("x_new", "dx")
        assert value.dtype == (torch.float32 if in_stream else branch_type), name
        # Triton's interpreter cuts where a GPU rounds to bf16.
        limit = 5e-7 if in_stream or branch_type == torch.float32 else 8e-3
        assert (value.double() - exact[name]).abs().max() <= limit * exact[name].abs().max(), name


@pytest.mark.parametrize("keep_input", [True, False])
@pytest.mark.parametrize("parts", [PARTS["everything"]] if INTERPRETED else PARTS.values())
def test_gradients_are_those_of_finite_differences(parts: tuple[str, ...], keep_input: bool) -> None:
    inputs = {name: value.double().requires_grad_() for name, value in given(parts, (1, 2, 4), torch.float64).items()}

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(**dict(zip(inputs, values, strict=True)), keep_input=keep_input)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see test_triton_interpreter.py")
@pytest.mark.parametrize("keep_input", [True, False])
def test_the_bytes_that_kernels_touch(touched: set[int], keep_input: bool) -> None:
    """12 forward and 18 backward, an element of the stream, as the module says, and what does not grow with it: mean
    and rstd, an image's modulation, sums."""
    images, tokens, width = 2, 64, 32
    inputs = {name: value.detach().clone().requires_grad_()
              for name, value in given(PARTS["everything"], (images, tokens, width), torch.bfloat16).items()}
    x_new, y = residual_norm(**inputs, keep_input=keep_input)
    elements, around = images * tokens * width, 2 * 4 * images * tokens + 2 * width
    assert len(touched) == 12 * elements + around + 3 * 2 * images * width
    touched.clear()
    torch.autograd.backward([x_new, y], [torch.ones_like(x_new), torch.ones_like(y)])
    sums = 4 * 4 * width * images * tokens // fused_norm.ROWS
    assert len(touched) == 18 * elements + around + 2 * 2 * images * width + sums


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_compiled_for_a_gpu_that_is_not_here(width: int, capability: int, compiled: Compile) -> None:
    """No register is spilled to memory, for every width of the presets, as for DiT in bf16."""
    constants = {"width": width, "eps": fused_norm.EPS, "has_bias": True, "has_gate": True, "has_modulation": True,
                 "saved_is_input": True, "rows": fused_norm.ROWS, "block": triton.next_power_of_2(width)}
    half = ("branch", "bias", "gate", "shift", "scale", "y", "dy", "dbranch")
    for kernel in (fused_norm.residual_norm_kernel, fused_norm.residual_norm_backward_kernel):
        types = {name: "i32" if name == "tokens" or name.endswith("stride") else "*bf16" if name in half else "*fp32"
                 for name in kernel.arg_names}
        found = compiled(kernel, types, constants, capability, num_warps=fused_norm.WARPS)
        # 232 with Triton 3.9, 233 with 3.6; there are 255.
        assert found.spilled == 0 and found.registers <= 240 and found.shared <= 4096
