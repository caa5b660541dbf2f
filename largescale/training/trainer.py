"""The training loop. Everything that is decided at a step follows from the vector that all ranks
sum, so every rank decides the same."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.config.schema import Config
from largescale.data.loader import Batch, DeviceBatches, Loader
from largescale.data.shards import ShardDataset
from largescale.distributed.ranks import Ranks
from largescale.distributed.step_report import RankStatus, StepReport
from largescale.errors import DataError, LargescaleError, NonFiniteError, Stopped, StorageError
from largescale.host.signals import stop_requested
from largescale.training.anomalies import STOP_REMEDIES, Anomalies, Anomaly
from largescale.training.checkpoint_policy import CheckpointPolicy
from largescale.training.ema_snapshots import EmaSnapshots
from largescale.training.preview import Preview
from largescale.training.recorder import Recorder
from largescale.training.reference_loss import ReferenceLoss
from largescale.training.state import TrainingState, load_checkpoint, skips_after_rollback
from largescale.training.step import TrainStep
from largescale.training.validation_loss import ValidationLoss

# Pauses before data that could not be read are tried again.
READ_RETRY_S = (1.0, 5.0, 15.0)


class Trainer:
    """Trains to the last step: takes steps, handles anomalies, saves, and logs."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        dataset: ShardDataset,
        train_step: TrainStep,
        state: TrainingState,
        checkpointer: Checkpointer,
        recorder: Recorder,
        identity: dict[str, Any],
        validation: ShardDataset | None = None,
    ):
        """Collective. `identity`: what a checkpoint records of the run besides its progress (see
        `run_identity` in run.py). `validation`: held-out images."""
        self.config = config
        self.ranks = ranks
        self.dataset = dataset
        self.identity = identity
        self.train_step = train_step
        self.state = state
        self.engine = train_step.engine
        self.recorder = recorder
        self.telemetry = recorder.telemetry
        self.checkpointer = checkpointer
        self.checkpoints = CheckpointPolicy(checkpointer, self.engine, recorder)
        diagnosis = partial(recorder.watchdog.heartbeat, "diagnosis")
        self.anomalies = Anomalies(config.anomaly, train_step, state, ranks, diagnosis)

        self.ema_snapshots = EmaSnapshots(config, self.engine, ranks, self.telemetry)

        # They read data sets, in which one rank alone may fail.
        self.preview = ranks.raise_on_all_ranks(
            lambda: Preview(
                config, train_step.objective, self.engine, ranks, dataset, recorder.stop_requested
            )
        )
        self.reference_loss = ranks.raise_on_all_ranks(
            lambda: ReferenceLoss(
                config,
                dataset,
                train_step.objective,
                state.curriculum.edges,
                ranks,
                train_step.micro_batch_size,
                train_step.shape,
                recorder.stop_requested,
            )
        )
        self.validation = self._validation_loss(validation)
        if config.checkpoint.keep_best != "none":
            checkpointer.best_steps = lambda: state.best_steps
        # Of the step that is taken. Where this rank cannot read one, the last stands in its place.
        self.batch: Batch = {}

    def _validation_loss(self, held_out: ShardDataset | None) -> ValidationLoss | None:
        """The loss on held-out images, where there are any. Collective."""
        if held_out is None:
            return None
        return self.ranks.raise_on_all_ranks(
            lambda: ValidationLoss(
                self.config,
                held_out,
                self.train_step.objective,
                self.state.curriculum.edges,
                self.ranks,
                self.recorder.stop_requested,
            )
        )

    def run(self) -> bool:
        """Train to the last step, or until a rank is asked to stop. True if the run is finished."""
        state = self.state
        steps = self.config.train.steps
        if self.preview.note:
            self.telemetry.message(self.preview.note)
        ended = None
        try:
            # The limit for the start, which may be longer, is over.
            self.recorder.watchdog.limit_s = self.config.train.timeout_s
            self.checkpoints.save_first(state.step, self.checkpoint_state())
            self.ema_snapshots.drop_later(state.step)
            stopped = self.train() and state.step < steps
            self.checkpointer.require_lock()
            if stopped:
                self.telemetry.message(f"asked to stop: saving at step {state.step}")
            reason = "stop" if stopped else "end"
            self.checkpoints.save_on_exit(state.step, self.checkpoint_state(), reason)
            # A run whose last checkpoint could not be written is not finished.
            ended = "finished" if self.checkpointer.last_saved >= steps else "stopped"
        except Exception as error:
            self.recorder.watchdog.wait_if_ending()
            ended = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.recorder.goodput.note(state.step, self.checkpointer.last_saved, ended)
        return ended == "finished"

    def train(self) -> bool:
        """Take steps to the last one. True if the loop ended because a rank was asked to stop."""
        stop = self.ranks.any(stop_requested())
        with self._loader() as loader, self.recorder.profile:
            # The first batch is read before the first step is timed. Later ones are read ahead.
            batches = DeviceBatches(loader, self.ranks.device)
            self.batch = self.ranks.raise_on_all_ranks(lambda: batches.batch(self.state.input_step))
            self.recorder.begin()
            while self.state.step < self.config.train.steps and not stop:
                stop = self.take_step(batches)
                self.recorder.profile.step(self.state.step)
        return stop

    def take_step(self, batches: DeviceBatches) -> bool:
        """Try one optimizer step, and do what follows from it. True if a rank was asked to stop."""
        with self.recorder.lap("data"):
            unread = self._read(batches)

        # The loss scale before the step, which the step itself may lower.
        scaler = self.engine.scaler_state()
        can_retry = self.engine.can_lower_loss_scale
        report, applied = self.train_step.forward_backward(
            self.batch, self._status, self.recorder.lap, unread=unread is not None
        )

        # A rank has no data. Its NaN has lowered the loss scale, which is restored before saving.
        if report.cannot_read:
            self.engine.load_scaler_state(scaler)
            self.checkpoints.save(self.state.step, self.checkpoint_state(), "schedule")
            self.checkpoints.finalize(self.state.step)
            raise self._unreadable_data(unread)
        self.checkpoints.poll(self.state.step, report)

        # The config's policy for the anomaly: roll back, stop, or count the step all the same.
        anomaly = self.anomalies.detect(report, self.batch, applied=applied, can_retry=can_retry)
        policy = self.anomalies.policy(anomaly) if anomaly else None
        if anomaly and policy == "skip":
            self.roll_back(anomaly)
            return report.stop
        if anomaly and policy == "stop":
            # A checkpoint that is being written is from before the anomaly, so it is good.
            self.checkpoints.finalize(self.state.step)
            self.recorder.log_anomaly(anomaly, anomaly.text)
            raise NonFiniteError(
                f"{anomaly.text}; the last good checkpoint is step {self.checkpointer.last_saved}; "
                f"{STOP_REMEDIES[anomaly.kind]}"
            )

        # The same inputs are taken again, at a lower loss scale.
        if not applied:
            self.state.skipped_steps += 1
            return report.stop

        if anomaly:
            self.recorder.log_anomaly(anomaly, anomaly.text)
        self.commit_step(report)
        self.run_periodic_tasks()
        return report.stop

    def commit_step(self, report: StepReport) -> None:
        """Count an applied step: this moves the step counter and the curriculum, and nothing else
        does."""
        stage_ended = self.state.commit_step(report)
        self.recorder.count_step(report, stage_ended=stage_ended)

    def run_periodic_tasks(self) -> None:
        """Log, evaluate the reference loss, save and draw a preview, where the step is due for it.
        Collective."""
        config = self.config.telemetry
        step = self.state.step
        if step % config.log_every == 0 or step == self.config.train.steps:
            self.recorder.log_metrics(self.engine, self.checkpointer.last_saved)
        self.telemetry.progress(step)

        if config.reference_every and step % config.reference_every == 0:
            with self._side_task("reference"):
                self.telemetry.log(step, self.reference_loss(self.engine.module))

        # Before the checkpoint, which says whether it is the best.
        best = self.validate(step)
        if self.checkpoints.due(step):
            self.checkpoints.save(step, self.checkpoint_state(), "schedule")
        elif best:
            self.checkpoints.save(step, self.checkpoint_state(), "best")
        if self.ema_snapshots.due(step):
            with self.recorder.lap("checkpoint"):
                self.ema_snapshots.write(step)

        # A preview takes long: a checkpoint that is being written is made valid before it.
        if config.preview_every and step % config.preview_every == 0:
            self.checkpoints.finalize(step)
            with self._side_task("preview"):
                self.preview(step, self.telemetry)

    def validate(self, step: int) -> bool:
        """Log the loss on held-out images where the step is due for it: True if the checkpoint of
        this step is to be kept as the best so far. Collective."""
        every = self.config.telemetry.validation_every
        last = step == self.config.train.steps
        if self.validation is None or not (last or step % every == 0):
            return False
        best = False
        with self._side_task("validation"):
            figures = self.validation(self.engine)
            keep = self.config.checkpoint.keep_best
            if keep != "none":
                of = f"{keep} on {self.validation.identity}"
                if (before := self.state.best_of) not in ("", of):
                    self.telemetry.message(
                        f"step {step}: the best checkpoint was that of {before}; from here on it is "
                        f"that of {of}"
                    )
                best = self.state.observe_validation(figures[f"validation/{keep}"], of)
                # None while no loss was a number.
                if self.state.best_steps:
                    figures["validation/best_step"] = self.state.best_steps[-1]
            self.telemetry.log(step, figures)
        return best

    def roll_back(self, anomaly: Anomaly) -> None:
        """Load the last good checkpoint, and leave out the inputs from its step to this one.
        Collective."""
        state = self.state
        self.checkpoints.finalize(state.step)
        # The file system does not answer: what it writes later would be of steps that are undone.
        if self.checkpointer.pending:
            raise NonFiniteError(
                f"{anomaly.text}; a checkpoint is still being written, so it cannot go back"
            )
        self.anomalies.count_rollback(anomaly, self.checkpointer.last_saved)

        # There is at least the checkpoint of the start.
        checkpoint = self.checkpointer.newest(self.telemetry.message)
        assert checkpoint is not None

        # Loading replaces the step and the skips, from which the new skip is computed.
        bad_step = state.step
        skips = state.skips
        self.recorder.goodput.rolled_back(checkpoint.step, anomaly.text)
        load_checkpoint(checkpoint, self.ranks, self.engine, state)
        state.skips = skips_after_rollback(bad_step, state.step, skips, anomaly.text)
        self.ema_snapshots.drop_later(state.step)

        # What was logged of later steps is dropped before the roll back is logged.
        self.recorder.rolled_back()
        left_out = state.skips[-1].count
        self.recorder.log_anomaly(
            anomaly,
            f"{anomaly.text}; went back to step {state.step}, leaving out the inputs of {left_out} "
            "steps",
        )

    def checkpoint_state(self) -> dict[str, Any]:
        """What DeepSpeed's checkpoint holds besides tensors, equal on all ranks."""
        return {**self.identity, **self.state.state_dict()}

    def _status(self) -> RankStatus:
        return RankStatus(
            stop=stop_requested() or self.checkpointer.taken_over,
            writing=self.checkpointer.writing,
            cannot_write=self.checkpointer.failed,
        )

    def _loader(self) -> Loader:
        config = self.config
        return Loader(
            self.dataset,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=self.train_step.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            flip=config.data.horizontal_flip,
            captions=config.model.max_caption_tokens > 0,
            order=config.data.order,
            start_step=self.state.input_step,
            prefetch=config.data.prefetch,
            pin_memory=config.train.device == "cuda",
            extents=self.state.extents,
        )

    def _read(self, batches: DeviceBatches) -> Exception | None:
        """Set `batch` to this step's rows. An error is returned: one rank alone must not leave the
        others waiting."""
        # Damaged data stay damaged; a file system that failed may answer later.
        for pause in (*READ_RETRY_S, None):
            try:
                self.batch = batches.batch(self.state.input_step)
                return None
            except DataError as error:
                return error
            except OSError as error:
                if pause is None:
                    return error
                time.sleep(pause)
        raise AssertionError

    def _unreadable_data(self, error: Exception | None) -> LargescaleError:
        """The error that every rank raises when one got no data. Collective."""
        # Of several ranks the first with an error is named.
        errors = self.ranks.all_gather_json(error and (isinstance(error, DataError), str(error)))
        rank = list(map(bool, errors)).index(True)
        damaged, text = errors[rank]
        text = f"rank {rank} cannot read the data of step {self.state.step + 1}: {text}"

        # Damaged data need a person. A file system that does not answer is worth another start.
        if damaged:
            fatal: LargescaleError = DataError(text)
            fatal.agreed = True
            return fatal
        return StorageError(
            f"{text}; saved at step {self.checkpointer.last_saved}, run the same command to continue"
        )

    @contextlib.contextmanager
    def _side_task(self, name: str) -> Iterator[None]:
        """Run something beside training, which is left out when the run is asked to stop; nothing
        is compiled for it."""
        with self.recorder.lap(name), self.train_step.compiled.eager():
            try:
                yield
            except Stopped:
                self.telemetry.message(f"the {name} of step {self.state.step} is left out")
