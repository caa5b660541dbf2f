"""What a run is: frozen dataclasses, each number with its range. `validation` has the rules between
fields. This module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from largescale.config.ranges import above, at_least, between, one_of


@dataclass(frozen=True)
class UNetConfig:
    """DDPM++ as in EDM (arXiv:2206.00364, appendix F); only with model.architecture=ddpmpp."""

    model_channels: Annotated[int, at_least(1, 8192)] = 128
    """Channels at the highest resolution, before channel_mult."""
    channel_mult: Annotated[tuple[int, ...], at_least(1)] = (2, 2, 2)
    """Factors on model_channels, one per resolution, from the image's down."""
    num_blocks: Annotated[int, at_least(1, 1000)] = 4
    """Residual blocks per resolution."""
    attn_resolutions: Annotated[tuple[int, ...], at_least(1)] = (16,)
    """Resolutions (sides in pixels) whose blocks have self-attention."""
    dropout: Annotated[float, between(0, 1, closed="left")] = 0.13
    """Probability that an activation is dropped. The masks follow from (seed, step, rank, micro
    step): with another micro batch or number of ranks a run continues with other masks."""
    augment_dim: Annotated[int, one_of(0, 9)] = 0
    """9: the network is given the nine labels of data.augment; 0: it is not."""


@dataclass(frozen=True)
class ModelConfig:
    """Images or latents are (in_channels, input_size, input_size). The fields from patch_size to
    mlp_ratio, the captions' and learn_sigma are DiT's (arXiv:2212.09748)."""

    architecture: Literal["dit", "ddpmpp"] = "dit"
    """The network: dit, a diffusion transformer, or ddpmpp, EDM's DDPM++ U-Net."""
    input_size: Annotated[int, at_least(1, 8192)] = 32
    """Height and width of the images or latents."""
    in_channels: Annotated[int, at_least(1, 8192)] = 4
    """Channels of the images or latents."""
    # DiT's sizes
    patch_size: Annotated[int, at_least(1, 8192)] = 2
    """Side of the patches that become DiT's tokens."""
    hidden_size: Annotated[int, at_least(1, 65_536)] = 1024
    """Width of DiT's tokens."""
    depth: Annotated[int, at_least(1, 1000)] = 24
    """Number of DiT's blocks."""
    num_heads: Annotated[int, at_least(1, 1024)] = 16
    """Attention heads of each block."""
    mlp_ratio: Annotated[float, above(0, 100)] = 4.0
    """Width of a block's MLP as a multiple of hidden_size."""
    # What the model is conditioned on: labels, captions, or nothing.
    num_classes: Annotated[int, at_least(0, 10_000_000, zero_means="no labels")] = 1000
    """Number of class labels."""
    max_caption_tokens: Annotated[int, at_least(0, 8192, zero_means="no captions")] = 0
    """Tokens that captions are padded to, and so the most that one may have."""
    caption_width: Annotated[int, at_least(1, 65_536)] = 768
    """Channels of a caption's token; CLIP ViT-L/14 has 768."""
    caption_pooled_width: Annotated[int, at_least(1, 65_536)] = 768
    """Channels of the vector that stands for a complete caption."""
    null_caption: Literal["encoded", "learned"] = "encoded"
    """What stands for a dropped caption: the encoding of the empty caption, or learned values."""
    class_dropout_prob: Annotated[float, between(0, 1, closed="left")] = 0.1
    """Probability that a label or caption is replaced by the null one, for classifier-free
    guidance."""
    learn_sigma: bool = True
    """Whether to learn the variance too, between the bounds of arXiv:2102.09672, which adds the vb
    term to the loss. With diffusion.objective=flow the channels exist, as in released SiT, and are
    unused."""
    # Where diffusers' DiT differs from the paper's code, so that its weights mean the same here.
    downscale_freq_shift: Literal[0, 1] = 0
    """How DiT's 128 timestep frequencies are spaced: f_i = 10000 ** (-i / (128 - shift)). 0 is
    facebookresearch's, 1 diffusers'. largescale.convert sets it by the source of the weights."""
    mlp_norm_eps: Annotated[float, above(0, 1)] = 1e-6
    """The term that keeps the layer norm before a DiT block's MLP stable: diffusers' DiT has 1e-5
    there by default. largescale.convert sets it by the source of the weights."""
    unet: UNetConfig = field(default_factory=UNetConfig)


