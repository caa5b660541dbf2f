"""What a run leaves behind besides checkpoints: the log, where its time went, a profile; and its
heartbeat."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from largescale.config.schema import Config
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
        self.telemetry, self.watchdog = telemetry, watchdog
        self._state, self._start_time = state, start_time
        self.timer = StepTimer(
            config.train.global_batch_size,
            flops_per_step,
            ranks,
            precision,
            state.curriculum.n_clusters,
        )
        self.goodput = Goodput(
            telemetry,
            self.timer,
            start_time=start_time,
            device=config.train.device,
            world_size=ranks.world_size,
            from_step=state.step,
        )
        self.profile = Profile(
            self.lap, telemetry, wanted=config.profile, cuda=config.train.device == "cuda"
        )

    def begin(self) -> None:
        """The first step is about to be taken."""
        self.timer.begin(self._start_time)

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """A named part of a step, or of what is done beside it: timed, a range of the profile, and
        a heartbeat."""
        self.watchdog.heartbeat(f"{name} of step {self._state.step + 1}")
        with self.profile.annotate(name), self.timer.lap(name):
            yield

    def stop_requested(self) -> bool:
        """For what takes long beside training, and asks often: a heartbeat too."""
        self.watchdog.heartbeat()
        return stop_requested()

    def count_step(self, report: StepReport, *, stage_ended: bool) -> None:
        """A step was applied."""
        self.timer.count(report)
        if stage_ended:
            self._log_transition()

    def _log_transition(self) -> None:
        state, curriculum = self._state, self._state.curriculum
        index, (lowest, highest) = curriculum.index, curriculum.active
        now = (
            f"{stage(index, curriculum.n_clusters)}, training on u in [{lowest:.3g}, {highest:.3g})"
        )
        self.telemetry.event(
            state.step,
            "transition",
            f"step {state.step}: curriculum index {index + 1} -> {index}, "
            + ("the curriculum is complete" if index == 0 else now),
            index=index,
            lowest=lowest,
            highest=highest,
        )

    def log_metrics(self, engine: Engine, last_saved: int) -> None:
        """A row of the log: means since the row before, and where the run stands now."""
        state, curriculum = self._state, self._state.curriculum
        pacing = curriculum.state
        self.goodput.note(state.step, last_saved)
        metrics: dict[str, Any] = {
            **self.timer.read(),
            "curriculum/index": pacing.index,
            "curriculum/lowest": curriculum.active[0],
            "curriculum/highest": curriculum.active[1],
            "curriculum/patience": pacing.patience_count,
            "curriculum/best_loss": pacing.best_loss if math.isfinite(pacing.best_loss) else None,
            "optimizer/lr": engine.lr,
            "optimizer/grad_norm": engine.grad_norm(),
            "optimizer/loss_scale": engine.loss_scale,
            "optimizer/skipped_steps": state.skipped_steps,
            "anomaly/spikes": state.spikes.spikes,
            "anomaly/skips": len(state.skips),
            **self.goodput.metrics(),
        }
        self.telemetry.log(state.step, metrics)
        shown = {key: f"{metrics[key]:.4f}" for key in ("loss", "mse", "vb") if metrics[key]}
        shown["index"] = f"{pacing.index} ({stage(pacing.index, curriculum.n_clusters)})"
        self.telemetry.progress(state.step, **shown)

    def log_anomaly(self, anomaly: Anomaly, text: str) -> None:
        kind = anomaly.kind.replace("_", " ")
        self.telemetry.event(
            self._state.step, kind, text, ranks=anomaly.ranks, clusters=anomaly.clusters
        )

    def rolled_back(self) -> None:
        """The run stands at an earlier step now: what was logged of later ones is dropped."""
        self.telemetry.roll_back(self._state.step)
        self.timer.restart()
