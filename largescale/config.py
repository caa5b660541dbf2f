"""What a run is: frozen dataclasses, and the rules that need nothing but the config. No torch."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from largescale.curriculum import FixedPacing, NoPacing, Pacing, PatiencePacing, snr_clusters, uniform_clusters
from largescale.diffusion import schedule
from largescale.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """DiT (arXiv:2212.09748). Images or latents are (in_channels, input_size, input_size)."""

    input_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    """0: no labels."""
    caption_tokens: int = 0
    """Tokens that a caption is padded to; 0: no captions."""
    caption_width: int = 768
    """Channels of a caption's token; of CLIP ViT-L/14."""
    caption_pooled_width: int = 768
    """Channels of the vector that stands for a whole caption."""
    null_caption: Literal["encoded", "learned"] = "encoded"
    """What stands for a dropped caption: the encoding of the empty one, or learned values."""
    class_dropout_prob: float = 0.1
    """Probability that a label or caption is replaced by the null one, for classifier-free guidance."""
    learn_sigma: bool = True
    """Learn the variance too, between the bounds of arXiv:2102.09672 (adds the vb term to the loss)."""


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Literal["linear", "cosine"] = "cosine"
    timesteps: int = 1000
    fixed_variance: Literal["small", "large"] = "small"
    """The sampler's variance where the model does not learn it."""


@dataclass(frozen=True)
class CurriculumConfig:
    clusters: Literal["uniform", "snr"] = "uniform"
    """uniform: equal shares of the timesteps. snr: edges at the SNR that these have under the cosine schedule."""
    n_clusters: int = 20
    pacing: Literal["patience", "fixed", "none"] = "patience"
    """patience: the paper's. fixed: NaiveCL, a stage every `interval` steps. none: vanilla training."""
    patience: int = 200
    """tau_max: steps in a row without a new best loss that a stage may take."""
    interval: int = 10_000


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/imagenet256"
    """A folder of Arrow shards, made by one of the programs in data_prep."""
    horizontal_flip: bool = True
    prefetch: int = 4
    """Steps whose data are read ahead by a thread."""
    verify: bool = False
    """Hash every shard again before training."""


@dataclass(frozen=True)
class OptimizerConfig:
    kernel: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    """torch: torch.optim.AdamW, fused. apex: NVIDIA apex's FusedAdam. deepspeed: DeepSpeed's own, which it compiles at
    the first start. auto: apex on a GPU where it is installed, else torch."""
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 400_000
    global_batch_size: int = 256
    micro_batch_size: int | Literal["auto"] | None = None
    """Images a rank takes through one forward and backward pass; by default its whole share of the global batch. auto:
    the largest part of it for which there is memory."""
    activation_checkpointing: bool = False
    """Keep each block's input only, and compute the rest again in the backward pass: less memory, a third more work."""
    compile: Literal["auto", "off", "blocks", "model"] = "auto"
    """torch.compile, of each block or of the whole model. auto: blocks on a GPU with a compiler, off on a CPU."""
    threads: int | None = None
    """Of each rank on a CPU; by default $OMP_NUM_THREADS, or this machine's cores shared among its ranks."""
    ds_config: str = "ds_configs/zero2_bf16.json"
    """DeepSpeed's settings: memory, precision, communication."""
    device: Literal["cuda", "cpu"] = "cuda"
    seed: int = 0
    timeout_s: float = 600.0
    """Seconds without a sign of life after which a run that hangs is ended, saying which rank is missing; a minute more
    before the first step."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 5_000
    """Steps between checkpoints. One more is written when a run is asked to stop."""
    keep_last: int = 3
    """Of these the newest are kept, and of those written on a stop the newest one."""
    keep_every: int = 50_000
    """Checkpoints at multiples of this are kept for ever; 0 keeps none."""


@dataclass(frozen=True)
class AnomalyConfig:
    """What is done when numbers go bad. `skip` goes back to the last good checkpoint and leaves out the inputs from
    there to here; the run's saved state says which."""

    not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite, or an fp16 loss scale that cannot fall further."""
    spike: Literal["count", "stop", "skip"] = "count"
    """A loss that leaps."""
    spike_factor: float = 3.0
    """How far: above this many times the running geometric mean of its stage."""
    max_skips: int = 3
    """Windows that may be left out, in the whole run, before it stops all the same."""


@dataclass(frozen=True)
class TelemetryConfig:
    log_every: int = 100
    tensorboard: bool = True
    reference_every: int = 5_000
    """Steps between evaluations of the loss on a fixed set of (image, u, noise) per cluster; 0 never."""
    reference_images: int = 16
    """Images of that set, per cluster."""
    preview_every: int = 50_000
    """Steps between sample grids; 0 never."""
    preview_images: int = 32
    preview_steps: int = 50
    preview_cfg_scale: float = 1.5


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    output: str | None = None
    """The run directory; runs/NAME by default."""
    dry_run: bool = False
    """Print what would run, and start nothing."""
    profile: bool = False
    """Write a torch-profiler trace of a few steps, for Perfetto and TensorBoard, to the run directory."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")


