"""What a difficulty study is made by: the steps of figures A and B, and of sections B and C."""

import shlex
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from eval.difficulty import Difficulty
from eval.difficulty_study.findings import Findings
from eval.difficulty_study.study import STUDIES, Study
from eval.reproduction.found_runs import FoundRuns, other_settings, read_run
from eval.reproduction.steps import DONE, MISSING, NO_RUNS, DataSet, Standing, Step, environment
from largescale.config.command_line import parse_options
from largescale.errors import LargescaleError, usable

# The stages of a difficulty study that measure something.
Measured = Literal["train", "denoise", "entropy"]


@dataclass(frozen=True)
class StudyStage(Step):
    """One stage of a difficulty study (eval.difficulty)."""

    study: str
    """The study's name in eval.difficulty."""
    stage: Measured
    out: Path
    data: DataSet
    options: tuple[str, ...] = ()
    """Options of the study."""
    extra: tuple[str, ...] = ()
    """Options of the training program."""

    @property
    def own_options(self) -> list[str]:
        """The options of the study, and behind -- those of its training."""
        reference = ["--reference", str(self.data.reference)] if self.stage == "denoise" else []
        return [*self.options, *reference, *(["--", *self.extra] if self.extra else [])]

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        # The report is written from what all tasks of the array have left, by `figures`.
        first = "" if self.stage == "train" else f"STAGES={self.stage} "
        where = environment(STUDY=self.study, DATA=self.data.path, OUT=self.out)
        array = " --array=0" if self.stage == "entropy" else ""
        command = f"{first}{where} sbatch{array} slurm/difficulty.sh"
        return " ".join([command, shlex.join(self.own_options)]).strip()

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        words = [self.study, "--out", str(self.out), "--data", str(self.data.path)]
        return "eval.difficulty", [*words, "--stages", self.stage, "report", *self.own_options]

    def standing(self, found: FoundRuns) -> Standing:
        if not self.out.is_dir():
            return MISSING
        wrong = self._other_settings()
        if wrong:
            return Standing("refused", wrong)
        # The loss curves of all models are read for it.
        measured = self.findings()
        if self.stage not in measured.missing:
            return DONE
        # The full model, interval 0, is sampled with as well.
        intervals = [0, *measured.intervals] if self.stage == "denoise" else measured.intervals
        done = len(intervals) - len(measured.missing[self.stage])
        # The relative entropy is one measurement over all intervals.
        if self.stage == "entropy" or not done:
            return MISSING
        return Standing("stopped", f"{done} of {len(intervals)} intervals")

    def findings(self) -> Findings:
        """What the study has measured so far."""
        return self.plan.findings()

    @property
    def plan(self) -> Difficulty:
        """The study as eval.difficulty has it, for reading."""
        return _difficulty(self)

    def _other_settings(self) -> str | None:
        """How the runs that are there differ from those of the row; None where none does."""
        # The models are compared with one another, so each of them has to be the row's.
        for run in self.plan.runs:
            try:
                with usable(run.folder):
                    found = read_run(run.folder)
            except LargescaleError as error:
                return f"{run.folder} cannot be read: {error}"
            wrong = other_settings(found, run) if found else []
            if wrong:
                return f"{run.folder} has other settings than the row: {'; '.join(wrong)}"
        return None


@cache
def _difficulty(stage: StudyStage) -> Difficulty:
    """The study that a stage is of."""
    # Read as the program itself reads them, but for the report only, which needs no data.
    reference = ["--reference", str(stage.data.reference)]
    words = ["--out", str(stage.out), "--data", str(stage.data.path), *stage.options, *reference]
    options = parse_options(
        Study,
        words,
        program=f"eval.difficulty {stage.study}",
        description=None,
        default=STUDIES[stage.study],
    )
    options = replace(options, stages=("report",))
    return Difficulty(stage.study, options, stage.extra)
