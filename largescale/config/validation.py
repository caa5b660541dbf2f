"""What a config may hold: numbers in the ranges that their fields state, and the rules between
fields.

What cannot be right, or belongs to another architecture or objective, is an error before anything
is started.
"""

import dataclasses
import math
from typing import Any

from largescale.config.derived import batch_layout, least_steps, make_curriculum, pacing_settings
from largescale.config.learning_rate import schedule_note
from largescale.config.presets import PRESETS
from largescale.config.ranges import range_of
from largescale.config.schema import Config, ModelConfig, UNetConfig
from largescale.config.serialise import flatten, to_dict
from largescale.errors import ConfigError
from largescale.power_ema import state_key

# Fields that only one architecture, objective or way of training reads. Anywhere else, another
# value than the default is a mistake, not a setting.
FIELDS_USED_ONLY_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("model.architecture", "dit"): (
        "model.patch_size",
        "model.hidden_size",
        "model.depth",
        "model.num_heads",
        "model.mlp_ratio",
        "model.max_caption_tokens",
        "model.caption_width",
        "model.caption_pooled_width",
        "model.null_caption",
        "model.downscale_freq_shift",
        "model.mlp_norm_eps",
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
    ("noise.sampling", "laplace"): ("noise.laplace_mu", "noise.laplace_b"),
    ("noise.sampling", "beta"): ("noise.beta_alpha", "noise.beta_beta"),
    ("noise.sampling", "mode"): ("noise.mode_scale",),
    ("noise.weighting", "min_snr"): ("noise.min_snr_gamma",),
    ("noise.weighting", "p2"): ("noise.p2_gamma", "noise.p2_k"),
}
# Sampling steps of a preview, where the objective has no timesteps that bound them.
MAX_PREVIEW_STEPS = 1000
# The share of untrained weights in an EMA below which nothing is reported.
NEGLIGIBLE_SHARE = 0.01


def cli_flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def remarks(config: Config, classes_of_data: int) -> list[str]:
    """Notes on settings that are allowed, but may not be meant. `classes_of_data`: 0 where there
    are none, or where it is unknown."""
    m = config.model
    notes = []
    # Allowed, as more data may come later.
    if 0 < classes_of_data < m.num_classes:
        notes.append(
            f"model.num_classes={m.num_classes:,}, and the data have {classes_of_data:,}: the "
            f"others are never trained; to leave them out, --model.num-classes {classes_of_data}"
        )
    if m.num_classes + m.max_caption_tokens and not m.class_dropout_prob:
        notes.append(
            "model.class_dropout_prob=0: samples of this model cannot be guided; if they are to "
            "be, --model.class-dropout-prob 0.1"
        )
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every % every:
        notes.append(
            f"checkpoint.keep_every={keep_every} is not a multiple of checkpoint.every={every}: "
            f"only multiples of {math.lcm(keep_every, every)} are kept; try "
            f"--checkpoint.keep-every {max(1, round(keep_every / every)) * every}"
        )
    for key, reason in without_effect(config):
        notes.append(f"{cli_flag(key)} has no effect {reason}")
    d = config.diffusion
    if config.noise.sampling == "cosine_map":
        if d.objective == "flow" and d.interpolant == "gvp":
            notes.append("noise.sampling=cosine_map is uniform with diffusion.interpolant=gvp")
        if d.objective == "gaussian" and d.schedule == "cosine":
            notes.append("noise.sampling=cosine_map is nearly uniform with the cosine schedule")
    # Even if every stage ends as early as it can.
    if (least := least_steps(config)) > config.train.steps:
        settings = pacing_settings(config.curriculum.pacing)
        flags = [cli_flag(f"curriculum.{name}") for name in settings]
        notes.append(
            f"train.steps={config.train.steps:,} end before the curriculum does, which takes at "
            f"least {least:,} steps: some noise levels are never trained; raise --train.steps, or "
            f"lower {' or '.join(flags)}"
        )
    for note in (schedule_note(config), ema_note(config)):
        if note:
            notes.append(note)
    return notes


