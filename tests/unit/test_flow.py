"""Flow matching against SiT's numbers (tests/reference/README.md), and against a distribution known in closed form."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.diffusion.flow import LAST_STEP, Flow
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.diffusion.samplers import evaluations, sample
from largescale.errors import ConfigError
from largescale.models.dit import DiT

FOLDER = Path(__file__).parents[1] / "reference"
REFERENCE = {**np.load(FOLDER / "sit.npz"), **np.load(FOLDER / "sit_more.npz")}
T = torch.from_numpy(REFERENCE["Linear_t"]).double()


def rnd(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


X_START, NOISE, OUTPUT = rnd("x0", 6, 4, 8, 8) * 0.5, rnd("noise", 6, 4, 8, 8), rnd("model_output", 6, 4, 8, 8)
Y = torch.zeros(6, dtype=torch.long)


def close(ours: Tensor, name: str, rtol: float = 1e-5) -> None:
    theirs = torch.from_numpy(REFERENCE[name])
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


PATHS = [("linear", "Linear"), ("gvp", "GVP")]


@pytest.mark.parametrize("interpolant, name", PATHS)
def test_path_and_velocity_match_sit(interpolant: Any, name: str) -> None:
    x_t, velocity = Flow(interpolant).interpolate(X_START, T, NOISE)
    close(x_t, f"{name}_xt", 1e-6)
    close(velocity, f"{name}_ut", 1e-6)


@pytest.mark.parametrize("interpolant, name", PATHS)
def test_loss_matches_sit(interpolant: Any, name: str) -> None:
    seen = []

    def model(x_t: Tensor, t: Tensor, y: Any) -> Tensor:
        seen.append((x_t, t))
        return OUTPUT

    losses = Flow(interpolant).training_losses(model, X_START, T, NOISE, Y)
    close(losses.loss, f"{name}_loss")
    assert torch.equal(losses.loss, losses.mse) and not losses.vb.any()
    close(seen[0][0], f"{name}_xt", 1e-6)
    assert torch.equal(seen[0][1], T)  # SiT's own time reaches the model: 1 = data


@pytest.mark.parametrize("interpolant, name", PATHS)
def test_score_matches_sit(interpolant: Any, name: str) -> None:
    flow = Flow(interpolant)
    sigma = flow.coefficients(T)[1].float()[:, None, None, None]
    close(-flow.noise_of(OUTPUT, torch.from_numpy(REFERENCE[f"{name}_xt"]), T) / sigma, f"{name}_score", 1e-4)


def wanted(x: Tensor, t: Tensor, y: Any) -> Tensor:
    """The velocity that the reference's ODEs were solved with."""
    return -x / 2 + t.float()[:, None, None, None]


@pytest.mark.parametrize("sampler, steps, name", [("euler", 40, "Linear_ode_euler41"), ("heun3", 20, "Linear_ode_heun321")])
def test_ode_matches_sit(sampler: str, steps: int, name: str) -> None:
    noise = rnd("noise", 2, 4, 8, 8)
    ours = sample(Flow(), wanted, noise, Y[:2], sampler=sampler, steps=steps, noise=lambda i: noise)  # type: ignore[arg-type]
    close(ours, name)


@pytest.mark.parametrize("interpolant, name", PATHS)
def test_sde_matches_sit(interpolant: Any, name: str) -> None:
    """With the same noise at every step."""
    x_T = rnd("noise", 2, 4, 8, 8)
    ours = sample(Flow(interpolant), wanted, x_T, Y[:2], sampler="sde", steps=20, noise=lambda i: rnd(f"sde{i}", 2, 4, 8, 8))
    close(ours, f"{name}_sde20")


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_derivatives_and_the_determinant(interpolant: str) -> None:
    flow = Flow(interpolant)  # type: ignore[arg-type]
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = flow.coefficients(t)
    ahead, behind = flow.coefficients(t + 1e-6), flow.coefficients(t - 1e-6)
    torch.testing.assert_close(d_alpha, (ahead[0] - behind[0]) / 2e-6, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_sigma, (ahead[1] - behind[1]) / 2e-6, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha * d_sigma - sigma * d_alpha, torch.full_like(t, flow.determinant))
    ends = flow.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(torch.stack(ends[:2]), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_the_velocity_gives_back_noise_and_the_error_of_x_start(interpolant: str) -> None:
    flow, t = Flow(interpolant), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)  # type: ignore[arg-type]
    x_t, velocity = flow.interpolate(X_START, t, NOISE)
    torch.testing.assert_close(flow.noise_of(velocity, x_t, t), NOISE, rtol=1e-4, atol=1e-5)
    # Another image behind the same x_t is other noise too: its velocity's error is x_start_weight times its own.
    alpha, sigma = (c.float()[:, None, None, None] for c in flow.coefficients(t)[:2])
    other = X_START + 0.1 * OUTPUT
    _, velocity_of_other = flow.interpolate(other, t, (x_t - alpha * other) / sigma)
    ratio = (velocity_of_other - velocity).square().sum((1, 2, 3)) / (other - X_START).square().sum((1, 2, 3))
    torch.testing.assert_close(ratio.double(), flow.x_start_weight(t), rtol=1e-3, atol=0)


