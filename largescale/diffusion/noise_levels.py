"""How noise levels are drawn among those that the curriculum has active.

A sampler bends v, uniform in the open (0, 1), so that u = low + v (high - low) has the sampler's
density, restricted to the active [low, high) and renormalised. All that is random stays in v, so a
resumed run draws as it would have.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.config.schema import NoiseConfig
from largescale.diffusion.objective import check_draw
from largescale.errors import CheckpointError, ConfigError
from largescale.registry import look_up


class NoiseSampler:
    """A density of noise levels."""

    name: str
    needs_losses = False

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """v bent, (N,) float64 in the open (0, 1), and (N,) float32 factors on the samples' losses.
        `v`: (N,) float64 in the open (0, 1); `low`, `high`: the active noise levels, from
        `Objective.snap_to_timesteps`."""
        raise NotImplementedError

    def observe(self, bins: list[int], losses: list[float]) -> None:
        """Takes the losses of an applied step, the same on every rank: of each row of the global
        batch, in order, floor(u n_bins) and the loss before the factor of `warp`. Without effect
        unless `needs_losses`."""

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, which strict JSON and weights-only torch files both take."""
        return {"sampling": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises CheckpointError for that of another sampler."""
        if state["sampling"] != self.name:
            raise CheckpointError(
                f"this run draws noise levels by {self.name}, the saved state is of "
                f"{state['sampling']}; go on with --noise.sampling {state['sampling']}"
            )


class Uniform(NoiseSampler):
    """Every active noise level is as likely as any other."""

    name = "uniform"

    def warp(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        check_draw(v, low, high)
        return v, torch.ones_like(v, dtype=torch.float32)


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
        return _open((u - low) / (high - low)), torch.ones_like(v, dtype=torch.float32)


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


def _open(v: Tensor) -> Tensor:
    """v inside the open (0, 1), whose ends rounding may reach."""
    # The smallest and the largest v that are drawn.
    return v.clamp(2.0**-53, 1 - 2.0**-53)


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
            table = torch.from_numpy(np.stack([start[:-1], cdf, density]))
            # From pinned memory the copy does not wait for the GPU.
            if device.type == "cuda":
                table = table.pin_memory()
            self._tables[key] = table.to(device, non_blocking=True)
        return self._tables[key]

    def _bend(self, v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """v bent, and the density there relative to the uniform one."""
        check_draw(v, low, high)
        table = self._table(low, high, v.device)
        # The inverse CDF, which is linear within a bin.
        start, cdf, density = table[:, torch.searchsorted(table[1, 1:], v, right=True)]
        return _open(start + (v - cdf) / density), density


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
        return bent, torch.ones_like(v, dtype=torch.float32)

    def density(self, bins: np.ndarray, width: np.ndarray) -> np.ndarray:
        relative: np.ndarray = self._relative[bins]
        return relative / np.sum(relative * width)


# The values of noise.sampling
NOISE_SAMPLERS: dict[str, Callable[[NoiseConfig, int, np.ndarray], NoiseSampler]] = {
    "uniform": lambda config, n_bins, log_snr: Uniform(),
    "logit_normal": lambda config, n_bins, log_snr: LogitNormal(
        config.logit_mean, config.logit_std
    ),
    "loss_second_moment": lambda config, n_bins, log_snr: LossSecondMoment(n_bins),
    "speed": lambda config, n_bins, log_snr: SpeeD(log_snr, config.speed_ratio),
}


def make_noise_sampler(config: NoiseConfig, n_bins: int, log_snr: np.ndarray) -> NoiseSampler:
    """The sampler of a config. `log_snr`: (n_bins,) float64, of the objective at the middle of
    n_bins equal shares of the noise axis."""
    return look_up(NOISE_SAMPLERS, config.sampling, "noise.sampling")(config, n_bins, log_snr)
