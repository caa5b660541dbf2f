"""Every random draw of a step, a function of (seed, step).

A step's draws are made for the whole global batch and each rank takes its rows, so they do not
depend on the number of ranks, and a resumed run sees what the uninterrupted run would have seen.
Nothing of this is ever saved. Only a U-Net's dropout draws in the network, by a seed for each step,
rank and micro step: see `Trainer.losses`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# One stream a kind of draw: a new kind never shifts the others. Elsewhere: "flip", "caption",
# "sample", "label", "network".
_STREAMS = ("noise_level", "noise", "dropout", "posterior", "augment")


def stream_seed(seed: int, stream: str, index: int) -> int:
    """A generator's seed for the `index`-th use of a stream (a step, or a sample).

    torch's CPU generator reads the low 32 bits only: within a stream these are a permutation of the
    index, so no two steps below 2**32 share their draws.
    """
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little"
    )
    low = (key + index * 0x9E3779B1) % 2**32  # an odd factor: a bijection modulo 2**32
    return (key >> 32 << 32 | low) & (2**63 - 1)


def host_draws(
    seed: int, step: int, n: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """What the loader's thread needs, on the host: which rows of the global batch are flipped, (n,)
    with probability 1/2, and which of its captions each gets, (n,) in [0, 1)."""
    flip, caption = (
        torch.rand(
            n,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(stream_seed(seed, stream, step)),
        )
        for stream in ("flip", "caption")
    )
    return (flip < 0.5).numpy(), caption.numpy()


@dataclass(frozen=True)
class Draws:
    """One step's draws for the whole global batch of G rows, or some rows of it; the rest are
    `host_draws`."""

    v: Tensor  # (G,) float64, uniform in the open (0, 1): where in the active noise range
    noise: Tensor  # (G, C, H, W) standard normal
    dropout: Tensor  # (G,) bool: the label or caption becomes the null one
    posterior: Tensor | None  # (G, C, H, W) standard normal, for data stored as moments
    augment: Tensor | None = (
        None  # (G, k) float64, uniform in the open (0, 1), where images are augmented
    )

    def rows(self, index: Tensor) -> "Draws":
        def of(draw: Tensor | None) -> Tensor | None:
            return None if draw is None else draw[index]

        return Draws(
            self.v[index],
            self.noise[index],
            self.dropout[index],
            of(self.posterior),
            of(self.augment),
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
    """`n`: global batch size; `shape`: (C, H, W) of `x_start`; `augment`: draws that augmenting an
    image takes. Bitwise reproducible on one type of device."""
    generators = {
        s: torch.Generator(device).manual_seed(stream_seed(seed, s, step)) for s in _STREAMS
    }

    def uniform(stream: str, *each: int) -> Tensor:
        # float64 is a multiple of 2**-53 in [0, 1): only the 0 has to be moved for the interval to
        # be open
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
