"""Densities of noise levels that follow from a formula; docs/baselines.md compares them.

Those over t take t = u, which is what they say it is under `flow` (its own t is 1 - u), and the
share of the timesteps under `gaussian`. Those over log SNR ask the objective which u has it.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from largescale.diffusion.noise_sampler import (
    NoiseSampler,
    copied_to,
    share_of,
    unit_importance,
)
from largescale.diffusion.objective import Objective, check_draw
from largescale.errors import ConfigError


class Uniform(NoiseSampler):
    """Every active noise level is as likely as any other."""

    name = "uniform"

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        return v, unit_importance(v)


class LogitNormal(NoiseSampler):
    """Noise levels whose logit is normal: eq. 19 of arXiv:2403.03206, whose t, like u, is 1 for
    noise."""

    name = "logit_normal"

    def __init__(self, mean: float, std: float):
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ConfigError(
                f"logit-normal noise levels need a finite mean and a positive std, got {mean} and "
                f"{std}; set --noise.logit-mean and --noise.logit-std (0 and 1 in the paper)"
            )
        self.mean, self.std = mean, std

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        a = (_logit(low) - self.mean) / self.std
        b = (_logit(high) - self.mean) / self.std
        # By symmetry in the lower half: a tail's digits are in its own mass, not in 1 minus it.
        z = -_truncated_normal(1 - v, -b, -a) if a + b > 0 else _truncated_normal(v, a, b)
        u = torch.sigmoid(self.mean + self.std * z)
        return share_of(u, low, high), unit_importance(v)


def _logit(u: float) -> float:
    return math.log(u) - math.log1p(-u) if 0 < u < 1 else math.copysign(math.inf, u - 0.5)


@functools.cache
def _log_cdf(z: float) -> float:
    """ln Phi(z), on the host."""
    return torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)).item()


def _truncated_normal(v: Tensor, a: float, b: float) -> Tensor:
    """The z of a standard normal within (a, b), at the share v of its mass there; accurate where
    a + b <= 0."""
    log_a = _log_cdf(a)
    log_b = _log_cdf(b)
    below = v + (1 - v) * math.exp(log_a - log_b)  # Phi(z) / Phi(b)
    if b > -30:
        return torch.special.ndtri(below * math.exp(log_b))

    # Phi(b) nears the smallest float64: solve ln Phi(z) = ln(below) + ln Phi(b), from the tail's
    # leading term, by Newton's method with d/dz ln Phi(z) = -z (1 + O(z ** -2)).
    z = -(b * b - 2 * below.log()).sqrt()
    for _ in range(3):
        z = z + (torch.special.log_ndtr(z) - log_b - below.log()) / z
    return z


class Mode(NoiseSampler):
    """Mode sampling, section 3.1 of arXiv:2403.03206: t = 1 - w - s (cos^2(pi w / 2) - 1 + w) of a
    uniform w. The middle is drawn more often with s > 0, the ends with s < 0."""

    name = "mode"

    def __init__(self, scale: float):
        # Beyond these, t would not be monotonic in w.
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ConfigError(
                f"mode_scale={scale} must be from -1 to 2 / (pi - 2) = 1.7519; set "
                "--noise.mode-scale (1.29 in diffusers)"
            )
        self.scale = scale

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        first, last = _mode_cdf(low, self.scale), _mode_cdf(high, self.scale)
        w = first + v * (last - first)
        # The formula at 1 - w, which has the same density, so that u rises with v.
        u = w * (1 + self.scale) - self.scale * (w * (math.pi / 2)).sin().square()
        return share_of(u, low, high), unit_importance(v)


@functools.cache
def _mode_cdf(u: float, scale: float) -> float:
    """The share of a mode density below u, on the host: the inverse, by bisection, of a rising
    function that has no inverse in closed form."""
    low, high = 0.0, 1.0
    if u in (low, high):
        return u
    while low < (middle := (low + high) / 2) < high:
        if middle * (1 + scale) - scale * math.sin(middle * math.pi / 2) ** 2 < u:
            low = middle
        else:
            high = middle
    return high


class Laplace(NoiseSampler):
    """log SNR drawn from a Laplace distribution around `mu` of width `b`, arXiv:2407.03297, within
    the log SNRs that the active noise levels have."""

    name = "laplace"

    def __init__(self, objective: Objective, mu: float, b: float):
        if not (math.isfinite(mu) and 0 < b < math.inf):
            raise ConfigError(
                f"a Laplace density needs a finite mean and a positive width, got {mu} and {b}; set "
                "--noise.laplace-mu and --noise.laplace-b (0 and 0.5 in the paper)"
            )
        self.objective, self.mu, self.b = objective, mu, b

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        # The other sign, so that it rises with the noise level.
        first = (self.mu - self.objective.log_snr_at(low)) / self.b
        last = (self.mu - self.objective.log_snr_at(high)) / self.b
        y = truncated_laplace(v, first, last)
        u = self.objective.noise_level_of_snr(self.mu - self.b * y)
        return share_of(u, low, high), unit_importance(v)


def truncated_laplace(v: Tensor, a: float, b: float) -> Tensor:
    """The y of a standard Laplace distribution within (a, b), at the share v of its mass there."""
    if a >= 0:
        return a - _decay(1 - v, v, b - a)
    if b <= 0:
        return b + _decay(v, 1 - v, b - a)

    # Twice the mass on each side of the peak, and how much of both lies below and above y.
    left, right = -math.expm1(a), -math.expm1(-b)
    below, above = v * (left + right), (1 - v) * (left + right)
    on_the_left = _decay((below / left).clamp(max=1), (1 - below / left).clamp(min=0), -a)
    on_the_right = _decay((above / right).clamp(max=1), (1 - above / right).clamp(min=0), b)
    return torch.where(below < left, on_the_left, -on_the_right)


def _decay(outer: Tensor, inner: Tensor, length: float) -> Tensor:
    """Where exp(x) on (-length, 0) has the share `outer` of its mass below x; `inner` is 1 - outer.
    Given are both, as each has digits that the other lacks."""
    if length < 1:
        return torch.log1p(inner * math.expm1(-length))
    return torch.log(outer + inner * math.exp(-length))


class CosineMap(NoiseSampler):
    """The log SNRs that the cosine schedule, alpha = cos(pi w / 2) and sigma = sin(pi w / 2) of a
    uniform w, has: section 3.1 of arXiv:2403.03206. For the linear interpolant of flow matching
    that is the density 2 / (pi - 2 pi t + 2 pi t^2)."""

    name = "cosine_map"

    def __init__(self, objective: Objective):
        self.objective = objective

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        first, last = (_cosine_level(self.objective.log_snr_at(u)) for u in (low, high))
        angle = (first + v * (last - first)) * (math.pi / 2)
        u = self.objective.noise_level_of_snr(2 * (angle.cos().log() - angle.sin().log()))
        return share_of(u, low, high), unit_importance(v)


def _cosine_level(log_snr: float) -> float:
    """The w at which the cosine schedule has a log SNR, on the host."""
    # exp overflows beyond 709, where the level is 0 or 1 long since.
    return 2 / math.pi * math.atan(math.exp(-min(max(log_snr, -1400.0), 1400.0) / 2))


class Beta(NoiseSampler):
    """t from a beta distribution: the Beta-Tuned Timestep Diffusion Model, ECCV 2024.

    Its quantiles have no closed form. They are interpolated over x = logit(t), where the density is
    smooth, between as many points that an error is below 1e-9 of the distribution's width.
    """

    name = "beta"

    def __init__(self, alpha: float | None, beta: float | None):
        if alpha is None or beta is None or not (0 < alpha < math.inf and 0 < beta < math.inf):
            raise ConfigError(
                f"a beta density needs two positive numbers, got {alpha} and {beta}; set "
                "--noise.beta-alpha and --noise.beta-beta, which have no default"
            )
        self.alpha, self.beta = alpha, beta
        self._tables: dict[tuple[float, float, torch.device], Tensor] = {}

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        key = low, high, v.device
        if key not in self._tables:
            table = beta_quantiles(self.alpha, self.beta, low, high)
            self._tables[key] = copied_to(v.device, table)
        # From the nearer end: a tail's digits are in its own mass, not in 1 minus it.
        rising, falling = self._tables[key]
        x = torch.where(v < 0.5, _interpolated(rising, v), -_interpolated(falling, 1 - v))
        return share_of(torch.sigmoid(x), low, high), unit_importance(v)


# Beyond it, t or 1 - t is less than any v that is drawn.
LAST_LOGIT = 37.0
# Points of a table: the density changes by less than 1 % from one to the next.
POINTS = 2**15 + 1
# A density exp(80) times smaller than at the peak does not count, as no v is below 2 ** -53.
NEGLIGIBLE = 80.0


def beta_quantiles(alpha: float, beta: float, low: float, high: float) -> np.ndarray:
    """The table of a beta distribution within [low, high), (2, 3, POINTS): from its lower end the
    share of the mass, rising, x = logit(t), and the density of x; the same from its upper end, with
    -x."""

    # t^alpha (1 - t)^beta: the density of x, which has one peak, is not normalised yet.
    def log_density(x: np.ndarray) -> np.ndarray:
        return -alpha * np.logaddexp(0, -x) - beta * np.logaddexp(0, x)

    ends = max(_logit(low), -LAST_LOGIT), min(_logit(high), LAST_LOGIT)
    peak = min(max(math.log(alpha / beta), ends[0]), ends[1])
    top = float(log_density(np.array(peak)))
    first, last = (_where_negligible(log_density, peak, end) for end in ends)
    x = np.linspace(first, last, POINTS)

    # The mass between two points, by Gauss and Legendre, and beyond LAST_LOGIT that of exp(alpha x)
    # and exp(-beta x).
    nodes, weights = np.polynomial.legendre.leggauss(4)
    half = (last - first) / (POINTS - 1) / 2
    inside = x[:-1, None] + half * (1 + nodes)
    mass = half * np.exp(log_density(inside) - top) @ weights
    density = np.exp(log_density(x) - top)
    below = density[0] / alpha if low == 0 else 0.0
    above = density[-1] / beta if high == 1 else 0.0

    rising = below + np.concatenate([[0.0], np.cumsum(mass)])
    falling = above + np.concatenate([[0.0], np.cumsum(mass[::-1])])
    total = rising[-1] + above
    from_below = np.stack([rising / total, x, density / total])
    return np.stack([from_below, np.stack([falling / total, -x[::-1], density[::-1] / total])])


def _where_negligible(
    log_density: Callable[[np.ndarray], np.ndarray], peak: float, end: float
) -> float:
    """The point towards `end` from which on a density that falls does not count, or the end."""
    least = float(log_density(np.array(peak))) - NEGLIGIBLE
    inner, outer = peak, end
    if float(log_density(np.array(end))) >= least:
        return end
    # Until float64 cannot tell the two ends apart.
    for _ in range(60):
        middle = (inner + outer) / 2
        if float(log_density(np.array(middle))) >= least:
            inner = middle
        else:
            outer = middle
    return outer


def _interpolated(table: Tensor, share: Tensor) -> Tensor:
    """x at a share of the mass, by cubic Hermite interpolation."""
    mass, x, density = table.unbind()
    right = torch.searchsorted(mass, share, right=True).clamp(1, len(mass) - 1)
    left = right - 1
    width = mass[right] - mass[left]
    # Outside the table is only what lies beyond LAST_LOGIT.
    r = ((share - mass[left]) / width).clamp(0, 1)
    d_left, d_right = width / density[left], width / density[right]
    step = x[right] - x[left]
    return x[left] + r * (
        d_left + r * (3 * step - 2 * d_left - d_right + r * (d_left + d_right - 2 * step))
    )


class Shifted(NoiseSampler):
    """Another density of a flow's t, shifted: t -> s t / (1 + (s - 1) t), section 5.3.2 of
    arXiv:2403.03206, which divides the signal-to-noise ratio by s ** 2. The active part is that of
    the shifted t."""

    def __init__(self, sampler: NoiseSampler, shift: float):
        if not 0 < shift < math.inf:
            raise ConfigError(
                f"shift={shift} must be positive; set --noise.shift (sqrt(pixels / base pixels))"
            )
        self.sampler, self.shift, self.name = sampler, shift, sampler.name

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        # The inverse is the same function of 1 / s.
        first, last = (u / (self.shift + (1 - self.shift) * u) for u in (low, high))
        bent, importance = self.sampler.warp(v, first, last)
        t = first + bent * (last - first)
        return share_of(self.shift * t / (1 + (self.shift - 1) * t), low, high), importance
