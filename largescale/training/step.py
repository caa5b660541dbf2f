"""One optimizer step: draws, forward, backward, update. It knows neither log nor checkpoints nor
the loop around it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.condition import drop
from largescale.config.derived import batch_layout
from largescale.config.schema import Config
from largescale.data.augment import AUGMENT_NORMALS, AUGMENT_UNIFORMS, augment
from largescale.data.loader import Batch, to_condition, to_x_start
from largescale.data.shards import ShardDataset
from largescale.diffusion.loss_weighting import make_weighting, weighted
from largescale.diffusion.objective import Losses, Objective
from largescale.distributed.ranks import PendingVector, Ranks
from largescale.distributed.step_report import RankStatus, StepAccumulator, StepReport, read_report
from largescale.engine.deepspeed_engine import Engine, adam
from largescale.engine.optimizer import build_optimizer
from largescale.models.build import build_model, flops_per_image, latent_shape
from largescale.models.compile import Compiled, what_to_compile
from largescale.models.embedders import CaptionEmbedder
from largescale.randomness import Draws, step_draws, stream_seed
from largescale.training.state import TrainingState

Lap = Callable[[str], AbstractContextManager[None]]  # times a named part of a step


class TrainStep:
    def __init__(
        self,
        config: Config,
        ds: dict[str, Any],
        ranks: Ranks,
        dataset: ShardDataset,
        objective: Objective,
        state: TrainingState,
    ):
        """Collective: builds the model and DeepSpeed's engine. `ds`: DeepSpeed's settings. `state`
        is read at every step (which inputs, which noise levels) and moved by the caller alone."""
        self.config, self.ranks, self.objective, self.state = config, ranks, objective, state
        self.data_info = dataset.info
        self.micro_batch_size, self.grad_accum_steps = batch_layout(config, ranks.world_size)
        self.shape = latent_shape(config.model)
        self.weighting = make_weighting(config.noise)

        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        model.checkpoint_blocks = config.train.activation_checkpointing
        if isinstance(model.y_embedder, CaptionEmbedder) and config.model.null_caption == "encoded":
            model.y_embedder.set_null_caption(*map(torch.tensor, dataset.empty_caption))
        model.to(ranks.device)
        # A backward pass takes twice the operations of the forward pass.
        self.flops = 3 * flops_per_image(model) * config.train.global_batch_size
        optimizer = partial(
            build_optimizer,
            config=config.optimizer,
            device=config.train.device,
            deepspeed_adam=adam,
        )
        self.engine = Engine(model, optimizer, ds)
        what = what_to_compile(config.train.compile, config.train.device, config.model.architecture)
        self.compiled = Compiled(model, what, config.train.device)

        self._edges = torch.tensor(state.curriculum.edges, dtype=torch.float64, device=ranks.device)
        rows = torch.arange(config.train.global_batch_size, device=ranks.device)
        # This rank's row numbers in the global batch: (grad_accum_steps, micro_batch_size).
        self._rows = rows.view(self.grad_accum_steps, ranks.world_size, self.micro_batch_size)[
            :, ranks.rank
        ]

    def forward_backward(
        self,
        batch: Batch,
        status: Callable[[], RankStatus],
        lap: Lap,
        *,
        unread: bool = False,
    ) -> tuple[StepReport, bool]:
        """Try one optimizer step on this rank's part of the global batch.

        Returns what all ranks know of it, and whether it was applied: in fp16 a gradient that
        overflows is not. `status` is asked once, as late as possible. `unread`: this rank could not
        read its batch, and another stands in its place; the loss is made one that no rank applies.
        """
        with lap("draws"):
            draws, accumulator = self.draws(), self._accumulator()
        applied, pending = False, None
        for k in range(self.grad_accum_steps):
            last = k == self.grad_accum_steps - 1
            with lap("forward"):
                losses, t, importance = self.micro_step_losses(self.engine, batch, draws, k)
                if unread:
                    losses = losses._replace(loss=losses.loss * math.nan)
            with lap("agree"):
                accumulator.add(losses, self.objective.noise_level(t), importance, self._rows[k])
                if last:  # summed over ranks while the backward pass runs
                    pending = self.ranks.launch(accumulator.vector(status(), cannot_read=unread))
            with lap("backward"):
                self.engine.backward(losses.loss.mean())
            with lap("optimizer"):
                applied = self.engine.advance()
        with lap("agree"):
            assert isinstance(pending, PendingVector)
            return read_report(
                pending.read(), self.state.curriculum.n_clusters, accumulator.n_rows
            ), applied

    def _accumulator(self) -> StepAccumulator:
        if not self.state.noise_sampler.needs_losses:
            return StepAccumulator(self._edges, self.ranks.rank, self.ranks.world_size)
        train, bins = self.config.train, self.config.diffusion.timesteps
        return StepAccumulator(
            self._edges,
            self.ranks.rank,
            self.ranks.world_size,
            n_rows=train.global_batch_size,
            n_bins=bins,
        )

    def draws(self) -> Draws:
        """Every random number of the next step, for the whole global batch."""
        return step_draws(
            self.config.train.seed,
            self.state.input_step,
            self.config.train.global_batch_size,
            self.shape,
            dropout_prob=self.config.model.class_dropout_prob,
            posterior=self.data_info.kind == "moments",
            device=self.ranks.device,
            augment=AUGMENT_UNIFORMS + AUGMENT_NORMALS if self.config.data.augment else 0,
        )

    def micro_step_losses(
        self, model: Any, batch: Batch, draws: Draws, k: int
    ) -> tuple[Losses, Tensor, Tensor]:
        """This rank's k-th micro step: (losses as they are optimised, times, importance), (B,)
        each. Importance is the factor by which the draw of noise levels has multiplied a row's
        loss."""
        info, objective = self.data_info, self.objective
        draws = draws.rows(self._rows[k])
        rows = {name: values[k] for name, values in batch.items()}
        x_start = to_x_start(rows["latent"], info.kind, info.scale_factor, draws.posterior)
        y = drop(to_condition(rows), draws.dropout, self.config.model.num_classes)
        if draws.augment is not None:
            uniform, normal = draws.augment.split((AUGMENT_UNIFORMS, AUGMENT_NORMALS), dim=1)
            x_start, labels = augment(
                x_start, uniform, torch.special.ndtri(normal), self.config.data.augment
            )
            model = partial(model, augment_labels=labels)
        self._seed_network(k)
        # The active noise levels, and within them the draw that noise.sampling bends.
        active = self.state.curriculum.active
        v, importance = self.state.noise_sampler.warp(
            draws.v, *objective.snap_to_timesteps(*active)
        )
        t = objective.draw(v, *active)
        losses = objective.training_losses(model, x_start, t, draws.noise, y)
        weight = self.weighting(objective.log_snr(t), objective.x_start_weight(t))
        return losses._replace(loss=weighted(losses, weight, importance)), t, importance

    def _seed_network(self, k: int) -> None:
        """DDPM++ drops activations by torch's own generator: a seed for each (step, micro step,
        rank)."""
        if self.config.model.architecture != "ddpmpp":
            return
        layout = (self.grad_accum_steps, self.ranks.world_size)
        part = np.ravel_multi_index(
            (k, self.ranks.rank), layout
        ) + self.state.input_step * math.prod(layout)
        torch.manual_seed(stream_seed(self.config.train.seed, "network", int(part)))

    def repeated_micro_steps(
        self,
        batch: Batch,
        heartbeat: Callable[[], None],
    ) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """This rank's micro steps once more, outside DeepSpeed: each gives losses (B,) and clusters
        (B,), 1 for C_1."""
        draws = self.draws()

        def micro_step(k: int) -> tuple[Tensor, Tensor]:
            heartbeat()
            losses, t, _ = self.micro_step_losses(self.engine.module, batch, draws, k)
            return losses.loss, 1 + torch.bucketize(
                self.objective.noise_level(t), self._edges[1:-1], right=True
            )

        return [partial(micro_step, k) for k in range(self.grad_accum_steps)]