def without_effect(config: Config) -> list[tuple[str, str]]:
    """Settings that nothing reads beside the others, and why: (key, reason). Only those that differ
    from the preset's, as a preset serves several ways of training."""
    c, t, anomaly = config.curriculum, config.telemetry, config.anomaly
    never_skips = "skip" not in (anomaly.not_finite, anomaly.spike)
    previews = (
        "telemetry.preview_images",
        "telemetry.preview_steps",
        "telemetry.preview_cfg_scale",
    )
    o = config.optimizer
    decaying = o.schedule in ("cosine", "linear", "wsd")
    validation = ("telemetry.validation_every", "telemetry.validation_images")
    snapshots = ("checkpoint.ema_snapshot_every", "checkpoint.ema_snapshots")
    captions = ("model.null_caption", "model.caption_width", "model.caption_pooled_width")
    patience = ("curriculum.patience", "curriculum.loss_smoothing")
    groups = [
        (config.model.learn_sigma, "with a learned variance", ("diffusion.fixed_variance",)),
        (not config.model.max_caption_tokens, "without captions", captions),
        (c.pacing != "patience", f"with curriculum.pacing={c.pacing}", patience),
        (c.pacing != "fixed", f"with curriculum.pacing={c.pacing}", ("curriculum.interval",)),
        (config.data.validation is None, "without data.validation", validation),
        (not o.ema_widths, "without optimizer.ema_widths", snapshots),
        (not decaying, f"with optimizer.schedule={o.schedule}", ("optimizer.final_lr",)),
        (o.schedule == "constant", "with a constant learning rate", ("optimizer.decay_steps",)),
        (never_skips, "unless one of the policies is skip", ("anomaly.max_skips",)),
        (not t.preview_every, "with telemetry.preview_every=0", previews),
        (
            not t.reference_every,
            "with telemetry.reference_every=0",
            ("telemetry.reference_images",),
        ),
    ]
    # A config under a name of its own has no preset: the plain defaults take its place.
    usual = PRESETS[config.name]() if config.name in PRESETS else Config(config.name)
    values, defaults = (dict(flatten(to_dict(each))) for each in (config, usual))
    found = []
    for unread, reason, keys in groups:
        for key in keys:
            if unread and values[key] != defaults[key]:
                found.append((key, reason))
    return found