@dataclass(frozen=True)
class DiffusionConfig:
    objective: Literal["gaussian", "flow", "edm"] = "gaussian"
    """gaussian: noise prediction (DDPM). flow: velocity prediction (SiT). edm: preconditioned
    denoising (EDM)."""
    schedule: Literal["linear", "cosine"] = "cosine"
    """The noise schedule (betas) of the objective gaussian."""
    timesteps: Annotated[int, at_least(2, 100_000)] = 1000
    """Number of diffusion steps of the objective gaussian. For flow and edm: the bins in which
    noise.sampling keeps its statistics."""
    fixed_variance: Literal["small", "large"] = "small"
    """The sampler's variance of the objective gaussian, where the model does not learn it."""
    interpolant: Literal["linear", "gvp"] = "linear"
    """How the objective flow mixes: linear is x_t = (1 - u) x_start + u noise, gvp the same by
    cosine and sine."""
    # EDM's noise levels (table 1 of arXiv:2206.00364)
    p_mean: Annotated[float, between(-20, 20)] = -1.2
    """Mean of ln(sigma) in training, for the objective edm."""
    p_std: Annotated[float, at_least(0.001, 100)] = 1.2
    """Standard deviation of ln(sigma) in training, for the objective edm."""
    sigma_data: Annotated[float, above(0, 1000)] = 0.5
    """Standard deviation of the data, for the objective edm."""


@dataclass(frozen=True)
class NoiseConfig:
    """Which noise levels are drawn, among those that the curriculum has active, and how much each
    counts in the loss: what the curriculum is compared with, and can be combined with."""

    sampling: Literal[
        "uniform",
        "logit_normal",
        "loss_second_moment",
        "speed",
        "laplace",
        "beta",
        "mode",
        "cosine_map",
    ] = "uniform"
    """How noise levels are drawn among the active ones. logit_normal, mode, cosine_map:
    arXiv:2403.03206. loss_second_moment: resampling by the loss, arXiv:2102.09672; uniform until
    each active one of diffusion.timesteps has been drawn 10 times. speed: fewer where noise hardly
    grows, arXiv:2405.17403 (its weights are weighting=p2). laplace: log SNR from a Laplace
    distribution, arXiv:2407.03297. beta: t from a beta distribution (ECCV 2024)."""
    logit_mean: Annotated[float, between(-100, 100)] = 0.0
    """Mean of logit(u) with sampling=logit_normal."""
    logit_std: Annotated[float, at_least(0.001, 1000)] = 1.0
    """Standard deviation of logit(u) with sampling=logit_normal."""
    speed_ratio: Annotated[float, above(0)] = 5.0
    """With sampling=speed: how much more often levels are drawn at which noise grows fast."""
    laplace_mu: Annotated[float, between(-100, 100)] = 0.0
    """The log SNR that sampling=laplace draws most often."""
    laplace_b: Annotated[float, at_least(0.001, 1000)] = 0.5
    """Width of the Laplace distribution of log SNR with sampling=laplace."""
    beta_alpha: Annotated[float | None, at_least(0.001, 10_000)] = None
    """With sampling=beta: the exponent alpha of t ** (alpha - 1), t = u. The larger, the rarer are
    levels with little noise. Without a default: the paper's was not to be had."""
    beta_beta: Annotated[float | None, at_least(0.001, 10_000)] = None
    """With sampling=beta: the exponent beta of (1 - t) ** (beta - 1). The larger, the rarer are
    levels with much noise."""
    mode_scale: Annotated[float, between(-1, 1.7519)] = 1.29
    """The s of sampling=mode: above 0 the middle is drawn more often, below 0 the ends."""
    shift: Annotated[float, between(0.001, 1000)] = 1.0
    """The s of t -> s t / (1 + (s - 1) t), t = u, applied to what sampling draws: the shift by
    resolution of arXiv:2403.03206, s = sqrt(pixels / base pixels); above 1 for more noise. With
    objective=flow and the linear interpolant."""
    weighting: Literal["none", "min_snr", "p2"] = "none"
    """How much each noise level counts in the loss. min_snr: arXiv:2303.09556, min(SNR, gamma)
    times the error of x_start, whatever is predicted. p2: arXiv:2204.00227, the loss times 1 / (k +
    SNR) ** gamma, whatever is predicted."""
    min_snr_gamma: Annotated[float, above(0, 1_000_000)] = 5.0
    """Where weighting=min_snr cuts the SNR."""
    p2_gamma: Annotated[float, at_least(0, 100, zero_means="no weighting")] = 1.0
    """The exponent gamma of weighting=p2."""
    p2_k: Annotated[float, at_least(0, 1_000_000)] = 1.0
    """The constant k of weighting=p2."""


