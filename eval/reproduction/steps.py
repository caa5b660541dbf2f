"""What a row of the paper is made by, step by step: the existing programs, called as a person would
call them, and how far each step is, read off the files that they leave."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from eval.comparison.methods import read_method
from eval.curves.rows import Row, lines
from eval.difficulty import Difficulty, read_json
from eval.difficulty_study.findings import Findings
from eval.difficulty_study.study import STUDIES, Study
from eval.drawing.sample_set import PROVENANCE
from eval.reproduction.found_runs import FoundRun, FoundRuns, other_settings, setting_differences
from eval.score import RESULTS
from eval.scoring.figures import short
from eval.training_runs import Run, configure
from largescale.checkpoint.files import checkpoints
from largescale.config.command_line import parse_options
from largescale.config.deepspeed import load_ds_config, precision
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, from_dict, to_dict
from largescale.data.format import MANIFEST, read_manifest
from largescale.data.parts import JOB
from largescale.diffusion.objective import SamplerName
from largescale.errors import DataError, LargescaleError, usable
from largescale.host.files import from_json

# Where nothing is there yet.
NO_RUNS = FoundRuns(Path(), ())
# done; running; stopped, which the same command continues; missing; refused: something else is there.
State = Literal["done", "running", "stopped", "missing", "refused"]
# The stages of a difficulty study that measure something.
Measured = Literal["train", "denoise", "entropy"]


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
        if not right:
            return Standing("refused" if notes else "missing", notes[0] if notes else "missing", ())
        run = right[0]
        if run.saved_step >= self.steps:
            return Standing("done", "done", tuple(notes))
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


# ---- samples and scores


@dataclass(frozen=True)
class Draw(Step):
    """Samples of the last checkpoint of a run."""

    train: Train
    purpose: str
    """The folder below the run's: eval for those that are scored, figure for pictures."""
    num_samples: int
    cfg_scale: float
    sampler: SamplerName
    steps: int
    classes: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    scored: bool = False

    def folder(self, found: FoundRuns) -> Path:
        """The folder of the sample set."""
        return self.train.place(found) / self.purpose / f"cfg{self.cfg_scale}"

    @property
    def own_options(self) -> list[str]:
        """How samples are drawn, as options of eval.sample."""
        words = ["--sampler", self.sampler, "--steps", str(self.steps)]
        if self.classes:
            words += ["--classes", *map(str, self.classes)]
        if self.train.data.captions:
            words += ["--captions", str(self.train.data.path)]
        return [*words, *self.options]

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        if not self.scored:
            return python(*self.call(found))
        where = environment(
            RUN=self.train.place(found),
            REFERENCE=self.train.data.reference,
            CFG_SCALE=self.cfg_scale,
            NUM_SAMPLES=self.num_samples,
        )
        return f"{where} sbatch slurm/sample_eval.sh {shlex.join(self.own_options)}"

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        run = self.train.place(found)
        words = [str(run), "--out", str(run / self.purpose)]
        words += ["--num-samples", str(self.num_samples), "--cfg-scale", str(self.cfg_scale)]
        return "eval.sample", [*words, *self.own_options]

    def standing(self, found: FoundRuns) -> Standing:
        folder = self.folder(found)
        if not (folder / PROVENANCE).exists():
            begun = (folder / JOB).exists()
            return Standing("stopped", f"{folder} is partly drawn") if begun else MISSING
        if wrong := self.other_protocol(found):
            return Standing("refused", wrong)
        return DONE

    def other_protocol(self, found: FoundRuns) -> str | None:
        """What is wrong with the samples that are there; None where nothing is."""
        folder = self.folder(found)
        try:
            with usable(folder / PROVENANCE):
                facts = from_json((folder / PROVENANCE).read_text())
                there = dict(flatten(facts))
        except (LargescaleError, OSError) as error:
            return str(error)
        run = self.train.chosen(found)
        wanted: Row = {
            "run": self.train.name,
            "step": self.train.steps,
            "num_samples": self.num_samples,
            "weights": "ema",
            "sampling.sampler": self.sampler,
            "sampling.steps": self.steps,
            "sampling.cfg_scale": self.cfg_scale,
            "sampling.seed": 0,
            "sampling.eta": 0.0,
            "sampling.guidance_interval": [0.0, 1.0],
            "sampling.cfg_channels": None,
            "dataset": run and run.dataset,
        }
        if self.classes:
            wanted["classes"] = [*self.classes]
        wrong = []
        for key, value in wanted.items():
            if there.get(key) != value:
                wrong.append(f"{key}: {there.get(key)}, not {value}")
        # Samples of the other method have the same name and step.
        if run and facts.get("curriculum") != run.curriculum:
            wrong.append("drawn from another run than the one that it lies in")
        return f"{folder} has samples of another protocol: {'; '.join(wrong)}" if wrong else None


@dataclass(frozen=True)
class Scoring:
    """How a scale scores: by which network, and what its figures are called."""

    extractor: str
    frechet: str
    """The Frechet distance's name without the number of samples: FID, and of no other network."""
    others: tuple[str, ...]

    def names(self, num_samples: int) -> list[str]:
        """The figures of Table A, in its order."""
        return [f"{self.frechet}-{short(num_samples)}", *self.others]


INCEPTION = Scoring("inception", "FID", ("IS", "Precision", "Recall"))


