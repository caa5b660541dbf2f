"""The functions of DiT's train.py, for a rehearsal."""

import torch
from torch import nn


def requires_grad(model: nn.Module, flag: bool = True) -> None:
    """Whether a model's weights are trained."""
    for parameter in model.parameters():
        parameter.requires_grad = flag


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """Move the average towards the model."""
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)
