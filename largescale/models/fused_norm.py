"""One pass over the residual stream where a DiT block has three: add a gated branch, normalise,
modulate.

    x_new = x + gate (branch + bias)
    y     = norm(x_new) (1 + scale) + shift

The backward pass also sums the gradients of shift, scale, gate and bias while it reads the stream.
Per element of a fp32 stream with branches in half precision the forward pass moves 12 bytes and
the backward pass 18. Everything is computed in the stream's type, float32; `y` and the gradient of
`branch` have the branch's type. `residual_norm_eager` is the same in plain PyTorch, and what runs
without a GPU.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

EPS = 1e-6
# Tokens of an image that a program of the backward pass walks over, at most: its partial sums are
# written once, so more tokens move fewer bytes, and fewer tokens keep more of the GPU busy.
ROWS = 32
# A row of the stream is held in registers by this many warps.
WARPS = 4


# fmt: off
@triton.jit
def residual_norm_kernel(
    x: tl.tensor, branch: tl.tensor, bias: tl.tensor, gate: tl.tensor, shift: tl.tensor,
    scale: tl.tensor, x_new: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    tokens: tl.tensor, gate_stride: tl.tensor, shift_stride: tl.tensor, scale_stride: tl.tensor,
    width: tl.constexpr, has_bias: tl.constexpr, has_gate: tl.constexpr,
    has_modulation: tl.constexpr, block: tl.constexpr, eps: tl.constexpr,
) -> None:
    """A program a token."""
    kind = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    column = tl.arange(0, block)
    inside = column < width
    at = row * width + column

    value = tl.load(branch + at, mask=inside, other=0.0).to(kind)
    if has_bias:
        value += tl.load(bias + column, mask=inside, other=0.0).to(kind)
    if has_gate:
        value *= tl.load(gate + image * gate_stride + column, mask=inside, other=0.0).to(kind)
    value += tl.load(x + at, mask=inside, other=0.0)
    tl.store(x_new + at, value, mask=inside)

    # Two passes over registers: the variance of large means does not cancel.
    row_mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - row_mean, 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    out = centred * row_rstd
    if has_modulation:
        factor = tl.load(scale + image * scale_stride + column, mask=inside, other=0.0)
        offset = tl.load(shift + image * shift_stride + column, mask=inside, other=0.0)
        out = out * (1 + factor.to(kind)) + offset.to(kind)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)
# fmt: on


@triton.jit
def through_layer_norm(
    grad_normed: tl.tensor, normed: tl.tensor, rstd: tl.tensor, width: tl.constexpr
) -> tl.tensor:
    """The gradient of what was normalised, a row; both rows are 0 beyond its width."""
    # What changes the mean or the length of the row is taken out.
    along_mean = tl.sum(grad_normed, 0) / width
    along_row = tl.sum(grad_normed * normed, 0) / width
    return rstd * (grad_normed - along_mean - normed * along_row)


# fmt: off
@triton.jit
def residual_norm_backward_kernel(
    dx_new: tl.tensor, dy: tl.tensor, saved: tl.tensor, branch: tl.tensor, bias: tl.tensor,
    gate: tl.tensor, scale: tl.tensor, mean: tl.tensor, rstd: tl.tensor, dx: tl.tensor,
    dbranch: tl.tensor, partial: tl.tensor, tokens: tl.tensor, gate_stride: tl.tensor,
    scale_stride: tl.tensor, width: tl.constexpr, has_bias: tl.constexpr, has_gate: tl.constexpr,
    has_modulation: tl.constexpr, block: tl.constexpr, saved_is_input: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """A program for `rows` tokens of an image. `saved` is x or x_new. `partial` (images, programs
    an image, 4, width) receives their sums for shift, scale, gate and bias."""
    kind = saved.dtype.element_ty
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, block)
    inside = column < width
    # What all tokens of an image share is read once.
    factor = tl.full((block,), 1.0, kind)
    weight = tl.full((block,), 1.0, kind)
    offset = tl.zeros((block,), kind)
    if has_modulation:
        factor += tl.load(scale + image * scale_stride + column, mask=inside, other=0.0).to(kind)
    if has_gate:
        weight = tl.load(gate + image * gate_stride + column, mask=inside, other=0.0).to(kind)
    if has_bias:
        offset = tl.load(bias + column, mask=inside, other=0.0).to(kind)
    sum_dy = tl.zeros((block,), kind)
    sum_dy_normed = tl.zeros((block,), kind)
    sum_dx_branch = tl.zeros((block,), kind)
    sum_dx = tl.zeros((block,), kind)

    for i in range(rows):
        row = image * tokens + part * rows + i
        at = row * width + column
        value = tl.load(saved + at, mask=inside, other=0.0)
        added = tl.load(branch + at, mask=inside, other=0.0).to(kind) + offset
        if saved_is_input:
            value += weight * added
        row_rstd = tl.load(rstd + row)
        normed = tl.where(inside, (value - tl.load(mean + row)) * row_rstd, 0.0)
        grad_y = tl.load(dy + at, mask=inside, other=0.0).to(kind)
        grad = through_layer_norm(grad_y * factor, normed, row_rstd, width)
        grad += tl.load(dx_new + at, mask=inside, other=0.0)
        tl.store(dx + at, grad, mask=inside)
        tl.store(dbranch + at, (grad * weight).to(dbranch.dtype.element_ty), mask=inside)
        sum_dy += grad_y
        sum_dy_normed += grad_y * normed
        sum_dx_branch += grad * added
        sum_dx += grad

    into = partial + (image * tl.num_programs(1) + part) * 4 * width + column
    tl.store(into, sum_dy, mask=inside)
    tl.store(into + width, sum_dy_normed, mask=inside)
    tl.store(into + 2 * width, sum_dx_branch, mask=inside)
    tl.store(into + 3 * width, sum_dx * weight, mask=inside)
# fmt: on


def residual_norm(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    keep_input: bool,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """(x_new, y), both (N, T, D): see the module. x (N, T, D) float32, branch (N, T, D), bias (D,);
    gate, shift and scale (N, D). Without gate it is 1; shift and scale come together, or neither.

    `keep_input`: the backward pass reads x and makes x_new again, else it reads x_new. Keep the one
    that something else keeps too, and the other is freed.
    """
    # The mean and rstd of each row are for the backward pass.
    x_new, y, _, _ = torch.ops.largescale.residual_norm(
        x, branch, bias, gate, shift, scale, keep_input, eps
    )
    return x_new, y


def residual_norm_eager(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """What `residual_norm` computes, in plain PyTorch; autograd makes its backward pass."""
    added = branch.to(x.dtype)
    if bias is not None:
        added = added + bias.to(x.dtype)
    if gate is not None:
        added = added * gate.to(x.dtype)[:, None]
    x_new = x + added
    y = F.layer_norm(x_new, x.shape[-1:], eps=eps)
    if shift is not None and scale is not None:
        y = y * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]
    return x_new, y.to(branch.dtype)


def launch(kernel: Any, grid: tuple[int, ...], given: list[Any], **constants: Any) -> None:
    """Runs a Triton kernel in a triton_op."""
    # Triton's interpreter, which stands in a kernel's place in tests, is called as it is.
    runnable = wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
    runnable[grid](*given, **constants)


def _row_strides(*per_image: Tensor | None) -> list[int]:
    """Of tensors (N, D), or absent."""
    return [0 if each is None else each.stride(0) for each in per_image]


def _pointers(instead: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors; in the place of an absent one, which a kernel does not read, another."""
    return [instead if each is None else each for each in tensors]


