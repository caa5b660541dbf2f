"""The one small vector a step that ranks sum, so that each takes the same decision from the same
numbers."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.diffusion.objective import Losses


@dataclass(frozen=True)
class StepReport:
    """What all ranks know of a step: means over the global batch, sums per noise cluster (C_1
    first), unweighted."""

    loss: float
    mse: float
    vb: float
    cluster_loss: list[float]  # sums; a cluster's mean is its sum over its count
    cluster_count: list[float]
    rank_loss: list[float]  # means, in rank order
    stop: bool  # a rank was asked to stop
    writing: bool  # a rank still writes a checkpoint
    non_finite: list[int]  # ranks that saw a loss that is not finite ...
    non_finite_clusters: list[int]  # ... and the clusters it was in: 1 for C_1
    cannot_write: list[int]  # ranks whose part of a checkpoint has failed
    cannot_read: list[int]  # ranks that got no data
    row_bin: list[
        float
    ]  # of each row of the global batch, where asked for: in which part of the noise axis ...
    row_loss: list[float]  # ... and its loss


class RankStatus(NamedTuple):
    """What one rank has to say to the others at a step, besides its losses."""

    stop: bool = False  # it was asked to stop
    writing: bool = False  # it still writes a checkpoint
    cannot_write: bool = False  # its part of a checkpoint has failed


# Of one rank each, where a sum would say only how many.
_BY_RANK = ("non_finite", "cannot_write", "cannot_read", "loss")


class StepAccumulator:
    """Gathers one rank's share of a step over its micro steps, on the device and without waiting
    for it."""

    def __init__(self, edges: Tensor, rank: int, world_size: int, n_rows: int = 0, n_bins: int = 0):
        """`edges`: (N + 1,) float64 cluster edges on the training device. `n_rows`: the global
        batch size, where the loss of each row is wanted, and in which of `n_bins` equal parts of
        the noise axis it is."""
        n_clusters, device = len(edges) - 1, edges.device
        self._inner_edges, self._rank = edges[1:-1], rank
        self._clusters = torch.arange(n_clusters, device=device)
        self.n_rows, self._n_bins = n_rows, n_bins

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self._sums = zeros(4)  # loss, mse, vb, count
        self._per_cluster = zeros(3, n_clusters)  # loss, count, losses that are not finite
        self._flags = zeros(2)  # stop, writing
        self._by_rank = zeros(len(_BY_RANK), world_size)
        self._by_row = zeros(2, n_rows)  # bin, loss

    @torch.no_grad()
    def add(self, losses: Losses, u: Tensor, importance: Tensor, rows: Tensor) -> None:
        """(B,) each: losses, noise levels in float64, the factor by which resampling has multiplied
        the loss, and the rows' numbers in the global batch. Every mean counts a row `importance`
        times, so that resampling changes none; the loss of a row is reported without it, as the
        papers' codes resample by."""
        loss, mse, vb, factor = torch.stack([*losses, importance]).double()
        each = torch.stack([loss, factor * mse, factor * vb, torch.ones_like(loss)])  # (4, B)
        self._sums += each.sum(1)
        cluster = torch.bucketize(u, self._inner_edges, right=True)
        member = (cluster[None] == self._clusters[:, None]).double()  # (N, B)
        bad, unweighted = ~torch.isfinite(loss), factor * (mse + vb)
        self._per_cluster += torch.stack(
            [(member * unweighted).sum(1), (member * factor).sum(1), (member * bad).sum(1)]
        )
        self._by_rank[_BY_RANK.index("non_finite"), self._rank] += bad.any()
        if self._n_bins:
            bins = (u * self._n_bins).floor().clamp(max=self._n_bins - 1)
            self._by_row[:, rows] = torch.stack([bins, loss / factor])

    def vector(self, status: RankStatus, *, cannot_read: bool = False) -> Tensor:
        """What is summed over ranks: flat, float64."""
        self._flags[0] += status.stop
        self._flags[1] += status.writing
        mine = self._by_rank[:, self._rank]
        mine[_BY_RANK.index("cannot_write")] += status.cannot_write
        mine[_BY_RANK.index("cannot_read")] += cannot_read
        mine[_BY_RANK.index("loss")] += self._sums[0] / self._sums[3]
        parts = (self._sums, self._per_cluster, self._flags, self._by_rank, self._by_row)
        return torch.cat([part.flatten() for part in parts])


def read_report(values: list[float], n_clusters: int, n_rows: int = 0) -> StepReport:
    """The summed vector, by name. `n_rows`: as in `StepAccumulator`."""
    end = len(values) - 2 * n_rows
    values, by_row = values[:end], values[end:]
    loss, mse, vb, count = values[:4]
    by_cluster, rest = values[4 : 4 + 3 * n_clusters], values[4 + 3 * n_clusters :]
    cluster_loss, cluster_count, bad = (
        by_cluster[i * n_clusters : (i + 1) * n_clusters] for i in range(3)
    )
    stop, writing, *by_rank = rest
    world_size = len(by_rank) // len(_BY_RANK)
    by_name = {
        name: by_rank[i * world_size : (i + 1) * world_size] for i, name in enumerate(_BY_RANK)
    }

    def raised(name: str) -> list[int]:
        """Ranks that have set this flag."""
        return [rank for rank, flag in enumerate(by_name[name]) if flag > 0]

    return StepReport(
        loss=loss / count,
        mse=mse / count,
        vb=vb / count,
        cluster_loss=cluster_loss,
        cluster_count=cluster_count,
        rank_loss=by_name["loss"],
        stop=stop > 0,
        writing=writing > 0,
        non_finite=raised("non_finite"),
        non_finite_clusters=[i + 1 for i, n in enumerate(bad) if n > 0],
        cannot_write=raised("cannot_write"),
        cannot_read=raised("cannot_read"),
        row_bin=by_row[:n_rows],
        row_loss=by_row[n_rows:],
    )
