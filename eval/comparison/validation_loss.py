"""The validation loss of a comparison: unweighted, per noise cluster, on a fixed set of (image, u,
noise) that is the same for all runs, whatever noise levels and weights each was trained with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eval.curves.rows import rows_of_protocol
from eval.score import RESULTS
from largescale.checkpoint.files import CheckpointDir, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.config.schema import Config
from largescale.data.fixed_noise_set import (
    VALIDATION_SEED,
    FixedNoiseSet,
    cluster_means,
    over_all,
)
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.errors import DataError
from largescale.host.files import append_line
from largescale.host.signals import stop_requested
from largescale.models.build import latent_shape

WEIGHTS = {"EMA": "ema", "raw weights": "master"}


class ValidationLoss:
    """A fixed set of noised images, and the losses of checkpoints on it."""

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

    def rows(self, run: Path) -> list[dict[str, Any]]:
        """What is known of a run's checkpoints by this protocol, in the order of steps."""
        return rows_of_protocol(run / "loss" / RESULTS, self.protocol)

    def add(self, run: Path, step: int) -> None:
        """Measure the EMA and the raw weights of a checkpoint, and append a row to the run's
        results: the loss of each cluster, and over all noise levels. Raises Stopped."""
        # The EMA is what is used; the raw weights show what it hides early in a run.
        trained = load_trained(run, step)
        model = trained.model.to(self.device)
        figures: dict[str, Any] = {}
        for name, kind in WEIGHTS.items():
            model.load_state_dict(named_weights(CheckpointDir.at(run, step), kind))
            clusters = self(model, trained.objective)
            # A loss that is not finite would make every mean and test of the comparison so.
            if not np.isfinite(clusters).all():
                raise DataError(
                    f"{run} at step {step:,}: the validation loss of its {name} is not finite; "
                    "leave this method out, or train it with a lower --optimizer.lr"
                )
            figures[figure(name)] = {"value": over_all(clusters, self.edges)}
            for i, loss in enumerate(clusters.tolist(), 1):
                figures[figure(name, f" C{i}")] = {"value": loss}

        (run / "loss").mkdir(exist_ok=True)
        row = {"step": step, "protocol": self.protocol, "figures": figures}
        append_line(run / "loss" / RESULTS, json.dumps(row))
        shown = [f"{figure(name)} {figures[figure(name)]['value']:.5g}" for name in WEIGHTS]
        print(f"{run} at step {step:,}: {', '.join(shown)}", flush=True)

    @torch.no_grad()
    def __call__(self, model: nn.Module, objective: Objective) -> np.ndarray:
        """The mean of each cluster, C_1 first, (n_clusters,) float64."""
        batches = self._set.losses(model, objective, self.batch_size, self.device, stop_requested)
        losses = [loss.cpu() for _, loss in batches]
        return cluster_means(torch.cat(losses), self.n_clusters)


def figure(weights: str, cluster: str = "") -> str:
    """The name of a loss in rows and tables. `cluster`: "" for all noise levels, " C1" ..."""
    return f"validation loss ({weights}){cluster}"
