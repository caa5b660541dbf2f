"""DiT's blocks with the residual stream read and written once where two sublayers meet.

A block ends with gate x branch, and the next one starts with a layer norm: `residual_norm` does
both at once. So a block hands on its last branch before it is added. GELU and the biases' gradients
are computed where the products' results are at hand, see `fused_products`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from largescale.errors import ConfigError
from largescale.models.dit import Attention, Block, DiT, attention, modulate

try:
    from largescale.models.fused_norm import residual_norm
    from largescale.models.fused_products import GeluMlp, QkvProduct
except ImportError as error:
    raise ConfigError(
        f"train.kernels=fused needs Triton, which is not installed here ({error}); train with "
        "--train.kernels inductor"
    ) from error


class Pending(NamedTuple):
    """A branch that is not yet added to the stream: gate (branch + bias)."""

    branch: Tensor  # (N, T, D)
    bias: Tensor  # (D,)
    gate: Tensor  # (N, D)


class FusedBlock(nn.Module):
    """What a `Block` computes, with its weights."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        c: Tensor,
        captions: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Pending]:
        """x (N, T, D) float32 before `pending` is added; c and captions as a `Block`'s."""
        block = self.block
        modulation = block.adaLN_modulation(c).chunk(6, dim=-1)  # (N, D) each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        if pending is None:
            shift, scale = shift_attn[:, None].float(), scale_attn[:, None].float()
            y = modulate(x, shift, scale).to(c.dtype)
        else:
            x, y = residual_norm(x, *pending, shift_attn, scale_attn, keep_input=False)

        # The bias of a branch's last product is added by the kernel, which also sums its gradient.
        branch = F.linear(attend(block.attn, y), block.attn.proj.weight)
        bias, gate = block.attn.proj.bias, gate_attn
        if block.cross_attn is not None and captions is not None:
            x, y = residual_norm(x, branch, bias, gate, keep_input=True)
            branch = F.linear(block.cross_attn.attend(y, *captions), block.cross_attn.proj.weight)
            bias, gate = block.cross_attn.proj.bias, torch.ones_like(gate_attn)
        x, y = residual_norm(
            x, branch, bias, gate, shift_mlp, scale_mlp, keep_input=True, eps=block.mlp_norm_eps
        )
        fc1, _, fc2 = block.mlp
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        branch = GeluMlp.apply(y, fc1.weight, fc1.bias, fc2.weight)
        return x, Pending(branch, fc2.bias, gate_mlp)


def attend(attn: Attention, y: Tensor) -> Tensor:
    """`Attention.attend`, (N, T, D) both, whose gradient of q, k and v is packed in one pass."""
    q, k, v = QkvProduct.apply(y, attn.qkv.weight, attn.qkv.bias, attn.num_heads)
    return attention(q, k, v).transpose(1, 2).flatten(2)


def fuse_blocks(model: nn.Module) -> None:
    """Have a DiT run its blocks by these kernels. Raises ConfigError for another network."""
    if not isinstance(model, DiT):
        raise ConfigError(
            "train.kernels=fused is for model.architecture=dit; train with --train.kernels inductor"
        )
    model.fused_blocks = FusedBlocks(model.blocks)


class FusedBlocks:
    """All blocks of a DiT."""

    def __init__(self, blocks: nn.ModuleList):
        self.blocks: list[FusedBlock] = []
        for block in blocks:
            assert isinstance(block, Block)
            self.blocks.append(FusedBlock(block))

    def __call__(
        self,
        x: Tensor,
        c: Tensor,
        captions: tuple[Tensor, Tensor] | None,
        *,
        checkpoint_blocks: bool,
    ) -> Tensor:
        """x (N, T, D) float32 -> the same after all blocks."""
        pending: Pending | None = None
        for block in self.blocks:
            given = (x, pending, c, captions)
            if checkpoint_blocks:
                # The state of the generators is not kept, as no block draws from them.
                x, pending = checkpoint(
                    block, *given, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, pending = block(*given)
        if pending is None:
            return x
        # No norm follows the last block, which would have added its branch.
        added = pending.branch.float() + pending.bias.float()
        return x + pending.gate.float()[:, None] * added
