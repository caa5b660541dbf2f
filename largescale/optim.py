"""AdamW that carries the EMA of the weights it updates.

Under ZeRO-2 the optimizer's parameter is this rank's flat fp32 partition of the master weights, so the EMA in its state
is sharded, in fp32, and saved and restored with the moments.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from largescale.config import OptimizerConfig
from largescale.errors import ConfigError


def carrying_ema(base: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A subclass of `base` whose `step()` also updates `state[p]["ema"]`:
    ema <- decay * ema + (1 - decay) * p, with ema = p before the first update, as in DiT."""

    class WithEMA(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *, ema_decay: float, **kwargs: Any):
            super().__init__(params, **kwargs)
            for group in self.param_groups:
                group["ema_decay"] = ema_decay

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            # Cloned before the update; entered after it, since the base fills a state only where it is empty.
            first = {p: p.detach().clone() for g in self.param_groups for p in g["params"] if not self.state[p]}
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "ema" not in state:
                        state["ema"] = first[p]
                    state["ema"].lerp_(p, 1 - group["ema_decay"])
            return result

    WithEMA.__name__ = f"{base.__name__}WithEMA"
    return WithEMA


def check_apex(wanted: bool) -> None:
    """Tell NVIDIA's apex from PyPI's unrelated package of that name, which breaks imports of the real one.

    Raises ConfigError if apex is `wanted` and not NVIDIA's, or if PyPI's is installed at all.
    """
    try:
        installed = importlib.metadata.distribution("apex")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    build = "build NVIDIA's from source: https://github.com/NVIDIA/apex#from-source"
    # NVIDIA's is never on PyPI; PyPI's is a web authentication toolkit without this module.
    files = [str(path) for path in installed.files or []] if installed else []
    if installed and files and not any("optimizers" in file for file in files):
        raise ConfigError(
            f"the installed package 'apex' {installed.version} is PyPI's, a web toolkit and not NVIDIA's apex; "
            f"run pip uninstall apex" + (f", then {build}" if wanted else "")
        )
    if wanted and installed is None:
        raise ConfigError(f"optimizer.kernel=apex, but apex is not installed; {build}, or --optimizer.kernel torch")


def build_optimizer(params: Any, config: OptimizerConfig, device: str) -> torch.optim.Optimizer:
    hyper = {
        "lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay,
        "ema_decay": config.ema_decay,
    }
    if config.kernel == "apex":
        from apex.optimizers import FusedAdam  # adam_w_mode is its default

        return carrying_ema(FusedAdam)(params, **hyper)
    return carrying_ema(torch.optim.AdamW)(params, fused=device == "cuda", **hyper)
