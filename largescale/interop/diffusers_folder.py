"""Folders in diffusers' layout: a DiT pipeline, or its transformer alone."""

import json
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from largescale.config.schema import DiffusionConfig, ModelConfig
from largescale.errors import CheckpointError
from largescale.host.files import from_json, names_of, visible
from largescale.interop.diffusers_weights import from_diffusers
from largescale.interop.dit_weights import dit_config, shape_of
from largescale.interop.state_dicts import read_state_dict, to_fp32
from largescale.interop.weight_files import read_shards
from largescale.noise_schedule import SCHEDULES, make_betas

CONFIG = "config.json"
PIPELINE = "model_index.json"
PIPELINE_CLASS = "DiTPipeline"
# The class of the transformer today, and the one that it was published as.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_WEIGHTS = "diffusion_pytorch_model"
# Their files of weights, the first of which that exists is read; "fp16" is a variant.
_FILES = tuple(
    f"{_WEIGHTS}{ending}"
    for ending in (
        ".safetensors.index.json",
        ".safetensors",
        ".fp16.safetensors",
        ".bin",
        ".fp16.bin",
    )
)
# What `DiTTransformer2DModel` is as ours is, and other classes under its names may not be.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "num_vector_embeds": (None,),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
}
# diffusers' defaults of `DiTTransformer2DModel`, for what a config does not say.
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
# The largest that a config of ours may have.
LARGEST_SIDE = 8192
MOST = 10_000_000
MOST_TIMESTEPS = 100_000
# Our names for schedules of diffusers, whose numbers are compared too.
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}


@dataclass(frozen=True)
class DiffusersModel:
    """A DiT of diffusers, with what its pipeline says."""

    weights: dict[str, Tensor]
    """In float32, under our names."""
    model: ModelConfig
    files: tuple[Path, ...]
    """What was read."""
    diffusion: DiffusionConfig | None = None
    """The noise schedule, where the folder has a scheduler."""
    vae: Path | None = None
    """The folder of the VAE, where there is one."""
    id2label: dict[str, str] = field(default_factory=dict)


def find_transformer(folder: Path) -> Path:
    """The folder of the transformer: this one, or the one in it of a pipeline. Raises
    CheckpointError for a folder of something else."""
    if (folder / PIPELINE).is_file():
        found = _json(folder / PIPELINE).get("_class_name")
        if found != PIPELINE_CLASS:
            raise CheckpointError(
                f"{folder} is a pipeline of diffusers' class {found}, and only {PIPELINE_CLASS} "
                "can be converted"
            )
        if not (folder / "transformer" / CONFIG).is_file():
            raise CheckpointError(
                f"{folder} lacks transformer/{CONFIG}; fetch the complete pipeline, as `hf "
                "download NAME --local-dir DIR` does"
            )
        folder = folder / "transformer"
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds {names_of(visible(folder)) or 'nothing'}, and neither {CONFIG} nor "
            f"{PIPELINE}; give a folder in diffusers' layout, a run or an export of largescale, or "
            "a file of weights"
        )
    config = _json(folder / CONFIG)
    if config.get("_class_name") not in CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG} is of {_what(config)}; only a DiT of diffusers "
            f"({' or '.join(CLASSES)}) can be converted"
        )
    return folder


def read_diffusers(folder: Path) -> DiffusersModel:
    """The DiT of a pipeline's folder, or of its transformer's. Raises CheckpointError for another
    model, for weights that are not those of its config, and for files that are missing."""
    transformer = find_transformer(folder)
    config = _DEFAULTS | _json(transformer / CONFIG)
    _require_dit(config, transformer / CONFIG)
    ours, files = read_weights(transformer, int(config["sample_size"]))
    model = _model(config, ours, transformer)
    # Beside a transformer that is no part of a pipeline may lie anything.
    scheduler = transformer.parent / "scheduler" / "scheduler_config.json"
    pipeline = transformer.parent / PIPELINE
    in_pipeline = transformer.name == "transformer" and pipeline.is_file()
    vae = transformer.parent / "vae"
    return DiffusersModel(
        ours,
        model,
        (transformer / CONFIG, *files),
        diffusion=_schedule(scheduler) if in_pipeline and scheduler.is_file() else None,
        vae=vae if in_pipeline and (vae / CONFIG).is_file() else None,
        id2label=_labels(_json(pipeline)) if in_pipeline else {},
    )


def read_weights(transformer: Path, input_size: int) -> tuple[dict[str, Tensor], list[Path]]:
    """The weights in a transformer's folder, under our names and in float32, and the files that
    hold them. Raises CheckpointError where they are not those of a DiT."""
    file = _weights_file(transformer)
    if file.suffix == ".json":
        weights = read_shards(file)
        files = [file, *sorted(transformer.glob(f"{_WEIGHTS}-*.safetensors"))]
    else:
        weights = read_state_dict(file, None).weights
        files = [file]
    return from_diffusers(to_fp32(weights, file), input_size), files


