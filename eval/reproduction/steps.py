"""What a row of the paper is made by, step by step: the existing programs, called as a person would
call them, and how far each step is, read off the files that they leave."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from eval.comparison.methods import read_method
from eval.reproduction.found_runs import FoundRun, FoundRuns, other_settings
from eval.training_runs import Run, configure
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.data.format import MANIFEST

# Where nothing is there yet.
NO_RUNS = FoundRuns(Path(), ())
# done; running; stopped, which the same command continues; missing; refused: something else is there.
State = Literal["done", "running", "stopped", "missing", "refused"]


@dataclass(frozen=True)
class Standing:
    """How far a step is, and what else was found there that is not shown."""

    state: State
    text: str
    notes: tuple[str, ...] = ()


DONE = Standing("done", "done")
MISSING = Standing("missing", "missing")


class Step(ABC):
    """One call of a program."""

    @abstractmethod
    def job(self, found: FoundRuns = NO_RUNS) -> str:
        """The command that a person types, for the runs that are there: at the paper's size a batch
        job."""

    @abstractmethod
    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        """The program and its arguments, to be called on this machine."""

    @abstractmethod
    def standing(self, found: FoundRuns) -> Standing:
        """How far it is."""


def environment(**variables: object) -> str:
    """NAME=value ..., quoted for a shell."""
    return " ".join([f"{name}={shlex.quote(str(value))}" for name, value in variables.items()])


def python(program: str, arguments: Sequence[str]) -> str:
    """A call as it is typed."""
    return f"python -m {program} {shlex.join(arguments)}"


# ---- data


@dataclass(frozen=True)
class DataSet:
    """A packed data set, and what samples of its models are compared with."""

    name: str
    path: Path
    reference: Path
    """Real images, or statistics of them."""
    cfg_scale: float
    """The guidance scale of the paper's scores; 1 is none."""
    captions: bool = False


@dataclass(frozen=True)
class Prepare(Step):
    """Packs a data set, or computes the statistics of a reference."""

    makes: Path
    program: str
    arguments: tuple[str, ...]
    script: str = ""
    """The batch job that does it, where there is one."""

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        return self.script or python(self.program, self.arguments)

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        return self.program, [*self.arguments]

    def standing(self, found: FoundRuns) -> Standing:
        # A data set is there once its manifest is, a file of statistics by itself.
        made = self.makes if self.makes.suffix else self.makes / MANIFEST
        return DONE if made.exists() else MISSING


# ---- training


@dataclass(frozen=True)
class Train(Step):
    """A training run: a preset, a method of eval.compare, and settings."""

    root: Path
    name: str
    """The name of the run's config; the run says by it, and by its pacing, which row it is of."""
    preset: str
    method: str
    """vanilla, naive or curriculum; with settings, as naive@interval=10000."""
    data: DataSet
    options: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The method without its settings."""
        return self.method.partition("@")[0]

    @property
    def folder(self) -> Path:
        """The run directory, where nobody chose another."""
        return self.root / self.name / self.kind

    @property
    def own_options(self) -> list[str]:
        """The options of the training program but for the folders."""
        # By its name a run says which row it is of; the preset's own goes without saying.
        named = [] if PRESETS[self.preset]().name == self.name else ["--name", self.name]
        return [*named, *self.options, *read_method(self.method).arguments]

    @property
    def run(self) -> Run:
        """The run that the training program makes of the options."""
        return self.run_in(self.folder)

    def run_in(self, folder: Path) -> Run:
        """The same in another folder."""
        where = ("--output", str(folder), "--data.path", str(self.data.path))
        options = tuple(self.own_options)
        base = _configured(self.preset, options)
        data = replace(base.data, path=str(self.data.path))
        config = replace(base, output=str(folder), data=data)
        return Run(self.kind, config.train.seed, config, (self.preset, *where, *options))

    def place(self, found: FoundRuns) -> Path:
        """The folder that the run lies in, or would be started in."""
        run = self.chosen(found)
        return run.folder if run else self.folder

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self.run.config.train.steps

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        where = environment(PRESET=self.preset, RUN=self.place(found), DATA=self.data.path)
        return f"{where} sbatch slurm/train.sh {shlex.join(self.own_options)}"

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        return "largescale.train", [*self.run_in(self.place(found)).arguments]

    def standing(self, found: FoundRuns) -> Standing:
        right, notes = self._claims(found)
        if len(right) > 1:
            several = ", ".join([str(run.folder) for run in right])
            return Standing(
                "refused",
                f"two runs for one cell: {several}; move all but one out of {found.root}",
                tuple(notes),
            )
        # Runs that only claim to be this one are a mistake, which a person has to look at.
        if not right and notes:
            return Standing("refused", notes[0], tuple(notes[1:]))
        if not right:
            return MISSING
        run = right[0]
        # A step that is not on the disk would be lost with the process.
        if run.saved_step >= self.steps:
            return replace(DONE, notes=tuple(notes))
        state: State = "running" if run.alive else "stopped"
        return Standing(state, f"{state} at step {run.step:,} of {self.steps:,}", tuple(notes))

    def chosen(self, found: FoundRuns) -> FoundRun | None:
        """The one run of this training; None where there is none, or more than one."""
        right, _ = self._claims(found)
        return right[0] if len(right) == 1 else None

    def _claims(self, found: FoundRuns) -> tuple[list[FoundRun], list[str]]:
        """The runs that are this training, and what is wrong with the others that say so."""
        right = []
        notes = []
        for run in found.claiming(self.name, self.kind):
            wrong = other_settings(run, self.run)
            # Trained on other data than those that are packed for the row.
            packed = found.dataset_at(self.data.path)
            if run.dataset and packed and run.dataset != packed:
                wrong.append(f"another data set than {self.data.path}")
            classes = self.run.config.model.num_classes
            if classes and run.num_classes is not None and run.num_classes != classes:
                wrong.append(f"data of {run.num_classes} classes, not {classes}")
            if wrong:
                notes.append(f"{run.folder} has other settings than the row: {'; '.join(wrong)}")
            else:
                right.append(run)
        return right, notes


@cache
def _configured(preset: str, options: tuple[str, ...]) -> Config:
    """Parsing takes a moment, and the folders change nothing of it."""
    return configure(preset, options)
