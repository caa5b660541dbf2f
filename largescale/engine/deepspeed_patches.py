"""Every place where DeepSpeed's internals are overridden, each with its reason and with what would
make it needless. An override is right for the code that it was written against: `check_deepspeed`
compares that code, and refuses another DeepSpeed before anything is built.
"""

import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from largescale.errors import ConfigError

WRITTEN_AGAINST = "0.19.8"
OTHER_DEEPSPEED = (
    "deepspeed {version}: {what} is not what largescale overrides, so training could go wrong "
    f"unnoticed; pip install deepspeed=={WRITTEN_AGAINST}"
)

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
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
        (DeepSpeedEngine._copy_recovery_script, "4bfd767dbf04"),
        (DynamicLossScaler.update_scale, "0aa6d6d66570"),
        (DeepSpeedZeroOptimizer.step, "9520884fd916"),
        (DeepSpeedZeroOptimizer.check_overflow, "623c2e9b3e44"),
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


@functools.cache  # the overrides themselves are not what it compares
def check_deepspeed() -> None:
    """Raises ConfigError where DeepSpeed is not the one that the overrides were written against."""
    for code, expected in CODE:
        if code_hash(code) != expected:
            what = f"{code.__module__.removeprefix('deepspeed.')}.{code.__qualname__}"
            raise ConfigError(OTHER_DEEPSPEED.format(version=deepspeed.__version__, what=what))


def code_hash(code: Any) -> str:
    return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:12]


def patch_before_build() -> None:
    """What must be overridden before `deepspeed.initialize`."""
    # A C++ extension for collectives between CPU ranks, built at start in 25 s; gloo does as well.
    # Needless once DeepSpeed builds it only where it is asked for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The first gradient imports Muon, whatever the optimizer is, and with it torch's compiler: 2 s.
    # Needless once DeepSpeed imports Muon only where it is used.
    compiler.compile = lambda: lambda function: function
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed asks whether the CPU has instructions for fp16. torch computes without them,
        # which half_precision.py has tried. Needless once DeepSpeed asks torch.
        accelerator.is_fp16_supported = lambda: True


class StepPatches:
    """The overrides of one engine's optimizer step."""

    def __init__(self, engine: Any, zero: Any, partition: Tensor):
        """`zero`: the engine's ZeRO optimizer; `partition`: this rank's part of the master weights,
        flat and padded at the end."""
        self.zero = zero
        self.loss_scale = float(zero.loss_scale)  # that this step's loss was multiplied by
        # A scale that cannot fall any more is the trainer's to report, with the step and the rank.
        zero.loss_scaler.raise_error_at_min_scale = False
        self._unscale: Callable[..., None] = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._unscale_as_scaled
        # The norm tells what is not finite as well: one pass over the gradient and one wait for the
        # device, not two. Needless once DeepSpeed checks the norm only.
        zero.check_overflow = lambda **_: None
        zero.scaled_global_norm = self._global_norm
        if engine.dp_world_size == 1:
            UnreducedGradient(zero, partition.numel())
        if partition.device.type == "cpu":
            stage_1_and_2.all_gather_dp_groups = _broadcast_parts
        # It would copy zero_to_fp32.py beside each checkpoint, which does not know our files.
        engine._copy_recovery_script = lambda *_: None

    def _global_norm(self) -> Tensor:
        """Of the scaled gradient, before clipping, on the host, which DeepSpeed asks whether it is
        finite; if not, it skips the step. This is where a step waits for the GPU."""
        pieces = self.zero.averaged_gradients[0]
        flat = getattr(pieces, "flat_partition", None)  # None in fp32 on several ranks
        # In float32, since they may be in half precision.
        norms = torch._foreach_norm(pieces if flat is None else [flat], dtype=torch.float32)
        square = torch.linalg.vector_norm(torch.stack(norms)).square()
        deepspeed.comm.all_reduce(square, group=self.zero.dp_process_group)
        return square.sqrt().cpu()

    def _unscale_as_scaled(self, *args: Any) -> None:
        """DeepSpeed has moved the loss scale on when it unscales; where it grew, that halves the
        gradient. Needless once DeepSpeed unscales by the scale that the loss had."""
        scaler = self.zero.loss_scaler
        moved, scaler.cur_scale = scaler.cur_scale, self.loss_scale
        self._unscale(*args)
        scaler.cur_scale = moved


def _broadcast_parts(
    groups_flat: Any,
    partitioned_param_groups: list[list[Tensor]],
    dp_process_group: list[Any],
    **_: Any,
) -> None:
    """Every rank's part of the weights to all others: over gloo in a quarter of the time of its
    all-gather."""
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        pending = [
            deepspeed.comm.broadcast(part, rank, group, async_op=True)
            for rank, part in enumerate(parts)
        ]
        for work in filter(None, pending):
            work.wait()


class UnreducedGradient:
    """One rank reduces nothing: its gradients go straight into the flat fp32 buffer that the
    optimizer reads.

    DeepSpeed would copy them into a bucket, divide them by one, and copy them twice more,
    through memory that it allocates at every step: 5 % of a step of DiT-S/2 on a CPU in fp32, 12 %
    in bf16."""

    def __init__(self, zero: Any, numel: int):
        """`numel`: of the partition, padded at the end."""
        self._zero, self._written = zero, set[nn.Parameter]()
        (parameters,) = zero.bit16_groups
        self._flat = torch.zeros(numel, device=parameters[0].device)
        sizes = [p.numel() for p in parameters]
        pieces = self._flat[: sum(sizes)].split(sizes)
        self._pieces = {p: piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)}
        zero.process_gradients, zero.independent_gradient_partition_epilogue = (
            self._keep,
            self._end_of_backward,
        )

    def _keep(self, parameter: nn.Parameter, group: int) -> None:
        """Called as soon as its gradient is there."""
        assert parameter.grad is not None
        if parameter in self._written:
            self._pieces[parameter].add_(parameter.grad)
        else:
            self._pieces[parameter].copy_(parameter.grad)
        self._written.add(parameter)
        parameter.grad = None

    def _end_of_backward(self) -> None:
        self._zero._epilogue_ran_this_backward = True
        if self._zero.is_gradient_accumulation_boundary():
            for parameter in self._pieces.keys() - self._written:
                self._pieces[parameter].zero_()
            self._written.clear()
            self._zero.averaged_gradients[0] = GradPartitionBufferGroup(
                list(self._pieces.values()), self._flat
            )
