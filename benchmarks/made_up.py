"""Latents to train on where only the time counts."""

from pathlib import Path

import numpy as np

from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter


def make_latents(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    info = DatasetInfo("made-up", "moments", (8, 32, 32), 1000, 0.18215, {})
    with ShardWriter(path, info) as writer:
        for i in range(rows):
            moments = random.standard_normal((2, 8, 32, 32)).astype(np.float16)
            writer.write(id=str(i), latent=moments[0], latent_mirror=moments[1], label=i % 1000)