# A resumed run may not differ in these: its state, or its random draws, would not be this run's.
FIXED_ON_RESUME = (
    "model.", "diffusion.", "curriculum.clusters", "curriculum.n_clusters", "curriculum.pacing",
    "data.horizontal_flip", "train.global_batch_size", "train.seed", "precision", "dataset",
)
# These change how a run is carried out or watched, not what it computes: not worth a word.
FREE_ON_RESUME = (
    "name", "output", "dry_run", "profile", "data.path", "data.prefetch", "data.verify", "train.micro_batch_size",
    "train.activation_checkpointing", "train.threads", "train.ds_config", "train.device", "train.timeout_s",
    "checkpoint.", "telemetry.",
)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values, as stored beside a run's checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. A field that this version does not know is a ConfigError."""

    def build(cls: Any, values: dict[str, Any]) -> Any:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; this config is another version's")
        return cls(**{
            key: build(fields[key].type, value) if dataclasses.is_dataclass(fields[key].type)
            else tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
        })

    config: Config = build(Config, tree)
    return config


def differences(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a resumed run would change: (not allowed, allowed but worth saying), each as 'key: old -> new'."""
    old, new = dict(flatten(saved)), dict(flatten(current))
    refused: list[str] = []
    said: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or before == "auto" or key.startswith(FREE_ON_RESUME):
            continue  # "auto": saved by a version that did not say what it stood for
        (refused if key.startswith(FIXED_ON_RESUME) else said).append(f"{key}: {before} -> {after}")
    return refused, said


def batch_layout(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps), with
    global_batch_size = micro_batch_size * grad_accum_steps * world_size. "auto", until `fit` has found a number for it,
    stands for the largest: a rank's whole share."""
    total = config.train.global_batch_size
    if total < 1:
        raise ConfigError(f"global_batch_size={total} must be at least 1; the paper uses 256")
    if total % world_size:
        works = [n for n in range(1, total + 1) if total % n == 0]
        near = [n for n in works if n < world_size][-1:] + [n for n in works if n > world_size][:1]
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of world_size={world_size}; "
            f"start {' or '.join(map(str, near))} ranks, "
            f"or try --train.global-batch-size {math.ceil(total / world_size) * world_size}"
        )
    micro = config.train.micro_batch_size
    if micro is None or micro == "auto":
        micro = total // world_size
    if micro < 1 or total % (micro * world_size):
        share = total // world_size
        fits = max((n for n in range(1, max(micro, 1) + 1) if share % n == 0), default=1)
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of micro_batch_size*world_size={micro * world_size} "
            f"({micro}*{world_size}); try --train.micro-batch-size {fits}"
        )
    return micro, total // (micro * world_size)


def cluster_edges(config: Config) -> tuple[float, ...]:
    if config.curriculum.clusters == "uniform":
        return uniform_clusters(config.curriculum.n_clusters)
    own, cosine = (
        schedule.log_snr(schedule.make_betas(name, config.diffusion.timesteps))
        for name in (config.diffusion.schedule, "cosine")
    )
    return snr_clusters(config.curriculum.n_clusters, own, cosine)


def pacing(config: Config) -> Pacing:
    if config.curriculum.pacing == "patience":
        return PatiencePacing(config.curriculum.patience)
    if config.curriculum.pacing == "fixed":
        return FixedPacing(config.curriculum.interval)
    return NoPacing()