@dataclass(frozen=True)
class CurriculumConfig:
    clusters: Literal["uniform", "snr"] = "uniform"
    """How the noise axis is cut. uniform: equal shares of the timesteps. snr: edges at the SNR that
    these have under the cosine schedule."""
    n_clusters: Annotated[int, at_least(1, 10_000)] = 20
    """N: the number of noise clusters, so of stages; the paper has 20."""
    pacing: Literal["patience", "fixed", "none"] = "patience"
    """The rule that ends a stage. patience: the paper's. fixed: NaiveCL, a stage every `interval`
    steps. none: vanilla training."""
    patience: Annotated[int, at_least(0, 1_000_000_000)] = 200
    """tau_max: steps in a row without a new best loss that a stage may take. It watches the loss
    that is trained on: mse and vb, averaged over the global batch, and weighted where
    noise.weighting is set."""
    loss_smoothing: Annotated[float, between(0, 1, closed="left")] = 0.0
    """With pacing=patience, and not the paper's: the patience watches an exponential average of the
    stage's losses, of a memory of 1 / (1 - loss_smoothing) steps, from that step of the stage on;
    0: each step's own loss, as in the paper."""
    interval: Annotated[int, at_least(1, 1_000_000_000)] = 10_000
    """Steps of a stage with pacing=fixed."""
    order: Literal["easy_first", "hard_first"] = "easy_first"
    """easy_first: from the most noise, as in the paper. hard_first: the anti-curriculum, from the
    least noise."""
    stages: Literal["accumulating", "separate"] = "accumulating"
    """accumulating: a stage keeps the clusters of those before it, as in the paper. separate: it
    trains on its own cluster only, and after the last one on everything."""
    only_cluster: Annotated[int, at_least(0)] = 0
    """Train on this cluster alone from start to end, as the difficulty study does; 0: on the active
    ones."""


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/imagenet256"
    """A folder of Arrow shards, made by one of the programs in data_prep."""
    validation: str | None = None
    """A folder of held-out images, packed as the training data are: data_prep.split sets a part of
    a set aside. Their loss is logged every telemetry.validation_every steps."""
    horizontal_flip: bool = True
    """Whether to mirror images at random."""
    augment: Annotated[float, between(0, 1)] = 0.0
    """Probability of each of EDM's augmentations, whose labels the network gets
    (model.unet.augment_dim=9); 0: none."""
    normalize: Literal["encoder", "dataset", "none"] = "encoder"
    """What makes x_start of a latent. encoder: its own scale_factor, and mean and std of each
    channel where it has them. dataset: mean and std of each channel that were measured while
    packing, so that each has mean 0 and std 1. none: latents as they are stored. Of pixels always
    encoder."""
    grown: Literal["refuse", "next_epoch"] = "refuse"
    """What a resumed run does where images were added to its set (data_prep --append). refuse: it
    ends with an error that says so. next_epoch: it finishes the epoch in the old order, as if
    nothing were added, and the next epoch has all rows."""
    order: Literal["full", "blocks"] = "full"
    """In which order an epoch visits the rows. full: every row may come next, by one small read for
    each. blocks: for slow shared storage, by long reads ahead: each place of the global batch takes
    64 neighbouring rows in random order, then 64 from elsewhere, so a batch is of as many places of
    the set as it has rows."""
    prefetch: Annotated[int, at_least(1, 1024)] = 4
    """Steps whose data a thread reads ahead."""
    stage: str | None = None
    """A folder on each node's own disk that the data sets are copied to before training, and read
    from: by the node's ranks together, each file verified by its hash. What is there already, also
    from other jobs, is not copied again."""
    verify: bool = False
    """Whether to hash every shard again before training, or every copy of data.stage."""


