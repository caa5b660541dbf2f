"""Files of weights that trainings wrote: DiT's, SiT's, REPA's and EDM's, told apart by their names."""

import re
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from largescale.config.schema import DiffusionConfig, ModelConfig
from largescale.errors import CheckpointError, ConfigError
from largescale.interop import diffusers_folder, dit_weights, edm_weights
from largescale.interop.choices import Facts, Source
from largescale.interop.names import listed
from largescale.interop.state_dicts import StateDict, read_state_dict, to_fp32
from largescale.models.unet import from_edm

# How SiT's and REPA's programs name the interpolants.
_PATHS: dict[str, Literal["linear", "gvp"]] = {"linear": "linear", "gvp": "gvp", "cosine": "gvp"}
# Latents of every published DiT and SiT are an eighth of the image's side.
_PUBLISHED_DOWNSAMPLING = 8


def read_file(path: Path, facts: Facts) -> Source:
    """A file of weights, by their names."""
    found = read_state_dict(path, facts.choices.weights)
    if dit_weights.is_dit(found.weights):
        return _dit(found, path, facts)
    if edm_weights.is_edm(found.weights):
        return _edm(found, path, facts)
    if any(name.startswith("transformer_blocks.") for name in found.weights):
        raise CheckpointError(
            f"{path} has diffusers' names, and no {diffusers_folder.CONFIG} beside it, which has "
            "the number of heads; give the folder of the transformer or of the pipeline"
        )
    raise CheckpointError(
        f"{path} has the weights of another model ({listed(found.weights)}); those of DiT, SiT, "
        "REPA, EDM's DDPM++ and diffusers' DiT can be converted"
    )


def _edm(found: StateDict, path: Path, facts: Facts) -> Source:
    """The state dict of one of EDM's networks."""
    facts.choices.require_unset(
        ("num_heads", "class_dropout_prob", "schedule", "interpolant", "noise_at"),
        "this is a U-Net of EDM",
    )
    if facts.choices.objective not in (None, "edm"):
        raise ConfigError(f"--objective {facts.choices.objective} is not that of EDM; leave it out")
    facts.assumed["diffusion.objective"] = (
        "edm with sigma_data=0.5, as EDM's own preconditioning has it; the weights of networks "
        "with VP's, VE's or iDDPM's look the same"
    )
    weights = from_edm(to_fp32(found.weights, path))
    model = edm_weights.ddpmpp_config(weights)
    # Dropout leaves no trace in the weights.
    dropout = "0.13, as for CIFAR-10; only further training reads it"
    facts.assumed["model.unet.dropout"] = dropout
    diffusion = DiffusionConfig(objective="edm")
    return _as_source(weights, model, diffusion, "a network of EDM", found, path)


def _dit(found: StateDict, path: Path, facts: Facts) -> Source:
    """The state dict of a DiT, a SiT, or a SiT with REPA's projectors."""
    weights, left_out = dit_weights.from_repa(to_fp32(found.weights, path))
    facts.left_out += left_out
    args = found.args
    # REPA calls the velocity v.
    is_repa = bool(left_out) or "proj_coeff" in args or args.get("prediction") == "v"
    model = _dit_model(weights, args, path, facts)
    diffusion = _objective(args, path, facts, is_repa=is_repa)
    kind = {"gaussian": "a DiT", "flow": "a SiT", "edm": "a DiT with EDM's objective"}[
        diffusion.objective
    ]
    if found.half:
        weights, was_rounded = dit_weights.with_exact_position(weights)
        if was_rounded:
            facts.assumed["pos_embed"] = "sines and cosines in fp32; the file has them rounded"
    if diffusion.objective == "flow":
        said = 1 if is_repa else None
        if not is_repa and args.get("prediction") == "velocity":
            said = 0
        why = "as in willisma/SiT"
        if facts.choose("noise_at", facts.choices.noise_at, said, 0, why) == 1:
            weights = dit_weights.reverse_time(weights)
            facts.assumed["time"] = (
                "turned around, from noise at 1 to noise at 0: the first layer of t_embedder and "
                "final_layer.linear are not the file's own"
            )
    return _as_source(
        weights, model, diffusion, f"{kind}{' of REPA' if is_repa else ''}", found, path
    )


def _as_source(
    weights: dict[str, Tensor],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    format: str,
    found: StateDict,
    path: Path,
) -> Source:
    """What a file says, with its training's settings as far as JSON has them."""
    plain = {}
    for key, value in found.args.items():
        # A training may have saved anything among its arguments, such as paths and devices.
        if isinstance(value, str | int | float | bool):
            plain[key] = value
    return Source(
        weights,
        model,
        diffusion,
        format,
        (path,),
        found.which or "as in the file",
        found.step,
        facts={"args": plain} if plain else {},
    )


