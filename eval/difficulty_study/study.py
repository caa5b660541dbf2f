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
from largescale.checkpoint.files import require_outside_checkpoints
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
# The least number of images from which a Frechet distance means something.
MIN_SCORED = 1000
Row = dict[str, Any]

# The options that change what a score is, and so must agree between scores that are compared.
PROTOCOL = (
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


@dataclass(frozen=True)
class Study:
    """Options of a difficulty study."""

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
        """Raises ConfigError, DataError or CheckpointError for options that cannot work."""
        require_outside_checkpoints(self.out, "--out")
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
        # A standard error needs two samples.
        if self.entropy_samples < 2:
            raise ConfigError(
                f"entropy_samples={self.entropy_samples} must be at least 2; set --entropy-samples"
            )
        # A Frechet distance of few samples is biased by more than the intervals differ.
        if "denoise" in self.stages and self.num_samples < MIN_SCORED:
            raise DataError(
                f"a Frechet distance of {self.num_samples:,} samples is mostly bias; set "
                f"--num-samples to {MIN_SCORED:,} or more (the paper has 10,000), or leave out the "
                "stage denoise"
            )
        # Training starts its own processes; only sampling is shared by the ranks of this one.
        if "train" in self.stages and env_world_size() > 1:
            raise ConfigError(
                f"the stage train is one process, not {env_world_size()}; start it without torchrun "
                "or with one task, and give --nproc for the training"
            )
        check_cuda(self.device)

    def protocol(self) -> Row:
        """The settings that scores must share to be compared, as plain JSON."""
        settings = {name: getattr(self, name) for name in PROTOCOL}
        plain: Row = json.loads(json.dumps(settings, default=str))
        return plain


def digits(preset: str, sampler: SamplerName, sampler_steps: int) -> Study:
    """A study of a digits preset, with small numbers and EfficientNet's features: to see how a
    study works, not to compare with others."""
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
    # SiT's own sampler, at the paper's number of steps.
    "paper_sit": Study("sit_b2_ffhq256", Path("runs/difficulty/paper_sit"), sampler_steps=250),
    # 4,000 thousand images, in batches of 256.
    "paper_edm": Study(
        "edm_ddpmpp_ffhq64",
        Path("runs/difficulty/paper_edm"),
        steps=4_000_000 // 256,
        sampler="euler",
        sampler_steps=40,
    ),
    # Minutes on two CPU cores.
    "digits": digits("digits", "ddim", 50),
    "digits_sit": digits("digits_sit", "euler", 50),
    "digits_edm": digits("digits_edm", "euler", 40),
}


