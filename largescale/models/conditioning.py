"""Embeddings of what a denoiser is conditioned on. Outputs are float32 whatever type the weights have."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearFp32(nn.Linear):
    """Computes in float32, also where the engine has cast the weights to half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim) float32: cosines, then sines, at wavelengths from 2 pi towards 20000 pi."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N, hidden_size) float32. In half precision, neighbouring timesteps would become one."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(
            LinearFp32(frequency_dim, hidden_size), nn.SiLU(), LinearFp32(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequency_dim))


class LabelEmbedder(nn.Module):
    """y (N,) int64 -> (N, hidden_size) float32.

    Where labels are dropped in training there is one more row, the null label `num_classes`. Dropping is the caller's:
    it passes the null label, so that the model has no random state.
    """

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y).float()
