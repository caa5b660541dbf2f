"""The weights in a checkpoint of another program: the EMA or the others, without the prefixes of
their names, in float32."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.errors import CheckpointError
from largescale.interop.names import listed
from largescale.interop.weight_files import load_content, types_text

Which = Literal["ema", "model"]

# Where trainers put a model's weights in their checkpoints, the EMA and the others.
CONTAINERS: dict[Which, tuple[str, ...]] = {
    "ema": ("ema", "ema_state_dict", "model_ema"),
    "model": ("model", "state_dict", "model_state_dict", "module"),
}
# What wraps a whole model, and so is before each of its names.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "ema_model.", "_forward_module.")
# What torch puts between two parts of a name where it wraps a block.
_WRAPPED_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
# A count of torch's AveragedModel, beside the weights.
_AVERAGED = "n_averaged"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StateDict:
    """The weights of a file, and what lay beside them."""

    weights: dict[str, Tensor]
    which: Which | None = None
    """The EMA or the other weights; None where the file has one set and does not say which."""
    args: dict[str, Any] = field(default_factory=dict)
    """The arguments of the training program that wrote the file."""
    step: int = 0
    """The step of that training, 0 where the file does not say."""
    half: bool = False
    """Whether the file has them in fp16 or bf16."""


def read_state_dict(path: Path, which: Which | None) -> StateDict:
    """The weights of a file of safetensors or of torch.save, on the CPU, under their names without
    prefixes: the EMA where there is one, or those of `which`. Raises CheckpointError for anything
    else, and for a pickle with code."""
    content = load_content(path)
    weights, found = _chosen(content, which, path)
    weights = without_prefixes(weights)
    args = content.get("args", {})
    # facebookresearch/DiT saves what argparse returned.
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return StateDict(
        weights,
        found,
        args if isinstance(args, dict) else {},
        _step(content, path),
        half=any(tensor.dtype in _HALF for tensor in weights.values()),
    )


def to_fp32(weights: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The weights in float32, each contiguous. Raises CheckpointError, with its name, for one that
    is not of a float type, or not finite."""
    converted = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is of type {types_text({tensor.dtype})} ({tensor.layout}), and "
                "weights are dense, in fp32, fp16 or bf16; quantised weights cannot be converted"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} has values that are not finite, of a training that diverged or a "
                "damaged file; take an earlier checkpoint, or fetch the file again"
            )
        # safetensors writes contiguous tensors only.
        converted[name] = tensor.float().contiguous()
    return converted


def without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have in the model itself, which DDP, torch.compile and
    others put prefixes before."""
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        kept = ".".join(part for part in parts if part not in _WRAPPED_PARTS)
        if kept in renamed:
            raise CheckpointError(
                f"the weights have {kept} twice, with and without a prefix ({name}); save the "
                "state dict of one model"
            )
        if name != _AVERAGED:
            renamed[kept] = tensor
    # A prefix is of all names, or it is a part of the model.
    while prefix := _common_prefix(renamed):
        renamed = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
    return renamed


def _common_prefix(names: Mapping[str, Tensor]) -> str:
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _chosen(
    content: dict[str, Any], which: Which | None, path: Path
) -> tuple[dict[str, Tensor], Which | None]:
    """The state dict in a file's content, and which of the two it is."""
    found = _contained(content) or _side_by_side(content)
    if not found and _is_state_dict(content):
        if which == "ema":
            raise CheckpointError(
                f"{path} has one set of weights, and does not say that they are an EMA; leave out "
                "--weights"
            )
        return content, None
    if not found:
        there = listed(map(str, content)) or "nothing"
        raise CheckpointError(
            f"{path} holds {there}, and no weights by their names where a training keeps them "
            f"({', '.join(CONTAINERS['ema'] + CONTAINERS['model'])}); give a checkpoint of a model"
        )
    # The other weights in an EMA's place would be worse samples, and nobody would know why.
    ema = [key for key in CONTAINERS["ema"] if content.get(key) is not None]
    if which is None and ema and "ema" not in found:
        raise CheckpointError(
            f"{path} has an EMA ({ema[0]}) that is not weights by their names; save its state "
            "dict, or take the other weights with --weights model"
        )
    chosen = which or ("ema" if "ema" in found else "model")
    if chosen not in found:
        raise CheckpointError(
            f"{path} has no weights of --weights {chosen}; it has those of {listed(found)}"
        )
    return found[chosen], chosen


def _contained(content: dict[str, Any]) -> dict[Which, dict[str, Tensor]]:
    """The state dicts that stand under a key of a checkpoint."""
    found: dict[Which, dict[str, Tensor]] = {}
    for kind, keys in CONTAINERS.items():
        for key in keys:
            if kind not in found and _is_state_dict(content.get(key)):
                found[kind] = content[key]
    return found


def _side_by_side(content: dict[str, Any]) -> dict[Which, dict[str, Tensor]]:
    """The EMA and the other weights of one state dict, where the EMA's names have a prefix."""
    if not _is_state_dict(content):
        return {}
    ema: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in content.items():
        (ema if name.startswith("ema.") else rest)[name.removeprefix("ema.")] = tensor
    if not ema:
        return {}
    return {"ema": ema, "model": rest} if rest else {"ema": ema}


def _is_state_dict(value: Any) -> bool:
    """Whether a value is tensors by their names."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _step(content: dict[str, Any], path: Path) -> int:
    """The step of a training's checkpoint: in it, or in its name as DiT's train.py gives it."""
    for key in ("steps", "step", "train_steps", "global_step"):
        value = content.get(key)
        if isinstance(value, int) and value >= 0:
            return value
    return int(path.stem) if re.fullmatch(r"\d{7,}", path.stem) else 0
