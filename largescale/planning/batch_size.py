"""Whether a run fits into memory: a number for train.micro_batch_size=auto, and the remedies when
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
from largescale.config.derived import batch_layout, divisors
from largescale.config.schema import Config
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks
from largescale.errors import ConfigError, DeviceError, LargescaleError
from largescale.host.launch import local_world_size
from largescale.host.machine import available_bytes
from largescale.models.build import (
    Network,
    blank_condition,
    build_model,
    latent_shape,
    set_up_blocks,
)
from largescale.models.compile import Compiled, what_to_compile
from largescale.planning.memory import largest_micro_batch, memory

# The share of a device's memory that is left to fragmentation.
MARGIN = 0.05
# Memory left to the buffers of NCCL's communicators, outside torch's allocator: half a GiB each.
NCCL_BYTES = 3 * 2**29

_MORE_RANKS = "start more ranks, which share the optimizer's state"
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_micro_batch_size(
    config: Config, ds: dict[str, Any], ranks: Ranks, log: Callable[[str], None]
) -> Config:
    """`config` with a number for "auto": the largest divisor of a rank's share of the global batch
    for which every rank has memory. Collective. Raises ConfigError where not even one image
    fits."""
    if config.train.micro_batch_size != "auto":
        return config
    share, _ = batch_layout(config, ranks.world_size)
    candidates = divisors(share)[::-1]

    def find_on_this_rank() -> tuple[int, int]:
        if ranks.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(ranks.device)
            return largest_by_trial(config, ds, ranks, candidates), free
        free = host_bytes()
        return largest_micro_batch(config, ds, ranks.world_size, (1 - MARGIN) * free), free

    # All ranks take the micro batch of the rank that has the least memory.
    found = ranks.all_gather_json(ranks.raise_on_all_ranks(find_on_this_rank))
    of_ranks = [micro for micro, _ in found]
    micro: int = min(of_ranks)
    if micro == 0:
        rank = of_ranks.index(0)
        raise _nothing_fits(config, ds, ranks.world_size, rank, free=found[rank][1])
    log(
        f"micro batch {micro} (auto): {share // micro} accumulation "
        f"step{'s' if share > micro else ''}"
    )
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def _nothing_fits(
    config: Config, ds: dict[str, Any], world_size: int, rank: int, free: int
) -> ConfigError:
    """The error for a rank that has no memory for one image, with what the memory is needed for."""
    parts = memory(config, ds, world_size, 1)
    listed = "; ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return ConfigError(
        f"train.micro_batch_size=auto: not even one image at a time fits on rank {rank}, which "
        f"has {gib(free)} of memory and needs about {gib(sum(parts.values()))}, and a "
        f"margin ({listed}); " + " or ".join([*_checkpointing(config), _MORE_RANKS])
    )


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- on a CPU: a trial that failed would be ended by the kernel, so the estimate decides


def host_bytes() -> int:
    """This rank's part of the memory that the machine has left."""
    available = available_bytes()
    if available is None:
        raise ConfigError(
            "train.micro_batch_size=auto: this system does not say how much memory is available; "
            "give a number to --train.micro-batch-size"
        )
    return available // local_world_size(os.environ)


# ---- on a GPU: trials of forward and backward passes, beside a block of memory as large as
# everything else that a rank holds


def largest_by_trial(
    config: Config, ds: dict[str, Any], ranks: Ranks, candidates: list[int]
) -> int:
    """The largest of `candidates` that this rank's GPU has memory for; 0 where none fits. Leaves
    the device's memory as it was."""
    # The trial has weights and activations itself; a block of memory stands for everything else.
    parts = memory(config, ds, ranks.world_size, 1)
    in_trial = ("weights", "activations")
    beside = sum(size for name, size in parts.items() if not name.startswith(in_trial))
    beside += MARGIN * torch.cuda.get_device_properties(ranks.device).total_memory
    if ranks.world_size > 1:
        beside += NCCL_BYTES
    try:
        return largest_that_runs(
            config, _TYPES[precision(ds)], ranks.device, int(beside), candidates
        )
    finally:
        _free_memory()
        # The log reports the peak of training, without this trial.
        torch.cuda.reset_peak_memory_stats(ranks.device)


