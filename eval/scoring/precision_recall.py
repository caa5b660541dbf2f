"""Improved Precision and Recall (Kynkaanniemi et al., arXiv:1904.06991), decided exactly.

A distance by matrix product is fast and rounds; the direct sum((a - b)^2) is slow. So the product,
in float64, decides what is clear beyond a bound of its rounding, and the direct sum the rest.
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

# Numbers that are held at once: 128 MiB.
CHUNK = 2**24


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved Precision and Recall, each with its standard error."""

    precision: Estimate
    """The share of samples in a ball of the reference. Its error counts the balls as known
    (binomial)."""
    recall: Estimate
    """The share of the reference in a ball of the samples."""


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (P,) of rows (P, D) and (P, D) float64, added in pairs: one fixed order,
    whatever the device and P."""
    squares = (a - b).square()
    while (width := squares.shape[1]) > 1:
        if width % 2:
            squares = F.pad(squares, (0, 1))
        squares = squares[:, 0::2] + squares[:, 1::2]
    return squares[:, 0]


class Points:
    """The distinct rows of features (N, D), in float64: rows (U, D), how often each occurs, and
    where each sample is.

    Copies would all lie within rounding of each other; kept once, they cost nothing."""

    def __init__(self, features: Tensor, name: str) -> None:
        features = check_features(features, name).double()
        self.rows, self.place, self.copies = torch.unique(
            features, dim=0, return_inverse=True, return_counts=True
        )
        # (U,), |a|^2; with a factor of 8 no distance overflows either.
        self.norms = self.rows.square().sum(1)
        if not (8 * self.norms).isfinite().all():
            raise DataError(
                f"{name} reach {self.rows.abs().max().item():.3g}, too much to square; scale them "
                "down"
            )


def _relative_error(dim: int) -> float:
    """The bound e of rounding: a squared distance by norms and product and one by the direct sum
    differ by at most e (|a|^2 + |b|^2).

    A sum of n rounded terms is off by n u (1 + O(u)) of the sum of their sizes, u = 2^-53 (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1): 4 (D + 3) u in all. Twice that covers the
    rounding of the comparisons."""
    return 8 * (dim + 4) * 2.0**-53


def _lower_bounds(a: Tensor, points: Points, lowered: Tensor) -> Tensor:
    """Lower bounds (R, U) of squared distances, less the norms of a: for rows a (R, D) and
    `lowered` (U,) they are lowered - 2 a.b."""
    return torch.addmm(lowered, a, points.rows.T, alpha=-2)


def _pairwise(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """The direct squared distances (P,) of rows i of a and j of b, both (P,)."""
    # Some 8 tensors of this size are alive at once.
    size = max(CHUNK // (8 * a.shape[1]), 1)
    parts = []
    for rows, columns in zip(i.split(size), j.split(size), strict=True):
        parts.append(squared_distance(a[rows], b[columns]))
    return torch.cat(parts)


def _kth(row: Tensor, distance: Tensor, copies: Tensor, wanted: Tensor) -> Tensor:
    """The distance of each row, (R,), at which `wanted` (R,) neighbours are reached, from near to
    far.

    Neighbours are (P,), each in the row that `row` names, `copies` of it."""
    # By row, then by distance.
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    distance = distance[order]
    copies = copies[order]

    # A table with a line for each row, filled from near to far; the rest is at infinity.
    counts = row.bincount(minlength=len(wanted))
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    distances = distance.new_full((len(wanted), int(counts.max())), torch.inf)
    reached = torch.zeros_like(distances, dtype=torch.int64)
    distances[row, rank] = distance
    reached[row, rank] = copies
    first = (reached.cumsum(1) >= wanted[:, None]).int().argmax(1)
    return distances.gather(1, first[:, None])[:, 0]


class Balls:
    """Around each sample the ball that reaches its k-th neighbour, among features (N, D)."""

    def __init__(self, features: Tensor, k: int = 3, name: str = "features") -> None:
        """Raises ConfigError, DataError."""
        self.points = Points(features, name)
        if not 1 <= k < len(features):
            remedy = f"give {k + 1} samples or more" if k >= 1 else "give k=1 or more"
            raise ConfigError(f"k={k} neighbours of each of {len(features)} samples; {remedy}")
        self.k = k
        # (U,), of the distinct rows.
        parts = map(self._squared_radii, self._parts(len(self.points.rows)))
        self._squared = torch.cat(list(parts))

    def _parts(self, n: int) -> list[slice]:
        """n rows in parts, so that their distances to all of ours fit into memory."""
        size = max(CHUNK // len(self.points.rows), 1)
        return [slice(start, start + size) for start in range(0, n, size)]

    @property
    def squared_radii(self) -> Tensor:
        """The squared radius of each sample's ball, (N,) float64."""
        return self._squared[self.points.place]

    def _squared_radii(self, part: slice) -> Tensor:
        """The squared radii of some of the distinct rows."""
        points = self.points
        e = _relative_error(points.rows.shape[1])
        # All samples are copies of one.
        if len(points.rows) == 1:
            return torch.zeros_like(points.norms)
        rows = points.rows[part]
        own = torch.arange(len(rows), device=rows.device)
        lower = _lower_bounds(rows, points, points.norms * (1 - e))
        # No point is its own neighbour.
        lower[own, own + part.start] = torch.inf
        # The k-th smallest upper bound is no less than the k-th distance, so what may be nearer
        # lies below it.
        reach = min(self.k, len(points.rows) - 1)
        near = lower.topk(reach, largest=False).indices
        upper = (lower.gather(1, near) + 2 * e * points.norms[near]).amax(1)
        upper = upper + 2 * e * points.norms[part]
        row, column = (lower <= upper[:, None]).nonzero(as_tuple=True)
        distance = _pairwise(rows, row, points.rows, column)

        # A copy is a neighbour at distance 0.
        missing = self.k + 1 - points.copies[part]
        found = _kth(row, distance, points.copies[column], missing)
        return torch.where(missing > 0, found, torch.zeros_like(found))

    def contain(self, points: Points) -> Tensor:
        """Whether each sample lies in any of the balls, their edge included: (N,) bool. Raises
        DataError."""
        check_width(points.rows.shape[1], self.points.rows.shape[1])
        parts = [self._contain(points, part) for part in self._parts(len(points.rows))]
        return torch.cat(parts)[points.place]

    def _contain(self, points: Points, part: slice) -> Tensor:
        """Whether each of some distinct rows lies in any of the balls."""
        e = _relative_error(points.rows.shape[1])
        rows = points.rows[part]
        norms = points.norms[part]
        # Bounds of distance^2 - radius^2, less the norm of the row. A large radius takes its share
        # of digits.
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
    """Precision and Recall of the samples' features (N, D) against the reference's (M, D). Either
    may be given as Balls, which can be kept.

    Raises ConfigError, DataError."""
    of_samples = samples if isinstance(samples, Balls) else Balls(samples, k, "samples")
    of_reference = reference
    if not isinstance(of_reference, Balls):
        of_reference = Balls(of_reference, k, "reference features")
    if not of_samples.k == of_reference.k == k:
        raise ConfigError(f"k={k} for balls of k={of_samples.k} and k={of_reference.k}; use one k")
    return PrecisionRecall(
        precision=_share(of_reference.contain(of_samples.points)),
        recall=_share(of_samples.contain(of_reference.points)),
    )


def _share(inside: Tensor) -> Estimate:
    """The share of samples that are inside, with its binomial error."""
    share = inside.double().mean().item()
    return Estimate(share, math.sqrt(share * (1 - share) / len(inside)))
