"""One small vector for each step, which ranks sum, so that each takes the same decision from the
same numbers."""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.diffusion.loss_weighting import OptimisedLosses


@dataclass(frozen=True)
class StepReport:
    """What all ranks know of a step: means over the global batch, sums per noise cluster (C_1
    first), unweighted."""

    loss: float
    mse: float
    vb: float
    # Sums; a cluster's mean is its sum over its count.
    cluster_loss: list[float]
    cluster_count: list[float]
    # Means, in rank order.
    rank_loss: list[float]
    # A rank was asked to stop; a rank still writes a checkpoint.
    stop: bool
    writing: bool
    # Ranks that saw a loss that is not finite, and the clusters it was in: 1 for C_1.
    non_finite: list[int]
    non_finite_clusters: list[int]
    # Ranks whose part of a checkpoint has failed; ranks that got no data.
    cannot_write: list[int]
    cannot_read: list[int]
    # Of each row of the global batch, where asked for: its part of the noise axis, and its loss.
    row_bin: list[float]
    row_loss: list[float]


class RankStatus(NamedTuple):
    """What one rank reports to the others at a step, besides its losses."""

    stop: bool = False  # it was asked to stop, or another process trains the run since
    writing: bool = False  # it still writes a checkpoint
    cannot_write: bool = False  # its part of a checkpoint has failed


# A value for each rank, where a sum would only show how many.
_BY_RANK = ("non_finite", "cannot_write", "cannot_read", "loss")


class StepAccumulator:
    """Gathers one rank's share of a step over its micro steps, on the device and without waiting
    for it."""

    def __init__(self, edges: Tensor, rank: int, world_size: int, n_rows: int = 0, n_bins: int = 0):
        """`edges`: (N + 1,) float64 cluster edges on the training device. `n_rows`: the global
        batch size, where the loss of each row is wanted, and in which of `n_bins` equal parts of
        the noise axis it is."""
        n_clusters = len(edges) - 1
        self._rank = rank
        self._inner_edges = edges[1:-1]
        self._clusters = torch.arange(n_clusters, device=edges.device)
        self.n_rows = n_rows
        self._n_bins = n_bins

        # In float64 it hardly matters in which order ranks and micro steps are added.
        zeros = partial(torch.zeros, dtype=torch.float64, device=edges.device)
        self._sums = zeros(4)  # loss, mse, vb, count
        self._per_cluster = zeros(3, n_clusters)  # loss, count, losses that are not finite
        self._flags = zeros(2)  # stop, writing
        self._by_rank = zeros(len(_BY_RANK), world_size)
        self._by_row = zeros(2, n_rows)  # bin, loss

    @torch.no_grad()
    def add(self, losses: OptimisedLosses, u: Tensor, importance: Tensor, rows: Tensor) -> None:
        """Add a micro step. (B,) each: losses, noise levels in float64, the factor by which
        resampling has multiplied the loss, and the rows' numbers in the global batch."""
        # Every mean counts a row `importance` times, so that resampling changes none. `loss` has
        # that factor already.
        loss, mse, vb, factor = torch.stack([*losses, importance]).double()
        each = torch.stack([loss, factor * mse, factor * vb, torch.ones_like(loss)])  # (4, B)
        self._sums += each.sum(1)

        # member[c, i] is 1 where row i belongs to cluster c: sums by cluster without a loop.
        cluster = torch.bucketize(u, self._inner_edges, right=True)
        member = (cluster[None] == self._clusters[:, None]).double()  # (N, B)
        bad = ~torch.isfinite(loss)
        unweighted = factor * (mse + vb)
        self._per_cluster += torch.stack(
            [(member * unweighted).sum(1), (member * factor).sum(1), (member * bad).sum(1)]
        )
        self._by_rank[_BY_RANK.index("non_finite"), self._rank] += bad.any()

        # The loss of a row is reported without the factor, as the papers' codes resample by.
        if self._n_bins:
            bins = (u * self._n_bins).floor().clamp(max=self._n_bins - 1)
            self._by_row[:, rows] = torch.stack([bins, loss / factor])

    def vector(self, status: RankStatus, *, cannot_read: bool = False) -> Tensor:
        """The vector that is summed over ranks: flat, float64."""
        self._flags[0] += status.stop
        self._flags[1] += status.writing
        mine = self._by_rank[:, self._rank]
        mine[_BY_RANK.index("cannot_write")] += status.cannot_write
        mine[_BY_RANK.index("cannot_read")] += cannot_read
        mine[_BY_RANK.index("loss")] += self._sums[0] / self._sums[3]
        # `read_report` takes them apart in this order.
        parts = (self._sums, self._per_cluster, self._flags, self._by_rank, self._by_row)
        return torch.cat(list(map(torch.flatten, parts)))


def read_report(values: list[float], n_clusters: int, n_rows: int = 0) -> StepReport:
    """The summed vector, by name. `n_rows`: as in `StepAccumulator`."""
    rest = iter(values)

    def take(n: int) -> list[float]:
        return list(itertools.islice(rest, n))

    # In the order of `StepAccumulator.vector`.
    world_size = (len(values) - 4 - 3 * n_clusters - 2 - 2 * n_rows) // len(_BY_RANK)
    loss, mse, vb, count = take(4)
    cluster_loss = take(n_clusters)
    cluster_count = take(n_clusters)
    cluster_bad = take(n_clusters)
    stop, writing = take(2)
    by_rank = {name: take(world_size) for name in _BY_RANK}
    row_bin = take(n_rows)
    row_loss = take(n_rows)

    return StepReport(
        loss=loss / count,
        mse=mse / count,
        vb=vb / count,
        cluster_loss=cluster_loss,
        cluster_count=cluster_count,
        rank_loss=by_rank["loss"],
        stop=stop > 0,
        writing=writing > 0,
        non_finite=_positive(by_rank["non_finite"]),
        non_finite_clusters=_positive(cluster_bad, first=1),
        cannot_write=_positive(by_rank["cannot_write"]),
        cannot_read=_positive(by_rank["cannot_read"]),
        row_bin=row_bin,
        row_loss=row_loss,
    )


def _positive(values: list[float], first: int = 0) -> list[int]:
    """The numbers of the positive values, counted from `first`."""
    return [number for number, value in enumerate(values, first) if value > 0]
