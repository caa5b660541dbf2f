"""Other people's weights: loaded quietly, completely or not at all, and named by their content."""

import hashlib
import importlib
import logging
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largescale.errors import DataError
from largescale.host.launch import env_rank

SAID_AFTER_S = 5.0
"""Seconds of loading after which it is reported."""


def weights_identity(module: nn.Module, buffers: bool = False) -> str:
    """ "sha256:" and 16 hex digits over names and float32 bytes of the parameters, on request of the
    buffers too: the same wherever the files are."""
    # Sorted, so that the order of a library's modules does not matter.
    digest = hashlib.sha256()
    named = [*module.named_parameters(), *(module.named_buffers() if buffers else ())]
    for name, parameter in sorted(named, key=itemgetter(0)):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy())
    return f"sha256:{digest.hexdigest()[:16]}"


def library(name: str, extra: str = "prep") -> Any:
    """The optional module `name`. Raises DataError where it is not installed."""
    # Some libraries log or warn when they are imported.
    try:
        with silence():
            return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{name} is not installed; in the clone: pip install -e '.[{extra}]'"
        ) from error


def locate(name: str, option: str) -> tuple[str, str]:
    """A folder's path or a name on the hub, and what to do where it cannot be loaded. Raises
    DataError for a path that is not a folder."""
    folder = Path(name).expanduser()
    download = "`hf download NAME --local-dir DIR`"
    if folder.is_dir():
        return str(folder), f"fetch the folder anew, as {download} makes it"

    # A misspelt path would otherwise be looked up on the hub.
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
    """Makes any error of a library a DataError about `what`, with the first cause. Only calls of
    the libraries go inside."""
    # A download can take minutes, and the libraries' own bars are off.
    waiting = threading.Timer(SAID_AFTER_S, _say_loading, (what,))
    waiting.daemon = True
    waiting.start()
    try:
        with silence():
            library("huggingface_hub.utils").disable_progress_bars()
            yield
    except DataError:
        raise
    except Exception as error:
        # The libraries let through any error of those below them; the last cause is the first.
        cause: BaseException = error
        while below := cause.__cause__ or cause.__context__:
            cause = below
        reason = textwrap.shorten(str(cause) or type(cause).__name__, 200)
        raise DataError(f"{what} cannot be loaded ({reason}); {remedy}") from error
    finally:
        waiting.cancel()


@contextmanager
def offline() -> Iterator[None]:
    """Uses the hub's files of earlier downloads only. Asking the hub takes a minute where there is
    no network. Raises DataError."""
    constants = library("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _say_loading(what: str) -> None:
    if env_rank() != 0:
        return
    # A folder may come after the kind of encoder, as in hf:/models/bert.
    here = any(Path(name).is_dir() for name in (what, what.partition(":")[2]) if name)
    why = "" if here else ": it may be downloaded, which without a network takes a minute to fail"
    print(f"still loading {what}{why}", file=sys.stderr, flush=True)


@contextmanager
def silence() -> Iterator[None]:
    """Suppresses log messages and warnings. What matters is raised."""
    root = logging.getLogger()
    level = logging.root.manager.disable
    handler = logging.NullHandler()
    # Without any handler, open_clip's logging.info() would give the root one that prints, for good.
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)
