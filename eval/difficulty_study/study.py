"""A difficulty study (eval/difficulty.py): its options, the paper's settings, and the runs that it
consists of."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from eval.difficulty_study.relative_entropy import MIN_POINTS
from eval.training_runs import Run, check_same, configure
from largescale.config.command_line import check_counts
from largescale.config.derived import cluster_edges
from largescale.config.presets import PRESETS
from largescale.config.serialise import flatten, to_dict
from largescale.config.validation import cli_flag, validate
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import SamplerName
from largescale.distributed.ranks import check_cuda
from largescale.errors import CheckpointError, ConfigError, DataError
from largescale.host.launch import env_rank, env_world_size
from largescale.models.build import latent_shape

Stage = Literal["train", "denoise", "entropy", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
MIN_SCORED = 1000  # images, of which a Frechet distance says something
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    preset: str
    """The preset to train, as in largescale.train."""
    out: Path
    """The folder to write to."""
    stages: tuple[Stage, ...] = STAGES
    """Which stages to run: train, denoise, entropy, report."""
    interval: int | None = None
    """Train or sample only this interval: 1 .. N, or 0 for the full model."""
    intervals: int = 20
    """N: how many parts of equal size the noise axis is cut into, a model each."""
    steps: int = 20_000
    """Training steps of each model."""
    patience: int = 200
    """Steps without a new best of the smoothed loss after which a model counts as oscillating; the
    paper's tau_max."""
    data: Path | None = None
    """A packed data set; by default the preset's."""
    full: Path | None = None
    """A run or an export of the full model, where there is one already; by default it is trained
    like the others."""
    nproc: int = 1
    """Processes that train a run; more than one are started by torchrun."""
    num_samples: int = 10_000
    """Samples drawn for the Frechet distance of each interval."""
    sampler: SamplerName | None = None
    """The sampler; by default ddpm, for SiT sde, for EDM heun."""
    sampler_steps: int | None = None
    """Sampling steps; by default 250, for EDM 18."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is no guidance."""
    seed: int = 0
    """Seed of the samples, and of the draws of the relative entropy."""
    reference: Path | None = None
    """Real images, or statistics of them; by default the data set, if it holds pixels."""
    extractor: str = "inception"
    """The network whose features are compared: inception (FID), efficientnet-lite0 (comes with
    pip), clip:MODEL/WEIGHTS (open_clip) or dino:MODEL (timm)."""
    inception_weights: Path | None = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth),
    where there is no network to download them."""
    vae: str | None = None
    """Where the VAE of a latent model lies now; by default where it was when the data were packed.
    It decodes the samples."""
    keep_samples: bool = False
    """Keep the samples; by default they are removed once they are scored."""
    entropy_images: int = 5_000
    """L: data points, each the centre of a Gaussian kernel."""
    entropy_samples: int = 1_000
    """M: Monte-Carlo samples of each timestep."""
    batch_size: int | None = None
    """Images that are drawn at a time."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What sampling, scoring and the relative entropy run on; by default a GPU if there is one.
    Training has --train.device, after --."""

    def check(self) -> None:
        check_counts(self, "intervals", "steps", "patience", "nproc", "sampler_steps", "batch_size")
        if self.interval is not None and not 0 <= self.interval <= self.intervals:
            raise ConfigError(
                f"interval={self.interval} must be one of the intervals 1..{self.intervals}, or 0, "
                "the full model; set --interval"
            )
        if not self.stages:
            raise ConfigError(
                f"--stages names none; choose of {', '.join(STAGES)}, or leave it out for all"
            )
        if self.entropy_samples < 2:
            raise ConfigError(
                f"entropy_samples={self.entropy_samples} must be at least 2; set --entropy-samples"
            )
        if "denoise" in self.stages and self.num_samples < MIN_SCORED:
            raise DataError(
                f"a Frechet distance of {self.num_samples:,} samples is mostly bias; set "
                f"--num-samples to {MIN_SCORED:,} or more (the paper has 10,000), or leave out the "
                "stage denoise"
            )
        if "train" in self.stages and env_world_size() > 1:
            raise ConfigError(
                f"the stage train is one process, not {env_world_size()}; start it without torchrun "
                "or with one task, and give --nproc for the training"
            )
        check_cuda(self.device)

    def protocol(self) -> Row:
        """What scores must share to be compared."""
        words = (
            "steps",
            "intervals",
            "full",
            "num_samples",
            "sampler",
            "sampler_steps",
            "cfg_scale",
            "seed",
            "reference",
            "extractor",
            "inception_weights",
            "vae",
            "device",
        )
        known: Row = json.loads(
            json.dumps({word: getattr(self, word) for word in words}, default=str)
        )
        return known


def digits(preset: str, sampler: SamplerName, sampler_steps: int) -> Study:
    """Small numbers and EfficientNet's features: to see how it goes, not to compare with others."""
    return Study(
        preset,
        Path("runs/difficulty") / preset,
        intervals=5,
        steps=400,
        patience=40,
        num_samples=1_000,
        sampler=sampler,
        sampler_steps=sampler_steps,
        extractor="efficientnet-lite0",
        entropy_images=2_000,
        entropy_samples=200,
    )


