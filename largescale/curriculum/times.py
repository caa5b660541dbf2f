"""A curriculum's noise levels u as what other losses are written in.

`u` is a float, a numpy array or a torch tensor, and so is what is returned.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from largescale.errors import ConfigError


def timesteps(u: Any, T: int) -> Any:
    """DDPM's integer timesteps t = floor(u T), 0 .. T - 1; 0 has the least noise."""
    # A draw below 1 may have been rounded to 1.
    t = (_float64(u) * T).clip(0, T - 1)
    return t.long() if hasattr(t, "long") else t.astype(np.int64)


def sigma(u: Any, p_mean: float = -1.2, p_std: float = 1.2) -> Any:
    """EDM's noise levels sigma, whose logarithm is normal where u is uniform: ln(sigma) = p_mean +
    p_std Phi^-1(u) (arXiv:2206.00364, table 1)."""
    return _like(u, math.e ** (p_mean + p_std * _normal_quantile(_float64(u))))


def logit_normal(
    v: Any, low: float = 0.0, high: float = 1.0, mean: float = 0.0, std: float = 1.0
) -> Any:
    """Noise levels u in [low, high) whose logit is normal (arXiv:2403.03206, eq. 19), from v
    uniform in (0, 1). `low`, `high`: as `Curriculum.active` has them."""
    normal = NormalDist(mean, std)
    below, above = normal.cdf(_logit(low)), normal.cdf(_logit(high))
    if above - below < 1e-9:
        raise ConfigError(
            f"hardly any noise level of mean={mean}, std={std} lies in [{low}, {high}); take fewer "
            "clusters, or a larger std"
        )
    logit = mean + std * _normal_quantile(below + _float64(v) * (above - below))
    # Rounding can leave the interval.
    return _like(v, (1 / (1 + math.e**-logit)).clip(low, math.nextafter(high, 0.0)))


def _logit(u: float) -> float:
    return math.log(u / (1 - u)) if 0 < u < 1 else math.copysign(math.inf, u - 0.5)


def _normal_quantile(u: Any) -> Any:
    """Phi^-1 of float64 numbers in [0, 1], of which 0 and 1 are taken for their neighbours."""
    u = u.clip(2.0**-53, 1 - 2.0**-53)
    if hasattr(u, "erfinv"):
        return math.sqrt(2) * (2 * u - 1).erfinv()
    return np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])(u)[()]


def _float64(u: Any) -> Any:
    """In float64, since a u close to 0 or 1 stands for much less, or more, noise than its
    neighbours."""
    return u.double() if hasattr(u, "double") else np.float64(u)


def _like(u: Any, result: Any) -> Any:
    """A tensor in the precision of u."""
    return result.to(u.dtype) if hasattr(u, "double") else result
