"""Which names a state dict has, and which it should have."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from largescale.config.schema import ModelConfig
from largescale.errors import CheckpointError
from largescale.models.build import build_model

# Names that an error lists before it only counts the rest.
LISTED = 4


def listed(names: Iterable[str]) -> str:
    """Some names for a message: the first few in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(ordered[:LISTED]) + more


def require_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raises CheckpointError where the names of a state dict are not those expected; `what` says
    whose these are, as in "a DiT of 12 blocks"."""
    missing = set(expected) - set(found)
    unknown = set(found) - set(expected)
    problems = []
    if missing:
        problems.append(f"lack {listed(missing)}")
    if unknown:
        problems.append(f"have {listed(unknown)} besides")
    if problems:
        raise CheckpointError(
            f"the weights are not those of {what}: they {' and '.join(problems)}; give the complete "
            "file of a model of that kind"
        )


def require_fit(weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises CheckpointError, with the names, where the weights are not those of a network: too many,
    too few, or of other shapes."""
    # Names and shapes only: a large network would take memory and time.
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    require_names(weights, expected, f"a network ({config.architecture}) of these sizes")
    wrong = []
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape)
            wrong.append(f"{name} has {found} in place of {tuple(tensor.shape)}")
    if wrong:
        raise CheckpointError(
            f"the shapes of the weights do not fit one another: {listed(wrong)}; give the complete "
            "file of one model"
        )
