"""DeepSpeed's settings: which keys the JSON owns, which the run config owns, and the two joined.

A key given by both sides is an error, and so is a key that nobody reads: neither is ever ignored.
This module does not import torch.
"""

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any, Literal

from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.errors import ConfigError
from largescale.host.files import from_json

Precision = Literal["fp32", "bf16", "fp16"]

# The keys that a JSON in ds_configs/ may set: memory, precision, communication.
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
# The keys that the run config sets, and the field that each comes from.
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
    "tensorboard": "telemetry.trackers",
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

# They make DeepSpeed keep its master copies in half precision.
_HALF_PRECISION_STATE = (
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
    "fp16_master_weights_and_grads",
)

# Settings that decide what is checked here
_SWITCHES = (
    ("bf16", "enabled"),
    ("fp16", "enabled"),
    ("bf16", "check_grad_overflow"),
    ("zero_optimization", "compute_grad_norm"),
)

# The folder of JSON files that come with this package
_SHIPPED = Path(__file__).parents[2] / "ds_configs"


def _resolve(path: str) -> Path:
    """The file as given, or relative to the clone that this package lies in, so that a run can be
    started from any folder."""
    for candidate in (Path(path), _SHIPPED.parent / path):
        # A name may be longer than a file system allows.
        with contextlib.suppress(OSError):
            if candidate.is_file():
                return candidate
    shipped = sorted(file.name for file in _SHIPPED.glob("*.json"))
    raise ConfigError(
        f"train.ds_config={path} is not a file; ds_configs/ holds {', '.join(shipped)}"
    )


def load_ds_config(path: str) -> dict[str, Any]:
    """Reads the JSON, and raises ConfigError for unknown keys and for unsafe settings."""
    try:
        ds: dict[str, Any] = from_json(_resolve(path).read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"train.ds_config={path} cannot be read: {error.strerror}; correct it, or name another"
        ) from error
    _check_types(path, ds)
    # Keys first: a misspelt one would read as a setting that is left out.
    _check_keys(path, ds)
    _check_zero(path, ds.get("zero_optimization", {}))
    _check_numerics(path, ds)
    precision(ds)
    return ds


def _check_types(path: str, ds: Any) -> None:
    """Raises ConfigError where an object, a truth value or a type's name is something else."""
    if not isinstance(ds, dict):
        raise ConfigError(f"{path} must hold a JSON object ({{...}}), not {json.dumps(ds)[:40]}")
    for section in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(ds.get(section, {}), dict):
            raise ConfigError(
                f"{path}: {section}={json.dumps(ds[section])[:40]} must be an object, such as "
                '{"enabled": true}'
            )
    # DeepSpeed reads "false" as false, where Python takes any text for true.
    for section, key in _SWITCHES:
        value = ds.get(section, {}).get(key, True)
        if not isinstance(value, bool):
            raise ConfigError(
                f"{path}: {section}.{key}={json.dumps(value)[:40]} must be true or false, without "
                "quotes"
            )
    communication = ds.get("communication_data_type")
    if communication not in (None, "fp32", "fp16", "bf16"):
        raise ConfigError(
            f"{path}: communication_data_type={json.dumps(communication)[:40]} must be fp32, fp16 "
            "or bf16; left out, gradients are reduced in the type of the weights"
        )


def _check_keys(path: str, ds: dict[str, Any]) -> None:
    """Raises ConfigError for a key that neither side knows, with the nearest one."""
    known = [*JSON_KEYS, *CONFIG_KEYS]
    for key in ds:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")


def _check_zero(path: str, zero: dict[str, Any]) -> None:
    """Raises ConfigError for settings of ZeRO that checkpoints and the EMA cannot handle."""
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


def _check_numerics(path: str, ds: dict[str, Any]) -> None:
    """Raises ConfigError for settings that lose small updates or let a NaN into the weights."""
    # Master weights and moments in half precision would stop small updates from having any effect.
    for key in _HALF_PRECISION_STATE:
        if ds.get("bf16", {}).get(key) or ds.get("fp16", {}).get(key):
            raise ConfigError(
                f"{path}: {key} is not supported: master weights, moments and EMA are fp32; remove "
                "it"
            )
    if unknown := sorted(set(ds.get("data_types", {})) - {"grad_accum_dtype"}):
        raise ConfigError(
            f"{path}: unknown key data_types.{unknown[0]}; DeepSpeed reads grad_accum_dtype there"
        )

    # A step with a NaN is skipped only where both of these are on.
    if ds.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            f"{path}: bf16.check_grad_overflow=false lets a NaN into the weights; remove it"
        )
    if ds.get("zero_optimization", {}).get("compute_grad_norm") is False:
        raise ConfigError(
            f"{path}: zero_optimization.compute_grad_norm=false lets a NaN into the weights, as "
            "only the norm shows that there is one; remove it"
        )


def precision(ds: dict[str, Any]) -> Precision:
    """The precision of the forward and backward pass that DeepSpeed's settings ask for."""
    bf16 = ds.get("bf16", {}).get("enabled")
    fp16 = ds.get("fp16", {}).get("enabled")
    if bf16 and fp16:
        raise ConfigError("bf16 and fp16 are both enabled in the DeepSpeed config; choose one")
    if bf16:
        return "bf16"
    return "fp16" if fp16 else "fp32"


def final_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """The settings that DeepSpeed is started with: the JSON's keys and the run config's."""
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

    # A setting with two owners would have two values one day, and one of them would be ignored.
    for key, owner in CONFIG_KEYS.items():
        if key in ds:
            now = f", now {own[key]!r}" if key in own else ""
            raise ConfigError(
                f"{config.train.ds_config} sets {key}={ds[key]!r}, but it is owned by the run "
                f"config ({owner}{now}); remove it from the JSON"
            )
    return {**ds, **own}
