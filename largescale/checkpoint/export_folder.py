"""Writing the folder of an export: weights and config, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largescale.checkpoint.files import require_outside_checkpoints
from largescale.checkpoint.weights import (
    EXPORT_CONFIG,
    EXPORT_METADATA,
    EXPORT_WEIGHTS,
    RAW_METADATA,
    is_export,
)
from largescale.errors import CheckpointError
from largescale.host.files import (
    names_of,
    require_writable,
    safetensors_disk_errors,
    sole_writer,
    visible,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor


def require_export_folder(out: Path) -> None:
    """Raise CheckpointError where an export would overwrite the files of something else, or lie in
    the checkpoints of a run."""
    require_outside_checkpoints(out, "--out")
    # A file in its place is reported, with its owner, where the folder is tried out.
    there = visible(out) if out.is_dir() else []
    if there and not is_export(out):
        raise CheckpointError(
            f"{out} holds {names_of(there)} and no export of largescale, so it is not written to; "
            "choose a new or an empty folder with --out"
        )


def require_writable_export(out: Path) -> None:
    """Prove, before any work, that an export's files can be written; makes nothing. Raises
    CheckpointError, or StorageError for what may go away."""
    require_writable(out / EXPORT_WEIGHTS, out / EXPORT_CONFIG, remedy="choose another --out")


def write_export(out: Path, weights: dict[str, "Tensor"], description: dict[str, Any]) -> None:
    """Write an export: a model's weights by name, and what `weights.describe` says of them."""
    from safetensors.torch import save_file

    weights_path = out / EXPORT_WEIGHTS
    config_path = out / EXPORT_CONFIG
    out.mkdir(parents=True, exist_ok=True)
    metadata = RAW_METADATA if description.get("weights") == "raw" else EXPORT_METADATA
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}

    # Whole or absent under its name: a part of it could not be told from another's file.
    temporary = weights_path.with_name(f".{EXPORT_WEIGHTS}.tmp")
    with sole_writer(out):
        try:
            with safetensors_disk_errors(weights_path):
                save_file(contiguous, temporary, metadata=metadata)
            # On disk before it has its name, as the config is.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            # The config comes last: a folder that has one is complete.
            config_path.unlink(missing_ok=True)
            temporary.replace(weights_path)
        # On a full disk it would only take space.
        finally:
            temporary.unlink(missing_ok=True)
        write_atomically(config_path, json.dumps(description, indent=1))
        # safetensors makes its file readable for the owner alone.
        shutil.copymode(config_path, weights_path)