@dataclass(frozen=True)
class ScoreSamples(Step):
    """The figures of a sample set."""

    draw: Draw
    scoring: Scoring = INCEPTION

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        return python(*self.call(found))

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        reference = str(self.draw.train.data.reference)
        words = [str(self.draw.folder(found)), "--reference", reference]
        if self.scoring.extractor != "inception":
            words += ["--extractor", self.scoring.extractor]
        return "eval.score", words

    def standing(self, found: FoundRuns) -> Standing:
        row, notes = self._rows(found)
        return Standing("done" if row else "missing", "done" if row else "missing", tuple(notes))

    def row(self, found: FoundRuns) -> Row | None:
        """The newest row of these samples by this network."""
        return self._rows(found)[0]

    def _rows(self, found: FoundRuns) -> tuple[Row | None, list[str]]:
        """That row, and what is said of rows that do not count."""
        folder = self.draw.folder(found)
        frechet = self.scoring.names(self.draw.num_samples)[0]
        # Samples that were replaced since have another fingerprint.
        fingerprint = None
        with suppress(DataError, OSError):
            fingerprint = read_manifest(folder)["fingerprint"]
        chosen = None
        notes: dict[str, None] = {}
        for row in lines(folder / RESULTS):
            figures = row.get("figures", {})
            if row.get("fingerprint") != fingerprint or row.get("n") != self.draw.num_samples:
                notes[f"{folder} was scored with {row.get('n')} samples, or with others"] = None
            elif frechet in figures:
                chosen = row
            else:
                other = next(iter(figures), "nothing")
                notes[f"{folder} was scored by another network: {other}, which is no {frechet}"] = (
                    None
                )
        return chosen, [*notes]


@dataclass(frozen=True)
class ScoreOverTraining(Step):
    """The Frechet distance of checkpoints along a run (eval.curve)."""

    train: Train
    num_samples: int
    every: int
    sampler: SamplerName
    steps: int
    scoring: Scoring = INCEPTION

    @property
    def own_options(self) -> list[str]:
        words = ["--num-samples", str(self.num_samples), "--every", str(self.every)]
        words += ["--cfg-scale", str(self.train.data.cfg_scale)]
        words += ["--sampler", self.sampler, "--steps", str(self.steps)]
        if self.scoring.extractor != "inception":
            words += ["--extractor", self.scoring.extractor]
        return words

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        where = environment(RUNS=self.train.place(found), REFERENCE=self.train.data.reference)
        return f"{where} sbatch slurm/curve.sh {shlex.join(self.own_options)}"

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        reference = ["--reference", str(self.train.data.reference)]
        return "eval.curve", [str(self.train.place(found)), *reference, *self.own_options]

    @property
    def figure(self) -> str:
        return self.scoring.names(self.num_samples)[0]

    @property
    def wanted(self) -> list[int]:
        """The steps that are scored."""
        return [*range(self.every, self.train.steps + 1, self.every)]

    def standing(self, found: FoundRuns) -> Standing:
        rows, notes = self._rows(found)
        missing = [step for step in self.wanted if step not in rows]
        if not missing:
            return Standing("done", "done", tuple(notes))
        text = f"{len(rows)} of {len(self.wanted)} checkpoints scored" if rows else "missing"
        return Standing("stopped" if rows else "missing", text, tuple(notes))

    def rows(self, found: FoundRuns) -> dict[int, Row]:
        """The rows of this protocol by step."""
        return self._rows(found)[0]

    def _rows(self, found: FoundRuns) -> tuple[dict[int, Row], list[str]]:
        folder = self.train.place(found) / "curve"
        wanted = {
            "num_samples": self.num_samples,
            "cfg_scale": self.train.data.cfg_scale,
            "sampler": self.sampler,
            "steps": self.steps,
            "seed": 0,
            "extractor": self.scoring.extractor,
            "guidance_interval": [0.0, 1.0],
        }
        rows = {}
        others = 0
        for row in lines(folder / RESULTS):
            protocol = row.get("protocol", {})
            same = wanted.items() <= protocol.items() and "ema_width" not in protocol
            if same and self.figure in row.get("figures", {}):
                if row["step"] in self.wanted:
                    rows[row["step"]] = row
            else:
                others += 1
        return rows, [f"{folder} has {others} rows of another protocol"] if others else []


# ---- the difficulty study


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
        intervals = measured.missing[self.stage]
        count = len(measured.intervals) + (self.stage == "denoise")
        if self.stage == "entropy" or len(intervals) == count:
            return MISSING
        return Standing("stopped", f"{count - len(intervals)} of {count} intervals")

    def findings(self) -> Findings:
        """What the study has measured so far."""
        study = self.plan
        o = study.options
        folders = dict(enumerate([run.folder for run in study.runs]))
        entropy = read_json(study.entropy_file)
        return Findings(
            self.study, study.edges, folders, o.steps, o.patience, study.scored(), entropy
        )

    @property
    def plan(self) -> Difficulty:
        """The study as eval.difficulty has it, for reading."""
        return _difficulty(self)

    def _other_settings(self) -> str | None:
        """How the runs that are there differ from those of the row; None where none does."""
        for run in self.plan.runs:
            saved = checkpoints(run.folder)
            if not saved:
                continue
            with usable(saved[0].path):
                state = saved[0].manifest()["state"]
                found = to_dict(from_dict(state["config"])) | {"precision": state["precision"]}
            ds = load_ds_config(run.config.train.ds_config)
            wrong = setting_differences(found, to_dict(run.config) | {"precision": precision(ds)})
            if wrong:
                return f"{run.folder} has other settings than the row: {'; '.join(wrong)}"
        return None


@cache
def _difficulty(stage: StudyStage) -> Difficulty:
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
