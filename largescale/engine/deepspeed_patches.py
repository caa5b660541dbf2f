"""Every place where DeepSpeed's internals are overridden, each with its reason and with what would
make it needless.

An override is right for the code that it was written against: `check_deepspeed` compares that code,
and refuses another DeepSpeed before anything is built.
"""

import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import deepspeed
import torch
from torch import Tensor, nn

from largescale.errors import ConfigError

WRITTEN_AGAINST = "0.19.8"
# A rank's part of the flat weights is padded to a multiple of so many elements, by device: for NCCL
# to 64 bytes in half precision. On CPUs it stays DeepSpeed's, so that old runs continue bitwise
# (how AdamW rounds depends on where a part ends).
ALIGNMENT = {"cuda": 32, "cpu": 2}
OTHER_DEEPSPEED = (
    "deepspeed {version}: {what} is not what largescale overrides, so training could go wrong "
    f"unnoticed; pip install deepspeed=={WRITTEN_AGAINST}"
)

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
        from deepspeed.runtime import compiler
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
        from deepspeed.runtime.zero import stage_1_and_2
        from deepspeed.runtime.zero.stage_1_and_2 import (
            DeepSpeedZeroOptimizer,
            GradPartitionBufferGroup,
        )

    # What is overridden, and what an override relies on: (the code, the first 12 digits of its
    # SHA-256).
    CODE: list[tuple[Any, str]] = [
        (CPU_Accelerator.is_fp16_supported, "5f9f840c9be9"),
        (CUDA_Accelerator.available_memory, "f1eb570d9bdf"),
        (DeepSpeedEngine._copy_recovery_script, "4bfd767dbf04"),
        (DynamicLossScaler.update_scale, "0aa6d6d66570"),
        (DeepSpeedZeroOptimizer.__init__, "faa9fe03f220"),
        (DeepSpeedZeroOptimizer.step, "9520884fd916"),
        (DeepSpeedZeroOptimizer.check_overflow, "623c2e9b3e44"),
        (DeepSpeedZeroOptimizer._get_preflattened_grad_partition, "5efe338fec79"),
        (DeepSpeedZeroOptimizer._release_preflattened_grad_buffers, "329a5065e5ee"),
        (DeepSpeedZeroOptimizer.scaled_global_norm, "63c6a6fe100c"),
        (DeepSpeedZeroOptimizer.unscale_and_clip_grads, "6bf2ce6f97ea"),
        (DeepSpeedZeroOptimizer.process_gradients, "a05fe9cac73c"),
        (DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue, "26ceef6d75b3"),
        (GradPartitionBufferGroup, "46362cc2ad91"),
        (stage_1_and_2.all_gather_dp_groups, "87c5e3c4215b"),
        (compiler.compile, "41ba17e70620"),
    ]
except (ImportError, AttributeError) as error:
    raise ConfigError(
        OTHER_DEEPSPEED.format(version=deepspeed.__version__, what=str(error))
    ) from error


