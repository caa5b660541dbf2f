"""Sending an export's folder to the hub, through huggingface_hub. Training never imports this."""

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from largescale.encoders.identity import library, silence
from largescale.errors import ConfigError, StorageError

EXTRA = "hub"


def check_push(name: str) -> None:
    """Raises ConfigError for a name that no repository can have, and where there is no token;
    DataError where huggingface_hub is missing. Asks nothing of a network."""
    hub = library("huggingface_hub", EXTRA)
    # The package loads its modules when they are asked for by name.
    utils = library("huggingface_hub.utils", EXTRA)
    try:
        utils.validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(
            f"--push-to-hub {name} is no name of a repository ({_reason(error)}); give USER/MODEL"
        ) from error
    if not hub.get_token():
        raise ConfigError(
            "there is no token for the hub: `hf auth login` keeps one, or set HF_TOKEN; it needs the "
            "right to write"
        )


def push(folder: Path, name: str, *, private: bool, files: tuple[str, ...] = ()) -> str:
    """Send the folder's files, but for hidden ones, or only `files`, to a repository, which is made
    if need be; returns its address. Raises ConfigError where the hub refuses, StorageError where it
    cannot be reached. The folder stays as it is."""
    hub = library("huggingface_hub", EXTRA)
    api = hub.HfApi()
    with _explained(folder, name), silence():
        url = str(api.create_repo(name, private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(files) or None,
            ignore_patterns=[".*", "**/.*"],
            # Shards of other weights would be read as a part of these.
            delete_patterns=None if files else ["transformer/*"],
            commit_message="Card by largescale" if files else "Export by largescale",
        )
    return url


@contextlib.contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    """Makes any error of the hub's library one of ours that says what is left."""
    stays = f"{folder} stays as it is, and the same command sends it again"
    try:
        yield
    # The library lets through any error of those below it.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _reason(error) if status is None else f"HTTP {status}: {_said(error)}"
        if status in (401, 403, 404):
            raise ConfigError(
                f"the hub refuses {name} ({reason}); the token needs the right to write there: "
                f"`hf auth login`, or HF_TOKEN. {stays}"
            ) from error
        if status is not None and 400 <= status < 500:
            raise ConfigError(f"the hub does not take {name} ({reason}). {stays}") from error
        endpoint = library("huggingface_hub.constants", EXTRA).ENDPOINT
        raise StorageError(
            f"{name} could not be sent to {endpoint} ({reason}); is there a network? {stays}"
        ) from error


def _said(error: BaseException) -> str:
    """What the hub's answer says."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        if message := error.response.json().get("error"):  # type: ignore[attr-defined]
            return textwrap.shorten(str(message), 200).rstrip(".")
    return _reason(error)


def _reason(error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return textwrap.shorten(lines or type(error).__name__, 200).rstrip(".")