def _constants(
    width: int, bias: Tensor | None, gate: Tensor | None, scale: Tensor | None
) -> dict[str, Any]:
    return {
        "width": width,
        "has_bias": bias is not None,
        "has_gate": gate is not None,
        "has_modulation": scale is not None,
        "block": triton.next_power_of_2(width),
    }


def is_eager(x: Tensor) -> bool:
    """Whether plain PyTorch stands in for the kernels: without a GPU, but for Triton's interpreter."""
    return x.device.type != "cuda" and isinstance(residual_norm_kernel, JITFunction)


@triton_op("largescale::residual_norm", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    keep_input: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd), the last two (N, T)."""
    if is_eager(x):
        x_new, y = residual_norm_eager(x, branch, bias, gate, shift, scale, eps=eps)
        variance, mean = torch.var_mean(x_new, dim=-1, correction=0)
        return x_new, y, mean, (variance + eps).rsqrt()
    images, tokens, width = x.shape
    # A program finds its row by its number.
    x, branch = x.contiguous(), branch.contiguous()
    x_new, y = torch.empty_like(x), torch.empty_like(branch)
    mean = x.new_empty(images, tokens)
    rstd = x.new_empty(images, tokens)
    pointers = _pointers(x, branch, bias, gate, shift, scale)
    strides = _row_strides(gate, shift, scale)
    launch(
        residual_norm_kernel,
        (images * tokens,),
        [x, *pointers, x_new, y, mean, rstd, tokens, *strides],
        **_constants(width, bias, gate, scale),
        eps=eps,
        num_warps=WARPS,
    )
    return x_new, y, mean, rstd


@triton_op("largescale::residual_norm_backward", mutates_args=())
def _backward(
    dx_new: Tensor,
    dy: Tensor,
    saved: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    saved_is_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, sums): the sums (N, 4, D) over an image's tokens are the gradients of shift,
    scale, gate and, over images too, of the bias. Those of what is absent mean nothing."""
    images, tokens, width = saved.shape
    if is_eager(saved):
        return _backward_eager(
            dx_new, dy, saved, branch, bias, gate, scale, mean, rstd, saved_is_input
        )
    dx_new, dy = dx_new.contiguous(), dy.contiguous()
    dx, dbranch = torch.empty_like(saved), torch.empty_like(branch)
    # No program's tokens are of two images, whose sums are apart.
    rows = math.gcd(tokens, ROWS)
    parts = tokens // rows
    partial = saved.new_empty(images, parts, 4, width)
    pointers = _pointers(saved, branch, bias, gate, scale)
    strides = _row_strides(gate, scale)
    launch(
        residual_norm_backward_kernel,
        (images, parts),
        [dx_new, dy, saved, *pointers, mean, rstd, dx, dbranch, partial, tokens, *strides],
        **_constants(width, bias, gate, scale),
        saved_is_input=saved_is_input,
        rows=rows,
        num_warps=WARPS,
    )
    return dx, dbranch, partial.sum(1)


