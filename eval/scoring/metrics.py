"""The numbers that judge samples by their features: Frechet distance, KID, class score, CLIP score.

Features (N, D) are the caller's: which network made them decides what a number is comparable with.
Precision and Recall are in precision_recall.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.scoring.moments import Array, GroupedMoments, check_features, check_width
from largescale.errors import ConfigError, DataError

# torch-fidelity's, so that the draws are its draws.
SEED = 2020
# The number of samples that papers report.
COMPARABLE = 50_000


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error."""

    value: float
    standard_error: float
    """The deviation of `value`, were the samples drawn again."""


@dataclass(frozen=True)
class Spread:
    """A number that is the mean of parts."""

    mean: float
    std: float
    """The deviation between the parts, ddof 0 as in torch-fidelity: not a standard error of
    `mean`."""


@dataclass(frozen=True)
class FrechetEstimate(Estimate):
    """A Frechet distance with its standard error and its bias."""

    extrapolated: float
    """`value` less its bias of order 1 / N (the jackknife's estimate of it); noisier, and not what
    papers report."""
    singular: bool
    """Whether there are too few samples for a covariance of full rank."""


class FrechetReference:
    """A Gaussian to measure from; keeps the root of its covariance, the costliest part of a
    distance.

    Mean (D,) and cov (D, D) on any device, there in float64. Raises DataError."""

    def __init__(self, mean: Array, cov: Array) -> None:
        self.mean, self.cov = _check_gaussian(torch.as_tensor(mean), torch.as_tensor(cov))
        values, vectors = torch.linalg.eigh(self.cov)
        # Rounding to float32 makes eigenvalues of some -1e-7.
        if values[0] < -1e-5 * values[-1].abs():
            raise DataError(
                f"the covariance has the eigenvalue {values[0]:.3g}; give one of features, in "
                "float64"
            )
        # root root^T = cov. Only the columns of its numerical rank (as numpy.linalg.matrix_rank has
        # it): the others are rounding, and with fewer images than features most of the work.
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        kept = values > rounding
        self._root = vectors[:, kept] * values[kept].sqrt()

    def distance(self, mean: Array, cov: Array) -> float:
        """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (arXiv:1706.08500, eq. 6). Raises DataError.

        S1 S2 has the eigenvalues of root^T S2 root, which is symmetric: real numbers, also where S1
        is singular."""
        mean, cov = _check_gaussian(torch.as_tensor(mean), torch.as_tensor(cov))
        mean, cov = mean.to(self.mean), cov.to(self.cov)
        check_width(len(mean), len(self.mean))

        # Eigenvalues below 0 are rounding.
        eigenvalues = torch.linalg.eigvalsh(self._root.T @ cov @ self._root)
        product = 2 * eigenvalues.clamp(min=0).sqrt().sum()
        squared = (mean - self.mean).square().sum() + self.cov.trace() + cov.trace() - product
        return max(squared.item(), 0.0)


