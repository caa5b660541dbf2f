"""The loss on a fixed set of (image, u, noise) per noise cluster: a measure that does not move with
the curriculum, and that no weighting changes.

The training loss of two stages cannot be compared, since each draws from other noise levels; this
one can.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from largescale.config.schema import Config
from largescale.data.fixed_noise_set import FixedNoiseSet
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks


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

        # Another seed than training's: else the images and the noise would be those of its first
        # steps.
        self._n_clusters = len(edges) - 1
        self._set = FixedNoiseSet(
            dataset,
            edges,
            config.telemetry.reference_images,
            seed=config.train.seed ^ 0x5EED,
            shape=shape,
            captions=config.model.max_caption_tokens > 0,
            device=ranks.device,
        )
        # Only this rank's share of the set stays in memory: none, with more ranks than rows.
        n = len(self._set.u)
        self._set.keep(torch.arange(n, device=ranks.device)[ranks.rank :: ranks.world_size])

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
        losses = self._set.losses(
            model, self._objective, self._batch_size, self._ranks.device, self._stop
        )
        for cluster, loss in losses:
            # member[c, i] is 1 where row i belongs to cluster c.
            member = (cluster == numbers[:, None]).double()
            sums += torch.stack([(member * loss).sum(1), member.sum(1)])
        return sums
