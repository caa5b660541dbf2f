"""The relative entropy between neighbouring noise levels of a data set (appendix C of
arXiv:2403.10348).

The marginal at a noise level, x_t = alpha x_start + sigma noise, is taken to be the mean of a
Gaussian kernel around each of L data points: p_t(x) = 1/L sum_l N(x; alpha x_l, sigma^2 I). D_KL(p
|| q) = E_p[ln p - ln q] is a mean over M samples, each a random data point with noise.

p and q are mixtures with the same weights, so by the chain rule D_KL(p || q) is at most the
relative entropy of one kernel, D_KL(N(alpha x_l, sigma^2 I) || N(alpha' x_l, sigma'^2 I)), in the
mean over the data. Where kernels no longer overlap it is equal to that, and explodes as sigma
falls: an artefact of there being finitely many points, which `RelativeEntropy.degenerate` marks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largescale.diffusion.objective import Objective, middle_of_bins
from largescale.errors import DataError, Stopped
from largescale.randomness import stream_seed

# The least number of data points from which a density may be estimated.
MIN_POINTS = 1000
# Below these values of `RelativeEntropy.kernels` an estimate is an artefact, or biased.
ONE_KERNEL = 2.0
FEW_KERNELS = 100.0
# Samples times data points at once: 8 MB for each array of float64.
CHUNK = 2**20
Array = npt.NDArray[np.float64]
Progress = Callable[[float], Any]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class RelativeEntropy:
    """Relative entropies in nats, (K,) float64 each, for K pairs of noise levels."""

    value: Array
    """D_KL(p || q), with one kernel's log ratio, whose mean is known, as a control variate."""
    error: Array
    """The standard error of `value`, over the M samples; the data count as given. Not independent
    between pairs, which share their draws."""
    plain: Array
    """The plain mean of ln p - ln q, as the paper has it: the same expectation, a larger error."""
    plain_error: Array
    """The standard error of `plain`."""
    kernels: Array
    """How many kernels explain a sample of p: exp of the mean entropy of their responsibilities for
    it, from 1 to L."""
    single: Array
    """One kernel's relative entropy in closed form, in the mean over the data: an upper bound of
    D_KL(p || q), also for the distribution that the data are drawn from."""

    @property
    def degenerate(self) -> npt.NDArray[np.bool_]:
        """Where hardly more than one kernel explains a sample: p is a mixture of points, `value` is
        `single` and says nothing about the data but their dimensions and mean square."""
        return self.kernels < ONE_KERNEL

    @property
    def biased(self) -> npt.NDArray[np.bool_]:
        """Where few kernels explain a sample, degenerate or not: more data would give another
        value, a smaller one as a rule. With 1,000 or 5,000 points of a Gaussian in 2, 8 or 32
        dimensions and EDM's noise, `value` was 1.04 to 2 times the truth at some 130 kernels, 1.3
        to 260 times it at some 18."""
        return self.kernels < FEW_KERNELS


def noise_levels(objective: Objective, timesteps: int) -> Array:
    """(T, 2): alpha and sigma at u = (t + 0.5) / T, t = 0 .. T - 1, the least noise first."""
    t = objective.draw(middle_of_bins(timesteps))
    return torch.stack(objective.alpha_sigma(t), dim=1).numpy()


class _Batch(NamedTuple):
    """What the pairs of noise levels share for m samples x = alpha x_l + sigma noise."""

    with_points: Tensor  # (m, L): x_l (x_j - x_l)
    with_noise: Tensor  # (m, L): noise (x_j - x_l)
    longer: Tensor  # (m, L): |x_j|^2 - |x_l|^2
    own: Tensor  # (m,): |x_l|^2
    inner: Tensor  # (m,): noise x_l
    energy: Tensor  # (m,): |noise|^2
    width: int


