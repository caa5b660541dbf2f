"""A trained model from an export or a run directory, without DeepSpeed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.build import Network, build_model, build_objective
from largescale.checkpoint_files import CheckpointDir, checkpoints, named_weights, newest_valid
from largescale.config import Config, from_dict
from largescale.diffusion.samplers import AnyObjective
from largescale.errors import CheckpointError

EXPORT_WEIGHTS, EXPORT_CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Trained:
    model: Network
    """EMA weights, fp32, in eval mode, on the CPU."""
    objective: AnyObjective
    config: Config
    info: dict[str, Any]
    """Where the weights are from: step, curriculum state, data set."""


def find_checkpoint(run_dir: Path, step: int | None) -> CheckpointDir:
    """The newest valid checkpoint of a run, or that of `step`, verified."""
    if step is not None:
        checkpoint = CheckpointDir.at(run_dir, step)
        if not checkpoint.exists:
            raise CheckpointError(f"{run_dir} has no checkpoint of step {step}")
        if problem := checkpoint.problem():
            raise CheckpointError(f"{problem}; choose another --step, or leave it out for the newest valid one")
        return checkpoint
    newest, _ = newest_valid(run_dir, checkpoints(run_dir), report=lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint; give the folder of a run, such as runs/digits")
    return newest


def load_trained(path: Path, step: int | None = None) -> Trained:
    """From an export's folder or a run's. Raises CheckpointError for a folder that is neither, or another model's."""
    if (path / EXPORT_CONFIG).exists():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            description = json.loads((path / EXPORT_CONFIG).read_text())
            weights = load_file(path / EXPORT_WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"the export {path} cannot be read: {error}; export the run again") from error
        if step not in (None, description["step"]):
            raise CheckpointError(f"{path} is an export of step {description['step']}, not of {step}; give the run")
    else:
        checkpoint = find_checkpoint(path, step)
        description = describe(checkpoint)
        weights = named_weights(checkpoint)
    config = from_dict(description["config"])
    model = build_model(config.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} are not those of its config: {error}") from error
    info = {key: value for key, value in description.items() if key != "config"}
    return Trained(model.eval(), build_objective(config), config, info)


def describe(checkpoint: CheckpointDir) -> dict[str, Any]:
    """Config and provenance of a checkpoint, as an export carries them."""
    state = checkpoint.manifest()["state"]
    carried = ("config", "step", "samples_seen", "dataset", "data_info", "made_with", "precision", "curriculum")
    return {key: state[key] for key in carried if key in state}
