"""One noise axis: what every objective owes to the curriculum, and which networks fit which."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from largescale.config.presets import PRESETS
from largescale.config.schema import Config, DiffusionConfig, ModelConfig, NoiseConfig
from largescale.config.validation import validate
from largescale.diffusion.build import OBJECTIVES, build_noise_sampler, build_objective
from largescale.diffusion.edm import Edm
from largescale.diffusion.flow import Flow
from largescale.diffusion.noise_levels import NOISE_SAMPLERS
from largescale.diffusion.objective import Objective, SamplerName
from largescale.diffusion.samplers import check_sampler, quick_sampler, sample
from largescale.diffusion.sampling import SampleNoise, SamplingConfig, draw_samples
from largescale.errors import ConfigError

KINDS = {
    "cosine": DiffusionConfig(), "linear schedule": DiffusionConfig(schedule="linear"),
    "flow": DiffusionConfig("flow"), "gvp": DiffusionConfig("flow", interpolant="gvp"),
    "edm": DiffusionConfig("edm"), "edm, other noise": DiffusionConfig("edm", p_mean=0.4, p_std=2.0),
}
SMALLEST = 2.0**-53


def make(kind: str) -> Objective:
    return build_objective(Config("x", model=ModelConfig(learn_sigma=False), diffusion=KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_snr_falls_as_u_rises(kind: str) -> None:
    objective = make(kind)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = objective.draw(u)
    assert (objective.log_snr(t).diff() < 0).all() and objective.log_snr(t).dtype == torch.float64
    torch.testing.assert_close(objective.noise_level(t), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_snr_is_that_of_what_the_network_sees(kind: str) -> None:
    objective = make(kind)
    t = objective.draw(torch.linspace(0.05, 0.95, 7, dtype=torch.float64))
    seen: list[Any] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: Any) -> torch.Tensor:
        seen.append(x.flatten())
        return torch.zeros_like(x)

    ones, zeros = torch.ones(7, 1, 1, 1), torch.zeros(7, 1, 1, 1)
    for x_start, noise in ((ones, zeros), (zeros, ones)):
        objective.training_losses(model, x_start, t, noise, torch.zeros(7, dtype=torch.long))
    signal, of_noise = seen
    torch.testing.assert_close(2 * (signal / of_noise).abs().log().double(), objective.log_snr(t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_and_sigma_are_those_of_x_t(kind: str) -> None:
    """And the time of what the network is given is the time that was asked of."""
    objective = make(kind)
    t = objective.draw(torch.linspace(0.05, 0.95, 7, dtype=torch.float64))
    alpha, sigma = objective.alpha_sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(2 * (alpha / sigma).log(), objective.log_snr(t), rtol=1e-9, atol=1e-9)
    seen: list[Any] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: Any) -> torch.Tensor:
        seen.append(objective.time_of_input(t))
        seen.append(x.flatten())
        return torch.zeros_like(x)

    ones = torch.ones(7, 1, 1, 1)
    objective.training_losses(model, 2 * ones, t, -3 * ones, torch.zeros(7, dtype=torch.long))
    torch.testing.assert_close(seen[0], t)
    x_t = 2 * alpha - 3 * sigma
    if isinstance(objective, Edm):
        x_t = x_t / (sigma.square() + objective.sigma_data**2).sqrt()  # c_in
    torch.testing.assert_close(seen[1], x_t.float())


class Fourth(Flow):
    """An objective with no sampler that is known to be quick."""

    samplers: ClassVar[tuple[SamplerName, ...]] = ("euler",)
    default_steps: ClassVar[int] = 9
    clips_predictions: ClassVar[bool] = True

    def evaluations(self, sampler: str, steps: int | str) -> int:
        return 5

    def sample(self, model: Any, x_T: torch.Tensor, y: Any, *, tick: Any, **settings: Any) -> torch.Tensor:
        tick()
        return x_T * (2 if settings["clip_denoised"] else 1)


def test_a_fourth_objective_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "fourth", lambda config: Fourth())
    objective = build_objective(Config("x", diffusion=DiffusionConfig("fourth")))  # type: ignore[arg-type]
    assert quick_sampler(objective) == ("euler", 9) and quick_sampler(objective, steps=3) == ("euler", 3)
    done: list[float] = []
    x = draw_samples(lambda x, t, y: x, objective, SamplingConfig("euler", 9, clip_denoised=True), index=[3], shape=(1, 2, 2),
                     condition=lambda index: torch.zeros(1).long(), num_classes=0, batch_size=1, device=torch.device("cpu"), progress=done.append)
    assert torch.equal(x, 2 * SampleNoise(0, [3], (1, 2, 2), torch.device("cpu"))()) and done == [1 / 5]
    with pytest.raises(ConfigError, match="unknown sampler='heun' for Fourth; choose one of euler"):
        check_sampler(objective, "heun", 9, 0.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_can_draw_its_previews(name: str) -> None:
    objective = OBJECTIVES[name](Config("x", model=ModelConfig(learn_sigma=False)))
    assert objective.preview_sampler in objective.samplers
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for clip in (False, objective.clips_predictions):
        x = sample(objective, lambda x, t, y: x / 2, noise, torch.zeros(1).long(), sampler=objective.preview_sampler, steps=5, clip_denoised=clip,
                   noise=lambda i: pytest.fail("previews are deterministic"))
        assert x.isfinite().all() and (not clip or x.abs().max() <= 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.0, 0.05), (0.95, 1.0), (0.35, 0.4)])
def test_draws_stay_inside_at_both_ends(kind: str, low: float, high: float) -> None:
    """The extremes of v, and v that was rounded to 0 or 1, give times that are finite, in the interval, and not its end."""
    objective = make(kind)
    v = torch.tensor([0.0, SMALLEST, 0.5, 1 - SMALLEST, 1.0], dtype=torch.float64)
    t = objective.draw(v, low, high)
    u = objective.noise_level(t)
    assert t.isfinite().all() and (u > 0).all() and (u < 1).all() and objective.log_snr(t).isfinite().all()
    assert objective.x_start_weight(t).isfinite().all() and (objective.x_start_weight(t) > 0).all()
    assert (u.diff() >= 0).all() and u.min() >= low - 1e-12 and u.max() <= high + 1e-12
    first, last = objective.snap_to_timesteps(low, high)
    assert (first, last) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_uniform_in_the_noise_level(kind: str) -> None:
    objective = make(kind)
    v = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    u = objective.noise_level(objective.draw(v, 0.25, 0.75))
    counted = torch.histogram(u, torch.linspace(0.25, 0.75, 11, dtype=torch.float64)).hist
    assert counted.tolist() == pytest.approx([1000] * 10, abs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_snr_is_that_of_one_noise_level(kind: str) -> None:
    """Continuous in u, that of the time where there is one, and inverted."""
    objective = make(kind)
    u = objective.noise_level(objective.draw((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000))
    log_snr = objective.log_snr(objective.draw(u))
    at = torch.tensor([objective.log_snr_at(x) for x in u.tolist()], dtype=torch.float64)
    gaussian = KINDS[kind].objective == "gaussian"  # half-way between edges that are half-way between timesteps
    torch.testing.assert_close(at[:900], log_snr[:900], rtol=1e-9, atol=0.2 if gaussian else 1e-9)
    torch.testing.assert_close(objective.noise_level_of_snr(at), u, rtol=0, atol=1e-12)
    ends = objective.noise_level_of_snr(torch.tensor([1e4, -1e4], dtype=torch.float64))
    assert ends.tolist() == [0, 1] and objective.log_snr_at(0.0) > at[0] > at[-1] > objective.log_snr_at(1.0)
    if gaussian:
        assert torch.equal((objective.noise_level_of_snr(log_snr) * 1000).floor(), torch.arange(1000).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", NOISE_SAMPLERS)
def test_every_way_of_drawing_goes_with_every_objective(kind: str, sampling: Any) -> None:
    noise = NoiseConfig(sampling, beta_alpha=2.0, beta_beta=3.0)
    config = Config("x", model=ModelConfig(learn_sigma=False), diffusion=KINDS[kind], noise=noise)
    objective = build_objective(config)
    sampler = build_noise_sampler(config, objective)
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    warped, importance = sampler.warp(v, *objective.snap_to_timesteps(0.5, 1.0))
    u = objective.noise_level(objective.draw(warped, 0.5, 1.0))
    assert (u >= 0.5).all() and (u < 1).all() and (u.diff() >= 0).all() and importance.isfinite().all()


MISFITS = [
    ("debug_edm", {"diffusion": DiffusionConfig()}, "diffusion.objective=gaussian must be edm with model.architecture=ddpmpp"),
    ("debug_edm", {"diffusion": DiffusionConfig("flow")}, "diffusion.objective=flow must be edm"),
    ("debug", {"diffusion": DiffusionConfig("edm")}, "model.learn_sigma=True must be off with diffusion.objective=edm, which learns no variance; set --model.no-learn-sigma"),
    ("debug_edm", {"model": {"learn_sigma": True}}, "model.learn_sigma=True must be off"),
    ("debug_edm", {"model": {"patch_size": 4}}, "model.patch_size=4 must stay 2: only model.architecture=dit reads it, and this is ddpmpp"),
    ("debug_edm", {"model": {"max_caption_tokens": 4}}, "model.max_caption_tokens=4 must stay 0"),
    ("debug_edm", {"model": {"input_size": 15}}, "model.input_size=15 must be a multiple of 2"),
    ("debug_edm", {"unet": {"attn_resolutions": (7,)}}, r"model.unet.attn_resolutions=\[7\] must be among \[16, 8\]"),
    ("debug_edm", {"unet": {"model_channels": 6}}, "model.unet.model_channels=6 must be a multiple of 32, or of 4 in a network of fewer"),
    ("debug_edm", {"unet": {"model_channels": 36, "channel_mult": (1, 4)}}, "model_channels=36 must be a multiple of 32, or"),
    ("edm_ddpmpp_cifar10", {"unet": {"model_channels": 132}}, "model_channels=132 must be a multiple of 32"),
    ("debug_edm", {"unet": {"augment_dim": 5}}, "model.unet.augment_dim=5 must be 0 or 9; set --model.unet.augment-dim"),
    ("debug_edm", {"data": {"augment": 0.1}}, "data.augment=0.1 must be 0 where the network is not given its labels"),
    ("edm_ddpmpp_cifar10", {"data": {"horizontal_flip": True}}, "data.horizontal_flip=True must be off with data.augment"),
    ("edm_ddpmpp_cifar10", {"train": {"compile": "blocks"}}, "train.compile=blocks must be model, auto or off"),
    ("debug", {"unet": {"dropout": 0.5}}, "model.unet.dropout=0.5 must stay 0.13: only model.architecture=ddpmpp reads it"),
    ("debug", {"diffusion": DiffusionConfig(sigma_data=1.0)}, "sigma_data=1.0 must stay 0.5: only diffusion.objective=edm"),
    ("debug_sit", {"diffusion": DiffusionConfig("flow", schedule="linear")}, "diffusion.schedule=linear must stay cosine"),
    ("debug_sit", {"curriculum": {"clusters": "snr"}}, "clusters=snr must be uniform with diffusion.objective=flow"),
    ("debug", {"curriculum": {"pacing": "none", "order": "hard_first"}}, "order=hard_first must stay easy_first"),
    ("debug", {"curriculum": {"pacing": "none", "stages": "separate"}}, "stages=separate must stay accumulating"),
    ("debug", {"curriculum": {"only_cluster": 2}}, "only_cluster"),
    ("debug", {"curriculum": {"pacing": "none", "only_cluster": 6}}, "only_cluster"),
    ("debug", {"noise": {"logit_std": 2.0}}, "noise.logit_std=2.0 must stay 1.0: only noise.sampling=logit_normal reads it, and this is uniform; leave out --noise.logit-std, or set --noise.sampling logit_normal"),
    ("debug", {"noise": {"sampling": "logit_normal", "logit_std": 0.0}}, "noise.logit_std=0.0 must be at least 0.001; set --noise.logit-std"),
    ("debug", {"noise": {"sampling": "speed", "speed_ratio": 0.0}}, "noise.speed_ratio=0.0 must be above 0"),
    ("debug", {"noise": {"weighting": "min_snr", "min_snr_gamma": 0.0}}, "min_snr_gamma=0.0 must be above 0"),
    ("debug", {"noise": {"weighting": "p2", "p2_k": -1.0}}, "p2_k=-1.0 must be at least 0"),
    ("debug", {"train": {"global_batch_size": 20_000_000_003}}, "global_batch_size=20000000003 must be at most 1_048_576; set --train.global-batch-size"),
    ("debug", {"train": {"timeout_s": 1e300}}, "timeout_s=1e\\+300 must be at most 604_800"),
    ("debug", {"train": {"timeout_s": 1e-9}}, "timeout_s=1e-09 must be at least 1"),
    ("debug", {"diffusion": {"timesteps": 10**12}}, "timesteps=1000000000000 must be at most 100_000"),
    ("debug", {"data": {"prefetch": 10**11}}, "prefetch=100000000000 must be at most 1_024"),
    ("debug", {"model": {"depth": 10**8}}, "depth=100000000 must be at most 1_000"),
    ("debug", {"telemetry": {"preview_images": 99_999_999_999}}, "preview_images=99999999999 must be at most 10_000"),
    ("debug", {"optimizer": {"lr": 1e300}}, "lr=1e\\+300 must be at most 1_000"),
    ("debug", {"optimizer": {"eps": 1e300}}, "eps=1e\\+300 must be at most 1"),
    ("debug_edm", {"diffusion": {"p_std": 1e-300}}, "p_std=1e-300 must be at least 0.001"),
]


@pytest.mark.parametrize("preset, change, message", MISFITS)
def test_what_does_not_fit_is_refused(preset: str, change: dict[str, Any], message: str) -> None:
    config = PRESETS[preset]()
    validate(config, 1)
    for section, fields in change.items():
        if section == "unet":
            config = replace(config, model=replace(config.model, unet=replace(config.model.unet, **fields)))
        else:
            old = getattr(config, section)
            config = replace(config, **{section: replace(old, **fields) if isinstance(fields, dict) else fields})
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
