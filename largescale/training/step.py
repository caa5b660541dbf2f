"""One optimizer step: draws, forward, backward, update. It depends neither on the log nor on
checkpoints nor on the loop around it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from largescale.condition import drop
from largescale.config.derived import batch_layout
from largescale.config.learning_rate import ema_decay, learning_rate, power_ema_decays
from largescale.config.schema import Config
from largescale.data.augment import AUGMENT_NORMALS, AUGMENT_UNIFORMS, augment
from largescale.data.loader import Batch, to_condition, to_x_start
from largescale.data.shards import ShardDataset
from largescale.diffusion.loss_weighting import OptimisedLosses, make_weighting, weighted
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import PendingVector, Ranks
from largescale.distributed.step_report import RankStatus, StepAccumulator, StepReport, read_report
from largescale.engine.deepspeed_engine import Engine, adam
from largescale.engine.optimizer import build_optimizer
from largescale.models.build import build_model, flops_per_image, latent_shape, set_up_blocks
from largescale.models.compile import Compiled, what_to_compile
from largescale.models.embedders import CaptionEmbedder
from largescale.randomness import Draws, step_draws, stream_seed
from largescale.training.first_weights import FirstWeights
from largescale.training.state import TrainingState

Lap = Callable[[str], AbstractContextManager[None]]  # times a named part of a step


class TrainStep:
    """The model, DeepSpeed's engine and the loss: takes one optimizer step at a time."""

    def __init__(
        self,
        config: Config,
        ds: dict[str, Any],
        ranks: Ranks,
        dataset: ShardDataset,
        objective: Objective,
        state: TrainingState,
        first_weights: FirstWeights | None = None,
    ):
        """Build the model and DeepSpeed's engine. Collective.

        `ds`: DeepSpeed's settings. `state` is read at every step (which inputs, which noise levels)
        and changed by the caller alone. `first_weights`: in place of random ones.
        """
        self.config = config
        self.ranks = ranks
        self.objective = objective
        self.state = state
        self.data_info = dataset.info
        self.micro_batch_size, self.grad_accum_steps = batch_layout(config, ranks.world_size)
        self.shape = latent_shape(config.model)
        self.weighting = make_weighting(config.noise)

        # Every rank draws the same first weights.
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        if first_weights is not None:
            ranks.raise_on_all_ranks(lambda: first_weights.load_into(model, config))
        set_up_blocks(model, config.train)
        if isinstance(model.y_embedder, CaptionEmbedder) and config.model.null_caption == "encoded":
            model.y_embedder.set_null_caption(*map(torch.tensor, dataset.empty_caption))
        model.to(ranks.device)
        # A backward pass takes twice the operations of the forward pass.
        self.flops = 3 * flops_per_image(model) * config.train.global_batch_size

        # The engine changes what the module's parameters point to: blocks are compiled after it.
        optimizer = partial(
            build_optimizer,
            config=config.optimizer,
            device=config.train.device,
            deepspeed_adam=adam,
        )
        self.engine = Engine(model, optimizer, ds)
        # DeepSpeed makes its group of ranks itself, with torch's time limit: ten minutes for NCCL.
        ranks.limit_waiting(self.engine.reduction_group)
        what = what_to_compile(config.train.compile, config.train.device, config.model.architecture)
        self.compiled = Compiled(model, what, config.train.device)

        # This rank's row numbers in the global batch: (grad_accum_steps, micro_batch_size).
        self._edges = torch.tensor(state.curriculum.edges, dtype=torch.float64, device=ranks.device)
        rows = torch.arange(config.train.global_batch_size, device=ranks.device)
        rows = rows.view(self.grad_accum_steps, ranks.world_size, self.micro_batch_size)
        self._rows = rows[:, ranks.rank]

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
            draws = self.draws()
            accumulator = self._accumulator()
        step = self.state.step
        self.engine.set_rates(
            lr=learning_rate(self.config, step),
            ema_decay=ema_decay(self.config, step),
            power_ema_decays=power_ema_decays(self.config, step),
        )
        applied = False
        pending = None
        for k in range(self.grad_accum_steps):
            last = k == self.grad_accum_steps - 1
            with lap("forward"):
                losses, t, importance = self.micro_step_losses(self.engine, batch, draws, k)
                # Not a number, so that no rank applies the step.
                if unread:
                    losses = losses._replace(loss=losses.loss * math.nan)

            # The last forward pass completes the vector that all ranks sum, which happens while the
            # backward pass runs.
            with lap("agree"):
                accumulator.add(losses, self.objective.noise_level(t), importance, self._rows[k])
                if last:
                    pending = self.ranks.start_all_reduce(
                        accumulator.vector(status(), cannot_read=unread)
                    )
            with lap("backward"):
                self.engine.backward(losses.loss.mean())
            with lap("optimizer"):
                applied = self.engine.advance()

        # Read last, when the sum is ready: the optimizer's step has waited for the device.
        with lap("agree"):
            assert isinstance(pending, PendingVector)
            n_clusters = self.state.curriculum.n_clusters
            return read_report(pending.read(), n_clusters, accumulator.n_rows), applied

    def _accumulator(self) -> StepAccumulator:
        # Rows are reported one by one only where the draw of noise levels follows their losses: it
        # makes the vector as long as the global batch.
        if not self.state.noise_sampler.needs_losses:
            return StepAccumulator(self._edges, self.ranks.rank, self.ranks.world_size)
        return StepAccumulator(
            self._edges,
            self.ranks.rank,
            self.ranks.world_size,
            n_rows=self.config.train.global_batch_size,
            n_bins=self.config.diffusion.timesteps,
        )

    def draws(self) -> Draws:
        """Every random number of the next step, for the global batch."""
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
    ) -> tuple[OptimisedLosses, Tensor, Tensor]:
        """This rank's k-th micro step: (losses, times, importance), (B,) each. Importance is the
        factor by which the draw of noise levels has multiplied a row's loss."""
        info = self.data_info
        objective = self.objective

        # The images and their conditions, dropped at random for classifier-free guidance.
        draws = draws.rows(self._rows[k])
        rows = {name: values[k] for name, values in batch.items()}
        x_start = to_x_start(rows["latent"], info.kind, info.normalization, draws.posterior)
        y = drop(to_condition(rows), draws.dropout, self.config.model.num_classes)

        # EDM's augmentation, whose parameters the network sees. Its normal draws are the inverse
        # distribution function of uniform ones.
        if draws.augment is not None:
            uniform, normal = draws.augment.split((AUGMENT_UNIFORMS, AUGMENT_NORMALS), dim=1)
            x_start, labels = augment(
                x_start, uniform, torch.special.ndtri(normal), self.config.data.augment
            )
            model = partial(model, augment_labels=labels)

        # The active noise levels, and within them the draw that noise.sampling bends.
        self._seed_network(k)
        active = self.state.curriculum.active
        v, importance = self.state.noise_sampler.warp(
            draws.v, *objective.snap_to_timesteps(*active)
        )
        t = objective.draw(v, *active)

        # The loss of each row, by the objective and then by the weighting.
        losses = objective.training_losses(model, x_start, t, draws.noise, y)
        weight = self.weighting(objective.log_snr(t), objective.x_start_weight(t))
        return weighted(losses, weight, importance), t, importance

    def _seed_network(self, k: int) -> None:
        """Seed torch's own generator, from which DDPM++ drops activations, for each (step, micro
        step, rank)."""
        if self.config.model.architecture != "ddpmpp":
            return
        # A number that no other (step, micro step, rank) of the run has.
        part = (self.state.input_step * self.grad_accum_steps + k) * self.ranks.world_size
        part += self.ranks.rank
        torch.manual_seed(stream_seed(self.config.train.seed, "network", part))

    def repeated_micro_steps(
        self,
        batch: Batch,
        heartbeat: Callable[[], None],
    ) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """This rank's micro steps once more, outside DeepSpeed: each gives losses (B,) and clusters
        (B,), 1 for C_1."""
        # The same draws as in the step itself, which follow from the seed and the step.
        draws = self.draws()

        def micro_step(k: int) -> tuple[Tensor, Tensor]:
            heartbeat()
            losses, t, _ = self.micro_step_losses(self.engine.module, batch, draws, k)
            levels = self.objective.noise_level(t)
            return losses.loss, 1 + torch.bucketize(levels, self._edges[1:-1], right=True)

        return [partial(micro_step, k) for k in range(self.grad_accum_steps)]
