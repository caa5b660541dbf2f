"""What a config may hold. What cannot be right, or is another architecture's or objective's, is an
error before anything is started."""

import math
from typing import Any

from largescale.config.derived import batch_layout, least_steps, make_curriculum, pacing_settings
from largescale.config.schema import Config, ModelConfig, UNetConfig
from largescale.config.serialise import flatten, to_dict
from largescale.errors import ConfigError

# Fields that only one architecture, objective or way of training reads: anywhere else, another
# value than the default is a mistake, not a setting.
FIELDS_USED_ONLY_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("model.architecture", "dit"): (
        "model.patch_size",
        "model.hidden_size",
        "model.depth",
        "model.num_heads",
        "model.mlp_ratio",
        "model.caption_tokens",
        "model.caption_width",
        "model.caption_pooled_width",
        "model.null_caption",
    ),
    ("model.architecture", "ddpmpp"): (
        "model.unet.model_channels",
        "model.unet.channel_mult",
        "model.unet.num_blocks",
        "model.unet.attn_resolutions",
        "model.unet.dropout",
        "model.unet.augment_dim",
    ),
    ("diffusion.objective", "gaussian"): ("diffusion.schedule", "diffusion.fixed_variance"),
    ("diffusion.objective", "flow"): ("diffusion.interpolant",),
    ("diffusion.objective", "edm"): ("diffusion.p_mean", "diffusion.p_std", "diffusion.sigma_data"),
    ("noise.sampling", "logit_normal"): ("noise.logit_mean", "noise.logit_std"),
    ("noise.sampling", "speed"): ("noise.speed_ratio",),
    ("noise.weighting", "min_snr"): ("noise.min_snr_gamma",),
    ("noise.weighting", "p2"): ("noise.p2_gamma", "noise.p2_k"),
}
SAMPLED_STEPS_AT_MOST = 1000  # of a preview
FORGOTTEN = 0.01  # an EMA's share of the untrained weights that is not worth a word


def cli_flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def remarks(config: Config, classes_of_data: int) -> list[str]:
    """What is allowed, and better known before the work than after it. `classes_of_data`: 0 where
    none or unknown."""
    m = config.model
    said = []
    if 0 < classes_of_data < m.num_classes:
        said.append(
            f"model.num_classes={m.num_classes:,}, and the data have {classes_of_data:,}: the "
            f"others are never trained; to leave them out, --model.num-classes {classes_of_data}"
        )
    if m.num_classes + m.caption_tokens and not m.class_dropout_prob:
        said.append(
            "model.class_dropout_prob=0: samples of this model cannot be guided; if they are to "
            "be, --model.class-dropout-prob 0.1"
        )
    if (least := least_steps(config)) > config.train.steps:
        settings = [
            cli_flag(f"curriculum.{name}") for name in pacing_settings(config.curriculum.pacing)
        ]
        said.append(
            f"train.steps={config.train.steps:,} end before the curriculum does, which takes at "
            f"least {least:,} steps: some noise levels are never trained; raise --train.steps, or "
            f"lower {' or '.join(settings)}"
        )
    return [*said, *filter(None, [ema_note(config)])]


