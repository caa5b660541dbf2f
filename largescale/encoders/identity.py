"""Other people's weights: loaded quietly, whole or not at all, and named by what is in them."""

import hashlib
import importlib
import logging
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largescale.errors import DataError
from largescale.host.launch import env_rank

SAID_AFTER_S = 5.0
"""A load that takes longer says that it is one."""


def weights_identity(module: nn.Module) -> str:
    """ "sha256:" and 16 hex digits over names and float32 bytes of the parameters: the same wherever
    the files lie."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy())
    return f"sha256:{digest.hexdigest()[:16]}"


def library(name: str, extra: str = "prep") -> Any:
    """The module `name`, which a run does without. Raises DataError where it is not installed."""
    try:
        with silence():
            return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{name} is not installed; in the clone: pip install -e '.[{extra}]'"
        ) from error


def locate(name: str, option: str) -> tuple[str, str]:
    """A folder's path, or `name` taken as the hub's; and what to do where it cannot be loaded.
    Raises DataError."""
    folder, download = Path(name).expanduser(), "`hf download NAME --local-dir DIR`"
    if folder.is_dir():
        return str(folder), f"fetch the folder anew, as {download} makes it"
    if folder.exists() or name.startswith((".", "/", "~")):
        raise DataError(
            f"{name} is not a folder; give one: {option}, as {download} makes it, or a name on the "
            "hub"
        )
    return name, (
        f"without a network give a local folder: {option} with config.json and the weights, as "
        f"{download} makes it"
    )


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Only calls of the libraries go inside: whatever they raise is a DataError about `what`, with
    the first cause."""
    waiting = threading.Timer(SAID_AFTER_S, _say_loading, (what,))
    waiting.daemon = True
    waiting.start()
    try:
        with silence():
            library("huggingface_hub.utils").disable_progress_bars()
            yield
    except DataError:
        raise
    except Exception as error:  # the libraries let through any error of those below them
        cause: BaseException = error
        while below := cause.__cause__ or cause.__context__:
            cause = below
        reason = textwrap.shorten(str(cause) or type(cause).__name__, 200)
        raise DataError(f"{what} cannot be loaded ({reason}); {remedy}") from error
    finally:
        waiting.cancel()


@contextmanager
def offline() -> Iterator[None]:
    """The hub is not asked, which without a network takes a minute: what it has left here before is
    there. Raises DataError."""
    constants = library("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _say_loading(what: str) -> None:
    if env_rank() == 0:
        print(
            f"still loading {what}: it may be downloaded, which without a network takes a minute to "
            "fail",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def silence() -> Iterator[None]:
    """No notes, bars or warnings. What matters is raised."""
    root, level, handler = logging.getLogger(), logging.root.manager.disable, logging.NullHandler()
    root.addHandler(
        handler
    )  # without any, open_clip's logging.info() would give it one that prints, for good
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)
