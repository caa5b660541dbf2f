"""Each sampler's density against its paper's formula. v is stratified, not random: counts are exact to one sample."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.config.schema import NoiseConfig
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.noise_densities import (
    Beta,
    CosineMap,
    Laplace,
    LogitNormal,
    Mode,
    Shifted,
    Uniform,
)
from largescale.diffusion.noise_levels import (
    NOISE_SAMPLERS,
    LossSecondMoment,
    SpeeD,
    make_noise_sampler,
)
from largescale.diffusion.noise_sampler import NoiseSampler
from largescale.errors import CheckpointError, ConfigError
from largescale.noise_schedule import alphas_cumprod, log_snr, make_betas
from tests.waits import Functions, Operations

N = 200_000
V = (torch.arange(N, dtype=torch.float64) + 0.5) / N
INTERVALS = [(0.0, 1.0), (0.95, 1.0), (0.0, 0.05), (0.3, 0.62), (0.4567, 0.5001)]  # the last two cut bins of 1/16
FEW = V[::100].contiguous()
ENDS = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
COSINE = GaussianDiffusion(make_betas("cosine", 1000), learn_sigma=False)
LINEAR_FLOW = 2 * np.log(1 / ((np.arange(1000) + 0.5) / 1000) - 1)                     # log SNR: x_t = (1 - u) x + u noise


def drawn(sampler: NoiseSampler, low: float, high: float, v: Tensor = V) -> tuple[np.ndarray, np.ndarray]:
    """u and importance."""
    bent, importance = sampler.warp(v, low, high)
    assert bent.dtype == torch.float64 and importance.dtype == torch.float32 and bent.shape == importance.shape == v.shape
    return (low + bent * (high - low)).numpy(), importance.numpy()


def warm(n_bins: int = 16, seed: int = 0) -> LossSecondMoment:
    sampler = LossSecondMoment(n_bins)
    random = np.random.default_rng(seed)
    bins = np.repeat(np.arange(n_bins), 13)
    random.shuffle(bins)
    sampler.observe(bins.tolist(), ((0.5 + random.random(len(bins))) * np.exp(-6 * bins / n_bins)).tolist())
    return sampler


def every() -> list[NoiseSampler]:
    return [
        *(make_noise_sampler(NoiseConfig(sampling=name, beta_alpha=2.0, beta_beta=0.7), Flow(), 1000) for name in NOISE_SAMPLERS),
        LogitNormal(-1.2, 0.4), LogitNormal(3.0, 0.02), LogitNormal(0.0, 50.0), warm(), warm(1000), SpeeD(LINEAR_FLOW, 100.0),
        Beta(1e-3, 1e-3), Beta(1e4, 3.0), Mode(-1.0), Mode(1.7519), Shifted(Beta(0.1, 50.0), 30.0), Shifted(Uniform(), 1e-2),
        *(Laplace(objective, mu, b) for objective in (COSINE, Edm(), Flow("gvp")) for mu, b in [(0.0, 0.5), (-30.0, 1e-3), (8.0, 1e3)]),
        *(CosineMap(objective) for objective in (COSINE, Edm(), Flow("gvp"))),
    ]


@pytest.mark.parametrize("low, high", INTERVALS)
def test_v_stays_in_the_open_interval_and_in_order(low: float, high: float) -> None:
    v = torch.cat([ENDS[:1], V[::100], ENDS[1:]])
    for sampler in every():
        bent, importance = sampler.warp(v, low, high)
        assert bent.min() > 0 and bent.max() < 1 and (bent.diff() >= 0).all(), sampler.name
        assert torch.isfinite(importance).all() and (importance > 0).all()


def test_uniform_changes_nothing() -> None:
    bent, importance = make_noise_sampler(NoiseConfig(), Flow(), 1000).warp(V, 0.3, 0.7)
    assert torch.equal(bent, V) and torch.equal(importance, torch.ones(N))


# ---- logit-normal

def log_upper_tail(z: float) -> float:
    """ln(1 - Phi(z)): erfc, or Laplace's continued fraction where that has no digits left."""
    if z < 5:
        return math.log(math.erfc(z / math.sqrt(2)) / 2)
    fraction = z
    for k in range(200, 0, -1):
        fraction = z + k / fraction
    return -z * z / 2 - math.log(2 * math.pi) / 2 - math.log(fraction)