@dataclass(frozen=True)
class OptimizerConfig:
    kernel: Literal["auto", "torch", "deepspeed", "apex", "fused"] = "auto"
    """The implementation of AdamW. torch: torch.optim.AdamW, fused. apex: NVIDIA apex's FusedAdam.
    deepspeed: DeepSpeed's own, which it compiles at the first start. fused: largescale's Triton
    kernel, with EMA and cast in the same pass, launched before the host knows that the gradient is
    finite; on a CPU the same in plain PyTorch. auto: apex on a GPU where it is installed, else
    torch."""
    # DiT's, and so the paper's: no warm-up, no decay.
    lr: Annotated[float, above(0, 1000)] = 1e-4
    """Learning rate after the warm-up, and before any decay."""
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "constant"
    """The learning rate after the warm-up. cosine, linear: to final_lr in decay_steps, by default
    the rest of the run. wsd (warm-up, stable, decay): constant, and linear to final_lr in the last
    decay_steps, by default a tenth of the run. inverse_sqrt: lr sqrt(decay_steps / step) from step
    decay_steps on, by default the warm-up's end, as in EDM2 (arXiv:2312.02696)."""
    warmup_steps: Annotated[int, at_least(0, 1_000_000_000, zero_means="no warm-up")] = 0
    """Steps in which the learning rate rises from 0 to lr, by equal steps."""
    decay_steps: Annotated[int | None, at_least(1, 1_000_000_000)] = None
    """Length of the decay in steps; what it means, and its default, is the schedule's."""
    final_lr: Annotated[float, at_least(0, 1000)] = 0.0
    """Learning rate after the decay of cosine, linear and wsd."""
    betas: Annotated[tuple[float, float], between(0, 1, closed="left")] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, at_least(0, 1)] = 1e-8
    """AdamW's term that keeps the division stable."""
    weight_decay: Annotated[float, at_least(0, 1000)] = 0.0
    """AdamW's decoupled weight decay."""
    clip_grad_norm: Annotated[float, at_least(0, zero_means="no clipping")] = 0.0
    """Largest norm of the gradient."""
    ema_decay: Annotated[float, between(0, 1, closed="left")] = 0.9999
    """Decay per step of the exponential moving average of the weights."""
    ema_rampup: Annotated[float, at_least(0, 1000, zero_means="no ramp-up")] = 0.0
    """Ramp-up of the EMA: its half-life is at most this share of the steps so far; EDM has 0.05."""
    ema_widths: Annotated[tuple[float, ...], above(0, 0.28)] = ()
    """Widths of power-function averages to keep beside the EMA, as EDM2's 0.05 and 0.1
    (arXiv:2312.02696): standard deviations as shares of the training so far. From their snapshots
    largescale.ema makes the average of any width afterwards. Each takes 4 bytes a parameter."""


