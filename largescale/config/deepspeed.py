"""DeepSpeed's settings: which keys the JSON owns, which the run config owns, and the two joined. No
torch.

A key given by both sides is an error, a key that nobody reads is an error: neither is ever ignored.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

# What a JSON in ds_configs/ may say: memory, precision, communication.
JSON_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "timers",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
)
# What the run config says, and where.
CONFIG_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size, train.micro_batch_size and the number "
    "of ranks",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.lr",
    "seed": "train.seed",
    "steps_per_print": "telemetry.log_every",
    "tensorboard": "telemetry.tensorboard",
    "zero_allow_untested_optimizer": "optimizer (always true: the optimizer carries the EMA)",
    "checkpoint": "checkpoint",
}

# Checkpoints and the EMA rely on the plain flat partition, on the device.
_UNSUPPORTED = (
    "offload_optimizer",
    "cpu_offload",
    "round_robin_gradients",
    "parameter_alignment",
    "elastic_checkpoint",
)


def _resolve(path: str) -> Path:
    """As given, or from the clone that this package lies in, so that a run can be started from any
    folder."""
    for candidate in (Path(path), Path(__file__).parents[2] / path):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.name for p in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))
    raise ConfigError(
        f"train.ds_config={path} is not a file; ds_configs/ holds {', '.join(shipped)}"
    )


def load_ds_config(path: str) -> dict[str, Any]:
    """The JSON, checked for keys that are not its own and for settings that a run cannot be trusted
    to."""
    try:
        ds: dict[str, Any] = json.loads(_resolve(path).read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    for key in ds:
        if key not in JSON_KEYS and key not in CONFIG_KEYS:
            near = difflib.get_close_matches(key, [*JSON_KEYS, *CONFIG_KEYS], n=1)
            raise ConfigError(
                f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") != 2:
        raise ConfigError(
            f"{path}: zero_optimization.stage={zero.get('stage')} must be 2; only ZeRO-2 is "
            "supported"
        )
    for key in _UNSUPPORTED:
        if zero.get(key):
            raise ConfigError(
                f"{path}: zero_optimization.{key} is not supported: checkpoints and the EMA rely on "
                "the plain flat partition on the device; remove it"
            )
    for key in (
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
        "fp16_master_weights_and_grads",
    ):
        if ds.get("bf16", {}).get(key) or ds.get("fp16", {}).get(key):
            raise ConfigError(
                f"{path}: {key} is not supported: master weights, moments and EMA are fp32; remove "
                "it"
            )
    if unknown := sorted(set(ds.get("data_types", {})) - {"grad_accum_dtype"}):
        raise ConfigError(
            f"{path}: unknown key data_types.{unknown[0]}; DeepSpeed reads grad_accum_dtype there"
        )
    if ds.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            f"{path}: bf16.check_grad_overflow=false lets a NaN into the weights; remove it"
        )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"{path}: zero_optimization.compute_grad_norm=false lets a NaN into the weights, as "
            "only the norm tells that there is one; remove it"
        )
    precision(ds)
    return ds


def precision(ds: dict[str, Any]) -> Precision:
    enabled: list[Precision] = [p for p in ("bf16", "fp16") if ds.get(p, {}).get("enabled")]  # type: ignore[misc]
    if len(enabled) > 1:
        raise ConfigError("bf16 and fp16 are both enabled in the DeepSpeed config; choose one")
    return enabled[0] if enabled else "fp32"


def final_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given: the JSON, and the run config's own keys."""
    ds = load_ds_config(config.train.ds_config)
    micro, accumulation = batch_layout(config, world_size)
    own = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    for key, owner in CONFIG_KEYS.items():
        if key in ds:
            raise ConfigError(
                f"{config.train.ds_config} sets {key}={ds[key]!r}, but it is owned by the run "
                f"config ({owner}"
                + (f", now {own[key]!r}" if key in own else "")
                + "); remove it from the JSON"
            )
    return {**ds, **own}
