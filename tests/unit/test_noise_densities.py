"""Densities of noise levels against their papers' formulas, and against diffusers, where it has them."""

import itertools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from eval.comparison.methods import read_methods
from largescale import train
from largescale.config.schema import Config, DiffusionConfig, ModelConfig, NoiseConfig
from largescale.config.validation import remarks, validate
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
    truncated_laplace,
)
from largescale.diffusion.noise_levels import NOISE_SAMPLERS
from largescale.diffusion.noise_sampler import NoiseSampler
from largescale.diffusion.objective import Objective
from largescale.errors import ConfigError
from largescale.noise_schedule import make_betas

INTERVALS = [(0.0, 1.0), (0.95, 1.0), (0.0, 0.05), (0.3, 0.62), (0.45, 0.450001), (1 - 1e-4, 1.0), (0.0, 1e-6)]
# Both tails, to the last bit that is drawn
V = torch.cat([0.5 ** torch.tensor([53.0, 40, 20, 8]).double(), (torch.arange(9).double() + 0.5) / 9,
               1 - 0.5 ** torch.tensor([8.0, 20, 40, 53]).double()])
COSINE, LINEAR = (GaussianDiffusion(make_betas(schedule, 1000), learn_sigma=False) for schedule in ("cosine", "linear"))


def u_of(sampler: NoiseSampler, low: float, high: float, v: Tensor = V) -> np.ndarray:
    bent, importance = sampler.warp(v, low, high)
    assert bent.dtype == torch.float64 and importance.dtype == torch.float32 and (importance == 1).all()
    return (low + bent * (high - low)).numpy()


def check_shares(sampler: NoiseSampler, cdf: Any, low: float, high: float, rel: float = 1e-9) -> None:
    """The mass of [low, u) is v of that of [low, high), to what a u of 16 digits can tell. `cdf`: in mpmath's numbers, but for a
    constant."""
    with mpmath.workdps(150):
        first, last = cdf(mpmath.mpf(low)), cdf(mpmath.mpf(high))
        for u, v in zip(u_of(sampler, low, high).tolist(), V.tolist(), strict=True):
            at = float((cdf(mpmath.mpf(u)) - first) / (last - first))
            if abs(at - v) > rel * min(v, 1 - v):
                # What u's rounding makes of it, and the least v that is drawn
                ends = [cdf(mpmath.mpf(min(max(u + sign * (2e-16 + 4e-16 * u), low), high))) for sign in (-1, 1)]
                rounding = float((ends[1] - ends[0]) / (last - first))
                assert abs(at - v) <= rel * min(v, 1 - v) + rounding + 2.0**-53, (u, v, at)


# ---- Laplace

def laplace_cdf(log_snr: Any, mu: float, b: float) -> Any:
    """The mass of noise levels below that with this log SNR."""
    y = (mu - log_snr) / mpmath.mpf(b)
    return mpmath.exp(y) / 2 if y < 0 else 1 - mpmath.exp(-y) / 2


LOG_SNR: dict[str, tuple[Objective, Any]] = {
    "linear": (Flow(), lambda u: 2 * mpmath.log((1 - u) / u)),
    "gvp": (Flow("gvp"), lambda u: -2 * mpmath.log(mpmath.tan(mpmath.pi * u / 2))),
    "edm": (Edm(), lambda u: -2 * (-1.2 + 1.2 * mpmath.sqrt(2) * mpmath.erfinv(2 * u - 1))),
}


@pytest.mark.parametrize("kind", LOG_SNR)
@pytest.mark.parametrize("mu, b", [(0.0, 0.5), (-1.0, 0.02), (2.0, 5.0)])
@pytest.mark.parametrize("low, high", INTERVALS[:5])
def test_laplace_inverts_its_cdf(kind: str, mu: float, b: float, low: float, high: float) -> None:
    """With 0.02, [0.95, 1) lies hundreds of widths away from the peak."""
    objective, log_snr = LOG_SNR[kind]

    def cdf(u: Any) -> Any:
        return mpmath.mpf(int(u >= 1)) if u <= 0 or u >= 1 else laplace_cdf(log_snr(u), mu, b)

    check_shares(Laplace(objective, mu, b), cdf, low, high)


@pytest.mark.parametrize("a, b", [(-math.inf, math.inf), (-30.0, -1.0), (1.0, 31.0), (-28.0, 27.0), (-math.inf, -300.0), (2.0, 2.5), (-1e-7, 2e-7)])
def test_a_truncated_laplace_distribution_keeps_the_digits_of_both_tails(a: float, b: float) -> None:
    """Where u, which rounds them off, is not in between."""
    with mpmath.workdps(400):
        first, last = laplace_cdf(-mpmath.mpf(a), 0, 1), laplace_cdf(-mpmath.mpf(b), 0, 1)
        for y, v in zip(truncated_laplace(V, a, b).tolist(), V.tolist(), strict=True):
            at = laplace_cdf(-mpmath.mpf(y), 0, 1)
            rounding = float(4e-16 * abs(y) / (last - first) * mpmath.exp(-abs(y)) / 2)
            assert float((at - first) / (last - first)) == pytest.approx(v, rel=1e-12, abs=rounding)
            assert float((last - at) / (last - first)) == pytest.approx(1 - v, rel=1e-12, abs=rounding)


