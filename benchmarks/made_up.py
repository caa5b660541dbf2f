"""Latents to train on where only the time counts."""

from pathlib import Path

import numpy as np

from largescale.config.schema import ModelConfig
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.models.build import latent_shape


def make_latents(path: Path, model: ModelConfig, rows: int) -> None:
    """Pack a data set of random latents, as moments with a flipped version of each."""
    random = np.random.default_rng(0)
    c, h, w = latent_shape(model)
    classes = model.num_classes
    info = DatasetInfo("made-up", "moments", (2 * c, h, w), classes, 0.18215)
    with ShardWriter(path, info) as writer:
        for i in range(rows):
            moments = random.standard_normal((2, 2 * c, h, w)).astype(np.float16)
            writer.write(id=str(i), latent=moments[0], latent_mirror=moments[1], label=i % classes)