def largest_that_runs(
    config: Config, dtype: torch.dtype, device: torch.device, beside: int, candidates: list[int]
) -> int:
    """The first of `candidates` that fits while `beside` bytes are taken; 0 where none does."""
    # On the meta device first, so that the float32 weights take no memory.
    objective = build_objective(config)
    with torch.device("meta"):
        model = build_model(config.model).to(dtype)
    set_up_blocks(model, config.train)
    try:
        reserved = torch.empty(beside, dtype=torch.uint8, device=device)
        model.to_empty(device=device)
    except torch.OutOfMemoryError:
        return 0

    # ZeRO-2 moves each gradient into its bucket, which is reserved, as soon as it is there.
    for p in model.parameters():
        p.detach().zero_()
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_drop_gradient)
    # Compiled as training will be: that keeps less than half of the activations.
    what = what_to_compile(config.train.compile, device.type, config.model.architecture)
    Compiled(model, what, device.type)
    try:
        for n in candidates:
            if step_fits(config, model, objective, device, n):
                return n
            _free_memory()
    finally:
        # torch compiles a block for a few sizes only, and training's would be one too many. Its
        # code comes from the cache on disk.
        if what != "off":
            torch.compiler.reset()
    del reserved
    return 0


def step_fits(
    config: Config, model: Network, objective: Objective, device: torch.device, n: int
) -> bool:
    """Whether there is memory for the forward and backward pass of n images."""
    try:
        with torch.device(device):
            x_start, noise = torch.zeros(2, n, *latent_shape(config.model))
            # Every noise level takes the same memory.
            t = objective.draw(torch.full((n,), 0.5, dtype=torch.float64))
            y = blank_condition(config.model, n)
        objective.training_losses(model, x_start, t, noise, y).loss.mean().backward()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _drop_gradient(p: Tensor) -> None:
    p.grad = None


def _free_memory() -> None:
    # An error and the frames that it passed hold each other, and the frames' tensors.
    gc.collect()
    torch.cuda.empty_cache()


# ---- while training


@contextlib.contextmanager
def explain_out_of_memory(
    config: Config, world_size: int, where: Callable[[], str]
) -> Iterator[None]:
    """Raises a DeviceError with remedies where memory runs out, of a GPU or because the host
    refuses it outright. `where`: what the run is doing."""
    try:
        yield
    except LargescaleError:
        raise  # one may quote another rank's error
    except RuntimeError as error:
        if not out_of_memory(error) and "DefaultCPUAllocator" not in str(error):
            raise
        micro, accumulation = batch_layout(config, world_size)
        # Without torch's own advice, which is about fragmentation.
        reason = str(error).partition(" If reserved")[0].partition("\n")[0].rstrip(".")
        raise DeviceError(
            f"out of memory in {where()}, with a micro batch of {micro}: {reason}; "
            + " or ".join(remedies(config, micro, micro * accumulation, where()))
        ) from error


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is that a GPU's memory ran out, also in the compiler, cuBLAS or NCCL."""
    # The compiler raises an error of its own, with the first as its cause.
    while error is not None:
        text = str(error)
        of_nccl = "NCCL" in text and "out of memory" in text
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text or of_nccl:
            return True
        error = error.__cause__
    return False


def remedies(config: Config, micro: int, share: int, where: str) -> list[str]:
    """What a user can do about memory that ran out, the easiest first. `share`: images of a rank's
    part of the global batch."""
    # Neither depends on the micro batch.
    if where.startswith("start-up"):
        return [_MORE_RANKS]
    if where.startswith("preview"):
        return [
            "set --telemetry.preview-every 0, and draw samples from checkpoints with eval.sample"
        ]
    found = [*_checkpointing(config), _MORE_RANKS]
    smaller = [n for n in divisors(share) if n < micro]
    if smaller:
        flag = f"--train.micro-batch-size {smaller[-1]}"
        found.insert(0, f"set {flag} (or auto, which finds one)")
    return found


def _checkpointing(config: Config) -> list[str]:
    return [] if config.train.activation_checkpointing else ["set --train.activation-checkpointing"]