@pytest.mark.parametrize("diffusion", [COSINE, LINEAR], ids=["cosine", "linear"])
@pytest.mark.parametrize("mu, b", [(0.0, 0.5), (3.0, 0.02), (-2.0, 3.0)])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.95, 1.0), (0.0, 0.05), (0.5, 0.501)])
def test_laplace_over_timesteps(diffusion: GaussianDiffusion, mu: float, b: float, low: float, high: float) -> None:
    """A timestep has the mass of the log SNRs that are nearest to its own."""
    n = 100_000
    v = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = diffusion.draw(Laplace(diffusion, mu, b).warp(v, low, high)[0], low, high)
    log_snr = diffusion.log_snr(torch.arange(1000)).numpy()
    middle = (log_snr[1:] + log_snr[:-1]) / 2
    edges = np.concatenate([[2 * log_snr[0] - middle[0]], middle, [2 * log_snr[-1] - middle[-1]]])
    active = edges[round(low * 1000) : round(high * 1000) + 1]
    with mpmath.workdps(600 if b < 0.1 else 60):  # digits of one tail beside 1
        cdf = [laplace_cdf(mpmath.mpf(x), mu, b) for x in active.tolist()]
        mass = np.array([float((after - before) / (cdf[-1] - cdf[0])) for before, after in itertools.pairwise(cdf)])
    counts = np.bincount(t.numpy(), minlength=1000)[round(low * 1000) : round(high * 1000)]
    assert counts.sum() == n and np.abs(counts / n - mass).max() <= 1.01 / n + 1e-12


def test_laplace_has_its_papers_numbers() -> None:
    """Half of the mass has more signal than noise; a share exp(-2) of it lies beyond one unit of log SNR: 2 widths."""
    u = u_of(Laplace(Flow(), 0.0, 0.5), 0.0, 1.0, torch.tensor([0.5, 1 - math.exp(-2) / 2], dtype=torch.float64))
    assert u[0] == pytest.approx(0.5, abs=1e-15) and 2 * math.log(u[1] / (1 - u[1])) == pytest.approx(1.0, rel=1e-12)


# ---- mode

@pytest.mark.parametrize("scale", [1.29, 1.7519, 0.0, -0.5, -1.0])
@pytest.mark.parametrize("low, high", INTERVALS)
def test_mode_is_the_papers_function(scale: float, low: float, high: float) -> None:
    """Of a w that is uniform where the function is in [low, high)."""
    def t_of(w: Any) -> Any:
        return 1 - w - scale * (mpmath.cos(mpmath.pi * w / 2) ** 2 - 1 + w)

    def w_of(t: float) -> Any:
        first, last = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(170):
            w = (first + last) / 2
            first, last = (w, last) if t_of(w) > t else (first, w)
        return last

    with mpmath.workdps(50):
        first, last = w_of(high), w_of(low)
        want = [float(t_of(last - v * (last - first))) for v in V.tolist()]
        inside = np.clip(want, low + (high - low) * 2.0**-53, high)
    np.testing.assert_allclose(u_of(Mode(scale), low, high), inside, rtol=1e-14, atol=4e-16)


# ---- cosine map

@pytest.mark.parametrize("low, high", INTERVALS)
def test_cosine_map_inverts_its_cdf(low: float, high: float) -> None:
    """The paper's density is the derivative of this."""
    def cdf(t: Any) -> Any:
        return 2 / mpmath.pi * mpmath.atan2(t, 1 - t)

    assert float(mpmath.diff(cdf, 0.3)) == pytest.approx(2 / (math.pi - 2 * math.pi * 0.3 + 2 * math.pi * 0.09), rel=1e-9)
    check_shares(CosineMap(Flow()), cdf, low, high)


@pytest.mark.parametrize("low, high", INTERVALS[:4])
def test_cosine_map_of_the_cosine_schedule_is_uniform(low: float, high: float) -> None:
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    torch.testing.assert_close(CosineMap(Flow("gvp")).warp(v, low, high)[0], v, rtol=0, atol=1e-9)
    # That of DDPM has an offset of 0.008, and is cut.
    torch.testing.assert_close(CosineMap(COSINE).warp(v, low, high)[0], v, rtol=0, atol=0.01 if high - low > 0.1 else 0.1)


