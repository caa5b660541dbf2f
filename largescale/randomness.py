"""Every random draw of a step, a function of (seed, step).

A step's draws are made for the complete global batch and each rank takes its rows, so they do not
depend on the number of ranks, and a resumed run sees what the uninterrupted run would have seen.
Nothing of this is ever saved. Only a U-Net's dropout draws in the network, by a seed for each step,
rank and micro step: see `TrainStep`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# One stream for each kind of draw: a new kind never shifts the others. Streams drawn elsewhere are
# "flip", "caption", "sample", "label" and "network".
_STREAMS = ("noise_level", "noise", "dropout", "posterior", "augment")


def stream_seed(seed: int, stream: str, index: int) -> int:
    """A generator's seed for the `index`-th use of a stream (a step, or a sample).

    torch's CPU generator reads the low 32 bits only: within a stream these are a permutation of the
    index, so no two steps below 2**32 share their draws.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    # An odd factor is a bijection modulo 2**32. The key's high half is the stream's alone.
    low = (key + index * 0x9E3779B1) % 2**32
    return (key >> 32 << 32 | low) & (2**63 - 1)


def host_draws(
    seed: int, step: int, n: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """The loader's draws, on the host: which rows of the global batch are flipped, (n,) with
    probability 1/2, and which of its captions each row gets, (n,) in [0, 1)."""
    flip = _host_uniform(stream_seed(seed, "flip", step), n)
    caption = _host_uniform(stream_seed(seed, "caption", step), n)
    return (flip < 0.5).numpy(), caption.numpy()


def _host_uniform(seed: int, n: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Draws:
    """One step's draws on the device, for the complete global batch of G rows or for some of its
    rows."""

    v: Tensor  # (G,) float64, uniform in the open (0, 1): where in the active noise range
    noise: Tensor  # (G, C, H, W) standard normal
    dropout: Tensor  # (G,) bool: the label or caption becomes the null one
    posterior: Tensor | None  # (G, C, H, W) standard normal, for data stored as moments
    # (G, k) float64, uniform in the open (0, 1), where images are augmented
    augment: Tensor | None = None

    def rows(self, index: Tensor) -> "Draws":
        """The draws of some rows, such as those of a rank's micro batch."""
        return Draws(
            v=self.v[index],
            noise=self.noise[index],
            dropout=self.dropout[index],
            posterior=None if self.posterior is None else self.posterior[index],
            augment=None if self.augment is None else self.augment[index],
        )


def step_draws(
    seed: int,
    step: int,
    n: int,
    shape: tuple[int, ...],
    *,
    dropout_prob: float,
    posterior: bool,
    device: torch.device,
    augment: int = 0,
) -> Draws:
    """All draws of a step, bitwise reproducible on one type of device. `n`: global batch size;
    `shape`: (C, H, W) of `x_start`; `augment`: draws that augmenting an image takes."""
    generators = {}
    for stream in _STREAMS:
        seed_of_stream = stream_seed(seed, stream, step)
        generators[stream] = torch.Generator(device).manual_seed(seed_of_stream)

    def uniform(stream: str, *each: int) -> Tensor:
        # float64 draws are multiples of 2**-53 in [0, 1): only the 0 has to be moved for the
        # interval to be open.
        u = torch.rand(n, *each, dtype=torch.float64, device=device, generator=generators[stream])
        return u.clamp_(min=2.0**-53)

    def normal(stream: str) -> Tensor:
        return torch.randn(n, *shape, device=device, generator=generators[stream])

    return Draws(
        v=uniform("noise_level"),
        noise=normal("noise"),
        dropout=uniform("dropout") < dropout_prob,
        posterior=normal("posterior") if posterior else None,
        augment=uniform("augment", augment) if augment else None,
    )