def _backward_eager(
    dx_new: Tensor,
    dy: Tensor,
    saved: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    saved_is_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = saved.dtype
    added = branch.to(kind) if bias is None else branch.to(kind) + bias.to(kind)
    weight = torch.ones((), dtype=kind) if gate is None else gate.to(kind)[:, None]
    # Of x and x_new only one was kept.
    x_new = saved + weight * added if saved_is_input else saved
    normed = (x_new - mean[..., None]) * rstd[..., None]
    grad_y = dy.to(kind)
    grad_normed = grad_y if scale is None else grad_y * (1 + scale.to(kind)[:, None])
    along_row = (grad_normed * normed).mean(-1, keepdim=True)
    inner = grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along_row
    dx = rstd[..., None] * inner + dx_new
    weighted = dx * weight
    per_token = (grad_y, grad_y * normed, dx * added, weighted)
    return dx, weighted.to(branch.dtype), torch.stack([each.sum(1) for each in per_token], dim=1)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, bias, gate, _, scale, keep_input, _ = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x if keep_input else x_new, branch, bias, gate, scale, mean, rstd)
    ctx.saved_is_input = keep_input


def gradients(
    ctx: Any, dx_new: Tensor, dy: Tensor, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    """Those of the inputs of `residual_norm`, by `backward`, which takes and gives what
    `_backward` does."""
    saved, branch, bias, gate, scale, mean, rstd = ctx.saved_tensors
    dx, dbranch, sums = backward(
        dx_new, dy, saved, branch, bias, gate, scale, mean, rstd, ctx.saved_is_input
    )
    dshift, dscale, dgate, dbias = sums.unbind(1)
    return (
        dx,
        dbranch,
        None if bias is None else dbias.sum(0).to(bias.dtype),
        None if gate is None else dgate.to(gate.dtype),
        None if scale is None else dshift.to(scale.dtype),
        None if scale is None else dscale.to(scale.dtype),
        # keep_input and eps are no tensors.
        None,
        None,
    )


def _gradients(ctx: Any, dx_new: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dx_new, dy, torch.ops.largescale.residual_norm_backward)


_forward.register_autograd(_gradients, setup_context=keep)
