"""The scores of the checkpoints of some runs: those that are known, and those to be made."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from eval.curves.options import Curve
from eval.curves.pages import curve_page
from eval.curves.report import plot, summary
from eval.curves.rows import (
    Row,
    figure_text,
    require_same_reference,
    rows_of_protocol,
    steps_of,
    steps_to_score,
)
from eval.sample import Sample, Sampler, folder_of
from eval.score import RESULTS, Score, Scorer
from largescale.checkpoint.files import CheckpointDir, checkpoints
from largescale.checkpoint.weights import Trained
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.config.validation import ema_note
from largescale.data.format import MANIFEST, read_manifest
from largescale.diffusion.build import build_objective
from largescale.diffusion.samplers import quick_sampler
from largescale.errors import CheckpointError, ConfigError, DataError, StorageError, usable
from largescale.host.files import append_line, require_writable, sha256, write_atomically
from largescale.host.launch import env_rank


class Curves:
    """The scores of the checkpoints of some runs: those that are known, and those to be made."""

    # The width of the power-function average that is scored; None: the EMA.
    width: float | None = None

    def __init__(self, options: Curve, scorer: Scorer | None = None) -> None:
        """`scorer`: one that `make_scorer` made, to be shared by several."""
        options.check()
        self.homes = {run: self.home(run, options.out) for run in options.runs}
        if options.runs:
            out = options.out or options.runs[0] / "curve"
            for name in ("curve.json", "curve.png", "curve.html"):
                require_writable(out / name, remedy="choose another --out")
            # The sampler is part of the protocol, so all runs get the one of the first.
            objective = build_objective(config_of(options.runs[0]))
            sampler, steps = quick_sampler(objective, options.sampler, options.steps)
            options = replace(options, sampler=sampler, steps=steps)
        self.options = options
        self._texts = texts_of(options)
        self.rank = env_rank()
        # None until it is needed.
        self.shared_scorer = scorer
        self._ready: dict[tuple[Path, int], Sampler] = {}

    @staticmethod
    def home(run: Path, out: Path | None) -> Path:
        """The folder of a run's rows and samples. Raises CheckpointError for a run that may only be
        read, without `out`."""
        try:
            require_writable(
                run / "curve" / RESULTS, run / "curve/new", remedy="give --out DIR, which is enough"
            )
        except (CheckpointError, StorageError):
            if not out:
                raise
            # Two runs of one name get two folders.
            digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()
            return out / f"{run.name}-{digest[:4]}"
        return run / "curve"

    def __call__(self) -> None:
        """Score what is missing, and draw the curves."""
        self.score()
        if self.rank == 0:
            self.draw({run: self.rows(run) for run in self.options.runs})

    def score(self) -> None:
        """Score what is missing."""
        missing = []
        for run in self.options.runs:
            for step in self.missing(run):
                missing.append((run, step))

        # What is wrong with a model or the reference is an error before the work, not in it.
        existing = [(run, step) for run, step in missing if self.exists(run, step)]
        if self.rank == 0:
            self.remove_scored()
        if existing:
            self.prepare(*existing[0])

        # Training that is still under way may remove a checkpoint before its turn.
        for run, step in missing:
            if self.exists(run, step):
                self.add(run, step)
            elif self.rank == 0:
                print(
                    f"{run} at step {step:,}: left out, training has removed the checkpoint "
                    "meanwhile",
                    flush=True,
                )

    def prepare(self, run: Path, step: int) -> None:
        """Make the sampler of the first checkpoint, and on rank 0 the scorer."""
        self._ready[run, step] = self.sampler(run, step)
        if self.rank == 0:
            self.scorer()

    def exists(self, run: Path, step: int) -> bool:
        """Whether the weights of that step are still there."""
        return CheckpointDir.at(run, step).exists

    def notes(self) -> list[str]:
        """Notes on the EMA at the earliest step of each run that is to be scored; on rank 0 only."""
        if self.rank != 0:
            return []
        found = []
        for run in self.options.runs:
            missing = self.missing(run)
            note = ema_note(config_of(run), missing[0]) if missing else None
            if note:
                found.append(f"{run}: {note}")
        return found

    def remove_scored(self) -> None:
        """Remove samples that a kill between their row and their removal has left."""
        if self.options.keep_samples:
            return
        for run in self.options.runs:
            for row in self.rows(run):
                shutil.rmtree(self.folder(run, row["step"]), ignore_errors=True)

    def folder(self, run: Path, step: int) -> Path:
        """The folder of the samples of one checkpoint, by this protocol."""
        protocol = hashlib.sha256(json.dumps(self.protocol()).encode()).hexdigest()[:8]
        return self.homes[run] / protocol / f"step_{step:08d}"

    def rows(self, run: Path) -> list[Row]:
        """The rows of this protocol, in the order of steps; of two of one step, the later."""
        return rows_of_protocol(self.homes[run] / RESULTS, self.protocol())

    def protocol(self) -> Row:
        """The settings that rows must share to lie on one curve."""
        return self.options.protocol() | self._texts

    def missing(self, run: Path) -> list[int]:
        """The steps of the checkpoints that have no row of this protocol."""
        # A checkpoint that is gone but has a row stays on the curve.
        return steps_to_score(run, steps_of(self.rows(run)), self.options.every)

    def sampler(self, run: Path, step: int) -> Sampler:
        """The sampler of one checkpoint. Raises ConfigError for one that would draw latents."""
        o = self.options
        sampler = Sampler(
            Sample(
                run,
                self.folder(run, step),
                num_samples=o.num_samples,
                cfg_scale=(o.cfg_scale,),
                sampler=o.sampler,
                steps=o.steps,
                seed=o.seed,
                prompts_file=o.prompts_file,
                captions=o.captions,
                precision=o.precision,
                compile=o.compile,
                batch_size=o.batch_size,
                step=step,
                device=o.device,
                vae=o.vae,
                text_encoder=o.text_encoder,
                guidance_interval=o.guidance_interval,
                ema_width=self.width,
            )
        )
        # A Frechet distance of latents is none that anybody knows.
        if sampler.info().kind == "latents":
            raise ConfigError(f"{run} draws latents, and its VAE is not known; give --vae")
        return sampler

    def add(self, run: Path, step: int) -> None:
        """Score one checkpoint, on all ranks, and add its row, on rank 0."""
        o = self.options
        trained, scored = self.score_samples(run, step)
        if self.rank != 0:
            return

        info = trained.info

        # All that a curve needs, as the checkpoint itself may be removed.
        row = {
            "run": str(run),
            "step": step,
            "images": info.get("samples_seen"),
            "protocol": self.protocol(),
            "transitions": (info.get("curriculum") or {}).get("transitions", []),
            "figures": scored["figures"] | self.more_figures(run, trained),
            "notes": scored["notes"],
            "extractor": scored["extractor"],
            "n": scored["n"],
            "reference": scored["reference"],
        }
        self.homes[run].mkdir(parents=True, exist_ok=True)
        append_line(self.homes[run] / RESULTS, json.dumps(row))

        shown = []
        for name, figure in row["figures"].items():
            shown.append(f"{name} {figure_text(figure)}")
        width = "" if self.width is None else f", width {self.width:g}"
        print(f"{run} at step {step:,}{width}: {', '.join(shown)}", flush=True)

        # Samples of a checkpoint take far more disk than its row.
        out = self.folder(run, step)
        if not o.keep_samples and out.exists():
            shutil.rmtree(out)
            # Not empty where another step's samples lie in it.
            with suppress(OSError):
                out.parent.rmdir()

    def score_samples(self, run: Path, step: int) -> tuple[Trained, Row]:
        """Draw the samples of one checkpoint, on all ranks: the model that drew them, and on rank 0
        their scores."""
        # The first sampler was made before the work, to find errors.
        sampler = self._ready.pop((run, step), None) or self.sampler(run, step)
        if self.rank == 0 and (reference := self.scorer().reference):
            require_same_reference(self.rows(run), reference.facts, self.homes[run] / RESULTS)
        sampler()
        if self.rank != 0:
            return sampler.trained, {}
        samples = folder_of(self.folder(run, step), self.options.cfg_scale)
        return sampler.trained, self.scorer()(samples)

    def more_figures(self, run: Path, trained: Trained) -> Row:
        """Figures beside the scores of the samples, of the model that drew them."""
        return {}

    def scorer(self) -> Scorer:
        """The one scorer of all checkpoints: features of the reference are computed once."""
        if self.shared_scorer is None:
            sizes = []
            for sampler in self._ready.values():
                _, height, width = sampler.info().shape
                sizes.append((height, width))
            self.shared_scorer = make_scorer(self.options, sizes)
        return self.shared_scorer

    def draw(self, of_runs: dict[Path, list[Row]]) -> None:
        """Write curve.json, curve.png and curve.html, and print the summary."""
        out = self.options.out or self.options.runs[0] / "curve"
        out.mkdir(parents=True, exist_ok=True)
        # Nothing to draw: step 0 is not trained, so no score of it means anything.
        if not any(of_runs.values()):
            raise DataError("no checkpoint was scored; those of step 0 are not")
        plain = {str(run): rows for run, rows in of_runs.items()}
        write_atomically(out / "curve.json", json.dumps(plain, indent=1) + "\n")
        plot(of_runs, out / "curve.png")
        write_atomically(out / "curve.html", curve_page(of_runs))
        for line in summary(of_runs):
            print(line, flush=True)
        count = sum(map(len, of_runs.values()))
        print(f"{count} checkpoints on the curve: {out / 'curve.png'}", flush=True)


def texts_of(o: Curve) -> Row:
    """The part of a protocol that says which texts are drawn for: by their content, as another file
    may have their name. What cannot be read is an error of the sampler."""
    found: Row = {}
    if o.captions and (o.captions / MANIFEST).is_file():
        found["captions"] = read_manifest(o.captions)["fingerprint"]
    if o.prompts_file and o.prompts_file.is_file():
        found["prompts_file"] = sha256(o.prompts_file)
    return found


def config_of(run: Path) -> Config:
    """The config of a run's newest checkpoint."""
    newest = checkpoints(run)[0]
    with usable(newest.path):
        return from_dict(newest.manifest()["state"]["config"])


def make_scorer(o: Curve, sizes: Sequence[tuple[int, int]] = ()) -> Scorer:
    """The scorer for samples of these sizes. Raises DataError for what is wrong with the reference
    or the extractor."""
    assert o.reference is not None
    score = Score(
        samples=(),
        reference=o.reference,
        extractor=o.extractor,
        inception_weights=o.inception_weights,
        device=o.device,
    )
    return Scorer(score, sizes)
