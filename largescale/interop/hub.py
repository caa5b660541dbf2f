"""Models on the hub of Hugging Face, by their names."""

import re
from pathlib import Path
from typing import Any

from largescale.encoders.identity import library, silence
from largescale.errors import CheckpointError, DataError

# Seconds that the hub may take to answer; it is asked once.
TIMEOUT_S = 5.0
# What of a DiT's repository is needed: not its pickles beside the safetensors, nor its pictures.
PATTERNS = (
    "*.json",
    "transformer/*.json",
    "transformer/*.safetensors",
    "scheduler/*.json",
    "vae/*.json",
    "vae/*.safetensors",
    "*.safetensors",
)
# Of repositories that have no safetensors.
PICKLES = ("transformer/*.bin", "vae/*.bin", "*.bin")
# Endings of files, which no name on the hub is taken to have.
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors", ".tar", ".zip")


def is_hub_name(source: str) -> bool:
    """Whether this can be the name of a repository, OWNER/NAME or OWNER/NAME@REVISION, rather than
    a path."""
    if source.startswith((".", "/", "~")) or source.endswith(_FILES):
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", source) is not None


def fetch(source: str) -> Path:
    """The folder of a repository's files, fetched or of an earlier download. Raises CheckpointError
    where there is neither, within seconds."""
    name, _, revision = source.partition("@")
    # A failing download may answer with any error of the libraries below it.
    try:
        hub = library("huggingface_hub")
    except DataError as error:
        raise CheckpointError(
            f"there is no {source} here, and a name on the hub needs huggingface_hub: {error}"
        ) from error
    where: dict[str, Any] = {"revision": revision or None, "etag_timeout": TIMEOUT_S}
    try:
        with silence():
            files = hub.HfApi().model_info(name, revision=revision or None, timeout=TIMEOUT_S)
            names = [file.rfilename for file in files.siblings or ()]
            patterns = [*PATTERNS]
            if not any(path.endswith(".safetensors") for path in names):
                patterns += PICKLES
            return Path(hub.snapshot_download(name, allow_patterns=patterns, **where))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        failure = error
    # What was fetched before serves where the hub cannot be reached.
    try:
        with silence():
            return Path(hub.snapshot_download(name, local_files_only=True, **where))
    except Exception:
        raise CheckpointError(
            f"there is no file or folder {source} here, and it could not be had from the hub as a "
            f"name there ({type(failure).__name__}: {reason}); give the path of a file or a folder, "
            "fetched elsewhere with `hf download NAME --local-dir DIR`"
        ) from failure