def ema_note(config: Config, step: int | None = None) -> str:
    """A note on the share of untrained weights in the EMA at a step, by default the last; empty
    where that share is negligible."""
    # It starts as a copy of trained weights, or forgets its first steps.
    if config.train.init_from or config.optimizer.ema_rampup:
        return ""
    decay = config.optimizer.ema_decay
    steps = config.train.steps
    at = steps if step is None else step

    # The EMA starts as a copy of the untrained weights, and each step leaves `decay` of them.
    share = decay**at
    if share < NEGLIGIBLE_SHARE:
        return ""
    forgets = math.ceil(math.log(NEGLIGIBLE_SHARE) / math.log(decay)) if decay else 1
    if forgets <= steps:
        remedy = f"from step {forgets:,} on it is below {NEGLIGIBLE_SHARE:.0%}"
    else:
        # A memory of a tenth of the run leaves exp(-10), less than 0.01 %.
        remedy = (
            f"ema_decay={decay} is for longer runs, for {steps:,} steps try "
            f"--optimizer.ema-decay {max(0.0, 1 - 10 / steps):.4g}"
        )
    return f"The EMA still holds {share:.0%} of the untrained weights at step {at:,}: {remedy}."


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError for settings that cannot be right."""
    # Ranges first: the checks after them divide by these numbers.
    check_ranges(config)
    batch_layout(config, world_size)
    values = dict(flatten(to_dict(config)))

    def require(ok: bool, key: str, must: str, remedy: str = "") -> None:
        if not ok:
            section, _, field = key.rpartition(".")
            # A switch that is on is set off by its --no- form.
            flag = cli_flag(f"{section}.no_{field}" if values[key] is True else key)
            remedy = remedy or f"set {flag}"
            raise ConfigError(f"{key}={values[key]} must {must}; {remedy}")

    for check in (
        check_unused,
        check_model,
        check_objective,
        check_noise,
        check_curriculum,
        check_the_rest,
    ):
        check(config, require)


def check_ranges(settings: Any, section: str = "") -> None:
    """Raises ConfigError for a number outside the range that its field states."""
    for field in dataclasses.fields(settings):
        key, value = section + field.name, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif (stated := range_of(field.type)) and (must := stated.violation(value)):
            raise ConfigError(f"{key}={value} must be {must}; set {cli_flag(key)}")


def check_unused(config: Config, require: Any) -> None:
    """A field that nothing reads here has to stay at its default."""
    values = dict(flatten(to_dict(config)))
    defaults = dict(flatten(to_dict(Config(""))))
    for (choice, wanted), keys in FIELDS_USED_ONLY_BY.items():
        if values[choice] == wanted:
            continue
        for key in keys:
            require(
                values[key] == defaults[key],
                key,
                f"stay {defaults[key]}: only {choice}={wanted} reads it, and this is "
                f"{values[choice]}",
                f"leave out {cli_flag(key)}, or set {cli_flag(choice)} {wanted}",
            )


def check_model(config: Config, require: Any) -> None:
    """The network can be built, and is conditioned on labels or captions, not on both."""
    m = config.model
    require(
        m.class_dropout_prob == 0 or m.num_classes + m.max_caption_tokens > 0,
        "model.class_dropout_prob",
        f"be 0 with model.num_classes={m.num_classes} and "
        f"model.max_caption_tokens={m.max_caption_tokens}: there is nothing to drop",
    )
    if m.architecture == "ddpmpp":
        check_unet(m, m.unet, require)
        return

    # A DiT cuts the image into patches, and a token's channels into heads.
    require(
        m.input_size % m.patch_size == 0,
        "model.patch_size",
        f"divide model.input_size={m.input_size}",
    )
    require(
        m.hidden_size % m.num_heads == 0,
        "model.num_heads",
        f"divide model.hidden_size={m.hidden_size}",
    )
    if m.max_caption_tokens:
        require(
            m.num_classes == 0,
            "model.num_classes",
            f"be 0 with captions (model.max_caption_tokens={m.max_caption_tokens})",
        )


def check_unet(m: ModelConfig, u: UNetConfig, require: Any) -> None:
    """The U-Net's widths can be normed in groups, and its resolutions exist."""
    levels = len(u.channel_mult)
    require(levels > 0, "model.unet.channel_mult", "have a factor for each resolution")

    # A norm has 32 groups, or where there are fewer than 128 channels, groups of 4 channels. The
    # widest input is the decoder's, which the encoder's output is joined with.
    narrow = 2 * u.model_channels * max(u.channel_mult) < 128
    require(
        u.model_channels % (4 if narrow else 32) == 0,
        "model.unet.model_channels",
        "be a multiple of 32, or of 4 in a network of fewer than 128 channels everywhere",
    )

    # Each level after the first halves the image's sides.
    require(
        m.input_size % 2 ** (levels - 1) == 0,
        "model.input_size",
        f"be a multiple of {2 ** (levels - 1)}, for the {levels} resolutions of "
        f"model.unet.channel_mult={u.channel_mult}",
    )
    resolutions = [m.input_size >> level for level in range(levels)]
    require(
        set(u.attn_resolutions) <= set(resolutions),
        "model.unet.attn_resolutions",
        f"be among {resolutions}",
    )
    require(not m.learn_sigma, "model.learn_sigma", "be off: this network has no such output")