def _pair(b: _Batch, alpha: float, sigma: float, alpha_q: float, sigma_q: float) -> Tensor:
    """The terms of one pair of noise levels, (3, m): the log ratio of the own kernels, what the
    other kernels add to it, and the entropy of the kernels' shares."""
    # ln of each kernel over the own one, under p and under q; x . (x_j - x_l) is in both.
    along = alpha * b.with_points + sigma * b.with_noise
    under_p = alpha / sigma**2 * (along - alpha / 2 * b.longer)
    under_q = alpha_q / sigma_q**2 * (along - alpha_q / 2 * b.longer)

    # The own kernels: `off` is |x - alpha_q x_l|^2.
    apart = alpha - alpha_q
    off = apart**2 * b.own + 2 * apart * sigma * b.inner + sigma**2 * b.energy
    single = b.width * math.log(sigma_q / sigma) - b.energy / 2 + off / (2 * sigma_q**2)

    # A logsumexp whose weights the entropy needs too; `total` is 0 or more.
    most = under_p.amax(1, keepdim=True)
    weights = (under_p - most).exp_()
    sum_of = weights.sum(1)
    total = most[:, 0] + sum_of.log()
    rest = total - under_q.logsumexp(1)
    entropy = total - weights.mul_(under_p).sum(1) / sum_of
    return torch.stack([single, rest, entropy])


