"""largescale/models/fused_products.py: the same numbers as plain PyTorch, in its eager form, in Triton's interpreter, and
compiled for GPUs that are not here."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
import triton

from largescale.models import fused_products
from largescale.models.fused_products import (
    GeluMlp,
    QkvProduct,
    gelu_product,
    gelu_product_backward,
    pack_qkv,
)
from tests.triton_kernels import CAPABILITIES, INTERPRETED, Compile

# Images, tokens, width. The interpreter is given the first, whose tiles are all cut.
SHAPES = {"cut tiles": (3, 51, 72), "S/2's width": (1, 3, 384), "XL/2's width": (1, 3, 1152)}


def mlp(y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(y, weight1, bias1), approximate="tanh"), weight2)


def qkv(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(y, weight, bias).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


OF_MLP = (mlp, GeluMlp.apply)
OF_QKV = (qkv, lambda y, weight, bias: QkvProduct.apply(y, weight, bias, 2))


def given(exact: Callable[..., Any], shape: tuple[int, int, int], kind: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) / math.sqrt(size[-1])).to(kind)

    if exact is mlp:
        return [math.sqrt(width) * draw(*shape), draw(4 * width, width), 20 * draw(4 * width), draw(width, 4 * width)]
    return [math.sqrt(width) * draw(*shape), draw(3 * width, width), 20 * draw(3 * width)]


def values_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, outer)
    return [*(out.detach() for out in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("exact", "fused"), [OF_MLP, OF_QKV], ids=["GeluMlp", "QkvProduct"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [SHAPES["cut tiles"]] if INTERPRETED else SHAPES.values())
def test_the_same_as_in_double_precision(
    shape: tuple[int, int, int], kind: torch.dtype, exact: Callable[..., Any], fused: Callable[..., Any], bf16_products: None,
) -> None:
    inputs = given(exact, shape, kind)
    expected = values_and_gradients(exact, [value.double() for value in inputs])
    found = values_and_gradients(fused, inputs)
    assert len(found) == len(expected)
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == kind and value.shape == right.shape
        # Of what is rounded on the way to a result, h is the first.
        limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6}[kind]
        assert (value.double() - right).norm() <= limit * right.norm()


@pytest.mark.skipif(INTERPRETED, reason="kernels sum in float32")
@pytest.mark.parametrize("fused", [OF_MLP, OF_QKV], ids=["GeluMlp", "QkvProduct"])
def test_gradients_are_those_of_finite_differences(fused: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    inputs = [value.requires_grad_() for value in given(fused[0], (1, 2, 4), torch.float64)]
    assert torch.autograd.gradcheck(fused[1], inputs)


@pytest.mark.skipif(INTERPRETED, reason="takes a minute there")
def test_sums_are_not_of_rounded_values() -> None:
    """The bias's gradient of 4,096 tokens is as near to double precision as one of a few: it is summed in float32."""
    rows, columns = 4096, 4
    dq = torch.full((1, 1, rows, columns), 1 / 3, dtype=torch.bfloat16)
    _, sums = pack_qkv(dq, dq, dq)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.sum(0), torch.full((3 * columns,), rows * float(dq[0, 0, 0, 0])))


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see test_triton_interpreter.py")
def test_the_bytes_that_kernels_touch(touched: set[int]) -> None:
    """Each argument and each result once, as benchmarks/roofline.py counts them."""
    y, weight1, bias1, weight2 = (value[0] if value.dim() == 3 else value for value in given(mlp, (1, 150, 72), torch.bfloat16))
    h, a = gelu_product(y, weight1, bias1)
    assert len(touched) == size(y, weight1, bias1, h, a)
    touched.clear()
    dh, partial = gelu_product_backward(y, weight2, h)
    assert len(touched) == size(y, weight2, h, dh, partial) and partial.shape == (2, 288)
    touched.clear()
    # Views of one tensor with rows of other things between them, as attention may hand gradients over.
    dq, dk, dv = torch.randn(2, 64, 3, 2, 36).to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    packed, sums = pack_qkv(dq, dk, dv)
    assert len(touched) == size(dq, dk, dv, packed, sums) and sums.shape == (4, 3 * 72)


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_for_a_gpu_that_is_not_here(capability: int, compiled: Compile) -> None:
    """No register is spilled to memory, and the products run on the tensor cores of their GPU."""
    for kernel in (fused_products.gelu_product_kernel, fused_products.gelu_product_backward_kernel):
        found = compiled(kernel, types(kernel), fused_products.product_constants(1024), capability,
                         num_warps=fused_products.PRODUCT_WARPS, num_stages=fused_products.PRODUCT_STAGES)
        assert found.spilled == 0 and found.registers <= 192
        # Two programs a multiprocessor on an H100, one and a half on an A100.
        assert found.shared <= 100 << 10
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability] in found.ptx
    for width in (1024, 1152):
        constants = {"width": width, "head_width": 72 if width == 1152 else 64, "rows": fused_products.PACK_ROWS,
                     "block": triton.next_power_of_2(width)}
        found = compiled(fused_products.pack_qkv_kernel, types(fused_products.pack_qkv_kernel), constants, capability,
                         num_warps=fused_products.PACK_WARPS)
        assert found.spilled == 0 and found.registers <= 64


def types(kernel: Any) -> dict[str, str]:
    """As for DiT in bf16."""
    numbers = ("rows", "columns", "tokens")
    return {name: "*fp32" if name == "partial" else "i32" if name in numbers or "_" in name else "*bf16"
            for name in kernel.arg_names}
