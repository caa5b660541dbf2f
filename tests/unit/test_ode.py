"""Solvers against SiT's and EDM's own numbers, and against equations whose solutions are known in closed form."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.diffusion.ode import edm_sigmas, euler, heun, heun3
from largescale.errors import ConfigError

REFERENCE = Path(__file__).parents[1] / "reference"
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(zlib.crc32(b"noise")))


def velocity(x, time):
    return -x / 2 + time


@pytest.mark.parametrize("solver, points, key", [(euler, 41, "Linear_ode_euler41"), (heun3, 21, "Linear_ode_heun321")])
def test_matches_sits_ode_sampler(solver, points, key):
    theirs = torch.from_numpy(np.load(REFERENCE / "sit.npz")[key])
    ours = solver(velocity, X, torch.linspace(0, 1, points).tolist())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_edm_sigmas_match_edms():
    np.testing.assert_allclose(edm_sigmas(18), np.load(REFERENCE / "edm.npz")["heun18_sigmas"], rtol=1e-14)


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2), (heun3, 3)])
def test_the_observed_order_on_a_closed_form(solver, order):
    """dx/dt = -x/2 + t backwards from 1 to 0, over uneven times: x = 2t - 4 + (x_1 + 2) exp((1 - t) / 2)."""
    exact = -4 + (X.double() + 2) * math.exp(1 / 2)
    errors = [(solver(velocity, X.double(), np.linspace(1, 0, n + 1) ** 2) - exact).abs().max().item()
              for n in (20, 40, 80)]
    assert np.log2(errors[:-1]) - np.log2(errors[1:]) == pytest.approx([order] * 2, abs=0.1)


STD = 0.5


def eps(x, sigma):
    """dx/dsigma for data of N(0, STD ** 2); its solution is x = c sqrt(sigma ** 2 + STD ** 2)."""
    assert sigma > 0
    return x * sigma / (sigma**2 + STD**2)


@pytest.mark.parametrize("solver, order, least", [(euler, 1, 0.08), (heun, 2, 0.03)])
def test_edms_sampler_brings_noise_to_data(solver, order, least):
    x = X.double() * math.hypot(80, STD)
    last = {"euler_last": True} if solver is heun else {}
    errors = [(solver(eps, x, [*edm_sigmas(n), 0.0], **last) / X - STD).abs().max().item() for n in (18, 36, 72)]
    assert errors[0] < least
    assert np.log2(errors[:-1]) - np.log2(errors[1:]) == pytest.approx([order] * 2, abs=0.35)


@pytest.mark.parametrize("solver, asked", [
    (euler, [3.0, 1.0, 0.25]), (heun, [3.0, 1.0, 1.0, 0.25, 0.25, 0.0]), (heun3, 9),
    (lambda *a: heun(*a, euler_last=True), [3.0, 1.0, 1.0, 0.25, 0.25]),
])
def test_the_derivative_is_asked_at_the_times_themselves_as_floats(solver, asked):
    seen = []
    x = solver(lambda x, time: seen.append(time) or torch.ones_like(x).bfloat16(), X, np.array([3.0, 1.0, 0.25, 0.0]))
    assert {type(time) for time in seen} == {float}
    assert len(seen) == 9 if asked == 9 else seen == asked
    assert x.dtype == torch.float32                            # a half-precision derivative, and float64 times
    torch.testing.assert_close(x, X - 3)


@pytest.mark.parametrize("solver", [euler, heun, heun3])
def test_one_time_is_no_step(solver):
    assert torch.equal(solver(eps, X, [1.0]), X)


def test_edm_sigmas_take_their_parameters():
    sigmas = edm_sigmas(5, sigma_min=0.1, sigma_max=10, rho=1)
    assert sigmas.dtype == np.float64 and sigmas == pytest.approx(np.linspace(10, 0.1, 5))
    assert edm_sigmas(1).tolist() == pytest.approx([80])
    assert edm_sigmas(2).tolist() == pytest.approx([80, 0.002])


@pytest.mark.parametrize("settings, message", [
    ({"steps": 0}, "steps=0"), ({"steps": 8, "sigma_min": 0}, "sigma_min=0,"), ({"steps": 8, "rho": 0}, "rho=0"),
    ({"steps": 8, "sigma_max": 0.001}, "sigma_max=0.001"), ({"steps": 8, "sigma_max": math.inf}, "sigma_max=inf"),
    ({"steps": 8, "rho": math.nan}, "rho=nan"),
])
def test_bad_values_are_named_with_a_remedy(settings, message):
    with pytest.raises(ConfigError, match=f"{message}.* use"):
        edm_sigmas(**settings)
