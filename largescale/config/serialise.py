"""A config as plain JSON values and back, and what may change between two starts of a run."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from largescale.config.schema import Config
from largescale.errors import ConfigError, NewerVersionError

# A resumed run may not differ in these: its state, or its random draws, would not be this run's.
FIXED_ON_RESUME = (
    "model.",
    "diffusion.",
    "noise.",
    "curriculum.clusters",
    "curriculum.n_clusters",
    "curriculum.pacing",
    "curriculum.order",
    "curriculum.stages",
    "curriculum.only_cluster",
    "data.horizontal_flip",
    "data.augment",
    "train.global_batch_size",
    "train.seed",
    "precision",
    "dataset",
)


# These change how a run is carried out or watched, not what it computes: not worth a word.
FREE_ON_RESUME = (
    "name",
    "output",
    "dry_run",
    "verbose",
    "profile",
    "data.path",
    "data.prefetch",
    "data.verify",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.threads",
    "train.ds_config",
    "train.device",
    "train.timeout_s",
    "checkpoint.",
    "telemetry.",
)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values, as stored beside a run's checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises NewerVersionError for a field that this version does not
    know, ConfigError for what is no config."""

    def build(cls: Any, values: dict[str, Any]) -> Any:
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise NewerVersionError(
                f"{cls.__name__} has no field {unknown[0]!r}: this config was made by a newer "
                "version; update largescale, or start another run with --output DIR"
            )
        return cls(
            **{
                key: build(fields[key].type, value)
                if dataclasses.is_dataclass(fields[key].type)
                else tuple(value)
                if isinstance(value, list)
                else value
                for key, value in values.items()
            }
        )

    try:
        config: Config = build(Config, tree)
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"this is no config of a run: {error}") from error
    return config


def differences(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a resumed run would change: (not allowed, allowed but worth saying), each as 'key: old
    -> new'."""
    old, new = dict(flatten(saved)), dict(flatten(current))
    refused: list[str] = []
    said: list[str] = []
    drops = new.get("model.architecture") == "ddpmpp" and new.get("model.unet.dropout")
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        free = key.startswith(FREE_ON_RESUME) and not (drops and key == "train.micro_batch_size")
        if before == after or before == "auto" or free:
            continue  # "auto": saved by a version that did not say what it stood for
        (refused if key.startswith(FIXED_ON_RESUME) else said).append(f"{key}: {before} -> {after}")
    return refused, said
