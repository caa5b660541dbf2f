"""A trained model from an export or a run directory, without DeepSpeed."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from largescale.checkpoint.ema_snapshots import average
from largescale.checkpoint.files import CheckpointDir, find_checkpoint, named_weights
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import Objective
from largescale.errors import CheckpointError, ConfigError, usable
from largescale.host.files import from_json, unchanged
from largescale.models.build import Network, build_model

EXPORT_WEIGHTS = "model.safetensors"
EXPORT_CONFIG = "config.json"

# In the metadata of an export's weights: which of a checkpoint's they are.
EXPORT_METADATA = {"format": "pt", "weights": "ema"}
RAW_METADATA = EXPORT_METADATA | {"weights": "raw"}
# What an export's config has, which tells it from other libraries' config.json.
_REQUIRED = {"config", "step", "data_info"}
# What an export carries of a checkpoint's state.
CARRIED = (
    "config",
    "step",
    "samples_seen",
    "dataset",
    "data_info",
    "made_with",
    "precision",
    "curriculum",
    "init",
)
# The smoothed weights, or those that the optimizer updates.
WeightsName = Literal["ema", "raw"]


@dataclass(frozen=True)
class Trained:
    """A trained model, its objective, and where they are from."""

    model: Network
    """EMA weights, or those that were asked for, fp32, in eval mode, on the CPU."""
    objective: Objective
    config: Config
    info: dict[str, Any]
    """Where the weights are from: step, curriculum state, data set."""

    @property
    def num_classes(self) -> int:
        """The number of classes that were trained, 0 without labels."""
        # The model may have more classes than the data.
        model = self.config.model.num_classes
        return min(model, self.info.get("data_info", {}).get("num_classes", model))


def load_trained(
    path: Path,
    step: int | None = None,
    kind: WeightsName | None = None,
    ema_width: float | None = None,
) -> Trained:
    """Load a model from the folder of an export or of a run: by default the EMA weights of a run,
    and what an export holds; with `ema_width` a run's power-function average of that width. Raises
    CheckpointError for a folder that is neither, or another model's."""
    return build_trained(*read_weights(path, step, kind, ema_width), path)


def build_trained(
    description: dict[str, Any], weights: dict[str, Tensor], path: Path | str
) -> Trained:
    """The model of weights by name and what is known of them, as `read_weights` gives both. Raises
    CheckpointError, naming `path`, where they do not fit each other."""
    # A config that does not fit this version is the file's error, not the user's.
    with usable(path):
        config = from_dict(description["config"])
        model = build_model(config.model)
        objective = build_objective(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {path} are not those of its config: {error}"
        ) from error
    info = {key: value for key, value in description.items() if key != "config"}
    return Trained(model.eval(), objective, config, info)


def read_weights(
    path: Path,
    step: int | None = None,
    kind: WeightsName | None = None,
    ema_width: float | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and provenance, and the weights by name in fp32, of the folder of an export or of a
    run: by default the EMA of a run, and what an export holds; with `ema_width` a run's
    power-function average of that width. Raises CheckpointError for a folder that is neither."""
    if ema_width is not None:
        return _read_average(path, step, kind, ema_width)
    if (path / EXPORT_CONFIG).exists():
        description, weights = _read_export(path, step)
        if kind not in (None, has := description.get("weights", "ema")):
            raise CheckpointError(
                f"{path} is an export of the {has} weights, not of the {kind}; give the run"
            )
        return description, {name: tensor.float() for name, tensor in weights.items()}
    if is_export(path):
        raise CheckpointError(
            f"the export {path} is not complete: it has no {EXPORT_CONFIG}, which is written last; "
            "an export writes it now, or was killed: wait for it, or export again"
        )
    checkpoint = find_checkpoint(path, step)
    description = describe(checkpoint)
    # An export of the EMA, as most are, says nothing of it.
    if kind == "raw":
        description["weights"] = kind
    return description, named_weights(checkpoint, "master" if kind == "raw" else "ema")


def _read_average(
    path: Path, step: int | None, kind: WeightsName | None, width: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if kind is not None:
        raise ConfigError(f"weights={kind} and ema_width={width} exclude each other; give one")
    if (path / EXPORT_CONFIG).exists():
        raise CheckpointError(f"{path} is an export, which has one average; give the run")
    found = average(path, width, step)
    # The run's config and curriculum, at the average's own step.
    description = describe(find_checkpoint(path))
    batch = description["config"]["train"]["global_batch_size"]
    description["step"] = found.profile.step
    description["samples_seen"] = found.profile.step * batch
    description["ema"] = found.describe()
    return description, found.weights


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """The hash of weights on the CPU, with their names."""
    digest = hashlib.sha256()
    # Sorted: the order of modules is no part of a model.
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _read_export(path: Path, step: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Another process may export a later step to it meanwhile.
        with unchanged(path / EXPORT_CONFIG):
            description = from_json((path / EXPORT_CONFIG).read_text())
            if not is_description(description):
                raise CheckpointError(
                    f"{path} is no export, {_what(description)}; give a run, or the folder that "
                    "largescale.export wrote"
                )
            weights = load_file(path / EXPORT_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the export {path} cannot be read: {error}; export the run again"
        ) from error

    # An export is of one step; a run has several.
    if step not in (None, description["step"]):
        raise CheckpointError(
            f"{path} is an export of step {description['step']}, not of {step}; give the run"
        )
    return description, weights


def is_description(config: Any) -> bool:
    """Whether the content of a config.json, or of another library's folder's largescale.json, is
    that of an export."""
    return isinstance(config, dict) and config.keys() >= _REQUIRED


def is_export(folder: Path) -> bool:
    """Whether the folder holds an export, or what a killed or damaged one leaves of its files."""
    from safetensors import SafetensorError, safe_open

    # Other libraries have a config.json beside a model.safetensors too.
    with contextlib.suppress(OSError, ValueError):
        if is_description(from_json((folder / EXPORT_CONFIG).read_text())):
            return True
    # The config is written last, so a killed export has weights only.
    with contextlib.suppress(OSError, SafetensorError):
        with safe_open(folder / EXPORT_WEIGHTS, framework="pt") as weights:
            return weights.metadata() in (EXPORT_METADATA, RAW_METADATA)
    return False


def _what(description: Any) -> str:
    """Why a config.json is not an export's, with the model that another library's names."""
    # The first key is diffusers', the others are transformers'.
    for key in ("_class_name", "architectures", "model_type"):
        if isinstance(description, dict) and description.get(key):
            return f"its {EXPORT_CONFIG} is another library's, of {description[key]}"
    return f"its {EXPORT_CONFIG} lacks config, step or data_info"


def describe(checkpoint: CheckpointDir) -> dict[str, Any]:
    """Config and provenance of a checkpoint, as an export carries them. Raises CheckpointError
    where they cannot be used."""
    with usable(checkpoint.path):
        state = checkpoint.manifest()["state"]
        # An error here is better than one of whoever loads the export.
        from_dict(state["config"])
        return {key: state[key] for key in CARRIED if key in state}