def _model(config: dict[str, Any], ours: dict[str, Tensor], transformer: Path) -> ModelConfig:
    """The network, by its weights. Raises CheckpointError where the config has another."""
    heads = int(config["num_attention_heads"])
    # Its label embedding always has a null label.
    model = dit_config(ours, heads, class_dropout_prob=0.1)
    outputs = config["out_channels"] or config["in_channels"]
    by_config = {
        "attention_head_dim * num_attention_heads": heads * int(config["attention_head_dim"]),
        "in_channels": config["in_channels"],
        "out_channels": outputs,
        # One that the patches do not divide would be cut.
        "sample_size": config["sample_size"],
        "num_layers": config["num_layers"],
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_embeds_ada_norm"],
    }
    patches, _ = shape_of(ours, "final_layer.linear.weight", 2)
    by_weights = (
        model.hidden_size,
        model.in_channels,
        patches // model.patch_size**2,
        model.input_size,
        model.depth,
        model.patch_size,
        model.num_classes,
    )
    for (key, said), found in zip(by_config.items(), by_weights, strict=True):
        if said != found:
            raise CheckpointError(
                f"{transformer / CONFIG} contradicts the weights beside it: {key} is {said}, and "
                f"the weights have {found}; take both from one model"
            )
    # Two conventions that the weights do not show: the timestep's frequencies, and a norm's eps.
    return replace(model, downscale_freq_shift=1, mlp_norm_eps=float(config["norm_eps"]))


def _weights_file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    shards = sorted(folder.glob(f"{_WEIGHTS}-*"))
    what = f"shards without {_FILES[0]}" if shards else f"no weights ({_FILES[1]})"
    raise CheckpointError(f"{folder} has {what}; fetch the complete folder again")


def _require_dit(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for a network of diffusers' that ours cannot be."""
    for key, allowed in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{path} has {key}={config[key]}, and a DiT has {allowed[0]}; this is another "
                "model of diffusers, which cannot be converted"
            )
    for key, value in config.items():
        if key in _DEFAULTS and not _is_possible(key, value):
            raise CheckpointError(f"{path} has {key}={_short(value)}, which no DiT has")


def _is_possible(key: str, value: Any) -> bool:
    """Whether a network of ours can have this number of its config."""
    if key == "out_channels" and value is None:
        return True
    if key == "norm_eps":
        return isinstance(value, float) and 0 < value < 1
    # Before positions are computed for it.
    most = LARGEST_SIDE if key == "sample_size" else MOST
    return isinstance(value, int) and 1 <= value <= most


def _short(value: Any) -> str:
    """A value of a file, for a message."""
    return textwrap.shorten(json.dumps(value), 60)


def _schedule(path: Path) -> DiffusionConfig:
    """The noise schedule of a scheduler's config. Raises CheckpointError for one that the objective
    gaussian does not have."""
    config = _json(path)
    kind = config.get("beta_schedule", "linear")
    timesteps = config.get("num_train_timesteps", 1000)
    if not isinstance(timesteps, int) or not 2 <= timesteps <= MOST_TIMESTEPS:
        raise CheckpointError(
            f"{path} has num_train_timesteps={_short(timesteps)}, which must be a whole number in "
            f"[2, {MOST_TIMESTEPS}]"
        )
    if (prediction := config.get("prediction_type", "epsilon")) != "epsilon":
        raise CheckpointError(
            f"{path} has prediction_type={prediction}, and a DiT of largescale predicts the noise "
            "(epsilon); such a model cannot be converted"
        )
    schedule = _SCHEDULES.get(str(kind))
    first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if not isinstance(first, float) or not isinstance(last, float):
        raise CheckpointError(
            f"{path} has betas from {_short(first)} to {_short(last)}, which are no numbers below 1"
        )
    # Other betas under the same name are another schedule.
    if schedule == "linear" and not np.allclose(
        np.linspace(first, last, timesteps), make_betas(schedule, timesteps), rtol=1e-5
    ):
        schedule = None
    changed = config.get("rescale_betas_zero_snr")
    # Betas that are listed take the place of the schedule that is named.
    if trained := config.get("trained_betas"):
        kind, schedule = "trained betas", _schedule_of(trained, timesteps)
    if schedule is None or changed:
        raise CheckpointError(
            f"{path} has a noise schedule that largescale does not ({kind}, beta {first} to "
            f"{last}, {timesteps} timesteps{', changed further' if changed else ''}); such a model "
            "cannot be converted"
        )
    large = config.get("variance_type") == "fixed_large"
    return DiffusionConfig(
        schedule="cosine" if schedule == "cosine" else "linear",
        timesteps=timesteps,
        fixed_variance="large" if large else "small",
    )


def _schedule_of(betas: Any, timesteps: int) -> str | None:
    """Our name for a schedule that is written out, if we have it."""
    for name in SCHEDULES:
        if np.shape(betas) == (timesteps,) and np.allclose(betas, make_betas(name, timesteps)):
            return name
    return None


def _labels(index: dict[str, Any]) -> dict[str, str]:
    labels = index.get("id2label")
    return labels if isinstance(labels, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = from_json(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
    return content


def _what(config: dict[str, Any]) -> str:
    """What a config.json says that its model is."""
    if name := config.get("_class_name"):
        return f"diffusers' class {name}"
    # transformers' key, whose text encoders lie beside a pipeline's transformer.
    for key in ("architectures", "model_type"):
        if name := config.get(key):
            named = ", ".join(name) if isinstance(name, list) else name
            return f"{named}, a model of transformers such as a text encoder"
    return "a model that it does not name"