def share(u: float, low: float, high: float, mean: float, std: float) -> tuple[float, float]:
    """The logit-normal mass of [low, u) and of [u, high), as shares of that of [low, high): eq. 19 of arXiv:2403.03206,
    integrated."""
    def z(x: float) -> float:
        return (math.log(x / (1 - x)) - mean) / std if 0 < x < 1 else math.inf * (x - 0.5)

    a, x, b = z(low), z(u), z(high)
    sign = 1 if a + b > 0 or a == -b else -1                                # tails are subtracted from the nearer side
    top = log_upper_tail(max(min(sign * a, sign * b), -1e3))

    def tail(z: float) -> float:
        return math.exp((log_upper_tail(sign * z) if abs(z) < math.inf else 0.0 if sign * z < 0 else -math.inf) - top)

    whole = abs(tail(a) - tail(b))
    return abs(tail(a) - tail(x)) / whole, abs(tail(x) - tail(b)) / whole


@pytest.mark.parametrize("low, high", INTERVALS)
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.3), (0.0, 0.085), (0.0, 0.02), (2.0, 4.0)])
def test_logit_normal_inverts_its_cdf(mean: float, std: float, low: float, high: float) -> None:
    """With 0.085 and 0.02, [0.95, 1) lies 35 and 147 standard deviations away."""
    v = torch.cat([V[:: N // 50], 1 - 0.5 ** torch.arange(1, 40, 6).double(), 0.5 ** torch.arange(1, 40, 6).double()])
    u, importance = drawn(LogitNormal(mean, std), low, high, v)
    assert (importance == 1).all()
    for one, want in zip(u.tolist(), v.tolist(), strict=True):
        below, above = share(one, low, high, mean, std)
        # u itself has 16 digits, so the distance to an edge has fewer: 1e-13 of z
        noise = 4e-16 / (std * one * (1 - one)) * max(1.0, abs(math.log(one / (1 - one)) - mean) / std)
        assert below == pytest.approx(want, rel=1e-7, abs=1e-12 + 10 * noise)
        assert above == pytest.approx(1 - want, rel=1e-7, abs=1e-12 + 10 * noise)


def test_logit_normal_has_the_papers_density() -> None:
    u, _ = drawn(LogitNormal(-0.5, 1.2), 0.0, 1.0)
    edges = np.linspace(0, 1, 201)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-(np.log(middle / (1 - middle)) + 0.5) ** 2 / (2 * 1.2**2)) / (1.2 * math.sqrt(2 * math.pi) * middle * (1 - middle))
    np.testing.assert_allclose(np.histogram(u, edges)[0] / N * 200, density, rtol=2e-2, atol=5e-3)


def test_logit_normal_keeps_the_digits_of_both_tails() -> None:
    """1 - v = 2 ** -53 of the mass above 0.95 is z = 8.9, where 1 minus the mass below it is 0."""
    for v, low, high, where in [(ENDS[1:], 0.95, 1.0, 1), (ENDS[:1], 0.0, 0.05, 0), (ENDS[:1], 0.0, 1.0, 0), (ENDS[1:], 0.0, 1.0, 1)]:
        (u,), _ = drawn(LogitNormal(0.0, 1.0), low, high, v)
        assert share(u, low, high, 0.0, 1.0)[where] == pytest.approx(2.0**-53, rel=1e-6, abs=0)


# ---- loss second moment

class Paper:
    """Section 3.3 of arXiv:2102.09672 with guided-diffusion's constants, over `active` timesteps."""

    def __init__(self, active: list[int]):
        self.last: dict[int, list[float]] = {t: [] for t in active}

    def observe(self, t: int, loss: float) -> None:
        if t in self.last:
            self.last[t] = [*self.last[t], loss][-10:]

    def p(self) -> np.ndarray:
        n = len(self.last)
        if any(len(losses) < 10 for losses in self.last.values()):
            return np.full(n, 1 / n)
        p = np.array([math.sqrt(sum(loss**2 for loss in losses) / 10) for losses in self.last.values()])
        return 0.999 * p / p.sum() + 0.001 / n


@pytest.mark.parametrize("first, last", [(0, 15), (12, 15), (0, 3), (5, 9)])
def test_loss_second_moment_is_the_papers(first: int, last: int) -> None:
    sampler, active = LossSecondMoment(16), list(range(first, last + 1))
    paper, random, changed = Paper(active), np.random.default_rng(first), 0
    v = V[::20].contiguous()
    for step in range(40):
        # Bins outside the active interval are seen too, as after a transition, or by an earlier stage: they do not count.
        bins = random.integers(0, 16, 24)
        losses = random.random(24) * (1 + bins) ** 2 / (1 + step)
        sampler.observe(bins.tolist(), losses.tolist())
        for t, loss in zip(bins.tolist(), losses.tolist(), strict=True):
            paper.observe(t, loss)
        u, importance = drawn(sampler, first / 16, (last + 1) / 16, v)
        t = np.floor(u * 16).astype(int) - first
        assert np.abs(np.bincount(t, minlength=len(active)) / len(v) - paper.p()).max() <= 1 / len(v) + 1e-12
        np.testing.assert_allclose(importance, 1 / (len(active) * paper.p()[t]), rtol=1e-6)
        changed += paper.p().std() > 0
    assert 5 < changed < 40                                       # some steps were uniform, and some were not


def test_only_active_bins_must_be_warm() -> None:
    sampler = LossSecondMoment(16)
    bins = [i for i in range(12, 16) for _ in range(10)]
    sampler.observe(bins[:-1], [float(b) for b in bins[:-1]])
    assert torch.equal(sampler.warp(V, 0.75, 1.0)[1], torch.ones(N))                     # C_4's last bin has 9
    sampler.observe([15], [15.0])
    bent, importance = sampler.warp(V, 0.75, 1.0)
    assert not torch.allclose(bent, V) and importance.unique().numel() == 4
    assert torch.allclose(sampler.warp(V, 0.5, 1.0)[0], V, atol=1e-15)                   # the next stage begins anew


@pytest.mark.parametrize("low, high, warm_bins", [
    (0.0, 0.5 + 1e-15, range(5)), (0.5 - 1e-15, 1.0, range(5, 10))])
def test_an_edge_that_only_rounds_into_a_bin_does_not_make_it_active(low: float, high: float, warm_bins: range) -> None:
    sampler = LossSecondMoment(10)
    sampler.observe([i for i in warm_bins for _ in range(10)], [float(i + 1) for i in warm_bins for _ in range(10)])
    assert sampler.warp(V, low, high)[1].unique().numel() == 5


@pytest.mark.parametrize("low, high", INTERVALS)
def test_importance_keeps_the_mean_loss(low: float, high: float) -> None:
    def f(u: np.ndarray) -> np.ndarray:
        return np.sin(5 * u) + 3 * u**2

    plain = float(np.mean(f(low + V.numpy() * (high - low))))
    u, importance = drawn(warm(300), low, high)
    assert np.mean(f(u) * importance) == pytest.approx(plain, rel=2e-4)
    assert np.mean(importance) == pytest.approx(1, rel=2e-4)
    assert abs(np.mean(f(u)) - plain) > 0.02 * np.std(f(u))                              # which it would not without
    for sampler in (LogitNormal(0.3, 1.0), SpeeD(LINEAR_FLOW, 5.0)):                      # meant to change it
        assert (drawn(sampler, low, high)[1] == 1).all()


def test_a_resumed_sampler_goes_on_as_it_was() -> None:
    random = np.random.default_rng(3)
    steps = [(random.integers(0, 16, 8).tolist(), random.random(8).tolist()) for _ in range(60)]
    first, again, forgetful = (LossSecondMoment(16) for _ in range(3))
    for bins, losses in steps[:40]:
        first.observe(bins, losses)
    again.warp(V, 0.2, 1.0)                                                              # what it had found is void
    again.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    differs = False
    for bins, losses in steps[40:]:
        mine, truth, other = (sampler.warp(V[::50].contiguous(), 0.2, 1.0) for sampler in (again, first, forgetful))
        assert torch.equal(mine[0], truth[0]) and torch.equal(mine[1], truth[1])
        differs |= not torch.equal(other[0], truth[0])
        for sampler in (again, first, forgetful):
            sampler.observe(bins, losses)
    assert differs and again.state_dict() == first.state_dict()
    assert first.warp(V, 0.2, 1.0)[1].unique().numel() > 2


def test_states_of_other_runs_are_refused() -> None:
    with pytest.raises(CheckpointError, match="counts losses in 8 bins, the saved state in 16.*--diffusion.timesteps 16"):
        LossSecondMoment(8).load_state_dict(warm(16).state_dict())
    uniform, _, resampled, speed = every()[:4]
    for sampler in (uniform, speed):
        sampler.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    with pytest.raises(CheckpointError, match="by uniform, the saved state is of loss_second_moment"):
        uniform.load_state_dict(resampled.state_dict())
    with pytest.raises(CheckpointError, match="by loss_second_moment, the saved state is of speed"):
        resampled.load_state_dict(speed.state_dict())


def test_only_loss_second_moment_needs_losses() -> None:
    assert {sampler.name: sampler.needs_losses for sampler in every()} == {
        name: name == "loss_second_moment" for name in NOISE_SAMPLERS}
    for loss in (math.nan, math.inf):
        sampler = warm()
        before = sampler.state_dict()
        with pytest.raises(ValueError, match="not finite"):
            sampler.observe([0, 1], [1.0, loss])
        assert sampler.state_dict() == before


# ---- SpeeD

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 1.0), (0.6, 0.7)])
def test_speed_is_the_papers(schedule: str, low: float, high: float) -> None:
    """Against the formula of its code, a tanh that switches from 1/2 to 5/2 within 1e-6 of the threshold: with it go the
    few timesteps that lie there."""
    betas = make_betas(schedule, 1000)
    growth = np.gradient(np.sqrt(1 - alphas_cumprod(betas)))
    p = 1.5 + np.tanh(1e6 * (growth - 1e-4))
    clear = np.abs(growth - 1e-4) > 5e-6
    assert 0 < (growth < 1e-4).sum() < 1000 and (~clear).sum() < 20
    first, last = round(low * 1000), round(high * 1000)
    u, _ = drawn(SpeeD(log_snr(betas), 5.0), low, high)
    counts = np.bincount(np.floor(u * 1000).astype(int), minlength=1000)
    assert counts[:first].sum() == counts[last:].sum() == 0
    got, want = (x[first:last][clear[first:last]] for x in (counts, p))
    np.testing.assert_allclose(got / got.sum(), want / want.sum(), atol=2 / N)
    if want.min() < 1 < want.max():
        assert Counter(np.round(got / got.max() * 5).astype(int).tolist()).keys() == {1, 5}


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.9153, 0.9272)])
def test_speed_of_a_flow(low: float, high: float) -> None:
    """s = u / sqrt(u**2 + (1-u)**2), so ds/du = (1 - u) / (u**2 + (1-u)**2) ** 1.5: below 0.1 from u = 0.921 on."""
    u = (np.arange(1000) + 0.5) / 1000
    fast = (1 - u) / (u**2 + (1 - u) ** 2) ** 1.5 >= 0.1
    assert 920 <= fast.sum() <= 922 and fast[: fast.sum()].all()
    edges = np.arange(1001) / 1000
    drawn_u, _ = drawn(SpeeD(LINEAR_FLOW, 7.0), low, high)
    mass = np.where(fast, 7.0, 1.0) * np.diff(edges.clip(low, high))                     # bins that the ends cut count less
    np.testing.assert_allclose(np.histogram(drawn_u, edges)[0] / N, mass / mass.sum(), atol=1.01 / N)