class Plan:
    """The runs of a study: interval 0 .. N. Raises for whatever is wrong, before any work."""

    def __init__(self, name: str, options: Study, extra: Sequence[str] = ()) -> None:
        """`name`: in STUDIES. `extra`: options of the training program, for all runs."""
        options.check()
        self.name = name
        self.options = options
        self.extra = list(extra)
        self.rank = env_rank()
        # The full model's config; those of the intervals are made from it.
        self.config = configure(options.preset, self.arguments(0)[1:])
        self.check_extra()
        self.check_objective()
        # Validated once: the runs differ in their interval only.
        validate(self.config, options.nproc)

        # Interval 0 is the full model.
        self.runs = list(map(self.run, range(options.intervals + 1)))
        self.edges = cluster_edges(self.config)
        self.chosen = list(range(options.intervals + 1))
        if options.interval is not None:
            self.chosen = [options.interval]

        # A report is written from what was measured, also where the data are not there any more.
        if set(options.stages) != {"report"}:
            self.check_data()

    def check_extra(self) -> None:
        """Raises ConfigError where the options after -- change what the study sets itself."""
        if str(self.config.run_dir) != str(self.folder(0)):
            raise ConfigError(
                "--output after -- would put all runs into one folder; give --out before"
            )
        # What the study sets would be set twice; telemetry changes no result, so it is free.
        found = dict(flatten(to_dict(self.config)))
        own = configure(self.options.preset, self.own_arguments(0))
        ours = dict(flatten(to_dict(own)))
        for key in self.settings(0):
            if found[key] != ours[key] and not key.startswith("telemetry."):
                raise ConfigError(
                    f"{cli_flag(key)} after -- is what the study sets for each of its runs; "
                    "leave it out there (before --: --steps, --intervals, --data)"
                )

    def check_objective(self) -> None:
        """Raises ConfigError for a preset of another objective than the study's, whose sampler it
        could not use."""
        # Each study's sampler and steps are those of its objective.
        objective = self.config.diffusion.objective
        kind = PRESETS[STUDIES[self.name].preset]().diffusion.objective
        if objective != kind:
            raise ConfigError(
                f"preset={self.options.preset} has diffusion.objective={objective}, the study "
                f"{self.name} is of {kind}; choose another preset, or a study of {objective}: "
                + ", ".join(of_objective(objective))
            )

    def folder(self, i: int) -> Path:
        """The run directory of an interval."""
        return self.options.out / f"interval_{i:02}"

    def settings(self, i: int) -> Row:
        """The settings of the training program for one interval. Every step is logged, as the rises
        of the loss are counted from step to step; nothing else is."""
        o = self.options
        settings: Row = {"data.path": o.data} if o.data else {}
        return settings | {
            "train.steps": o.steps,
            "output": self.folder(i),
            "curriculum.pacing": "none",
            "curriculum.n_clusters": o.intervals,
            # 0: all of the noise axis.
            "curriculum.only_cluster": i,
            "telemetry.log_every": 1,
            "telemetry.preview_every": 0,
            "telemetry.reference_every": 0,
            "checkpoint.keep_every": 0,
        }

    def own_arguments(self, i: int) -> tuple[str, ...]:
        """The settings of one interval as arguments of the training program."""
        flat = []
        for key, value in self.settings(i).items():
            flat += [cli_flag(key), str(value)]
        # TensorBoard would write a file for each of many runs.
        return (*flat, "--telemetry.trackers")

    def arguments(self, i: int) -> tuple[str, ...]:
        """All arguments of the training program for one interval."""
        return (self.options.preset, *self.own_arguments(i), *self.extra)

    def run(self, i: int) -> Run:
        """The training run of one interval."""
        # What `configure` would make of the arguments, without parsing them N times.
        curriculum = replace(self.config.curriculum, only_cluster=i)
        config = replace(self.config, curriculum=curriculum, output=str(self.folder(i)))
        return Run(f"interval {i}", config.train.seed, config, self.arguments(i))

    def check_data(self) -> None:
        """Raises for data that the model cannot train on, or that are too few for a stage, and for
        runs in the folder that are other ones."""
        o = self.options
        data = self.data
        # As the training program would find out, but before all models.
        if data.info.x_shape != latent_shape(self.config.model):
            raise DataError(
                f"{data.path} holds {data.info.kind} of shape {data.info.x_shape}, the model takes "
                f"{latent_shape(self.config.model)}; give --data, or set --model.input-size and "
                "--model.in-channels after --"
            )
        if "entropy" in o.stages:
            self.check_entropy_data()
        if "denoise" in o.stages and o.reference is None:
            self.check_own_reference()
        # A run that lies there from before is sampled together with the others, so it has to fit
        # them.
        for run in self.runs:
            check_same(run, o.nproc, data.fingerprint)

    def check_entropy_data(self) -> None:
        """Raises DataError for too few images for a relative entropy."""
        data = self.data
        wanted = self.options.entropy_images
        # A density of few points is that of the points, whatever they show.
        few = min(len(data), wanted)
        if few < MIN_POINTS:
            raise DataError(
                f"a relative entropy of {few:,} images of {data.path} is an artefact of their "
                f"number; give {MIN_POINTS:,} or more, or leave out the stage: --stages train "
                "denoise report"
            )
        if len(data) < wanted:
            raise DataError(
                f"{data.path} holds {len(data):,} images, the relative entropy is asked of "
                f"{wanted:,}; set --entropy-images {len(data)}, or give more with --data"
            )

    def check_own_reference(self) -> None:
        """Raises for a data set that cannot be the reference of the Frechet distance."""
        data = self.data
        # Samples are decoded, so their reference has to be images.
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

    @cached_property
    def data(self) -> ShardDataset:
        """The training set; opened when it is first needed."""
        data = ShardDataset(self.config.data.path)
        data.normalize(self.config.data.normalize)
        return data

    def title(self, i: int) -> str:
        """An interval as messages name it."""
        if i == 0:
            return "interval 0, all noise levels"
        return f"interval {i}, u in [{self.edges[i - 1]:g}, {self.edges[i]:g})"

    @property
    def full(self) -> Path:
        """The full model's run or export."""
        return self.options.full or self.runs[0].folder

    def untrained(self, intervals: Sequence[int]) -> list[int]:
        """Those of these intervals whose model is not trained to the end."""
        missing = []
        for i in intervals:
            # A full model that was given is not trained here.
            given = i == 0 and self.options.full is not None
            if not given and not self.runs[i].finished:
                missing.append(i)
        return missing

    def check_trained(self, intervals: Sequence[int]) -> None:
        """Raises CheckpointError, with the command that trains them, for models that are missing."""
        if missing := self.untrained(intervals):
            raise CheckpointError(
                f"{names(missing)} not trained to step {self.options.steps:,} in "
                f"{self.options.out}; first: {self.command('train', missing)}"
            )

    def command(self, stage: Stage, intervals: Sequence[int] = ()) -> str:
        """The command that makes what is missing of a stage, with the options of this one."""
        words = ["python", "-m", "eval.difficulty", self.name]
        default = STUDIES[self.name]
        for field in fields(Study):
            if field.name in ("stages", "interval"):
                continue
            # Only what differs from the study's defaults, so that the command can be read.
            value = getattr(self.options, field.name)
            if value != getattr(default, field.name):
                words.append(f"--{field.name.replace('_', '-')}")
                # A flag that is on has no value.
                words += [] if value is True else [str(value)]
        words += ["--stages", stage]
        # A single interval can be given; several are found by the stage itself.
        if len(intervals) == 1:
            words += ["--interval", str(intervals[0])]
        if self.extra:
            words += ["--", *self.extra]
        return shlex.join(words)


def of_objective(objective: str) -> list[str]:
    """The names of the studies of one objective."""
    found = []
    for name, study in STUDIES.items():
        if PRESETS[study.preset]().diffusion.objective == objective:
            found.append(name)
    return found


def names(intervals: Sequence[int]) -> str:
    """Intervals as the subject of a sentence: interval 3 is, intervals 3, 4 are."""
    listed = ", ".join(map(str, intervals))
    return f"intervals {listed} are" if len(intervals) > 1 else f"interval {listed} is"
