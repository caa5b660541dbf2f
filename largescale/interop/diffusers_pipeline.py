"""A folder that diffusers opens as a pipeline: transformer, scheduler, VAE, and what is ours in it.

FOLDER/model_index.json             the pipeline's class, its parts, and the classes' names
FOLDER/transformer/                 config.json and weights; above 5 GB shards with an index
FOLDER/scheduler/                   DDIM or DPM-Solver++ with the betas of the training
FOLDER/vae/                         of a latent model, where its VAE could be opened
FOLDER/largescale_dit_pipeline.py   where DiTPipeline would draw other images: see `reasons`
FOLDER/transformer/largescale_dit_transformer.py
                                    where the network has facebookresearch's frequencies
FOLDER/largescale.json              config and provenance, as our own exports have them
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.checkpoint.weights import Trained
from largescale.config.schema import Config, ModelConfig
from largescale.data.format import normalization_of
from largescale.encoders.identity import library, silence
from largescale.encoders.normalization import Normalization
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import CheckpointError, ConfigError, DataError
from largescale.host.files import safetensors_disk_errors
from largescale.interop.diffusers_weights import to_diffusers
from largescale.models.build import latent_shape
from largescale.models.half_precision import DTYPES
from largescale.noise_schedule import make_betas

DESCRIPTION = "largescale.json"
MODEL_INDEX = "model_index.json"
CARRIED = Path(__file__).parent / "carried"
PIPELINE_FILE = "largescale_dit_pipeline"
PIPELINE_CLASS = "LargescaleDiTPipeline"
TRANSFORMER_FILE = "largescale_dit_transformer"
TRANSFORMER_CLASS = "LargescaleDiTTransformer"
# The label that DiTPipeline guides with.
NULL_OF_DIFFUSERS = 1000
# The most that the folder's network may be off, as a share of the range of its output.
TOLERANCE = 1e-4

SchedulerName = Literal["ddim", "dpm++2m"]
Scheduler = dict[SchedulerName, str]
SCHEDULERS: Scheduler = {"ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class PipelineParts:
    """What a pipeline's folder is made of."""

    trained: Trained
    vae: Vae | None
    labels: tuple[str, ...]
    """The name of each class."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    scheduler: SchedulerName = "ddim"
    max_shard_size: str = "5GB"

    @property
    def pixels(self) -> bool:
        """Whether the model draws pixels."""
        return bool(self.trained.info["data_info"]["kind"] == "pixels")

    @property
    def normalization(self) -> Normalization | None:
        """How latents are normalised, where it is not by the VAE's own scaling_factor alone."""
        if self.pixels:
            return None
        if self.vae:
            norm = self.vae.normalization
            own = Normalization(self.vae.module.config.get("scaling_factor") or 0.0)
            return None if norm == own else norm
        # The caller's VAE has the scaling_factor that the data were packed with.
        norm = normalization_of(self.trained.info["data_info"])
        by_encoder = self.trained.config.data.normalize == "encoder"
        return None if by_encoder and norm.mean is None else norm

    @property
    def null_class(self) -> int | None:
        """The label that stands for none, if one was trained."""
        model = self.trained.config.model
        guided = model.num_classes and model.class_dropout_prob
        return model.num_classes if guided else None


@dataclass(frozen=True)
class PipelineFacts:
    """What a pipeline's folder is, for its card."""

    reasons: tuple[str, ...]
    """Why diffusers' own DiTPipeline would not do; none where it does."""
    own_transformer: bool
    """Whether the folder carries a transformer class."""
    off: dict[str, float] = field(default_factory=dict)
    """How far the folder's network is from ours, by timestep, as a share of the output's range."""
    stock_off: dict[str, float] = field(default_factory=dict)
    """The same of diffusers' own class with the same weights."""
    scheduler: SchedulerName = "ddim"
    vae: str = ""
    """The identity of the VAE in the folder; empty without one."""