def ema_note(config: Config, step: int | None = None) -> str:
    """What to know of the EMA at a step, by default the last; empty where it has forgotten the
    untrained weights."""
    decay, steps = config.optimizer.ema_decay, config.train.steps
    at = steps if step is None else step
    if (left := decay**at) < FORGOTTEN:
        return ""
    forgets = math.ceil(math.log(FORGOTTEN) / math.log(decay)) if decay else 1
    remedy = (
        f"from step {forgets:,} on it is below {FORGOTTEN:.0%}"
        if forgets <= steps
        else f"ema_decay={decay} is for longer runs, for {steps:,} steps try "
        f"--optimizer.ema-decay {max(0.0, 1 - 10 / steps):.4g}"
    )
    return f"The EMA still holds {left:.0%} of the untrained weights at step {at:,}: {remedy}."


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError for what cannot be right."""
    batch_layout(config, world_size)
    values = dict(flatten(to_dict(config)))

    def require(ok: bool, key: str, must: str, remedy: str = "") -> None:
        if not ok:
            section, _, field = key.rpartition(".")
            on = values[key] is True
            remedy = remedy or f"set {cli_flag(f'{section}.no_{field}' if on else key)}"
            raise ConfigError(f"{key}={values[key]} must {must}; {remedy}")

    for check in (check_unused, check_model, check_objective, check_curriculum, check_the_rest):
        check(config, require)


def check_unused(config: Config, require: Any) -> None:
    values, defaults = (dict(flatten(to_dict(c))) for c in (config, Config("")))
    for (choice, wanted), keys in FIELDS_USED_ONLY_BY.items():
        for key in keys if values[choice] != wanted else ():
            require(
                values[key] == defaults[key],
                key,
                f"stay {defaults[key]}: only {choice}={wanted} reads it, and this is "
                f"{values[choice]}",
                f"leave out {cli_flag(key)}, or set {cli_flag(choice)} {wanted}",
            )


def check_model(config: Config, require: Any) -> None:
    m = config.model
    require(m.input_size > 0, "model.input_size", "be at least 1")
    require(m.in_channels > 0, "model.in_channels", "be at least 1")
    require(m.num_classes >= 0, "model.num_classes", "be 0 (no labels) or positive")
    require(m.caption_tokens >= 0, "model.caption_tokens", "be 0 (no captions) or positive")
    require(0 <= m.class_dropout_prob < 1, "model.class_dropout_prob", "lie in [0, 1)")
    require(
        m.class_dropout_prob == 0 or m.num_classes + m.caption_tokens > 0,
        "model.class_dropout_prob",
        f"be 0 with model.num_classes={m.num_classes} and model.caption_tokens={m.caption_tokens}: "
        "there is nothing to drop",
    )
    if m.architecture == "ddpmpp":
        check_unet(m, m.unet, require)
        return
    require(
        m.patch_size > 0 and m.input_size % m.patch_size == 0,
        "model.patch_size",
        f"divide model.input_size={m.input_size}",
    )
    require(
        m.num_heads > 0 and m.hidden_size % m.num_heads == 0,
        "model.num_heads",
        f"divide model.hidden_size={m.hidden_size}",
    )
    if m.caption_tokens:
        require(
            m.num_classes == 0,
            "model.num_classes",
            f"be 0 with captions (model.caption_tokens={m.caption_tokens})",
        )
        require(m.caption_width > 0, "model.caption_width", "be at least 1")
        require(m.caption_pooled_width > 0, "model.caption_pooled_width", "be at least 1")


def check_unet(m: ModelConfig, u: UNetConfig, require: Any) -> None:
    levels = len(u.channel_mult)
    require(
        levels > 0 and min(u.channel_mult) > 0,
        "model.unet.channel_mult",
        "be one or more positive factors",
    )
    narrow = (
        2 * u.model_channels * max(u.channel_mult) < 128
    )  # a norm's groups are 4 channels, or 32 groups of all
    require(
        u.model_channels > 0 and u.model_channels % (4 if narrow else 32) == 0,
        "model.unet.model_channels",
        "be a multiple of 32, or of 4 in a network of fewer than 128 channels everywhere",
    )
    require(
        m.input_size % 2 ** (levels - 1) == 0,
        "model.input_size",
        f"be a multiple of {2 ** (levels - 1)}, for the {levels} resolutions of "
        f"model.unet.channel_mult={u.channel_mult}",
    )
    there = [m.input_size >> level for level in range(levels)]
    require(
        set(u.attn_resolutions) <= set(there), "model.unet.attn_resolutions", f"be among {there}"
    )
    require(u.num_blocks > 0, "model.unet.num_blocks", "be at least 1")
    require(0 <= u.dropout < 1, "model.unet.dropout", "lie in [0, 1)")
    require(
        u.augment_dim in (0, 9),
        "model.unet.augment_dim",
        "be 9, or 0 for a network that is not told",
    )
    require(not m.learn_sigma, "model.learn_sigma", "be off: this network has no such output")


def check_objective(config: Config, require: Any) -> None:
    m, d, n = config.model, config.diffusion, config.noise
    if m.architecture == "ddpmpp":
        require(
            d.objective == "edm",
            "diffusion.objective",
            "be edm with model.architecture=ddpmpp, whose input is ln(sigma) / 4",
        )
    if d.objective == "edm":
        require(
            not m.learn_sigma,
            "model.learn_sigma",
            "be off with diffusion.objective=edm, which learns no variance",
        )
    require(d.timesteps > 1, "diffusion.timesteps", "be at least 2")
    require(math.isfinite(d.p_mean), "diffusion.p_mean", "be finite")
    require(0 < d.p_std < math.inf, "diffusion.p_std", "be positive")
    require(0 < d.sigma_data < math.inf, "diffusion.sigma_data", "be positive")
    require(math.isfinite(n.logit_mean), "noise.logit_mean", "be finite")
    require(0 < n.logit_std < math.inf, "noise.logit_std", "be positive")
    require(0 < n.speed_ratio < math.inf, "noise.speed_ratio", "be positive")
    require(0 < n.min_snr_gamma < math.inf, "noise.min_snr_gamma", "be positive")
    require(0 <= n.p2_gamma < math.inf, "noise.p2_gamma", "be 0 or more")
    require(0 <= n.p2_k < math.inf, "noise.p2_k", "be 0 or more")
    if config.data.augment:
        require(0 < config.data.augment <= 1, "data.augment", "lie in [0, 1]")
        require(
            m.unet.augment_dim == 9,
            "data.augment",
            "be 0 where the network is not told of it (model.unet.augment_dim=9)",
        )
        require(
            not config.data.horizontal_flip,
            "data.horizontal_flip",
            "be off with data.augment, which flips too",
        )


def check_curriculum(config: Config, require: Any) -> None:
    c, d = config.curriculum, config.diffusion
    require(
        d.objective == "gaussian" or c.clusters == "uniform",
        "curriculum.clusters",
        f"be uniform with diffusion.objective={d.objective}; SNRs are matched between schedules of "
        "betas",
    )
    require(
        d.objective != "gaussian" or c.n_clusters <= d.timesteps,
        "curriculum.n_clusters",
        f"not exceed diffusion.timesteps={d.timesteps}",
    )
    require(c.patience >= 0, "curriculum.patience", "be 0 or more")
    require(c.interval > 0, "curriculum.interval", "be at least 1")
    if c.pacing == "none":
        require(
            c.order == "easy_first",
            "curriculum.order",
            "stay easy_first with curriculum.pacing=none: no stages",
        )
        require(
            c.stages == "accumulating",
            "curriculum.stages",
            "stay accumulating with curriculum.pacing=none: no stages",
        )
    make_curriculum(config)


def check_the_rest(config: Config, require: Any) -> None:
    o, t, m, look = config.optimizer, config.train, config.model, config.telemetry
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
    require(
        m.architecture == "dit" or t.compile != "blocks",
        "train.compile",
        "be model, auto or off: the blocks of a U-Net are all different",
    )
    require(1 < config.anomaly.spike_factor < math.inf, "anomaly.spike_factor", "be above 1")
    require(config.anomaly.max_skips >= 0, "anomaly.max_skips", "be 0 or more")
    require(config.checkpoint.every > 0, "checkpoint.every", "be at least 1")
    require(config.checkpoint.keep_last > 0, "checkpoint.keep_last", "be at least 1")
    require(config.checkpoint.keep_every >= 0, "checkpoint.keep_every", "be 0 (off) or positive")
    require(look.log_every > 0, "telemetry.log_every", "be at least 1")
    require(look.reference_images > 0, "telemetry.reference_images", "be at least 1")
    require(look.preview_images > 0, "telemetry.preview_images", "be at least 1")
    most = (
        config.diffusion.timesteps
        if config.diffusion.objective == "gaussian"
        else SAMPLED_STEPS_AT_MOST
    )
    require(1 < look.preview_steps <= most, "telemetry.preview_steps", f"lie in 2..{most}")
    require(look.preview_cfg_scale >= 0, "telemetry.preview_cfg_scale", "be 0 or more")
    unguided = look.preview_cfg_scale == 1 or look.preview_every == 0
    require(
        m.class_dropout_prob > 0 or unguided,
        "telemetry.preview_cfg_scale",
        "be 1 where model.class_dropout_prob is 0: there is no null label or caption to guide with",
    )