# ---- all

def test_what_cannot_be_drawn_from_is_refused() -> None:
    for sampler in every():
        with pytest.raises(ConfigError, match="float64 v"):
            sampler.warp(V.float(), 0.0, 1.0)
        with pytest.raises(ConfigError, match="0 <= low < high <= 1"):
            sampler.warp(V, 0.5, 0.5)


@pytest.mark.parametrize("config, named", [
    (NoiseConfig(sampling="logit_normal", logit_std=0.0), "--noise.logit-std"),
    (NoiseConfig(sampling="logit_normal", logit_mean=math.nan), "--noise.logit-mean"),
    (NoiseConfig(sampling="speed", speed_ratio=0.0), "speed_ratio=0.0.*--noise.speed-ratio"),
    (NoiseConfig(sampling="laplace", laplace_b=0.0), "got 0.0 and 0.0.*--noise.laplace-b"),
    (NoiseConfig(sampling="laplace", laplace_mu=math.inf), "--noise.laplace-mu"),
    (NoiseConfig(sampling="beta"), "got None and None; set --noise.beta-alpha and --noise.beta-beta, which have no default"),
    (NoiseConfig(sampling="beta", beta_alpha=2.0, beta_beta=-1.0), "two positive numbers, got 2.0 and -1.0"),
    (NoiseConfig(sampling="mode", mode_scale=1.76), "mode_scale=1.76 must be from -1.*--noise.mode-scale"),
    (NoiseConfig(shift=0.0), "shift=0.0 must be positive.*--noise.shift"),
    (NoiseConfig(sampling="sobol"), "sobol.*choose one of uniform"),  # type: ignore[arg-type]
])
def test_bad_settings(config: NoiseConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_noise_sampler(config, Flow(), 1000)


def test_settings_reach_the_samplers() -> None:
    def quantile(**settings: object) -> float:
        sampler = make_noise_sampler(NoiseConfig(**settings), Flow(), 1000)  # type: ignore[arg-type]
        return float(drawn(sampler, 0.0, 1.0, torch.tensor([0.3], dtype=torch.float64))[0][0])

    beta = {"sampling": "beta", "beta_alpha": 2.0, "beta_beta": 3.0}
    different: list[dict[str, object]] = [
        {}, {"shift": 3.0},
        {"sampling": "logit_normal"}, {"sampling": "logit_normal", "logit_mean": 1.0}, {"sampling": "logit_normal", "logit_std": 2.0},
        {"sampling": "speed"}, {"sampling": "speed", "speed_ratio": 2.0},
        {"sampling": "laplace"}, {"sampling": "laplace", "laplace_mu": 1.0}, {"sampling": "laplace", "laplace_b": 1.0},
        beta, beta | {"beta_alpha": 1.0}, beta | {"beta_beta": 1.0},
        {"sampling": "mode"}, {"sampling": "mode", "mode_scale": 0.5}, {"sampling": "cosine_map"},
    ]
    assert len({quantile(**settings) for settings in different}) == len(different)


def test_nobody_waits_for_the_device() -> None:
    """Not even for the densities that followed from new losses, or in a new stage."""
    waited: list[str] = []
    for sampler in every():
        for low in (0.95, 0.5):
            sampler.warp(FEW, low, 1.0)                                    # constants of an interval: on the host, once
        with Operations(waited.append), Functions(waited.append):
            sampler.observe([0, 1], [1.0, 1.0])
            sampler.warp(FEW, 0.95, 1.0)
            sampler.warp(FEW, 0.5, 1.0)
    assert waited == []
    with Operations(waited.append), Functions(waited.append):
        V[0].item()
    assert waited