def check_objective(config: Config, require: Any) -> None:
    """The network has the inputs and outputs that the objective and the augmentation need."""
    m = config.model
    d = config.diffusion
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

    # A network that is not given the augmentation's labels would learn to draw augmented images.
    if config.data.augment:
        require(
            m.unet.augment_dim == 9,
            "data.augment",
            "be 0 where the network is not given its labels (model.unet.augment_dim=9)",
        )
        require(
            not config.data.horizontal_flip,
            "data.horizontal_flip",
            "be off with data.augment, which flips too",
        )


def check_noise(config: Config, require: Any) -> None:
    """The density of noise levels has its settings, and means something for the objective."""
    n, d = config.noise, config.diffusion
    for key in ("beta_alpha", "beta_beta"):
        require(
            n.sampling != "beta" or getattr(n, key) is not None,
            f"noise.{key}",
            "be a number with noise.sampling=beta, which has no default",
            "give --noise.beta-alpha A --noise.beta-beta B",
        )
    # Under EDM u is a quantile of its own density, not a time.
    require(
        d.objective != "edm" or n.sampling not in ("beta", "mode"),
        "noise.sampling",
        "not be a density of timesteps, beta or mode, with diffusion.objective=edm, which has none",
        "set --diffusion.p-mean and --diffusion.p-std, its own density, or --noise.sampling laplace",
    )
    if n.shift == 1:
        return
    require(
        d.objective == "flow" and d.interpolant == "linear",
        "noise.shift",
        "be 1 unless diffusion.objective=flow and diffusion.interpolant=linear, whose "
        "signal-to-noise ratio it divides by shift ** 2",
        f"set --diffusion.p-mean {d.p_mean + math.log(n.shift):.4g}, which does the same"
        if d.objective == "edm"
        else "leave out --noise.shift",
    )
    # Where these draw follows from the noise levels or their losses as they are.
    require(
        n.sampling not in ("loss_second_moment", "speed"),
        "noise.shift",
        f"be 1 with noise.sampling={n.sampling}, which finds its noise levels itself",
        "leave out --noise.shift",
    )


def check_curriculum(config: Config, require: Any) -> None:
    """The clusters exist under this objective, and no stages are described where there are none."""
    c = config.curriculum
    d = config.diffusion
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

    # The curriculum checks the rest itself, such as clusters without a timestep.
    make_curriculum(config)


def check_the_rest(config: Config, require: Any) -> None:
    """The first weights, what is compiled, and the settings of the preview."""
    m = config.model
    require(
        config.checkpoint.keep_best == "none" or config.data.validation is not None,
        "checkpoint.keep_best",
        "be none without data.validation: nothing says which is best",
        "give --data.validation DIR",
    )
    widths = config.optimizer.ema_widths
    require(
        len({*map(state_key, widths)}) == len(widths), "optimizer.ema_widths", "be different widths"
    )
    trackers = config.telemetry.trackers
    require(len({*trackers}) == len(trackers), "telemetry.trackers", "be named once each")
    require(
        config.train.init_from is not None or not config.train.init_new,
        "train.init_new",
        "be empty without train.init_from: all parts of the network start anew",
        "give --train.init-from too",
    )
    preview = config.telemetry
    require(
        m.architecture == "dit" or config.train.compile != "blocks",
        "train.compile",
        "be model, auto or off: the blocks of a U-Net are all different",
    )

    # Gaussian diffusion cannot take more steps than there are timesteps.
    most = MAX_PREVIEW_STEPS
    if config.diffusion.objective == "gaussian":
        most = config.diffusion.timesteps
    require(preview.preview_steps <= most, "telemetry.preview_steps", f"not exceed {most}")

    # Guidance needs a network that was trained with the null condition too.
    unguided = preview.preview_cfg_scale == 1 or preview.preview_every == 0
    require(
        m.class_dropout_prob > 0 or unguided,
        "telemetry.preview_cfg_scale",
        "be 1 where model.class_dropout_prob is 0: there is no null label or caption to guide with",
    )
