"""Recipes by name. `python -m largescale.train NAME` starts one, and overrides any field of it."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from largescale.config.schema import (
    CheckpointConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    TelemetryConfig,
    TrainConfig,
    UNetConfig,
)
from largescale.errors import ConfigError

# hidden_size, depth, num_heads (table 1 of arXiv:2212.09748)
DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

# What a model is conditioned on, by data set. CLIP ViT-L/14 has 77 tokens of 768 channels, and a
# pooled vector of 768.
CONDITIONS: dict[str, dict[str, Any]] = {
    "imagenet256": {"num_classes": 1000},
    "coco256": {
        "num_classes": 0,
        "max_caption_tokens": 77,
        "caption_width": 768,
        "caption_pooled_width": 768,
    },
    "ffhq256": {"num_classes": 0, "class_dropout_prob": 0.0},
}


# The paper's iterations by data set. Its headline models train for HEADLINE_STEPS.
STEPS = {"imagenet256": 400_000, "coco256": 400_000, "ffhq256": 100_000}
HEADLINE_STEPS = 2_000_000


def dit(size: str, patch_size: int, data: str, steps: int | None = None) -> Config:
    """DiT on 256x256 latents (4, 32, 32) with the hyper-parameters of arXiv:2403.10348: AdamW at
    1e-4 without decay, EMA 0.9999, batch 256, 20 clusters, tau_max 200 (400 for DiT-L), cosine
    schedule. Not the paper's: bf16 (it trained in fp32), and DiT-XL, which it does not train and
    which gets DiT-L's tau_max."""
    hidden_size, depth, num_heads = DIT_SIZES[size]
    # An unconditional model has nothing to guide a preview with.
    preview_cfg_scale = 1.0 if data == "ffhq256" else 1.5
    return Config(
        name=f"dit_{size}{patch_size}_{data}",
        model=ModelConfig(
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            **CONDITIONS[data],
        ),
        curriculum=CurriculumConfig(patience=400 if size in ("l", "xl") else 200),
        data=DataConfig(path=f"data/{data}"),
        train=TrainConfig(steps=steps or STEPS[data]),
        telemetry=TelemetryConfig(preview_cfg_scale=preview_cfg_scale),
    )


