"""Recipes by name. `python -m largescale.train NAME` starts one; every field can be overridden there."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from largescale.config import (
    CheckpointConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TelemetryConfig,
    TrainConfig,
)

# hidden_size, depth, num_heads (table 1 of arXiv:2212.09748)
DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

# What a model is told, by data set. CLIP ViT-L/14 has 77 tokens of 768 channels, and 768 pooled.
CONDITIONS: dict[str, dict[str, Any]] = {
    "imagenet256": {"num_classes": 1000},
    "coco256": {"num_classes": 0, "caption_tokens": 77, "caption_width": 768, "caption_pooled_width": 768},
    "ffhq256": {"num_classes": 0, "class_dropout_prob": 0.0},
}


def dit(size: str, patch_size: int, data: str, steps: int = 400_000) -> Config:
    """DiT on 256x256 latents (4, 32, 32) with the hyper-parameters of arXiv:2403.10348: AdamW at 1e-4 without decay,
    EMA 0.9999, batch 256, 20 clusters, tau_max 200 (400 for DiT-L), cosine schedule. Not the paper's: bf16 (it trained
    in fp32), and DiT-XL, which it does not train and which gets DiT-L's tau_max."""
    hidden_size, depth, num_heads = DIT_SIZES[size]
    return Config(
        name=f"dit_{size}{patch_size}_{data}",
        model=ModelConfig(
            patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, **CONDITIONS[data]
        ),
        curriculum=CurriculumConfig(patience=400 if size in ("l", "xl") else 200),
        data=DataConfig(path=f"data/{data}"),
        train=TrainConfig(steps=steps),
    )


def dit_b2_ffhq256() -> Config:
    """Unconditional: nothing to guide a preview with."""
    return dataclasses.replace(dit("b", 2, "ffhq256", 100_000), telemetry=TelemetryConfig(preview_cfg_scale=1.0))


def digits() -> Config:
    """The demo: 5,000 real MNIST digits at 16x16 pixels, a small DiT, minutes on two CPU cores."""
    return Config(
        name="digits",
        model=ModelConfig(
            input_size=16, in_channels=1, patch_size=4, hidden_size=128, depth=4, num_heads=4, num_classes=10
        ),
        curriculum=CurriculumConfig(n_clusters=5, patience=10),
        data=DataConfig(path="data/digits", horizontal_flip=False),
        # An EMA of 0.999 would still hold 9 % of the untrained weights after these steps (0.997: 0.07 %).
        optimizer=OptimizerConfig(lr=2e-3, ema_decay=0.997),
        train=TrainConfig(steps=2_400, global_batch_size=128, ds_config="ds_configs/zero2_fp32.json", device="cpu"),
        checkpoint=CheckpointConfig(every=200, keep_every=0),
        telemetry=TelemetryConfig(
            log_every=20, reference_every=400, reference_images=32, preview_every=800, preview_images=40,
            preview_cfg_scale=2.0,
        ),
    )


def emoji() -> Config:
    """The text demo: 32x32 pixels and the captions of a small encoder, a small DiT on CPU cores."""
    demo = digits()
    return dataclasses.replace(
        demo,
        name="emoji",
        model=dataclasses.replace(
            demo.model, input_size=32, in_channels=3, num_classes=0, caption_tokens=16, caption_width=384,
            caption_pooled_width=384,
        ),
        data=DataConfig(path="data/emoji", horizontal_flip=False),
        # The norm is 0.1. Without a limit a run with batches of 32 diverged at step 3,300.
        optimizer=dataclasses.replace(demo.optimizer, clip_grad_norm=1.0),
        train=dataclasses.replace(demo.train, steps=2_000, global_batch_size=64),
    )


def debug() -> Config:
    """20 steps of everything that a run does, in seconds."""
    return Config(
        name="debug",
        model=ModelConfig(
            input_size=16, in_channels=1, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
        ),
        curriculum=CurriculumConfig(n_clusters=5, patience=1),
        data=DataConfig(path="data/digits", horizontal_flip=False),
        optimizer=OptimizerConfig(lr=1e-3, ema_decay=0.99),
        train=TrainConfig(steps=20, global_batch_size=16, ds_config="ds_configs/zero2_fp32.json", device="cpu"),
        checkpoint=CheckpointConfig(every=5, keep_every=0),
        telemetry=TelemetryConfig(
            log_every=1, reference_every=10, reference_images=4, preview_every=20, preview_images=4, preview_steps=5
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    **{
        f"dit_{size}{patch_size}_imagenet256": partial(dit, size, patch_size, "imagenet256")
        for size in DIT_SIZES
        for patch_size in (2, 4, 8)
    },
    "dit_l2_imagenet256": partial(dit, "l", 2, "imagenet256", 2_000_000),  # the headline run
    "dit_s2_coco256": partial(dit, "s", 2, "coco256"),
    "dit_b2_coco256": partial(dit, "b", 2, "coco256"),
    "dit_l2_coco256": partial(dit, "l", 2, "coco256", 2_000_000),
    "dit_b2_ffhq256": dit_b2_ffhq256,
    "digits": digits,
    "emoji": emoji,
    "debug": debug,
}
