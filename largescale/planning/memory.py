"""The memory that a rank needs, computed from shapes: nothing is allocated."""

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from largescale.config.deepspeed import precision
from largescale.config.derived import batch_layout, divisors
from largescale.config.schema import Config, ModelConfig
from largescale.host.launch import local_world_size
from largescale.host.machine import PROCESS_BYTES, launcher_bytes, memory_bound, warn_of_memory
from largescale.models.build import blank_condition, build_model, latent_shape
from largescale.models.dit import attention_by_products
from largescale.models.half_precision import DTYPES

# The part of which only the touched pages count on a CPU: see `check_memory`.
_BUCKETS = "buckets of gradients on their way"
# DeepSpeed's default of reduce_bucket_size
_DEFAULT_BUCKET = 500_000_000


class _AttentionOf(TorchFunctionMode):
    """Attention that keeps for the backward pass what the device's kernel keeps. On the meta device
    torch would choose another kernel."""

    def __init__(self, fused: bool):
        super().__init__()
        self._fused = fused

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            if not self._fused and not kwargs:
                return attention_by_products(*args)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        return function(*args, **kwargs)


@functools.cache
def _kept_for_backward(
    config: ModelConfig,
    dtype: torch.dtype,
    fused_attention: bool,
) -> tuple[int, list[int], list[int]]:
    """Bytes that autograd keeps of one image's forward pass, counted on the meta device: in all, by
    each block, and of each block's input, which it is the first to keep."""
    kept: dict[int, int] = {}  # storage -> bytes, as several views may be kept of one
    before: list[int] = []
    of_blocks: list[int] = []
    inputs: list[int] = []
    # A storage that is freed could return under the same address, and would count once.
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def enter(_: Any, given: Any) -> None:
        inputs.append(given[0].untyped_storage().nbytes())
        alive.append(given[0])
        before.append(sum(kept.values()))

    def leave(*_: Any) -> None:
        of_blocks.append(sum(kept.values()) - before[-1])

    with torch.device("meta"), _AttentionOf(fused_attention):
        model = build_model(config).to(dtype)
        for block in model.blocks:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        x = torch.empty(1, *latent_shape(config))
        t = torch.zeros(1, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x, t, blank_condition(config, 1))  # holds the graph, and so all storages
    del output
    return sum(kept.values()), of_blocks, inputs


def activation_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    fused_attention: bool = True,
) -> int:
    """Bytes of activations per image, for weights of `dtype`."""
    in_all, of_blocks, inputs = _kept_for_backward(config, dtype, fused_attention)
    if not checkpointing:
        return in_all
    # With checkpointing: each block's input, and all of the largest block, as one block at a time
    # is computed again.
    largest, its_input = max(zip(of_blocks, inputs, strict=True))
    return in_all - sum(of_blocks) + sum(inputs) + largest - its_input


def memory(
    config: Config, ds: dict[str, Any], world_size: int, micro_batch_size: int
) -> dict[str, float]:
    """Bytes per rank under ZeRO-2, by what they hold. An estimate: kernels' workspaces and
    fragmentation come on top, and torch.compile keeps less than is counted here."""
    dtype = DTYPES[precision(ds)]
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # models/dit.py: attention in bfloat16 on a CPU is by matrix products.
    fused = config.train.device == "cuda" or dtype != torch.bfloat16
    checkpointing = config.train.activation_checkpointing
    per_image = activation_bytes(
        config.model, dtype, checkpointing=checkpointing, fused_attention=fused
    )
    activations = f"activations of {micro_batch_size} images"
    if checkpointing:
        activations += ", checkpointed"
    widths = len(config.optimizer.ema_widths)
    states = 4 * (4 + widths) * parameters / world_size
    averages = f"EMA and {widths} more averages" if widths else "EMA"
    return {
        "weights": parameters * dtype.itemsize,
        "gradients (this rank's part in fp32)": 4 * parameters / world_size,
        _BUCKETS: _bucket_bytes(ds, parameters) if world_size > 1 else 0,
        f"master weights, two moments, {averages} (fp32, this rank's part)": states,
        activations: micro_batch_size * per_image,
    }


def _bucket_bytes(ds: dict[str, Any], parameters: int) -> int:
    """Bytes of the buckets in which gradients are reduced."""
    dtype = DTYPES[precision(ds)]
    sent = DTYPES[ds.get("communication_data_type", precision(ds))]
    zero = ds["zero_optimization"]

    # Each bucket is allocated completely, whatever the model's size.
    bucket: int = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    total = (2 if zero.get("overlap_comm") else 1) * bucket * dtype.itemsize
    # One is flattened to be sent, and cast where it is sent in another type.
    in_flight = dtype.itemsize + (sent.itemsize if sent != dtype else 0)
    return total + min(bucket, parameters) * in_flight


def largest_micro_batch(
    config: Config, ds: dict[str, Any], world_size: int, memory_bytes: float
) -> int:
    """Images of the largest equal part of a rank's share of the batch that fits by the estimate; 0
    where none does."""
    # Memory is linear in the images, so two points give it for any number.
    none = sum(memory(config, ds, world_size, 0).values())
    one = sum(memory(config, ds, world_size, 1).values())
    room = (memory_bytes - none) / (one - none)
    share = config.train.global_batch_size // world_size
    fitting = [n for n in divisors(share) if n <= room]
    return max(fitting, default=0)


def check_memory(config: Config, ds: dict[str, Any], world_size: int) -> None:
    """Warns, once on a machine, where its ranks, on CPUs, need more memory than the kernel will
    give them."""
    bound = memory_bound()
    if config.train.device != "cpu" or bound is None:
        return

    # "auto" finds a size that fits, so that only the smallest could be too large.
    micro = 1
    if config.train.micro_batch_size != "auto":
        micro, _ = batch_layout(config, world_size)
    parts = memory(config, ds, world_size, micro)
    # Of the buckets' pages only those are taken that gradients are written to.
    if _BUCKETS in parts:
        parts[_BUCKETS] = min(parts[_BUCKETS], 4 * parts["weights"])
    each = PROCESS_BYTES + int(sum(parts.values()))
    warn_of_memory(launcher_bytes() + local_world_size(os.environ) * each, bound)
