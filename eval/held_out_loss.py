"""The loss on held-out images: unweighted, per noise cluster, on a fixed set of (image, u, noise) that
is the same for all models, whatever noise levels and weights each was trained with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from largescale.checkpoint.files import find_checkpoint
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.data.compatibility import open_validation
from largescale.data.fixed_noise_set import VALIDATION_SEED, FixedNoiseSet, cluster_means
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.errors import DataError, usable
from largescale.host.signals import stop_requested
from largescale.models.build import latent_shape


def training_set(run: Path) -> tuple[Config, ShardDataset]:
    """The config of a run, and what it was trained on. Raises CheckpointError for a folder that is no
    run, and DataError where other data lie there now."""
    newest = find_checkpoint(run)
    with usable(newest.path):
        state = newest.manifest()["state"]
        config = from_dict(state["config"])
        trained_on = (state["dataset"], state.get("data_info", {}).get("name", ""))
    data = ShardDataset(config.data.path)
    # Images of which other data know nothing may have been trained on.
    if not data.is_or_was(*trained_on):
        raise DataError(
            f"{data.path} holds other data than {run} was trained on, so which images are held out "
            "cannot be told; put back the set that was there"
        )
    data.normalize(config.data.normalize)
    return config, data


def held_out_set(validation: Path, config: Config, training: ShardDataset) -> ShardDataset:
    """The packed set of --validation. Raises DataError for one that is not like the training set, or
    shares rows with it."""
    data = replace(config.data, validation=str(validation))
    held_out = open_validation(replace(config, data=data), training, option="--validation")
    assert held_out is not None
    return held_out


class HeldOutLoss:
    """A fixed set of noised images, and the losses of models on it."""

    def __init__(
        self,
        data: ShardDataset,
        config: Config,
        edges: tuple[float, ...],
        images: int,
        batch_size: int,
        device: torch.device,
    ):
        """`images`: of each cluster, at noise levels evenly spaced in it. `config`: whose model and
        data are meant."""
        self.edges = edges
        self.batch_size = batch_size
        self.device = device
        self.n_clusters = len(edges) - 1
        # On the CPU: the same numbers whatever device the losses are computed on.
        self._set = FixedNoiseSet(
            data,
            edges,
            images,
            seed=VALIDATION_SEED,
            shape=latent_shape(config.model),
            captions=config.model.max_caption_tokens > 0,
            device=torch.device("cpu"),
        )

        # Only losses with the same protocol are comparable.
        self.protocol = {
            "data": data.fingerprint,
            "edges": list(edges),
            "images": images,
            "seed": VALIDATION_SEED,
        }

    @torch.no_grad()
    def __call__(self, model: nn.Module, objective: Objective) -> np.ndarray:
        """The mean of each cluster, C_1 first, (n_clusters,) float64."""
        batches = self._set.losses(model, objective, self.batch_size, self.device, stop_requested)
        losses = [loss.cpu() for _, loss in batches]
        return cluster_means(torch.cat(losses), self.n_clusters)
