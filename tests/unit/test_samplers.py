"""Samplers against guided-diffusion's step, and against a distribution whose best denoiser is known in closed form."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.samplers import ddim_step, ddpm_step, sample
from largescale.diffusion.schedule import SCHEDULES, alphas_cumprod, make_betas, space_timesteps
from largescale.errors import ConfigError

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "gaussian_diffusion.npz")
T_REF = torch.tensor([0, 1, 10, 250, 500, 750, 998, 999])


def rnd(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


NOISE, OUTPUT, Y = rnd("noise", 8, 4, 8, 8), rnd("model_output", 8, 8, 8, 8), torch.zeros(8, dtype=torch.int64)


def make(schedule="cosine", learn_sigma=True):
    return GaussianDiffusion(make_betas(schedule, 1000), learn_sigma=learn_sigma)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_step_matches_guided_diffusion(schedule):
    mean, std = ddim_step(make(schedule), OUTPUT, NOISE, T_REF)
    assert not std.any()
    for ours, theirs in zip(mean, torch.from_numpy(REFERENCE[f"{schedule}_ddim_sample"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_step_matches_guided_diffusion(schedule):
    mean, std = ddpm_step(make(schedule), OUTPUT, NOISE, T_REF)
    for ours, theirs in zip(mean, torch.from_numpy(REFERENCE[f"{schedule}_p_mean"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    variance = torch.from_numpy(REFERENCE[f"{schedule}_p_variance"])
    assert not std[0].any()
    torch.testing.assert_close(std[1:] ** 2, variance[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_ddim_with_eta_one_is_ddpm_with_the_small_variance(schedule, steps):
    respaced = make(schedule, learn_sigma=False).respaced(np.linspace(0, 999, steps).round().astype(np.int64))
    t = torch.arange(1, steps)
    x_t, eps = rnd("x_t", steps - 1, 1, 4, 4), rnd("eps", steps - 1, 1, 4, 4)
    ddim_mean, ddim_std = ddim_step(respaced, eps, x_t, t, eta=1.0)
    ddpm_mean, ddpm_std = ddpm_step(respaced, eps, x_t, t)
    torch.testing.assert_close(ddim_std.expand_as(x_t), ddpm_std, rtol=1e-4, atol=0)
    for ours, theirs in zip(ddim_mean, ddpm_mean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


MEAN, STD = 0.3, 0.5


def best_denoiser(schedule, seen):
    """E[noise | x_t] where every pixel of x_start is N(MEAN, STD ** 2)."""
    alpha_bar = torch.from_numpy(alphas_cumprod(make_betas(schedule, 1000)))

    def model(x_t, t, y):
        seen.append(t[0].item())
        a = alpha_bar[t][:, None, None, None]
        return ((1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)).float()

    return model


def expected_mean_and_std(schedule, steps, eta):
    """Of x_0 in exact arithmetic: with that denoiser a DDIM step (eq. 12) is affine; DDPM is eta = 1."""
    kept_alpha_bar = alphas_cumprod(make_betas(schedule, 1000))[space_timesteps(1000, steps)]
    mean, variance = 0.0, 1.0
    for a, a_prev in zip(kept_alpha_bar[::-1], [*kept_alpha_bar[-2::-1], 1.0], strict=True):
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x_t = np.array([0.0, 1.0])                                       # where the affine map sends 0 and 1
        eps = np.sqrt(1 - a) * (x_t - np.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)
        low, high = np.sqrt(a_prev / a) * (x_t - np.sqrt(1 - a) * eps) + np.sqrt(1 - a_prev - sigma**2) * eps
        mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + sigma**2
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, steps, eta", [("ddpm", 250, 0.0), ("ddim", 50, 0.0), ("ddim", 50, 0.5),
                                                 ("ddim", 50, 1.0), ("ddim", "ddim50", 0.0)])
def test_samples_have_the_distribution_of_the_data(schedule, sampler, steps, eta):
    seen, asked = [], []
    generator = torch.Generator().manual_seed(0)

    def noise(i):
        asked.append(i)
        return torch.randn(8, 1, 64, 64, generator=generator)

    count = int(str(steps).removeprefix("ddim"))
    x_0 = sample(make(schedule, learn_sigma=False), best_denoiser(schedule, seen), noise(-1), Y,
                 sampler=sampler, steps=steps, noise=noise, eta=eta)
    mean, std = expected_mean_and_std(schedule, steps, 1.0 if sampler == "ddpm" else eta)
    discretization = 0.03 if count == 250 else 0.06 if eta == 0 else 0.12
    assert (mean, std) == (pytest.approx(MEAN, abs=0.01), pytest.approx(STD, rel=discretization))
    assert x_0.mean().item() == pytest.approx(mean, abs=0.01)            # 32768 pixels: standard errors 0.003, 0.002
    assert x_0.std().item() == pytest.approx(std, abs=0.008)
    assert len(seen) == count and seen == sorted(seen, reverse=True) and seen[-1] == 0
    assert seen[0] == (980 if steps == "ddim50" else 999)                # the model sees original timesteps
    assert asked == [-1] + list(range(count - 1)) * (sampler == "ddpm" or eta > 0)  # and no noise enters x_0


def test_sampling_builds_no_graph_and_can_clip():
    weight = torch.ones(1, requires_grad=True)
    x_0 = sample(make(), lambda x_t, t, y: OUTPUT * weight, NOISE, Y, sampler="ddpm", steps=5,
                 noise=lambda i: NOISE, clip_denoised=True)
    assert not x_0.requires_grad
    assert x_0.abs().max() <= 1


@pytest.mark.parametrize("change, message", [
    ({"sampler": "euler"}, "'euler'"), ({"eta": 1.5}, "eta=1.5"), ({"sampler": "ddpm", "eta": 0.5}, "eta=0.5"),
    ({"steps": 1001}, "1001 steps"),
])
def test_bad_values_are_named_with_a_remedy(change, message):
    settings = {"sampler": "ddim", "steps": 2, "noise": lambda i: NOISE} | change
    with pytest.raises(ConfigError, match=message):
        sample(make(), lambda x_t, t, y: OUTPUT, NOISE, Y, **settings)
