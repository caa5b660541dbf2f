"""Embeddings of timesteps, labels and captions: float32 in all precisions, except for the tokens of
captions."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largescale.condition import Captions, Condition
from largescale.errors import ConfigError


class LinearFp32(nn.Linear):
    """Computes in float32, also where the engine has cast the weights to half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def sinusoid(t: Tensor, dim: int, downscale_freq_shift: int = 0) -> Tensor:
    """Sinusoidal embedding (N,) -> (N, dim) float32: cosines, then sines, at wavelengths from 2 pi
    to 20000 pi, or with downscale_freq_shift=0 towards it."""
    # DiT divides by dim / 2, so that the last frequency is not 1 / 10000 itself; diffusers and EDM
    # divide by dim / 2 - 1.
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - downscale_freq_shift))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Timesteps t (N,) -> (N, hidden_size) float32. In half precision, neighbouring timesteps would
    become one."""

    def __init__(
        self, hidden_size: int, frequency_dim: int = 256, *, downscale_freq_shift: int = 0
    ):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.downscale_freq_shift = downscale_freq_shift
        self.mlp = nn.Sequential(
            LinearFp32(frequency_dim, hidden_size), nn.SiLU(), LinearFp32(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequency_dim, self.downscale_freq_shift))


class LabelEmbedder(nn.Module):
    """Labels y (N,) int64 -> (N, hidden_size) float32.

    Where labels are dropped in training there is one more row, the null label `num_classes`.
    Dropping is the caller's: it passes the null label, so that the model has no random state.
    """

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)

    def forward(self, y: Condition) -> Tensor:
        if isinstance(y, Captions):
            raise ConfigError(
                "this model takes labels and was given captions; choose data with labels, or set "
                "max_caption_tokens and num_classes=0"
            )
        return self.embedding_table(y).float()


class CaptionEmbedder(nn.Module):
    """Captions -> (N, D) float32, (N, L, D) in the weights' type and its mask (N, L) bool, with D =
    hidden_size.

    Encoders differ in scale, and CLIP's have outlier channels: both inputs are layer-normalised
    first, in float32. The null caption is frozen, and one token of zeros until it is set
    (null_caption="encoded"), or learned, with all of its L tokens, as in PixArt-alpha,
    arXiv:2310.00426.
    """

    def __init__(
        self,
        max_caption_tokens: int,
        caption_width: int,
        caption_pooled_width: int,
        hidden_size: int,
        null_caption: Literal["encoded", "learned"],
    ):
        super().__init__()
        learned = null_caption == "learned"
        self.token_proj = nn.Linear(caption_width, hidden_size)
        self.mlp = nn.Sequential(
            LinearFp32(caption_pooled_width, hidden_size),
            nn.SiLU(),
            LinearFp32(hidden_size, hidden_size),
        )
        self.null_tokens = nn.Parameter(
            torch.zeros(max_caption_tokens, caption_width), requires_grad=learned
        )
        self.null_pooled = nn.Parameter(torch.zeros(caption_pooled_width), requires_grad=learned)
        # 1 for a real token. Frozen values are parameters, as pos_embed is, so that checkpoints and
        # exports contain them.
        first = (torch.arange(max_caption_tokens) == 0).float()
        self.null_mask = nn.Parameter(
            torch.ones(max_caption_tokens) if learned else first, requires_grad=False
        )

    @torch.no_grad()
    def set_null_caption(self, tokens: Tensor, pooled: Tensor) -> None:
        """Sets the null caption to the encoding of the empty one: `tokens` (n, width), n <= L, and
        `pooled` (pooled_width,)."""
        n = len(tokens)
        length, width = self.null_tokens.shape
        if self.null_tokens.requires_grad:
            raise ConfigError("null_caption=learned is not set from data; use null_caption=encoded")
        if (
            not 1 <= n <= length
            or tokens.shape[1:] != (width,)
            or pooled.shape != self.null_pooled.shape
        ):
            raise ConfigError(
                f"this model takes an empty caption of up to ({length}, {width}) and pooled "
                f"{tuple(self.null_pooled.shape)}, got {tuple(tokens.shape)} and "
                f"{tuple(pooled.shape)}; set max_caption_tokens, caption_width and caption_pooled_width "
                "to the data's"
            )
        # Behind its n tokens is padding, which the mask leaves out.
        self.null_tokens.zero_()[:n].copy_(tokens)
        self.null_mask.zero_()[:n].fill_(1)
        self.null_pooled.copy_(pooled)

    def forward(self, y: Condition) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(y, Captions):
            raise ConfigError(
                "this model takes captions and was given labels; choose data with captions, or set "
                "max_caption_tokens=0 and num_classes"
            )
        if (
            y.tokens.shape[1:] != self.null_tokens.shape
            or y.pooled.shape[1:] != self.null_pooled.shape
        ):
            length, width = self.null_tokens.shape
            raise ConfigError(
                f"this model takes captions (N, {length}, {width}) and pooled (N, "
                f"{len(self.null_pooled)}), got {tuple(y.tokens.shape)} and "
                f"{tuple(y.pooled.shape)}; set max_caption_tokens, caption_width and "
                "caption_pooled_width to the data's"
            )

        # Dropped captions get the null one, with a mask of its own.
        null = y.null[:, None]
        real = torch.arange(y.tokens.shape[1], device=y.length.device) < y.length[:, None]
        mask = torch.where(null, self.null_mask > 0, real)  # (N, L)
        tokens = torch.where(null[..., None], self.null_tokens.float(), y.tokens.float())

        # Padding may be NaN, and attention's weight of 0 times NaN is NaN.
        tokens = tokens.masked_fill(~mask[..., None], 0)
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(self.token_proj.weight.dtype)
        pooled = torch.where(null, self.null_pooled.float(), y.pooled.float())
        pooled = F.layer_norm(pooled, pooled.shape[-1:], eps=1e-6)
        return self.mlp(pooled), self.token_proj(tokens), mask
