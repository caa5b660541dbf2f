"""DiT, Peebles and Xie, arXiv:2212.09748, with the parameter names of its released checkpoints.
With captions, each block also attends to their tokens, as in PixArt-alpha, arXiv:2310.00426.

In half precision the large matrix products run in the weights' type. The residual stream, layer
norms, modulation, the embeddings and the last projection stay float32; where the weights are
float32 every cast here does nothing. Parts whose weights are float32 among those in half precision
(`inference.prepare`) compute in float32.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from largescale.condition import Condition
from largescale.errors import ConfigError
from largescale.models.embedders import CaptionEmbedder, LabelEmbedder, LinearFp32, TimestepEmbedder


def sincos_position(hidden_size: int, grid: int) -> Tensor:
    """Position embedding (1, grid ** 2, hidden_size) float32: half of the channels for the column,
    half for the row."""
    quarter = hidden_size // 4
    position = torch.arange(grid, dtype=torch.float64)
    angles = position[:, None] / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                # (grid, D / 2)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, hidden_size).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm in float32: x (N, T, D), shift and scale (N, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def adaln(hidden_size: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, chunks * hidden_size))


class PatchEmbed(nn.Module):
    """The strided convolution of ViT as one matrix product; `proj` holds its weights in the
    convolution's shape."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, p = self.proj.weight.float(), self.proj.bias, self.proj.kernel_size[0]
        n, c, h, w = x.shape
        x = x.float().reshape(n, c, h // p, p, w // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)         # (N, T, C * p ** 2)
        return F.linear(x, weight.flatten(1), None if bias is None else bias.float())  # (N, T, D)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the last two dimensions, (..., T, D) each."""
    # The backward pass of torch's kernel takes four times as long here.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return attention_by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by two matrix products, which keeps its (..., T, T) weights for the backward
    pass."""
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """Self-attention over x (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))                                 # (N, T, D)

    def attend(self, x: Tensor) -> Tensor:
        """What is projected last, (N, T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))         # (N, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # (N, heads, T, D / heads) each
        return attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attention from x (N, T, D) to the tokens (N, L, D) where the mask (N, L) is true."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.proj(self.attend(x, tokens, mask))                   # (N, T, D)

    def attend(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """What is projected last, (N, T, D)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))                # (N, T, heads, D / heads)
        kv = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1))      # (N, L, 2, heads, D / heads)
        k, v = kv.permute(2, 0, 3, 1, 4)                                 # (N, heads, L, D / heads) each
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None])
        return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Transformer block with adaLN-Zero: x (N, T, D) float32, c (N, D) in the weights' type -> (N,
    T, D) float32. With `captions`: tokens (N, L, D) in the weights' type and their mask."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, captions: bool, mlp_norm_eps: float = 1e-6):
        super().__init__()
        self.mlp_norm_eps = mlp_norm_eps
        mlp_size = int(hidden_size * mlp_ratio)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads) if captions else None
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(hidden_size, mlp_size), act=nn.GELU("tanh"), fc2=nn.Linear(mlp_size, hidden_size)))
        self.adaLN_modulation = adaln(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, captions: tuple[Tensor, Tensor] | None) -> Tensor:
        modulation = self.adaLN_modulation(c).float()[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation         # (N, 1, D) each
        x = x + gate_attn * self.attn(modulate(x, shift_attn, scale_attn).to(c.dtype)).float()
        if self.cross_attn is not None and captions is not None:
            x = x + self.cross_attn(F.layer_norm(x, x.shape[-1:], eps=1e-6).to(c.dtype), *captions).float()
        y = modulate(x, shift_mlp, scale_mlp, self.mlp_norm_eps)
        return x + gate_mlp * self.mlp(y.to(c.dtype)).float()            # (N, T, D)


class FinalLayer(nn.Module):
    """Tokens -> the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = LinearFp32(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = adaln(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).float()[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))                    # (N, T, p ** 2 * out_channels)


class DiT(nn.Module):
    """Predicts what its objective asks for, as the noise in x_t, and with `learn_sigma` where its
    variance lies, from t and the condition y: captions with `max_caption_tokens`, labels with
    `num_classes`, nothing with neither."""

    checkpoint_blocks: bool = False
    """Keep each block's input only, and compute the block again in the backward pass."""
    fused_blocks: Callable[..., Tensor] | None = None
    """What runs in place of `blocks`, with their weights: `fused_blocks.FusedBlocks`."""

    def __init__(self, *, patch_size: int, hidden_size: int, depth: int, num_heads: int, input_size: int = 32,
                 in_channels: int = 4, mlp_ratio: float = 4.0, num_classes: int = 1000,
                 class_dropout_prob: float = 0.1, learn_sigma: bool = True, max_caption_tokens: int = 0,
                 caption_width: int = 768, caption_pooled_width: int = 768,
                 null_caption: Literal["encoded", "learned"] = "encoded",
                 downscale_freq_shift: Literal[0, 1] = 0, mlp_norm_eps: float = 1e-6):
        """`input_size`: height and width of the (latent) image. `caption_*`: L and the widths of
        `Captions`. The last two differ in diffusers' DiT. Weights are drawn from torch's global
        generator."""
        super().__init__()
        if input_size % patch_size:
            raise ConfigError(f"input_size={input_size} is not a multiple of "
                              f"patch_size={patch_size}; try input_size "
                              f"{max(input_size // patch_size, 1) * patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(f"hidden_size={hidden_size} is not a multiple of "
                              f"num_heads={num_heads} and of 4 (the position embedding); try 64 "
                              "channels a head")
        if not 0 <= class_dropout_prob < 1:
            raise ConfigError(f"class_dropout_prob={class_dropout_prob} is not in [0, 1); DiT uses "
                              "0.1")
        if num_classes and max_caption_tokens:
            raise ConfigError(f"num_classes={num_classes} and max_caption_tokens={max_caption_tokens} "
                              "exclude each other; set one of them to 0")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.mlp_ratio, self.num_classes = hidden_size, mlp_ratio, num_classes
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.grid = input_size // patch_size

        # The names are those of released checkpoints.
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, downscale_freq_shift=downscale_freq_shift)
        self.y_embedder: CaptionEmbedder | LabelEmbedder | None = None
        if max_caption_tokens:
            self.y_embedder = CaptionEmbedder(
                max_caption_tokens, caption_width, caption_pooled_width, hidden_size, null_caption)
        elif num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_position(hidden_size, self.grid), requires_grad=False)
        captions = max_caption_tokens > 0
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, captions, mlp_norm_eps) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As in the paper: each block starts as the identity (adaLN-Zero) and the output as 0."""
        for name, parameter in self.named_parameters():
            # The position embedding and an encoded null caption have fixed values.
            if not parameter.requires_grad:
                continue
            zero = "adaLN_modulation" in name or "cross_attn.proj" in name or name.startswith("final_layer")
            if zero or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")) and "token_proj" not in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                # The patch projection is initialised as the matrix that it is; flatten gives a view.
                nn.init.xavier_uniform_(parameter.flatten(1))

    @property
    def compute_type(self) -> torch.dtype:
        """The type of the large matrix products."""
        return next(self.blocks.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The prediction (N, C or 2C, H, W) float32, from x (N, C, H, W) of any float type, t (N,)
        of any type, and y for N images."""
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ConfigError(f"this model takes (N, {self.in_channels}, {self.input_size}, "
                              f"{self.input_size}), got {tuple(x.shape)}; set input_size and "
                              "in_channels to the data's")
        x = self.x_embedder(x) + self.pos_embed.float()                  # (N, T, D), T = (H / patch_size) ** 2

        # The condition is added to the timestep; captions are also attended to.
        c = self.t_embedder(t)                                           # (N, D)
        captions = None
        if isinstance(self.y_embedder, CaptionEmbedder):
            pooled, tokens, mask = self.y_embedder(y)                    # (N, D), (N, L, D), (N, L)
            c, captions = c + pooled, (tokens, mask)
        elif self.y_embedder is not None:
            c = c + self.y_embedder(y)
        c = c.to(self.compute_type)

        # A block draws nothing, so checkpointing keeps no state of the generator.
        checkpoint_blocks = self.checkpoint_blocks and torch.is_grad_enabled()
        if self.fused_blocks is not None:
            x = self.fused_blocks(x, c, captions, checkpoint_blocks=checkpoint_blocks)
        for block in self.blocks if self.fused_blocks is None else ():
            if checkpoint_blocks:
                x = checkpoint(block, x, c, captions, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, captions)                                # (N, T, D)

        # Tokens -> patches -> the image
        x = self.final_layer(x, c)                                       # (N, T, p ** 2 * out_channels)
        x = x.reshape(len(x), self.grid, self.grid, self.patch_size, self.patch_size, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, self.input_size, self.input_size)


def flops_per_image(model: DiT) -> int:
    """Floating-point operations of one forward pass per image: two per multiply-add, matrix
    products only."""
    tokens, d, depth = model.grid**2, model.hidden_size, len(model.blocks)
    patch = model.patch_size**2

    # Multiply-adds of a token: patch projections; attention's projections, MLP, and two products.
    per_token = d * patch * (model.in_channels + model.out_channels)
    per_token += depth * (4 * d * d + 2 * d * int(d * model.mlp_ratio) + 2 * tokens * d)
    # Of an image: the embedding of t and the modulations.
    per_image = (model.t_embedder.frequency_dim + d) * d + (6 * depth + 2) * d * d
    if isinstance(model.y_embedder, CaptionEmbedder):
        length, width = model.y_embedder.null_tokens.shape
        per_token += depth * (2 * d * d + 2 * length * d)
        per_image += length * d * (width + depth * 2 * d) + (len(model.y_embedder.null_pooled) + d) * d
    return 2 * (tokens * per_token + per_image)