@dataclass(frozen=True)
class TrainConfig:
    steps: Annotated[int, at_least(1, 1_000_000_000)] = 400_000
    """Optimizer steps of the run."""
    global_batch_size: Annotated[int, at_least(1, 1_048_576)] = 256
    """Images of an optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: Annotated[int | Literal["auto"] | None, at_least(1, 1_048_576)] = None
    """Images that a rank takes through one forward and backward pass; by default its complete share
    of the global batch. auto: the largest part of it for which there is memory."""
    activation_checkpointing: bool = False
    """Keep only each block's input, and compute the rest again in the backward pass: less memory, a
    third more work."""
    compile: Literal["auto", "off", "blocks", "model"] = "auto"
    """What torch.compile compiles: each block or the complete model. auto: blocks on a GPU with a
    compiler, off on a CPU."""
    kernels: Literal["auto", "inductor", "fused"] = "auto"
    """What computes DiT's blocks beside matrix products and attention. inductor: PyTorch's
    operations, as torch.compile fuses them. fused: largescale's Triton kernels, which move half the
    bytes; on a CPU the same in plain PyTorch. auto: inductor, until fused has been measured to be
    faster."""
    tf32: bool = True
    """Whether a GPU multiplies float32 matrices in TensorFloat-32: 10 bits of mantissa, several
    times as fast. Off: in float32 (the paper says fp32, and not which)."""
    threads: Annotated[int | None, at_least(1)] = None
    """Threads of each rank on a CPU; by default $OMP_NUM_THREADS, or this machine's cores shared
    among its ranks."""
    ds_config: str = "ds_configs/zero2_bf16.json"
    """A JSON file of DeepSpeed's settings: memory, precision, communication."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What to train on."""
    init_from: str | None = None
    """Weights to start from in place of random ones: a run directory (its EMA) or an export, such
    as largescale.convert makes of published weights. After the first checkpoint they are not needed
    any more."""
    init_new: tuple[str, ...] = ()
    """Parts of the network that start anew all the same, as in y_embedder final_layer: where
    init_from has other classes, another variance, another resolution (pos_embed), or captions in
    place of classes (y_embedder cross_attn)."""
    seed: Annotated[int, between(0, 2**32, closed="left")] = 0
    """Seed of the weights, the data order and every random draw."""
    timeout_s: Annotated[float, at_least(1, 604_800)] = 600.0
    """Seconds without a sign of life after which a run that hangs is ended, naming the rank that is
    missing; a minute more before the first step."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int, at_least(1, 1_000_000_000)] = 5_000
    """Steps between checkpoints. One more is written when a run is asked to stop."""
    keep_last: Annotated[int, at_least(1, 1_000_000)] = 3
    """How many of the newest of these to keep, besides the newest one that was written on a
    stop."""
    keep_every: Annotated[int, at_least(0, 1_000_000_000, zero_means="none")] = 50_000
    """Keep checkpoints at multiples of this for ever."""
    keep_best: Literal["none", "ema", "raw"] = "none"
    """Keep the checkpoint whose EMA, or raw weights, have the least loss on data.validation; one is
    written when the loss falls."""
    ema_snapshot_every: Annotated[int | None, at_least(1, 1_000_000_000)] = None
    """Steps between snapshots of the averages of optimizer.ema_widths, in half precision; by
    default keep_every, or `every` where that is 0. One more is written at the end."""
    ema_snapshots: Annotated[int, at_least(0, 1_000_000, zero_means="all")] = 0
    """How many of the newest of these snapshots to keep."""


@dataclass(frozen=True)
class AnomalyConfig:
    """What is done when numbers go bad. `skip` goes back to the last good checkpoint and leaves out
    the inputs from there to here; the run's saved state says which."""

    not_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite, or an fp16 loss scale that cannot
    fall further."""
    spike: Literal["count", "stop", "skip"] = "count"
    """What to do about a loss that leaps."""
    spike_factor: Annotated[float, above(1)] = 3.0
    """A loss leaps if it is above this many times the running geometric mean of its stage."""
    max_skips: Annotated[int, at_least(0, 1_000_000)] = 3
    """How many windows of inputs may be left out in a run before it stops after all."""


@dataclass(frozen=True)
class TelemetryConfig:
    log_every: Annotated[int, at_least(1, 1_000_000_000)] = 100
    """Steps between rows of the log."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where a run is shown besides metrics.jsonl; without a name nowhere. wandb and mlflow are
    extras of their own, and take project, server and keys from their own environment variables."""
    reference_every: Annotated[int, at_least(0, 1_000_000_000, zero_means="never")] = 5_000
    """Steps between evaluations of the loss on a fixed set of (image, u, noise) per cluster."""
    reference_images: Annotated[int, at_least(1, 10_000)] = 16
    """Images of that fixed set, per cluster."""
    validation_every: Annotated[int, at_least(1, 1_000_000_000)] = 5_000
    """Steps between evaluations of the loss on data.validation: unweighted, of the EMA and the raw
    weights, per cluster, in all, and at the eight noise levels that MLPerf averages."""
    validation_images: Annotated[int, at_least(1, 100_000)] = 64
    """Images of data.validation, per cluster and per level."""
    preview_every: Annotated[int, at_least(0, 1_000_000_000, zero_means="never")] = 50_000
    """Steps between sample grids. Latents are decoded where the VAE that the data were packed with
    is on this machine; otherwise the grid says that they are not."""
    preview_images: Annotated[int, at_least(1, 10_000)] = 32
    """Images of a sample grid."""
    preview_steps: Annotated[int, at_least(2, 10_000)] = 50
    """Sampling steps of a sample grid."""
    preview_cfg_scale: Annotated[float, at_least(0, 1000)] = 1.5
    """Guidance scale of a sample grid; 1 is no guidance."""


@dataclass(frozen=True)
class Config:
    name: str
    """Name of the run; without --output its folder is runs/NAME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    # How this start of the run is carried out: none of these changes what is computed.
    output: str | None = None
    """The run directory; by default runs/NAME."""
    dry_run: bool = False
    """Print what would run and what it costs, and start nothing."""
    fit_ranks: Annotated[int | None, at_least(1, 1_048_576)] = None
    """Print the largest number of ranks, at most this, that the batch can be split over, and start
    nothing. slurm/env.sh asks it of every allocation."""
    print_config: bool = False
    """Print all settings as YAML, with what each means, and start nothing: a file for --config."""
    verbose: bool = False
    """With --dry-run: print all settings too, and DeepSpeed's, as JSON."""
    profile: bool = False
    """Write a torch-profiler trace of a few steps, for Perfetto and TensorBoard, to the run
    directory."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")
