"""EDM's preconditioning, loss and samplers against its own formulas and numbers, and against a Gaussian in closed form."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.diffusion.edm import SIGMA_MAX, Edm
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.diffusion.ode import edm_sigmas
from largescale.diffusion.samplers import evaluations, sample
from largescale.errors import ConfigError
from largescale.models.unet import DDPMpp

FOLDER = Path(__file__).parents[1] / "reference"
REFERENCE = {**np.load(FOLDER / "edm.npz"), **np.load(FOLDER / "edm_more.npz")}


def rnd(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


X, NOISE, OUTPUT = rnd("x", 5, 3, 8, 8) * 0.5, rnd("noise", 5, 3, 8, 8), rnd("output", 5, 3, 8, 8)
SIGMA, Y = torch.tensor([0.002, 0.1, 0.5, 5.0, 80.0], dtype=torch.float64), torch.zeros(5, dtype=torch.long)


def test_the_denoiser_matches_edm() -> None:
    """The whole of it: DDPM++ behind the preconditioning, at four noise levels and with labels."""
    model = DDPMpp(input_size=32, in_channels=3, num_classes=10, augment_dim=9).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(rnd(f"model.{name}", *p.shape) * 0.02)
        found = Edm().denoised(
            model, rnd("image", 4, 3, 32, 32), torch.from_numpy(REFERENCE["sigma"]).double(), torch.tensor([0, 3, 7, 9]))
    theirs = torch.from_numpy(REFERENCE["ddpmpp_out"])
    for ours, wanted in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def of_the_reference(x: Tensor, t: Tensor, y: Any) -> Tensor:
    return torch.tanh(x) + t.float()[:, None, None, None] / 10


def test_the_loss_matches_edm() -> None:
    sigma = torch.from_numpy(REFERENCE["loss_sigma"]).double()
    losses = Edm().training_losses(of_the_reference, rnd("x0", 5, 3, 8, 8) * 0.5, sigma, NOISE, Y)
    torch.testing.assert_close(losses.loss, torch.from_numpy(REFERENCE["loss"]), rtol=2e-5, atol=0)


def test_the_sampler_matches_edm() -> None:
    """Theirs keeps x in float64, ours in float32."""
    x_T = rnd("noise", 2, 3, 8, 8)
    ours = sample(Edm(), of_the_reference, x_T, Y[:2], sampler="heun", steps=18, noise=lambda i: x_T)
    torch.testing.assert_close(ours.double(), torch.from_numpy(REFERENCE["heun18"]), rtol=0, atol=1e-4)


def test_the_loss_is_equation_8() -> None:
    """lambda |D - x|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, in float64 as it is written there."""
    edm = Edm()
    losses = edm.training_losses(lambda x, t, y: OUTPUT, X, SIGMA, NOISE, Y)
    sigma = SIGMA[:, None, None, None]
    total = sigma**2 + 0.25
    denoised = 0.25 / total * (X + sigma * NOISE) + sigma * 0.5 / total.sqrt() * OUTPUT
    wanted = (total / (0.5 * sigma) ** 2 * (denoised - X) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses.loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(edm.x_start_weight(SIGMA), (total / (0.5 * sigma) ** 2).flatten())
    assert torch.equal(losses.loss, losses.mse) and not losses.vb.any()


def test_what_the_network_is_given() -> None:
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, t, y))
        return OUTPUT

    Edm().training_losses(model, X, SIGMA, NOISE, Y + 3)
    x, c_noise, y = seen[0]
    torch.testing.assert_close(c_noise, SIGMA.log() / 4)
    scale = (SIGMA**2 + 0.25).rsqrt()[:, None, None, None].float()
    torch.testing.assert_close(x, scale * (X + SIGMA.float()[:, None, None, None] * NOISE))
    assert y.tolist() == [3] * 5


def test_sigma_is_lognormal_in_u() -> None:
    edm = Edm()
    u = torch.tensor([0.5, 0.841344746068543, 0.022750131948179], dtype=torch.float64)  # 0, +1 and -2 standard deviations
    torch.testing.assert_close(edm.draw(u).log(), torch.tensor([-1.2, 0.0, -3.6], dtype=torch.float64))
    torch.testing.assert_close(edm.noise_level(edm.draw(u)), u)
    edges = torch.tensor([i / 20 for i in range(1, 20)], dtype=torch.float64)
    mass = torch.special.ndtr((edm.draw(edges).log() + 1.2) / 1.2).diff()  # of the Gaussian of ln(sigma), in each cluster
    torch.testing.assert_close(mass, torch.full_like(mass, 0.05))


def gaussian_data(mean: float, std: float) -> Any:
    """The exact F for data N(mean, std^2): D = (sigma^2 mean + std^2 x) / (sigma^2 + std^2)."""
    def model(x: Tensor, t: Tensor, y: Any) -> Tensor:
        sigma = (4 * t).exp()[:, None, None, None]
        total = sigma**2 + 0.25
        noisy = x.double() * total.sqrt()
        denoised = (sigma**2 * mean + std**2 * noisy) / (sigma**2 + std**2)
        return ((denoised - 0.25 / total * noisy) / (sigma * 0.5 / total.sqrt())).float()

    return model


@pytest.mark.parametrize("sampler, order, last", [("heun", 2, 0.006), ("euler", 1, 0.08)])
def test_samplers_reach_the_distribution(sampler: str, order: int, last: float) -> None:
    """From x_T the flow of N(mean, std^2) leads to mean + std (80 x_T - mean) / sqrt(80^2 + std^2): closer by 2^order
    with twice the steps."""
    noise = rnd("x_T", 2, 3, 16, 16)
    exact = 0.3 + 0.5 * (SIGMA_MAX * noise - 0.3) / math.hypot(SIGMA_MAX, 0.5)
    errors = []
    for steps in (18, 36, 72):
        found = sample(Edm(), gaussian_data(0.3, 0.5), noise, Y[:2], sampler=sampler, steps=steps, noise=lambda i: noise)  # type: ignore[arg-type]
        errors.append((found - exact).abs().max().item())
    assert errors[-1] < last
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25) and errors[1] / errors[2] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("sampler, steps, evaluated", [("heun", 18, 35), ("euler", 40, 40)])
def test_noise_levels_of_the_paper(sampler: str, steps: int, evaluated: int) -> None:
    sigmas: list[float] = []

    def model(x: Tensor, t: Tensor, y: Any) -> Tensor:
        sigmas.append(math.exp(4 * t[0].item()))
        return torch.zeros_like(x)

    ticks: list[int] = []
    sample(Edm(), model, NOISE, Y, sampler=sampler, steps=steps, noise=lambda i: NOISE, tick=lambda: ticks.append(1))  # type: ignore[arg-type]
    assert len(sigmas) == len(ticks) == evaluated == evaluations(Edm(), sampler, steps)  # type: ignore[arg-type]
    if sampler == "heun":
        np.testing.assert_allclose([sigmas[0], *sigmas[1::2]], REFERENCE["heun18_sigmas"], rtol=1e-9)
    np.testing.assert_allclose(sorted(set(np.round(sigmas, 9)))[::-1], np.round(edm_sigmas(steps), 9), rtol=1e-6)


@pytest.mark.parametrize("sampler", ("heun", "euler"))
@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.3, 0.8), (0.6, 1.0)])
def test_guides_at_the_noise_levels_in_the_interval_only(sampler: Any, interval: tuple[float, float]) -> None:
    seen: set[bool] = set()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        u = Edm().noise_level((4 * t[:1]).exp()).item()
        guided = len(x) == 4
        assert guided == (interval[0] - 1e-9 <= u <= interval[1] + 1e-9), u
        seen.add(guided)
        return 0.1 * x

    guidance = ClassifierFreeGuidance(model, 2.0, null_label=9, interval=interval)
    sample(Edm(), guidance, NOISE[:2], Y[:2], sampler=sampler, steps=12, noise=lambda i: NOISE[:2])
    assert seen == {True, False}


@pytest.mark.parametrize("call, message", [
    (lambda: Edm(p_std=0), "p_std=0"),
    (lambda: Edm(sigma_data=-1), "sigma_data=-1"),
    (lambda: Edm(p_mean=math.nan), "p_mean=nan"),
    (lambda: evaluations(Edm(), "sde", 10), "'sde' for Edm; choose one of heun, euler"),
    (lambda: Edm().training_losses(lambda x, t, y: torch.cat([x, x], 1), X, SIGMA, NOISE, Y), "6 channels for 3-channel .*learn_sigma=False"),
])
def test_bad_values_are_named_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