STUDIES: dict[str, Study] = {
    "paper": Study(
        "dit_b2_ffhq256", Path("runs/difficulty/paper"), sampler="ddpm", sampler_steps=250
    ),
    "paper_sit": Study("sit_b2_ffhq256", Path("runs/difficulty/paper_sit"), sampler_steps=250),
    # 4,000 thousand images
    "paper_edm": Study(
        "edm_ddpmpp_ffhq64",
        Path("runs/difficulty/paper_edm"),
        steps=4_000_000 // 256,
        sampler="euler",
        sampler_steps=40,
    ),
    "digits": digits("digits", "ddim", 50),
    "digits_sit": digits("digits_sit", "euler", 50),
    "digits_edm": digits("digits_edm", "euler", 40),
}


class Plan:
    """The runs of a study: interval 0 .. N. Whatever is wrong is said here, before any work."""

    def __init__(self, name: str, options: Study, extra: Sequence[str] = ()) -> None:
        """`name`: in STUDIES. `extra`: options of the training program, for all runs."""
        options.check()
        self.name, self.options, self.extra, self.rank = name, options, list(extra), env_rank()
        self.config = configure(options.preset, self.arguments(0)[1:])
        if str(self.config.run_dir) != str(self.folder(0)):
            raise ConfigError(
                "--output after -- would put all runs into one folder; give --out before"
            )
        found, ours = (
            dict(flatten(to_dict(configure(options.preset, arguments))))
            for arguments in (self.arguments(0)[1:], self.own_arguments(0))
        )
        if others := [
            key
            for key in self.settings(0)
            if found[key] != ours[key] and not key.startswith("telemetry.")
        ]:
            raise ConfigError(
                f"{cli_flag(others[0])} after -- is what the study sets for each of its runs; "
                "leave it out there (before --: --steps, --intervals, --data)"
            )
        objective, kind = (
            self.config.diffusion.objective,
            PRESETS[STUDIES[name].preset]().diffusion.objective,
        )
        if objective != kind:
            raise ConfigError(
                f"preset={options.preset} has diffusion.objective={objective}, the study {name} is "
                f"of {kind}; choose another preset, or a study of {objective}: "
                + ", ".join(of_objective(objective))
            )
        validate(self.config, options.nproc)
        self.runs = [self.run(i) for i in range(options.intervals + 1)]
        self.edges = cluster_edges(self.config)
        self.chosen = [i for i in range(options.intervals + 1) if options.interval in (None, i)]
        if set(options.stages) != {"report"}:
            self.check_data()

    def folder(self, i: int) -> Path:
        return self.options.out / f"interval_{i:02}"

    def settings(self, i: int) -> Row:
        """Of the training program. Every step is logged, as the count of the loss's rises is one of
        steps; nothing else is."""
        o = self.options
        return {
            **({"data.path": o.data} if o.data else {}),
            "train.steps": o.steps,
            "output": self.folder(i),
            "curriculum.pacing": "none",
            "curriculum.n_clusters": o.intervals,
            "curriculum.only_cluster": i,
            "telemetry.log_every": 1,
            "telemetry.preview_every": 0,
            "telemetry.reference_every": 0,
            "checkpoint.keep_every": 0,
        }

    def own_arguments(self, i: int) -> tuple[str, ...]:
        flat = [
            str(part) for key, value in self.settings(i).items() for part in (cli_flag(key), value)
        ]
        return (*flat, "--telemetry.no-tensorboard")

    def arguments(self, i: int) -> tuple[str, ...]:
        return (self.options.preset, *self.own_arguments(i), *self.extra)

    def run(self, i: int) -> Run:
        curriculum = replace(self.config.curriculum, only_cluster=i)
        config = replace(self.config, curriculum=curriculum, output=str(self.folder(i)))
        return Run(f"interval {i}", config.train.seed, config, self.arguments(i))

    def check_data(self) -> None:
        o, data = self.options, self.data
        if data.info.x_shape != latent_shape(self.config.model):
            raise DataError(
                f"{data.path} holds {data.info.kind} of shape {data.info.x_shape}, the model takes "
                f"{latent_shape(self.config.model)}; give --data, or set --model.input-size and "
                "--model.in-channels after --"
            )
        if "entropy" in o.stages and (few := min(len(data), o.entropy_images)) < MIN_POINTS:
            raise DataError(
                f"a relative entropy of {few:,} images of {data.path} is an artefact of their "
                f"number; give {MIN_POINTS:,} or more, or leave out the stage: --stages train "
                "denoise report"
            )
        if "entropy" in o.stages and len(data) < o.entropy_images:
            raise DataError(
                f"{data.path} holds {len(data):,} images, the relative entropy is asked of "
                f"{o.entropy_images:,}; set --entropy-images {len(data)}, or give more with --data"
            )
        if "denoise" in o.stages and o.reference is None:
            if data.info.kind != "pixels":
                raise ConfigError(
                    f"{data.path} holds {data.info.kind}: for the stage denoise give --reference, "
                    "real images or statistics of them, and --vae"
                )
            if len(data) < MIN_SCORED:
                raise DataError(
                    f"a Frechet distance from {len(data):,} images of {data.path} is mostly bias; "
                    f"give --reference, {MIN_SCORED:,} images or more, or leave out the stage "
                    "denoise"
                )
        for run in self.runs:
            check_same(run, o.nproc, data.fingerprint)

    @cached_property
    def data(self) -> ShardDataset:
        return ShardDataset(self.config.data.path)

    def title(self, i: int) -> str:
        return (
            f"interval {i}, u in [{self.edges[i - 1]:g}, {self.edges[i]:g})"
            if i
            else "interval 0, all noise levels"
        )

    @property
    def full(self) -> Path:
        """The full model's run or export."""
        return self.options.full or self.runs[0].folder

    def untrained(self, intervals: Sequence[int]) -> list[int]:
        return [i for i in intervals if (i or not self.options.full) and not self.runs[i].finished]

    def check_trained(self, intervals: Sequence[int]) -> None:
        if missing := self.untrained(intervals):
            raise CheckpointError(
                f"{names(missing)} not trained to step {self.options.steps:,} in "
                f"{self.options.out}; first: {self.command('train', missing)}"
            )

    def command(self, stage: Stage, intervals: Sequence[int] = ()) -> str:
        """That makes what is missing."""
        words, default = ["python", "-m", "eval.difficulty", self.name], STUDIES[self.name]
        for key in (
            field.name for field in fields(Study) if field.name not in ("stages", "interval")
        ):
            if (value := getattr(self.options, key)) != getattr(default, key):
                words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
        words += [
            "--stages",
            stage,
            *(["--interval", str(intervals[0])] if len(intervals) == 1 else []),
        ]
        return shlex.join([*words, *(["--", *self.extra] if self.extra else [])])


def of_objective(objective: str) -> list[str]:
    return [
        name
        for name, study in STUDIES.items()
        if PRESETS[study.preset]().diffusion.objective == objective
    ]


def names(intervals: Sequence[int]) -> str:
    listed = ", ".join(map(str, intervals))
    return f"intervals {listed} are" if len(intervals) > 1 else f"interval {listed} is"
