"""Where a training step makes the host wait for the GPU, and why that may be; and what finds it on a CPU.

Operations that would wait on a GPU are caught on their way to the CPU's kernels, with the function of ours or DeepSpeed's
that asked for them; DeepSpeed is told that its device is not synchronous, so that it does what it does on a GPU.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from largescale.distributed.ranks import Ranks

Place = tuple[str, str, str]  # file, function, what it does
Step = Counter[Place]

# Of ours and of DeepSpeed, wherever that is installed.
FOLDERS = [str(Path(__file__).parents[1] / "largescale"), *(find_spec("deepspeed").submodule_search_locations or ())]  # type: ignore[union-attr]

STAGE_2 = "deepspeed/runtime/zero/stage_1_and_2.py"
UTILS = "deepspeed/runtime/utils.py"

# With DeepSpeed 0.19.8. Only a step's first takes time, for it waits for the backward pass.
WAITS: dict[Place, str] = {
    (STAGE_2, "independent_gradient_partition_epilogue", "synchronize"):
        "several ranks: after each backward pass, for the stream on which gradients are summed (overlap_comm)",
    ("largescale/engine/deepspeed_patches.py", "_global_norm", "cpu"): "is the gradient's norm finite, and so the step applied?",
}
# What looks like a wait where there is no GPU.
NO_WAITS: dict[Place, str] = {
    ("largescale/distributed/ranks.py", "read", "tolist"):
        "on a GPU this reads a copy in pinned memory, once the event after that copy is there; see PendingVector",
    (UTILS, "is_invalid_grad_norm", "_local_scalar_dense"): "the norm is on the host by then",
}
NO_WAITS_OF_THE_LOG: dict[Place, str] = {
    ("largescale/engine/deepspeed_engine.py", "grad_norm", "_local_scalar_dense"): "the same norm",
}

# Operations whose CUDA kernels hand a number, or a number of elements, to the host.
WAITING = {
    "_local_scalar_dense",  # item(), float(), bool(), `if tensor`
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount",
}
WAITING_FOR_A_TENSOR = {("masked_fill", "Tensor"), ("masked_fill_", "Tensor"), ("repeat_interleave", "Tensor")}


def here() -> tuple[str, str]:
    """File and function of the innermost frame that is ours or DeepSpeed's; not its thin layer over torch.cuda, which a
    CPU's does not have."""
    frame = sys._getframe(1)
    while frame.f_back:
        path = frame.f_code.co_filename
        for root in FOLDERS:
            if f"{root}/" in path and "deepspeed/accelerator/" not in path:
                return Path(root).name + path.partition(root)[2], frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere", ""


class Functions(TorchFunctionMode):
    """What never reaches the dispatcher where everything is on one device."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self._note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.record_stream:
            return None  # takes no Device
        if function in (torch.tensor, torch.as_tensor):
            self._note("tensor")  # from Python's values: copied from memory that is not pinned
        elif function in (Tensor.tolist, Tensor.cpu, Tensor.numpy):
            self._note(function.__name__)
        elif function is Tensor.to and not kwargs.get("non_blocking") and any(
            isinstance(arg, str | torch.device | Tensor) for arg in (*args[1:], kwargs.get("device"))
        ):
            self._note("to")
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = function.overloadpacket.__name__, function._overloadname
        if name in WAITING or (name, overload) in WAITING_FOR_A_TENSOR:
            self._note(name)
        elif name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._note(name)  # nonzero, inside
        return function(*args, **(kwargs or {}))


class Device:
    """Stands for a stream or an event of a device that the host does not wait for."""

    def __init__(self, note: Callable[[str], None]):
        self._note = note

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self._note(name) if name == "synchronize" else None


def watch(patch: Callable[[Any, str, Any], None], first: int) -> list[Step]:
    """Of runs in this process on the CPU: the waits of each step after `first` but the last, which logs; the list fills
    as they run. `patch`: setattr, or that of a test that undoes it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    from largescale.training.trainer import Trainer

    steps: list[Step] = []
    step: Step = Counter()

    def note(operation: str) -> None:
        step[*here(), operation] += 1

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            note(function.__name__)
            return function(*args, **kwargs)

        return noted

    accelerator = type(get_accelerator())
    patch(accelerator, "is_synchronized_device", lambda self: False)
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        patch(accelerator, name, lambda self, *index: Device(note))
    patch(accelerator, "synchronize", lambda self, *index: note("synchronize"))
    patch(torch.cuda, "synchronize", lambda *device: note("synchronize"))
    for name in ("barrier", "all_gather_object", "broadcast_object_list"):
        patch(torch.distributed, name, noting(getattr(torch.distributed, name)))
    patch(Ranks, "all_gather_bytes", noting(Ranks.all_gather_bytes))
    take_step = Trainer.take_step

    def watched(self: Trainer, loader: Any) -> bool:
        if not first <= self.state.step < self.config.train.steps - 1:
            return take_step(self, loader)
        step.clear()
        with Operations(note), Functions(note):
            stop = take_step(self, loader)
        steps.append(step.copy())
        return stop

    patch(Trainer, "take_step", watched)
    return steps


def waits(step: Step) -> Step:
    return Counter({place: times for place, times in step.items() if place not in NO_WAITS | NO_WAITS_OF_THE_LOG})


def expected(micro_steps: int = 1, ranks: int = 1) -> Step:
    """How often a step waits, and where."""
    times: Step = Counter(dict.fromkeys(WAITS, 1))
    times[STAGE_2, "independent_gradient_partition_epilogue", "synchronize"] = micro_steps * (ranks > 1)
    return +times
