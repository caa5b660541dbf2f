"""What a step, a checkpoint and a run cost on n GPUs: arithmetic on data sheets and on the bytes
that compiled code moves, to be checked by measuring.

What DeepSpeed 0.19.8 does in stage 2 (runtime/zero/stage_1_and_2.py), which decides the bytes:

- Gradients are reduced at every micro step, not once a step
  (`reduce_ready_partitions_and_remove_grads`).
- `reduce_scatter: true` reduces each bucket by an all-reduce, whose result each rank keeps a part
  of (`average_tensor` with `use_multi_rank_bucket_allreduce`, its default): twice the bytes of a
  reduce-scatter.
- With `overlap_comm` the backward pass waits, when a bucket is full, for the one before; the last
  is waited for at the end of each micro step (`independent_gradient_partition_epilogue`
  synchronises).
- The weights are gathered in one message after the update, before the next forward pass
  (`all_gather_dp_groups`).

Left out: the latency of collectives, the host's time in DeepSpeed's hooks, other jobs on the
network, stragglers, what reduction takes from the kernels that run beside it, evaluation and
previews.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from largescale.planning.hardware import (
    ATTENTION_SHARE,
    GAP_S,
    GELU_PRODUCT_SHARE,
    PRODUCT_SHARE,
    Hardware,
)

# Model FLOP utilisations that trainers of this kind report.
PUBLISHED_MFU = (0.25, 0.12)
# Of forward and backward, where nothing is counted that could predict it.
ASSUMED_MFU = 0.5

# Bytes of each parameter: fp32 master weights, two moments and EMA.
STATE_BYTES = 16


@dataclass(frozen=True)
class BlockCode:
    """What the kernels of a DiT's block move beside its matrix products and attention, in half
    precision with the residual stream in fp32: bytes per element of that stream (images x tokens x
    width)."""

    forward_bytes: float
    backward_bytes: float
    kernels: int
    """All that are launched, forward and backward."""
    gelu_products: float = 0.0
    """The share of a pass's matrix products that compute GELU too, in a slower kernel."""


# By train.kernels (eager: train.compile=off), without captions and with: of DiT-L/2 with 32 images
# on an H100, from the code that Inductor writes, as `benchmarks/roofline.py` counts it, or from
# PyTorch's operations. Fewer images take up to a tenth more, for sums in two passes.
BLOCK_CODE = {
    ("inductor", False): BlockCode(42.2, 108.9, 39),
    ("inductor", True): BlockCode(58.2, 128.7, 59),
    ("fused", False): BlockCode(24.1, 49.8, 39, gelu_products=0.333),
    ("fused", True): BlockCode(36.1, 74.1, 60, gelu_products=0.274),
    ("eager", False): BlockCode(128.3, 242.6, 70),
    ("eager", True): BlockCode(160.3, 290.4, 95),
}


@dataclass(frozen=True)
class Blocks:
    """The work of a DiT's blocks for one image, from which the time on a GPU is predicted."""

    product_flops: float
    """Of the forward pass: matrix products but those of attention."""
    attention_flops: float
    other_flops: float
    """Of the forward pass outside of the blocks, which is computed in fp32."""
    elements: float
    """Of the residual stream, times the number of blocks."""
    code: BlockCode


