"""The loop. Everything that a step decides follows from the agreed vector, so every rank decides alike."""

import json
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from largescale import agreed
from largescale.build import build_diffusion, build_model, latent_shape
from largescale.checkpoint import Checkpointer
from largescale.checkpoint_files import CheckpointDir, client_state
from largescale.config import Config, batch_layout, cluster_edges, pacing
from largescale.curriculum import Curriculum
from largescale.data.loader import Batch, Loader, to_condition, to_x_start
from largescale.data.shards import ShardDataset
from largescale.diffusion.gaussian import Losses
from largescale.distributed import PendingVector, Ranks
from largescale.draws import Draws, step_draws
from largescale.ds_config import precision
from largescale.engine import Engine
from largescale.errors import CheckpointError, NonFiniteError
from largescale.meter import Meter
from largescale.models.conditioning import CaptionEmbedder, drop
from largescale.models.dit import flops_per_image
from largescale.optim import build_optimizer
from largescale.preview import Preview
from largescale.reference import ReferenceLoss
from largescale.signals import stop_requested
from largescale.telemetry import Telemetry


class Trainer:
    def __init__(self, config: Config, ds: dict[str, Any], ranks: Ranks, dataset: ShardDataset,
                 checkpointer: Checkpointer, identity: dict[str, Any]):
        """`identity`: what the checkpoint must say about the run besides its progress (see train.py)."""
        self.config, self.ranks, self.dataset, self.checkpointer = config, ranks, dataset, checkpointer
        self.identity = identity
        self.micro_batch_size, self.grad_accum_steps = batch_layout(config, ranks.world_size)
        self.shape = latent_shape(config.model)
        self.curriculum = Curriculum(cluster_edges(config), pacing(config))
        self.diffusion = build_diffusion(config.diffusion, config.model.learn_sigma)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        if isinstance(model.y_embedder, CaptionEmbedder) and config.model.null_caption == "encoded":
            model.y_embedder.set_null_caption(*map(torch.tensor, dataset.empty_caption))
        model.to(ranks.device)
        flops = 3 * flops_per_image(model) * config.train.global_batch_size
        self.engine = Engine(model, partial(build_optimizer, config=config.optimizer, device=config.train.device), ds)
        self.meter = Meter(config.train.global_batch_size, flops, ranks, precision(ds), self.curriculum.n_clusters)
        self.step = 0           # applied optimizer steps
        self.skipped_steps = 0  # attempts whose gradient overflowed in fp16
        self._edges = torch.tensor(self.curriculum.edges, dtype=torch.float64, device=ranks.device)
        rows = torch.arange(config.train.global_batch_size, device=ranks.device)
        self._rows = rows.view(self.grad_accum_steps, ranks.world_size, self.micro_batch_size)[:, ranks.rank]

    # ---- state

    def state(self) -> dict[str, Any]:
        return {
            **self.identity,
            "step": self.step,
            "samples_seen": self.step * self.config.train.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "curriculum": self.curriculum.state_dict(),
        }

    def resume(self, checkpoint: CheckpointDir) -> None:
        """Collective."""
        def read() -> dict[str, Any]:
            manifest, state = checkpoint.manifest(), client_state(checkpoint)
            if manifest["state"] != json.loads(json.dumps(state)):
                raise CheckpointError(f"{checkpoint.path}: the manifest's copy of the state is not the checkpoint's")
            self.engine.load(checkpoint, manifest["world_size"])
            return state

        state = self.ranks.together(read)
        self.engine.gather_weights()
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.curriculum.load_state_dict(state["curriculum"])

    # ---- the loop

    def run(self, telemetry: Telemetry) -> bool:
        """Train to the last step, or until a rank is asked to stop. True if the run is finished."""
        c = self.config
        self.telemetry = telemetry
        self.preview = self.ranks.together(
            lambda: Preview(c, self.diffusion, self.engine, self.ranks, self.dataset)
        )
        self.reference = self.ranks.together(lambda: ReferenceLoss(
            c, self.dataset, self.diffusion, self.curriculum.edges, self.ranks, self.micro_batch_size, self.shape
        ))
        self.save()
        self.finish_checkpoint(required=True)  # step 0 proves, before GPU time is spent, that it can be saved at all
        stop = False
        with Loader(
            self.dataset, seed=c.train.seed, global_batch_size=c.train.global_batch_size,
            micro_batch_size=self.micro_batch_size, rank=self.ranks.rank, world_size=self.ranks.world_size,
            flip=c.data.horizontal_flip, captions=c.model.caption_tokens > 0,
            start_step=self.step, prefetch=c.data.prefetch, pin_memory=c.train.device == "cuda",
        ) as loader:
            self.meter.restart()
            while self.step < c.train.steps and not stop:
                with self.meter.lap("data"):
                    batch = loader.batch(self.step)
                retryable = self.engine.can_lower_loss_scale
                report, applied = self.attempt(batch)
                self.require_finite(report, applied or retryable, batch)
                if self.checkpointer.pending and not report.writing:
                    self.finish_checkpoint()
                if applied:
                    self.count(report)
                    self.do_what_is_due()
                else:
                    self.skipped_steps += 1  # the same inputs again, at a lower loss scale
                stop = report.stop
        if stop and self.step < c.train.steps:
            telemetry.say(f"asked to stop: saving at step {self.step}")
        self.save()
        self.finish_checkpoint(required=True)
        return self.step >= c.train.steps

    def attempt(self, batch: Batch) -> tuple[agreed.Report, bool]:
        """One optimizer step's work: (what all ranks know of it, whether it was applied)."""
        lap = self.meter.lap
        with lap("draws"):
            draws, tally = self.draws(), agreed.Tally(self._edges, self.ranks.rank, self.ranks.world_size)
        applied, pending = False, None
        for k in range(self.grad_accum_steps):
            with lap("forward"):
                losses, t = self.losses(self.engine, batch, draws, k)
            with lap("agree"):
                tally.add(losses, self.diffusion.noise_level(t))
                if k == self.grad_accum_steps - 1:
                    pending = self.ranks.launch(
                        tally.vector(stop=stop_requested(), writing=self.checkpointer.writing)
                    )
            with lap("backward"):
                self.engine.backward(losses.loss.mean())
            with lap("optimizer"):
                applied = self.engine.advance()
        with lap("agree"):
            assert isinstance(pending, PendingVector)
            return agreed.read(pending.read(), self.curriculum.n_clusters), applied

    def draws(self) -> Draws:
        return step_draws(
            self.config.train.seed, self.step, self.config.train.global_batch_size, self.shape,
            dropout_prob=self.config.model.class_dropout_prob,
            posterior=self.dataset.info.kind == "moments", device=self.ranks.device,
        )

    def losses(self, model: Any, batch: Batch, draws: Draws, k: int) -> tuple[Losses, Tensor]:
        """Of this rank's k-th micro step: losses (B,) and timesteps (B,)."""
        info, device = self.dataset.info, self.ranks.device
        draws = draws.rows(self._rows[k])
        rows = {name: values[k].to(device, non_blocking=True) for name, values in batch.items()}
        x_start = to_x_start(rows["latent"], info.kind, info.scale_factor, draws.posterior)
        y = drop(to_condition(rows), draws.dropout, self.config.model.num_classes)
        t = self.diffusion.timesteps(draws.v, self.curriculum.lowest)
        return self.diffusion.training_losses(model, x_start, t, draws.noise, y), t

    def count(self, report: agreed.Report) -> None:
        """An applied step: the only thing that moves the step counter and the curriculum."""
        self.step += 1
        self.meter.count(report)
        before = self.curriculum.state
        if self.curriculum.observe(report.loss):
            index, lowest = self.curriculum.index, self.curriculum.lowest
            active = f"training on u in [{lowest:.3g}, 1)" if lowest else "training on all noise levels"
            done = "the curriculum is complete" if index == 0 else active
            self.telemetry.event(
                self.step, "transition", f"step {self.step}: curriculum index {before.index} -> {index}, {done}",
                index=index, lowest=lowest,
            )

    def do_what_is_due(self) -> None:
        """Between two steps, on every rank alike."""
        c, step = self.config, self.step
        if step % c.telemetry.log_every == 0 or step == c.train.steps:
            self.log()
        self.telemetry.progress(step)
        if c.telemetry.reference_every and step % c.telemetry.reference_every == 0:
            with self.meter.lap("reference"):
                self.telemetry.log(step, self.reference(self.engine.module))
        if step % c.checkpoint.every == 0:
            self.save()
        if c.telemetry.preview_every and step % c.telemetry.preview_every == 0:
            with self.meter.lap("preview"):
                self.preview(step, self.telemetry)

    # ---- what is due now and then

    def log(self) -> None:
        state, curriculum = self.curriculum.state, self.curriculum
        metrics = {
            **self.meter.read(),
            "curriculum/index": state.index,
            "curriculum/lowest": curriculum.lowest,
            "curriculum/patience": state.patience_count,
            "curriculum/best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
            "optimizer/lr": self.engine.lr,
            "optimizer/grad_norm": self.engine.grad_norm(),
            "optimizer/loss_scale": self.engine.loss_scale,
            "optimizer/skipped_steps": self.skipped_steps,
        }
        self.telemetry.log(self.step, metrics)
        self.telemetry.progress(self.step, loss=f"{metrics['loss']:.4f}", index=state.index)

    def save(self) -> None:
        with self.meter.lap("checkpoint"):
            self.finish_checkpoint()
            self.checkpointer.save(self.step, self.state(), self.engine)

    def finish_checkpoint(self, required: bool = False) -> None:
        """Make a started checkpoint valid. A failed one is said and tried again at the next, unless it is the last."""
        problem = self.checkpointer.finish()
        if problem is not None and required:
            raise CheckpointError(f"{problem}; free space or correct --output, and run again")
        if problem is not None:
            self.telemetry.event(self.step, "checkpoint failed", f"{problem}; training goes on")

    def require_finite(self, report: agreed.Report, going_on: bool, batch: Batch) -> None:
        """Raise NonFiniteError for a loss that is not finite, or a skipped step that a lower loss scale cannot mend.

        The weights are untouched: DeepSpeed skips the update in both cases."""
        if not report.non_finite and going_on:
            return
        self.finish_checkpoint()  # one that is being written is good
        where = f"step {self.step + 1}, curriculum index {self.curriculum.index}"
        if report.non_finite:
            raise NonFiniteError(
                f"the loss is not finite at {where}, on rank {report.non_finite[0]}"
                + (f" and {len(report.non_finite) - 1} more" if len(report.non_finite) > 1 else "")
                + f"; the last good checkpoint is step {self.checkpointer.last_saved}"
            )
        culprits = self.ranks.all_gather_object(self.ranks.together(lambda: self.non_finite_gradient(batch)))
        found = [f"rank {rank} in {name}" for rank, name in enumerate(culprits) if name]
        raise NonFiniteError(
            f"the gradient is not finite at {where} (loss {report.loss:.6g}, loss scale "
            f"{self.engine.loss_scale:g}): {'; '.join(found) or 'finite on every rank before their sum'}; "
            f"the last good checkpoint is step {self.checkpointer.last_saved}"
        )

    def non_finite_gradient(self, batch: Batch) -> str | None:
        """The first parameter whose gradient, from this rank's rows alone, is not finite."""
        named = [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]
        draws = self.draws()
        for k in range(self.grad_accum_steps):
            losses, _ = self.losses(self.engine.module, batch, draws, k)
            gradients = torch.autograd.grad(losses.loss.mean() * self.engine.loss_scale, [p for _, p in named])
            for (name, _), gradient in zip(named, gradients, strict=True):
                if not torch.isfinite(gradient).all():
                    return name
        return None
