"""The loss that runs of one comparison have in common: unweighted, per noise cluster, on a fixed
set of (image, u, noise), whatever noise levels and weights each was trained with."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.curve import lines
from eval.score import RESULTS
from largescale.checkpoint.files import CheckpointDir, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.condition import select, to_device
from largescale.config.schema import Config
from largescale.data.loader import to_condition, to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.errors import DataError, Stopped
from largescale.host.files import append_line
from largescale.host.signals import stop_requested
from largescale.models.build import latent_shape
from largescale.randomness import step_draws

SEED = 0x5EED  # of this set, the same for runs of all seeds
WEIGHTS = {"EMA": "ema", "raw weights": "master"}


class ValidationLoss:
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
        self.edges, self.batch_size, self.device = edges, batch_size, device
        self.n_clusters, n, info = len(edges) - 1, images * (len(edges) - 1), data.info
        inside = (np.arange(images) + 0.5) / images
        self._u = torch.from_numpy(
            np.concatenate([a + inside * (b - a) for a, b in itertools.pairwise(edges)])
        )
        # on the CPU: the same numbers on every device
        draws = step_draws(
            SEED,
            0,
            n,
            latent_shape(config.model),
            dropout_prob=0.0,
            posterior=info.kind == "moments",
            device=torch.device("cpu"),
        )
        rows = {
            name: torch.from_numpy(values)
            for name, values in data.gather(
                sample_indices(np.arange(n), len(data), SEED),
                choice=np.zeros(n) if config.model.max_caption_tokens else None,
            ).items()
        }
        self._x_start = to_x_start(rows["latent"], info.kind, info.scale_factor, draws.posterior)
        self._noise, self._y = draws.noise, to_condition(rows)
        self.protocol = {
            "data": data.fingerprint,
            "edges": list(edges),
            "images": images,
            "seed": SEED,
        }

    def rows(self, run: Path) -> list[dict[str, Any]]:
        """What is known of a run's checkpoints by this protocol, in the order of steps."""
        found = {
            line["step"]: line
            for line in lines(run / "loss" / RESULTS)
            if line.get("protocol") == self.protocol
        }
        return [found[step] for step in sorted(found)]

    def add(self, run: Path, step: int) -> None:
        """Of the EMA and of the raw weights: the loss of each cluster, and over all noise levels.
        Raises Stopped."""
        trained = load_trained(run, step)
        model, figures = trained.model.to(self.device), dict[str, Any]()
        for name, kind in WEIGHTS.items():
            model.load_state_dict(named_weights(CheckpointDir.at(run, step), kind))
            clusters = self(model, trained.objective)
            if not np.isfinite(clusters).all():
                raise DataError(
                    f"{run} at step {step:,}: the validation loss of its {name} is not finite; "
                    "leave this method out, or train it with a lower --optimizer.lr"
                )
            each = {
                "": float(np.dot(clusters, np.diff(self.edges))),
                **{f" C{i}": loss for i, loss in enumerate(clusters.tolist(), 1)},
            }
            figures |= {figure(name, cluster): {"value": loss} for cluster, loss in each.items()}
        (run / "loss").mkdir(exist_ok=True)
        append_line(
            run / "loss" / RESULTS,
            json.dumps({"step": step, "protocol": self.protocol, "figures": figures}),
        )
        print(
            f"{run} at step {step:,}: "
            + ", ".join(f"{figure(name)} {figures[figure(name)]['value']:.5g}" for name in WEIGHTS),
            flush=True,
        )

    @torch.no_grad()
    def __call__(self, model: nn.Module, objective: Objective) -> np.ndarray:
        """The mean of each cluster, C_1 first, (n_clusters,) float64."""
        losses = []
        for part in torch.arange(len(self._u)).split(self.batch_size):
            if stop_requested():
                raise Stopped
            t = objective.draw(self._u[part].to(self.device))
            x_start, noise = (
                values[part].to(self.device) for values in (self._x_start, self._noise)
            )
            y = to_device(select(self._y, part), self.device)
            losses.append(
                objective.training_losses(model, x_start, t, noise, y).loss.double().cpu()
            )
        means: Tensor = torch.cat(losses).view(self.n_clusters, -1).mean(1)
        return means.numpy()


def figure(weights: str, cluster: str = "") -> str:
    """As rows name it; cluster: "" for all noise levels, " C1" ..."""
    return f"validation loss ({weights}){cluster}"


def check_like(validation: ShardDataset, training: ShardDataset) -> None:
    """Raises DataError where the sets are not of one kind, but for their names."""
    for key in ("kind", "shape", "num_classes", "scale_factor", "encoders", "captions"):
        theirs, ours = (getattr(data.info, key) for data in (validation, training))
        if theirs != ours:
            raise DataError(
                f"--validation {validation.path} has {key}={theirs}, the training set "
                f"{training.path} has {ours}; pack it in the same way, or leave it out"
            )
