"""torch.compile: where it is used, what it compiles, and where its cache lies."""

import contextlib
import hashlib
import math
import os
import re
import shutil
import stat
import sysconfig
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from largescale.errors import ConfigError
from largescale.models.dit import Block, DiT

What = Literal["off", "blocks", "model"]


class Gelu(nn.Module):
    """GELU's tanh approximation by a sigmoid: the same up to rounding, and faster when compiled for
    a CPU, where generated code computes exp several times faster than tanh."""

    def forward(self, x: Tensor) -> Tensor:
        # 1 + tanh z = 2 sigmoid(2 z)
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which builds all generated code on a CPU, and the code that
    starts the kernels on a GPU."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


def missing_for(device: str) -> str | None:
    """What compiling for this device lacks here, with the remedy."""
    if not has_compiler():
        return "a C++ compiler, and $CXX, by default g++, is not found on PATH; install it"
    # Triton builds a Python module that starts its kernels.
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if device == "cuda" and not header.exists():
        return f"Python's header {header}, which is not there; install it (Debian: python3-dev)"
    return None


def what_to_compile(
    wanted: Literal["auto", "off", "blocks", "model"], device: str, architecture: str = "dit"
) -> What:
    """What is compiled, with a choice for auto. Raises ConfigError where it is asked for and there
    is no compiler."""
    if wanted == "auto":
        # On a CPU it has to be asked for.
        if device != "cuda" or missing_for(device):
            return "off"
        # DiT's blocks are alike, so that one is compiled for all. A U-Net's are not.
        return "blocks" if architecture == "dit" else "model"
    missing = missing_for(device)
    if wanted != "off" and missing:
        raise ConfigError(
            f"compiling needs {missing}, or train without it: --train.compile off (now {wanted})"
        )
    return wanted


def use_private_cache(env: MutableMapping[str, str] = os.environ) -> None:
    """Makes torch.compile and Triton cache in a folder that this user alone can write, unless `env`
    names one.

    Code in such a cache is run. torch's own default, /tmp/torchinductor_USER, can be made by
    anybody before us. A folder for each kind of CPU: a home directory is shared by machines, and
    code is generated for the one it runs on.
    """
    # torch itself sets the variable to its default when parts of it are imported.
    usual = Path(tempfile.gettempdir()) / "torchinductor_"
    if not env.get("TORCHINDUCTOR_CACHE_DIR", str(usual)).startswith(str(usual)):
        return

    # The user's own cache first; in /tmp where the home directory cannot be written.
    cache = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", "/"), ".cache")
    for folder in (
        Path(cache) / "largescale",
        Path(tempfile.gettempdir()) / f"largescale_{os.getuid()}",
    ):
        if _is_private(folder):
            break
    else:
        folder = Path(tempfile.mkdtemp(prefix="largescale_"))
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"torch_compile_{_cpu_kind()}")
    env.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _is_private(folder: Path) -> bool:
    """Makes the folder, and returns whether it is ours, writable, and closed to all others."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        closed = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        return closed and found.st_uid == os.geteuid() and os.access(folder, os.W_OK)
    return False


def _cpu_kind() -> str:
    """A short name that machines with the same instruction set share."""
    kind = os.uname().machine
    # The first core's list of instructions: "flags" of x86, "Features" of Arm.
    with contextlib.suppress(OSError):
        flags = re.search(r"(?m)^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text())
        kind += flags[0] if flags else ""
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


class Compiled:
    """A model that is trained, compiled in place when it is first called."""

    def __init__(self, model: nn.Module, what: What, device: str):
        self.what = what
        if what == "off":
            return
        use_private_cache()
        if isinstance(model, DiT):
            for block in model.blocks:
                assert isinstance(block, Block)
                if device == "cpu":
                    block.mlp.act = Gelu()
            if what == "blocks":
                self._compile_blocks(model, device)
        if what == "model":
            model.compile(dynamic=False)

    def _compile_blocks(self, model: DiT, device: str) -> None:
        # All blocks share what is compiled for the first, as they are alike.
        for block in getattr(model.fused_blocks, "blocks", model.blocks):
            block.compile(dynamic=False)
        # What is around them is a hundredth of the work, where a CPU would compile for longer than
        # it saves. On a GPU each of its operations would be a pass over the residual stream. The
        # labels' embedding draws which of them are dropped: compiled code would draw others.
        if device == "cuda":
            for part in (model.x_embedder, model.t_embedder, model.final_layer):
                part.compile(dynamic=False)

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """A context in which nothing runs compiled: other shapes, once in a while, are not worth
        compiling."""
        if self.what == "off":
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")


def failure(error: BaseException) -> str | None:
    """A message with the reason of an error that torch.compile raised; None for another error."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    # The first line is "backend='inductor' raised:", and the next has the reason.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"torch.compile failed ({type(error).__name__}: {' '.join(lines[:2])})"
