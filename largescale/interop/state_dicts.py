"""Files of weights that other programs wrote, read without running any code of theirs."""

import argparse
import contextlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.encoders.identity import silence
from largescale.errors import CheckpointError
from largescale.host.files import from_json
from largescale.interop.names import listed

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
# EDM pickles its networks with their source code, through this module.
_EDMS_PICKLES = b"torch_utils.persistence"
# Of the start of a file, which is searched for it.
_SEARCHED = 2**26

# What torch raises for the content of a file that is none of its own.
_FOREIGN = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
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
    content = _load(path)
    weights, found = _chosen(content, which, path)
    weights = without_prefixes(weights)
    args = content.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return StateDict(
        weights,
        found,
        args if isinstance(args, dict) else {},
        _step(content, path),
        half=any(tensor.dtype in _HALF for tensor in weights.values()),
    )


def read_shards(index: Path) -> dict[str, Tensor]:
    """The weights of sharded safetensors by their index file. Raises CheckpointError for shards that
    are missing, or are not those of this index."""
    with _readable(index):
        where = from_json(index.read_text())["weight_map"]
        shards = sorted(set(where.values()))
        # A name with a folder in it would lead out of this one.
        paths = [index.parent / Path(name).name for name in shards]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {listed(missing)}, of the {len(shards)} shards that {index.name} "
            "names; fetch the folder again"
        )
    weights: dict[str, Tensor] = {}
    types: dict[str, set[torch.dtype]] = {}
    for name, path in zip(shards, paths, strict=True):
        shard = _load(path)
        wanted = {tensor for tensor, file in where.items() if file == name}
        if wrong := shard.keys() ^ wanted:
            raise CheckpointError(
                f"{path} is not the shard that {index.name} describes: they differ in "
                f"{listed(wrong)}; the shards are of several downloads or models, fetch all of them "
                "again into an empty folder"
            )
        types[name] = {tensor.dtype for tensor in shard.values()}
        weights.update(shard)
    for name, stored in types.items():
        if stored != types[shards[0]]:
            raise CheckpointError(
                f"{name} has {_types(stored)} and {shards[0]} {_types(types[shards[0]])}: the shards "
                "are of several downloads, fetch all of them again into an empty folder"
            )
    return weights


def to_fp32(weights: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The weights in float32, each contiguous. Raises CheckpointError, with its name, for one that
    is not of a float type, or not finite."""
    converted = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is of type {_types({tensor.dtype})} ({tensor.layout}), and weights are "
                "dense, in fp32, fp16 or bf16; quantised weights cannot be converted"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: {name} has values that are not finite, of a training that diverged or a "
                "damaged file; take an earlier checkpoint, or fetch the file again"
            )
        converted[name] = tensor.float().contiguous()
    return converted


def without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have in the model itself, which DDP, torch.compile and
    others put prefixes before."""
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        kept = [part for part in parts if part not in _WRAPPED_PARTS]
        renamed[".".join(kept)] = tensor
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
            f"{path} has an EMA ({ema[0]}) that is not weights by their names; save its state dict, "
            "or take the other weights with --weights model"
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


def _load(path: Path) -> dict[str, Any]:
    """The content of a file, by what it is and not by its name. Raises CheckpointError."""
    with _readable(path):
        with path.open("rb") as file:
            start = file.read(256)
        _require_whole(path, start)
        if start[8:9] == b"{":
            return _load_safetensors(path)
        return _load_torch(path)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is a damaged file of safetensors, or half a download ({error}); fetch it again"
        ) from error


def _load_torch(path: Path) -> dict[str, Any]:
    """The content of a file of torch.save: tensors, plain values, and the arguments of a program."""
    zipped = zipfile.is_zipfile(path)
    try:
        # Their train.py keep their arguments; a Namespace has no code. mmap: of a checkpoint with
        # its optimizer a third is read.
        with silence(), torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise _unpickled(path, error) from error
    except _FOREIGN as error:
        raise _no_checkpoint(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not weights by their names; save the state "
            "dict of the model"
        )
    return content


def _unpickled(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """The error of a pickle that torch does not read without running code, or not at all."""
    with path.open("rb") as file:
        from_edm = _EDMS_PICKLES in file.read(_SEARCHED)
    if from_edm:
        return CheckpointError(
            f"{path} is one of EDM's pickles, which run the code that they contain when they are "
            "read, so it is not read here; make a state dict of it in EDM's own environment, in a "
            "clone of github.com/NVlabs/edm:\n"
            "    import pickle, torch\n"
            f'    network = pickle.load(open("{path}", "rb"))["ema"]\n'
            f'    torch.save(network.state_dict(), "{path.with_suffix(".pt").name}")\n'
            "and convert that"
        )
    named = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)", str(error))
    code = named[1] if named else _first_global(path)
    if code is None:
        return _no_checkpoint(path, error)
    return CheckpointError(
        f"{path} is a pickle with code ({code}), which would run when it is read, so it is not read; "
        "where it comes from, save the weights alone: torch.save(model.state_dict(), PATH)"
    )


def _first_global(path: Path) -> str | None:
    """The first function or class that a plain pickle names; None where there is none, or where the
    file is no pickle. Runs nothing."""
    texts: list[str] = []
    # What is no pickle ends it with any error.
    with contextlib.suppress(Exception), path.open("rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    return None


def _no_checkpoint(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [""])[0][:120]
    return CheckpointError(
        f"{path} is no file of weights, or a damaged one ({type(error).__name__}: {reason}); give a "
        "file of safetensors or of torch.save, and fetch a damaged one again"
    )


def _require_whole(path: Path, start: bytes) -> None:
    """Raises CheckpointError for what lies in place of a file of weights, by its first bytes."""
    remedy = "fetch the file itself again, as `hf download NAME --local-dir DIR` does"
    if not start:
        raise CheckpointError(f"{path} is empty; {remedy}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs in place of the weights; run git lfs pull in its clone"
        )
    if start.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; {remedy}")
    # The list of what a zip holds is at its end.
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is half a download: its end is missing; {remedy}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Makes errors of reading a file, and of content of another shape, a CheckpointError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _no_checkpoint(path, error) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _types(types: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
