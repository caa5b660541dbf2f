"""How much each noise level counts in the loss."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.config.schema import NoiseConfig
from largescale.diffusion.objective import Losses
from largescale.errors import ConfigError
from largescale.registry import look_up

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(log_snr, x_start_weight), (N,) float64 each, see `Objective` -> factors on the mse, (N,)
float32."""


def unweighted() -> Weighting:
    """The weighting that is 1 at every noise level."""
    return lambda log_snr, x_start_weight: torch.ones_like(log_snr, dtype=torch.float32)


def min_snr(gamma: float) -> Weighting:
    """Min-SNR weighting, arXiv:2303.09556: min(SNR, gamma) times the squared error of the predicted
    x_start, whatever is predicted. So min(SNR, gamma) / SNR for noise prediction."""
    if not 0 < gamma < math.inf:
        raise ConfigError(
            f"min_snr_gamma={gamma} must be positive; set --noise.min-snr-gamma (5 in the paper)"
        )
    # In logarithms, as SNRs span many orders of magnitude.
    log_gamma = math.log(gamma)
    return lambda log_snr, x_start_weight: (
        (log_snr.clamp(max=log_gamma) - x_start_weight.log()).exp().float()
    )


def p2(k: float, gamma: float) -> Weighting:
    """P2 weighting, eq. 8 of arXiv:2204.00227: 1 / (k + SNR) ** gamma times the mse; there of noise
    prediction, here of any."""
    if not (0 <= k < math.inf and 0 <= gamma < math.inf):
        raise ConfigError(
            f"p2_k={k} and p2_gamma={gamma} must be 0 or more; set --noise.p2-k and "
            "--noise.p2-gamma (1 and 1, or 0.5, in the paper)"
        )
    log_k = math.log(k) if k else -math.inf
    return lambda log_snr, x_start_weight: (
        (-gamma * torch.logaddexp(log_snr, torch.full_like(log_snr, log_k))).exp().float()
    )


# The values of noise.weighting
WEIGHTINGS: dict[str, Callable[[NoiseConfig], Weighting]] = {
    "none": lambda config: unweighted(),
    "min_snr": lambda config: min_snr(config.min_snr_gamma),
    "p2": lambda config: p2(config.p2_k, config.p2_gamma),
}


def make_weighting(config: NoiseConfig) -> Weighting:
    """The weighting of a config."""
    return look_up(WEIGHTINGS, config.weighting, "noise.weighting")(config)


class OptimisedLosses(NamedTuple):
    """The losses of each sample, (N,) float32: `loss` is what is optimised and what the pacing
    observes, weighted; mse and vb are the objective's, unweighted."""

    loss: Tensor
    mse: Tensor
    vb: Tensor


def weighted(losses: Losses, weight: Tensor, importance: Tensor) -> OptimisedLosses:
    """The losses of a training step. `weight`: the weighting's factors, `importance`: those of
    resampling, (N,) each."""
    # As in the papers' code, a weighting is of the mse alone, and the `importance` of resampling is
    # of the complete loss.
    loss = importance * (weight * losses.mse + losses.vb)
    return OptimisedLosses(loss, losses.mse, losses.vb)
