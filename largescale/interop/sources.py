"""Weights of any kind that can become an export: what they are, and what had to be assumed."""

import hashlib
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.checkpoint.files import is_run
from largescale.checkpoint.weights import EXPORT_WEIGHTS, is_export, load_trained
from largescale.config.schema import Config, CurriculumConfig, DiffusionConfig, TelemetryConfig
from largescale.config.serialise import from_dict, to_dict
from largescale.config.validation import validate
from largescale.data.format import MANIFEST, DatasetInfo
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import CheckpointError, ConfigError
from largescale.host.files import sha256
from largescale.interop import diffusers_folder, hub
from largescale.interop.choices import Choices, Facts, Source
from largescale.interop.names import require_fit
from largescale.interop.pipeline_folder import is_pipeline, read_pipeline
from largescale.interop.training_files import read_file
from largescale.models.build import latent_shape

# Images of so many channels are taken for pixels, of others for a VAE's latents.
PIXEL_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Converted:
    """Weights that can be written as an export."""

    weights: dict[str, Tensor]
    """In float32, under our names."""
    description: dict[str, Any]
    """What an export's config.json has."""
    config: Config
    format: str
    """What the source is."""
    assumed: dict[str, str]
    """What neither the source nor an option says, and why it was assumed."""
    left_out: list[str]
    """Weights of the source that are not a part of the model."""


def read_source(source: str, choices: Choices, step: int | None = None) -> Converted:
    """The weights and the description that SOURCE becomes: a file of weights, a folder in
    diffusers' layout, a name on the hub, or a run or export of ours. Raises CheckpointError or
    ConfigError with what is wrong with it."""
    path = _locate(source)
    # The weights of an export are never read alone: what they are is described beside them.
    own = path.parent if path.name == EXPORT_WEIGHTS else path
    if own.is_dir() and (is_export(own) or is_run(own)):
        return _own(own, source, choices, step)
    if step is not None:
        raise ConfigError(
            f"--step {step} chooses a checkpoint of a run, and {source} is none; leave it out"
        )
    # A pipeline that largescale wrote says what diffusers' own do not, such as its training.
    if is_pipeline(path):
        return _own_pipeline(path, source, choices)
    facts = Facts(choices)
    folder = _diffusers_folder(path)
    read = _diffusers(folder, facts) if folder else read_file(path, facts)
    return _converted(read, source, facts)


def _locate(source: str) -> Path:
    """The file or folder of a source, fetched where it is a name on the hub."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if hub.is_hub_name(source):
        return hub.fetch(source)
    raise CheckpointError(
        f"there is no file or folder {source}; give a file of weights, a folder in diffusers' "
        "layout, a run or an export, or a name on the hub (OWNER/NAME)"
    )


def _diffusers_folder(path: Path) -> Path | None:
    """The folder in diffusers' layout that a source is, or is a file of; None for other files.
    Raises CheckpointError for a folder of something else."""
    if path.is_dir():
        # Samples, and data sets, have weights of their own elsewhere.
        if (path / MANIFEST).is_file():
            raise CheckpointError(
                f"{path} is a data set or samples, and has no weights; give the run or the export "
                "that samples are of, which their provenance.json names"
            )
        return path
    names = (
        path.name.startswith("diffusion_pytorch_model") or path.name == diffusers_folder.PIPELINE
    )
    return path.parent if names and (path.parent / diffusers_folder.CONFIG).is_file() else None


def _own(path: Path, source: str, choices: Choices, step: int | None) -> Converted:
    """A run or an export of ours, also of an older version, whose field names become today's."""
    names = [each.name for each in fields(Choices) if each.name != "weights"]
    choices.require_unset(names, f"{source} is a run or export of largescale, which says so itself")
    if choices.weights == "model":
        raise ConfigError(
            f"an export of {source} has its EMA; its other weights are written by "
            "python -m largescale.export RUN"
        )
    trained = load_trained(path, step)
    description = {"config": to_dict(trained.config), **trained.info}
    # What is written is in fp32, whatever the export was.
    description.pop("dtype", None)
    return Converted(
        dict(trained.model.state_dict()),
        description,
        trained.config,
        f"{'an export' if is_export(path) else 'a run'} of largescale",
        {},
        [],
    )


def _own_pipeline(folder: Path, source: str, choices: Choices) -> Converted:
    """A diffusers pipeline that largescale.export wrote, which says all of itself."""
    names = [each.name for each in fields(Choices)]
    choices.require_unset(names, f"{source} was exported by largescale, and says so itself")
    description, weights = read_pipeline(folder)
    config = from_dict(description["config"])
    return Converted(weights, description, config, "a diffusers pipeline of largescale", {}, [])


