"""The folder of a diffusers pipeline: told from other people's, and replaced whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from largescale.checkpoint.weights import is_description
from largescale.config.serialise import from_dict
from largescale.errors import CheckpointError, usable
from largescale.host.files import (
    from_json,
    names_of,
    require_writable,
    sole_writer,
    unchanged,
    visible,
    write_atomically,
)
from largescale.interop.card_text import GRID
from largescale.interop.diffusers_folder import read_weights
from largescale.interop.diffusers_pipeline import (
    DESCRIPTION,
    MODEL_INDEX,
    PIPELINE_FILE,
    PipelineFacts,
)
from largescale.interop.model_card import CARD
from largescale.interop.names import require_fit

# What we write, in the order in which it gets its place: a folder is ours from the first on, and
# complete once it has the last.
PARTS = (
    DESCRIPTION,
    "transformer",
    "scheduler",
    "vae",
    f"{PIPELINE_FILE}.py",
    MODEL_INDEX,
)
# Hidden, so that it is neither taken for somebody's files nor sent to the hub.
_WRITING = ".writing"
# Keys of the description that another export of the same weights does not have.
_OF_THE_FOLDER = ("diffusers", "dtype")


def is_pipeline(folder: Path) -> bool:
    """Whether an export wrote a diffusers pipeline there, also one that was killed."""
    with suppress(OSError, ValueError):
        return is_description(from_json((folder / DESCRIPTION).read_text(encoding="utf-8")))
    return False


def require_pipeline_folder(out: Path) -> None:
    """Raise CheckpointError where a pipeline would overwrite the files of something else."""
    there = visible(out) if out.is_dir() else []
    if there and not is_pipeline(out):
        raise CheckpointError(
            f"{out} holds {names_of(there)} and no diffusers pipeline of largescale, so it is not "
            "written to; choose a new or an empty folder with --out"
        )
    require_writable(out / MODEL_INDEX, out / DESCRIPTION, remedy="choose another --out")


def known_facts(folder: Path) -> PipelineFacts | None:
    """What was found when the pipeline in the folder was written; None without one."""
    with suppress(OSError, CheckpointError), usable(folder / DESCRIPTION):
        description = from_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        facts = dict(description["diffusers"])
        return PipelineFacts(**facts | {"reasons": tuple(facts["reasons"])})
    return None


@contextmanager
def replaced(out: Path, description: dict[str, Any]) -> Iterator[Path]:
    """An empty folder, whose content takes the place of the pipeline in `out` when the block ends.
    Where it fails, the pipeline that was there stays."""
    new = out / _WRITING
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        # What a killed export left.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            write_atomically(new / DESCRIPTION, json.dumps(description, indent=1) + "\n")
            (out / MODEL_INDEX).unlink(missing_ok=True)
            for name in PARTS:
                _remove(out / name)
                if (new / name).exists():
                    (new / name).replace(out / name)
        # On a full disk it would only take space.
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_pipeline(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an export says of itself, and its weights under our names, bitwise as they were written,
    of a diffusers pipeline that we wrote. Raises CheckpointError where it is not complete."""
    # The one is written first, the other last: between them the weights may be of another export.
    if not (folder / MODEL_INDEX).exists():
        raise CheckpointError(
            f"the pipeline {folder} is not complete: it has no {MODEL_INDEX}, which is written last; "
            "an export writes it now, or was killed: wait for it, or export again"
        )
    with unchanged(folder / DESCRIPTION), unchanged(folder / MODEL_INDEX):
        with usable(folder / DESCRIPTION):
            text = (folder / DESCRIPTION).read_text(encoding="utf-8")
            description: dict[str, Any] = from_json(text)
            model = from_dict(description["config"]).model
        weights, _ = read_weights(folder / "transformer", model.input_size)
    # diffusers' DiT has a table of classes also where the model has none.
    if not model.num_classes:
        del weights["y_embedder.embedding_table.weight"]
    require_fit(weights, model)
    # What is true of that folder only.
    description = {key: value for key, value in description.items() if key not in _OF_THE_FOLDER}
    if (folder / "vae").is_dir():
        made_with = description.get("made_with") or {}
        description["made_with"] = made_with | {"vae": str((folder / "vae").resolve())}
    return description, weights


def card_files(folder: Path) -> tuple[str, ...]:
    """The card's files that lie in the folder."""
    return tuple(name for name in (CARD, GRID) if (folder / name).exists())
