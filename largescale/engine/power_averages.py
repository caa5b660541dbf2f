"""Power-function averages of the weights, in the state of any AdamW (arXiv:2312.02696)."""

from typing import Any

from torch import Tensor


def update_averages(
    state: dict[str, Any], p: Tensor, decays: dict[str, float], finite: Tensor | None = None
) -> None:
    """Update the power-function averages in a parameter's state, unless `finite`, a 0-dim tensor, is
    0. The first decay is 0."""
    for name, decay in decays.items():
        if name not in state:
            state[name] = p.detach().clone()
        weight = 1 - decay if finite is None else finite * (1 - decay)
        state[name].lerp_(p, weight)
