"""Every shipped recipe is one that can run, and is the model that it says."""

import dataclasses
import math
from typing import Annotated, Any, get_args

import pytest
import torch

from largescale.config.presets import DIT_SIZES, PRESETS, find_preset
from largescale.config.ranges import (
    Range,
    above,
    at_least,
    between,
    one_of,
    range_of,
)
from largescale.config.schema import Config, ModelConfig
from largescale.config.validation import validate
from largescale.errors import ConfigError
from largescale.models.build import build_model
from largescale.train import parse


def parameters(m: ModelConfig) -> tuple[int, int]:
    """(all, trainable) of a DiT, in closed form."""
    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    d, patch, tokens = m.hidden_size, m.patch_size**2, (m.input_size // m.patch_size) ** 2
    mlp = int(d * m.mlp_ratio)
    block = linear(d, 3 * d) + linear(d, d) + linear(d, mlp) + linear(mlp, d) + linear(d, 6 * d)
    trainable = linear(patch * m.in_channels, d) + linear(256, d) + linear(d, d) + linear(d, 2 * d)
    trainable += linear(d, patch * m.in_channels * (2 if m.learn_sigma else 1))
    frozen = tokens * d
    if m.num_classes:
        trainable += (m.num_classes + (m.class_dropout_prob > 0)) * d
    if m.max_caption_tokens:
        block += linear(d, d) + linear(d, 2 * d) + linear(d, d)
        trainable += linear(m.caption_width, d) + linear(m.caption_pooled_width, d) + linear(d, d)
        null = m.max_caption_tokens * m.caption_width + m.caption_pooled_width
        frozen += m.max_caption_tokens + (null if m.null_caption == "encoded" else 0)
        trainable += null if m.null_caption == "learned" else 0
    trainable += m.depth * block
    return trainable + frozen, trainable


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_one_that_can_run(name: str) -> None:
    config = PRESETS[name]()
    validate(config, 1)
    assert config.name == name
    if config.model.architecture == "ddpmpp":
        return
    for model in (config.model, dataclasses.replace(config.model, null_caption="learned")):
        with torch.device("meta"):
            built = list(build_model(model).parameters())
        assert (sum(p.numel() for p in built), sum(p.numel() for p in built if p.requires_grad)) == parameters(model)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
@pytest.mark.parametrize(("stride", "normalize"), [(16, "dataset"), (32, "encoder")])
def test_latents_of_autoencoders_that_scale_down_further(size: str, stride: int, normalize: str) -> None:
    """32 channels and patches of 1, as LightningDiT's config has for VA-VAE f16d32 and DC-AE's for f32c32."""
    c = PRESETS[f"dit_{size}1_imagenet256_f{stride}"]()
    m = c.model
    assert (m.patch_size, m.in_channels, m.input_size * stride) == (1, 32, 256)
    assert (m.hidden_size, m.depth, m.num_heads) == DIT_SIZES[size] and m.num_classes == 1000
    assert (c.data.normalize, c.data.path) == (normalize, f"data/imagenet256_f{stride}")
    same = PRESETS[f"dit_{size}2_imagenet256"]()
    assert (c.optimizer, c.diffusion, c.train.global_batch_size, c.curriculum) == (
        same.optimizer, same.diffusion, same.train.global_batch_size, same.curriculum)


@pytest.mark.parametrize("name, size, steps, patience, told", [
    ("dit_xl2_imagenet256", "xl", 400_000, 400, (1000, 0, 0.1)),
    ("dit_l2_imagenet256", "l", 2_000_000, 400, (1000, 0, 0.1)),
    ("dit_s2_coco256", "s", 400_000, 200, (0, 77, 0.1)),
    ("dit_b2_coco256", "b", 400_000, 200, (0, 77, 0.1)),
    ("dit_l2_coco256", "l", 2_000_000, 400, (0, 77, 0.1)),
    *[(f"dit_{size}2_ffhq256", size, 100_000, 400 if size == "l" else 200, (0, 0, 0.0)) for size in "sbl"],
    ("dit_s2_imagenet256", "s", 400_000, 200, (1000, 0, 0.1)),
    ("dit_b2_imagenet256", "b", 400_000, 200, (1000, 0, 0.1)),
    ("dit_b2_imagenet256_linear", "b", 400_000, 200, (1000, 0, 0.1)),
    ("dit_l2_imagenet256_linear", "l", 2_000_000, 400, (1000, 0, 0.1)),
    ("dit_s2_coco256_linear", "s", 400_000, 200, (0, 77, 0.1)),
    ("dit_b2_ffhq256_linear", "b", 100_000, 200, (0, 0, 0.0)),
    ("sit_b2_imagenet256", "b", 400_000, 200, (1000, 0, 0.1)),
    ("sit_b2_ffhq256", "b", 100_000, 200, (0, 0, 0.0)),
])
def test_recipes_of_the_paper(name: str, size: str, steps: int, patience: int, told: tuple[int, int, float]) -> None:
    c = PRESETS[name]()
    m = c.model
    assert (m.hidden_size, m.depth, m.num_heads) == DIT_SIZES[size] and m.patch_size == 2
    assert (m.num_classes, m.max_caption_tokens, m.class_dropout_prob) == told
    assert (c.train.steps, c.curriculum.patience, c.data.path) == (steps, patience, f"data/{name.split('_')[2]}")
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.optimizer.ema_decay, c.train.global_batch_size) == (1e-4, 0, 0.9999, 256)
    kind = ("linear", "snr") if name.endswith("_linear") else ("cosine", "uniform")
    assert (c.curriculum.n_clusters, c.diffusion.schedule, c.curriculum.clusters, c.data.horizontal_flip) == (20, *kind, True)
    assert c.diffusion.objective == ("flow" if name.startswith("sit") else "gaussian") and c.diffusion.timesteps == 1000


