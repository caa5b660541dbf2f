"""The relative entropy of neighbouring noise levels, against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.difficulty_study.relative_entropy import (
    RelativeEntropy,
    noise_levels,
    one_kernel,
    relative_entropy,
)
from largescale.config.schema import Config, DiffusionConfig
from largescale.diffusion.build import build_objective
from largescale.errors import DataError, Stopped

FAMILIES = {
    "ddpm cosine": DiffusionConfig(),
    "ddpm linear": DiffusionConfig(schedule="linear"),
    "flow": DiffusionConfig(objective="flow"),
    "flow gvp": DiffusionConfig(objective="flow", interpolant="gvp"),
    "edm": DiffusionConfig(objective="edm"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def gaussian(points: int, width: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """Points of N(mean, std^2 I) whose sample has that mean and covariance exactly."""
    x = torch.randn(points, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / points)
    return (torch.linalg.solve_triangular(root, x.T, upper=False).T * std + mean).float()


def levels_of(diffusion: DiffusionConfig) -> np.ndarray:
    return noise_levels(build_objective(Config("x", diffusion=diffusion)), diffusion.timesteps)


def pairs(family: str, chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The levels before the chosen timesteps, and theirs."""
    levels = levels_of(FAMILIES[family])
    return levels[np.array(chosen) - 1], levels[chosen]


def truth(p: np.ndarray, q: np.ndarray, width: int, std: float, mean: float = 0.0) -> np.ndarray:
    """Between N(a m, (a^2 s^2 + sigma^2) I) of both levels."""
    of_p, of_q = ((levels[:, 0] * std) ** 2 + levels[:, 1] ** 2 for levels in (p, q))
    away = (p[:, 0] - q[:, 0]) ** 2 * mean**2
    return width / 2 * (of_p / of_q - 1 - np.log(of_p / of_q) + away / of_q)


def both(values: RelativeEntropy) -> np.ndarray:
    return np.stack([values.value, values.error, values.plain, values.kernels, values.single])


@pytest.mark.parametrize(("family", "std", "mean", "chosen"), [
    ("ddpm cosine", 0.5, 0.0, [300, 500, 700, 900]),
    ("ddpm cosine", 0.5, 0.7, [300, 500, 700, 900]),    # a mean that moves with alpha
    ("ddpm linear", 0.5, 0.3, [150, 300, 600, 900]),
    ("flow", 1.0, 0.2, [600, 700, 800, 950]),
    ("flow gvp", 0.3, 0.1, [250, 400, 600, 900]),
    ("edm", 0.5, 0.0, [800, 900, 950, 990]),
    ("edm", 0.5, 3.0, [800, 900, 950, 990]),            # a mean that does not: alpha is 1
])
def test_gaussian_data(family: str, std: float, mean: float, chosen: list[int]) -> None:
    """In 4 dimensions 4,000 points lie densely enough: within four standard errors, and 3 % for their being finite."""
    p, q = pairs(family, chosen)
    found = relative_entropy(gaussian(4000, 4, std, mean), p, q, samples=1000)
    expected = truth(p, q, 4, std, mean)
    assert (found.error < 0.12 * expected).all() and not found.biased.any()
    assert (np.abs(found.value - expected) < 4 * found.error + 0.03 * expected).all(), found.value / expected
    assert (np.abs(found.plain - expected) < 4 * found.plain_error).all()
    assert (found.value < found.single).all()