def check_exportable(config: Config) -> None:
    """Raises ConfigError for a model that diffusers has no class for."""
    model = config.model
    instead = (
        "leave out --format diffusers: largescale's own format takes every model, with its card"
    )
    # What diffusers' class computes otherwise would be other images, not an error.
    if model.architecture != "dit":
        raise ConfigError(f"diffusers has no class for model.architecture=ddpmpp; {instead}")
    if config.diffusion.objective != "gaussian":
        raise ConfigError(
            "diffusers' DiT pipeline draws by noise prediction, and has no class for "
            f"diffusion.objective={config.diffusion.objective}; {instead}"
        )
    if model.max_caption_tokens:
        raise ConfigError(f"diffusers has no DiT that takes captions as this one does; {instead}")
    if int(model.hidden_size * model.mlp_ratio) != 4 * model.hidden_size:
        raise ConfigError(
            "diffusers' DiT has an MLP of 4 times the width, this "
            f"model.mlp_ratio={model.mlp_ratio}; {instead}"
        )


def reasons(parts: PipelineParts) -> tuple[str, ...]:
    """Why diffusers' own DiTPipeline would draw other images, or none."""
    model = parts.trained.config.model
    found = []
    if model.downscale_freq_shift == 0:
        found.append(
            "the timestep's frequencies divide by 128, as in facebookresearch/DiT, and diffusers' "
            "divide by 127"
        )
    if parts.null_class != NULL_OF_DIFFUSERS:
        has = "no null class" if parts.null_class is None else f"null class {parts.null_class}"
        found.append(f"the model has {has}, and DiTPipeline guides with class 1000")
    if parts.pixels:
        found.append("the model draws pixels, and DiTPipeline decodes by a VAE")
    elif parts.vae is None:
        found.append("the folder carries no VAE, which DiTPipeline needs")
    elif parts.vae.shift_factor:
        found.append("the VAE has a shift_factor, which DiTPipeline ignores")
    if parts.normalization:
        found.append(
            "the latents are normalised otherwise than by the VAE's scaling_factor, which "
            "DiTPipeline divides by"
        )
    return tuple(found)


def write_pipeline(folder: Path, parts: PipelineParts) -> PipelineFacts:
    """Write a pipeline into an empty folder. Raises CheckpointError for weights that are not
    finite, and DataError where diffusers is missing or the VAE cannot be carried."""
    diffusers = library("diffusers", "hub")
    trained = parts.trained
    weights = _with_labels(trained.model.state_dict())
    _require_finite(weights)
    why = reasons(parts)
    own_transformer = trained.config.model.downscale_freq_shift == 0

    # The network as diffusers has it, and if need be as we do.
    theirs = to_diffusers(weights)
    network = _network(_transformer_class(diffusers, own_transformer), trained.config.model, theirs)
    off = difference(trained, network)
    if not max(off.values()) <= TOLERANCE:
        raise CheckpointError(
            f"diffusers' network would give other outputs than this model, by up to "
            f"{max(off.values()):.1g} of their range; its version is {diffusers.__version__}, try "
            "another one"
        )
    stock_off = {}
    if own_transformer:
        stock = _network(diffusers.DiTTransformer2DModel, trained.config.model, theirs)
        stock_off = difference(trained, stock)
        del stock

    for name, parameter in network.named_parameters():
        parameter.data = cast(parameter.data, parts.dtype, name)
    with silence(), safetensors_disk_errors(folder / "transformer"):
        network.save_pretrained(folder / "transformer", max_shard_size=parts.max_shard_size)
        make_scheduler(parts).save_pretrained(folder / "scheduler")
    if own_transformer:
        shutil.copy(CARRIED / f"{TRANSFORMER_FILE}.py", folder / "transformer")
    if why:
        shutil.copy(CARRIED / f"{PIPELINE_FILE}.py", folder)
    if parts.vae:
        _write_vae(folder / "vae", parts.vae)
    index = json.dumps(model_index(parts, why), indent=2, ensure_ascii=False)
    (folder / MODEL_INDEX).write_text(index + "\n", encoding="utf-8")
    # safetensors makes its files readable for the owner alone.
    for file in folder.rglob("*.safetensors"):
        shutil.copymode(folder / MODEL_INDEX, file)
    return PipelineFacts(
        why,
        own_transformer,
        off,
        stock_off,
        parts.scheduler,
        parts.vae.identity if parts.vae else "",
    )


