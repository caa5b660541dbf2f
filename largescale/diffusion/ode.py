"""Solvers of dx/dtime = derivative(x, time) over times that the caller chooses, and EDM's choice of
them.

`times`: n + 1 points in the order taken, rising or falling, for n steps; `derivative` is given them
unchanged, as floats. `x` keeps its type, so a float32 state stays float32 where the derivative is
half precision.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from largescale.errors import ConfigError

Derivative = Callable[[Tensor, float], Tensor]  # (x, time) -> dx/dtime, of x's shape
Times = Sequence[float] | np.ndarray


def euler(derivative: Derivative, x: Tensor, times: Times) -> Tensor:
    """x at the last time: order 1, n evaluations."""
    for time, following in pairwise(map(float, times)):
        x = x + (following - time) * derivative(x, time)
    return x


def heun(derivative: Derivative, x: Tensor, times: Times, *, euler_last: bool = False) -> Tensor:
    """x at the last time: Heun's second-order method, as in EDM (arXiv:2206.00364, algorithm 1); 2n
    evaluations.

    `euler_last`: where no derivative exists at the last time (EDM: sigma = 0), the last step is
    Euler's; 2n - 1.
    """
    steps = len(times) - 1
    # The trapezoidal rule, with Euler's step as the prediction of its end.
    for i, (time, following) in enumerate(pairwise(map(float, times))):
        slope = derivative(x, time)
        predicted = x + (following - time) * slope
        if euler_last and i == steps - 1:
            return predicted
        x = x + (following - time) / 2 * (slope + derivative(predicted, following))
    return x


def heun3(derivative: Derivative, x: Tensor, times: Times) -> Tensor:
    """x at the last time: Heun's third-order method, torchdiffeq's and so SiT's `heun3`; 3n
    evaluations."""
    # Butcher tableau: slopes at 0, 1/3 and 2/3 of a step, with weights 1/4, 0 and 3/4.
    for time, following in pairwise(map(float, times)):
        third = (following - time) / 3
        slope = derivative(x, time)
        middle = derivative(x + third * slope, time + third)
        x = x + 3 * third / 4 * (slope + 3 * derivative(x + 2 * third * middle, time + 2 * third))
    return x


def edm_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80, rho: float = 7
) -> np.ndarray:
    """EDM's noise levels (arXiv:2206.00364, eq. 5): (steps,) float64, falling from sigma_max to
    sigma_min.

    The 0 that ends eq. 5 is the caller's to append: `[*edm_sigmas(18), 0.0]` makes 18 steps.
    """
    if steps < 1:
        raise ConfigError(
            f"steps={steps} leaves no noise level; use 1 or more, the paper uses 18 to 256"
        )
    if not 0 < sigma_min < sigma_max < math.inf or not 0 < rho < math.inf:
        raise ConfigError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho} make no noise levels; they "
            "need 0 < sigma_min < sigma_max and rho > 0, the paper uses 0.002, 80 and 7"
        )
    # Equal steps in sigma^(1 / rho).
    share = np.arange(steps, dtype=np.float64) / max(steps - 1, 1)
    first = sigma_max ** (1 / rho)
    last = sigma_min ** (1 / rho)
    return (first + share * (last - first)) ** rho