@dataclass(frozen=True)
class Workload:
    """The work of a step, independent of the hardware."""

    parameters: int
    """Trainable parameters."""
    flops_per_image: float
    """Operations of forward and backward pass: 3 times those of the forward pass."""
    kernels: float
    """Kernels launched by the forward and backward pass of a micro step."""
    global_batch_size: int
    grad_accum_steps: int
    weight_bytes: int
    """Bytes of one weight: 2 in half precision."""
    reduce_bytes: int
    """Bytes of one gradient that is sent, by `communication_data_type`."""
    reduce_bucket_size: int
    """Gradients that are reduced in one message."""
    image_bytes: float
    """Bytes of the data set that are read for one image."""
    flops_again: float = 0.0
    """Operations per image that activation checkpointing adds: the blocks' forward pass once more,
    in the backward pass."""
    overlap: bool = True
    """Whether reduction runs beside the backward pass; never on a CPU."""
    all_reduce: bool = True
    """Whether buckets are all-reduced; else each part is reduced to the one rank that needs it."""
    fused_update: bool = False
    """Whether optimizer.kernel=fused updates the weights."""
    averages: int = 0
    """Averages of the weights besides the EMA (optimizer.ema_widths)."""
    blocks: Blocks | None = None
    """What the time on a GPU is predicted from; None where it is not counted."""

    @property
    def backward_share(self) -> float:
        """The backward pass's share of the operations. Reduction can run beside it."""
        return (self.flops_per_image * 2 / 3 + self.flops_again) / (
            self.flops_per_image + self.flops_again
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: fp32 master weights, two moments and averages, and the weights."""
        return (STATE_BYTES + 4 * self.averages + self.weight_bytes) * self.parameters

    def staging_bytes(self, gpus: int) -> int:
        """Memory traffic of a rank's reduction beside the network's: into the bucket, divided,
        flattened, cast and back."""
        # Each time every gradient is read and written: 24 bytes, in fp32 too, where nothing is
        # cast. One GPU alone only moves them to where the optimizer reads them
        # (`engine.UnreducedGradient`).
        return (24 if gpus > 1 else self.weight_bytes + 4) * self.parameters

    @property
    def update_bytes(self) -> int:
        """Memory traffic of the update, over all ranks."""
        # The norm 4, AdamW 28, EMA 12, the copy to the weights; or all but the norm in one pass.
        by_optimizer = (36 if self.fused_update else 28 + 12 + 4) + 12 * self.averages
        return (4 + by_optimizer + self.weight_bytes) * self.parameters


def compute_parts(work: Workload, hardware: Hardware, gpus: int) -> dict[str, float]:
    """Seconds of a step's forward and backward passes: by their parts where these can be predicted,
    else by a share of the peak."""
    images = work.global_batch_size / gpus
    blocks = work.blocks
    rates = hardware.rates
    if hardware.mfu is not None or blocks is None or rates is None:
        mfu = ASSUMED_MFU if hardware.mfu is None else hardware.mfu
        flops = (work.flops_per_image + work.flops_again) * images
        return {"compute": flops / (hardware.peak_flops * mfu)}

    # A product has two in the backward pass; attention computes its weights again there. With
    # activation checkpointing the blocks' forward pass is computed twice.
    forward = 2 if work.flops_again else 1
    products = (forward + 2) * blocks.product_flops
    with_gelu = (forward + 1) * blocks.product_flops * blocks.code.gelu_products
    attention = (forward + 2.5) * blocks.attention_flops
    moved = forward * blocks.code.forward_bytes + blocks.code.backward_bytes
    return {
        "matrix products": images
        * ((products - with_gelu) / PRODUCT_SHARE + with_gelu / GELU_PRODUCT_SHARE)
        / rates.products,
        "attention": images * attention / (rates.products * ATTENTION_SHARE),
        "elementwise": images * blocks.elements * moved / rates.copies,
        "embedding and final layer, fp32": images * 3 * blocks.other_flops / rates.fp32,
        "gaps": work.grad_accum_steps * work.kernels * GAP_S,
    }


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they are spent on, without the time that is hidden behind something
    else."""

    parts: dict[str, float]
    images: int
    data_bytes: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def data_rate(self) -> float:
        """Bytes/s that all nodes together read of the data set."""
        return self.data_bytes / self.seconds

    def share(self, part: str) -> float:
        return self.parts[part] / self.seconds

    @property
    def bottleneck(self) -> str:
        """The largest part that is not computing."""
        others = [name for name in self.parts if name != "compute"]
        return max(others, key=self.parts.__getitem__)


def step(work: Workload, hardware: Hardware, gpus: int) -> Step:
    """The time of a step on so many GPUs, by its parts."""
    n = gpus
    micro = work.grad_accum_steps

    # The host launches kernels ahead of the GPU, so only what takes longer than computing counts.
    compute = sum(compute_parts(work, hardware, n).values())
    launches = max(0.0, micro * work.kernels * hardware.launch_s - compute)
    backward = work.backward_share * (compute + launches) / micro

    # An all-reduce by a ring takes 2 (n - 1) / n of its bytes over each link, a reduction to one
    # rank all of them.
    sent = 2 * (n - 1) / n if work.all_reduce else float(n > 1)
    reduction = sent * work.parameters * work.reduce_bytes / hardware.link(n)
    reduction += work.staging_bytes(n) / hardware.memory_bandwidth
    # All buckets but the last can be reduced beside the backward pass.
    if work.overlap and n > 1:
        buckets = math.ceil(work.parameters / work.reduce_bucket_size)
        reduction = max(reduction / buckets, reduction - backward * (buckets - 1) / buckets)

    parts = {
        "compute": compute,
        "kernel launches": launches,
        "gradient reduction": micro * reduction,
        "optimizer": work.update_bytes / n / hardware.memory_bandwidth,
        "all-gather": work.parameters * work.weight_bytes * (n - 1) / n / hardware.link(n),
    }
    # Data are read ahead of the steps: again only what takes longer counts.
    data_bytes = work.global_batch_size * work.image_bytes
    reading = data_bytes / (hardware.nodes(n) * hardware.data_bandwidth)
    parts["data"] = max(0.0, reading - sum(parts.values()))
    return Step(parts, work.global_batch_size, data_bytes)


def young(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints that lose the least (Young 1974): the first-order
    optimum."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between checkpoints that lose the least, to a higher order than `young`
    (Daly 2006, doi:10.1016/j.future.2004.11.016)."""
    # His formula's range ends there.
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    x = stall_s / (2 * mtbf_s)
    return young(stall_s, mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - stall_s


def slowdown(
    interval_s: float, *, stall_s: float, write_s: float, mtbf_s: float, restart_s: float
) -> float:
    """Expected wall time over time spent on steps that last, with a checkpoint after every
    `interval_s` of steps and failures at random (Daly 2006): to first order 1 + stall/interval +
    (interval/2 + write + restart)/mtbf.

    Our checkpoints are written while training continues and count once they are on disk, so a
    failure takes back `write_s` more than with one that is waited for. Infinite where no interval
    is ever completed."""
    exponent = (interval_s + stall_s) / mtbf_s
    if exponent + (restart_s + write_s) / mtbf_s > 700:  # beyond the range of exp
        return math.inf
    return mtbf_s * math.exp((restart_s + write_s) / mtbf_s) * math.expm1(exponent) / interval_s


@dataclass(frozen=True)
class Plan:
    """A run of `steps` steps with a checkpoint at every `every`-th."""

    work: Workload
    hardware: Hardware
    gpus: int
    steps: int
    every: int

    @cached_property
    def step(self) -> Step:
        return step(self.work, self.hardware, self.gpus)

    @property
    def mtbf_s(self) -> float:
        """Seconds between failures of any node of the run."""
        return 3600 * self.hardware.node_mtbf_hours / self.hardware.nodes(self.gpus)

    @property
    def _rank_bytes(self) -> float:
        """Bytes of the checkpoint on the rank that has the most: its part of the states, and all
        weights."""
        return (STATE_BYTES / self.gpus + self.work.weight_bytes) * self.work.parameters

    @property
    def stall_s(self) -> float:
        """Seconds that training stands still while the states are copied to host memory."""
        return self._rank_bytes / self.hardware.host_bandwidth

    @property
    def write_s(self) -> float:
        """Seconds from there until the checkpoint is complete on disk."""
        # Either each rank's thread is the limit, or the file system that all share.
        return max(
            self._rank_bytes / self.hardware.write_bandwidth,
            self.work.checkpoint_bytes / self.hardware.storage_bandwidth,
        )

    def slowdown(self, every: float) -> float:
        """Wall time over time spent on steps that last, with a checkpoint at every `every`-th."""
        interval = every * self.step.seconds
        # A checkpoint waits until the one before is written.
        stall = self.stall_s + max(0.0, self.write_s - interval)
        return slowdown(
            interval,
            stall_s=stall,
            write_s=self.write_s,
            mtbf_s=self.mtbf_s,
            restart_s=self.hardware.restart_s,
        )

    def wasted(self, every: float) -> float:
        """The share of the time that is spent on checkpoints, and on steps that do not last."""
        return 1 - 1 / self.slowdown(every)

    @property
    def best_every(self) -> int:
        """Steps between checkpoints by Daly's formula, or as many as one takes to be written."""
        return max(1, round(max(daly(self.stall_s, self.mtbf_s), self.write_s) / self.step.seconds))

    @property
    def mfu(self) -> float:
        """The share of the GPUs' peak that a step reaches, of the operations that are no
        repetition."""
        flops = self.work.flops_per_image * self.work.global_batch_size
        return flops / (self.gpus * self.hardware.peak_flops * self.step.seconds)

    @property
    def hours(self) -> float:
        """Wall time of the run in hours, with what is wasted."""
        return self.steps * self.step.seconds * self.slowdown(self.every) / 3600

    def at(self, mfu: float) -> "Plan":
        """The same where forward and backward reach another share of the peak."""
        return replace(self, hardware=replace(self.hardware, mfu=mfu))

    def in_fp32(self, *, tf32: bool) -> "Plan":
        """The same run with products of float32 matrices, from above: the bytes that were counted
        in half precision are doubled, though a part of them is of float32 already.

        `tf32`: at half the rate of half precision, as on every card of the table; else by the
        units of float32. `work` has the bytes of weights and gradients."""
        hardware = self.hardware
        rates = hardware.rates
        assert rates is not None
        products = rates.products / 2 if tf32 else rates.fp32
        peak = hardware.peak_flops / 2 if tf32 else rates.fp32
        # Without counted blocks the time comes from the peak alone.
        blocks = self.work.blocks
        if blocks is not None:
            code = replace(
                blocks.code,
                forward_bytes=2 * blocks.code.forward_bytes,
                backward_bytes=2 * blocks.code.backward_bytes,
            )
            blocks = replace(blocks, code=code)
        return replace(
            self,
            hardware=replace(
                hardware,
                peak_flops=peak,
                # From the rates of half precision, which are the ones that were measured.
                rates=replace(rates, products=products, measured=False),
            ),
            work=replace(self.work, blocks=blocks),
        )

    @property
    def sampling_seconds(self) -> float:
        """Seconds of one GPU for the model's answer to one image: a third of its forward and
        backward passes, as a forward pass has a third of their operations."""
        return sum(compute_parts(self.work, self.hardware, self.gpus).values()) / (
            3 * self.work.global_batch_size / self.gpus
        )