def model_index(parts: PipelineParts, why: tuple[str, ...]) -> dict[str, Any]:
    """The content of model_index.json: the classes that diffusers makes a pipeline of."""
    own_transformer = parts.trained.config.model.downscale_freq_shift == 0
    transformer = ["diffusers", "DiTTransformer2DModel"]
    if own_transformer:
        transformer = [TRANSFORMER_FILE, TRANSFORMER_CLASS]
    index: dict[str, Any] = {
        "_class_name": [PIPELINE_FILE, PIPELINE_CLASS] if why else "DiTPipeline",
        "_diffusers_version": library("diffusers", "hub").__version__,
        "id2label": {str(i): name for i, name in enumerate(parts.labels)},
        "scheduler": ["diffusers", SCHEDULERS[parts.scheduler]],
        "transformer": transformer,
        # [None, None] is diffusers' spelling of a part that is absent.
        "vae": ["diffusers", type(parts.vae.module).__name__] if parts.vae else [None, None],
    }
    if why:
        index |= {
            "num_classes": parts.trained.num_classes,
            "null_class": parts.null_class,
            "pixels": parts.pixels,
        }
    if norm := parts.normalization:
        index |= {
            "latents_scale": norm.scale_factor,
            "latents_mean": list(norm.mean) if norm.mean else None,
            "latents_std": list(norm.std) if norm.std else None,
        }
    return index


def make_scheduler(parts: PipelineParts) -> Any:
    """diffusers' scheduler with our betas, which draws as our sampler of that name does."""
    diffusers = library("diffusers", "hub")
    diffusion = parts.trained.config.diffusion
    settings: dict[str, Any] = {
        "num_train_timesteps": diffusion.timesteps,
        "trained_betas": make_betas(diffusion.schedule, diffusion.timesteps).tolist(),
        "prediction_type": "epsilon",
        # With this largest value, thresholding holds the predicted pixels in [-1, 1]; unlike
        # clip_sample all schedulers have it. Latents have no bounds.
        "thresholding": parts.pixels,
        "sample_max_value": 1.0,
        "timestep_spacing": "linspace",
    }
    if parts.scheduler == "dpm++2m":
        return diffusers.DPMSolverMultistepScheduler(**settings)
    # diffusers' own pipeline cannot use the timesteps that ours does: see `respaced` in it.
    if not reasons(parts):
        settings["timestep_spacing"] = "leading"
    return diffusers.DDIMScheduler(clip_sample=False, **settings)


def transformer_config(model: ModelConfig, rows: int) -> dict[str, Any]:
    """The arguments of diffusers' DiT; `rows`: of its table of classes."""
    channels = model.in_channels
    return {
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": channels,
        "out_channels": channels * 2 if model.learn_sigma else channels,
        "num_layers": model.depth,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "activation_fn": "gelu-approximate",
        # The table has one row more.
        "num_embeds_ada_norm": rows - 1,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        # Of the norm before the MLP; the others' is fixed.
        "norm_eps": model.mlp_norm_eps,
    }


