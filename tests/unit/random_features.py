"""Random features, as a network gives them."""

import math

import numpy as np
import torch
from torch import Tensor


def features(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated and not negative, like those of a network."""
    mix = np.random.default_rng(99).standard_normal((dim, dim)) / math.sqrt(dim)
    x = np.random.default_rng(seed).standard_normal((n, dim)) @ mix * scale + shift
    return torch.from_numpy(np.maximum(x, -0.5).astype(np.float32))
