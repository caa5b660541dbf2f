"""Noise schedules of Gaussian diffusion: float64 numpy, no torch.

`t` counts 0 .. T - 1 and 0 is the least noise. Schedules and respacing as in
openai/guided-diffusion.
"""

from collections.abc import Callable

import numpy as np

from largescale.errors import ConfigError
from largescale.registry import look_up


def _linear(timesteps: int) -> np.ndarray:
    """Ho et al. (arXiv:2006.11239), scaled so that another T ends at about the same SNR."""
    return np.linspace(1e-4, 0.02, timesteps) * (1000 / timesteps)


def _cosine(timesteps: int) -> np.ndarray:
    """squaredcos_cap_v2: eq. 17 of Nichol and Dhariwal (arXiv:2102.09672), betas capped at
    0.999."""
    # Without the cap the last beta would be 1, and x_T without any signal.
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": _linear, "cosine": _cosine}


def make_betas(schedule: str, timesteps: int) -> np.ndarray:
    """beta_t, (T,), in (0, 1). Raises ConfigError for an unknown schedule, or for too few
    timesteps."""
    make = look_up(SCHEDULES, schedule, "diffusion.schedule")
    if timesteps < 2:
        raise ConfigError(
            f"a schedule needs at least 2 timesteps, got {timesteps}; the paper uses 1000"
        )
    betas = make(timesteps)
    # The linear schedule is scaled by 1000 / T, which is too much for a small T.
    if betas.max() >= 1:
        raise ConfigError(
            f"the {schedule} schedule reaches beta={betas.max():.3g} with {timesteps} timesteps; "
            "use more than 20, or the cosine schedule"
        )
    return betas


def alphas_cumprod(betas: np.ndarray) -> np.ndarray:
    """alpha_bar_t = prod_{s <= t} (1 - beta_s), (T,): the share of the signal in the variance of
    x_t."""
    return np.cumprod(1 - betas)


def log_snr(betas: np.ndarray) -> np.ndarray:
    """ln(alpha_bar_t / (1 - alpha_bar_t)), (T,), falling with t."""
    alpha_bar = alphas_cumprod(betas)
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def space_timesteps(timesteps: int, spec: int | str) -> np.ndarray:
    """The timesteps that a shorter sampler keeps: int64, rising.

    `spec`: a count ("250" or 250), spread evenly from 0 to T - 1; or "ddim50", the fixed stride of
    the DDIM paper (arXiv:2010.02502), which starts at 0 and raises ConfigError where no integer
    stride gives that count.
    """
    fixed_stride = str(spec).startswith("ddim")
    digits = str(spec).removeprefix("ddim")
    if not digits.isdecimal() or not 1 <= int(digits) <= timesteps:
        raise ConfigError(
            f"cannot sample {timesteps} timesteps with {spec!r} steps; "
            f"use a count from 1 to {timesteps}"
        )
    count = int(digits)
    if not fixed_stride:
        # Summed, as guided-diffusion does: products would round other halves.
        strides = np.full(count - 1, (timesteps - 1) / max(count - 1, 1))
        return np.rint(np.cumsum([0.0, *strides])).astype(np.int64)

    # The smallest stride that gives the count, as guided-diffusion takes.
    for step in range(1, timesteps):
        if len(range(0, timesteps, step)) == count:
            return np.arange(0, timesteps, step, dtype=np.int64)
    raise ConfigError(
        f'no integer stride keeps {count} of {timesteps} timesteps; use "{count}" to spread them '
        "evenly"
    )


def respaced_betas(betas: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Betas of the process that visits only the `kept` timesteps: alpha_bar stays as it was at each
    of them."""
    alpha_bar = alphas_cumprod(betas)[kept]
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