def _diffusers(folder: Path, facts: Facts) -> Source:
    """A DiT of diffusers."""
    choices = facts.choices
    choices.require_unset(
        ("weights", "num_heads", "class_dropout_prob", "interpolant", "noise_at"),
        "a folder of diffusers says so itself, and its DiT is of Gaussian diffusion",
    )
    if choices.objective not in (None, "gaussian"):
        raise ConfigError(
            f"--objective {choices.objective} is not what diffusers' DiT was trained with; leave "
            "it out"
        )
    found = diffusers_folder.read_diffusers(folder)
    published: Literal["linear", "cosine"] = "linear"
    schedule = facts.choose(
        "diffusion.schedule",
        choices.schedule,
        found.diffusion.schedule if found.diffusion else None,
        published,
        "as DiT was published: there is no scheduler beside the transformer",
    )
    diffusion = replace(found.diffusion or DiffusionConfig(), schedule=schedule)
    # Nothing reads it beside a learned variance.
    if found.model.learn_sigma:
        diffusion = replace(diffusion, fixed_variance="small")
    return Source(
        found.weights,
        found.model,
        diffusion,
        "a DiT of diffusers",
        found.files,
        vae=found.vae,
        facts={"id2label": found.id2label} if found.id2label else {},
    )


def _converted(read: Source, source: str, facts: Facts) -> Converted:
    """The export that a source becomes, checked."""
    require_fit(read.weights, read.model)
    name = facts.choices.name or _name_of(source)
    # Of the settings of a training only these are known: all timesteps, and guidance or none.
    guided = read.model.class_dropout_prob > 0
    config = Config(
        name,
        read.model,
        read.diffusion,
        curriculum=CurriculumConfig(pacing="none"),
        telemetry=TelemetryConfig() if guided else TelemetryConfig(preview_cfg_scale=1.0),
    )
    validate(config, 1)
    info, made_with = _data(read, name, facts)
    hashes = {path.name: sha256(path) for path in read.files}
    record = {
        "source": source,
        "format": read.format,
        "sha256": _joint_hash(hashes),
        "files": hashes,
        "weights": read.which,
        "assumed": facts.assumed,
        "left_out": facts.left_out,
        **read.facts,
    }
    description = {
        "config": to_dict(config),
        "step": read.step,
        "data_info": info.plain(),
        "made_with": made_with,
        "converted": record,
    }
    return Converted(read.weights, description, config, read.format, facts.assumed, facts.left_out)


def _data(read: Source, name: str, facts: Facts) -> tuple[DatasetInfo, dict[str, str]]:
    """What the images are that the model draws, and where their VAE lies."""
    shape = latent_shape(read.model)
    is_pixels = shape[0] in PIXEL_CHANNELS
    kind = facts.choose(
        "data",
        facts.choices.kind,
        "latents" if read.vae else None,
        "pixels" if is_pixels else "latents",
        f"by the images' {shape[0]} channels",
    )
    info = DatasetInfo(f"the data of {name}", kind, shape, read.model.num_classes)
    if kind == "pixels":
        facts.choices.require_unset(("vae",), "the model draws pixels")
        return info, {}
    spec = facts.choices.vae or (str(read.vae) if read.vae else None)
    if spec is None:
        facts.assumed["vae"] = (
            "none known: give the one that made the latents to eval.sample with --vae DIR, which "
            "cannot check it (for published DiT and SiT, stabilityai/sd-vae-ft-ema or -mse)"
        )
        return info, {}
    vae = load_vae(spec, torch.device("cpu"))
    _require_fitting(vae, spec, shape)
    # A folder is noted by its full path, as the export is used from elsewhere too.
    place = Path(spec).expanduser()
    norm = vae.normalization
    found = replace(
        info,
        scale_factor=norm.scale_factor,
        latent_mean=norm.mean,
        latent_std=norm.std,
        encoders={"vae": vae.identity},
    )
    return found, {"vae": str(place.resolve()) if place.exists() else spec}


def _require_fitting(vae: Vae, spec: str, shape: tuple[int, int, int]) -> None:
    if vae.latent_channels != shape[0]:
        raise ConfigError(
            f"the VAE {spec} has latents of {vae.latent_channels} channels, and the model draws "
            f"{shape[0]}; give the VAE that made its latents"
        )


def _name_of(source: str) -> str:
    """A model's name by that of its file or folder."""
    path = Path(source).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    return re.sub(r"[^\w.-]", "-", name) or "converted"


def _joint_hash(hashes: dict[str, str]) -> str:
    """The hash of one file; of several, of their names and hashes."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