def test_the_errors_are_true() -> None:
    """Over other draws, value and plain scatter as much as they say; the control variates pay, and move nothing."""
    data = gaussian(500, 3, 0.5)
    p, q = pairs("ddpm cosine", [60, 400, 800])
    many = [relative_entropy(data, p, q, samples=100, seed=seed) for seed in range(60)]
    for name in ("value", "plain"):
        values, errors = (np.stack([getattr(one, key) for one in many]) for key in (name, "error" if name == "value" else "plain_error"))
        assert np.std(values, axis=0, ddof=1) == pytest.approx(np.sqrt(np.square(errors).mean(0)), rel=0.35)
    value, plain = (np.stack([getattr(one, key) for one in many]) for key in ("value", "plain"))
    of_difference = np.std(plain - value, axis=0, ddof=1) / math.sqrt(60)
    assert (np.abs((plain - value).mean(0)) < 4 * of_difference).all()
    assert (value.std(0) < 0.2 * plain.std(0)).all()


def test_of_two_points() -> None:
    """One dimension, two points: against the integral of p ln(p / q)."""
    data, p, q = torch.tensor([[-1.0], [1.0]]), np.array([[0.9, 0.6]]), np.array([[0.7, 0.9]])
    x = np.linspace(-12, 12, 200_001)

    def density(alpha: float, sigma: float) -> np.ndarray:
        return sum(np.exp(-((x - alpha * m) ** 2) / (2 * sigma**2)) for m in (-1, 1)) / 2 / sigma / math.sqrt(2 * math.pi)

    of_p, of_q = density(*p[0]), density(*q[0])
    expected = (of_p * np.log(of_p / of_q)).sum() * (x[1] - x[0])
    found = relative_entropy(data, p, q, samples=20_000)
    assert abs(found.value[0] - expected) < 4 * found.error[0] < 0.1 * expected
    share = np.exp(-((x - 0.9) ** 2) / (2 * 0.36)) / 2 / 0.6 / math.sqrt(2 * math.pi) / of_p
    entropy = -sum(of_p * s * np.log(np.maximum(s, 1e-300)) for s in (share, 1 - share)).sum() * (x[1] - x[0])
    assert found.kernels[0] == pytest.approx(math.exp(entropy), rel=0.01)


def test_shift() -> None:
    """Where alpha is 1, where the data lie does not matter; where it is not, it does."""
    data = gaussian(800, 3, 0.5)
    for family, same in (("edm", True), ("flow", False)):
        p, q = pairs(family, [500, 900])
        here, there = (relative_entropy(data.double() + shift, p, q, samples=200) for shift in (0, 1000))
        assert (both(here) == pytest.approx(both(there), rel=1e-5)) == same


def test_chunks_change_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the samples, of the data, and a part of the samples has the same draws."""
    data = gaussian(700, 5)
    p, q = pairs("ddpm cosine", [100, 500, 900])
    whole = relative_entropy(data, p, q, samples=90)
    for chunk in (1, 5000, 50_000):
        assert both(relative_entropy(data, p, q, samples=90, chunk=chunk)) == pytest.approx(both(whole), rel=1e-9)
    monkeypatch.setattr("eval.difficulty_study.relative_entropy.CHUNK", 100)
    assert both(relative_entropy(data, p, q, samples=90, chunk=10**6)) == pytest.approx(both(whole), rel=1e-9)
    one = relative_entropy(data, p[1:2], q[1:2], samples=90)
    assert both(one)[:, 0] == pytest.approx(both(whole)[:, 1], rel=1e-12)
    assert relative_entropy(data, p, q, samples=90, seed=1).value != pytest.approx(whole.value, rel=1e-6)


def test_images_far_apart() -> None:
    """3,072 pixels, 300 images: each sample has one kernel, the value is that of one kernel, exactly, and it is said."""
    data = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    p, q = pairs("ddpm cosine", [1, 2, 10, 100, 400])
    found = relative_entropy(data, p, q, samples=50)
    assert found.degenerate.all() and found.biased.all()
    assert found.kernels == pytest.approx(1, abs=1e-6)
    assert found.value == pytest.approx(found.single, rel=1e-7) and (found.error < 1e-6 * found.value).all()
    # by hand, of the mean of each pixel's D_KL: at t = 1, where sigma is least
    (a, s), (b, r) = p[0], q[0]
    by_hand = 3072 * (math.log(r / s) + s**2 / (2 * r**2) - 0.5) + (a - b) ** 2 * data.double().square().sum() / 300 / (2 * r**2)
    assert found.value[0] == pytest.approx(float(by_hand), rel=1e-9)
    assert one_kernel(p, q, 3072, 5.0)[0] < one_kernel(p, q, 3072, 50.0)[0] < one_kernel(p, q, 6144, 50.0)[0]


def test_the_explosion_is_marked() -> None:
    """As noise falls: sound, then biased upwards, then one kernel's: far above the truth, which the flags say."""
    data, p, q = gaussian(1000, 8, 0.5), *pairs("edm", [950, 500, 400, 100, 20])
    found = relative_entropy(data, p, q, samples=300)
    times = found.value / truth(p, q, 8, 0.5)
    assert found.biased.tolist() == [False, True, True, True, True]
    assert found.degenerate.tolist() == [False, False, False, True, True]
    assert times[0] == pytest.approx(1, abs=0.2) and (np.diff(times) > 0).all() and times[3] > 50
    assert (np.diff(found.kernels) < 0).all() and found.value[4] == pytest.approx(found.single[4], rel=0.02)