# Cached: after the first engine is built, it would compare the overrides themselves.
@functools.cache
def check_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not the one that the overrides were written against."""
    for code, expected in CODE:
        if code_hash(code) != expected:
            what = f"{code.__module__.removeprefix('deepspeed.')}.{code.__qualname__}"
            raise ConfigError(OTHER_DEEPSPEED.format(version=deepspeed.__version__, what=what))


def code_hash(code: Any) -> str:
    return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:12]


def patch_before_build() -> None:
    """Override what must be overridden before `deepspeed.initialize`."""
    # The C++ extensions that this machine could build. To find out runs a compiler, 0.4 s a start,
    # and one of them would be built at once, 25 s: for collectives between CPU ranks, where gloo
    # does as well. Needless once DeepSpeed looks for an extension only where it is asked for.
    deepspeed.ops.__compatible_ops__ = {}

    # On GPUs parts of the flat weights and gradients start at multiples of 64 bytes, not 4: NCCL
    # moves what is not aligned to 16 bytes an element at a time, on 8 ranks and more. The setter
    # takes what DeepSpeed assigns. Needless once DeepSpeed has a setting for it (its
    # `parameter_alignment` pads between parameters, not between ranks).
    alignment = ALIGNMENT.get(deepspeed.get_accelerator().device_name(), 2)
    DeepSpeedZeroOptimizer.nccl_start_alignment_factor = property(
        lambda self: alignment, lambda self, value: None
    )

    # The first gradient imports Muon, whatever the optimizer is, and with it torch's compiler: 2 s.
    # Needless once DeepSpeed imports Muon only where it is used.
    compiler.compile = lambda: lambda function: function

    # DeepSpeed asks whether the CPU has instructions for fp16. torch computes without them, which
    # half_precision.py has tried. Needless once DeepSpeed asks torch.
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True

    # Where pynvml is installed, DeepSpeed takes the entries of CUDA_VISIBLE_DEVICES for numbers,
    # and crashes on a GPU's UUID. The driver knows the free memory of torch's own device. Needless
    # once DeepSpeed asks torch.
    if accelerator.device_name() == "cuda":
        accelerator.available_memory = lambda index=None: torch.cuda.mem_get_info(index)[0]


class StepPatches:
    """The overrides of one engine's optimizer step."""

    def __init__(self, engine: Any, zero: Any, partition: Tensor):
        """`zero`: the engine's ZeRO optimizer; `partition`: this rank's part of the master weights,
        flat and padded at the end."""
        self.zero = zero
        self._partition = partition
        # By which this step's loss was multiplied.
        self.loss_scale = float(zero.loss_scale)
        # A scale that cannot fall any more is the trainer's to report, with the step and the rank.
        zero.loss_scaler.raise_error_at_min_scale = False
        self._unscale: Callable[..., None] = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._unscale_as_scaled

        # The norm shows what is not finite as well: one pass over the gradient and one wait for the
        # device, not two. Needless once DeepSpeed checks the norm only.
        zero.check_overflow = lambda **_: None
        zero.scaled_global_norm = self._global_norm

        # Needless once DeepSpeed gives its optimizer `found_inf` and `grad_scale`, as torch.amp
        # does.
        if hasattr(zero.optimizer, "update"):
            zero.step = self._step_ahead_of_host

        # Collectives that one rank does not need, and that gloo does faster in another way.
        if engine.dp_world_size == 1:
            UnreducedGradient(zero, partition.numel())
        if partition.device.type == "cpu":
            stage_1_and_2.all_gather_dp_groups = _broadcast_parts

        # It would copy zero_to_fp32.py beside each checkpoint, a script that cannot read our files.
        engine._copy_recovery_script = lambda *_: None

    def _global_norm(self) -> Tensor:
        """The norm of the scaled gradient, before clipping, on the host: DeepSpeed skips the step
        where it is not finite. This is where a step waits for the GPU."""
        return self._norm_on_device().cpu()

    def _norm_on_device(self) -> Tensor:
        # There is no flat gradient in fp32 on several ranks.
        pieces = self.zero.averaged_gradients[0]
        flat = getattr(pieces, "flat_partition", None)
        # Gradients arrive on a stream of their own, which DeepSpeed happens to have waited for.
        if self.zero.reduction_stream is not None:
            stream = deepspeed.get_accelerator().current_stream()
            stream.wait_stream(self.zero.reduction_stream)
        # In float32, since the gradient may be in half precision.
        norms = torch._foreach_norm(pieces if flat is None else [flat], dtype=torch.float32)
        square = torch.linalg.vector_norm(torch.stack(norms)).square()
        deepspeed.comm.all_reduce(square, group=self.zero.dp_process_group)
        return square.sqrt()

    def _step_ahead_of_host(self, closure: None = None) -> None:
        """What `DeepSpeedZeroOptimizer.step` does, with the update and the gathering of weights
        launched before the host reads the norm: the GPU works on while the host waits."""
        zero = self.zero
        zero.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID
        norm = self._norm_on_device()
        finite = norm.isfinite()
        # DeepSpeed's rule for clipping, on the device.
        scale = torch.full_like(norm, self.loss_scale)
        if zero.clip_grad > 0:
            scale = scale * ((norm / self.loss_scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
        (parts,) = zero.parallel_partitioned_bit16_groups
        half = parts[deepspeed.comm.get_rank(group=zero.real_dp_process_group[0])]
        grad = self._flat_gradient()
        zero.optimizer.update(
            self._partition, grad, half, finite=finite.float(), factor=scale.reciprocal()
        )
        stage_1_and_2.all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        self._forget_gradients()

        # What follows is the host's alone.
        on_host = float(norm)
        zero.overflow = not math.isfinite(on_host)
        zero._update_scale(zero.overflow)
        zero._global_grad_norm = math.inf if zero.overflow else on_host / self.loss_scale
        if not zero.overflow:
            zero.optimizer.count(self._partition)

    def _flat_gradient(self) -> Tensor:
        """This rank's part of the reduced gradient, scaled, flat and float32."""
        flat = self.zero._get_preflattened_grad_partition(0)
        if flat is None:
            pieces = self.zero.averaged_gradients[0]
            flat = self.zero.flatten_dense_tensors_aligned(pieces, self._partition.numel())
        return cast(Tensor, flat).to(self._partition.dtype)

    def _forget_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero._release_preflattened_grad_buffers(0)
        self.zero.averaged_gradients[0] = None
        self.zero.all_grad_tensors[0] = None

    def _unscale_as_scaled(self, *args: Any) -> None:
        """Unscale the gradient by the scale that its loss had."""
        # DeepSpeed has changed the loss scale before it unscales; where it grew, that would halve
        # the gradient. Needless once DeepSpeed unscales by the scale that the loss had.
        scaler = self.zero.loss_scaler
        next_scale = scaler.cur_scale
        scaler.cur_scale = self.loss_scale
        self._unscale(*args)
        scaler.cur_scale = next_scale


def _broadcast_parts(
    groups_flat: Any,
    partitioned_param_groups: list[list[Tensor]],
    dp_process_group: list[Any],
    **_: Any,
) -> None:
    """Broadcast every rank's part of the weights to all others."""
    # Over gloo this takes a quarter of the time of its all-gather.
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        pending = []
        for rank, part in enumerate(parts):
            pending.append(deepspeed.comm.broadcast(part, rank, group, async_op=True))
        # All are started before the first is waited for.
        for work in filter(None, pending):
            work.wait()


class UnreducedGradient:
    """Writes the gradients of a single rank straight into the flat fp32 buffer that the optimizer
    reads, since there is nothing to reduce.

    DeepSpeed would copy them into a bucket, divide them by one, and copy them twice more, through
    memory that it allocates at every step: 5 % of a step of DiT-S/2 on a CPU in fp32, 12 % in bf16.
    """

    def __init__(self, zero: Any, numel: int):
        """`numel`: of the partition, padded at the end."""
        self._zero = zero
        # Parameters that have a gradient since the last optimizer step.
        self._written = set[nn.Parameter]()

        # A view of the flat buffer for each parameter, in DeepSpeed's order.
        (parameters,) = zero.bit16_groups
        self._flat = torch.zeros(numel, device=parameters[0].device)
        self._pieces: dict[nn.Parameter, Tensor] = {}
        offset = 0
        for p in parameters:
            self._pieces[p] = self._flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()

        zero.process_gradients = self._keep
        zero.independent_gradient_partition_epilogue = self._end_of_backward

    def _keep(self, parameter: nn.Parameter, group: int) -> None:
        """Add a parameter's gradient to the buffer; DeepSpeed calls this as soon as there is
        one."""
        assert parameter.grad is not None
        if parameter in self._written:
            self._pieces[parameter].add_(parameter.grad)
        else:
            self._pieces[parameter].copy_(parameter.grad)
        self._written.add(parameter)
        # Frees its memory before the next parameter's gradient is computed.
        parameter.grad = None

    def _end_of_backward(self) -> None:
        self._zero._epilogue_ran_this_backward = True
        if self._zero.is_gradient_accumulation_boundary():
            # What got no gradient still has that of the step before.
            for parameter in self._pieces.keys() - self._written:
                self._pieces[parameter].zero_()
            self._written.clear()
            self._zero.averaged_gradients[0] = GradPartitionBufferGroup(
                list(self._pieces.values()), self._flat
            )
