"""The Markov chain of Gaussian diffusion: its tables, and p(x_{t-1} | x_t) from a model's output.

Equations: Ho et al., arXiv:2006.11239 (DDPM); Nichol and Dhariwal, arXiv:2102.09672 (IDDPM).
"""

from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from largescale.condition import Condition
from largescale.diffusion.objective import Model
from largescale.errors import ConfigError
from largescale.noise_schedule import alphas_cumprod, log_snr, respaced_betas


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) and the image that it implies, each of x_t's shape, float32."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x_start: Tensor


class DiffusionProcess:
    """A chain of T steps over images (N, C, H, W); timesteps t (N,) int64 in 0 .. T - 1, 0 = least
    noise. Arithmetic is float32 throughout."""

    def __init__(
        self,
        betas: np.ndarray,
        *,
        learn_sigma: bool,
        fixed_variance: Literal["small", "large"] = "small",
        timestep_map: np.ndarray | None = None,
    ):
        """`betas`: (T,), see `noise_schedule`. `learn_sigma`: the model's output has 2C channels,
        noise and variance. `fixed_variance`: without `learn_sigma`, beta~_t ("small") or beta_t
        ("large"). `timestep_map`: (T,), the timestep that the model is given for each t; set by
        `respaced`.
        """
        # The tables are computed in float64, and rounded once.
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not (0 < betas.min() <= betas.max() < 1):
            raise ConfigError(
                f"betas must be 2 or more numbers inside (0, 1), got shape {betas.shape} from "
                f"{betas.min(initial=np.inf)} to {betas.max(initial=-np.inf)}; make them with "
                "make_betas"
            )
        if fixed_variance not in ("small", "large"):
            raise ConfigError(f"unknown fixed_variance {fixed_variance!r}; choose small or large")
        self.betas, self.learn_sigma, self.fixed_variance = betas, learn_sigma, fixed_variance
        self.timesteps_total = len(betas)
        self.tables = _tables(betas, fixed_variance)
        if timestep_map is None:
            timestep_map = np.arange(len(betas))
        self.timestep_map = np.asarray(timestep_map, dtype=np.int64)
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}
        # ln SNR at the edges between timesteps, (T + 1,): half-way between its values at the two,
        # and as far beyond the first and last.
        inner = log_snr(betas)
        outer = [2 * inner[0] - inner[1], *inner, 2 * inner[-1] - inner[-2]]
        self.edges_log_snr = (np.array(outer[1:]) + np.array(outer[:-1])) / 2

    def respaced(self, kept: np.ndarray) -> Self:
        """The shorter process over the `kept` timesteps; the model still sees the original ones."""
        return type(self)(
            respaced_betas(self.betas, kept),
            learn_sigma=self.learn_sigma,
            fixed_variance=self.fixed_variance,
            timestep_map=self.timestep_map[kept],
        )

    def tables_on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables on a device."""
        # Copied once for each device: a step makes no copy from the host.
        if device not in self._on_device:
            tables = {}
            for key, table in self.tables.items():
                tables[key] = torch.from_numpy(table).float().to(device)
            # float64, as the noise axis is
            tables["log_snr"] = torch.from_numpy(log_snr(self.betas)).to(device)
            tables["edges_log_nsr"] = torch.from_numpy(-self.edges_log_snr).to(device)
            tables["timestep_map"] = torch.from_numpy(self.timestep_map).to(device)
            self._on_device[device] = tables
        return self._on_device[device]

    def _table(self, name: str, t: Tensor) -> Tensor:
        """A table at t, (N,)."""
        return self.tables_on(t.device)[name][t]

    def at(self, name: str, t: Tensor) -> Tensor:
        """`tables[name]` at t as float32 (N, 1, 1, 1)."""
        return self._table(name, t)[:, None, None, None]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_start, DDPM eq. 4."""
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start.float()
            + self.at("sqrt_one_minus_alphas_cumprod", t) * noise.float()
        )

    def model_output(self, model: Model, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        """The model's output, float32. A respaced process asks at the original timesteps."""
        return model(x_t, self._table("timestep_map", t), y).float()

    def _split(self, model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The predicted noise, and where the variance lies between its bounds, if it is learned."""
        expected = 2 * channels if self.learn_sigma else channels
        if model_output.shape[1] != expected:
            raise ConfigError(
                f"the model returned {model_output.shape[1]} channels for {channels}-channel "
                f"images, learn_sigma={self.learn_sigma} needs {expected}; give model and diffusion "
                "the same learn_sigma"
            )
        if not self.learn_sigma:
            return model_output, None
        eps, fraction = model_output.chunk(2, dim=1)
        return eps, fraction

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False
    ) -> Prediction:
        """p(x_{t-1} | x_t). `clip_denoised` holds the predicted image in [-1, 1], for pixels;
        latents have no bounds."""
        model_output, x_t = model_output.float(), x_t.float()
        eps, fraction = self._split(model_output, x_t.shape[1])
        if fraction is None:
            variance = self.at("fixed_variance", t).expand_as(x_t)
            log_variance = self.at("fixed_log_variance", t).expand_as(x_t)
        else:
            # IDDPM eq. 15
            log_variance = torch.lerp(
                self.at("min_log_variance", t), self.at("max_log_variance", t), (fraction + 1) / 2
            )
            variance = log_variance.exp()

        # DDPM eq. 4, solved for x_start
        pred_x_start = (
            self.at("sqrt_recip_alphas_cumprod", t) * x_t
            - self.at("sqrt_recipm1_alphas_cumprod", t) * eps
        )
        if clip_denoised:
            pred_x_start = pred_x_start.clamp(-1, 1)
        mean = self._posterior_mean(pred_x_start, x_t, t)
        return Prediction(mean, variance, log_variance, pred_x_start)

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of x_{t-1} given x_t and x_start, DDPM eq. 7."""
        return (
            self.at("posterior_mean_coef1", t) * x_start + self.at("posterior_mean_coef2", t) * x_t
        )


def _tables(betas: np.ndarray, fixed_variance: str) -> dict[str, np.ndarray]:
    """The coefficients of every timestep, (T,) float64 each."""
    alpha_bar = alphas_cumprod(betas)
    previous = np.append(1.0, alpha_bar[:-1])

    # DDPM eq. 7: the variance beta~_t of x_{t-1} given x_t and x_start, and its mean's factors
    posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
    of_x_start = betas * np.sqrt(previous) / (1 - alpha_bar)
    of_x_t = (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar)

    # beta~_0 = 0 has no logarithm: the next one stands for it.
    small = np.append(posterior_variance[1], posterior_variance[1:])
    large = np.append(posterior_variance[1], betas[1:])
    return {
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "one_minus_alphas_cumprod_prev": 1 - previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha_bar - 1),
        "posterior_mean_coef1": of_x_start,
        "posterior_mean_coef2": of_x_t,
        "posterior_variance": posterior_variance,
        "fixed_variance": large if fixed_variance == "large" else posterior_variance,
        "fixed_log_variance": np.log(large if fixed_variance == "large" else small),
        "min_log_variance": np.log(small),
        "max_log_variance": np.log(betas),
    }
