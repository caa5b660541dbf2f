"""AdamW, of one of three libraries, that carries the EMA of the weights it updates.

Under ZeRO-2 the optimizer's parameter is this rank's flat fp32 partition of the master weights, so
the EMA in its state is sharded, in fp32, and saved and restored with the moments.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from largescale.config.schema import OptimizerConfig
from largescale.errors import ConfigError

Kernel = Literal["torch", "deepspeed", "apex"]


def carrying_ema(
    base: type[torch.optim.Optimizer],
    counts_in: Kernel = "torch",
) -> Callable[..., torch.optim.Optimizer]:
    """A subclass of `base` whose `step()` also updates `state[p]["ema"]`:
    ema <- decay * ema + (1 - decay) * p, with ema = p before the first update, as in DiT.

    `counts_in`: whose way of counting steps it has; moments are alike in all of them."""

    class WithEMA(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *, ema_decay: float, **kwargs: Any):
            super().__init__(params, **kwargs)
            for group in self.param_groups:
                group["ema_decay"] = ema_decay

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            # Cloned before the update; entered after it, since the base fills a state only where it
            # is empty.
            first = {
                p: p.detach().clone()
                for g in self.param_groups
                for p in g["params"]
                if not self.state[p]
            }
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "ema" not in state:
                        state["ema"] = first[p]
                    state["ema"].lerp_(p, 1 - group["ema_decay"])
            return result

        def set_steps(self, steps: int) -> None:
            """Say how many updates the state, which is not empty, has seen."""
            for group in self.param_groups:
                if counts_in == "apex":
                    group["step"] = steps
                    continue
                for p in group["params"]:
                    as_tensor = torch.tensor(
                        float(steps), device=p.device
                    )  # where a fused kernel wants it
                    self.state[p]["step"] = steps if counts_in == "deepspeed" else as_tensor

    WithEMA.__name__ = f"{base.__name__}WithEMA"
    return WithEMA


def check_apex(wanted: bool) -> None:
    """Tell NVIDIA's apex from PyPI's unrelated package of that name, which breaks imports of the
    real one.

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
            f"the installed package 'apex' {installed.version} is PyPI's, a web toolkit and not "
            "NVIDIA's apex; run pip uninstall apex" + (f", then {build}" if wanted else "")
        )
    if wanted and installed is None:
        raise ConfigError(
            f"optimizer.kernel=apex, but apex is not installed; {build}, or --optimizer.kernel "
            "torch"
        )


def steps_of(state: dict[str, Any], group: dict[str, Any]) -> int:
    """How many updates a parameter's saved state has seen, whichever kernel made it."""
    steps = state.get("step", group.get("step", 0))
    return int(steps.item() if isinstance(steps, Tensor) else steps)


def choose_kernel(config: OptimizerConfig, device: str) -> Kernel:
    """What `auto` stands for on this machine. Raises ConfigError for an apex that is not there, or
    not NVIDIA's."""
    check_apex(wanted=config.kernel == "apex")
    if config.kernel != "auto":
        return config.kernel
    # NVIDIA's, built with its CUDA extensions; without these its FusedAdam cannot be made.
    return "apex" if device == "cuda" and importlib.util.find_spec("amp_C") else "torch"


def build_optimizer(
    params: Any,
    config: OptimizerConfig,
    device: str,
    deepspeed_adam: Callable[[], type[torch.optim.Optimizer]],
) -> torch.optim.Optimizer:
    """`deepspeed_adam`: its AdamW for this device; asked for only where it is wanted."""
    hyper = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "ema_decay": config.ema_decay,
    }
    kernel = choose_kernel(config, device)
    if kernel == "torch":
        return carrying_ema(torch.optim.AdamW)(params, fused=True, **hyper)
    if kernel == "deepspeed":
        try:
            return carrying_ema(deepspeed_adam(), kernel)(params, **hyper)  # AdamW is its default
        except Exception as error:  # whatever a compiler or linker says
            raise ConfigError(
                f"optimizer.kernel=deepspeed, but DeepSpeed cannot build it here ({error}); it "
                "needs a C++ compiler and ninja, on a GPU nvcc too; or --optimizer.kernel torch"
            ) from error
    from apex.optimizers import FusedAdam  # adam_w_mode is its default

    return carrying_ema(FusedAdam, kernel)(params, **hyper)