@pytest.mark.parametrize("name, weights, told, mult, size", [
    ("edm_ddpmpp_cifar10", 55_735_299, 10, (2, 2, 2), 32), ("edm_ddpmpp_ffhq64", 61_805_571, 0, (1, 2, 2, 2), 64),
])
def test_recipes_of_edm(name: str, weights: int, told: int, mult: tuple[int, ...], size: int) -> None:
    c = PRESETS[name]()
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(c.model).parameters()) == weights
    assert (c.model.num_classes, c.model.unet.channel_mult, c.model.input_size, c.model.in_channels) == (told, mult, size, 3)
    assert (c.diffusion.objective, c.diffusion.p_mean, c.diffusion.p_std, c.diffusion.sigma_data) == ("edm", -1.2, 1.2, 0.5)
    assert (c.train.ds_config, c.train.global_batch_size, c.train.steps) == ("ds_configs/zero2_fp16.json", 256, 781_250)
    assert (c.curriculum.n_clusters, c.curriculum.patience, c.optimizer.lr, c.optimizer.ema_decay) == (20, 200, 1e-4, 0.9999)
    assert (c.model.class_dropout_prob, c.telemetry.preview_cfg_scale) == ((0.1, 1.5) if told else (0, 1))  # as the paper guides
    assert 0.1 < c.data.augment < 0.2 and c.model.unet.augment_dim == 9
    with torch.device("meta"):
        unconditional = build_model(dataclasses.replace(c.model, num_classes=0))
    assert sum(p.numel() for p in unconditional.parameters()) == weights - (told + 1) * 128 * (told > 0)


@pytest.mark.parametrize("name, change, message", [
    ("digits", {"num_classes": -1}, "model.num_classes=-1 must be at least 0, 0 for no labels; set --model.num-classes"),
    ("digits", {"max_caption_tokens": 5}, "model.num_classes=10 must be 0 with captions .model.max_caption_tokens=5."),
    ("digits", {"num_classes": 0}, "model.class_dropout_prob=0.1 must be 0 with model.num_classes=0 and model.max_caption_tokens=0: .*nothing to drop"),
    ("digits", {"num_classes": 0, "class_dropout_prob": 0.0}, "preview_cfg_scale=2.0 must be 1 .*no null label or caption"),
    ("emoji", {"class_dropout_prob": 0.0}, "preview_cfg_scale=2.0 must be 1"),
    ("emoji", {"max_caption_tokens": 0}, "model.class_dropout_prob=0.1 must be 0"),
    ("emoji", {"max_caption_tokens": -1}, "model.max_caption_tokens=-1 must be at least 0, 0 for no captions; set --model.max-caption-tokens"),
    ("emoji", {"caption_width": 0}, "model.caption_width=0 must be at least 1"),
    ("emoji", {"caption_pooled_width": 0}, "model.caption_pooled_width=0 must be at least 1"),
])
def test_conditions_that_cannot_be_right(name: str, change: dict[str, float], message: str) -> None:
    config = PRESETS[name]()
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(config, model=dataclasses.replace(config.model, **change)), 1)