def _dit_model(
    weights: dict[str, Tensor], args: dict[str, Any], path: Path, facts: Facts
) -> ModelConfig:
    """The network of a DiT's or SiT's weights. Raises CheckpointError where the file's own settings
    contradict them."""
    choices = facts.choices
    dropout = choices.class_dropout_prob
    rows = 0
    if "y_embedder.embedding_table.weight" in weights:
        rows, _ = dit_weights.shape_of(weights, "y_embedder.embedding_table.weight", 2)
    if rows and dropout is None:
        said = None
        if isinstance(classes := args.get("num_classes"), int):
            if rows not in (classes, classes + 1):
                raise _contradiction(path, f"num_classes={classes}", f"{rows} labels")
            said = 0.1 if rows == classes + 1 else 0.0
        dropout = facts.choose(
            "model.class_dropout_prob", None, said, 0.1, "so the last label is the null label"
        )
    model = dit_weights.dit_config(weights, choices.num_heads, dropout or 0.0)
    published = dit_weights.PUBLISHED_NAMES.get((model.depth, model.hidden_size))
    size = re.fullmatch(r"[DS]iT-(S|B|L|XL)/(\d+)", str(args.get("model")))
    if size and (size[1], int(size[2])) != (published, model.patch_size):
        sizes = f"depth {model.depth}, width {model.hidden_size}, patches of {model.patch_size}"
        raise _contradiction(path, f"model={args['model']}", sizes)
    if choices.num_heads is None and not size:
        facts.assumed["model.num_heads"] = (
            f"{model.num_heads}, as the published networks of width {model.hidden_size} have"
        )
    # Programs for latents have the image's size, others the network's.
    side = args.get("image_size", args.get("resolution"))
    sides = (side, side // _PUBLISHED_DOWNSAMPLING) if isinstance(side, int) else ()
    if sides and model.input_size not in sides:
        found = f"positions for inputs of {model.input_size} x {model.input_size}"
        raise _contradiction(path, f"an image size of {side}", found)
    return model


def _contradiction(path: Path, said: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} contradicts itself: its settings say {said}, and its weights have {found}; take "
        "the file of one training"
    )


def _objective(args: dict[str, Any], path: Path, facts: Facts, *, is_repa: bool) -> DiffusionConfig:
    """What a DiT or SiT was trained with."""
    choices = facts.choices
    objective = _objective_name(args, path, facts, is_repa=is_repa)
    if objective != "flow":
        choices.require_unset(
            ("interpolant", "noise_at"), f"the objective is {objective}, not flow"
        )
    if objective != "gaussian":
        choices.require_unset(("schedule",), f"the objective is {objective}, not gaussian")
    if objective == "flow":
        return DiffusionConfig(objective="flow", interpolant=_interpolant(args, path, facts))
    if objective == "edm":
        return DiffusionConfig(objective="edm")
    published: Literal["linear", "cosine"] = "linear"
    why = "with 1,000 timesteps, as facebookresearch/DiT trains"
    return DiffusionConfig(
        schedule=facts.choose("diffusion.schedule", choices.schedule, None, published, why)
    )


def _objective_name(
    args: dict[str, Any], path: Path, facts: Facts, *, is_repa: bool
) -> Literal["gaussian", "flow", "edm"]:
    """The objective by the settings of the training, else by the file's name, else DiT's."""
    is_sit = is_repa or "path_type" in args or str(args.get("model")).startswith("SiT")
    # What the file says counts before what its name suggests.
    said: Literal["gaussian", "flow", "edm"] | None = None
    if is_sit:
        said = "flow"
    elif str(args.get("model")).startswith("DiT"):
        said = "gaussian"
    default: Literal["gaussian", "flow", "edm"] = "gaussian"
    why = "as in DiT; the weights of a SiT look the same, and would need --objective flow"
    if "dit" in path.stem.lower():
        why = "as in DiT, by the file's name"
    elif "sit" in path.stem.lower():
        default = "flow"
        why = "as in SiT, by the file's name"
    return facts.choose("diffusion.objective", facts.choices.objective, said, default, why)


def _interpolant(args: dict[str, Any], path: Path, facts: Facts) -> Literal["linear", "gvp"]:
    """The path of a SiT. Raises CheckpointError for one that predicts something else than the
    velocity, or on another path."""
    if (prediction := args.get("prediction", "velocity")) not in ("velocity", "v"):
        raise CheckpointError(
            f"{path} predicts the {prediction}, and a SiT of largescale the velocity; such a model "
            "cannot be converted"
        )
    path_type = args.get("path_type")
    said = None if path_type is None else _PATHS.get(str(path_type).lower())
    if path_type is not None and said is None:
        raise CheckpointError(
            f"{path} was trained on the path {path_type}, which largescale does not have (linear "
            "and gvp); such a model cannot be converted"
        )
    published: Literal["linear", "gvp"] = "linear"
    why = "as SiT was published"
    return facts.choose("diffusion.interpolant", facts.choices.interpolant, said, published, why)
