"""Schedules and respacing against guided-diffusion's numbers (tests/reference/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from largescale.errors import ConfigError
from largescale.noise_schedule import (
    SCHEDULES,
    alphas_cumprod,
    log_snr,
    make_betas,
    respaced_betas,
    space_timesteps,
)

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "gaussian_diffusion.npz")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_matches_guided_diffusion(schedule):
    betas = make_betas(schedule, 1000)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, REFERENCE[f"{schedule}_betas"], rtol=1e-12)
    np.testing.assert_allclose(alphas_cumprod(betas), REFERENCE[f"{schedule}_alphas_cumprod"], rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spec", [10, 50, 250, "250", "ddim50"])
def test_respacing_matches_guided_diffusion(schedule, spec):
    kept = space_timesteps(1000, spec)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, REFERENCE[f"{schedule}_respaced_{spec}_timesteps"])
    betas = respaced_betas(make_betas(schedule, 1000), kept)
    np.testing.assert_allclose(betas, REFERENCE[f"{schedule}_respaced_{spec}_betas"], rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_snr_falls_as_t_rises(schedule):
    snr = log_snr(make_betas(schedule, 1000))
    assert (np.diff(snr) < 0).all()
    assert snr[0] > 9 and snr[-1] < -10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spec", [1, 2, 3, 27, 999, 1000, "ddim1000", "ddim2"])
def test_respacing_keeps_snr_and_order(schedule, spec):
    betas, kept = make_betas(schedule, 1000), space_timesteps(1000, spec)
    assert len(kept) == int(str(spec).removeprefix("ddim")) and kept[0] == 0 and kept[-1] < 1000
    assert (np.diff(kept) > 0).all()
    if isinstance(spec, int) and spec > 1:
        assert kept[-1] == 999                                           # sampling starts at the most noise
    np.testing.assert_allclose(alphas_cumprod(respaced_betas(betas, kept)), alphas_cumprod(betas)[kept], rtol=1e-6)


def test_linear_is_scaled_so_that_another_length_ends_at_about_the_same_snr():
    assert abs(log_snr(make_betas("linear", 100))[-1] - log_snr(make_betas("linear", 1000))[-1]) < 1


@pytest.mark.parametrize("make, message", [
    (lambda: make_betas("sigmoid", 1000), "'sigmoid'; choose one of linear, cosine"),
    (lambda: make_betas("linear", 20), "beta=1 with 20 timesteps; use more than 20"),
    (lambda: make_betas("cosine", 1), "at least 2 timesteps, got 1"),
    (lambda: space_timesteps(1000, 1001), "1001 steps; use a count from 1 to 1000"),
    (lambda: space_timesteps(1000, 0), "0 steps"),
    (lambda: space_timesteps(1000, "fast"), "'fast' steps"),
    (lambda: space_timesteps(1000, "ddim300"), 'no integer stride keeps 300 of 1000 timesteps; use "300"'),
])
def test_bad_values_are_named_with_a_remedy(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
