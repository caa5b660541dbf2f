"""A ZeRO-2 engine whose complete state we can write and read. Beside it only deepspeed_patches.py
imports deepspeed."""

import enum
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

# DS_ACCELERATOR must be set to the run's device before this import; train.py does.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

from largescale.checkpoint.files import CLIENT_KEY, CheckpointDir, flat_state
from largescale.engine.deepspeed_patches import StepPatches, check_deepspeed, patch_before_build
from largescale.engine.host_copies import StagedCopies, to_host
from largescale.engine.optimizer import steps_of
from largescale.errors import CheckpointError, ConfigError

# What moves in a loss scaler; its settings are the config's.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# The optimizer's state tensors; power-function averages have names of their own, ema_WIDTH.
_STATE_KINDS = ("exp_avg", "exp_avg_sq", "ema")


class Engine:
    """DeepSpeed's engine with EMA, exact first weights and checkpoints for any number of ranks.

    One optimizer step is `forward`, `backward` and `advance`, each as often as there are
    accumulation steps.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[Any], torch.optim.Optimizer],
        ds: dict[str, Any],
    ):
        """`model` in fp32, equal on every rank; `ds` the final DeepSpeed config."""
        deepspeed.utils.logger.setLevel(logging.ERROR)
        check_deepspeed()
        patch_before_build()
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(trainable), config=ds, dist_init_required=False
        )
        self._patches = StepPatches(self._engine, self._zero, self._master)
        self.module: nn.Module = self._engine.module
        self._rank = int(self._engine.global_rank)
        # Made at the first save.
        self._staged: StagedCopies | None = None

        # DeepSpeed casts the module first and copies its master weights from that: put back what
        # the cast rounded away.
        pieces = []
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                pieces.append(initial[name].reshape(-1))
            else:
                p.data = initial[name].to(p.device)
        self._fill(self._master, pieces)

    @property
    def reduction_group(self) -> Any:
        """The process group in which DeepSpeed reduces gradients and gathers weights."""
        return self._zero.dp_process_group

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self._engine(*args, **kwargs))

    __call__ = forward

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed may change the scale before it unscales the gradient.
        self._patches.loss_scale = self.loss_scale
        self._engine.backward(loss)

    def advance(self) -> bool:
        """Count a micro step, after each `backward`; at the end of an accumulation, take the
        optimizer step.

        True if it was applied, False if it was skipped for a gradient that is not finite (in fp16
        the loss scale falls with it).
        """
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @property
    def _master(self) -> Tensor:
        """This rank's flat fp32 partition of the (single) parameter group, padded at the end."""
        (partition,) = self._zero.single_partition_of_fp32_groups
        return cast(Tensor, partition)

    @property
    def numel(self) -> int:
        """Trainable parameters, over all ranks."""
        return sum(p.numel() for p in self._zero.bit16_groups[0])

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether a skipped step is worth a retry: a dynamic loss scale, not yet at its minimum."""
        scaler = self._zero.loss_scaler
        return bool(scaler.dynamic) and scaler.cur_scale > scaler.min_scale

    def scaler_state(self) -> dict[str, Any]:
        """The part of the loss scaler that changes while training."""
        # A static scaler has only some of these.
        scaler = self._zero.loss_scaler
        return {key: getattr(scaler, key) for key in _SCALER_STATE if hasattr(scaler, key)}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        for key in _SCALER_STATE:
            if key in state:
                setattr(self._zero.loss_scaler, key, state[key])

    def grad_norm(self) -> float:
        """The norm of the last step's gradient, before clipping, unscaled."""
        # DeepSpeed has none before the first step.
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def lr(self) -> float:
        return float(self._zero.optimizer.param_groups[0]["lr"])

    def set_rates(
        self, *, lr: float, ema_decay: float, power_ema_decays: dict[str, float] | None = None
    ) -> None:
        """Set the learning rate and the averages' decays of the updates from here on."""
        self._zero.optimizer.param_groups[0].update(
            lr=lr, ema_decay=ema_decay, power_ema_decays=power_ema_decays or {}
        )

    def partition(self, name: str) -> Tensor:
        """This rank's flat fp32 piece of the "master" weights, the "ema", or another average of the
        optimizer's state; before the first step they are all the master weights."""
        state = self._zero.optimizer.state[self._master]
        return cast(Tensor, state.get(name, self._master.detach()))

    def weights_checksum(self) -> int:
        """A checksum of this rank's copy of the weights, in the compute dtype: the same on every
        rank, or one is broken."""
        # Bits as integers: their sum does not depend on the order, and a NaN equals itself.
        integers = {2: torch.int16, 4: torch.int32}
        sums = []
        for p in self.module.parameters():
            bits = p.detach().view(integers[p.element_size()])
            sums.append(bits.sum(dtype=torch.int64))
        # One wait for the GPU, not one for each parameter.
        return int(torch.stack(sums).sum())

    def save(self, checkpoint: CheckpointDir, client_state: dict[str, Any], writer: Any) -> None:
        """Give every file's content to `writer` (checkpoint/writer.py), which decides when it is on
        disk. Collective."""
        if self._staged is None and self._master.device.type == "cuda":
            self._staged = StagedCopies()
        self._engine.checkpoint_engine = PlainStates(writer, self._staged)
        self._engine.save_checkpoint(
            str(checkpoint.path.parent),
            tag=checkpoint.path.name,
            save_latest=False,
            client_state={CLIENT_KEY: client_state},
        )

    def load(self, checkpoint: CheckpointDir, saved_world_size: int) -> None:
        """Read this rank's part of a state saved by any number of ranks; hyper-parameters stay as
        configured.

        Not collective, and to be followed by `gather_weights`, which is. Raises CheckpointError for
        a state that is too short.
        """
        # Not by DeepSpeed's own loading, which refuses another number of ranks, unpickles, and
        # restores the old lr.
        self._fill(self._master, flat_state(checkpoint, "master", 0, saved_world_size))

        # The moments and the EMA. A checkpoint from before the first step has none.
        saved = checkpoint.optimizer_state(0)
        state = self._zero.optimizer.state[self._master]
        state.clear()
        saved_state = saved["base_optimizer_state"]["state"].get(0, {})
        for key in saved_state:
            if key not in _STATE_KINDS and not key.startswith("ema_"):
                continue
            state[key] = torch.zeros_like(self._master)
            self._fill(state[key], flat_state(checkpoint, key, 0, saved_world_size))

        # What is not sharded is the same on every rank: rank 0's is read. apex counts steps in the
        # group, where a count from before would stay.
        (group,) = saved["base_optimizer_state"]["param_groups"]
        self._zero.optimizer.param_groups[0].pop("step", None)
        if saved_state:
            self._zero.optimizer.set_steps(steps_of(saved_state, group))
        self.load_scaler_state(saved["loss_scaler"])

    def gather_weights(self) -> None:
        """Update the weights, in the compute dtype, from all ranks' master weights. Collective."""
        self._zero.update_lp_params()

    @torch.no_grad()
    def _fill(self, partition: Tensor, pieces: Iterable[Tensor]) -> None:
        """Copy this rank's part of a complete flat state, given in consecutive pieces, into
        `partition`."""
        # This rank's part is [start, end) of the state. The rest of the partition is padding.
        start = self._rank * partition.numel()
        end = min(start + partition.numel(), self.numel)
        partition.zero_()

        # A piece is [offset, offset + n) of the state; [low, high) is what they have in common.
        offset = 0
        for piece in pieces:
            low = max(offset, start)
            high = min(offset + piece.numel(), end)
            if low < high:
                partition[low - start : high - start].copy_(piece[low - offset : high - offset])
            offset += piece.numel()
        if offset < self.numel:
            raise CheckpointError(
                f"the saved state has {offset} of the model's {self.numel} parameters"
            )


