"""python -m eval.difficulty STUDY [--option VALUE ...] [-- TRAINING OPTION ...]: which noise levels
are hard?

The measurements of section 4 of arXiv:2403.10348. STUDY: paper (DiT-B/2 on FFHQ), paper_sit,
paper_edm (DDPM++ on FFHQ 64x64); digits, digits_sit, digits_edm for minutes on two CPU cores. Its
stages:

    train      N models, each on one interval of the noise axis, and interval 0: a full model, on
               all of it
    denoise    samples of each inside its interval and of the full model elsewhere, by their Frechet
               distance
    entropy    the relative entropy of neighbouring noise levels of the data, D_KL(p_{t-1} || p_t)
    report     OUT/report.html, with losses.png, denoising.png, relative_entropy.png, and
               report.json

    OUT/interval_03/            the run of M_3; of the full model interval_00
    OUT/denoising.jsonl         a row for each that was scored; OUT/denoising/ holds a picture of
                                its samples
    OUT/relative_entropy.json   for each timestep

Stopped or killed, it continues when the same command is run again; what exists, and was made with
the same settings, is left alone. The tasks of an array job (slurm/difficulty.sh) take an interval
each; under torchrun the ranks share the drawing of `denoise`, and --nproc is the number of
processes that train a run.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.curves.rows import lines, require_same_reference
from eval.difficulty_study.denoising import SplicedSampler, asked_levels, bounds
from eval.difficulty_study.findings import Findings
from eval.difficulty_study.relative_entropy import (
    Array,
    RelativeEntropy,
    noise_levels,
    relative_entropy,
)
from eval.difficulty_study.report import number, write_report
from eval.difficulty_study.study import STAGES, STUDIES, Plan, Row, Study, names
from eval.drawing.sample_set import GRID
from eval.sample import Sample, Sampler, folder_of
from eval.score import Score, Scorer
from largescale.config.command_line import parse_options, run_program, split_at_dashes
from largescale.config.validation import ema_note
from largescale.data.loader import to_x_start
from largescale.diffusion.build import build_objective
from largescale.distributed.ranks import local_device
from largescale.errors import ConfigError, DataError
from largescale.host.files import append_line, from_json, write_atomically
from largescale.host.launch import leave
from largescale.host.signals import serve_stop_signals, stop_requested
from largescale.registry import look_up


class Difficulty(Plan):
    """A difficulty study: its runs, and what each stage does with them."""

    def __call__(self) -> None:
        """Do the stages that were asked for, in their order."""
        stages = {
            "train": self.train,
            "denoise": self.denoise,
            "entropy": self.entropy,
            "report": self.report,
        }
        # The ranks share the drawing of samples only.
        for stage in STAGES:
            if stage in self.options.stages and (stage == "denoise" or self.rank == 0):
                stages[stage]()

    def log(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    # ---- the stages

    def train(self) -> None:
        """Train the models that are missing, one after another."""
        todo = self.untrained(self.chosen)
        self.log(
            f"train: {len(todo)} of {len(self.chosen)} models to train to step "
            f"{self.options.steps:,}"
        )
        # The time left is that of the models so far, all of which are alike.
        start = time.perf_counter()
        for done, i in enumerate(todo):
            each = (time.perf_counter() - start) / max(done, 1)
            left = f", about {each * (len(todo) - done) / 60:.0f} min left" if done else ""
            self.log(f"train: {self.title(i)}, {self.runs[i].folder}{left}")
            self.runs[i].train(self.options.nproc)

    def denoise(self) -> None:
        """Sample with the models that have no score yet, and score the samples."""
        # The full model is part of every score.
        self.check_trained(sorted({0, *self.chosen}))
        todo = sorted(set(self.chosen) - self.scored().keys())
        self.log(f"denoise: {len(todo)} of {len(self.chosen)} models to sample with")
        if todo and (note := ema_note(self.config)):
            self.log(note)
        # A reference that cannot be used is an error before any sample is drawn.
        if todo and self.rank == 0:
            reference = self.scorer.reference
            # The training set is the same in all of a study.
            if reference and self.options.reference:
                require_same_reference(self.scored().values(), reference.facts, self.rows_file)
        for i in todo:
            self.sample_and_score(i)

    def sample_and_score(self, i: int) -> None:
        """Draw samples with model i inside its interval, on all ranks, and score them, on rank
        0."""
        o = self.options
        folder = o.out / "denoising" / f"interval_{i:02}"
        how = self.sample_options(folder)
        # Interval 0 is the full model, by itself.
        low, high = bounds(*(self.edges[i - 1 : i + 1] if i else (0, 1)))
        sampler = SplicedSampler(how, self.runs[i].folder, (low, high)) if i else Sampler(how)
        if sampler.info().kind == "latents":
            raise ConfigError(f"{self.full} draws latents, and its VAE is not known; give --vae")
        sampler()
        if self.rank != 0:
            return

        made = folder_of(folder, o.cfg_scale)
        scored = self.scorer(made)
        # How often the sampler asks the model of the interval at all.
        levels = asked_levels(sampler.trained, sampler.configs[0])
        inside = len([u for u in levels if low <= u < high])
        # Frechet is the only metric, so there is one figure.
        ((name, figure),) = scored["figures"].items()
        row = {
            "interval": i,
            "protocol": o.protocol(),
            "figure": name,
            "value": figure["value"],
            "error": figure["error"],
            "evaluations": len(levels),
            "evaluations_inside": inside,
            "drawn": scored["drawn"],
            "notes": scored["notes"],
            "extractor": scored["extractor"],
            "reference": scored["reference"],
        }
        append_line(self.rows_file, json.dumps(row))
        self.log(
            f"denoise: {self.title(i)}: {name} {number(figure['value'])} +- {figure['error']:.2g}, "
            f"{inside} of {len(levels)} evaluations inside"
        )
        shutil.copyfile(made / GRID, folder.with_suffix(".png"))
        # The picture of the first samples stays.
        if not o.keep_samples:
            shutil.rmtree(folder)

    def sample_options(self, folder: Path) -> Sample:
        """How all samples are drawn; they replace those of other settings."""
        o = self.options
        # Drawn from the full model; a SplicedSampler puts model i in its place in the interval.
        return Sample(
            self.full,
            folder,
            num_samples=o.num_samples,
            cfg_scale=(o.cfg_scale,),
            sampler=o.sampler,
            steps=o.sampler_steps,
            seed=o.seed,
            vae=o.vae,
            batch_size=o.batch_size,
            device=o.device,
            replace=True,
        )

    @property
    def rows_file(self) -> Path:
        return self.options.out / "denoising.jsonl"

    def scored(self) -> dict[int, Row]:
        """The rows of this protocol, by interval."""
        protocol = self.options.protocol()
        found = {}
        for row in lines(self.rows_file):
            # A model that was scored twice counts by its last row.
            if row.get("protocol") == protocol:
                found[row["interval"]] = row
        return found

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer of all samples. Statistics of the data set are kept in a file, so the tasks of
        an array job compute them once each at most."""
        o = self.options
        if o.reference:
            return self._scorer(o.reference)
        what = f"{self.data.fingerprint} {o.extractor} {o.inception_weights}"
        kept = o.out / f"reference_{hashlib.sha256(what.encode()).hexdigest()[:8]}.npz"
        if kept.exists():
            return self._scorer(kept)
        # Another task may be writing the same statistics: each has a file of its own until then, also
        # where two nodes have the same process id.
        own = kept.with_suffix(f".{uuid.uuid4().hex}.npz")
        scorer = self._scorer(self.data.path, save_reference=own)
        own.replace(kept)
        return scorer

    def _scorer(self, reference: Path, save_reference: Path | None = None) -> Scorer:
        o = self.options
        # Only a Frechet distance is computed, so no features need be kept (2 is the least).
        score = Score(
            reference=reference,
            save_reference=save_reference,
            extractor=o.extractor,
            inception_weights=o.inception_weights,
            metrics=("frechet",),
            keep=2,
            device=o.device,
        )
        return Scorer(score)

    @property
    def entropy_file(self) -> Path:
        return self.options.out / "relative_entropy.json"

    def entropy(self) -> None:
        """Measure the relative entropy of neighbouring noise levels, unless the file has it."""
        o = self.options
        facts = {
            "dataset": self.data.fingerprint,
            "images": o.entropy_images,
            "samples": o.entropy_samples,
            "seed": o.seed,
            "diffusion": asdict(self.config.diffusion),
        }
        # As JSON has it: tuples are lists there.
        settings: Row = json.loads(json.dumps(facts))
        # Other settings are measured again; the same ones never.
        if (read_json(self.entropy_file) or {}).get("settings") == settings:
            self.log(f"entropy: {self.entropy_file} is there, left alone")
            return

        levels = noise_levels(build_objective(self.config), self.config.diffusion.timesteps)
        found = self.measure_entropy(levels)
        o.out.mkdir(parents=True, exist_ok=True)
        # Row t compares timesteps t - 1 and t; u is the noise level of t.
        rows: Row = {
            "t": list(range(1, len(levels))),
            "u": ((np.arange(1, len(levels)) + 0.5) / len(levels)).tolist(),
        }
        for key, values in vars(found).items():
            rows[key] = values.tolist()
        rows["biased"] = found.biased.tolist()
        rows["degenerate"] = found.degenerate.tolist()
        write_atomically(self.entropy_file, json.dumps({"settings": settings, **rows}) + "\n")
        self.log(
            f"entropy: {self.entropy_file}, {len(levels) - 1} timesteps; {found.degenerate.sum()} "
            f"have one kernel, {found.biased.sum()} few"
        )

    def measure_entropy(self, levels: Array) -> RelativeEntropy:
        """The relative entropies of all pairs of neighbouring `levels`, with a progress bar."""
        o = self.options
        # All images at once: each sample is compared with every one of them.
        images = self.images().to(local_device(o.device))
        with tqdm(
            total=len(levels) - 1,
            desc="relative entropy",
            unit=" timesteps",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total}{unit} [{elapsed}<{remaining}]",
        ) as bar:
            return relative_entropy(
                images,
                levels[:-1],
                levels[1:],
                samples=o.entropy_samples,
                seed=o.seed,
                stop=stop_requested,
                progress=lambda share: bar.update(share * (len(levels) - 1)),
            )

    def images(self) -> torch.Tensor:
        """Random images of the data set in the model's space, (L, C, H, W) float32; of moments one
        latent each."""
        o = self.options
        info = self.data.info
        draw = np.random.default_rng(o.seed)
        chosen = np.sort(draw.choice(len(self.data), o.entropy_images, replace=False))
        generator = torch.Generator().manual_seed(o.seed)

        # In parts, as what is stored may need more memory than float32.
        parts = []
        for some in np.array_split(chosen, -(-len(chosen) // 256)):
            stored = torch.from_numpy(self.data.gather(some)["latent"])
            noise = None
            if info.kind == "moments":
                noise = torch.randn(len(some), *info.x_shape, generator=generator)
            parts.append(to_x_start(stored, info.kind, info.normalization, noise))
        return torch.cat(parts)

    def findings(self) -> Findings:
        """What is measured so far, read off the files of all stages."""
        folders = {}
        for i, run in enumerate(self.runs):
            folders[i] = run.folder
        return Findings(
            study=self.name,
            edges=self.edges,
            folders=folders,
            steps=self.options.steps,
            patience=self.options.patience,
            scored=self.scored(),
            entropy=read_json(self.entropy_file),
        )

    def report(self) -> None:
        """Write the report of what is measured, and log what is missing and how to make it."""
        o = self.options
        found = self.findings()
        # What is missing is reported with the command that makes it.
        for stage, intervals in found.missing.items():
            what = names(intervals) if intervals else "the relative entropy is"
            self.log(
                f"missing: {what} not there from the stage {stage}; run "
                f"{self.command(stage, intervals)}"
            )
        # A page without a single number is a mistake in the call.
        if not (found.curves or found.scored or found.entropy):
            raise DataError(f"{o.out} holds nothing to report yet")
        # Paths as text, as JSON has no type for them.
        settings = json.loads(
            json.dumps({**asdict(o), "training options": self.extra}, default=str)
        )
        self.log(write_report(found, o.out, settings))


def read_json(path: Path) -> Row | None:
    """The content of a JSON file; None for one that is missing or damaged."""
    # What is damaged is measured again, like what is missing.
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: Row = from_json(path.read_text())
        return found
    return None


def main(args: Sequence[str] | None = None) -> int:
    given, training = split_at_dashes(args)
    name, *own = given or ["--help"]
    # Without a study there are no defaults to show.
    if name in ("-h", "--help"):
        print(__doc__ + "\nStudies:\n  " + "\n  ".join(STUDIES) + "\n\nIts options: STUDY --help")
        return 0
    serve_stop_signals()

    def study() -> None:
        # A study is a set of defaults, which the options change.
        default = look_up(STUDIES, name, "study")
        options = parse_options(
            Study, own, program=f"eval.difficulty {name}", description=None, default=default
        )
        Difficulty(name, options, training)()

    remedy = "what is done stays: correct the cause, and run the same command again"
    return run_program(study, remedy)


if __name__ == "__main__":
    leave(main())
