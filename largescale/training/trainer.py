"""The loop. Everything that a step decides follows from the agreed vector, so every rank decides alike."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.checkpoint.files import CheckpointDir, client_state
from largescale.condition import drop
from largescale.config.deepspeed import precision
from largescale.config.derived import batch_layout, make_curriculum
from largescale.config.schema import Config
from largescale.curriculum import stage
from largescale.data.augment import AUGMENT_NORMALS, AUGMENT_UNIFORMS, augment
from largescale.data.loader import Batch, DeviceBatches, Loader, to_condition, to_x_start
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_noise_sampler, build_objective
from largescale.diffusion.loss_weighting import make_weighting, weighted
from largescale.diffusion.objective import Losses
from largescale.distributed import step_report
from largescale.distributed.ranks import PendingVector, Ranks
from largescale.distributed.watchdog import Watch
from largescale.engine.deepspeed_engine import Engine, adam
from largescale.engine.optimizer import build_optimizer
from largescale.errors import CheckpointError, DataError, LargescaleError, NonFiniteError, Stopped, StorageError, usable
from largescale.host.signals import stop_requested
from largescale.models.build import build_model, flops_per_image, latent_shape
from largescale.models.compile import Compiled, what_to_compile
from largescale.models.embedders import CaptionEmbedder
from largescale.monitoring.goodput import Goodput
from largescale.monitoring.profiling import Profile
from largescale.monitoring.step_timer import Meter
from largescale.monitoring.telemetry import Telemetry
from largescale.randomness import Draws, step_draws, stream_seed
from largescale.training import trouble
from largescale.training.anomaly import Skip, SpikeWatch, input_step, skipping
from largescale.training.checkpoint_policy import Saving
from largescale.training.preview import Preview
from largescale.training.reference_loss import ReferenceLoss
from largescale.training.trouble import Trouble

READ_AGAIN_S = (1.0, 5.0, 15.0)  # pauses before data that could not be read are tried again


class Trainer:
    def __init__(self, config: Config, ds: dict[str, Any], ranks: Ranks, dataset: ShardDataset,
                 checkpointer: Checkpointer, watch: Watch, identity: dict[str, Any], began_unix_s: float):
        """`identity`: what the checkpoint must say about the run besides its progress (see train.py);
        `began_unix_s`: when the program was started."""
        self.config, self.ranks, self.dataset, self.checkpointer = config, ranks, dataset, checkpointer
        self.watch, self.identity, self.began_unix_s = watch, identity, began_unix_s
        self.micro_batch_size, self.grad_accum_steps = batch_layout(config, ranks.world_size)
        self.shape = latent_shape(config.model)
        self.curriculum = make_curriculum(config)
        self.objective = build_objective(config)
        self.noise_sampler = build_noise_sampler(config, self.objective)
        self.weighting = make_weighting(config.noise)
        torch.manual_seed(config.train.seed)
        model = build_model(config.model)
        model.checkpoint_blocks = config.train.activation_checkpointing
        if isinstance(model.y_embedder, CaptionEmbedder) and config.model.null_caption == "encoded":
            model.y_embedder.set_null_caption(*map(torch.tensor, dataset.empty_caption))
        model.to(ranks.device)
        flops = 3 * flops_per_image(model) * config.train.global_batch_size
        self.engine = Engine(model, partial(
            build_optimizer, config=config.optimizer, device=config.train.device, deepspeed_adam=adam), ds)
        what = what_to_compile(config.train.compile, config.train.device, config.model.architecture)
        self.compiled = Compiled(model, what, config.train.device)
        self.meter = Meter(
            config.train.global_batch_size, flops, ranks, precision(ds), self.curriculum.n_clusters,
            on_lap=lambda name: watch.at(f"{name} of step {self.step + 1}"),
        )
        self.step = 0           # applied optimizer steps
        self.skipped_steps = 0  # attempts whose gradient overflowed in fp16
        self.skips: list[Skip] = []
        self.spikes = SpikeWatch(config.anomaly.spike_factor)
        self.went_back = 0      # by this process
        self._edges = torch.tensor(self.curriculum.edges, dtype=torch.float64, device=ranks.device)
        rows = torch.arange(config.train.global_batch_size, device=ranks.device)
        self._rows_told = len(rows) if self.noise_sampler.needs_losses else 0  # whose losses all ranks learn
        self._rows = rows.view(self.grad_accum_steps, ranks.world_size, self.micro_batch_size)[:, ranks.rank]

    # ---- state

    def state(self) -> dict[str, Any]:
        return {
            **self.identity,
            "step": self.step,
            "samples_seen": self.step * self.config.train.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "curriculum": self.curriculum.state_dict(),
            "noise_sampler": self.noise_sampler.state_dict(),
            "skips": [asdict(skip) for skip in self.skips],
            "spikes": self.spikes.state_dict(),
        }

    def resume(self, checkpoint: CheckpointDir) -> None:
        """Collective."""
        def read() -> dict[str, Any]:
            manifest, state = checkpoint.manifest(), client_state(checkpoint)
            if manifest["state"] != json.loads(json.dumps(state)):
                raise CheckpointError(f"{checkpoint.path}: the manifest's copy of the state is not the checkpoint's")
            with usable(checkpoint.path):
                self.engine.load(checkpoint, manifest["world_size"])
            return state

        state = self.ranks.together(read)
        self.engine.gather_weights()
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.curriculum.load_state_dict(state["curriculum"])
        # What follows is not in every checkpoint of an older version.
        if "noise_sampler" in state:
            self.noise_sampler.load_state_dict(state["noise_sampler"])
        self.skips = [Skip(**skip) for skip in state.get("skips", [])]
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])

    @property
    def input_step(self) -> int:
        """Whose data and draws the next step takes."""
        return input_step(self.step, self.skips)

    # ---- the loop

    def run(self, telemetry: Telemetry) -> bool:
        """Train to the last step, or until a rank is asked to stop. True if the run is finished."""
        c = self.config
        self.telemetry = telemetry
        self.goodput = Goodput(telemetry, self.meter, began_unix_s=self.began_unix_s, device=c.train.device,
                               world_size=self.ranks.world_size, from_step=self.step)
        self.saving = Saving(self.checkpointer, self.engine, self.meter, self.watch, telemetry, self.goodput)
        self.preview = self.ranks.together(
            lambda: Preview(c, self.objective, self.engine, self.ranks, self.dataset, self.asked_to_stop)
        )
        if self.preview.note:
            telemetry.say(self.preview.note)
        self.reference = self.ranks.together(lambda: ReferenceLoss(
            c, self.dataset, self.objective, self.curriculum.edges, self.ranks, self.micro_batch_size, self.shape,
            self.asked_to_stop,
        ))
        ended = None
        try:
            self.watch.limit_s = c.train.timeout_s  # the start is over
            self.saving.save_first(self.step, self.state())
            stopped = self.train() and self.step < c.train.steps
            if stopped:
                telemetry.say(f"asked to stop: saving at step {self.step}")
            self.saving.leave(self.step, self.state(), "stop" if stopped else "end")
            ended = "finished" if self.checkpointer.last_saved >= c.train.steps else "stopped"
        except Exception as error:
            self.watch.wait_if_ending()
            ended = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.goodput.note(self.step, self.checkpointer.last_saved, ended)
        return ended == "finished"

    def train(self) -> bool:
        """Whether it was asked to stop."""
        c, stop = self.config, self.ranks.any(stop_requested())
        with Loader(
            self.dataset, seed=c.train.seed, global_batch_size=c.train.global_batch_size,
            micro_batch_size=self.micro_batch_size, rank=self.ranks.rank, world_size=self.ranks.world_size,
            flip=c.data.horizontal_flip, captions=c.model.caption_tokens > 0,
            start_step=self.input_step, prefetch=c.data.prefetch, pin_memory=c.train.device == "cuda",
        ) as loader, Profile(
            self.meter, self.telemetry, wanted=c.profile, cuda=c.train.device == "cuda",
        ) as profile:
            batches = DeviceBatches(loader, self.ranks.device)
            self.batch: Batch = self.ranks.together(lambda: batches.batch(self.input_step))
            self.meter.begin(self.began_unix_s)
            while self.step < c.train.steps and not stop:
                stop = self.take_step(batches)
                profile.step(self.step)
        return stop

    def take_step(self, batches: DeviceBatches) -> bool:
        """Try to take one; True if a rank was asked to stop."""
        with self.meter.lap("data"):
            unread = self.read(batches)
        scaler, retryable = self.engine.scaler_state(), self.engine.can_lower_loss_scale
        report, applied = self.attempt(unread is not None)
        if report.cannot_read:
            self.engine.load_scaler_state(scaler)
            self.saving.save(self.step, self.state(), "schedule")
            self.saving.finish(self.step)
            raise self.no_data(unread)
        self.saving.look(self.step, report)
        bad = self.find_trouble(report, applied, retryable)
        policy = getattr(self.config.anomaly, bad.kind) if bad else "count"
        if bad and policy == "skip":
            self.go_back(bad)
        elif bad and policy == "stop":
            self.saving.finish(self.step)  # one that is being written is good
            self.tell(bad, bad.text)
            raise NonFiniteError(f"{bad.text}; the last good checkpoint is step {self.checkpointer.last_saved}")
        elif applied:
            if bad:
                self.tell(bad, bad.text)
            self.count(report)
            self.do_what_is_due()
        else:
            self.skipped_steps += 1  # the same inputs again, at a lower loss scale
        return report.stop

    def read(self, batches: DeviceBatches) -> Exception | None:
        """Set `batch` to this step's rows. An error is returned: one rank alone must not leave the others waiting."""
        for pause in (*READ_AGAIN_S, None):
            try:
                self.batch = batches.batch(self.input_step)
                return None
            except DataError as error:
                return error
            except OSError as error:
                if pause is None:
                    return error
                time.sleep(pause)
        raise AssertionError

    def attempt(self, unread: bool) -> tuple[step_report.Report, bool]:
        """One optimizer step's work: (what all ranks know of it, whether it was applied). If this rank's batch is
        `unread`, the step is made one that no rank applies."""
        lap = self.meter.lap
        with lap("draws"):
            draws, tally = self.draws(), step_report.Tally(
                self._edges, self.ranks.rank, self.ranks.world_size, self._rows_told,
                self.config.diffusion.timesteps if self._rows_told else 0)
        applied, pending = False, None
        for k in range(self.grad_accum_steps):
            with lap("forward"):
                losses, t, importance = self.losses(self.engine, self.batch, draws, k)
                if unread:
                    losses = losses._replace(loss=losses.loss * math.nan)
            with lap("agree"):
                tally.add(losses, self.objective.noise_level(t), importance, self._rows[k])
                if k == self.grad_accum_steps - 1:
                    pending = self.ranks.launch(tally.vector(
                        stop=stop_requested(), writing=self.checkpointer.writing,
                        cannot_write=self.checkpointer.failed, cannot_read=unread,
                    ))
            with lap("backward"):
                self.engine.backward(losses.loss.mean())
            with lap("optimizer"):
                applied = self.engine.advance()
        with lap("agree"):
            assert isinstance(pending, PendingVector)
            return step_report.read(pending.read(), self.curriculum.n_clusters, self._rows_told), applied

    def draws(self) -> Draws:
        return step_draws(
            self.config.train.seed, self.input_step, self.config.train.global_batch_size, self.shape,
            dropout_prob=self.config.model.class_dropout_prob,
            posterior=self.dataset.info.kind == "moments", device=self.ranks.device,
            augment=AUGMENT_UNIFORMS + AUGMENT_NORMALS if self.config.data.augment else 0,
        )

    def losses(self, model: Any, batch: Batch, draws: Draws, k: int) -> tuple[Losses, Tensor, Tensor]:
        """Of this rank's k-th micro step: losses, as they are optimised, times, and the resampling's factor on the
        losses, (B,) each."""
        info, objective = self.dataset.info, self.objective
        draws = draws.rows(self._rows[k])
        rows = {name: values[k] for name, values in batch.items()}
        x_start = to_x_start(rows["latent"], info.kind, info.scale_factor, draws.posterior)
        y = drop(to_condition(rows), draws.dropout, self.config.model.num_classes)
        if draws.augment is not None:
            uniform, normal = draws.augment.split((AUGMENT_UNIFORMS, AUGMENT_NORMALS), dim=1)
            x_start, labels = augment(x_start, uniform, torch.special.ndtri(normal), self.config.data.augment)
            model = partial(model, augment_labels=labels)
        if self.config.model.architecture == "ddpmpp":  # drops activations by torch's own generator
            layout = (self.grad_accum_steps, self.ranks.world_size)
            part = np.ravel_multi_index((k, self.ranks.rank), layout) + self.input_step * math.prod(layout)
            torch.manual_seed(stream_seed(self.config.train.seed, "network", int(part)))
        active = self.curriculum.active
        v, importance = self.noise_sampler.warp(draws.v, *objective.active(*active))
        t = objective.draw(v, *active)
        losses = objective.training_losses(model, x_start, t, draws.noise, y)
        weight = self.weighting(objective.log_snr(t), objective.x_start_weight(t))
        return losses._replace(loss=weighted(losses, weight, importance)), t, importance

    def count(self, report: step_report.Report) -> None:
        """An applied step: the only thing that moves the step counter and the curriculum."""
        self.step += 1
        self.meter.count(report)
        self.spikes.observe(report.loss)
        if self.noise_sampler.needs_losses:
            self.noise_sampler.observe([int(n) for n in report.row_bin], report.row_loss)
        before = self.curriculum.state
        if self.curriculum.observe(report.loss):
            self.spikes.new_stage()
            index, (lowest, highest) = self.curriculum.index, self.curriculum.active
            active = f"{stage(index, self.curriculum.n_clusters)}, training on u in [{lowest:.3g}, {highest:.3g})"
            done = "the curriculum is complete" if index == 0 else active
            self.telemetry.event(
                self.step, "transition", f"step {self.step}: curriculum index {before.index} -> {index}, {done}",
                index=index, lowest=lowest, highest=highest,
            )

    def do_what_is_due(self) -> None:
        """Between two steps, on every rank alike."""
        c, step = self.config, self.step
        if step % c.telemetry.log_every == 0 or step == c.train.steps:
            self.log()
        self.telemetry.progress(step)
        if c.telemetry.reference_every and step % c.telemetry.reference_every == 0:
            with self.aside("reference"):
                self.telemetry.log(step, self.reference(self.engine.module))
        if self.saving.due(step):
            self.saving.save(step, self.state(), "schedule")
        if c.telemetry.preview_every and step % c.telemetry.preview_every == 0:
            self.saving.finish(step)  # a preview takes its time
            with self.aside("preview"):
                self.preview(step, self.telemetry)

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Something to look at, which is left out when the run is asked to stop; nothing is compiled for it."""
        with self.meter.lap(name), self.compiled.eager():
            try:
                yield
            except Stopped:
                self.telemetry.say(f"the {name} of step {self.step} is left out")

    def asked_to_stop(self) -> bool:
        """For what takes long beside training: a sign of life too."""
        self.watch.at(self.watch.where)
        return stop_requested()

    def log(self) -> None:
        state, curriculum = self.curriculum.state, self.curriculum
        self.goodput.note(self.step, self.checkpointer.last_saved)
        metrics = {
            **self.meter.read(),
            "curriculum/index": state.index,
            "curriculum/lowest": curriculum.active[0],
            "curriculum/highest": curriculum.active[1],
            "curriculum/patience": state.patience_count,
            "curriculum/best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
            "optimizer/lr": self.engine.lr,
            "optimizer/grad_norm": self.engine.grad_norm(),
            "optimizer/loss_scale": self.engine.loss_scale,
            "optimizer/skipped_steps": self.skipped_steps,
            "anomaly/spikes": self.spikes.spikes,
            "anomaly/skips": len(self.skips),
            **self.goodput.metrics(),
        }
        self.telemetry.log(self.step, metrics)
        parts = {key: f"{metrics[key]:.4f}" for key in ("loss", "mse", "vb") if metrics[key]}
        where = f"{state.index} ({stage(state.index, curriculum.n_clusters)})"
        self.telemetry.progress(self.step, **parts, index=where)

    # ---- when something goes wrong

    def no_data(self, error: Exception | None) -> LargescaleError:
        """What every rank raises when one got no data."""
        errors = self.ranks.all_gather_json(error and (isinstance(error, DataError), str(error)))
        (damaged, text), rank = next((e, rank) for rank, e in enumerate(errors) if e)
        text = f"rank {rank} cannot read the data of step {self.step + 1}: {text}"
        if damaged:
            fatal: LargescaleError = DataError(text)
            fatal.agreed = True
            return fatal
        return StorageError(f"{text}; saved at step {self.checkpointer.last_saved}, the same command goes on")

    def find_trouble(self, report: step_report.Report, applied: bool, retryable: bool) -> Trouble | None:
        """`retryable`: a step that was not applied can be tried again at a lower loss scale."""
        where = f"step {self.step + 1}, curriculum index {self.curriculum.index}"
        if report.non_finite:
            return trouble.loss_not_finite(report, where)
        if not applied and not retryable:
            with self.compiled.eager():
                found = self.ranks.all_gather_json(
                    trouble.find_gradient(self.engine.module, self.micro_steps(), self.engine.loss_scale)
                )
            return trouble.gradient_not_finite(report, where, self.engine.loss_scale, found)
        if applied and self.spikes.is_spike(report.loss):
            return trouble.spike(report, self.spikes.usual, where)
        return None

    def micro_steps(self) -> list[Callable[[], tuple[Tensor, Tensor]]]:
        """This rank's part of the step again, outside DeepSpeed."""
        draws = self.draws()

        def micro_step(k: int) -> tuple[Tensor, Tensor]:
            self.watch.at("diagnosis")
            losses, t, _ = self.losses(self.engine.module, self.batch, draws, k)
            return losses.loss, 1 + torch.bucketize(self.objective.noise_level(t), self._edges[1:-1], right=True)

        return [partial(micro_step, k) for k in range(self.grad_accum_steps)]

    def go_back(self, bad: Trouble) -> None:
        """To the last good checkpoint, and on without the inputs from there to here."""
        self.saving.finish(self.step)
        if self.checkpointer.pending:  # a file system that does not answer: what it writes later belongs to no run
            raise NonFiniteError(f"{bad.text}; a checkpoint is still being written, so it cannot go back")
        if self.went_back >= self.config.anomaly.max_skips or len(self.skips) >= self.config.anomaly.max_skips:
            raise NonFiniteError(
                f"{bad.text}; anomaly.max_skips={self.config.anomaly.max_skips} windows of data were left out already; "
                f"the last good checkpoint is step {self.checkpointer.last_saved}"
            )
        checkpoint = self.checkpointer.newest(self.telemetry.say)
        assert checkpoint is not None  # that of step 0 at least
        skips, step = self.skips, self.step
        self.goodput.went_back(checkpoint.step, bad.text)
        self.resume(checkpoint)
        self.went_back += 1
        self.skips = skipping(step, self.step, skips, bad.text)
        self.telemetry.go_back(self.step)
        self.meter.restart()
        left_out = self.skips[-1].count
        self.tell(bad, f"{bad.text}; went back to step {self.step}, leaving out the inputs of {left_out} steps")

    def tell(self, bad: Trouble, text: str) -> None:
        self.telemetry.event(self.step, bad.kind.replace("_", " "), text, ranks=bad.ranks, clusters=bad.clusters)
