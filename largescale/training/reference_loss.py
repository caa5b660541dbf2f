"""The loss on a fixed set of (image, u, noise) per noise cluster: a measure that does not move with
the curriculum, and that no weighting changes.

The training loss of two stages cannot be compared, since each draws from other noise levels; this
one can.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from largescale.condition import select
from largescale.config.schema import Config
from largescale.data.loader import to_condition, to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks
from largescale.errors import Stopped
from largescale.randomness import step_draws


def evenly_spaced(edges: tuple[float, ...], per_cluster: int) -> np.ndarray:
    """Noise levels u in the middle of `per_cluster` equal parts of each cluster."""
    inside = (np.arange(per_cluster) + 0.5) / per_cluster
    return np.concatenate([low + inside * (high - low) for low, high in itertools.pairwise(edges)])


class ReferenceLoss:
    """Evaluates the model on the fixed set; each rank holds its share of it."""

    def __init__(
        self,
        config: Config,
        dataset: ShardDataset,
        objective: Objective,
        edges: tuple[float, ...],
        ranks: Ranks,
        batch_size: int,
        shape: tuple[int, int, int],
        stop: Callable[[], bool] = lambda: False,
    ):
        """`stop` is asked often; once it is true an evaluation is left out."""
        self._objective = objective
        self._ranks = ranks
        self._batch_size = batch_size
        self._stop = stop

        # Noise levels u, cluster by cluster.
        per_cluster = config.telemetry.reference_images
        self._n_clusters = len(edges) - 1
        n = per_cluster * self._n_clusters
        u = torch.from_numpy(evenly_spaced(edges, per_cluster)).to(ranks.device)
        clusters = torch.arange(self._n_clusters, device=ranks.device)
        cluster = clusters.repeat_interleave(per_cluster)

        # Images and noise as a training step draws them, with another seed: else they would be
        # those of the first steps.
        info = dataset.info
        seed = config.train.seed ^ 0x5EED
        moments = info.kind == "moments"
        draws = step_draws(
            seed, 0, n, shape, dropout_prob=0.0, posterior=moments, device=ranks.device
        )
        first_caption = np.zeros(n) if config.model.max_caption_tokens else None
        numbers = sample_indices(np.arange(n), len(dataset), seed)
        gathered = dataset.gather(numbers, choice=first_caption)
        rows = {
            name: torch.from_numpy(values).to(ranks.device) for name, values in gathered.items()
        }

        # Only this rank's share of the set stays in memory: none, with more ranks than rows.
        mine = torch.arange(n, device=ranks.device)[ranks.rank :: ranks.world_size]
        self._cluster = cluster[mine]
        draws = draws.rows(mine)
        self._x_start = to_x_start(
            rows["latent"][mine], info.kind, info.scale_factor, draws.posterior
        )
        self._t = objective.draw(u)[mine]
        self._y = select(to_condition(rows), mine)
        self._noise = draws.noise

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The mean loss over all noise levels, then that of each cluster, C_1 first. Collective.
        Raises Stopped, on every rank."""
        model.eval()
        try:
            sums = self._ranks.raise_on_all_ranks(lambda: self._sums(model))
        finally:
            model.train()

        # A mean over ranks is the quotient of sums: their shares differ in size.
        loss, count = self._ranks.all_reduce_sum(sums).tolist()
        means = {"reference/loss": sum(loss) / sum(count)}
        for i, cluster_count in enumerate(count):
            means[f"reference/C{i + 1}"] = loss[i] / cluster_count
        return means

    def _sums(self, model: nn.Module) -> Tensor:
        """Sums over this rank's share, by cluster: losses and their number, (2, n_clusters)."""
        sums = torch.zeros(2, self._n_clusters, dtype=torch.float64, device=self._ranks.device)
        numbers = torch.arange(self._n_clusters, device=self._ranks.device)
        # With more ranks than rows some ranks have an empty share.
        shares = torch.arange(len(self._t), device=self._t.device).split(self._batch_size)
        for part in filter(len, shares):
            if self._stop():
                raise Stopped
            losses = self._objective.training_losses(
                model, self._x_start[part], self._t[part], self._noise[part], select(self._y, part)
            )
            # member[c, i] is 1 where row i belongs to cluster c.
            member = (self._cluster[part] == numbers[:, None]).double()
            sums += torch.stack([(member * losses.loss.double()).sum(1), member.sum(1)])
        return sums