def gaussian_data(flow: Flow, mean: float, std: float) -> Any:
    """The exact velocity E[alpha' x + sigma' n | x_t] for data N(mean, std^2)."""
    def model(x: Tensor, t: Tensor, y: Any) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = (c.float()[:, None, None, None] for c in flow.coefficients(t))
        residual = (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
        return d_alpha * (mean + alpha * std**2 * residual) + d_sigma * sigma * residual

    return model


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
@pytest.mark.parametrize("sampler, steps, tolerance", [("euler", 400, 0.01), ("heun", 50, 0.002), ("heun3", 30, 0.002)])
def test_odes_reach_the_distribution(interpolant: str, sampler: str, steps: int, tolerance: float) -> None:
    """The probability flow of a Gaussian is affine: x = mean + std x_T."""
    flow, noise = Flow(interpolant), rnd("noise", 2, 1, 16, 16)  # type: ignore[arg-type]
    found = sample(flow, gaussian_data(flow, 0.3, 0.5), noise, Y[:2], sampler=sampler, steps=steps, noise=lambda i: noise)  # type: ignore[arg-type]
    torch.testing.assert_close(found, 0.3 + 0.5 * noise, rtol=0, atol=tolerance)


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_the_sde_reaches_the_distribution(interpolant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    flow, x_T = Flow(interpolant), torch.randn(2, 1, 128, 128, generator=generator)  # type: ignore[arg-type]
    asked: list[int] = []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.randn(2, 1, 128, 128, generator=generator)

    found = sample(flow, gaussian_data(flow, 0.3, 0.5), x_T, Y[:2], sampler="sde", steps=250, noise=noise)
    assert asked == list(range(249))
    # The last step, of LAST_STEP, adds no noise, which leaves the spread a little small: as in SiT.
    assert found.mean().item() == pytest.approx(0.3, abs=0.015) and found.std().item() == pytest.approx(0.5, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([found.flatten(), x_T.flatten()]))[0, 1].item()) < 0.7  # noise was really added


def test_an_sde_step_by_hand() -> None:
    """Two times: one step of Euler-Maruyama from t = 0, where the diffusion coefficient sigma is 1, and the last one."""
    flow, x, z = Flow(), rnd("noise", 2, 4, 8, 8), rnd("z", 2, 4, 8, 8)
    found = sample(flow, wanted, x, Y[:2], sampler="sde", steps=2, noise=lambda i: z)
    h = 1 - LAST_STEP
    first = x + h * (-x / 2 - x) + math.sqrt(2 * h) * z         # at t = 0 the noise is all of x
    velocity = -first / 2 + h
    torch.testing.assert_close(found, first + LAST_STEP * (velocity - (first - h * velocity)))


@pytest.mark.parametrize("sampler, per_step", [("sde", 1), ("euler", 1), ("heun", 2), ("heun3", 3)])
def test_evaluations_are_told_and_ticked(sampler: str, per_step: int) -> None:
    told: list[str] = []

    def model(x: Tensor, t: Tensor, y: Any) -> Tensor:
        told.append("model")
        assert t.dtype == torch.float64 and 0 <= t[0] <= 1
        return x

    sample(Flow(), model, NOISE, Y, sampler=sampler, steps=5, noise=lambda i: NOISE, tick=lambda: told.append("tick"))  # type: ignore[arg-type]
    assert told == ["model", "tick"] * (5 * per_step) and evaluations(Flow(), sampler, 5) == 5 * per_step  # type: ignore[arg-type]


def test_released_sit_has_channels_that_nobody_uses() -> None:
    """DiT's names and shapes; the model's second half of channels is dropped."""
    model = DiT(patch_size=4, hidden_size=32, depth=1, num_heads=2, input_size=8, num_classes=10, learn_sigma=True)
    model.load_state_dict({name: rnd(name, *p.shape) * 0.02 for name, p in model.state_dict().items()})
    flow, y = Flow(learn_sigma=True), torch.zeros(6, dtype=torch.long)
    loss = flow.training_losses(model, X_START, T, NOISE, y).loss
    with torch.no_grad():  # the rows of the last layer that make those channels: (p, q, channel)
        model.final_layer.linear.weight.unflatten(0, (16, 8))[:, 4:] += 1
    assert torch.equal(flow.training_losses(model, X_START, T, NOISE, y).loss, loss)
    with torch.no_grad():
        model.final_layer.linear.weight.unflatten(0, (16, 8))[:, :4] += 1
    assert not torch.equal(flow.training_losses(model, X_START, T, NOISE, y).loss, loss)
    with pytest.raises(ConfigError, match="8 channels for 4-channel images with learn_sigma=False"):
        Flow().training_losses(model, X_START, T, NOISE, y)


@pytest.mark.parametrize("sampler", ("sde", "euler", "heun", "heun3"))
@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.3, 0.8), (0.6, 1.0)])
def test_guides_at_the_noise_levels_in_the_interval_only(sampler: Any, interval: tuple[float, float]) -> None:
    seen: set[bool] = set()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        u = 1 - t[0].item()
        guided = len(x) == 4
        assert guided == (interval[0] - 1e-9 <= u <= interval[1] + 1e-9), u
        seen.add(guided)
        return 0.1 * x

    guidance = ClassifierFreeGuidance(model, 2.0, null_label=9, interval=interval)
    sample(Flow(), guidance, NOISE[:2], Y[:2], sampler=sampler, steps=12, noise=lambda i: NOISE[:2])
    assert seen == {True, False}


@pytest.mark.parametrize("call, message", [
    (lambda: Flow("cubic"), "'cubic'; choose one of linear, gvp"),  # type: ignore[arg-type]
    (lambda: evaluations(Flow(), "ddpm", 10), "'ddpm' for Flow; choose one of sde, euler, heun, heun3"),
    (lambda: evaluations(Flow(), "sde", 1), "steps=1 must be a count of 2 or more"),
    (lambda: evaluations(Flow(), "sde", "ddim50"), "steps='ddim50' must be a count"),
    (lambda: sample(Flow(), wanted, NOISE, Y, sampler="euler", steps=2, noise=lambda i: NOISE, clip_denoised=True),
     "clip_denoised=True is no setting of Flow; leave it off"),
])
def test_bad_values_are_named_with_a_remedy(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
