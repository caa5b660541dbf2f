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

Stopped or killed, it goes on when the same command is run again; what is there, and was made with
the same settings, is left alone. The tasks of an array job (slurm/difficulty.sh) take an interval
each; under torchrun the ranks share the drawing of `denoise`, and --nproc is the number of
processes that train a run.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.curve import lines
from eval.difficulty_study.denoising import SplicedSampler, asked_levels, bounds
from eval.difficulty_study.findings import Findings
from eval.difficulty_study.relative_entropy import noise_levels, relative_entropy
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


class Difficulty(Plan):
    def __call__(self) -> None:
        stages = {
            "train": self.train,
            "denoise": self.denoise,
            "entropy": self.entropy,
            "report": self.report,
        }
        for stage in STAGES:
            if stage in self.options.stages and (stage == "denoise" or self.rank == 0):
                stages[stage]()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    # ---- the stages

    def train(self) -> None:
        todo = self.untrained(self.chosen)
        self.say(
            f"train: {len(todo)} of {len(self.chosen)} models to train to step "
            f"{self.options.steps:,}"
        )
        start = time.perf_counter()
        for done, i in enumerate(todo):
            each = (time.perf_counter() - start) / max(done, 1)
            left = f", about {each * (len(todo) - done) / 60:.0f} min left" if done else ""
            self.say(f"train: {self.title(i)}, {self.runs[i].folder}{left}")
            self.runs[i].train(self.options.nproc)

    def denoise(self) -> None:
        self.check_trained(sorted({0, *self.chosen}))
        todo = [i for i in self.chosen if i not in self.scored()]
        self.say(f"denoise: {len(todo)} of {len(self.chosen)} models to sample with")
        if todo and (note := ema_note(self.config)):
            self.say(note)
        if todo and self.rank == 0:
            self.scorer  # noqa: B018  what is wrong with the reference is said now
        for i in todo:
            self.sample_and_score(i)

    def sample_and_score(self, i: int) -> None:
        o, folder = self.options, self.options.out / "denoising" / f"interval_{i:02}"
        how = Sample(
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
        low, high = bounds(*(self.edges[i - 1 : i + 1] if i else (0, 1)))
        sampler = SplicedSampler(how, self.runs[i].folder, (low, high)) if i else Sampler(how)
        if sampler.info().kind == "latents":
            raise ConfigError(f"{self.full} draws latents, and its VAE is not known; give --vae")
        sampler()
        if self.rank != 0:
            return
        made = folder_of(folder, o.cfg_scale)
        scored = self.scorer(made)
        levels = asked_levels(sampler.trained, sampler.configs[0])
        inside = sum(low <= u < high for u in levels)
        ((name, figure),) = scored["figures"].items()
        append_line(
            self.rows_file,
            json.dumps(
                {
                    "interval": i,
                    "protocol": self.options.protocol(),
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
            ),
        )
        self.say(
            f"denoise: {self.title(i)}: {name} {number(figure['value'])} +- {figure['error']:.2g}, "
            f"{inside} of {len(levels)} evaluations inside"
        )
        shutil.copyfile(made / GRID, folder.with_suffix(".png"))
        if not o.keep_samples:
            shutil.rmtree(folder)

    @property
    def rows_file(self) -> Path:
        return self.options.out / "denoising.jsonl"

    def scored(self) -> dict[int, Row]:
        """By interval."""
        return {
            row["interval"]: row
            for row in lines(self.rows_file)
            if row.get("protocol") == self.options.protocol()
        }

    @cached_property
    def scorer(self) -> Scorer:
        """Of the data set the statistics are kept: the tasks of an array job look at it once each
        at most."""
        o = self.options
        if o.reference:
            return self._scorer(o.reference)
        what = f"{self.data.fingerprint} {o.extractor} {o.inception_weights}"
        kept = o.out / f"reference_{hashlib.sha256(what.encode()).hexdigest()[:8]}.npz"
        if kept.exists():
            return self._scorer(kept)
        own = kept.with_suffix(f".{os.getpid()}.npz")  # others may be at it
        scorer = self._scorer(self.data.path, save_reference=own)
        own.replace(kept)
        return scorer

    def _scorer(self, reference: Path, save_reference: Path | None = None) -> Scorer:
        o = self.options
        return Scorer(
            Score(
                reference=reference,
                save_reference=save_reference,
                extractor=o.extractor,
                inception_weights=o.inception_weights,
                metrics=("frechet",),
                keep=2,
                device=o.device,
            )
        )

    @property
    def entropy_file(self) -> Path:
        return self.options.out / "relative_entropy.json"

    def entropy(self) -> None:
        o = self.options
        settings: Row = json.loads(
            json.dumps(
                {
                    "dataset": self.data.fingerprint,
                    "images": o.entropy_images,
                    "samples": o.entropy_samples,
                    "seed": o.seed,
                    "diffusion": asdict(self.config.diffusion),
                }
            )
        )
        if (read_json(self.entropy_file) or {}).get("settings") == settings:
            self.say(f"entropy: {self.entropy_file} is there, left alone")
            return
        levels = noise_levels(build_objective(self.config), self.config.diffusion.timesteps)
        images = self.images().to(local_device(o.device))
        with tqdm(
            total=len(levels) - 1,
            desc="relative entropy",
            unit=" timesteps",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total}{unit} [{elapsed}<{remaining}]",
        ) as bar:
            found = relative_entropy(
                images,
                levels[:-1],
                levels[1:],
                samples=o.entropy_samples,
                seed=o.seed,
                stop=stop_requested,
                progress=lambda share: bar.update(share * (len(levels) - 1)),
            )
        u = (np.arange(1, len(levels)) + 0.5) / len(levels)
        rows = {
            "t": list(range(1, len(levels))),
            "u": u.tolist(),
            **{key: values.tolist() for key, values in vars(found).items()},
            "biased": found.biased.tolist(),
            "degenerate": found.degenerate.tolist(),
        }
        o.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.entropy_file, json.dumps({"settings": settings, **rows}) + "\n")
        self.say(
            f"entropy: {self.entropy_file}, {len(levels) - 1} timesteps; {found.degenerate.sum()} "
            f"have one kernel, {found.biased.sum()} few"
        )

    def images(self) -> torch.Tensor:
        """(L, C, H, W) float32 in the model's space: random ones, and of moments one latent
        each."""
        o, info = self.options, self.data.info
        chosen = np.sort(
            np.random.default_rng(o.seed).choice(len(self.data), o.entropy_images, replace=False)
        )
        parts, generator = [], torch.Generator().manual_seed(o.seed)
        for some in np.array_split(chosen, -(-len(chosen) // 256)):
            stored = torch.from_numpy(self.data.gather(some)["latent"])
            noise = (
                torch.randn(len(some), *info.x_shape, generator=generator)
                if info.kind == "moments"
                else None
            )
            parts.append(to_x_start(stored, info.kind, info.scale_factor, noise))
        return torch.cat(parts)

    def report(self) -> None:
        o = self.options
        found = Findings(
            self.name,
            self.edges,
            {i: run.folder for i, run in enumerate(self.runs)},
            o.steps,
            o.patience,
            self.scored(),
            read_json(self.entropy_file),
        )
        for stage, intervals in found.missing.items():
            what = names(intervals) if intervals else "the relative entropy is"
            self.say(
                f"missing: {what} not there from the stage {stage}; run "
                f"{self.command(stage, intervals)}"
            )
        if not (found.curves or found.scored or found.entropy):
            raise DataError(f"{o.out} holds nothing to report yet")
        settings = json.loads(
            json.dumps({**asdict(o), "training options": self.extra}, default=str)
        )
        self.say(write_report(found, o.out, settings))


def read_json(path: Path) -> Row | None:
    """None for a file that is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: Row = from_json(path.read_text())
        return found
    return None


def main(args: Sequence[str] | None = None) -> int:
    given, training = split_at_dashes(args)
    name, *own = given or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__ + "\nStudies:\n  " + "\n  ".join(STUDIES) + "\n\nIts options: STUDY --help")
        return 0
    serve_stop_signals()

    def study() -> None:
        default = choose_study(name)
        options = parse_options(
            Study, own, program=f"eval.difficulty {name}", description=None, default=default
        )
        Difficulty(name, options, training)()

    remedy = "what is done stays: correct the cause, and run the same command again"
    return run_program(study, remedy)


def choose_study(name: str) -> Study:
    """Raises ConfigError for an unknown name, with the nearest one."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0)
        raise ConfigError(
            f"unknown study {name!r}; did you mean {near[0]!r}? There are: {', '.join(STUDIES)}"
        )
    return STUDIES[name]


if __name__ == "__main__":
    leave(main())