@pytest.mark.parametrize("objective", [Edm(), LINEAR], ids=["edm", "linear"])
def test_cosine_map_has_the_cosine_schedules_snrs(objective: Objective) -> None:
    """log SNR = -2 ln tan(pi w / 2) has the density 1 / (2 pi cosh(log SNR / 2))."""
    v = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = objective.log_snr(objective.draw(CosineMap(objective).warp(v, 0.0, 1.0)[0])).numpy()
    edges = np.array([objective.log_snr_at(k / 25) for k in range(25, -1, -1)])
    mass = np.diff(2 / np.pi * np.arctan(np.exp(edges / 2)))
    np.testing.assert_allclose(np.histogram(drawn, edges)[0] / len(v), mass / mass.sum(), atol=1.01 / len(v))


# ---- beta

@pytest.mark.parametrize("exponent", [1e-3, 0.3, 1.0, 2.5, 1e4])
@pytest.mark.parametrize("low, high", INTERVALS)
@pytest.mark.parametrize("side", ["alpha", "beta"])
def test_beta_has_the_quantiles_of_a_power(exponent: float, low: float, high: float, side: str) -> None:
    """Where the other exponent is 1 the CDF is t ** alpha, or 1 - (1 - t) ** beta."""
    sampler = Beta(exponent, 1.0) if side == "alpha" else Beta(1.0, exponent)
    check_shares(sampler, (lambda t: t**exponent) if side == "alpha" else (lambda t: -((1 - t) ** exponent)), low, high)


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (2.0, 3.0), (0.02, 0.05), (40.0, 700.0)])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.95, 1.0), (0.0, 0.05), (0.3, 0.62)])
def test_beta_inverts_its_cdf(alpha: float, beta: float, low: float, high: float) -> None:
    def cdf(t: Any) -> Any:
        """From the nearer end."""
        if low > 0.5:
            return -mpmath.betainc(beta, alpha, 0, 1 - t, regularized=True)
        return mpmath.betainc(alpha, beta, 0, t, regularized=True)

    check_shares(Beta(alpha, beta), cdf, low, high)


# ---- shift

def shifted(t: Any, s: float) -> Any:
    return s * t / (1 + (s - 1) * t)


@pytest.mark.parametrize("s", [3.0, 0.2, 700.0])
@pytest.mark.parametrize("low, high", INTERVALS)
def test_shift_is_the_papers(s: float, low: float, high: float) -> None:
    """Of a uniform t; of a logit-normal one, and of log SNR, it moves the mean."""
    check_shares(Shifted(Uniform(), s), lambda t: shifted(t, 1 / mpmath.mpf(s)), low, high)
    v = V[1:-1]
    for moved, other in ((LogitNormal(0.3, 1.1), LogitNormal(0.3 + math.log(s), 1.1)),
                         (Laplace(Flow(), 0.5, 0.7), Laplace(Flow(), 0.5 - 2 * math.log(s), 0.7))):
        got, want = (u_of(sampler, low, high, v) for sampler in (Shifted(moved, s), other))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-13)


# ---- diffusers

def test_the_densities_of_diffusers() -> None:
    """From the random numbers that it draws itself; of the cosine map it has the density, as a weight."""
    training = pytest.importorskip("diffusers.training_utils")

    def theirs(scheme: str, **settings: float) -> Tensor:
        random = torch.Generator().manual_seed(1)
        drawn: Tensor = training.compute_density_for_timestep_sampling(scheme, 2000, generator=random, **settings)
        return drawn.double()

    random = torch.Generator().manual_seed(1)
    uniform = 1 - torch.rand(2000, generator=random).double()
    for scale in (1.29, -0.7):
        mine = torch.from_numpy(u_of(Mode(scale), 0.0, 1.0, uniform))
        torch.testing.assert_close(mine, theirs("mode", mode_scale=scale), rtol=0, atol=1e-6)
    normal = torch.special.ndtr(torch.normal(-0.5, 1.2, (2000,), generator=random.manual_seed(1)).double().add(0.5).div(1.2))
    mine = torch.from_numpy(u_of(LogitNormal(-0.5, 1.2), 0.0, 1.0, normal))
    torch.testing.assert_close(mine, theirs("logit_normal", logit_mean=-0.5, logit_std=1.2), rtol=0, atol=1e-6)

    v = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    step = 1e-6
    u, further = (torch.from_numpy(u_of(CosineMap(Flow()), 0.0, 1.0, x)) for x in (v, v + step))
    weight = training.compute_loss_weighting_for_sd3("cosmap", sigmas=u)
    torch.testing.assert_close(step / (further - u), weight, rtol=1e-4, atol=0)


