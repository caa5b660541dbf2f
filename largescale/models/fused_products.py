"""Matrix products of a DiT block that do what would follow them while the result is in registers.

    gelu_product            h = y W^T + b and a = GELU(h), by one kernel
    gelu_product_backward   dh = (dbranch W) GELU'(h), and the bias's gradient, by one kernel
    pack_qkv                the gradients of q, k and v side by side, and the bias's gradient

An element of h (4 of the residual stream's in a DiT) costs 2 bytes more than the bare product moves
in either pass, where two kernels after the products cost 4 and 6. GELU is the tanh approximation.
Sums are float32. Without a GPU, and where weights are float32, plain PyTorch does the same.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from largescale.models.fused_norm import is_eager, launch

# A program's tile of the result, and how many columns of the operands it multiplies at a time.
TILE_ROWS = 128
TILE_COLUMNS = 128
TILE_DEPTH = 64
PRODUCT_WARPS = 8
PRODUCT_STAGES = 3
# Programs that run at the same time share this many rows of tiles, so that operands stay in L2.
TILES_TOGETHER = 8
# Tokens of an image that a program of pack_qkv copies, at most; see fused_norm.ROWS.
PACK_ROWS = 32
PACK_WARPS = 4


# fmt: off
@triton.jit
def place_of_tile(
    rows: tl.tensor, columns: tl.tensor, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    tiles_together: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(row, column) of this program's tile, counted in tiles."""
    program = tl.program_id(0)
    down = tl.cdiv(rows, tile_rows)
    across = tl.cdiv(columns, tile_columns)
    together = tiles_together * across
    first = program // together * tiles_together
    height = tl.minimum(down - first, tiles_together)
    return first + program % together % height, program % together // height


@triton.jit
def tile_of_product(
    left: tl.tensor, right: tl.tensor, row: tl.tensor, column: tl.tensor, rows: tl.tensor,
    columns: tl.tensor, depth: tl.constexpr, depth_stride: tl.tensor, column_stride: tl.tensor,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
) -> tl.tensor:
    """left (rows, depth) times right (depth, columns), which has these strides, at row and column:
    (tile_rows, tile_columns) float32."""
    k = tl.arange(0, tile_depth)
    # In 64 bits: an offset in a large batch does not fit into 32.
    left_at = left + row.to(tl.int64)[:, None] * depth + k[None, :]
    right_at = right + k[:, None] * depth_stride + column.to(tl.int64)[None, :] * column_stride
    total = tl.zeros((tile_rows, tile_columns), tl.float32)
    for start in range(0, depth, tile_depth):
        inside = k < depth - start
        a = tl.load(left_at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right_at, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(a, b, total)
        left_at += tile_depth
        right_at += tile_depth * depth_stride
    return total


@triton.jit
def gelu_gate(h: tl.tensor) -> tl.tensor:
    """GELU(h) / h: (1 + tanh z) / 2 = sigmoid(2 z)."""
    return tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))


