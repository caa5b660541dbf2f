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


class ReferenceLoss:
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
        per_cluster, n_clusters = config.telemetry.reference_images, len(edges) - 1
        self._objective, self._ranks, self._batch_size, self._stop = (
            objective,
            ranks,
            batch_size,
            stop,
        )
        n = per_cluster * n_clusters
        # Evenly spaced inside each cluster, cluster by cluster; images and noise as a training step
        # draws them.
        inside = (np.arange(per_cluster) + 0.5) / per_cluster
        u = np.concatenate([low + inside * (high - low) for low, high in itertools.pairwise(edges)])
        self._cluster = torch.arange(n_clusters, device=ranks.device).repeat_interleave(per_cluster)
        self._n_clusters = n_clusters
        moments = dataset.info.kind == "moments"
        seed = config.train.seed ^ 0x5EED  # not the images and noise of the first steps
        draws = step_draws(
            seed, 0, n, shape, dropout_prob=0.0, posterior=moments, device=ranks.device
        )
        first_caption = np.zeros(n) if config.model.max_caption_tokens else None
        gathered = dataset.gather(
            sample_indices(np.arange(n), len(dataset), seed), choice=first_caption
        )
        rows = {
            name: torch.from_numpy(values).to(ranks.device) for name, values in gathered.items()
        }
        # Only this rank's share of the set stays in memory.
        mine = torch.arange(n, device=ranks.device)[
            ranks.rank :: ranks.world_size
        ]  # none, with more ranks than rows
        draws, self._cluster = draws.rows(mine), self._cluster[mine]
        info = dataset.info
        self._x_start = to_x_start(
            rows["latent"][mine], info.kind, info.scale_factor, draws.posterior
        )
        self._t = objective.draw(torch.from_numpy(u).to(ranks.device))[mine]
        self._y = select(to_condition(rows), mine)
        self._noise = draws.noise

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Collective. The mean loss of each cluster, C_1 first, and over all of them. Raises
        Stopped, on every rank."""
        model.eval()
        try:
            sums = self._ranks.raise_on_all_ranks(lambda: self._sums(model))
        finally:
            model.train()
        loss, count = self._ranks.all_reduce_sum(sums).tolist()
        clusters = {
            f"reference/C{i + 1}": a / b for i, (a, b) in enumerate(zip(loss, count, strict=True))
        }
        return {"reference/loss": sum(loss) / sum(count), **clusters}

    def _sums(self, model: nn.Module) -> Tensor:
        """Of this rank's share: losses and counts by cluster."""
        sums = torch.zeros(2, self._n_clusters, dtype=torch.float64, device=self._ranks.device)
        shares = torch.arange(len(self._t), device=self._t.device).split(self._batch_size)
        for part in filter(len, shares):  # with more ranks than rows some have none
            if self._stop():
                raise Stopped
            losses = self._objective.training_losses(
                model, self._x_start[part], self._t[part], self._noise[part], select(self._y, part)
            )
            member = (
                self._cluster[part] == torch.arange(self._n_clusters, device=part.device)[:, None]
            ).double()
            sums += torch.stack([(member * losses.loss.double()).sum(1), member.sum(1)])
        return sums
