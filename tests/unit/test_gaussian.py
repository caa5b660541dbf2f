"""Gaussian diffusion against guided-diffusion's numbers (tests/reference/README.md); both ends of the noise axis."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.errors import ConfigError
from largescale.noise_schedule import SCHEDULES, log_snr, make_betas

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "gaussian_diffusion.npz")


def rnd(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


T_REF = torch.tensor([0, 1, 10, 250, 500, 750, 998, 999])
X_START, NOISE, OUTPUT = rnd("x0", 8, 4, 8, 8) * 0.5, rnd("noise", 8, 4, 8, 8), rnd("model_output", 8, 8, 8, 8)
Y = torch.zeros(8, dtype=torch.int64)


def constant_model(x_t, t, y):
    return OUTPUT


def make(schedule="cosine", timesteps=1000, learn_sigma=True, **kwargs):
    return GaussianDiffusion(make_betas(schedule, timesteps), learn_sigma=learn_sigma, **kwargs)


def assert_matches(ours, reference):
    """Within float32 rounding, sample by sample: their sizes differ by 10^4."""
    for a, b in zip(ours.flatten(1) if ours.ndim > 1 else ours, torch.from_numpy(reference), strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-6 * b.abs().max().item())
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables(schedule):
    tables = make(schedule).tables
    for name in ("alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2"):
        np.testing.assert_allclose(tables[name], REFERENCE[f"{schedule}_{name}"], rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_and_losses(schedule):
    diffusion = make(schedule)
    assert_matches(diffusion.q_sample(X_START, T_REF, NOISE), REFERENCE[f"{schedule}_q_sample"])
    losses = diffusion.training_losses(constant_model, X_START, T_REF, NOISE, Y)
    for name in ("loss", "mse", "vb"):
        assert_matches(getattr(losses, name), REFERENCE[f"{schedule}_loss_{name}"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_p_mean_variance(schedule):
    p = make(schedule).p_mean_variance(OUTPUT, NOISE, T_REF)
    for ours, name in ((p.mean, "mean"), (p.variance, "variance"), (p.log_variance, "log_variance"),
                       (p.pred_x_start, "pred_xstart")):
        assert_matches(ours, REFERENCE[f"{schedule}_p_{name}"])


def test_clip_denoised_bounds_the_predicted_image():
    p = make().p_mean_variance(OUTPUT, NOISE, T_REF, clip_denoised=True)
    assert p.pred_x_start.abs().max() == 1
    assert p.mean.abs().max() < make().p_mean_variance(OUTPUT, NOISE, T_REF).mean.abs().max()


def test_vb_moves_only_the_variance_and_mse_only_the_mean():
    def gradient(name):
        output = OUTPUT.clone().requires_grad_()
        losses = make().training_losses(lambda x_t, t, y: output, X_START, T_REF, NOISE, Y)
        return torch.autograd.grad(getattr(losses, name).sum(), output)[0].split(4, dim=1)

    (mse_eps, mse_fraction), (vb_eps, vb_fraction) = gradient("mse"), gradient("vb")
    assert not mse_fraction.any() and not vb_eps.any()
    assert mse_eps.any() and vb_fraction.any()
    for loss, part in zip(gradient("loss"), (mse_eps, vb_fraction), strict=True):
        torch.testing.assert_close(loss, part)


def test_without_learned_variance_the_loss_is_mse():
    losses = make(learn_sigma=False).training_losses(lambda x_t, t, y: OUTPUT[:, :4], X_START, T_REF, NOISE, Y)
    assert_matches(losses.loss, REFERENCE["cosine_loss_mse"])
    assert torch.equal(losses.loss, losses.mse) and not losses.vb.any()


def test_fixed_and_learned_variances_have_the_same_ends():
    """IDDPM: the learned fraction -1 is beta~, 1 is beta."""
    small, large, learned = make(learn_sigma=False), make(learn_sigma=False, fixed_variance="large"), make()
    eps = OUTPUT[:, :4]
    for diffusion, fraction in ((small, -1.0), (large, 1.0)):
        fixed = diffusion.p_mean_variance(eps, NOISE, T_REF)
        ends = learned.p_mean_variance(torch.cat([eps, torch.full_like(eps, fraction)], 1), NOISE, T_REF)
        torch.testing.assert_close(fixed.log_variance[1:], ends.log_variance[1:])
        torch.testing.assert_close(fixed.variance[1:], ends.variance[1:])
        assert fixed.variance.shape == fixed.log_variance.shape == NOISE.shape
        assert fixed.log_variance[0].exp().mean().item() == pytest.approx(small.tables["posterior_variance"][1])
    assert not small.p_mean_variance(eps, NOISE, T_REF).variance[0].any()  # beta~_0 = 0 itself has no logarithm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_computed_with_in_float32(dtype):
    half = OUTPUT.to(dtype)
    diffusion = make()
    assert diffusion.model_output(lambda x_t, t, y: half, NOISE, T_REF, Y).dtype == torch.float32
    losses = diffusion.training_losses(lambda x_t, t, y: half, X_START, T_REF, NOISE, Y)
    expected = diffusion.training_losses(lambda x_t, t, y: half.float(), X_START, T_REF, NOISE, Y)
    for a, b in zip(losses, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.equal(diffusion.p_mean_variance(half, NOISE, T_REF).mean,
                       diffusion.p_mean_variance(half.float(), NOISE, T_REF).mean)


def test_respaced_process_shows_the_model_original_timesteps_and_composes():
    seen = []

    def model(x_t, t, y):
        seen.append(t.tolist())
        return OUTPUT[:2]

    respaced = make().respaced(np.array([0, 400, 999]))
    t = torch.tensor([1, 2])
    respaced.training_losses(model, X_START[:2], t, NOISE[:2], Y[:2])
    respaced.respaced(np.array([0, 2])).training_losses(model, X_START[:2], t - 1, NOISE[:2], Y[:2])
    assert seen == [[400, 999], [0, 999]]


# One noise axis: the ends, the direction, the curriculum's lowest level.

LOWEST = [0.0, 1e-9, 0.0004, 0.0005, 0.0006, 1 / 3, 0.5, 2 / 3, 0.95, 0.998, 0.9989, 0.9999, 1 - 2**-53,
          *(i / 20 for i in range(20))]


@pytest.mark.parametrize("timesteps", [2, 7, 1000])
@pytest.mark.parametrize("lowest", LOWEST)
def test_timesteps_cover_exactly_the_active_levels(lowest, timesteps):
    diffusion = make(timesteps=timesteps)
    v = torch.tensor([2.0**-1074, 2**-53, 1 - 2**-53, 1.0], dtype=torch.float64)  # and one that was rounded to 1
    t = diffusion.draw(v, lowest)
    assert t.dtype == torch.int64
    first = t[0].item()
    assert t.tolist() == [first, first, timesteps - 1, timesteps - 1]
    if lowest <= (timesteps - 0.5) / timesteps:                          # else no timestep is above it: the last stays
        assert diffusion.noise_level(t[:1]).item() >= lowest
    assert first == 0 or diffusion.noise_level(t[:1] - 1).item() < lowest


@pytest.mark.parametrize("timesteps", [2, 7, 1000])
@pytest.mark.parametrize("low, high", [(0, 0.05), (0.5, 0.55), (0.95, 1), (1 / 3, 2 / 3), (0.1, 0.1001), (0.9999, 1)])
def test_between_two_levels(low, high, timesteps):
    """Exactly the timesteps whose noise level lies there; one that is near where none does."""
    diffusion = make(timesteps=timesteps)
    t = diffusion.draw(torch.tensor([2.0**-1074, 1 - 2**-53, 1.0], dtype=torch.float64), low, high)
    inside = [i for i in range(timesteps) if low <= (i + 0.5) / timesteps < high]
    assert [t[0].item(), t[1].item(), t[2].item()] == ([inside[0], inside[-1], inside[-1]] if inside else [t[0].item()] * 3)
    assert diffusion.snap_to_timesteps(low, high) == (t[0].item() / timesteps, (t[1].item() + 1) / timesteps)
    assert inside or abs((t[0].item() + 0.5) / timesteps - low) <= 1 / timesteps


@pytest.mark.parametrize("i", range(20))
def test_cluster_edges_become_integer_edges(i):
    assert make().draw(torch.tensor([1e-300], dtype=torch.float64), i / 20).item() == 50 * i


def test_timesteps_are_uniform():
    v = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000           # each of 300 timesteps takes 20
    assert make().draw(v, 0.7).bincount(minlength=1000).tolist() == [0] * 700 + [20] * 300
    assert make().draw(v, 0.2, 0.5).bincount(minlength=1000).tolist() == [0] * 200 + [20] * 300 + [0] * 500


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_snr_falls_as_u_rises(schedule):
    diffusion = make(schedule)
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = diffusion.draw(v)
    u = diffusion.noise_level(t)
    assert u.dtype == torch.float64 and (u.diff() > 0).all() and u[0] > 0 and u[-1] < 1
    torch.testing.assert_close(u, v, rtol=0, atol=1e-12)
    assert (np.diff(log_snr(diffusion.betas)[t.numpy()]) < 0).all()
    signal = diffusion.q_sample(torch.ones(1000, 1, 1, 1), t, torch.zeros(1000, 1, 1, 1)).flatten()
    noise = diffusion.q_sample(torch.zeros(1000, 1, 1, 1), t, torch.ones(1000, 1, 1, 1)).flatten()
    assert ((signal / noise).diff() < 0).all()


def test_tables_made_under_inference_mode_can_train():
    diffusion = make()
    with torch.inference_mode():
        diffusion.q_sample(X_START, T_REF, NOISE)
    output = OUTPUT.clone().requires_grad_()
    diffusion.training_losses(lambda x_t, t, y: output, X_START, T_REF, NOISE, Y).loss.sum().backward()
    assert output.grad.isfinite().all()


def test_tables_are_moved_to_a_device_once():
    diffusion = make()
    diffusion.q_sample(X_START, T_REF, NOISE)
    before = diffusion._on_device[X_START.device]
    diffusion.training_losses(constant_model, X_START, T_REF, NOISE, Y)
    assert diffusion._on_device[X_START.device] is before


@pytest.mark.parametrize("call, message", [
    (lambda: make().draw(torch.rand(2, dtype=torch.float64), 1.0), r"0 <= low < high <= 1, got .*\[1.0, 1.0\)"),
    (lambda: make().draw(torch.rand(2, dtype=torch.float64), -0.1), r"\[-0.1, 1.0\)"),
    (lambda: make().draw(torch.rand(2, dtype=torch.float64), float("nan")), r"\[nan, 1.0\)"),
    (lambda: make().draw(torch.rand(2, dtype=torch.float64), 0.5, 0.5), r"\[0.5, 0.5\)"),
    (lambda: make().draw(torch.rand(2), 0.0), "float64 v .* got torch.float32"),
    (lambda: make(learn_sigma=False).p_mean_variance(OUTPUT, NOISE, T_REF), "8 channels for 4-channel .* needs 4"),
    (lambda: make().p_mean_variance(OUTPUT[:, :4], NOISE, T_REF), "4 channels for 4-channel .* needs 8"),
    (lambda: make(fixed_variance="medium"), "'medium'; choose small or large"),
    (lambda: GaussianDiffusion(np.array([0.1, 1.0]), learn_sigma=True), "from 0.1 to 1.0"),
    (lambda: GaussianDiffusion(np.array([0.1, np.nan]), learn_sigma=True), "nan"),
    (lambda: GaussianDiffusion(np.array([]), learn_sigma=True), r"shape \(0,\)"),
])
def test_bad_values_are_named_with_a_remedy(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
