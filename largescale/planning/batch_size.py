"""Whether a run fits into memory: a number for train.micro_batch_size=auto, and what to say when
memory runs out."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from largescale.config.deepspeed import precision
from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks
from largescale.errors import ConfigError, DeviceError, LargescaleError
from largescale.host.launch import local_world_size
from largescale.host.machine import available_bytes
from largescale.models.build import Network, blank_condition, build_model, latent_shape
from largescale.planning.memory import largest_micro_batch, memory

MARGIN = 0.05  # of a device's memory, left to fragmentation
NCCL_BYTES = 2**30  # and to the buffers of NCCL's communicators, outside torch's allocator
_MORE_RANKS = "start more ranks, which share the optimizer's state"
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_micro_batch_size(
    config: Config, ds: dict[str, Any], ranks: Ranks, say: Callable[[str], None]
) -> Config:
    """`config` with a number for "auto": the largest divisor of a rank's share of the global batch
    for which every rank has memory. Collective. Raises ConfigError where not even one image
    fits."""
    if config.train.micro_batch_size != "auto":
        return config
    share, _ = batch_layout(config, ranks.world_size)
    candidates = [n for n in range(share, 0, -1) if share % n == 0]

    def look() -> tuple[int, int]:
        if ranks.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(ranks.device)
            return largest_by_trial(config, ds, ranks, candidates), free
        free = host_bytes()
        return largest_micro_batch(config, ds, ranks.world_size, (1 - MARGIN) * free), free

    found = ranks.all_gather_json(ranks.raise_on_all_ranks(look))
    micro = min(micro for micro, _ in found)
    if micro == 0:
        rank = next(rank for rank, (micro, _) in enumerate(found) if micro == 0)
        parts = memory(config, ds, ranks.world_size, 1)
        listed = "; ".join(f"{name} {gib(size)}" for name, size in parts.items())
        raise ConfigError(
            f"train.micro_batch_size=auto: not even one image at a time fits on rank {rank}, which "
            f"has {gib(found[rank][1])} of memory and needs about {gib(sum(parts.values()))}, and a "
            f"margin ({listed}); " + " or ".join([*_checkpointing(config), _MORE_RANKS])
        )
    say(
        f"micro batch {micro} (auto): {share // micro} accumulation "
        f"step{'s' if share > micro else ''}"
    )
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- on a CPU: a trial that failed would be ended by the kernel, so the estimate decides


def host_bytes() -> int:
    """This rank's part of what the machine can still give."""
    available = available_bytes()
    if available is None:
        raise ConfigError(
            "train.micro_batch_size=auto: this system does not say how much memory is available; "
            "give a number to --train.micro-batch-size"
        )
    return available // local_world_size(os.environ)


# ---- on a GPU: forward and backward passes, beside a block of memory as large as all else that a
# rank holds


def largest_by_trial(
    config: Config, ds: dict[str, Any], ranks: Ranks, candidates: list[int]
) -> int:
    """0 where none fits. Leaves the device's memory as it was."""
    parts = memory(config, ds, ranks.world_size, 1)
    beside = sum(
        size for name, size in parts.items() if not name.startswith(("weights", "activations"))
    )
    beside += MARGIN * torch.cuda.get_device_properties(ranks.device).total_memory
    if ranks.world_size > 1:
        beside += NCCL_BYTES
    try:
        return largest_that_runs(
            config, _TYPES[precision(ds)], ranks.device, int(beside), candidates
        )
    finally:
        _let_go()
        torch.cuda.reset_peak_memory_stats(ranks.device)  # the log tells the peak of training


def largest_that_runs(
    config: Config, dtype: torch.dtype, device: torch.device, beside: int, candidates: list[int]
) -> int:
    """The first of `candidates` that passes with `beside` bytes taken; 0 for none."""
    objective = build_objective(config)
    with torch.device("meta"):
        model = build_model(config.model).to(dtype)
    model.checkpoint_blocks = config.train.activation_checkpointing
    try:
        reserved = torch.empty(beside, dtype=torch.uint8, device=device)
        model.to_empty(device=device)
    except torch.OutOfMemoryError:
        return 0
    for p in model.parameters():
        p.detach().zero_()
        if (
            p.requires_grad
        ):  # ZeRO-2 moves each gradient into its bucket, which is reserved, as soon as it is there
            p.register_post_accumulate_grad_hook(_drop_gradient)
    for n in candidates:
        if step_fits(config, model, objective, device, n):
            return n
        _let_go()
    del reserved
    return 0


def step_fits(
    config: Config, model: Network, objective: Objective, device: torch.device, n: int
) -> bool:
    """Whether there is memory for n images."""
    try:
        with torch.device(device):
            x_start, noise = torch.zeros(2, n, *latent_shape(config.model))
            t, y = (
                objective.draw(torch.full((n,), 0.5, dtype=torch.float64)),
                blank_condition(config.model, n),
            )
        objective.training_losses(model, x_start, t, noise, y).loss.mean().backward()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _drop_gradient(p: Tensor) -> None:
    p.grad = None


def _let_go() -> None:
    gc.collect()  # an error and the frames that it passed hold each other
    torch.cuda.empty_cache()


# ---- while training


@contextlib.contextmanager
def explain_out_of_memory(
    config: Config, world_size: int, where: Callable[[], str]
) -> Iterator[None]:
    """Memory that runs out, of a GPU or because the host refuses it outright, becomes a
    DeviceError. `where`: what the run is doing."""
    try:
        yield
    except LargescaleError:
        raise  # one may quote another rank's error
    except RuntimeError as error:
        if not out_of_memory(error) and "DefaultCPUAllocator" not in str(error):
            raise
        micro, accumulation = batch_layout(config, world_size)
        words = str(error).partition(" If reserved")[0].partition("\n")[0].rstrip(".")
        raise DeviceError(
            f"out of memory in {where()}, with a micro batch of {micro}: {words}; "
            + " or ".join(remedies(config, micro, micro * accumulation, where()))
        ) from error


def out_of_memory(error: BaseException | None) -> bool:
    """Of the GPU; also where the compiler or cuBLAS met it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__
    return False


def remedies(config: Config, micro: int, share: int, where: str) -> list[str]:
    if where.startswith("start-up"):
        return [_MORE_RANKS]
    if where.startswith("preview"):
        return [
            "set --telemetry.preview-every 0, and draw samples from checkpoints with eval.sample"
        ]
    less = max((n for n in range(1, micro) if share % n == 0), default=0)
    smaller = [f"set --train.micro-batch-size {less} (or auto, which finds one)"] if less else []
    return [*smaller, *_checkpointing(config), _MORE_RANKS]


def _checkpointing(config: Config) -> list[str]:
    return [] if config.train.activation_checkpointing else ["set --train.activation-checkpointing"]
