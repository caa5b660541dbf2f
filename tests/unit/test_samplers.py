"""Samplers against guided-diffusion's step and diffusers' DPM-Solver++, and against a distribution whose best denoiser and
probability flow are known in closed form."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.gaussian_samplers import ddim_step, ddpm_step, kept_timesteps
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.diffusion.samplers import evaluations, sample
from largescale.errors import ConfigError
from largescale.noise_schedule import SCHEDULES, alphas_cumprod, make_betas, space_timesteps

SAMPLERS = GaussianDiffusion.samplers
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


def sampled(diffusion, model, x_T, sampler, steps, **settings):
    """x_0 by a sampler that must not ask for noise."""
    y = torch.zeros(len(x_T), dtype=torch.int64)
    return sample(diffusion, model, x_T, y, sampler=sampler, steps=steps, noise=None, **settings)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, steps, tolerance", [
    ("ddim", 50, 0.06), ("euler", 50, 0.06), ("dpm++2m", 50, 0.06), ("dpm++2m", 250, 0.003),
    ("heun", 10, 0.09), ("heun", 50, 0.003), ("heun", "ddim50", 0.003),
])
def test_deterministic_samplers_follow_the_probability_flow(schedule, sampler, steps, tolerance):
    """x_start - MEAN goes as sqrt(sigma ** 2 + STD ** 2) with sigma, so each x_T has an x_0 of its own."""
    alpha_bar = alphas_cumprod(make_betas(schedule, 1000))[space_timesteps(1000, steps)[-1]]
    x_T = torch.linspace(-3, 3, 16).view(1, 1, 4, 4)
    exact = MEAN + STD * (x_T - np.sqrt(alpha_bar) * MEAN) / np.sqrt(1 - alpha_bar + alpha_bar * STD**2)
    x_0 = sampled(make(schedule, learn_sigma=False), best_denoiser(schedule, []), x_T, sampler, steps)
    assert (x_0 - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("dpm++2m", 2), ("heun", 2)])
def test_the_observed_order(schedule, sampler, order):
    """Of the error of the path down to t = 0, from where every sampler takes the predicted image."""
    betas = make_betas(schedule, 4097)
    alpha_bar = alphas_cumprod(betas)
    sigma, sigma_0 = np.sqrt(1 / alpha_bar[[-1, 0]] - 1)
    x_T = torch.linspace(-3, 3, 16, dtype=torch.float64).view(1, 1, 4, 4)
    path = (x_T / np.sqrt(alpha_bar[-1]) - MEAN) / np.hypot(sigma, STD)
    exact = MEAN + path * STD**2 / np.hypot(sigma_0, STD)

    def model(x_t, t, y):
        a = torch.from_numpy(alpha_bar)[t][:, None, None, None]
        return ((1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)).float()

    diffusion = GaussianDiffusion(betas, learn_sigma=False)
    errors = [(sampled(diffusion, model, x_T, sampler, f"ddim{n}") - exact).abs().max().item() for n in (65, 129, 257)]
    assert np.log2(errors[:-1]) - np.log2(errors[1:]) == pytest.approx([order] * 2, abs=0.15)


def two_modes(schedule, outputs=1):
    """E[noise | x_t] where every pixel of x_start is N(-0.8, 0.3 ** 2) or N(0.8, 0.3 ** 2), and `outputs - 1` more."""
    alpha_bar = torch.from_numpy(alphas_cumprod(make_betas(schedule, 1000)))

    def model(x_t, t, y):
        a = alpha_bar[t][:, None, None, None]
        variance = a * 0.09 + 1 - a
        mean = 0.8 * torch.tanh(0.8 * a.sqrt() * x_t / variance)
        eps = ((1 - a).sqrt() * (x_t - a.sqrt() * mean) / variance).float()
        return torch.cat([eps, *[x_t.sin()] * (outputs - 1)], dim=1)

    return model


def rounding_of_two_steps(schedule):
    """The first step enlarges it by 1 / sqrt(alpha_bar_T), 157 or 20000, and only the third makes that small again."""
    return 1e-6 / np.sqrt(alphas_cumprod(make_betas(schedule, 1000))[-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 10, 50, "ddim50", 250])
@pytest.mark.parametrize("clip_denoised", [False, True])
def test_euler_is_ddim_without_noise(schedule, steps, clip_denoised):
    euler, ddim = (sampled(make(schedule, learn_sigma=False), two_modes(schedule), NOISE, sampler, steps,
                           clip_denoised=clip_denoised) for sampler in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=0, atol=1e-5 if steps != 2 else rounding_of_two_steps(schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 14, 15, 20, 50])
def test_dpm_solver_matches_diffusers(schedule, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        trained_betas=make_betas(schedule, 1000), algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    model, theirs = two_modes(schedule), NOISE
    for t in scheduler.timesteps:
        theirs = scheduler.step(model(theirs, t.expand(len(theirs)), Y), t, theirs).prev_sample
    ours = sampled(make(schedule, learn_sigma=False), model, NOISE, "dpm++2m", steps)
    tables = 5e-5 if schedule == "linear" else 2e-3            # theirs are float32, ours float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tables if steps != 2 else rounding_of_two_steps(schedule))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, count", [(2, 2), (7, 7), ("ddim50", 50)])
def test_evaluations_are_told_and_ticked(sampler, steps, count):
    told = []

    def model(x_t, t, y):
        told.append(t.tolist())
        return torch.zeros(len(x_t), 1, *x_t.shape[2:])

    sample(make(learn_sigma=False), model, NOISE[:2, :1], Y[:2], sampler=sampler, steps=steps, noise=lambda i: NOISE[:2, :1],
           tick=lambda: told.append("tick"))
    kept = kept_timesteps(sampler, steps, 1000)[::-1].tolist()
    asked = [t for t in kept for _ in range(2 if sampler == "heun" and t < kept[0] else 1)]  # predicted, then corrected
    assert told == [said for t in asked for said in ([t, t], "tick")]
    assert evaluations(make(), sampler, steps) == len(asked) == (2 * count - 1 if sampler == "heun" else count)


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_only_the_noise_half_of_a_learned_variance_model_counts(sampler):
    fixed, learned = (
        sampled(make(learn_sigma=learn_sigma), two_modes("cosine", 1 + learn_sigma), NOISE[:, :1], sampler, 5)
        for learn_sigma in (False, True))
    assert torch.equal(fixed, learned)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_setting_counts(sampler):
    def draw(**change):
        return sample(make(learn_sigma=False), two_modes("cosine"), NOISE, Y, noise=lambda i: NOISE.roll(i + 1, 0),
                      **{"sampler": sampler, "steps": 6} | change)

    others = [{"sampler": other} for other in SAMPLERS if not {other, sampler} <= {"ddim", "euler"} and other != sampler]
    for change in (*others, {"steps": 7}, {"clip_denoised": True}, *[{"eta": 0.5}] * (sampler == "ddim")):
        assert (draw() - draw(**change)).abs().amax(dim=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_enters_and_float32_leaves(sampler):
    seen = set()

    def model(x_t, t, y):
        seen.add(x_t.dtype)
        return x_t.bfloat16()

    x_0 = sample(make(learn_sigma=False), model, NOISE.half(), Y, sampler=sampler, steps=4, noise=lambda i: NOISE)
    assert (x_0.dtype, seen) == (torch.float32, {torch.float32})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_read_back_from_the_device(sampler):
    """The meta device has no values: whoever reads one raises."""
    x = torch.empty(2, 4, 8, 8, device="meta")
    guided = ClassifierFreeGuidance(lambda x_t, t, y: torch.cat([x_t, x_t], 1), 2.0, 10, interval=(0.2, 0.8))
    x_0 = sample(make(), guided, x, torch.zeros(2, dtype=torch.int64, device="meta"), sampler=sampler, steps=5,
                 noise=lambda i: x, clip_denoised=True)
    assert (x_0.device.type, x_0.shape, x_0.dtype) == ("meta", x.shape, torch.float32)


class Guided:
    """Guidance of a model that notes its timestep and how many images it sees."""

    def __init__(self, cfg_scale, **interval):
        self.seen, self.model = [], two_modes("cosine")
        self.guided = ClassifierFreeGuidance(self, cfg_scale, null_label=1, **interval)

    def __call__(self, x_t, t, y):
        self.seen.append((t[0].item(), len(x_t)))
        return self.model(x_t, t, y) + y[:, None, None, None] / 10

    def draw(self, sampler, **settings):
        settings = {"steps": 5 - (sampler == "dpm++2m"), "noise": lambda i: NOISE[:2].roll(i)} | settings
        return sample(make(learn_sigma=False), self.guided, NOISE[:2], Y[:2], sampler=sampler, **settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg_scale, inside", [(2.0, 4), (1.0, 2), (0.0, 2)])
@pytest.mark.parametrize("interval, timesteps", [
    ((0.2, 0.8), {250, 500, 749}),                             # of 0, 250, 500, 749, 999
    ((0.2505, 0.7495), {250, 500, 749}), ((0.2506, 0.7494), {500}), ((0.0, 0.0005), {0}), ((0.9995, 1.0), {999}),
    ((0.0006, 0.9994), {250, 500, 749}),
])
def test_guides_at_the_timesteps_in_the_interval_only(sampler, cfg_scale, inside, interval, timesteps):
    model = Guided(cfg_scale, interval=interval)
    model.draw(sampler)
    without_0 = sampler == "dpm++2m"
    assert len(model.seen) == evaluations(make(), sampler, 5 - without_0)
    assert model.seen == [(t, inside if t in timesteps else 2) for t, _ in model.seen]
    assert {t for t, _ in model.seen} | {0} == {0, 250, 500, 749, 999}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_whole_interval_is_no_interval(sampler):
    whole, none, plain = Guided(2.0, interval=(0.0, 1.0)), Guided(2.0), Guided(2.0)
    plain.guided = plain.guided.__call__                       # a model that samplers cannot ask for a noise level
    x_0 = none.draw(sampler)
    assert torch.equal(whole.draw(sampler), x_0) and torch.equal(plain.draw(sampler), x_0)
    assert whole.seen == none.seen == plain.seen


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_bound_of_the_interval_counts(sampler):
    outcomes = [Guided(3.0, interval=interval).draw(sampler) for interval in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.7), (0.3, 0.7))]
    for i, one in enumerate(outcomes):
        assert all((one - other).abs().max() > 0.01 for other in outcomes[:i])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_builds_no_graph_and_can_clip(sampler):
    weight = torch.ones(1, requires_grad=True)
    x_0 = sample(make(), lambda x_t, t, y: OUTPUT * weight, NOISE, Y, sampler=sampler, steps=5,
                 noise=lambda i: NOISE, clip_denoised=True)
    assert not x_0.requires_grad
    assert x_0.abs().max() <= 1 + 1e-6                         # the last step of euler and heun rounds


@pytest.mark.parametrize("change, message", [
    ({"sampler": "dpm"}, "unknown sampler='dpm' for GaussianDiffusion; choose one of ddpm, ddim, dpm\\+\\+2m, euler, heun"),
    ({"eta": 1.5}, "eta=1.5"), ({"eta": -0.1}, "eta=-0.1"), ({"eta": float("nan")}, "eta=nan"),
    *[({"sampler": sampler, "eta": 0.5}, "eta=0.5 is a setting of ddim") for sampler in SAMPLERS if sampler != "ddim"],
    ({"steps": 1001}, "1001 steps"), ({"steps": 1}, "steps=1 leaves nothing"),
])
def test_bad_values_are_named_with_a_remedy(change, message):
    settings = {"sampler": "ddim", "steps": 2, "noise": lambda i: NOISE} | change
    with pytest.raises(ConfigError, match=message):
        sample(make(), lambda x_t, t, y: OUTPUT, NOISE, Y, **settings)
    if "eta" not in change:
        with pytest.raises(ConfigError, match=message):
            evaluations(make(), settings["sampler"], settings["steps"])
