"""The state of a run besides the engine's tensors: it is in every checkpoint, and the same on every
rank."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from largescale.checkpoint.files import CheckpointDir, client_state
from largescale.config.derived import make_curriculum
from largescale.config.schema import Config
from largescale.data.order import Extent, grown_extents
from largescale.diffusion.build import build_noise_sampler
from largescale.diffusion.objective import Objective
from largescale.distributed.ranks import Ranks
from largescale.distributed.step_report import StepReport
from largescale.engine.deepspeed_engine import Engine
from largescale.errors import CheckpointError, usable
from largescale.training.spikes import SpikeDetector


@dataclass(frozen=True)
class SkippedInputs:
    """A window of inputs that is not used: from step `at` on, a step takes the inputs of `count`
    steps later."""

    at: int
    count: int
    why: str


def input_step(step: int, skips: Sequence[SkippedInputs]) -> int:
    """The step whose inputs (order of the data and every draw) `step` takes: its own, unless inputs
    were skipped before it."""
    return step + sum(skip.count for skip in skips if skip.at <= step)


def skips_after_rollback(
    step: int, back_to: int, skips: Sequence[SkippedInputs], why: str
) -> list[SkippedInputs]:
    """The skips of a run that is rolled back from `step` to `back_to`, leaving out the inputs
    between them."""
    # Skips from after `back_to` are part of the new one.
    kept = [skip for skip in skips if skip.at <= back_to]
    # Up to and including the inputs of the step that was bad.
    count = input_step(step, skips) + 1 - input_step(back_to, kept)
    return [*kept, SkippedInputs(back_to, count, why)]


class TrainingState:
    """The step counter, the curriculum and what else changes while a run trains."""

    def __init__(self, config: Config, objective: Objective):
        self.global_batch_size = config.train.global_batch_size
        # Applied optimizer steps, and attempts whose gradient overflowed in fp16.
        self.step = 0
        self.skipped_steps = 0
        self.curriculum = make_curriculum(config)
        self.noise_sampler = build_noise_sampler(config, objective)
        self.spikes = SpikeDetector(config.anomaly.spike_factor)
        self.skips: list[SkippedInputs] = []
        # How many rows the data set has from which position on; empty unless it has grown.
        self.extents: list[Extent] = []
        # The least loss on held-out images, and the steps at which it fell.
        self.best_loss: float | None = None
        self.best_steps: list[int] = []
        # Of which weights and images it is; empty where an older version did not say.
        self.best_of = ""

    @property
    def input_step(self) -> int:
        """The step whose data and random draws the next optimizer step takes."""
        return input_step(self.step, self.skips)

    def data_has_grown(self, rows_before: int, rows: int) -> Extent:
        """Note that the data set has grown since the checkpoint; returns from where on it has all
        rows."""
        position = self.input_step * self.global_batch_size
        self.extents = grown_extents(self.extents or [Extent(0, rows_before)], position, rows)
        return self.extents[-1]

    def commit_step(self, report: StepReport) -> bool:
        """Count an applied step: the only thing that moves the step counter and the curriculum.

        True if a stage of the curriculum ended with it.
        """
        self.step += 1
        self.spikes.observe(report.loss)
        # A sampler that follows the losses needs each row's noise level and loss.
        if self.noise_sampler.needs_losses:
            self.noise_sampler.observe(list(map(int, report.row_bin)), report.row_loss)
        # The loss of each stage has its own level.
        stage_ended = self.curriculum.observe(report.loss)
        if stage_ended:
            self.spikes.new_stage()
        return stage_ended

    def observe_validation(self, loss: float, of: str = "") -> bool:
        """Note a loss on held-out images: True if it is the least so far. `of`: of which weights and
        images; the least of others does not count any more."""
        if self.best_of not in ("", of):
            self.best_loss, self.best_steps = None, []
        self.best_of = of
        # A NaN is below nothing.
        if not (loss < (math.inf if self.best_loss is None else self.best_loss)):
            return False
        self.best_loss = loss
        self.best_steps.append(self.step)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as plain JSON values."""
        return {
            "step": self.step,
            "samples_seen": self.step * self.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "curriculum": self.curriculum.state_dict(),
            "noise_sampler": self.noise_sampler.state_dict(),
            "skips": [asdict(skip) for skip in self.skips],
            "extents": [asdict(extent) for extent in self.extents],
            "spikes": self.spikes.state_dict(),
            "best": {
                "loss": self.best_loss,
                "steps": list(self.best_steps),
                "of": self.best_of,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.curriculum.load_state_dict(state["curriculum"])
        # What follows is not in every checkpoint of an older version.
        if "noise_sampler" in state:
            self.noise_sampler.load_state_dict(state["noise_sampler"])
        self.skips = [SkippedInputs(**skip) for skip in state.get("skips", [])]
        # Not of a checkpoint that a run goes back to: from before its data set was found to have grown.
        self.extents = self.extents or [Extent(**extent) for extent in state.get("extents", [])]
        best = state.get("best", {"loss": None, "steps": []})
        self.best_loss = best["loss"]
        self.best_steps = list(best["steps"])
        self.best_of = best.get("of", "")
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])


def load_checkpoint(
    checkpoint: CheckpointDir, ranks: Ranks, engine: Engine, state: TrainingState
) -> None:
    """Load the checkpoint into the engine and the state. Collective. Raises CheckpointError on
    every rank if one cannot use its part."""

    def read() -> dict[str, Any]:
        manifest = checkpoint.manifest()
        saved = client_state(checkpoint)
        # The round trip makes lists of tuples, as in the manifest.
        if manifest["state"] != json.loads(json.dumps(saved)):
            raise CheckpointError(
                f"{checkpoint.path}: the manifest's copy of the state is not the checkpoint's"
            )
        with usable(checkpoint.path):
            engine.load(checkpoint, manifest["world_size"])
        return saved

    # Only once every rank has read its part is anything changed that ranks share.
    saved = ranks.raise_on_all_ranks(read)
    engine.gather_weights()
    state.load_state_dict(saved)
