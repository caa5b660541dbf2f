"""AdamW, of one of three libraries or our own, that also keeps the EMA of the weights it updates.

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
from largescale.engine.power_averages import update_averages
from largescale.errors import ConfigError

Kernel = Literal["torch", "deepspeed", "apex", "fused"]


def carrying_ema(
    base: type[torch.optim.Optimizer],
    counts_in: Kernel = "torch",
) -> Callable[..., torch.optim.Optimizer]:
    """A subclass of `base` whose `step()` also updates `state[p]["ema"]`:
    ema <- decay * ema + (1 - decay) * p, with ema = p before the first update, as in DiT; and in the
    same way the averages that the group's "power_ema_decays" names, with their decays.

    `counts_in`: the library in whose way it counts steps; moments are the same in all of them.
    """

    class WithEMA(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *, ema_decay: float, **kwargs: Any):
            super().__init__(params, **kwargs)
            for group in self.param_groups:
                group["ema_decay"] = ema_decay
                group["power_ema_decays"] = {}

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            # Cloned before the update; stored after it, since the base fills a state only where it
            # is empty.
            first: dict[Tensor, Tensor] = {}
            for group in self.param_groups:
                for p in group["params"]:
                    if not self.state[p]:
                        first[p] = p.detach().clone()
            result = super().step(closure)

            # lerp_ by 1 - decay is the equation above, in one pass.
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "ema" not in state:
                        state["ema"] = first[p]
                    state["ema"].lerp_(p, 1 - group["ema_decay"])
                    update_averages(state, p, group["power_ema_decays"])
            return result

        def set_steps(self, steps: int) -> None:
            """Set how many updates the state, which is not empty, has seen."""
            for group in self.param_groups:
                if counts_in == "apex":
                    group["step"] = steps
                    continue
                for p in group["params"]:
                    # A fused kernel of torch needs a tensor on its device.
                    as_tensor = torch.tensor(float(steps), device=p.device)
                    self.state[p]["step"] = steps if counts_in == "deepspeed" else as_tensor

    WithEMA.__name__ = f"{base.__name__}WithEMA"
    return WithEMA


def check_apex(wanted: bool) -> None:
    """Check that the installed apex is NVIDIA's, and not PyPI's unrelated package of that name,
    which breaks imports of the real one.

    Raises ConfigError if apex is `wanted` and not NVIDIA's, or if PyPI's is installed at all.
    """
    build = "build NVIDIA's from source: https://github.com/NVIDIA/apex#from-source"
    try:
        installed = importlib.metadata.distribution("apex")
    except importlib.metadata.PackageNotFoundError:
        if not wanted:
            return
        raise ConfigError(
            f"optimizer.kernel=apex, but apex is not installed; {build}, or --optimizer.kernel "
            "torch"
        ) from None

    # NVIDIA's is never on PyPI; PyPI's is a web authentication toolkit without this module.
    files = "\n".join(map(str, installed.files or []))
    if files and "optimizers" not in files:
        then = f", then {build}" if wanted else ""
        raise ConfigError(
            f"the installed package 'apex' {installed.version} is PyPI's, a web toolkit and not "
            f"NVIDIA's apex; run pip uninstall apex{then}"
        )


def steps_of(state: dict[str, Any], group: dict[str, Any]) -> int:
    """How many updates a parameter's saved state has seen, whichever kernel made it."""
    # torch and DeepSpeed count in the state, apex in the group.
    steps = state.get("step", group.get("step", 0))
    return int(steps.item() if isinstance(steps, Tensor) else steps)


def choose_kernel(config: OptimizerConfig, device: str) -> Kernel:
    """The library whose AdamW is used: what `auto` stands for on this machine. Raises ConfigError
    for an apex that is not installed, or not NVIDIA's."""
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
    """AdamW with EMA, of the kernel that is configured. `deepspeed_adam` makes DeepSpeed's AdamW
    for this device, and is called only where that is wanted."""
    hyper: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "ema_decay": config.ema_decay,
    }
    kernel = choose_kernel(config, device)
    if kernel == "torch":
        return carrying_ema(torch.optim.AdamW)(params, fused=True, **hyper)
    if kernel == "fused":
        # Triton, which it needs, is not everywhere.
        try:
            from largescale.engine.fused_adamw import FusedAdamW
        except ImportError as error:
            raise ConfigError(
                f"optimizer.kernel=fused needs Triton, which is not installed here ({error}); train "
                "with --optimizer.kernel torch"
            ) from error
        return FusedAdamW(params, **hyper)
    if kernel == "deepspeed":
        # It is compiled here, by whatever compiler is found. Its default is AdamW.
        try:
            return carrying_ema(deepspeed_adam(), kernel)(params, **hyper)
        except Exception as error:
            raise ConfigError(
                f"optimizer.kernel=deepspeed, but DeepSpeed cannot build it here ({error}); it "
                "needs a C++ compiler and ninja, on a GPU also nvcc of torch's own CUDA version "
                "(DS_SKIP_CUDA_CHECK=1 takes a near one); or --optimizer.kernel torch"
            ) from error
    # Its default is AdamW too: adam_w_mode.
    from apex.optimizers import FusedAdam

    return carrying_ema(FusedAdam, kernel)(params, **hyper)
