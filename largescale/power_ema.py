"""Averages of the weights by a power function, and any other width from those that were kept.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3.1 and appendix C. The average at step t weights the network of step
tau <= t by (gamma + 1) tau^gamma / t^(gamma + 1): its profile. The width is the profile's standard
deviation as a share of t, which stays the same while training goes on. numpy only, no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

# A sum whose profile is off by more is worth a warning.
LARGE_RESIDUAL = 0.05
# Above it lies gamma < 0.1, a profile that is almost flat; the widest, flat one has 0.2887.
WIDEST = 0.28


@cache
def gamma_of(width: float) -> float:
    """The exponent of the profile of that width: the real root above -1 of width^2 (gamma + 2)^2
    (gamma + 3) = gamma + 1 (eq. 126)."""
    square = width**-2
    # Real roots have an imaginary part of rounding.
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return float(np.max(roots.real[np.abs(roots.imag) < 1e-9]))


def width_of(gamma: float) -> float:
    """The standard deviation of a profile as a share of the time (eq. 120)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def decay(width: float, step: int) -> float:
    """The average's decay in update `step`, counted from 1: (1 - 1 / step) ** (gamma + 1) (eq.
    127). The first is 0: the average begins as the first updated weights."""
    return (1 - 1 / step) ** (gamma_of(width) + 1)


def state_key(width: float) -> str:
    """The name of an average in an optimizer's state and in checkpoints."""
    return f"ema_{width:g}"


@dataclass(frozen=True, order=True)
class Profile:
    """An average of some width at some step."""

    step: int
    width: float


@dataclass(frozen=True)
class Reconstruction:
    """An average as a sum of others."""

    coefficients: npt.NDArray[np.float64]
    """What each of the given averages is multiplied by."""
    residual: float
    """The distance between the wanted profile and the sum's, as a share of the wanted one's length
    (L2): 0 where it is exact."""


def residual_note(width: float, residual: float) -> str:
    """What to say of an average whose profile is off by so much; "" where that is little."""
    if residual <= LARGE_RESIDUAL:
        return ""
    return (
        f"the profile of the average of width {width:g} is off by {residual:.0%}, which is much: the "
        "width is far from those that were kept, or there are too few snapshots "
        "(--checkpoint.ema-snapshot-every)"
    )


def inner_product(a: Profile, b: Profile) -> float:
    """Of two profiles, the integral of their product (algorithm 3)."""
    # Beyond its own step a profile is 0, so the integral ends with the earlier one.
    early, late = sorted((a, b))
    gamma_early, gamma_late = gamma_of(early.width), gamma_of(late.width)
    numerator = (gamma_early + 1) * (gamma_late + 1) * (early.step / late.step) ** gamma_late
    return numerator / ((gamma_early + gamma_late + 1) * late.step)


def reconstruct(kept: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """The sum of kept averages whose profile is nearest to the wanted one, by least squares (section
    3.2). Only averages up to the wanted step are used."""
    # An average that was kept is itself, and no sum of others that rounds.
    if wanted in kept:
        return Reconstruction(np.array([float(each == wanted) for each in kept]), 0.0)
    used = [i for i, each in enumerate(kept) if each.step <= wanted.step]
    products = np.array([[inner_product(kept[i], kept[j]) for j in used] for i in used])
    towards = np.array([inner_product(kept[i], wanted) for i in used])
    own = inner_product(wanted, wanted)

    # Unit lengths: profiles of early steps are high and narrow.
    scale = np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products / np.outer(scale, scale), towards / scale, rcond=1e-13)[0]
    solution = solution / scale
    square = own - 2 * solution @ towards + solution @ products @ solution
    coefficients = np.zeros(len(kept))
    coefficients[used] = solution
    return Reconstruction(coefficients, math.sqrt(max(0.0, square / own)))