def test_float64_is_needed() -> None:
    """Stored as float32, images are computed with in float64: far from 0 and with little noise, float32's own squares
    would be off by more than the variance that they are divided by."""
    data = gaussian(300, 8, 0.5) + 100
    p, q = pairs("edm", [5, 100, 500])
    found = relative_entropy(data, p, q, samples=20)
    assert both(found) == pytest.approx(both(relative_entropy(data.double(), p, q, samples=20)), rel=1e-12)
    rounding = (data.square().sum(1).double() - data.double().square().sum(1)).abs().max().item()
    assert rounding > 10 * p[0, 1] ** 2


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_levels(family: str) -> None:
    """T of them, rising; alpha^2 + sigma^2 = 1 where that is so; the medians are known."""
    config = FAMILIES[family]
    alpha, sigma = levels_of(config).T
    assert len(alpha) == 1000 and (np.diff(sigma / alpha) > 0).all() and (sigma > 0).all()
    if config.objective == "gaussian" or config.interpolant == "gvp":
        assert alpha**2 + sigma**2 == pytest.approx(1)
    middle = (alpha[499:501].mean(), sigma[499:501].mean())
    if config.objective == "flow":
        assert middle == pytest.approx((0.5, 0.5) if config.interpolant == "linear" else (math.sqrt(0.5),) * 2, abs=1e-6)
    if config.objective == "edm":
        assert middle == pytest.approx((1, math.exp(-1.2)), abs=1e-3)
        assert math.log(sigma[841]) == pytest.approx(-1.2 + 1.2, abs=0.01)  # 84.1 % lie below one standard deviation


def test_bad_input() -> None:
    data, (p, q) = gaussian(10, 2), pairs("edm", [500])
    with pytest.raises(DataError, match="of 1 images by 9 samples"):
        relative_entropy(data[:1], p, q, samples=9)
    with pytest.raises(DataError, match="by 1 samples"):
        relative_entropy(data, p, q, samples=1)
    with pytest.raises(DataError, match="not finite"):
        relative_entropy(data * math.inf, p, q, samples=9)
    with pytest.raises(DataError, match="sigma is 0.0 at a noise level"):
        relative_entropy(data, p * [[1, 0]], q, samples=9)


def test_progress_and_stop() -> None:
    data, (p, q) = gaussian(100, 2), pairs("edm", [300, 500, 700])
    shares: list[float] = []
    relative_entropy(data, p, q, samples=10, chunk=300, progress=shares.append)
    assert sum(shares) == pytest.approx(1) and len(shares) == 3 * 4
    with pytest.raises(Stopped):
        relative_entropy(data, p, q, samples=10, progress=shares.append, stop=lambda: len(shares) > 13)
    assert len(shares) == 14
