"""Improved Precision and Recall (Kynkaanniemi et al., arXiv:1904.06991), decided exactly.

A distance by matrix product is fast and rounds; the direct sum((a - b)^2) is slow. So the product,
in float64, says what is clear beyond a bound of its rounding, and the direct sum decides the rest.
The result is that of the direct sum alone, on every device and for every chunk size. ADM's
evaluator takes these distances in float16, and differs a little.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.scoring.metrics import Estimate
from eval.scoring.moments import check_features, check_width
from largescale.errors import ConfigError, DataError

CHUNK = 2**24  # numbers held at once: 128 MiB


@dataclass(frozen=True)
class PrecisionRecall:
    precision: Estimate
    """The share of samples in a ball of the reference. Its error counts the balls as known
    (binomial)."""
    recall: Estimate
    """The share of the reference in a ball of the samples."""


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """(P,) of rows (P, D) and (P, D) float64, added in pairs: one fixed order, whatever the device
    and P."""
    squares = (a - b).square()
    while (width := squares.shape[1]) > 1:
        if width % 2:
            squares = F.pad(squares, (0, 1))
        squares = squares[:, 0::2] + squares[:, 1::2]
    return squares[:, 0]


class Points:
    """The distinct rows of features (N, D), in float64: rows (U, D), how often each comes, and
    where each sample is.

    Copies would all lie within rounding of each other; kept once, they cost nothing."""

    def __init__(self, features: Tensor, name: str) -> None:
        features = check_features(features, name).double()
        self.rows, self.place, self.copies = torch.unique(
            features, dim=0, return_inverse=True, return_counts=True
        )
        self.norms = self.rows.square().sum(1)  # (U,) |a|^2
        if not (8 * self.norms).isfinite().all():  # no distance overflows either
            raise DataError(
                f"{name} reach {self.rows.abs().max().item():.3g}, too much to square; scale them "
                "down"
            )


def _relative_error(dim: int) -> float:
    """e: a squared distance by norms and product and one by the direct sum differ by at most e
    (|a|^2 + |b|^2).

    A sum of n rounded terms is off by n u (1 + O(u)) of the sum of their sizes, u = 2^-53 (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1): 4 (D + 3) u in all. Twice that covers the
    rounding of the comparisons."""
    return 8 * (dim + 4) * 2.0**-53


def _lower_bounds(a: Tensor, points: Points, lowered: Tensor) -> Tensor:
    """(R, U): for rows a (R, D), `lowered` (U,) - 2 a.b; the norms of a are left to whoever
    compares."""
    return torch.addmm(lowered, a, points.rows.T, alpha=-2)


def _pairwise(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """The direct squared distances (P,) of rows i of a and j of b, both (P,)."""
    size = max(CHUNK // (8 * a.shape[1]), 1)  # some 8 such are alive at once
    parts = [
        squared_distance(a[i[s : s + size]], b[j[s : s + size]]) for s in range(0, len(i), size)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0)


def _kth(row: Tensor, distance: Tensor, copies: Tensor, wanted: Tensor) -> Tensor:
    """(R,): for each row, going from near to far, the distance at which `wanted` (R,) neighbours
    are reached.

    Neighbours are (P,), each in the row that `row` names, `copies` of it."""
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by distance
    row, distance, copies = row[order], distance[order], copies[order]
    counts = row.bincount(minlength=len(wanted))
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    distances = distance.new_full((len(wanted), int(counts.max())), torch.inf)
    reached = torch.zeros_like(distances, dtype=torch.int64)
    distances[row, rank], reached[row, rank] = distance, copies
    first = (reached.cumsum(1) >= wanted[:, None]).int().argmax(1)
    return distances.gather(1, first[:, None])[:, 0]


class Balls:
    """Around each sample the ball that reaches its k-th neighbour, among features (N, D).

    Raises ConfigError, DataError."""

    def __init__(self, features: Tensor, k: int = 3, name: str = "features") -> None:
        self.points = Points(features, name)
        if not 1 <= k < len(features):
            raise ConfigError(
                f"k={k} neighbours of each of {len(features)} samples; "
                + (f"give {k + 1} samples or more" if k >= 1 else "give k=1 or more")
            )
        self.k = k
        size = max(CHUNK // len(self.points.rows), 1)
        starts = range(0, len(self.points.rows), size)
        self._squared = torch.cat([self._squared_radii(slice(s, s + size)) for s in starts])  # (U,)

    @property
    def squared_radii(self) -> Tensor:
        """(N,) float64."""
        return self._squared[self.points.place]

    def _squared_radii(self, part: slice) -> Tensor:
        points, e = self.points, _relative_error(self.points.rows.shape[1])
        if len(points.rows) == 1:
            return torch.zeros_like(points.norms)
        rows = points.rows[part]
        own = torch.arange(len(rows), device=rows.device)
        lower = _lower_bounds(rows, points, points.norms * (1 - e))
        lower[own, own + part.start] = torch.inf  # itself
        # The k-th smallest upper bound is no less than the k-th distance, so what may be nearer
        # lies below it.
        reach = min(self.k, len(points.rows) - 1)
        near = lower.topk(reach, largest=False).indices
        upper = (lower.gather(1, near) + 2 * e * points.norms[near]).amax(1) + 2 * e * points.norms[
            part
        ]
        row, column = (lower <= upper[:, None]).nonzero(as_tuple=True)
        distance = _pairwise(rows, row, points.rows, column)
        missing = self.k + 1 - points.copies[part]  # a copy is a neighbour at 0
        found = _kth(row, distance, points.copies[column], missing)
        return torch.where(missing > 0, found, torch.zeros_like(found))

    def contain(self, points: Points) -> Tensor:
        """(N,) bool: whether each sample lies in any of the balls, their edge included. Raises
        DataError."""
        check_width(points.rows.shape[1], self.points.rows.shape[1])
        size = max(CHUNK // len(self.points.rows), 1)
        starts = range(0, len(points.rows), size)
        return torch.cat([self._contain(points, slice(s, s + size)) for s in starts])[points.place]

    def _contain(self, points: Points, part: slice) -> Tensor:
        e = _relative_error(points.rows.shape[1])
        rows, norms = points.rows[part], points.norms[part]
        # Of distance^2 - radius^2, less the norm of the row. A large radius takes its share of
        # digits.
        lower = _lower_bounds(
            rows, self.points, self.points.norms * (1 - e) - self._squared * (1 + e)
        )
        limit = -norms * (1 - e)
        least = lower.min(1)
        best = torch.arange(len(rows), device=rows.device)
        inside = (
            _pairwise(rows, best, self.points.rows, least.indices) <= self._squared[least.indices]
        )
        # Nearly all are clear by now: in the ball that is deepest around them, or farther than
        # rounding from all.
        open_rows = (~inside & (least.values <= limit)).nonzero()[:, 0]
        row, column = (lower[open_rows] <= limit[open_rows, None]).nonzero(as_tuple=True)
        row = open_rows[row]
        hit = _pairwise(rows, row, self.points.rows, column) <= self._squared[column]
        inside[row[hit]] = True
        return inside


def precision_recall(
    samples: Tensor | Balls, reference: Tensor | Balls, k: int = 3
) -> PrecisionRecall:
    """Of the samples' features (N, D) and the reference's (M, D), or of their Balls, which can be
    kept.

    Raises ConfigError, DataError."""
    of_samples = samples if isinstance(samples, Balls) else Balls(samples, k, "samples")
    of_reference = (
        reference if isinstance(reference, Balls) else Balls(reference, k, "reference features")
    )
    if not of_samples.k == of_reference.k == k:
        raise ConfigError(f"k={k} for balls of k={of_samples.k} and k={of_reference.k}; use one k")
    return PrecisionRecall(
        precision=_share(of_reference.contain(of_samples.points)),
        recall=_share(of_samples.contain(of_reference.points)),
    )


def _share(inside: Tensor) -> Estimate:
    share = inside.double().mean().item()
    return Estimate(share, math.sqrt(share * (1 - share) / len(inside)))