def test_the_shift_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    sigmas = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()[1:]  # falling from 999 / 1000, shifted
    v = torch.arange(999, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(torch.from_numpy(u_of(Shifted(Uniform(), 3.0), 0.0, 1.0, v)), sigmas[: len(v)], rtol=0, atol=1e-6)


# ---- bad settings

@pytest.mark.parametrize("diffusion, noise, said", [
    ({}, {"sampling": "beta"}, "noise.beta_alpha=None must be a number with noise.sampling=beta, which has no default; give --noise.beta-alpha A"),
    ({}, {"sampling": "beta", "beta_alpha": 1.0}, "noise.beta_beta=None must be a number"),
    ({}, {"sampling": "beta", "beta_alpha": 0.0, "beta_beta": 1.0}, "noise.beta_alpha=0.0 must be at least 0.001"),
    ({}, {"sampling": "mode", "mode_scale": 1.76}, r"noise.mode_scale=1.76 must be in \[-1, 1.7519\]"),
    ({}, {"mode_scale": 1.0}, "noise.mode_scale=1.0 must stay 1.29: only noise.sampling=mode reads it"),
    ({}, {"laplace_b": 1.0}, "only noise.sampling=laplace reads it"),
    ({}, {"beta_alpha": 1.0}, "noise.beta_alpha=1.0 must stay None: only noise.sampling=beta"),
    ({"objective": "edm"}, {"sampling": "mode"}, "noise.sampling=mode must not be a density of timesteps.*--diffusion.p-mean and --diffusion.p-std"),
    ({}, {"shift": 3.0}, "noise.shift=3.0 must be 1 unless diffusion.objective=flow.*leave out --noise.shift"),
    ({"objective": "flow", "interpolant": "gvp"}, {"shift": 3.0}, "diffusion.interpolant=linear"),
    ({"objective": "edm"}, {"shift": 3.0}, r"set --diffusion.p-mean -0.1014, which does the same"),
    ({"objective": "flow"}, {"shift": 3.0, "sampling": "speed"}, "noise.shift=3.0 must be 1 with noise.sampling=speed"),
    ({"objective": "flow"}, {"shift": 0.0}, r"noise.shift=0.0 must be in \[0.001, 1000\]"),
    ({"objective": "flow"}, {"shift": 1e-20}, r"noise.shift=1e-20 must be in \[0.001, 1000\]"),
    ({}, {"sampling": "logit_normal", "logit_mean": 1e300}, r"noise.logit_mean=1e\+300 must be in \[-100, 100\]"),
    ({"objective": "edm", "p_mean": 1e300}, {}, r"diffusion.p_mean=1e\+300 must be in \[-20, 20\]"),
])
def test_what_makes_no_density_is_an_error_at_the_start(diffusion: dict[str, Any], noise: dict[str, Any], said: str) -> None:
    config = Config("x", model=ModelConfig(learn_sigma=False), diffusion=DiffusionConfig(**diffusion), noise=NoiseConfig(**noise))
    with pytest.raises(ConfigError, match=said):
        validate(config, 1)


@pytest.mark.parametrize("diffusion, said", [
    ({}, "nearly uniform with the cosine schedule"), ({"schedule": "linear"}, ""), ({"objective": "edm"}, ""), ({"objective": "flow"}, ""),
    ({"objective": "flow", "interpolant": "gvp"}, "is uniform with diffusion.interpolant=gvp"),
])
def test_a_density_without_effect_is_said(diffusion: dict[str, Any], said: str) -> None:
    config = Config("x", diffusion=DiffusionConfig(**diffusion), noise=NoiseConfig("cosine_map"))
    notes = [note for note in remarks(config, 0) if "cosine_map" in note]
    assert len(notes) == (said != "") and all(said in note for note in notes)


def test_shifting_edms_mean_is_the_same() -> None:
    """What the message above says: sigma is multiplied by the shift, as the linear interpolant's sigma / alpha is."""
    v = V[2:-2]
    torch.testing.assert_close(Edm(-1.2 + math.log(3), 1.2).draw(v), 3 * Edm(-1.2, 1.2).draw(v))
    ratio, moved = (x / (1 - x) for x in (v, shifted(v, 3.0)))
    torch.testing.assert_close(moved, 3 * ratio)


# ---- the page

PAGE = Path(__file__).parents[2] / "docs/baselines.md"


def test_the_page_has_every_density_and_its_commands_are_taken() -> None:
    text = PAGE.read_text()
    assert {*re.findall(r"(?m)^\| `(\w+)` \| (?!u)", text)} >= NOISE_SAMPLERS.keys()
    commands = [shlex.split(line.split("  #")[0])[2:] for line in re.findall(r"(?m)^    (python -m .+)$", text)]
    assert [command[0] for command in commands] == ["largescale.train"] * 2 + ["eval.compare"] * 2
    for program, *arguments in commands:
        if program == "largescale.train":
            validate(train.parse(arguments), 1)
        else:
            for method in read_methods(arguments[arguments.index("--methods") + 1]):
                validate(train.parse(["digits", *method.arguments]), 1)
