"""Files of weights, read without running any code of theirs: what torch and safetensors wrote, and
what lies in place of it."""

import argparse
import contextlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largescale.encoders.identity import silence
from largescale.errors import CheckpointError
from largescale.host.files import from_json
from largescale.interop.names import listed

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


def load_content(path: Path) -> dict[str, Any]:
    """The content of a file, by what it is and not by its name. Raises CheckpointError."""
    with _readable(path):
        with path.open("rb") as file:
            start = file.read(256)
        _require_whole(path, start)
        if start[8:9] == b"{":
            return _load_safetensors(path)
        return _load_torch(path)


def read_shards(index: Path) -> dict[str, Tensor]:
    """The weights of sharded safetensors by their index file. Raises CheckpointError for shards
    that are missing, or are not those of this index."""
    with _readable(index):
        where = from_json(index.read_text())["weight_map"]
        shards = sorted(set(where.values()))
        # A name with a folder in it would lead out of this one.
        paths = [index.parent / Path(name).name for name in shards]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {listed(missing)}, of the {len(shards)} shards that "
            f"{index.name} names; fetch the folder again"
        )
    weights: dict[str, Tensor] = {}
    types: dict[str, set[torch.dtype]] = {}
    for name, path in zip(shards, paths, strict=True):
        shard = load_content(path)
        wanted = {tensor for tensor, file in where.items() if file == name}
        if wrong := shard.keys() ^ wanted:
            raise CheckpointError(
                f"{path} is not the shard that {index.name} describes: they differ in "
                f"{listed(wrong)}; the shards are of several downloads or models, fetch all of "
                "them again into an empty folder"
            )
        types[name] = {tensor.dtype for tensor in shard.values()}
        weights.update(shard)
    for name, stored in types.items():
        if stored != types[shards[0]]:
            raise CheckpointError(
                f"{name} has {types_text(stored)} and {shards[0]} {types_text(types[shards[0]])}: "
                "the shards are of several downloads, fetch all of them again into an empty folder"
            )
    return weights


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
    # torch words it in one way or the other, by version and kind of pickle.
    named = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)", str(error))
    code = named[1] if named else _first_global(path)
    if code is None:
        return _no_checkpoint(path, error)
    return CheckpointError(
        f"{path} is a pickle with code ({code}), which would run when it is read, so it is not "
        "read; where it comes from, save the weights alone: torch.save(model.state_dict(), PATH)"
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
        f"{path} is no file of weights, or a damaged one ({type(error).__name__}: {reason}); give "
        "a file of safetensors or of torch.save, and fetch a damaged one again"
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


def types_text(types: set[torch.dtype]) -> str:
    """Types of tensors for a message, such as "bfloat16, float32"."""
    return ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