@torch.inference_mode()
def relative_entropy(
    data: Tensor,
    p: Array,
    q: Array,
    *,
    samples: int,
    seed: int = 0,
    chunk: int = CHUNK,
    progress: Progress = lambda share: None,
    stop: Stop = lambda: False,
) -> RelativeEntropy:
    """Estimate D_KL(p || q) of the data at each of K pairs of noise levels.

    `data`: (L, ...) float, on any device, where the work is done. `p`, `q`: (K, 2), alpha and sigma
    of each pair. `samples`: M, the same draws for all pairs. `chunk` bounds the memory, and changes
    rounding only. `progress` is called with shares of the work, in all 1.

    Raises DataError for fewer than 2 points or samples, values that are not finite, or sigma that
    is not positive; Stopped.
    """
    data = data.flatten(1)
    points, width = data.shape
    check(data, np.concatenate([p, q]), samples)

    # Everything is float64: squared distances of 10^4 pixels are divided by variances down to
    # 10^-5, and in float32 would be wrong by some hundreds. All pairs share two matrix products,
    # x_l x_j and noise x_j.

    # A few rows of data at a time are converted; `square` is |x_j|^2, (L,).
    parts = data.split(max(1, min(points, CHUNK // width)))
    square = torch.cat([part.double().square().sum(1) for part in parts])

    # Which data point each sample starts from; the draws are those of all pairs.
    generator = torch.Generator().manual_seed(stream_seed(seed, "point", 0))
    chosen = torch.randint(points, (samples,), generator=generator)
    found = torch.zeros(3, len(p), samples, dtype=torch.float64, device=data.device)
    # As many samples at once as a chunk has room for with all points.
    rows = max(1, min(samples, chunk // points))
    for first in range(0, samples, rows):
        own = chosen[first : first + rows].to(data.device)
        batch = _batch(data, parts, square, own, first, seed)
        for k, (level, other) in enumerate(zip(p.tolist(), q.tolist(), strict=True)):
            if stop():
                raise Stopped
            found[:, k, first : first + rows] = _pair(batch, *level, *other)
            progress(len(own) / samples / len(p))

    return _estimates(found.cpu().numpy(), one_kernel(p, q, width, square.mean().item()))


def _estimates(found: Array, bound: Array) -> RelativeEntropy:
    """The estimates from the terms of all samples (3, K, M); `bound`: one kernel's relative
    entropy, (K,)."""
    # ln p - ln q is the log ratio of the own kernels, and what the others add to it.
    single, rest, entropy = found
    log_ratio = single + rest
    return RelativeEntropy(
        *_controlled(log_ratio, single - bound[:, None]),
        *_mean(log_ratio),
        np.exp(entropy.mean(1)),
        bound,
    )


def _batch(
    data: Tensor, parts: Sequence[Tensor], square: Tensor, own: Tensor, first: int, seed: int
) -> _Batch:
    """The samples `first` and after, of the data points `own` (m,). `parts`: the data in blocks of
    rows; `square`: |x_j|^2, (L,)."""
    width = data.shape[1]
    drawn = [_noise(seed, i, width) for i in range(first, first + len(own))]
    noise = torch.stack(drawn).to(data.device)
    x_start = data[own].double()

    # Of x_j - x_l, so that what a sample has with its own point is exactly 0.
    with_points = _products(x_start, parts)
    with_points = with_points - with_points.gather(1, own[:, None])
    with_noise = _products(noise, parts)
    with_noise = with_noise - with_noise.gather(1, own[:, None])
    return _Batch(
        with_points,
        with_noise,
        longer=square - square[own, None],
        own=square[own],
        inner=(noise * x_start).sum(1),
        energy=noise.square().sum(1),
        width=width,
    )


def _products(left: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """left @ data.T in float64, (m, L), a block of the data at a time."""
    return torch.cat([left @ part.double().T for part in parts], dim=1)


def one_kernel(p: Array, q: Array, width: int, square: float) -> Array:
    """The mean over the data points of one kernel's relative entropy,
    D_KL(N(alpha x_l, sigma^2 I) || N(alpha' x_l, sigma'^2 I)), (K,). `square`: the mean squared
    norm of the points, in `width` dimensions."""
    ratio = (p[:, 1] / q[:, 1]) ** 2
    of_widths = width / 2 * (ratio - 1 - np.log(ratio))
    return of_widths + (p[:, 0] - q[:, 0]) ** 2 * square / (2 * q[:, 1] ** 2)


def _mean(values: Array) -> tuple[Array, Array]:
    """The mean of each row of (K, M), and its standard error."""
    return values.mean(1), values.std(1, ddof=1) / math.sqrt(values.shape[1])


def _controlled(log_ratio: Array, single: Array) -> tuple[Array, Array]:
    """The mean of ln p - ln q (K, M) with control variates, and its standard error.

    Subtracted is what two quantities of mean 0 explain of it: one kernel's log ratio less its mean,
    `single`, and q / p - 1, as E_p[q / p] = 1. Where the kernels are apart, the former leaves no
    error; where p and q are close, the latter turns an error of order sqrt(D_KL / M) into one of
    order D_KL / sqrt(M)."""
    rows = []
    for values, of_one in zip(log_ratio, single, strict=True):
        controls = [np.ones_like(values), of_one]
        # For noise levels further apart q / p has too long a tail.
        if values.std() < 1:
            controls.append(np.expm1(-values))

        # Least squares on columns of like size, the first of which is the mean.
        design = np.stack([c / (np.abs(c).max() or 1) for c in controls], axis=1)
        weights = np.linalg.lstsq(design, values, rcond=None)[0]
        rows.append(weights[0] + values - design @ weights)
    return _mean(np.stack(rows))


def _noise(seed: int, sample: int, width: int) -> Tensor:
    """One sample's noise, from a generator of its own on the CPU: the same in chunks of any size,
    on any device."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "kernel noise", sample))
    return torch.randn(width, dtype=torch.float64, generator=generator)


def check(data: Tensor, levels: Array, samples: int) -> None:
    """Raises DataError for data, noise levels or a number of samples that allow no estimate."""
    # A standard error needs two.
    if len(data) < 2 or samples < 2:
        raise DataError(
            f"a relative entropy of {len(data)} images by {samples} samples; give 2 or more of both"
        )
    if not data.isfinite().all():
        raise DataError("the images have values that are not finite; pack them anew")
    if not np.isfinite(levels).all() or levels[:, 1].min() <= 0:
        raise DataError(
            f"sigma is {levels[:, 1].min()} at a noise level: a kernel needs a width; leave that "
            "level out"
        )
