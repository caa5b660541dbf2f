"""torch.compile: where it is used, what it is given, and where what it made is kept for the next
start."""

import contextlib
import hashlib
import math
import os
import re
import shutil
import stat
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
    """GELU's tanh approximation by 1 + tanh z = 2 sigmoid(2 z): the same up to rounding, and on a
    CPU generated code computes exp several times faster than tanh."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def has_compiler() -> bool:
    """For the code that is generated: all of it on a CPU, what starts the kernels on a GPU."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


def what_to_compile(
    wanted: Literal["auto", "off", "blocks", "model"], device: str, architecture: str = "dit"
) -> What:
    """Raises ConfigError where it is wanted and there is no compiler."""
    if wanted == "auto":
        return (
            ("blocks" if architecture == "dit" else "model")
            if device == "cuda" and has_compiler()
            else "off"
        )
    if wanted != "off" and not has_compiler():
        raise ConfigError(
            "compiling needs a C++ compiler, and $CXX, by default g++, is not found on PATH; "
            f"install it, or train without it: --train.compile off (now {wanted})"
        )
    return wanted


def use_private_cache(env: MutableMapping[str, str] = os.environ) -> None:
    """Have torch.compile and Triton cache in a folder that this user alone can write, unless `env`
    names one.

    What lies in such a cache is run. torch's own default, /tmp/torchinductor_USER, can be made by
    anybody before us. A folder for each kind of CPU: a home directory is shared by machines, and
    code is generated for the one it runs on.
    """
    usual = (
        Path(tempfile.gettempdir()) / "torchinductor_"
    )  # set by torch itself, when parts of it are imported
    if not env.get("TORCHINDUCTOR_CACHE_DIR", str(usual)).startswith(str(usual)):
        return
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
    """Make the folder; whether it is ours, writable, and closed to all others."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        closed = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        return closed and found.st_uid == os.geteuid() and os.access(folder, os.W_OK)
    return False


def _cpu_kind() -> str:
    """A short name that machines with the same instruction set share."""
    kind = os.uname().machine
    with contextlib.suppress(OSError):
        kind += "".join(
            re.findall(r"(?m)^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text())[:1]
        )
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


class Compiled:
    """A model that is trained, compiled in place when it is first called."""

    def __init__(self, model: nn.Module, what: What, device: str):
        self.what = what
        if what == "off":
            return
        use_private_cache()
        for block in model.blocks if isinstance(model, DiT) else ():
            assert isinstance(block, Block)
            if device == "cpu":
                block.mlp.act = Gelu()
            if what == "blocks":  # compiled once for all, as they are alike
                block.compile(dynamic=False)
        if what == "model":
            model.compile(dynamic=False)

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """Here nothing runs compiled: other shapes, once in a while, are not worth compiling."""
        return (
            contextlib.nullcontext()
            if self.what == "off"
            else torch.compiler.set_stance("force_eager")
        )


def failure(error: BaseException) -> str | None:
    """What it says, and why, if torch.compile raised it."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    # "backend='inductor' raised:", and on the next line the reason
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"torch.compile failed ({type(error).__name__}: {' '.join(lines[:2])})"
