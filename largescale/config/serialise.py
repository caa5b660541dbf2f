"""A config as plain JSON values and back, and what may change between two starts of a run."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from largescale.config.schema import Config
from largescale.errors import ConfigError, NewerVersionError

# A resumed run may not differ in these: its state or its random draws would be another run's.
FIXED_ON_RESUME = (
    "model.",
    "diffusion.",
    "noise.",
    "curriculum.clusters",
    "curriculum.n_clusters",
    "curriculum.pacing",
    "curriculum.loss_smoothing",
    "curriculum.order",
    "curriculum.stages",
    "curriculum.only_cluster",
    "data.horizontal_flip",
    "data.augment",
    "data.normalize",
    "data.order",
    "normalization",
    "train.global_batch_size",
    "train.seed",
    "optimizer.ema_widths",
    "precision",
    "dataset",
)


# These change how a run is carried out or watched, not what it computes: not reported.
FREE_ON_RESUME = (
    "name",
    "output",
    "dry_run",
    "fit_ranks",
    "print_config",
    "verbose",
    "profile",
    "data.path",
    "data.validation",
    "data.prefetch",
    "data.grown",
    "data.stage",
    "data.verify",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.threads",
    "train.ds_config",
    "train.device",
    "train.timeout_s",
    # Compared by content: the weights may have moved, or be gone.
    "train.init_from",
    "train.init_new",
    "checkpoint.",
    "telemetry.",
)


# Fields that had another name when older runs and exports were written: section, old -> new.
RENAMED = {"model": {"caption_tokens": "max_caption_tokens"}}

# Options that were other ones, by what they are today.
RENAMED_OPTIONS = {
    "--telemetry.tensorboard": ("--telemetry.trackers", "tensorboard"),
    "--telemetry.no-tensorboard": ("--telemetry.trackers",),
}


def with_current_options(arguments: Sequence[str]) -> list[str]:
    """A command line under the names that options have today."""
    current: list[str] = []
    for argument in arguments:
        current += RENAMED_OPTIONS.get(argument.replace("_", "-"), (argument,))
    return current


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict, each with its path such as model.depth."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_dict(config: Config) -> dict[str, Any]:
    """A config as plain JSON values, as it is stored beside a run's checkpoints."""
    # Through JSON, so that tuples are lists here as they are after reading.
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Reads the configs of older versions too. Raises NewerVersionError
    for a field that this version does not know, ConfigError for what is not a config."""
    try:
        config: Config = _build(Config, with_current_names(tree))
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"this is not the config of a run: {error}") from error
    return config


def with_current_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored config under the names that its fields have today."""
    current = {**tree}
    for section, renamed in RENAMED.items():
        if isinstance(current.get(section), dict):
            values = current[section].items()
            current[section] = {renamed.get(key, key): value for key, value in values}

    # A switch, before there were other trackers.
    telemetry = current.get("telemetry")
    if isinstance(telemetry, dict) and isinstance(telemetry.get("tensorboard"), bool):
        telemetry = {**telemetry}
        telemetry["trackers"] = ["tensorboard"] if telemetry.pop("tensorboard") else []
        current["telemetry"] = telemetry
    return current


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from plain JSON values, and each dataclass inside it."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # Ignoring a setting that this version cannot carry out would make it another run.
    if unknown := sorted(set(values) - set(fields)):
        raise NewerVersionError(
            f"{cls.__name__} has no field {unknown[0]!r}: this config was made by a newer "
            "version; update largescale, or start another run with --output DIR"
        )
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[key].type):
            arguments[key] = _build(fields[key].type, value)
        elif isinstance(value, list):  # JSON has no tuples
            arguments[key] = tuple(value)
        else:
            arguments[key] = value
    return cls(**arguments)


def differences(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a resumed run would change: (refused, allowed but logged), each as 'key: old -> new'."""
    old = dict(flatten(saved))
    new = dict(flatten(current))
    refused: list[str] = []
    logged: list[str] = []

    # The micro batch does not change what is computed, except for the masks of a U-Net's dropout.
    has_dropout = new.get("model.architecture") == "ddpmpp" and new.get("model.unet.dropout")
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if before == "auto":  # saved by a version that did not record what it stood for
            continue
        changes_dropout = has_dropout and key == "train.micro_batch_size"
        if key.startswith(FREE_ON_RESUME) and not changes_dropout:
            continue
        change = f"{key}: {before} -> {after}"
        if key.startswith(FIXED_ON_RESUME):
            refused.append(change)
        else:
            logged.append(change)
    return refused, logged
