"""Every field of the config changes the outcome that it is there for, and none is forgotten here."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint.files import checkpoints
from largescale.config.schema import Config, DiffusionConfig, ModelConfig
from largescale.config.serialise import flatten, to_dict
from largescale.data.loader import Loader
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.models.build import build_model
from tests.conftest import CAPTIONED, RunHere, final_state, trace

# key: (another value, further settings that both runs have)
CHANGES_WHAT_IS_COMPUTED: dict[str, tuple[str, str]] = {
    "model.patch_size": ("8", ""),
    "model.hidden_size": ("64", ""),
    "model.depth": ("3", ""),
    "model.num_heads": ("4", ""),
    "model.mlp_ratio": ("2.0", ""),
    "model.num_classes": ("11", ""),
    "model.class_dropout_prob": ("0.5", ""),
    "model.learn_sigma": ("no", ""),
    "model.null_caption": ("learned", "CAPTIONED"),
    "model.downscale_freq_shift": ("1", ""),
    "model.mlp_norm_eps": ("0.1", ""),
    "diffusion.schedule": ("linear", ""),
    "diffusion.timesteps": ("500", ""),
    "diffusion.objective": ("flow", ""),
    "diffusion.interpolant": ("gvp", "--diffusion.objective flow"),
    "diffusion.p_mean": ("-1", "PRESET debug_edm"),
    "diffusion.p_std": ("1", "PRESET debug_edm"),
    "diffusion.sigma_data": ("1", "PRESET debug_edm"),
    "model.unet.model_channels": ("8", "PRESET debug_edm"),
    "model.unet.channel_mult": ("2 1", "PRESET debug_edm"),
    "model.unet.num_blocks": ("2", "PRESET debug_edm"),
    "model.unet.attn_resolutions": ("16", "PRESET debug_edm"),
    "model.unet.dropout": ("0.5", "PRESET debug_edm"),
    "model.unet.augment_dim": ("9", "PRESET debug_edm"),
    "data.augment": ("0.5", "PRESET debug_edm --model.unet.augment-dim 9"),
    "curriculum.clusters": ("snr", "--diffusion.schedule linear"),
    "curriculum.n_clusters": ("4", ""),
    "curriculum.pacing": ("none", ""),
    "curriculum.patience": ("0", ""),
    "curriculum.loss_smoothing": ("0.9", ""),
    "curriculum.interval": ("2", "--curriculum.pacing fixed"),
    "curriculum.order": ("hard_first", ""),
    "curriculum.stages": ("separate", ""),
    "curriculum.only_cluster": ("2", "--curriculum.pacing none"),
    "noise.sampling": ("logit_normal", ""),
    "noise.logit_mean": ("0.5", "--noise.sampling logit_normal"),
    "noise.logit_std": ("0.5", "--noise.sampling logit_normal"),
    "noise.shift": ("3", "--diffusion.objective flow"),
    "noise.speed_ratio": ("2", "--noise.sampling speed --curriculum.pacing none"),
    "noise.weighting": ("min_snr", "--curriculum.pacing none"),
    "noise.min_snr_gamma": ("0.1", "--noise.weighting min_snr --curriculum.pacing none"),
    "noise.p2_gamma": ("0.5", "--noise.weighting p2"),
    "noise.p2_k": ("2", "--noise.weighting p2"),
    "data.horizontal_flip": ("yes", ""),
    "data.order": ("blocks", ""),
    "optimizer.lr": ("1e-4", ""),
    "optimizer.schedule": ("cosine", ""),
    "optimizer.warmup_steps": ("4", ""),
    "optimizer.decay_steps": ("4", "--optimizer.schedule cosine"),
    "optimizer.final_lr": ("1e-4", "--optimizer.schedule cosine"),
    "optimizer.betas": ("0.5 0.9", ""),
    "optimizer.eps": ("1e-2", ""),
    "optimizer.weight_decay": ("0.5", ""),
    "optimizer.clip_grad_norm": ("0.01", ""),
    "train.global_batch_size": ("8", ""),
    "train.ds_config": ("ds_configs/zero2_bf16.json", ""),
    "train.seed": ("1", ""),
}
# key: the test of this folder or of tests/dist that shows its effect
ELSEWHERE = {
    "name": "test_run_dir",
    "output": "test_run_dir",
    "dry_run": "test_dry_run_starts_nothing",
    "print_config": "test_print_config",
    "fit_ranks": "test_the_most_ranks_that_a_batch_can_be_split_over",
    "verbose": "test_dry_run_starts_nothing",
    "profile": "test_profile",
    "model.architecture": "test_another_architecture",
    "model.input_size": "test_shape_of_the_data",
    "model.in_channels": "test_shape_of_the_data",
    "model.max_caption_tokens": "test_captions_that_do_not_fit_the_model",
    "model.caption_width": "test_captions_that_do_not_fit_the_model",
    "model.caption_pooled_width": "test_captions_that_do_not_fit_the_model",
    "diffusion.fixed_variance": "test_fixed_variance",
    "data.path": "test_missing_data",
    "data.validation": "test_the_losses_of_held_out_images",
    "telemetry.validation_every": "test_the_losses_of_held_out_images",
    "telemetry.validation_images": "test_the_losses_of_held_out_images",
    "checkpoint.keep_best": "test_the_best_checkpoint_is_kept",
    "noise.laplace_mu": "test_settings_reach_the_samplers",
    "noise.laplace_b": "test_settings_reach_the_samplers",
    "noise.beta_alpha": "test_settings_reach_the_samplers",
    "noise.beta_beta": "test_settings_reach_the_samplers",
    "noise.mode_scale": "test_settings_reach_the_samplers",
    "data.normalize": "test_a_run_keeps_its_normalisation",
    "data.grown": "test_a_run_goes_on_with_a_set_that_has_grown",
    "data.prefetch": "test_prefetch",
    "data.stage": "test_a_run_reads_the_copy_and_is_the_same_run",
    "data.verify": "test_verify_finds_an_altered_shard",
    "optimizer.kernel": "test_a_run_goes_on_with_another_kernel",
    "train.compile": "test_a_compiled_run",
    "optimizer.ema_decay": "test_ema_decay",
    "optimizer.ema_widths": "test_averages_follow_their_definition",
    "checkpoint.ema_snapshot_every": "test_when_snapshots_are_written_and_kept",
    "checkpoint.ema_snapshots": "test_when_snapshots_are_written_and_kept",
    "optimizer.ema_rampup": "test_the_ema_of_a_run_with_a_ramp_up",
    "train.init_from": "test_master_weights_and_ema_are_the_files",
    "train.init_new": "test_parts_that_start_anew",
    "train.micro_batch_size": "test_micro_batch_size",
    "train.activation_checkpointing": "test_the_setting_reaches_the_model",
    "train.threads": "test_threads",
    "train.kernels": "test_a_run_with_fused_kernels",
    "train.tf32": "test_tf32_is_a_setting_of_gpus",
    "train.steps": "test_changed_lr_and_steps_are_said_and_in_force",
    "train.device": "test_missing_device_is_not_replaced",
    "checkpoint.every": "test_checkpoint_retention",
    "checkpoint.keep_last": "test_checkpoint_retention",
    "checkpoint.keep_every": "test_checkpoint_retention",
    "train.timeout_s": "test_a_rank_hangs",
    "anomaly.not_finite": "test_loss_skipped",
    "anomaly.spike": "test_a_loss_that_leaps",
    "anomaly.spike_factor": "test_spike_factor",
    "anomaly.max_skips": "test_gradients_skipped_until_it_is_enough",
    "telemetry.log_every": "test_log_every",
    "telemetry.trackers": "test_tensorboard",
    "telemetry.reference_every": "test_reference_loss",
    "telemetry.reference_images": "test_reference_loss",
    "telemetry.preview_every": "test_previews",
    "telemetry.preview_images": "test_previews",
    "telemetry.preview_steps": "test_previews",
    "telemetry.preview_cfg_scale": "test_previews",
}


def flags(key: str, value: str) -> list[str]:
    section, _, field = key.replace("_", "-").rpartition(".")
    if value in ("yes", "no"):
        return [f"--{section}.{'no-' if value == 'no' else ''}{field}"]
    return [f"--{section}.{field}", *value.split()]


def test_no_field_is_forgotten() -> None:
    fields = {key for key, _ in flatten(to_dict(Config("x")))}
    assert fields == CHANGES_WHAT_IS_COMPUTED.keys() | ELSEWHERE.keys()
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in tests] == []


@pytest.fixture(scope="module")
def base_traces() -> dict[str, list[dict[str, Any]]]:
    """Of runs with the settings that several fields have in common, trained (twice) for the first of them."""
    return {}


@pytest.mark.parametrize("key", CHANGES_WHAT_IS_COMPUTED)
def test_field_changes_what_is_computed(key: str, base_traces: dict[str, list[dict[str, Any]]], run_here: RunHere,
                                        captioned: Path, tmp_path: Path) -> None:
    value, common = CHANGES_WHAT_IS_COMPUTED[key]
    words, preset = common.split(), "debug"
    if words[:1] == ["PRESET"]:
        preset, words = words[1], words[2:]
    settings: tuple[Any, ...] = ("--train.steps", 8, *words)
    if common == "CAPTIONED":
        settings = ("--train.steps", 8, "--data.path", captioned, *CAPTIONED)
    if common not in base_traces:
        base = run_here(*settings, preset=preset, output=tmp_path / "base")
        again = run_here(*settings, preset=preset, output=tmp_path / "again")
        assert base.code == 0 and base.trace() == again.trace(), base.err
        base_traces[common] = base.trace()
    other = run_here(*settings, *flags(key, value), preset=preset, output=tmp_path / "other")
    assert other.code == 0, other.err
    losses = [[row["loss"] for row in rows] for rows in (base_traces[common], other.trace())]
    assert losses[0] != losses[1]  # not only the value itself, which is in the trace as well


def test_another_architecture(run_here: RunHere, tmp_path: Path) -> None:
    """The same data, draws and steps; its own fields are of no use to the other, which is said."""
    unet = run_here("--train.steps", 3, preset="debug_edm", output=tmp_path / "unet")
    dit = run_here("--train.steps", 3, "--diffusion.objective", "edm", "--model.no-learn-sigma", output=tmp_path / "dit")
    assert (unet.code, dit.code) == (0, 0), unet.err + dit.err
    assert [row["loss"] for row in unet.trace()] != [row["loss"] for row in dit.trace()]
    mixed = run_here("--model.architecture", "dit", preset="debug_edm", output=tmp_path / "mixed")
    assert mixed.code == 2 and "only model.architecture=ddpmpp reads it" in mixed.err


def test_ema_decay(run_here: RunHere, tmp_path: Path) -> None:
    """It changes the EMA and nothing else; 0 makes the EMA the weights."""
    for decay in ("0.99", "0"):
        run_here("--train.steps", 8, "--optimizer.ema-decay", decay, output=tmp_path / decay)
    slow, none = (final_state(tmp_path / decay) for decay in ("0.99", "0"))
    assert trace(tmp_path / "0.99") == trace(tmp_path / "0")
    for name in (n for n in slow if n.startswith("master.")):
        ema = name.replace("master.", "ema.")
        assert torch.equal(slow[name], none[name]) and torch.equal(none[ema], none[name])
        if name != "master.pos_embed":  # frozen
            assert not torch.equal(slow[ema], slow[name])


def test_micro_batch_size(run_here: RunHere, tmp_path: Path) -> None:
    """Accumulation does not change what a step is, but to rounding."""
    whole = run_here("--train.steps", 8, output=tmp_path / "whole").trace()
    parts = run_here("--train.steps", 8, "--train.micro-batch-size", 4, output=tmp_path / "parts").trace()
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert [row["loss"] for row in parts] != [row["loss"] for row in whole]
    assert "4 x 4 accumulation" in run_here("--train.micro-batch-size", 4, "--dry-run").err


def test_checkpoint_retention(run_here: RunHere, tmp_path: Path) -> None:
    def kept(**settings: int) -> list[int]:
        changes = [x for k, v in settings.items() for x in (f"--checkpoint.{k.replace('_', '-')}", v)]
        run = run_here("--train.steps", 12, *changes, output=tmp_path / "-".join(map(str, settings.values()))).run
        return sorted(c.step for c in checkpoints(run))

    assert kept(every=5, keep_last=3) == [5, 10, 12]
    assert kept(every=4, keep_last=1) == [12]
    assert kept(every=2, keep_last=2, keep_every=4) == [4, 8, 10, 12]


def test_log_every(run_here: RunHere) -> None:
    assert [row["step"] for row in run_here("--train.steps", 10, "--telemetry.log-every", 4).trace()] == [4, 8, 10]


def test_tensorboard(run_here: RunHere, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not (run_here("--train.steps", 3).run / "tensorboard").exists()
    run = run_here("--train.steps", 6, "--curriculum.patience", 0, "--telemetry.trackers", "tensorboard", output=tmp_path / "tb").run
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert {"curriculum/index", "curriculum/lowest", "optimizer/grad_norm", "images_per_s"} <= set(board.Tags()["scalars"])


def test_reference_loss(run_here: RunHere, tmp_path: Path) -> None:
    """On a fixed set: it does not depend on when else it is evaluated, and its clusters average to it."""
    def rows(name: str, every: int, images: int) -> dict[int, dict[str, Any]]:
        from largescale.monitoring.telemetry import read_metrics

        settings = ("--train.steps", 6, "--telemetry.reference-every", every, "--telemetry.reference-images", images)
        run = run_here(*settings, output=tmp_path / name).run
        return {row["step"]: row for row in read_metrics(run) if "reference/loss" in row}

    often, seldom, larger = rows("often", 2, 8), rows("seldom", 6, 8), rows("larger", 6, 9)
    assert (list(often), list(seldom)) == ([2, 4, 6], [6])
    assert often[6] == seldom[6] != larger[6]
    clusters = [seldom[6][f"reference/C{i}"] for i in range(1, 6)]
    assert sum(clusters) / 5 == pytest.approx(seldom[6]["reference/loss"])
    assert run_here("--train.steps", 6, output=tmp_path / "never").trace() == trace(tmp_path / "often")


def test_previews(run_here: RunHere, tmp_path: Path) -> None:
    digests: dict[str, list[str]] = {}
    for change in ("", "preview-every 4", "preview-images 6", "preview-steps 4", "preview-cfg-scale 3"):
        name = change.replace(" ", "") or "base"
        settings = [*["--telemetry.preview-every", "8", "--telemetry.preview-steps", "3"], *f"--telemetry.{change}".split()]
        learned = ("--train.steps", 8, "--optimizer.lr", 0.01, "--optimizer.ema-decay", 0)
        run = run_here(*learned, *(settings if change else settings[:-1]), output=tmp_path / name).run
        digests[name] = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((run / "samples").glob("*.png"))]
    assert len(digests["preview-every4"]) == 2 and digests["preview-every4"][1:] == digests["base"]
    assert len({tuple(d) for d in digests.values()}) == len(digests)


def test_run_dir() -> None:
    assert Config("x").run_dir == Path("runs/x") and Config("x", output="y/z").run_dir == Path("y/z")


def test_fixed_variance() -> None:
    x, t = torch.ones(1, 1, 2, 2), torch.tensor([500])
    small, large = (
        build_objective(Config("x", model=ModelConfig(learn_sigma=False), diffusion=DiffusionConfig(fixed_variance=v)))
        for v in ("small", "large")
    )
    assert isinstance(small, GaussianDiffusion) and isinstance(large, GaussianDiffusion)
    assert (small.p_mean_variance(x, x, t).variance < large.p_mean_variance(x, x, t).variance).all()


def test_prefetch(blobs: Path) -> None:
    def threads_ahead(prefetch: int) -> int:
        rows = {"global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
        with Loader(ShardDataset(blobs), seed=0, prefetch=prefetch, **rows) as loader:  # type: ignore[arg-type]
            loader.batch(0)
            return len(loader._pending)

    assert threads_ahead(2) < threads_ahead(5)


def test_model_is_built_from_every_field() -> None:
    config = ModelConfig(input_size=8, in_channels=2, patch_size=2, hidden_size=32, depth=1, num_heads=2)
    assert {k: getattr(build_model(config), k) for k in ("input_size", "in_channels", "patch_size", "hidden_size")} == {
        "input_size": 8, "in_channels": 2, "patch_size": 2, "hidden_size": 32,
    }