def dit_of_stride(size: str, stride: int) -> Config:
    """DiT on ImageNet's latents of an autoencoder that scales down by 16 or 32 to 32 channels, with
    patches of one latent pixel and the rest as in `dit`. By 16 as VA-VAE's f16d32 and LightningDiT
    (arXiv:2501.01423), which normalises by the data's statistics; by 32 as DC-AE's f32c32
    (arXiv:2410.10733), whose DiT multiplies by the autoencoder's scaling_factor."""
    config = dit(size, 1, "imagenet256")
    name = f"imagenet256_f{stride}"
    return dataclasses.replace(
        config,
        name=f"dit_{size}1_{name}",
        model=dataclasses.replace(config.model, input_size=256 // stride, in_channels=32),
        data=DataConfig(path=f"data/{name}", normalize="dataset" if stride == 16 else "encoder"),
    )


def linear(size: str, data: str, steps: int | None = None) -> Config:
    """The paper's linear variant: betas from 1e-4 to 0.02, and clusters at the SNRs of the cosine
    schedule's."""
    cosine = dit(size, 2, data, steps)
    # Equal shares of the linear schedule's timesteps would be other noise levels than the paper's.
    return dataclasses.replace(
        cosine,
        name=f"{cosine.name}_linear",
        diffusion=DiffusionConfig(schedule="linear"),
        curriculum=dataclasses.replace(cosine.curriculum, clusters="snr"),
    )


def sit(size: str, data: str) -> Config:
    """SiT (arXiv:2401.08740): DiT's backbone and hyper-parameters, linear interpolant, velocity
    prediction; with the unused output channels of released SiT (`learn_sigma`)."""
    config = dit(size, 2, data)
    return dataclasses.replace(
        config, name=f"sit_{size}2_{data}", diffusion=DiffusionConfig(objective="flow")
    )


def edm(data: str) -> Config:
    """EDM's DDPM++ (arXiv:2206.00364), 55.7 M parameters on CIFAR-10, labels as its `--cond=1`;
    FFHQ without. Network, noise levels, dropout, augmentation and 200 million images are EDM's;
    learning rate, EMA, batch, clusters, patience and fp16 are those of arXiv:2403.10348, which
    guides CIFAR-10 at 1.5, so labels are dropped. EDM itself drops none, and has learning rates of
    1e-3 and 2e-4 after a warm-up, an EMA of half a million images, and 512 images a batch on
    CIFAR-10."""
    faces = data == "ffhq64"
    # Where two values stand here, the first is EDM's for FFHQ, the second its for CIFAR-10.
    return Config(
        name=f"edm_ddpmpp_{data}",
        model=ModelConfig(
            architecture="ddpmpp",
            input_size=64 if faces else 32,
            in_channels=3,
            num_classes=0 if faces else 10,
            class_dropout_prob=0.0 if faces else 0.1,
            learn_sigma=False,
            unet=UNetConfig(
                channel_mult=(1, 2, 2, 2) if faces else (2, 2, 2),
                dropout=0.05 if faces else 0.13,
                augment_dim=9,
            ),
        ),
        diffusion=DiffusionConfig(objective="edm"),
        data=DataConfig(
            path=f"data/{data}", horizontal_flip=False, augment=0.15 if faces else 0.12
        ),
        train=TrainConfig(steps=200_000_000 // 256, ds_config="ds_configs/zero2_fp16.json"),
        telemetry=TelemetryConfig(preview_steps=18, preview_cfg_scale=1.0 if faces else 1.5),
    )


def edm_original() -> Config:
    """EDM's own recipe for CIFAR-10 (arXiv:2206.00364, table 7, and its code): `edm("cifar10")`
    without a curriculum and without dropped labels, in fp32, with batches of 512, a learning rate
    of 1e-3 after a warm-up over 10 million images, and an EMA with a half-life of half a million
    images, at first 5 % of those seen; 200 million images. Its code also replaces gradients that are
    not finite; here they stop the run."""
    base = edm("cifar10")
    batch = 512
    return dataclasses.replace(
        base,
        name="edm_ddpmpp_cifar10_original",
        model=dataclasses.replace(base.model, class_dropout_prob=0.0),
        curriculum=CurriculumConfig(pacing="none"),
        optimizer=OptimizerConfig(
            lr=1e-3,
            warmup_steps=10_000_000 // batch,
            # A half-life in images, as a decay a step.
            ema_decay=0.5 ** (batch / 500_000),
            ema_rampup=0.05,
        ),
        train=TrainConfig(
            steps=200_000_000 // batch,
            global_batch_size=batch,
            ds_config="ds_configs/zero2_fp32.json",
        ),
        telemetry=dataclasses.replace(base.telemetry, preview_cfg_scale=1.0),
    )


def digits() -> Config:
    """5,000 real MNIST digits at 16x16 pixels, a small DiT, minutes on two CPU cores."""
    return Config(
        name="digits",
        model=ModelConfig(
            input_size=16,
            in_channels=1,
            patch_size=4,
            hidden_size=128,
            depth=4,
            num_heads=4,
            num_classes=10,
        ),
        curriculum=CurriculumConfig(n_clusters=5, patience=10),
        data=DataConfig(path="data/digits", horizontal_flip=False),
        # With 0.999 the EMA would still hold 9 % of the untrained weights at the end; 0.07 % now.
        optimizer=OptimizerConfig(lr=2e-3, ema_decay=0.997),
        train=TrainConfig(
            steps=2_400, global_batch_size=128, ds_config="ds_configs/zero2_fp32.json", device="cpu"
        ),
        checkpoint=CheckpointConfig(every=200, keep_every=0),
        telemetry=TelemetryConfig(
            log_every=20,
            reference_every=400,
            reference_images=32,
            preview_every=800,
            preview_images=40,
            preview_cfg_scale=2.0,
        ),
    )


def demo() -> Config:
    """What `make demo` trains: `digits` as a flow (SiT) with half the batch, which draws digits as
    good after a third of the images. Noise prediction learns late what a digit is, which is decided
    at high noise levels."""
    base = as_sit(digits())
    return dataclasses.replace(
        base,
        name="demo",
        optimizer=dataclasses.replace(base.optimizer, ema_decay=0.995),
        train=dataclasses.replace(base.train, steps=1_600, global_batch_size=64),
        telemetry=dataclasses.replace(base.telemetry, preview_every=400, preview_steps=10),
    )


def emoji() -> Config:
    """What `make demo-text` trains: 32x32 pixels and the captions of a small encoder, a small DiT
    on CPU cores."""
    base = digits()
    return dataclasses.replace(
        base,
        name="emoji",
        model=dataclasses.replace(
            base.model,
            input_size=32,
            in_channels=3,
            num_classes=0,
            max_caption_tokens=16,
            caption_width=384,
            caption_pooled_width=384,
        ),
        data=DataConfig(path="data/emoji", horizontal_flip=False),
        # The gradient's norm is about 0.1. Without a limit, a run with batches of 32 diverged at
        # step 3,300.
        optimizer=dataclasses.replace(base.optimizer, clip_grad_norm=1.0),
        train=dataclasses.replace(base.train, steps=2_000, global_batch_size=64),
    )


def debug() -> Config:
    """20 steps of everything that a run does, in seconds."""
    # Every interval is short enough that each thing happens.
    return Config(
        name="debug",
        model=ModelConfig(
            input_size=16,
            in_channels=1,
            patch_size=4,
            hidden_size=32,
            depth=2,
            num_heads=2,
            num_classes=10,
        ),
        curriculum=CurriculumConfig(n_clusters=5, patience=1),
        data=DataConfig(path="data/digits", horizontal_flip=False),
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.99),
        train=TrainConfig(
            steps=20, global_batch_size=16, ds_config="ds_configs/zero2_fp32.json", device="cpu"
        ),
        checkpoint=CheckpointConfig(every=5, keep_every=0),
        telemetry=TelemetryConfig(
            log_every=1,
            reference_every=10,
            reference_images=4,
            preview_every=20,
            preview_images=4,
            preview_steps=5,
        ),
    )


def as_sit(config: Config) -> Config:
    """The same recipe with the objective flow."""
    return dataclasses.replace(
        config, name=f"{config.name}_sit", diffusion=DiffusionConfig(objective="flow")
    )


def as_edm(config: Config, unet: UNetConfig) -> Config:
    """The same recipe with the objective edm and a U-Net."""
    # DiT's fields have to return to their defaults, so only what describes the data is kept.
    model = ModelConfig(
        architecture="ddpmpp",
        input_size=config.model.input_size,
        in_channels=config.model.in_channels,
        num_classes=config.model.num_classes,
        learn_sigma=False,
        unet=unet,
    )
    return dataclasses.replace(
        config, name=f"{config.name}_edm", model=model, diffusion=DiffusionConfig(objective="edm")
    )


def _presets() -> dict[str, Callable[[], Config]]:
    """Every recipe by its name, in the order in which --help lists them."""
    presets: dict[str, Callable[[], Config]] = {}

    # DiT with the cosine schedule: every patch size on ImageNet, patches of 2 elsewhere.
    for size in DIT_SIZES:
        for patch_size in (2, 4, 8):
            name = f"dit_{size}{patch_size}_imagenet256"
            presets[name] = partial(dit, size, patch_size, "imagenet256")
    for size in "sbl":
        for data in ("coco256", "ffhq256"):
            presets[f"dit_{size}2_{data}"] = partial(dit, size, 2, data)
    presets["dit_l2_imagenet256"] = partial(dit, "l", 2, "imagenet256", HEADLINE_STEPS)
    presets["dit_l2_coco256"] = partial(dit, "l", 2, "coco256", HEADLINE_STEPS)

    # DiT on latents of autoencoders that scale down further
    for stride in (16, 32):
        for size in ("b", "l", "xl"):
            presets[f"dit_{size}1_imagenet256_f{stride}"] = partial(dit_of_stride, size, stride)

    # DiT with the linear schedule
    for size in "sbl":
        for data in STEPS:
            presets[f"dit_{size}2_{data}_linear"] = partial(linear, size, data)
    for data in ("imagenet256", "coco256"):
        presets[f"dit_l2_{data}_linear"] = partial(linear, "l", data, HEADLINE_STEPS)

    # the other objectives
    for data in ("imagenet256", "ffhq256"):
        presets[f"sit_b2_{data}"] = partial(sit, "b", data)
    for data in ("cifar10", "ffhq64"):
        presets[f"edm_ddpmpp_{data}"] = partial(edm, data)
    presets["edm_ddpmpp_cifar10_original"] = edm_original

    # what a laptop trains in seconds or minutes
    presets |= {
        "demo": demo,
        "digits": digits,
        "emoji": emoji,
        "digits_sit": lambda: as_sit(digits()),
        "digits_edm": lambda: as_edm(digits(), UNetConfig(16, (1, 2), 2, (8,), dropout=0.0)),
        "debug": debug,
        "debug_sit": lambda: as_sit(debug()),
        "debug_edm": lambda: as_edm(debug(), UNetConfig(16, (1, 2), 1, (8,), dropout=0.1)),
    }
    return presets


PRESETS = _presets()


def find_preset(name: str) -> Config:
    """The recipe of that name. Raises ConfigError, with the preset that an unknown name may stand
    for: one with all of its parts, or one spelt alike."""
    if name in PRESETS:
        return PRESETS[name]()
    parts = name.lower().split("_")
    near = [known for known in PRESETS if _has_parts(known, parts)]
    near = near or difflib.get_close_matches(name.lower(), PRESETS, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"unknown preset {name!r}; {meant}python -m largescale.train --help lists them"
    )


def _has_parts(preset: str, parts: list[str]) -> bool:
    """Whether each part starts a word of the preset's name: l2 and imagenet, of
    dit_l2_imagenet256."""
    # An underscore starts each word, and stands in no part.
    return all(f"_{part}" in f"_{preset}" for part in parts)
