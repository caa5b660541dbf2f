"""The loss on held-out images while training: unweighted, at noise levels that never change, so
that it can be compared across stages, and between runs."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from largescale.config.schema import Config
from largescale.data.fixed_noise_set import (
    LEVELS,
    VALIDATION_SEED,
    FixedNoiseSet,
    cluster_means,
    over_all,
)
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks
from largescale.engine.deepspeed_engine import Engine
from largescale.models.build import latent_shape
from largescale.training.gathered import gather_model

# Rows of a batch, whatever the number of ranks: a row's loss is the same in every run.
BATCH = 16
# The weights that are measured: name in the log -> in the engine.
WEIGHTS = {"ema": "ema", "raw": "master"}


class _Part(NamedTuple):
    """The rows of one figure: all of them on every rank, their images only where they are due."""

    rows: FixedNoiseSet
    own: Tensor
    """Numbers of the rows that this rank evaluates."""
    total: int
    edges: tuple[float, ...]


class ValidationLoss:
    """Evaluates the EMA and the raw weights on a fixed set, which is spread over all ranks."""

    def __init__(
        self,
        config: Config,
        dataset: ShardDataset,
        objective: Objective,
        edges: tuple[float, ...],
        ranks: Ranks,
        stop: Callable[[], bool] = lambda: False,
    ):
        """`dataset`: the held-out images. `edges`: of the curriculum's clusters. `stop` is asked
        often; once it is true an evaluation is left out."""
        self._config = config
        self._objective = objective
        self._ranks = ranks
        self._stop = stop
        images = config.telemetry.validation_images
        # Losses on other images, or on more of them, cannot be compared.
        self.identity = f"{images} images a cluster of {dataset.fingerprint}"
        levels = tuple(i / LEVELS for i in range(LEVELS + 1))
        self._clusters = self._part(dataset, edges, images, spread=True)
        self._levels = self._part(dataset, levels, images, spread=False)

    def _part(
        self, dataset: ShardDataset, edges: tuple[float, ...], images: int, *, spread: bool
    ) -> _Part:
        # On the CPU: the same draws whatever device the losses are computed on.
        rows = FixedNoiseSet(
            dataset,
            edges,
            images,
            seed=VALIDATION_SEED,
            shape=latent_shape(self._config.model),
            captions=self._config.model.max_caption_tokens > 0,
            device=torch.device("cpu"),
            spread=spread,
        )
        total = len(rows.u)
        batch = torch.arange(total) // BATCH
        own = torch.arange(total)[batch % self._ranks.world_size == self._ranks.rank]
        rows.keep(own)
        return _Part(rows, own, total, edges)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """For the EMA and the raw weights: the loss over all noise levels, of each cluster, C_1
        first, and over the eight levels. Collective. Raises Stopped, on every rank."""
        figures: dict[str, float] = {}
        for name, weights in WEIGHTS.items():
            # Making a network draws from torch's generator, which training must not notice.
            with torch.random.fork_rng(devices=[]):
                model = gather_model(self._config, engine, self._ranks, weights)
            figures |= dict(self._figures(name, model))
        return figures

    def _figures(self, name: str, model: nn.Module) -> Iterator[tuple[str, float]]:
        clusters = cluster_means(self._losses(self._clusters, model), len(self._clusters.edges) - 1)
        yield f"validation/{name}", over_all(clusters, self._clusters.edges)
        for i, loss in enumerate(clusters.tolist(), 1):
            yield f"validation/{name}_C{i}", loss
        yield f"validation/{name}_{LEVELS}_levels", float(self._losses(self._levels, model).mean())

    @torch.no_grad()
    def _losses(self, part: _Part, model: nn.Module) -> Tensor:
        """The loss of every row, (total,) float64 on the CPU. Collective."""
        losses = torch.zeros(part.total, dtype=torch.float64, device=self._ranks.device)

        def evaluate() -> None:
            found = [
                loss
                for _, loss in part.rows.losses(
                    model, self._objective, BATCH, self._ranks.device, self._stop
                )
            ]
            if found:
                losses[part.own.to(losses.device)] = torch.cat(found)

        self._ranks.raise_on_all_ranks(evaluate)
        # Each row is 0 on all ranks but one, so that the sum is exact.
        return self._ranks.all_reduce_sum(losses).cpu()
