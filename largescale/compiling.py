"""torch.compile: where it is used, what it is given, and what it made, kept for the next start."""

import contextlib
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from largescale.errors import ConfigError
from largescale.files import write_atomically
from largescale.models.dit import Block, DiT

What = Literal["off", "blocks", "model"]


class Gelu(nn.Module):
    """GELU's tanh approximation by 1 + tanh z = 2 sigmoid(2 z): the same up to rounding, and on a CPU generated code
    computes exp several times faster than tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def has_compiler() -> bool:
    """For the code that is generated: all of it on a CPU, what starts the kernels on a GPU."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


def what_to_compile(wanted: Literal["auto", "off", "blocks", "model"], device: str, architecture: str = "dit") -> What:
    """Raises ConfigError where it is wanted and there is no compiler."""
    if wanted == "auto":
        return ("blocks" if architecture == "dit" else "model") if device == "cuda" and has_compiler() else "off"
    if wanted != "off" and not has_compiler():
        raise ConfigError(f"compiling needs a C++ compiler, and $CXX, by default g++, is not found on PATH; install "
                          f"it, or train without it: --train.compile off (now {wanted})")
    return wanted


class Compiled:
    """A model that is trained, compiled in place when it is first called."""

    def __init__(self, model: nn.Module, what: What, device: str, cache: Path):
        """`cache`: a file for what is compiled, for the next start, perhaps on another machine."""
        self.what, self._cache, self._saved = what, cache, what == "off"
        self._loaded = what != "off" and load_compiled(cache)
        if what == "off":
            return
        for block in model.blocks if isinstance(model, DiT) else ():
            assert isinstance(block, Block)
            if device == "cpu":
                block.mlp.act = Gelu()
            if what == "blocks":  # compiled once for all, as they are alike
                block.compile(dynamic=False)
        if what == "model":
            model.compile(dynamic=False)

    def save(self) -> None:
        """After a step, once: what was compiled, if it was not all there. Of a CPU not the machine code, which stays in
        torch's own cache. Raises OSError where it cannot be written; it is not tried again."""
        if self._saved:
            return
        self._saved = True
        missed = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
        if (missed or not self._loaded) and (made := torch.compiler.save_cache_artifacts()):
            write_atomically(self._cache, made[0])

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """Here nothing runs compiled: other shapes, once in a while, are not worth compiling."""
        return contextlib.nullcontext() if self.what == "off" else torch.compiler.set_stance("force_eager")


def failure(error: BaseException) -> str | None:
    """What it says, if torch.compile raised it."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    return f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]})"


def load_compiled(path: Path) -> bool:
    """Put what another process compiled, perhaps on another machine, into torch's cache. False where there is none, or
    it cannot be read: it is only made again, as it is where torch or the device is another."""
    try:
        return torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError):
        return False
