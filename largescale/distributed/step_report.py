"""The one small vector a step that ranks sum, so that each takes the same decision from the same numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.diffusion.objective import Losses


@dataclass(frozen=True)
class Report:
    """What all ranks know of a step: means over the global batch, sums per noise cluster (C_1 first), unweighted."""

    loss: float
    mse: float
    vb: float
    cluster_loss: list[float]   # sums; a cluster's mean is its sum over its count
    cluster_count: list[float]
    rank_loss: list[float]      # means, in rank order
    stop: bool                  # a rank was asked to stop
    writing: bool               # a rank still writes a checkpoint
    non_finite: list[int]       # ranks that saw a loss that is not finite ...
    non_finite_clusters: list[int]  # ... and the clusters it was in: 1 for C_1
    cannot_write: list[int]     # ranks whose part of a checkpoint has failed
    cannot_read: list[int]      # ranks that got no data
    row_bin: list[float]        # of each row of the global batch, where asked for: in which part of the noise axis ...
    row_loss: list[float]       # ... and its loss


# Of one rank each, where a sum would say only how many.
_OF_RANKS = ("non_finite", "cannot_write", "cannot_read", "loss")


class Tally:
    """Gathers one rank's share of a step over its micro steps, on the device and without waiting for it."""

    def __init__(self, edges: Tensor, rank: int, world_size: int, rows: int = 0, n_bins: int = 0):
        """`edges`: (N + 1,) float64 cluster edges on the training device. `rows`: the global batch size, where the loss
        of each row is wanted, and in which of `n_bins` equal parts of the noise axis it is."""
        n = len(edges) - 1
        self._inner, self._clusters, self._rank = edges[1:-1], torch.arange(n, device=edges.device), rank
        self._n_bins = n_bins
        self._sums, self._per_cluster, self._flags, self._of_ranks, self._of_rows = (
            torch.zeros(size, dtype=torch.float64, device=edges.device) for size in (
                (4,),                          # loss, mse, vb, count
                (3, n),                        # loss, count, losses that are not finite
                (2,),                          # stop, writing
                (len(_OF_RANKS), world_size),
                (2, rows),                     # bin, loss
            )
        )

    @torch.no_grad()
    def add(self, losses: Losses, u: Tensor, importance: Tensor, rows: Tensor) -> None:
        """(B,) each: losses, noise levels in float64, the factor with which resampling has multiplied the loss, and the
        rows' numbers in the global batch. Every mean counts a row `importance` times, so that resampling changes none;
        the loss of a row is told without it, as the papers' codes resample by."""
        loss, mse, vb, factor = torch.stack([*losses, importance]).double()
        each = torch.stack([loss, factor * mse, factor * vb, torch.ones_like(loss)])                     # (4, B)
        self._sums += each.sum(1)
        cluster = torch.bucketize(u, self._inner, right=True)
        member = (cluster[None] == self._clusters[:, None]).double()                                     # (N, B)
        bad, unweighted = ~torch.isfinite(loss), factor * (mse + vb)
        self._per_cluster += torch.stack([
            (member * unweighted).sum(1), (member * factor).sum(1), (member * bad).sum(1)])
        self._of_ranks[_OF_RANKS.index("non_finite"), self._rank] += bad.any()
        if self._n_bins:
            bins = (u * self._n_bins).floor().clamp(max=self._n_bins - 1)
            self._of_rows[:, rows] = torch.stack([bins, loss / factor])

    def vector(self, *, stop: bool, writing: bool, cannot_write: bool = False, cannot_read: bool = False) -> Tensor:
        self._flags[0] += stop
        self._flags[1] += writing
        mine = self._of_ranks[:, self._rank]
        mine[_OF_RANKS.index("cannot_write")] += cannot_write
        mine[_OF_RANKS.index("cannot_read")] += cannot_read
        mine[_OF_RANKS.index("loss")] += self._sums[0] / self._sums[3]
        parts = self._sums, self._per_cluster, self._flags, self._of_ranks, self._of_rows
        return torch.cat([part.flatten() for part in parts])


def read(values: list[float], n_clusters: int, rows: int = 0) -> Report:
    """The summed vector, by name. `rows`: as in `Tally`."""
    end = len(values) - 2 * rows
    values, of_rows = values[:end], values[end:]
    loss, mse, vb, count = values[:4]
    of_clusters, rest = values[4 : 4 + 3 * n_clusters], values[4 + 3 * n_clusters :]
    cluster_loss, cluster_count, bad = (of_clusters[i * n_clusters : (i + 1) * n_clusters] for i in range(3))
    stop, writing, *of_ranks = rest
    world_size = len(of_ranks) // len(_OF_RANKS)
    by_name = {name: of_ranks[i * world_size : (i + 1) * world_size] for i, name in enumerate(_OF_RANKS)}

    def named(name: str) -> list[int]:
        return [rank for rank, flag in enumerate(by_name[name]) if flag > 0]

    return Report(
        loss / count, mse / count, vb / count, cluster_loss, cluster_count, by_name["loss"], stop > 0, writing > 0,
        named("non_finite"), [i + 1 for i, n in enumerate(bad) if n > 0], named("cannot_write"), named("cannot_read"),
        of_rows[:rows], of_rows[rows:],
    )
