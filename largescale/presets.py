"""Recipes by name. `python -m largescale.train NAME` starts one; every field can be overridden there."""

from collections.abc import Callable
from functools import partial

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


def dit_imagenet256(size: str, patch_size: int) -> Config:
    """DiT on ImageNet 256x256 latents (4, 32, 32) with the hyper-parameters of arXiv:2403.10348: AdamW at 1e-4 without
    decay, EMA 0.9999, batch 256, 20 clusters, tau_max 200 (400 for DiT-L), cosine schedule, 400K steps. Not the
    paper's: bf16 (it trained in fp32), and DiT-XL, which it does not train and which gets DiT-L's tau_max."""
    hidden_size, depth, num_heads = DIT_SIZES[size]
    return Config(
        name=f"dit_{size}{patch_size}_imagenet256",
        model=ModelConfig(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads),
        curriculum=CurriculumConfig(patience=400 if size in ("l", "xl") else 200),
    )


def dit_l2_imagenet256() -> Config:
    """The headline run: DiT-L/2 for 2M steps."""
    return Config(**{**vars(dit_imagenet256("l", 2)), "train": TrainConfig(steps=2_000_000)})


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
        f"dit_{size}{patch_size}_imagenet256": partial(dit_imagenet256, size, patch_size)
        for size in DIT_SIZES
        for patch_size in (2, 4, 8)
    },
    "dit_l2_imagenet256": dit_l2_imagenet256,
    "digits": digits,
    "debug": debug,
}
