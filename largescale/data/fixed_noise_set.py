"""A fixed set of (image, noise level, noise): a model's losses on it can be compared over time and
between runs, which training losses cannot, as each stage draws from other noise levels."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from largescale.condition import select, to_device
from largescale.data.loader import to_condition, to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.errors import Stopped
from largescale.randomness import step_draws

# The middles of eight equal parts of the noise axis, as in MLPerf's text-to-image benchmark.
LEVELS = 8
# Of the set of held-out images, the same for runs of all seeds.
VALIDATION_SEED = 0x5EED


def evenly_spaced(edges: tuple[float, ...], per_cluster: int) -> np.ndarray:
    """Noise levels u in the middle of `per_cluster` equal parts of each cluster."""
    # None lies on the edge of two clusters.
    inside = (np.arange(per_cluster) + 0.5) / per_cluster
    return np.concatenate([low + inside * (high - low) for low, high in itertools.pairwise(edges)])


class FixedNoiseSet:
    """`per_cluster` images of each cluster of noise levels, cluster by cluster, C_1 first."""

    def __init__(
        self,
        dataset: ShardDataset,
        edges: tuple[float, ...],
        per_cluster: int,
        *,
        seed: int,
        shape: tuple[int, int, int],
        captions: bool,
        device: torch.device,
        spread: bool = True,
    ):
        """`edges`: of the clusters. `shape`: of an image or latent. `captions`: whether the model
        takes them; of several captions of an image it is the first. The set is drawn on `device`
        and stays there. `spread`: whether a cluster's noise levels are spread evenly in it; else
        all are its middle."""
        info = dataset.info
        n = per_cluster * (len(edges) - 1)
        levels = evenly_spaced(edges, per_cluster if spread else 1)
        self.u = torch.from_numpy(levels.repeat(n // len(levels))).to(device)
        clusters = torch.arange(len(edges) - 1, device=device)
        self.cluster = clusters.repeat_interleave(per_cluster)

        # Images and noise as a training step draws them.
        moments = info.kind == "moments"
        draws = step_draws(seed, 0, n, shape, dropout_prob=0.0, posterior=moments, device=device)
        chosen = sample_indices(np.arange(n), dataset.first_rows, seed)
        rows = {}
        for name, values in dataset.gather(
            chosen, choice=np.zeros(n) if captions else None
        ).items():
            rows[name] = torch.from_numpy(values).to(device)
        self.x_start = to_x_start(rows["latent"], info.kind, info.normalization, draws.posterior)
        self.noise = draws.noise
        self.y = to_condition(rows)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only, and free the memory of the others."""
        self.u = self.u[rows]
        self.cluster = self.cluster[rows]
        self.x_start = self.x_start[rows]
        self.noise = self.noise[rows]
        self.y = select(self.y, rows)

    def losses(
        self,
        model: nn.Module,
        objective: Objective,
        batch_size: int,
        device: torch.device,
        stop: Callable[[], bool],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The loss, unweighted, of each row in batches: (clusters (n,), losses (n,) float64). Raises
        Stopped once `stop` is true, which is asked before each batch."""
        # A share of the set may be empty, on more ranks than rows.
        parts = torch.arange(len(self.u), device=self.u.device).split(batch_size)
        for part in filter(len, parts):
            if stop():
                raise Stopped
            t = objective.draw(self.u[part].to(device))
            losses = objective.training_losses(
                model,
                self.x_start[part].to(device),
                t,
                self.noise[part].to(device),
                to_device(select(self.y, part), device),
            )
            yield self.cluster[part], losses.loss.double()


def cluster_means(losses: Tensor, n_clusters: int) -> np.ndarray:
    """The mean of each cluster, C_1 first, (n_clusters,) float64, of the losses of a complete set."""
    # Each cluster has the same number of images, one after another.
    means: Tensor = losses.view(n_clusters, -1).mean(1)
    return means.numpy()


def over_all(means: np.ndarray, edges: tuple[float, ...]) -> float:
    """The mean over all noise levels: of the clusters, by their width on the noise axis."""
    return float(np.dot(means, np.diff(edges)))
