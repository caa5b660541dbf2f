"""What samples are drawn and scored by: the steps of tables, and of pictures of samples."""

import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from eval.curves.rows import Row, is_scored, lines
from eval.drawing.sample_set import PROVENANCE
from eval.reproduction.found_runs import FoundRuns
from eval.reproduction.steps import (
    DONE,
    MISSING,
    NO_RUNS,
    Standing,
    Step,
    Train,
    environment,
    python,
)
from eval.score import RESULTS
from eval.scoring.figures import short
from largescale.config.serialise import flatten
from largescale.data.format import read_manifest
from largescale.data.job_folder import JOB
from largescale.diffusion.objective import SamplerName
from largescale.errors import DataError, LargescaleError, usable
from largescale.host.files import from_json


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
        # Provenance is written last: with it the set is complete.
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
        # What eval.sample may have been asked otherwise; None is what it was not asked for.
        run = self.train.chosen(found)
        wanted: Row = {
            "run": self.train.name,
            "step": self.train.steps,
            "num_samples": self.num_samples,
            "weights": "ema",
            # Of a power-function average; the paper's EMA has none.
            "ema.width": None,
            "sampling.sampler": self.sampler,
            "sampling.steps": self.steps,
            "sampling.cfg_scale": self.cfg_scale,
            "sampling.seed": 0,
            "sampling.eta": 0.0,
            "sampling.guidance_interval": [0.0, 1.0],
            "sampling.cfg_channels": None,
            "labels_seed": None,
            "classes": [*self.classes] or None,
            "prompts": None,
            "prompts_file.sha256": None,
            "dataset": run.dataset if run else None,
        }
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

    @property
    def options(self) -> list[str]:
        """The network as an option of the programs that score, of which FID's is the default."""
        return [] if self.extractor == "inception" else ["--extractor", self.extractor]


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
        return "eval.score", [*words, *self.scoring.options]

    def standing(self, found: FoundRuns) -> Standing:
        row, notes = self._rows(found)
        return replace(DONE if row else MISSING, notes=tuple(notes))

    def row(self, found: FoundRuns) -> Row | None:
        """The newest row of these samples by this network."""
        return self._rows(found)[0]

    def _rows(self, found: FoundRuns) -> tuple[Row | None, list[str]]:
        """That row, and what is said of rows that do not count, each once."""
        folder = self.draw.folder(found)
        frechet = self.scoring.names(self.draw.num_samples)[0]
        # Samples that were replaced since have another fingerprint.
        fingerprint = None
        with suppress(DataError, OSError):
            fingerprint = read_manifest(folder)["fingerprint"]
        chosen = None
        notes = []
        for row in lines(folder / RESULTS):
            if row.get("fingerprint") != fingerprint or row.get("n") != self.draw.num_samples:
                notes.append(f"{folder} was scored with {row.get('n')} samples, or with others")
            elif is_scored(row, frechet):
                chosen = row
            else:
                other = next(iter(row.get("figures") or ()), "nothing")
                notes.append(
                    f"{folder} was scored by another network: {other}, which is no {frechet}"
                )
        return chosen, list(dict.fromkeys(notes))


def reference_of(row: Row) -> str | None:
    """The fingerprint of the images that a row is against."""
    found: str | None = (row.get("reference") or {}).get("fingerprint")
    return found


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
        """Which checkpoints are scored, and how, as options of eval.curve."""
        words = ["--num-samples", str(self.num_samples), "--every", str(self.every)]
        words += ["--cfg-scale", str(self.train.data.cfg_scale)]
        words += ["--sampler", self.sampler, "--steps", str(self.steps)]
        return [*words, *self.scoring.options]

    def job(self, found: FoundRuns = NO_RUNS) -> str:
        where = environment(RUNS=self.train.place(found), REFERENCE=self.train.data.reference)
        return f"{where} sbatch slurm/curve.sh {shlex.join(self.own_options)}"

    def call(self, found: FoundRuns = NO_RUNS) -> tuple[str, list[str]]:
        reference = ["--reference", str(self.train.data.reference)]
        return "eval.curve", [str(self.train.place(found)), *reference, *self.own_options]

    @property
    def figure(self) -> str:
        """The name of the Frechet distance in the rows."""
        return self.scoring.names(self.num_samples)[0]

    @property
    def wanted(self) -> list[int]:
        """The steps that are scored."""
        return [*range(self.every, self.train.steps + 1, self.every)]

    def standing(self, found: FoundRuns) -> Standing:
        rows, notes = self._rows(found)
        missing = [step for step in self.wanted if step not in rows]
        if not missing:
            return replace(DONE, notes=tuple(notes))
        if not rows:
            return replace(MISSING, notes=tuple(notes))
        text = f"{len(rows)} of {len(self.wanted)} checkpoints scored"
        return Standing("stopped", text, tuple(notes))

    def rows(self, found: FoundRuns) -> dict[int, Row]:
        """The rows of this protocol by step."""
        return self._rows(found)[0]

    def _rows(self, found: FoundRuns) -> tuple[dict[int, Row], list[str]]:
        """Those rows, and what is said of rows of another protocol."""
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
        rows: dict[int, Row] = {}
        others = 0
        reference = None
        # From the newest row on: all are against the images that it is against.
        for row in reversed(lines(folder / RESULTS)):
            protocol = row.get("protocol") or {}
            # Rows of an average of another width are not of the EMA.
            same = wanted.items() <= protocol.items() and "ema_width" not in protocol
            same = same and is_scored(row, self.figure) and "step" in row
            if same and reference is None:
                reference = reference_of(row)
            if not same or reference_of(row) != reference:
                others += 1
            elif row["step"] in self.wanted:
                rows.setdefault(row["step"], row)
        return rows, [f"{folder} has {others} rows of another protocol"] if others else []
