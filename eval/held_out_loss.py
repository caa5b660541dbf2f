"""The loss on held-out images: unweighted, per noise cluster, on a fixed set of (image, u, noise) that
is the same for all models, whatever noise levels and weights each was trained with."""

import numpy as np
import torch
from torch import nn

from largescale.config.schema import Config
from largescale.data.fixed_noise_set import VALIDATION_SEED, FixedNoiseSet, cluster_means
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.host.signals import stop_requested
from largescale.models.build import latent_shape


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
