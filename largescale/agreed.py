"""The one small vector a step that ranks sum, so that each takes the same decision from the same numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.diffusion.gaussian import Losses


@dataclass(frozen=True)
class Report:
    """What all ranks know of a step: means over the global batch, sums per noise cluster (C_1 first)."""

    loss: float
    mse: float
    vb: float
    cluster_loss: list[float]  # sums; a cluster's mean is its sum over its count
    cluster_count: list[float]
    stop: bool                 # a rank was asked to stop
    writing: bool              # a rank still writes a checkpoint
    non_finite: list[int]      # ranks that saw a loss that is not finite


class Tally:
    """Gathers one rank's share of a step over its micro steps, on the device and without waiting for it."""

    def __init__(self, edges: Tensor, rank: int, world_size: int):
        """`edges`: (N + 1,) float64 cluster edges on the training device."""
        n = len(edges) - 1
        self._inner, self._clusters, self._rank = edges[1:-1], torch.arange(n, device=edges.device), rank
        self._sums = torch.zeros(4, dtype=torch.float64, device=edges.device)  # loss, mse, vb, count
        self._per_cluster = torch.zeros(2, n, dtype=torch.float64, device=edges.device)
        self._flags = torch.zeros(2 + world_size, dtype=torch.float64, device=edges.device)

    @torch.no_grad()
    def add(self, losses: Losses, u: Tensor) -> None:
        """`losses`: (B,) each; `u`: (B,) float64 noise levels."""
        each = torch.stack([losses.loss, losses.mse, losses.vb, torch.ones_like(losses.loss)]).double()  # (4, B)
        self._sums += each.sum(1)
        cluster = torch.bucketize(u, self._inner, right=True)
        member = (cluster[None] == self._clusters[:, None]).double()                                     # (N, B)
        self._per_cluster += torch.stack([(member * each[0]).sum(1), member.sum(1)])
        self._flags[2 + self._rank] += (~torch.isfinite(each[0])).any()

    def vector(self, *, stop: bool, writing: bool) -> Tensor:
        self._flags[0] += stop
        self._flags[1] += writing
        return torch.cat([self._sums, self._per_cluster.flatten(), self._flags])


def read(values: list[float], n_clusters: int) -> Report:
    """The summed vector, by name."""
    loss, mse, vb, count = values[:4]
    flags = values[4 + 2 * n_clusters :]
    return Report(
        loss / count, mse / count, vb / count,
        values[4 : 4 + n_clusters], values[4 + n_clusters : 4 + 2 * n_clusters],
        flags[0] > 0, flags[1] > 0, [rank for rank, flag in enumerate(flags[2:]) if flag > 0],
    )
