"""The numbers that judge samples by their features: Frechet distance, KID, class score, CLIP score.

Features (N, D) come from whoever asks: which network made them decides what a number is comparable
with. Precision and Recall are in neighbours.py.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from eval.scoring.moments import Array, GroupedMoments, check_features, check_width
from largescale.errors import ConfigError, DataError

SEED = 2020  # torch-fidelity's, so that the draws are its draws
COMPARABLE = 50_000  # the number of samples that papers report


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float
    """Of `value`, were the samples drawn anew."""


@dataclass(frozen=True)
class Spread:
    mean: float
    std: float
    """Between the parts, ddof 0 as in torch-fidelity: not a standard error of `mean`."""


@dataclass(frozen=True)
class FrechetEstimate(Estimate):
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
        if values[0] < -1e-5 * values[-1].abs():  # a file in float32 has some 1e-7
            raise DataError(
                f"the covariance has the eigenvalue {values[0]:.3g}; give one of features, in "
                "float64"
            )
        self._root = vectors * values.clamp(min=0).sqrt()  # root root^T = cov

    def distance(self, mean: Array, cov: Array) -> float:
        """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (arXiv:1706.08500, eq. 6). Raises DataError.

        S1 S2 has the eigenvalues of root^T S2 root, which is symmetric: real numbers, also where S1
        is singular."""
        mean, cov = _check_gaussian(torch.as_tensor(mean), torch.as_tensor(cov))
        mean, cov = mean.to(self.mean), cov.to(self.cov)
        check_width(len(mean), len(self.mean))
        eigenvalues = torch.linalg.eigvalsh(self._root.T @ cov @ self._root)
        product = 2 * eigenvalues.clamp(min=0).sqrt().sum()  # below 0 is rounding
        squared = (mean - self.mean).square().sum() + self.cov.trace() + cov.trace() - product
        return max(squared.item(), 0.0)


def _check_gaussian(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    mean, cov = mean.double(), cov.double()
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
    """Between two Gaussians, with means (D,) and covariances (D, D); squared, as FID is. Raises
    DataError."""
    return FrechetReference(mean1, cov1).distance(mean2, cov2)


def frechet_jackknife(reference: FrechetReference, samples: GroupedMoments) -> FrechetEstimate:
    """The distance of all samples, with the error that deleting one of the G groups at a time shows
    (Efron and Stein, 1981). The reference counts as known. Costs G + 1 distances. Raises
    DataError."""
    counts = [group.count for group in samples.groups]
    if max(counts) - min(counts) > 1 or not min(counts):
        raise DataError(
            f"groups of {min(counts)} to {max(counts)} samples; number {len(counts)} samples or "
            "more 0, 1, 2 ... without gaps, and merge all ranks"
        )
    total, n = samples.total(), len(counts)
    value = reference.distance(total.mean, total.cov)
    without = (samples.without(i) for i in range(n))  # one at a time: each is (D, D)
    left = np.array([reference.distance(moments.mean, moments.cov) for moments in without])
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
    samples, reference = (
        check_features(samples, "samples"),
        check_features(reference, "reference features"),
    )
    check_width(samples.shape[1], reference.shape[1])
    if subsets < 1 or subset_size < 2:
        raise ConfigError(
            f"subsets={subsets} of subset_size={subset_size}; give 1 or more of 2 or more"
        )
    if subset_size > (fewest := min(len(samples), len(reference))):
        raise ConfigError(
            f"subset_size={subset_size} of {len(samples)} samples and {len(reference)} reference "
            f"ones; try subset_size={fewest}, and compare only with the same, or make more samples"
        )
    draw = np.random.RandomState(seed)
    drawn = []
    for _ in range(subsets):
        x, y = (
            features[
                torch.from_numpy(draw.choice(len(features), subset_size, replace=False)).to(
                    features.device
                )
            ]
            for features in (samples, reference)
        )  # draws of the samples come first
        drawn.append(_mmd2(x.double(), y.double()))
    return Spread(float(np.mean(drawn)), float(np.std(drawn)))


def _mmd2(x: Tensor, y: Tensor) -> float:
    """Of (m, D) and (m, D): the estimator of lemma 6 of Gretton et al. (2012)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m = len(x)
    within = sum(
        (k.sum() - k.trace()).item() for k in (kernel(x, x), kernel(y, y))
    )  # no sample paired with itself
    return within / (m * (m - 1)) - 2 * kernel(x, y).mean().item()


def class_score(
    outputs: Tensor, splits: int = 10, seed: int | None = SEED, probabilities: bool = False
) -> Spread:
    """exp(E KL(p(y|x) || p(y))) (arXiv:1606.03498) of a classifier's logits, or probabilities, (N,
    classes): the Inception score if Inception gave them. Over splits of the samples, shuffled as
    torch-fidelity shuffles them, or in order with seed None, which for 10 splits of 50,000 is
    ADM's. Raises ConfigError, DataError."""
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
    if seed is not None:
        outputs = outputs[
            torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(outputs.device)
        ]
    edges = [i * n // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(edges):
        part = outputs[start:end].double()
        p = part if probabilities else part.softmax(1)
        marginal = p.mean(0)
        scores.append(
            math.exp(
                torch.special.xlogy(p, p).sum(1).mean()
                - torch.special.xlogy(marginal, marginal).sum()
            )
        )
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def clip_score(image_features: Tensor, text_features: Tensor) -> Estimate:
    """Mean of 100 max(cos, 0) over pairs of features (N, D) (arXiv:2104.08718, with w = 100).
    Raises DataError."""
    images = check_features(image_features, "image features", at_least=2).double()
    texts = check_features(text_features, "text features").to(images)
    if images.shape != texts.shape:
        raise DataError(
            f"image features {tuple(images.shape)} and text features {tuple(texts.shape)}; give one "
            "text for each image, by the same CLIP model"
        )
    lengths = images.norm(dim=1) * texts.norm(dim=1)
    if not lengths.all():
        raise DataError(
            f"the features of pair {int((lengths == 0).nonzero()[0])} have length 0; look at that "
            "image and its text"
        )
    scores = 100 * ((images * texts).sum(1) / lengths).clamp(min=0)
    return Estimate(scores.mean().item(), scores.std().item() / math.sqrt(len(scores)))


def bias_note(n: int, d: int) -> str | None:
    """What a reader must know of a Frechet distance of n samples with d features; None from 50,000
    on."""
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