def test_errors_name_the_settings() -> None:
    """In full, as one would have to type them."""
    config = PRESETS["digits"]()
    many = dataclasses.replace(config, curriculum=dataclasses.replace(config.curriculum, n_clusters=5000))
    with pytest.raises(ConfigError, match=r"^curriculum.n_clusters=5000 must not exceed diffusion.timesteps=1000; set --curriculum.n-clusters"):
        validate(many, 1)
    unet = PRESETS["debug_edm"]()
    odd = dataclasses.replace(unet, model=dataclasses.replace(unet.model, input_size=15))
    with pytest.raises(ConfigError, match=r"for the 2 resolutions of model.unet.channel_mult=\(1, 2\)"):
        validate(odd, 1)


@pytest.mark.parametrize("name, meant", [
    ("dit_l2_imagenet", "dit_l2_imagenet256"), ("dit_l2", "dit_l2_imagenet256"), ("l2_imagenet256_linear", "dit_l2_imagenet256_linear"),
    ("edm_cifar10", "edm_ddpmpp_cifar10"), ("SiT_ffhq", "sit_b2_ffhq256"), ("digts", "digits"), ("dit_xl2_imagenet256_linear", "dit_l2_imagenet256_linear"),
    ("my.yaml", None), ("--local_rank=0", None)])
def test_a_name_that_is_none(name: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        find_preset(name)
    hint = f"did you mean {meant!r}? " if meant else ""
    assert str(refused.value) == f"unknown preset {name!r}; {hint}python -m largescale.train --help lists them"


# ---- ranges


def numbers(settings: Any, section: str = "") -> dict[str, Any]:
    """key -> annotation, of the fields that take a number."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(value := getattr(settings, field.name)):
            found |= numbers(value, f"{section}{field.name}.")
        elif {int, float} & set(parts(field.type)):
            found[section + field.name] = field.type
    return found


def parts(annotation: Any) -> list[Any]:
    """The types that a type is made of."""
    inner = [part for arg in get_args(annotation) for part in parts(arg)]
    return [annotation, *inner]


def test_every_number_states_its_range() -> None:
    found = numbers(Config("x"))
    assert len(found) > 50 and {"optimizer.betas", "train.threads", "model.unet.channel_mult"} <= found.keys()
    assert [key for key, annotation in found.items() if range_of(annotation) is None] == []
    assert range_of(int) is None and range_of(Annotated[int, "a note"]) is None  # what would be found


@pytest.mark.parametrize("stated, fine, wrong, text", [
    (at_least(1), [1, 10**400, "auto", None, (1, 2)], [0, 0.99, (3, 0)], "at least 1"),
    (at_least(0, zero_means="never"), [0, 5], [-1], "at least 0, 0 for never"),
    (above(0), [1e-300, 2], [0, -1.0], "above 0"),
    (between(0, 1), [0, 0.5, 1], [-0.1, 1.1], "in [0, 1]"),
    (between(0, 1, closed="left"), [0, 0.999, (0.9, 0.999)], [1, -0.1, (0.9, 1.0)], "in [0, 1)"),
    (one_of(0, 9), [0, 9], [5, -9], "0 or 9"),
])
def test_ranges(stated: Range, fine: list[Any], wrong: list[Any], text: str) -> None:
    assert stated.text == text
    assert [stated.violation(value) for value in fine] == [""] * len(fine)
    assert [stated.violation(value) for value in wrong] == [text] * len(wrong)
    assert [stated.violation(value) for value in (math.inf, -math.inf, math.nan)] == ["finite"] * 3


def test_help_says_ranges(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # wider, the sections stand side by side
    with pytest.raises(SystemExit):
        parse(["debug", "--help"])
    help_of: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│ ")
        if text.startswith("--"):
            flag = text.split()[0].strip(",")
            help_of[flag] = ""
        elif flag:
            help_of[flag] = f"{help_of[flag]} {text}".strip()
    assert help_of["--train.steps"] == "Optimizer steps of the run. Must be at least 1, at most 1_000_000_000. (default: 20)"
    assert help_of["--model.num-classes"] == "Number of class labels. Must be at least 0, 0 for no labels, at most 10_000_000. (default: 10)"
    assert help_of["--optimizer.betas"] == "AdamW's decay rates of the first and second moment. Must be in [0, 1). (default: 0.9 0.999)"
    assert help_of["--train.device"] == "What to train on. (default: cpu)"
    for key, annotation in numbers(Config("x")).items():
        stated = range_of(annotation)
        assert stated and f"Must be {stated.shown}. (default: " in help_of[f"--{key.replace('_', '-')}"]
