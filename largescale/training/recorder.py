"""What a run records besides checkpoints: the log, where its time went, a profile; and its
heartbeat."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from largescale.config.schema import Config
from largescale.config.serialise import to_dict
from largescale.curriculum import stage
from largescale.distributed.ranks import Ranks
from largescale.distributed.step_report import StepReport
from largescale.distributed.watchdog import Watchdog
from largescale.engine.deepspeed_engine import Engine
from largescale.host.signals import stop_requested
from largescale.monitoring.goodput import Goodput
from largescale.monitoring.profiling import Profile
from largescale.monitoring.step_timer import StepTimer
from largescale.monitoring.telemetry import Telemetry
from largescale.training.anomalies import Anomaly
from largescale.training.state import TrainingState


class Recorder:
    """On every rank: times and heartbeats. On rank 0 also metrics.jsonl, TensorBoard, the bar and
    the run record."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        state: TrainingState,
        telemetry: Telemetry,
        watchdog: Watchdog,
        *,
        precision: str,
        flops_per_step: float,
        start_time: float,
    ):
        """`start_time`: when the program was started, in seconds since 1970."""
        self.telemetry = telemetry
        self.watchdog = watchdog
        self._state = state
        self._start_time = start_time

        # On every rank, since each times its own parts of a step.
        self.timer = StepTimer(
            config.train.global_batch_size,
            flops_per_step,
            ranks,
            precision,
            state.curriculum.n_clusters,
        )
        # Rank 0's record of this start, and a profile where it is asked for.
        self.goodput = Goodput(
            telemetry,
            self.timer,
            start_time=start_time,
            device=config.train.device,
            world_size=ranks.world_size,
            from_step=state.step,
            settings=to_dict(config),
        )
        self.profile = Profile(
            self.lap, telemetry, wanted=config.profile, cuda=config.train.device == "cuda"
        )

    def begin(self) -> None:
        """Start the clock of the first step."""
        self.timer.begin(self._start_time)

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """A named part of a step, or of what is done beside it: timed, a range of the profile, and
        a heartbeat."""
        # What hangs is reported by this name.
        self.watchdog.heartbeat(f"{name} of step {self._state.step + 1}")
        with self.profile.annotate(name), self.timer.lap(name):
            yield

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop, with a heartbeat: for what takes long beside training
        and asks often."""
        self.watchdog.heartbeat()
        return stop_requested()

    def count_step(self, report: StepReport, *, stage_ended: bool) -> None:
        """Count an applied step, and log the end of a stage of the curriculum."""
        self.timer.count(report)
        if stage_ended:
            self._log_transition()

    def _log_transition(self) -> None:
        step = self._state.step
        curriculum = self._state.curriculum
        index = curriculum.index
        lowest, highest = curriculum.active

        # The index counts down to 0; a person reads "stage 3 of 20" beside it.
        if index == 0:
            now = "the curriculum is complete"
        else:
            name = stage(index, curriculum.n_clusters)
            now = f"{name}, training on u in [{lowest:.3g}, {highest:.3g})"
        self.telemetry.event(
            step,
            "transition",
            f"step {step}: curriculum index {index + 1} -> {index}, {now}",
            index=index,
            lowest=lowest,
            highest=highest,
        )

    def log_metrics(self, engine: Engine, last_saved: int) -> None:
        """Log a row of metrics: means since the row before, and where the run stands now."""
        state = self._state
        curriculum = state.curriculum
        pacing = curriculum.state
        self.goodput.note(state.step, last_saved)
        # JSON has no infinity: before the first observation the best loss is null.
        metrics: dict[str, Any] = {
            **self.timer.read(),
            "curriculum/index": pacing.index,
            "curriculum/lowest": curriculum.active[0],
            "curriculum/highest": curriculum.active[1],
            "curriculum/patience": pacing.patience_count,
            "curriculum/best_loss": pacing.best_loss if math.isfinite(pacing.best_loss) else None,
            # What the patience watches, where it is not the loss itself.
            **({} if pacing.average is None else {"curriculum/loss_average": pacing.average}),
            "optimizer/lr": engine.lr,
            "optimizer/grad_norm": engine.grad_norm(),
            "optimizer/loss_scale": engine.loss_scale,
            "optimizer/skipped_steps": state.skipped_steps,
            "anomaly/spikes": state.spikes.spikes,
            "anomaly/skips": len(state.skips),
            **self.goodput.metrics(),
        }
        self.telemetry.log(state.step, metrics)

        # The bar shows the losses that this objective has, and the stage.
        shown = {}
        for key in ("loss", "mse", "vb"):
            if metrics[key]:
                shown[key] = f"{metrics[key]:.4f}"
        shown["index"] = f"{pacing.index} ({stage(pacing.index, curriculum.n_clusters)})"
        self.telemetry.progress(state.step, **shown)

    def log_anomaly(self, anomaly: Anomaly, text: str) -> None:
        # The kind of the event, as a person reads it in TensorBoard and in largescale.status.
        kind = anomaly.kind.replace("_", " ")
        self.telemetry.event(
            self._state.step, kind, text, ranks=anomaly.ranks, clusters=anomaly.clusters
        )

    def rolled_back(self) -> None:
        """Drop what was logged of later steps than the state's, which is that of a checkpoint."""
        self.telemetry.roll_back(self._state.step)
        # The means of the next row are of steps that stay.
        self.timer.restart()