def adam() -> type[torch.optim.Optimizer]:
    """DeepSpeed's AdamW for the device that DS_ACCELERATOR names."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    return cast(type[torch.optim.Optimizer], DeepSpeedCPUAdam if on_cpu else FusedAdam)


def check_ds_config(ds: dict[str, Any]) -> None:
    """Let DeepSpeed read its settings, before anything is built. Raises ConfigError for settings
    that it does not accept."""
    check_deepspeed()
    # The batch must fit the number of ranks, which a dry run does not have: one row each always
    # does.
    settings = dict(ds)
    settings.pop("train_batch_size", None)
    settings.pop("gradient_accumulation_steps", None)
    settings["train_micro_batch_size_per_gpu"] = 1
    try:
        DeepSpeedConfig(settings)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"DeepSpeed does not take these settings: {error}") from error


class PlainStates:
    """A writer of checkpoints that turns what DeepSpeed gives it into tensors and plain values."""

    def __init__(self, writer: Any, staged: StagedCopies | None = None):
        self._writer = writer
        self._staged = staged

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        state = plain(state_dict, self._staged or to_host)
        if self._staged is not None:
            self._staged.finish()
        self._writer.save(state, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def plain(value: Any, copy: Callable[[Tensor], Tensor] = to_host) -> Any:
    """A copy in host memory, of tensors (by `copy`) and plain values only, so that the file loads
    with weights_only=True."""
    if isinstance(value, Tensor):
        return copy(value)

    # Containers, and DeepSpeed's own objects as their numbers. A torch.Size is a tuple.
    inner = partial(plain, copy=copy)
    if isinstance(value, dict):
        return {inner(key): inner(item) for key, item in value.items()}
    if isinstance(value, LossScalerBase):
        return _numbers_of(value)
    if isinstance(value, list | tuple | set):
        return list(map(inner, value))
    if is_dataclass(value) and not isinstance(value, type):
        return list(astuple(value))

    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype | Path):
        return str(value)
    return value


def _numbers_of(scaler: LossScalerBase) -> dict[str, Any]:
    """The attributes of a loss scaler that are numbers."""
    numbers = {}
    for key, item in vars(scaler).items():
        if isinstance(item, bool | int | float):
            numbers[key] = item
    return numbers