@triton.jit
def gelu_product_kernel(
    y: tl.tensor, weight: tl.tensor, bias: tl.tensor, h: tl.tensor, a: tl.tensor, rows: tl.tensor,
    columns: tl.tensor, depth: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    tile_depth: tl.constexpr, tiles_together: tl.constexpr,
) -> None:
    """A program a tile of h and a (rows, columns); y (rows, depth), weight (columns, depth)."""
    down, across = place_of_tile(rows, columns, tile_rows, tile_columns, tiles_together)
    row = down * tile_rows + tl.arange(0, tile_rows)
    column = across * tile_columns + tl.arange(0, tile_columns)
    total = tile_of_product(
        y, weight, row, column, rows, columns, depth, 1, depth, tile_rows, tile_columns, tile_depth)
    total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    # The backward pass finds h rounded, so GELU is that of the rounded h.
    rounded = total.to(h.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(h + at, rounded, mask=inside)
    value = rounded.to(tl.float32)
    tl.store(a + at, (value * gelu_gate(value)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def gelu_product_backward_kernel(
    dbranch: tl.tensor, weight: tl.tensor, h: tl.tensor, dh: tl.tensor, partial: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, depth: tl.constexpr, tile_rows: tl.constexpr,
    tile_columns: tl.constexpr, tile_depth: tl.constexpr, tiles_together: tl.constexpr,
) -> None:
    """A program a tile of dh (rows, columns); dbranch (rows, depth), weight (depth, columns).
    `partial` (tiles down, columns) receives the tile's sums of dh over its rows."""
    down, across = place_of_tile(rows, columns, tile_rows, tile_columns, tiles_together)
    row = down * tile_rows + tl.arange(0, tile_rows)
    column = across * tile_columns + tl.arange(0, tile_columns)
    da = tile_of_product(
        dbranch, weight, row, column, rows, columns, depth, columns, 1, tile_rows, tile_columns,
        tile_depth)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    gate = gelu_gate(value)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * value * value)
    grad = da * (gate + value * gate * (1 - gate) * slope)
    tl.store(dh + at, grad.to(dh.dtype.element_ty), mask=inside)
    # Rows beyond the last are zero: those of dbranch were.
    tl.store(partial + down.to(tl.int64) * columns + column, tl.sum(grad, 0), mask=column < columns)


@triton.jit
def pack_qkv_kernel(
    dq: tl.tensor, dk: tl.tensor, dv: tl.tensor, dqkv: tl.tensor, partial: tl.tensor,
    tokens: tl.tensor, q_image: tl.tensor, q_head: tl.tensor, q_token: tl.tensor,
    k_image: tl.tensor, k_head: tl.tensor, k_token: tl.tensor, v_image: tl.tensor,
    v_head: tl.tensor, v_token: tl.tensor, width: tl.constexpr, head_width: tl.constexpr,
    block: tl.constexpr, rows: tl.constexpr,
) -> None:
    """A program for `rows` tokens of an image and one of q, k, v. dqkv (images, tokens, 3, width),
    partial (images, programs an image, 3, width)."""
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    which = tl.program_id(2)
    column = tl.arange(0, block)
    inside = column < width
    head = column // head_width
    if which == 0:
        source = dq + image * q_image + head * q_head + column % head_width
        stride = q_token
    elif which == 1:
        source = dk + image * k_image + head * k_head + column % head_width
        stride = k_token
    else:
        source = dv + image * v_image + head * v_head + column % head_width
        stride = v_token
    total = tl.zeros((block,), tl.float32)
    for i in range(rows):
        token = part * rows + i
        value = tl.load(source + token * stride, mask=inside, other=0.0)
        into = dqkv + ((image * tokens + token) * 3 + which) * width + column
        tl.store(into, value, mask=inside)
        total += value.to(tl.float32)
    # A place for each program instead of atomic sums, which would round in another order each time.
    into = partial + ((image * tl.num_programs(1) + part) * 3 + which) * width + column
    tl.store(into, total, mask=inside)
# fmt: on


@triton_op("largescale::gelu_product", mutates_args=())
def gelu_product(y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(h, GELU(h)) of h = y weight^T + bias: y (M, K), weight (N, K), bias (N,), both results (M,
    N) in the type of y."""
    if is_eager(y) or y.dtype == torch.float32:
        h = F.linear(y, weight, bias)
        return h, F.gelu(h, approximate="tanh")
    y, weight = y.contiguous(), weight.contiguous()
    (rows, depth), columns = y.shape, len(weight)
    h = y.new_empty(rows, columns)
    a = torch.empty_like(h)
    _launch_product(gelu_product_kernel, [y, weight, bias, h, a], rows, columns, depth)
    return h, a


@triton_op("largescale::gelu_product_backward", mutates_args=())
def gelu_product_backward(dbranch: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, sums) of dh = (dbranch weight) GELU'(h): dbranch (M, K), weight (K, N), h and dh (M, N).
    The sums (tiles, N) float32 add up to the gradient of the bias."""
    if is_eager(dbranch) or dbranch.dtype == torch.float32:
        dh = torch.ops.aten.gelu_backward(dbranch @ weight, h, approximate="tanh")
        return dh, dh.sum(0, keepdim=True, dtype=_sum_type(dh))
    dbranch, weight = dbranch.contiguous(), weight.contiguous()
    (rows, depth), columns = dbranch.shape, weight.shape[1]
    dh = torch.empty_like(h)
    partial = h.new_empty(math.ceil(rows / TILE_ROWS), columns, dtype=torch.float32)
    given = [dbranch, weight, h, dh, partial]
    _launch_product(gelu_product_backward_kernel, given, rows, columns, depth)
    return dh, partial


def _launch_product(kernel: Any, given: list[Tensor], rows: int, columns: int, depth: int) -> None:
    programs = math.ceil(rows / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS)
    launch(
        kernel,
        (programs,),
        [*given, rows, columns],
        **product_constants(depth),
        num_warps=PRODUCT_WARPS,
        num_stages=PRODUCT_STAGES,
    )


def product_constants(depth: int) -> dict[str, int]:
    """What the kernels of products are compiled for."""
    return {
        "depth": depth,
        "tile_rows": TILE_ROWS,
        "tile_columns": TILE_COLUMNS,
        "tile_depth": TILE_DEPTH,
        "tiles_together": TILES_TOGETHER,
    }


@triton_op("largescale::pack_qkv", mutates_args=())
def pack_qkv(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(dqkv, sums): gradients (N, heads, T, head width) each, with any strides, as the gradient of
    the product that they are views of, (N, T, 3 D). The sums (parts, 3 D) float32 add up to the
    gradient of its bias."""
    images, heads, tokens, head_width = dq.shape
    width = heads * head_width
    if is_eager(dq):
        packed = torch.stack([dq, dk, dv], dim=1).permute(0, 3, 1, 2, 4).reshape(images, tokens, -1)
        return packed, packed.sum((0, 1), dtype=_sum_type(packed))[None]
    # The kernel needs a head's channels side by side, as all attention kernels hand them over.
    dq, dk, dv = (each if each.stride(3) == 1 else each.contiguous() for each in (dq, dk, dv))
    rows = math.gcd(tokens, PACK_ROWS)
    dqkv = dq.new_empty(images, tokens, 3 * width)
    partial = dq.new_empty(images, tokens // rows, 3 * width, dtype=torch.float32)
    strides = [stride for each in (dq, dk, dv) for stride in each.stride()[:3]]
    launch(
        pack_qkv_kernel,
        (images, tokens // rows, 3),
        [dq, dk, dv, dqkv, partial, tokens, *strides],
        width=width,
        head_width=head_width,
        block=triton.next_power_of_2(width),
        rows=rows,
        num_warps=PACK_WARPS,
    )
    return dqkv, partial.flatten(0, 1)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class GeluMlp(torch.autograd.Function):
    """GELU(y W1^T + b1) W2^T: y (N, T, D), W1 (M, D), b1 (M,), W2 (D, M) -> (N, T, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
        h, a = gelu_product(y.flatten(0, 1), weight1, bias1)
        ctx.save_for_backward(y, weight1, bias1, weight2, h, a)
        return F.linear(a, weight2).view(*y.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        y, weight1, bias1, weight2, h, a = ctx.saved_tensors
        dbranch = gradients[0].flatten(0, 1)
        dh, sums = gelu_product_backward(dbranch, weight2, h)
        dy = (dh @ weight1).view_as(y)
        return dy, dh.t() @ y.flatten(0, 1), sums.sum(0).to(bias1.dtype), dbranch.t() @ a


class QkvProduct(torch.autograd.Function):
    """q, k and v, (N, heads, T, D / heads) each, views of y W^T + b: y (N, T, D), W (3 D, D)."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(y, weight, bias)
        qkv = F.linear(y, weight, bias).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias = ctx.saved_tensors
        dqkv, sums = pack_qkv(*gradients)
        dqkv = dqkv.flatten(0, 1)
        dweight = dqkv.t() @ y.flatten(0, 1)
        return (dqkv @ weight).view_as(y), dweight, sums.sum(0).to(bias.dtype), None
