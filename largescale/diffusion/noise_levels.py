"""The draws of noise levels by name, and those among them that are constant over bins of the noise
axis; `noise_densities` has those with a formula."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.config.schema import NoiseConfig
from largescale.diffusion.noise_densities import (
    Beta,
    CosineMap,
    Laplace,
    LogitNormal,
    Mode,
    Shifted,
    Uniform,
)
from largescale.diffusion.noise_sampler import NoiseSampler, copied_to, share_of, unit_importance
from largescale.diffusion.objective import Objective, check_draw, middle_of_bins
from largescale.errors import CheckpointError, ConfigError
from largescale.registry import look_up


class _Binned(NoiseSampler):
    """A density that is constant over each of n_bins equal bins of the noise axis."""

    def __init__(self, n_bins: int):
        self.n_bins = n_bins
        self._tables: dict[tuple[float, float, torch.device], Tensor] = {}

    def density(self, bins: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The density over the active `bins`, (K,), relative to the uniform one. `width`: (K,), the
        share of the active noise levels that each bin covers, less at the ends where an edge of the
        interval cuts a bin."""
        raise NotImplementedError

    def _table(self, low: float, high: float, device: torch.device) -> Tensor:
        """The table of the active bins, (3, K): each one's lower end as a share of [low, high), the
        CDF there, and its density."""
        key = low, high, device
        if key not in self._tables:
            # The margin keeps out a bin that only rounding makes active.
            edges = np.arange(self.n_bins + 1) / self.n_bins
            inside = edges[(edges > low + 1e-9) & (edges < high - 1e-9)]
            edges = np.concatenate([[low], inside, [high]])
            bins = np.floor((edges[:-1] + edges[1:]) / 2 * self.n_bins).astype(int)

            # The CDF at a bin's lower end is the mass of all bins up to it, without its own.
            start = (edges - low) / (high - low)
            density = self.density(bins, np.diff(start))
            cdf = np.cumsum(density * np.diff(start)) - density * np.diff(start)
            self._tables[key] = copied_to(device, np.stack([start[:-1], cdf, density]))
        return self._tables[key]

    def _bend(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """v bent, and the density there relative to the uniform one."""
        check_draw(v, low, high)
        table = self._table(low, high, v.device)
        # The inverse CDF, which is linear within a bin.
        start, cdf, density = table[:, torch.searchsorted(table[1, 1:], v, right=True)]
        return share_of(start + (v - cdf) / density, 0.0, 1.0), density


class LossSecondMoment(_Binned):
    """Resampling by the loss, section 3.3 of arXiv:2102.09672: p proportional to sqrt(E[L ** 2]),
    and losses divided by it, so that their mean is that of uniform sampling.

    E is over a bin's last 10 losses. Under a curriculum, p is over the active bins, and uniform
    until each of these, not each of all, has its 10.
    """

    name = "loss_second_moment"
    needs_losses = True
    history = 10
    # guided-diffusion's share of uniform draws, with which no bin is forgotten.
    uniform_prob = 0.001

    def __init__(self, n_bins: int):
        super().__init__(n_bins)
        self._losses = np.zeros((n_bins, self.history))  # oldest first
        self._counts = np.zeros(n_bins, dtype=int)

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        bent, density = self._bend(v, low, high)
        return bent, (1 / density).float()

    def density(self, bins: np.ndarray, width: np.ndarray) -> np.ndarray:
        if (self._counts[bins] < self.history).any():
            return np.ones(len(bins))
        moment = np.sqrt(np.mean(self._losses[bins] ** 2, axis=1))
        return (1 - self.uniform_prob) * moment / np.sum(moment * width) + self.uniform_prob

    def observe(self, bins: list[int], losses: list[float]) -> None:
        if not np.isfinite(losses).all():
            raise ValueError(
                "loss-second-moment sampling was shown a loss that is not finite; only those of "
                "applied steps may reach it"
            )
        # One by one: several rows of a batch may lie in one bin.
        for i, loss in zip(bins, losses, strict=True):
            if self._counts[i] == self.history:
                self._losses[i, :-1] = self._losses[i, 1:]
            else:
                self._counts[i] += 1
            self._losses[i, self._counts[i] - 1] = loss
        # The density has changed.
        self._tables.clear()

    def state_dict(self) -> dict[str, Any]:
        losses = [row[:n].tolist() for row, n in zip(self._losses, self._counts, strict=True)]
        return {**super().state_dict(), "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if len(state["losses"]) != self.n_bins:
            raise CheckpointError(
                f"this run counts losses in {self.n_bins} bins, the saved state in "
                f"{len(state['losses'])}; go on with --diffusion.timesteps {len(state['losses'])}"
            )
        for i, row in enumerate(state["losses"]):
            self._counts[i] = len(row)
            self._losses[i, : len(row)] = row
        self._tables.clear()


class SpeeD(_Binned):
    """SpeeD, arXiv:2405.17403: noise levels are `ratio` times as likely where the noise's share of
    x_t, s = sqrt(noise power), grows by 1e-4 a step of 1000 or more, ds/du >= 0.1, as where it
    hardly grows.

    Its weights are weighting=p2 with k = gamma = 1. Left out is its code's pairing, which mirrors
    half of a batch's timesteps, those of the suppressed part out of it.
    """

    name = "speed"
    least_growth = 0.1

    def __init__(self, log_snr: np.ndarray, ratio: float):
        """`log_snr`: (n_bins,), at the middle of the bins."""
        if not 0 < ratio < math.inf:
            raise ConfigError(
                f"speed_ratio={ratio} must be positive; set --noise.speed-ratio (5 in the paper)"
            )
        super().__init__(len(log_snr))
        # s = sqrt(1 - alpha_bar) = 1 / sqrt(1 + SNR)
        s = np.exp(-0.5 * np.logaddexp(0, log_snr))
        self._relative = np.where(np.gradient(s) * self.n_bins < self.least_growth, 1.0, ratio)

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        bent, _ = self._bend(v, low, high)
        return bent, unit_importance(v)

    def density(self, bins: np.ndarray, width: np.ndarray) -> np.ndarray:
        relative: np.ndarray = self._relative[bins]
        return relative / np.sum(relative * width)


# The values of noise.sampling
NOISE_SAMPLERS: dict[str, Callable[[NoiseConfig, Objective, int], NoiseSampler]] = {
    "uniform": lambda config, objective, n_bins: Uniform(),
    "logit_normal": lambda config, objective, n_bins: LogitNormal(
        config.logit_mean, config.logit_std
    ),
    "loss_second_moment": lambda config, objective, n_bins: LossSecondMoment(n_bins),
    "speed": lambda config, objective, n_bins: SpeeD(
        log_snr_of_bins(objective, n_bins), config.speed_ratio
    ),
    "laplace": lambda config, objective, n_bins: Laplace(
        objective, config.laplace_mu, config.laplace_b
    ),
    "beta": lambda config, objective, n_bins: Beta(config.beta_alpha, config.beta_beta),
    "mode": lambda config, objective, n_bins: Mode(config.mode_scale),
    "cosine_map": lambda config, objective, n_bins: CosineMap(objective),
}


def make_noise_sampler(config: NoiseConfig, objective: Objective, n_bins: int) -> NoiseSampler:
    """The sampler of a config, for an objective. `n_bins`: in how many equal shares of the noise
    axis statistics are kept."""
    make = look_up(NOISE_SAMPLERS, config.sampling, "noise.sampling")
    sampler = make(config, objective, n_bins)
    return sampler if config.shift == 1 else Shifted(sampler, config.shift)


def log_snr_of_bins(objective: Objective, n_bins: int) -> np.ndarray:
    """ln SNR in the middle of n_bins equal shares of the noise axis, (n_bins,) float64."""
    return objective.log_snr(objective.draw(middle_of_bins(n_bins))).numpy()