def validate(config: Config, world_size: int) -> None:
    """Raise ConfigError for what cannot be right, before anything is started."""
    batch_layout(config, world_size)
    cluster_edges(config)

    def require(ok: bool, key: str, must: str) -> None:
        if not ok:
            value = dict(flatten(to_dict(config)))[key]
            raise ConfigError(f"{key}={value} must {must}; set --{key.replace('_', '-')}")

    m, d, o, t = config.model, config.diffusion, config.optimizer, config.train
    require(m.patch_size > 0 and m.input_size % m.patch_size == 0, "model.patch_size", f"divide {m.input_size=}")
    require(m.num_heads > 0 and m.hidden_size % m.num_heads == 0, "model.num_heads", f"divide {m.hidden_size=}")
    require(m.num_classes >= 0, "model.num_classes", "be 0 (no labels) or positive")
    require(m.caption_tokens >= 0, "model.caption_tokens", "be 0 (no captions) or positive")
    if m.caption_tokens:
        require(m.num_classes == 0, "model.num_classes", f"be 0 with captions ({m.caption_tokens=})")
        require(m.caption_width > 0, "model.caption_width", "be at least 1")
        require(m.caption_pooled_width > 0, "model.caption_pooled_width", "be at least 1")
    require(0 <= m.class_dropout_prob < 1, "model.class_dropout_prob", "lie in [0, 1)")
    require(m.class_dropout_prob == 0 or m.num_classes + m.caption_tokens > 0, "model.class_dropout_prob",
            f"be 0 with {m.num_classes=} and {m.caption_tokens=}: there is nothing to drop")
    require(config.curriculum.n_clusters <= d.timesteps, "curriculum.n_clusters", f"not exceed {d.timesteps=}")
    require(config.curriculum.patience >= 0, "curriculum.patience", "be 0 or more")
    require(config.curriculum.interval > 0, "curriculum.interval", "be at least 1")
    require(config.data.prefetch > 0, "data.prefetch", "be at least 1")
    require(0 < o.lr < math.inf, "optimizer.lr", "be positive")
    require(all(0 <= beta < 1 for beta in o.betas), "optimizer.betas", "lie in [0, 1)")
    require(0 <= o.eps < math.inf, "optimizer.eps", "be 0 or more")
    require(0 <= o.weight_decay < math.inf, "optimizer.weight_decay", "be 0 or more")
    require(0 <= o.ema_decay < 1, "optimizer.ema_decay", "lie in [0, 1)")
    require(0 <= o.clip_grad_norm < math.inf, "optimizer.clip_grad_norm", "be 0 (off) or positive")
    require(t.steps > 0, "train.steps", "be at least 1")
    require(t.threads is None or t.threads > 0, "train.threads", "be at least 1")
    require(0 <= t.seed < 2**32, "train.seed", "lie in [0, 2**32)")
    require(0 < t.timeout_s < math.inf, "train.timeout_s", "be positive")
    require(1 < config.anomaly.spike_factor < math.inf, "anomaly.spike_factor", "be above 1")
    require(config.anomaly.max_skips >= 0, "anomaly.max_skips", "be 0 or more")
    require(config.checkpoint.every > 0, "checkpoint.every", "be at least 1")
    require(config.checkpoint.keep_last > 0, "checkpoint.keep_last", "be at least 1")
    require(config.checkpoint.keep_every >= 0, "checkpoint.keep_every", "be 0 (off) or positive")
    require(config.telemetry.log_every > 0, "telemetry.log_every", "be at least 1")
    require(config.telemetry.reference_images > 0, "telemetry.reference_images", "be at least 1")
    require(config.telemetry.preview_images > 0, "telemetry.preview_images", "be at least 1")
    require(1 < config.telemetry.preview_steps <= d.timesteps, "telemetry.preview_steps", f"lie in 2..{d.timesteps}")
    require(config.telemetry.preview_cfg_scale >= 0, "telemetry.preview_cfg_scale", "be 0 or more")
    unguided = config.telemetry.preview_cfg_scale == 1 or config.telemetry.preview_every == 0
    require(m.class_dropout_prob > 0 or unguided, "telemetry.preview_cfg_scale",
            "be 1 where model.class_dropout_prob is 0: there is no null label or caption to guide with")
