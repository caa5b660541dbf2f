"""The functions that other people's loops take from the curriculum, against what this trainer does itself."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.curriculum import logit_normal, sigma, timesteps, uniform_clusters
from largescale.diffusion.edm import Edm
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.noise_densities import LogitNormal
from largescale.errors import ConfigError
from largescale.noise_schedule import make_betas

EDGES = uniform_clusters(20)
V = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def each_kind(function: Callable[[Any], Any], u: torch.Tensor) -> list[np.ndarray]:
    """What it makes of a tensor, of an array and of floats."""
    of_tensor, of_array = function(u), function(u.numpy())
    assert isinstance(of_tensor, torch.Tensor) and isinstance(of_array, np.ndarray)
    of_floats = [function(value) for value in u.tolist()]
    assert all(isinstance(value, float | np.int64) for value in of_floats)
    return [of_tensor.numpy(), of_array, np.array(of_floats)]


@pytest.mark.parametrize("low", EDGES[:-1])
def test_timesteps_are_those_that_gaussian_diffusion_draws(low: float) -> None:
    trained = GaussianDiffusion(make_betas("cosine", 1000), learn_sigma=False).draw(V, low, 1.0).numpy()
    for ours in each_kind(lambda u: timesteps(u, 1000), low + V * (1 - low)):
        assert ours.dtype == np.int64 and (ours == trained).all()


def test_timesteps_end_below_T() -> None:
    assert timesteps(1.0, 1000) == timesteps(math.nextafter(1, 0), 1000) == 999 and timesteps(0, 1000) == 0
    in_half_precision = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float16)
    assert timesteps(in_half_precision, 1000).tolist() == [0, 250, 999]
    alphas = np.linspace(1, 0, 1000)
    assert alphas[timesteps(0.5, 1000)] == alphas[500]  # an index


@pytest.mark.parametrize("p_mean, p_std", [(-1.2, 1.2), (-0.4, 1.0)])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.95, 1.0), (0.0, 0.05)])
def test_sigma_is_edms(low: float, high: float, p_mean: float, p_std: float) -> None:
    trained = Edm(p_mean, p_std).draw(V, low, high).numpy()
    for ours in each_kind(lambda u: sigma(u, p_mean, p_std), low + V * (high - low)):
        np.testing.assert_allclose(ours, trained, rtol=1e-12)


def test_sigma_of_the_ends_is_finite() -> None:
    for dtype in (torch.float64, torch.float32):
        ends = sigma(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
        assert ends.dtype == dtype and 0 < ends[0] < 1e-4 and ends[2] < 1e4 and ends.isfinite().all()
        assert ends[1].item() == pytest.approx(math.exp(-1.2))
    assert sigma(0.0) > 0 and sigma(1) < 1e4


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.7)])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), *((low, 1.0) for low in EDGES[1:-1]), (0.0, 0.05), (0.3, 0.35)])
def test_logit_normal_levels_are_those_of_this_trainer(low: float, high: float, mean: float, std: float) -> None:
    bent, _ = LogitNormal(mean, std).warp(V, low, high)
    trained = (low + bent * (high - low)).numpy()
    for ours in each_kind(lambda v: logit_normal(v, low, high, mean, std), V):
        np.testing.assert_allclose(ours, trained, rtol=1e-8)
        assert (ours >= low).all() and (ours < high).all()


def test_logit_normal_levels_without_a_curriculum_are_sd3s() -> None:
    """eq. 19: the logistic function of a normal number."""
    u = np.sort(logit_normal(np.random.default_rng(0).random(20_000)))
    normal = np.sort(np.random.default_rng(1).normal(size=20_000))
    assert np.abs(u - 1 / (1 + np.exp(-normal))).max() < 0.02
    assert logit_normal(0.5) == pytest.approx(0.5) and 0 < logit_normal(0.0) < logit_normal(1.0) < 1


def test_a_density_without_mass_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardly any noise level of mean=-5, std=0.1 lies in \[0.95, 1.0\); take fewer clusters"):
        logit_normal(random.random(), 0.95, 1.0, mean=-5, std=0.1)


def test_the_lines_of_the_page_run_as_printed() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/curriculum.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert (scope["low"], scope["high"]) == (0.95, 1) and scope["t"].min() >= 950 and scope["saved"]["observations"] == 1