def _check_gaussian(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64. Raises DataError unless they are a mean and a covariance."""
    mean = mean.double()
    cov = cov.double()
    # Shapes first: what follows would broadcast.
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise DataError(
            f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)}; give (D,) and (D, D)"
        )
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise DataError(
            "a mean or covariance has values that are not finite; compute them again, from finite "
            "features"
        )
    if (off := (cov - cov.T).abs().max()) > 1e-6 * cov.abs().max():
        raise DataError(
            f"the covariance differs from its transpose by {off.item():.3g}; give that of features"
        )
    return mean, cov


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """The Frechet distance between two Gaussians, with means (D,) and covariances (D, D); squared,
    as FID is. Raises DataError."""
    return FrechetReference(mean1, cov1).distance(mean2, cov2)


def frechet_jackknife(reference: FrechetReference, samples: GroupedMoments) -> FrechetEstimate:
    """The distance of all samples, with its jackknife error: what deleting one of the G groups at a
    time changes (Efron and Stein, 1981). The reference counts as known. Costs G + 1 distances.
    Raises DataError."""
    # Groups of equal size, give or take one, or their means would not be comparable.
    counts = [group.count for group in samples.groups]
    if max(counts) - min(counts) > 1 or not min(counts):
        raise DataError(
            f"groups of {min(counts)} to {max(counts)} samples; number {len(counts)} samples or "
            "more 0, 1, 2 ... without gaps, and merge all ranks"
        )
    total = samples.total()
    n = len(counts)
    value = reference.distance(total.mean, total.cov)

    # One at a time, as each has a covariance (D, D).
    distances = []
    for i in range(n):
        moments = samples.without(i)
        distances.append(reference.distance(moments.mean, moments.cov))
    left = np.array(distances)
    error = math.sqrt((n - 1) / n * float(np.square(left - left.mean()).sum()))
    return FrechetEstimate(value, error, n * value - (n - 1) * float(left.mean()), total.singular)


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = SEED,
) -> Spread:
    """KID (arXiv:1801.01401): unbiased MMD^2 between features (N, D) and (M, D) with the kernel
    (x.y / D + 1)^3, over random subsets, drawn as torch-fidelity draws them. Around 0, also below,
    for equal distributions.

    Raises ConfigError, DataError."""
    samples = check_features(samples, "samples")
    reference = check_features(reference, "reference features")
    check_width(samples.shape[1], reference.shape[1])
    # The estimator divides by m (m - 1).
    if subsets < 1 or subset_size < 2:
        raise ConfigError(
            f"subsets={subsets} of subset_size={subset_size}; give 1 or more of 2 or more"
        )
    if subset_size > (fewest := min(len(samples), len(reference))):
        raise ConfigError(
            f"subset_size={subset_size} of {len(samples)} samples and {len(reference)} reference "
            f"ones; try subset_size={fewest}, and compare only with the same, or make more samples"
        )

    # The samples are drawn before the reference, each time, as torch-fidelity does.
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = _random_rows(samples, subset_size, draw).double()
        y = _random_rows(reference, subset_size, draw).double()
        values.append(_mmd2(x, y))
    return Spread(float(np.mean(values)), float(np.std(values)))


def _random_rows(features: Tensor, n: int, draw: np.random.RandomState) -> Tensor:
    """n different rows of `features`."""
    chosen = torch.from_numpy(draw.choice(len(features), n, replace=False))
    return features[chosen.to(features.device)]


def _mmd2(x: Tensor, y: Tensor) -> float:
    """MMD^2 between samples (m, D) and (m, D): the estimator of lemma 6 of Gretton et al. (2012)."""
    m = len(x)
    # Without the diagonal: no sample is paired with itself.
    of_x = _kid_kernel(x, x)
    of_y = _kid_kernel(y, y)
    within = (of_x.sum() - of_x.trace()).item() + (of_y.sum() - of_y.trace()).item()
    return within / (m * (m - 1)) - 2 * _kid_kernel(x, y).mean().item()


def _kid_kernel(a: Tensor, b: Tensor) -> Tensor:
    """KID's polynomial kernel between all rows, (len(a), len(b))."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def class_score(
    outputs: Tensor, splits: int = 10, seed: int | None = SEED, probabilities: bool = False
) -> Spread:
    """The Inception Score exp(E KL(p(y|x) || p(y))) (arXiv:1606.03498), if Inception gave the
    logits, or probabilities, (N, classes); of another classifier a score of its own.

    Over splits of the samples, shuffled as torch-fidelity shuffles them, or in order with seed
    None, which for 10 splits of 50,000 is ADM's. Raises ConfigError, DataError."""
    outputs = check_features(outputs, "the classifier's outputs")
    n = len(outputs)
    if not 1 <= splits <= n:
        raise ConfigError(f"splits={splits} of {n} samples; try splits=1, or make more samples")
    if probabilities and (
        (off := (outputs.double().sum(1) - 1).abs().max()) > 1e-3 or outputs.min() < 0
    ):
        raise DataError(
            f"probabilities from {outputs.min().item():.3g} up whose sums miss 1 by "
            f"{off.item():.3g}; give those of a softmax, or logits with probabilities=False"
        )

    # Samples are often sorted by class, so that a split in order would have few of them.
    if seed is not None:
        order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
        outputs = outputs[order.to(outputs.device)]
    scores = []
    for i in range(splits):
        part = outputs[i * n // splits : (i + 1) * n // splits].double()
        p = part if probabilities else part.softmax(1)
        # KL as negative entropies, of each sample and of the marginal; 0 ln 0 is 0.
        marginal = p.mean(0)
        of_samples = torch.special.xlogy(p, p).sum(1).mean()
        of_marginal = torch.special.xlogy(marginal, marginal).sum()
        scores.append(math.exp(of_samples - of_marginal))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def clip_score(image_features: Tensor, text_features: Tensor) -> Estimate:
    """The CLIP score: the mean of 100 max(cos, 0) over pairs of features (N, D) (arXiv:2104.08718,
    with w = 100). Raises DataError."""
    images = check_features(image_features, "image features", at_least=2).double()
    texts = check_features(text_features, "text features").to(images)
    if images.shape != texts.shape:
        raise DataError(
            f"image features {tuple(images.shape)} and text features {tuple(texts.shape)}; give one "
            "text for each image, by the same CLIP model"
        )
    # A vector of length 0 has no angle.
    lengths = images.norm(dim=1) * texts.norm(dim=1)
    if not lengths.all():
        raise DataError(
            f"the features of pair {int((lengths == 0).nonzero()[0])} have length 0; look at that "
            "image and its text"
        )
    scores = 100 * ((images * texts).sum(1) / lengths).clamp(min=0)
    return Estimate(scores.mean().item(), scores.std().item() / math.sqrt(len(scores)))


def bias_note(n: int, d: int) -> str | None:
    """A note on the bias of a Frechet distance of n samples with d features; None from 50,000
    on."""
    # Fewer samples than features: the covariance cannot have full rank.
    if n <= d:
        return (
            f"{n:,} samples of {d:,} features: the covariance is singular and the distance biased "
            "upwards; compare only with the same number"
        )
    if n < COMPARABLE:
        return (
            f"{n:,} samples: the fewer there are, the more a Frechet distance is biased upwards; "
            f"compare only with the same number, not with {COMPARABLE:,}"
        )
    return None