@torch.inference_mode()
def difference(trained: Trained, network: Any) -> dict[str, float]:
    """The largest difference between our network's output and that of diffusers', as a share of the
    range of ours, by timestep."""
    config = trained.config
    generator = torch.Generator().manual_seed(0)
    last = config.diffusion.timesteps - 1
    times = sorted({0, 1, last // 4, last // 2, last})
    t = torch.tensor(times)
    x = torch.randn(len(times), *latent_shape(config.model), generator=generator)
    y = torch.arange(len(times)) % max(trained.num_classes, 1)
    ours = trained.model(x, t, y)
    theirs = network(x, timestep=t, class_labels=y).sample
    off = (ours - theirs).abs().flatten(1).amax(1) / (ours.max() - ours.min()).clamp(min=1e-12)
    return dict(zip(map(str, times), off.tolist(), strict=True))


def class_names(file: Path | None, trained: Trained) -> tuple[str, ...]:
    """The names of the classes: the lines of the file, or those of the pipeline that was converted,
    or ImageNet's, or numbers. Raises ConfigError for a file with more or fewer lines than there are
    classes."""
    count = trained.num_classes
    if file is None:
        return _known_names(trained, count) or tuple(map(str, range(count)))
    try:
        names = tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--labels {file} cannot be read ({error}); give a text file with one name a line"
        ) from error
    # A line too many would give every class after it another one's name.
    if len(names) != count:
        raise ConfigError(
            f"--labels {file} names {len(names)} classes, and the model has {count}; give one line "
            "for each class, in order"
        )
    return names


def _known_names(trained: Trained, count: int) -> tuple[str, ...]:
    """The classes' names, where the model's origin says them; else none."""
    names = (trained.info.get("converted") or {}).get("id2label") or {}
    if all(str(i) in names for i in range(count)):
        return tuple(str(names[str(i)]) for i in range(count))
    is_imagenet = "imagenet" in str(trained.info["data_info"].get("name", "")).lower()
    return _imagenet() if is_imagenet and count == 1000 else ()


def _imagenet() -> tuple[str, ...]:
    """ImageNet's class names in the order of its folders, where torchvision is installed."""
    try:
        models = library("torchvision.models")
    except DataError:
        return ()
    return tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def open_vae(spec: str | None, trained: Trained) -> tuple[Vae | None, str]:
    """The VAE that a latent model's folder gets, and a note where it gets none. Raises DataError
    for one that cannot be opened, ConfigError for another than made the latents.

    `spec`: a folder or a name, "none", or None for the one that the data were packed with.
    """
    info = trained.info
    if info["data_info"]["kind"] == "pixels":
        if spec not in (None, "none"):
            raise ConfigError(f"the model draws pixels, which need no --vae {spec}; leave it out")
        return None, ""
    where = spec or (info.get("made_with") or {}).get("vae")
    if where in (None, "none"):
        return None, "the folder carries no VAE; give the one of the data with --vae DIR"
    # diffusers saves and loads the VAE; it names itself where it is missing.
    library("diffusers", "hub")
    try:
        vae = load_vae(where, torch.device("cpu"))
    except DataError as error:
        raise DataError(f"{error}; --vae none leaves it out, as the card then says") from error
    expected = info["data_info"].get("encoders", {}).get("vae")
    if expected not in (None, vae.identity):
        raise ConfigError(f"--vae {where} is {vae.identity}, the model was trained with {expected}")
    if vae.patch > 1 or vae.unit_range:
        raise ConfigError(
            f"a pipeline of a DiT cannot decode by {type(vae.module).__name__}, whose latents or "
            "pixels are arranged otherwise; leave it out with --vae none, and draw with eval.sample"
        )
    return (vae.normalized(normalization_of(info["data_info"])) if expected else vae), ""


def _write_vae(folder: Path, vae: Vae) -> None:
    """Raises DataError for a VAE that diffusers could not read back."""
    with silence(), safetensors_disk_errors(folder):
        vae.module.save_pretrained(folder)
    # TAESD's files can hold layers that diffusers' class does not have.
    try:
        same = load_vae(str(folder), torch.device("cpu")).identity == vae.identity
    except DataError:
        same = False
    if not same:
        raise DataError(
            f"this VAE, {vae.identity}, has layers that diffusers cannot read back; leave it out "
            "with --vae none"
        )


def _with_labels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that have a table of classes: diffusers' DiT always adds a row of one, here zeros."""
    name = "y_embedder.embedding_table.weight"
    weights = dict(weights)
    if name not in weights:
        weights[name] = torch.zeros(1, weights["x_embedder.proj.weight"].shape[0])
    return weights


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights {name} are not finite, so nothing can be drawn with them; choose "
                "another --step"
            )


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """A weight in another type. Raises ConfigError where it cannot hold it."""
    smaller = tensor.to(DTYPES[dtype])
    if tensor.isfinite().all() and not smaller.isfinite().all():
        raise ConfigError(f"the weights {name} are too large for {dtype}; use --dtype bf16")
    return smaller


def _transformer_class(diffusers: Any, own: bool) -> Any:
    if not own:
        return diffusers.DiTTransformer2DModel
    # The very file that the folder carries. It imports diffusers, so it is not imported above.
    from largescale.interop.carried.largescale_dit_transformer import LargescaleDiTTransformer

    return LargescaleDiTTransformer


def _network(kind: Any, model: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """diffusers' network with these weights, fp32."""
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    with silence():
        network = kind(**transformer_config(model, len(weights[name])))
    # The tensors themselves, as a copy would double the memory.
    network.load_state_dict(weights, assign=True)
    return network.eval()
