"""python -m eval.compare --preset PRESET [--methods vanilla,naive,curriculum] [--seeds 3] [--
TRAINING OPTIONS]

Trains a preset in several ways, with the same data, draws, initial weights and steps, and reports
how they compare: by the validation loss, on a fixed set of (image, u, noise) per noise cluster that
is the same for all, and by a Frechet distance. The first method is what the others are measured
against, seed by seed.

    OUT/METHOD/seed_S/          the runs: checkpoints, and loss/ and curve/ with a row for each that
                                was scored
    OUT/report.html             final and best figures, paired differences, steps to the first
                                method's best, curves and samples: one file, which needs no network
    OUT/table.md                the tables of it
    OUT/results.json            every number, the commands, versions and machine
    OUT/curves.png              the validation loss (EMA) per cluster; relative.png: against the
                                first method
    OUT/frechet.png, samples.png

METHODS: vanilla, curriculum (the paper's, with the preset's patience), naive (fixed intervals),
anti (hard first), separate (stages that do not accumulate), min_snr, p2, logit_normal,
loss_second_moment, speed, laplace, beta, mode, cosine_map (docs/baselines.md); joined by +, as
curriculum+p2; with settings, as curriculum@patience=50,n_clusters=10 or
beta@noise.beta_alpha=2,noise.beta_beta=1 (fields of curriculum, noise and optimizer). Those that
set no pacing have no curriculum.

Stopped or killed, it continues when the same command is run again; what is trained and scored is
left alone. The tasks of an array job take a run each (--run); the same command without --run then
writes the report.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from eval.comparison.methods import read_methods
from eval.comparison.plan import plan
from eval.comparison.report import Findings, seeds_of, write_report
from eval.comparison.validation_loss import ValidationLoss
from eval.curves.options import Curve
from eval.curves.rows import rows_at, steps_of, steps_to_score
from eval.curves.scores import Curves, make_scorer
from eval.sample import Sample, Sampler, folder_of
from eval.score import Scorer
from eval.training_runs import Run, check_same, configure
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts, parse_options, run_program, split_at_dashes
from largescale.config.derived import cluster_edges
from largescale.config.schema import Config
from largescale.config.validation import ema_note, validate
from largescale.data.compatibility import check_alike
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import SamplerName
from largescale.diffusion.samplers import check_sampler, quick_sampler
from largescale.distributed.ranks import check_cuda, local_device
from largescale.encoders.identity import library
from largescale.errors import ConfigError, DataError
from largescale.host.launch import arguments, env_world_size, leave
from largescale.host.signals import serve_stop_signals
from largescale.models.build import latent_shape

# Images of each method in samples.png.
GRID_IMAGES = 40


@dataclass(frozen=True)
class Compare:
    """Options of a comparison."""

    preset: str
    """The preset to train, as in largescale.train."""
    methods: str = "vanilla,naive,curriculum"
    """Methods to compare, separated by commas: vanilla, naive, curriculum and others joined by +;
    the first is what the others are compared with."""
    seeds: int = 3
    """How many seeds to train each method with, from the preset's train.seed on."""
    out: Path | None = None
    """The folder to write to; by default runs/compare/PRESET."""
    only: str | None = None
    """Train and score only the runs of this method, and write no report."""
    run: int | None = None
    """Train and score only the run of this number, from 0: the first seed's in the order of the
    methods, then the next seed's."""
    nproc: int = 1
    """Processes that train a run; more than one are started by torchrun."""
    naive_interval: int | None = None
    """Steps of a stage of the method naive; by default its N stages take half of the run: steps /
    (2 N)."""
    every: int | None = None
    """Steps between the checkpoints that are scored, so also the grain of "steps to"; by default a
    tenth of the run."""
    frechet_every: int | None = None
    """Steps between the checkpoints that samples are drawn of, which takes longest; by default all
    that are scored."""
    discard: bool = False
    """Remove the checkpoints of a run, but for the last, once they are scored."""
    validation: Path | None = None
    """A packed data set that is not trained on, for the validation loss; without one the loss is
    that on images of the training set."""
    clusters: int | None = None
    """Noise clusters of the validation loss; by default as many as the preset trains with."""
    loss_images: int = 256
    """Images of the validation loss, per cluster."""
    reference: Path | None = None
    """Real images, or statistics of them, for the Frechet distance; by default the training set."""
    extractor: str = "auto"
    """The network of the Frechet distance, as in eval.score; auto: inception where its weights are
    given, else efficientnet-lite0, whose distance is no FID."""
    inception_weights: Path | None = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth),
    where there is no network to download them."""
    num_samples: int = 5_000
    """Samples drawn of each checkpoint for the Frechet distance; 0: no samples, no distance."""
    sampler: SamplerName | None = None
    """The sampler; by default ddim, or heun where the objective has no ddim."""
    sampler_steps: int | None = None
    """Sampling steps; by default 50 for ddim, 18 for heun."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is no guidance."""
    sample_seed: int = 0
    """Seed of the samples."""
    vae: str | None = None
    """Where the VAE of a latent model lies now; by default where it was when the data were packed.
    It decodes the samples."""
    batch_size: int | None = None
    """Images at a time when sampling and evaluating the loss."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What sampling and evaluation run on; by default a GPU if there is one. Training has
    --train.device, after --."""

    def check(self) -> None:
        """Raises ConfigError for options that cannot work, whatever the preset, and CheckpointError
        for an --out in the checkpoints of a run."""
        if self.out:
            require_outside_checkpoints(self.out, "--out")
        check_counts(self, "seeds", "nproc", "naive_interval", "every", "frechet_every", "clusters")
        check_counts(self, "loss_images", "batch_size")
        # A score has ten groups of samples, each of one at least.
        if self.num_samples and self.num_samples < 10:
            raise ConfigError(
                f"num_samples={self.num_samples} must be 10 or more, or 0 for no Frechet distance"
            )
        # Two choices could contradict each other.
        if self.only is not None and self.run is not None:
            raise ConfigError("--only and --run both choose; give one of them")
        check_cuda(self.device)
        # Training starts processes of its own; under torchrun each rank would start them all.
        if env_world_size() > 1:
            raise ConfigError(
                f"a comparison is one process, not {env_world_size()}; start it without torchrun or "
                "srun, or with one task, and give --nproc for the training"
            )


class Comparison:
    """The runs of a comparison, and their training, scoring and report."""

    def __init__(self, options: Compare, extra: Sequence[str] = (), command: str = "") -> None:
        """Raises for whatever is wrong, before any work. `extra`: options of the training program,
        for all runs."""
        options.check()
        # The report needs both; without them hours of training would end in an error.
        for name in ("matplotlib", "scipy"):
            library(name, "eval")
        o = options
        methods = read_methods(options.methods)
        self.options = o
        self.extra = list(extra)
        self.command = command
        self.methods = [method.name for method in methods]
        self.out = o.out or Path("runs/compare") / o.preset
        self.runs = plan(
            o.preset,
            methods,
            seeds=o.seeds,
            out=self.out,
            every=o.every,
            naive_interval=o.naive_interval,
            extra=self.extra,
        )
        self.config = self.runs[0].config
        self.check_runs()
        self.chosen = self.choose()

        # A run that lies in the folder from before has to be one of this comparison.
        self.data, validation = self.open(self.config)
        for run in self.runs:
            check_same(run, o.nproc, self.data.fingerprint)

        # How all runs are measured.
        self.curve = self.protocol() if o.num_samples else None
        self.held_out = validation.fingerprint != self.data.fingerprint
        self.loss = ValidationLoss(
            validation,
            self.config,
            self.edges(),
            o.loss_images,
            o.batch_size or 128,
            local_device(o.device),
        )
        self._scorer: Scorer | None = None

    def check_runs(self) -> None:
        """Raises ConfigError for a run that cannot be trained, and for options that do not fit the
        runs."""
        o = self.options
        for run in self.runs:
            try:
                validate(run.config, o.nproc)
            except ConfigError as error:
                raise ConfigError(
                    f"method {run.method!r}: {error} (of one method: NAME@FIELD=VALUE)"
                ) from None
        # An option that nothing reads is taken for a mistake.
        pacings = {run.config.curriculum.pacing for run in self.runs}
        if o.naive_interval and "fixed" not in pacings:
            raise ConfigError(
                f"naive_interval={o.naive_interval} has no effect, none of --methods {o.methods} is "
                "naive; leave it out"
            )
        # Samples are drawn of checkpoints that exist.
        every = self.config.checkpoint.every
        if o.frechet_every and o.frechet_every % every:
            raise ConfigError(
                f"frechet_every={o.frechet_every} must be a multiple of the {every} steps between "
                "checkpoints; set --frechet-every or --every"
            )

    def choose(self) -> list[Run]:
        """The runs that this process trains and scores."""
        only = self.options.only
        number = self.options.run
        # A name or number that fits no run would do nothing, and look done.
        if only is not None and only not in self.methods:
            raise ConfigError(f"--only {only} is none of --methods {','.join(self.methods)}")
        if number is not None and not 0 <= number < len(self.runs):
            raise ConfigError(
                f"--run {number} must lie in 0..{len(self.runs) - 1}: {len(self.methods)} methods "
                f"times {self.options.seeds} seeds"
            )
        if number is not None:
            return [self.runs[number]]
        return [run for run in self.runs if only in (None, run.method)]

    def open(self, config: Config) -> tuple[ShardDataset, ShardDataset]:
        """The data set to train on, and the one of the validation loss."""
        data = ShardDataset(config.data.path)
        if data.info.x_shape != latent_shape(config.model):
            raise DataError(
                f"{data.path} holds {data.info.kind} of shape {data.info.x_shape}, the model takes "
                f"{latent_shape(config.model)}; choose another -- --data.path, or set "
                "--model.in-channels and --model.input-size"
            )
        # Without --validation the loss is measured on images of the training set.
        data.normalize(config.data.normalize)
        validation = ShardDataset(self.options.validation) if self.options.validation else data
        check_alike(validation, data, "--validation")
        validation.normalize_as(data)
        return data, validation

    def edges(self) -> tuple[float, ...]:
        """The clusters of the validation loss: the preset's, whatever a method's curriculum has."""
        # From the preset alone: all methods are measured on the same clusters.
        base = configure(self.options.preset, self.extra)
        n = self.options.clusters or base.curriculum.n_clusters
        return cluster_edges(replace(base, curriculum=replace(base.curriculum, n_clusters=n)))

    def protocol(self) -> Curve:
        """How samples are drawn and scored, as options of eval.curve without runs."""
        o = self.options
        objective = build_objective(self.config)
        # Latents can be neither a reference, nor be scored without being decoded.
        if self.data.info.kind != "pixels" and not (o.reference and o.vae):
            raise ConfigError(
                f"{self.data.path} holds {self.data.info.kind}: for a Frechet distance give "
                "--reference, real images or statistics of them, and --vae; or take --num-samples "
                "0"
            )
        # Checked now: a sampler that does not fit would be an error after the first training.
        sampler, steps = quick_sampler(objective, o.sampler, o.sampler_steps)
        check_sampler(objective, sampler, steps, eta=0.0)
        if o.cfg_scale != 1 and not self.config.model.class_dropout_prob:
            raise ConfigError(
                f"cfg_scale={o.cfg_scale} needs a null label, which no model trained with "
                "class_dropout_prob=0 knows; leave out --cfg-scale"
            )
        # Inception has to be downloaded where its weights are not given.
        automatic = "inception" if o.inception_weights else "efficientnet-lite0"
        return Curve(
            runs=(),
            reference=o.reference or self.data.path,
            num_samples=o.num_samples,
            cfg_scale=o.cfg_scale,
            sampler=sampler,
            steps=steps,
            seed=o.sample_seed,
            vae=o.vae,
            batch_size=o.batch_size,
            device=o.device,
            extractor=automatic if o.extractor == "auto" else o.extractor,
            inception_weights=o.inception_weights,
            every=o.frechet_every or self.config.checkpoint.every,
            captions=self.data.path if self.config.model.max_caption_tokens else None,
        )

    # ---- training and scoring

    def __call__(self) -> None:
        """Train and score the chosen runs, and report after each complete seed."""
        todo = self.incomplete(self.chosen)
        # A reference that cannot be used is an error before hours of training, not after.
        if todo and self.curve:
            self._scorer = make_scorer(self.curve)
        if todo and (note := ema_note(self.config)):
            print(note, flush=True)

        # Only the process that has all runs writes the report.
        reports = self.chosen == self.runs
        reported = self.complete_seeds()
        took: list[float] = []
        for i, run in enumerate(todo):
            self.print_progress(run, len(todo) - i, took)
            start = time.perf_counter()
            if not run.finished:
                run.train(self.options.nproc)
            self.score(run)
            took.append(time.perf_counter() - start)
            # A seed is complete: what it shows can be read while the next one trains.
            if reports and self.complete_seeds() != reported:
                reported = self.complete_seeds()
                self.report(reported)

        # Nothing was left to do: the report is written again, from what there is.
        if reports and not todo:
            self.report(reported)
        if not reports:
            missing = len(self.incomplete(self.runs))
            print(
                f"done; of all {len(self.runs)} runs {missing} are not. The same command without "
                "--only and --run does what is missing, and writes the report",
                flush=True,
            )

    def print_progress(self, run: Run, todo: int, took: Sequence[float]) -> None:
        """`todo`: how many runs are left with this one; `took`: seconds of those before."""
        left = f", about {sum(took) / len(took) * todo / 60:.0f} min" if took else ""
        print(
            f"run {self.runs.index(run) + 1} of {len(self.runs)}: {run.method}, seed "
            f"{run.seed}; {todo} to do{left}",
            flush=True,
        )

    def complete(self, run: Run) -> bool:
        """Whether a run is trained to the end, and all of its checkpoints are scored."""
        return (
            run.finished
            and not self.unscored(run)
            and not (self.curve and self.curves(run).missing(run.folder))
        )

    def incomplete(self, runs: Sequence[Run]) -> list[Run]:
        """Those of these runs that are not trained and scored."""
        return [run for run in runs if not self.complete(run)]

    def unscored(self, run: Run) -> list[int]:
        """The steps of checkpoints without a validation loss."""
        known = steps_of(self.loss.rows(run.folder))
        return steps_to_score(run.folder, known, run.config.checkpoint.every)

    def curves(self, run: Run) -> Curves:
        """eval.curve of one run."""
        assert self.curve
        return Curves(replace(self.curve, runs=(run.folder,)), self._scorer)

    def score(self, run: Run) -> None:
        """Score the checkpoints of a run that are not scored yet."""
        for step in self.unscored(run):
            self.loss.add(run.folder, step)
        if self.curve:
            curves = self.curves(run)
            for step in curves.missing(run.folder):
                curves.add(run.folder, step)
        # Not before both scores, which read the same checkpoints.
        if self.options.discard:
            run.discard()

    # ---- the report

    def complete_seeds(self) -> list[int]:
        """The seeds of which every method is trained and scored."""
        return sorted(seeds_of(self.runs) - seeds_of(self.incomplete(self.runs)))

    def report(self, seeds: Sequence[int]) -> None:
        """Write the report of these seeds."""
        runs = [run for run in self.runs if run.seed in seeds]
        loss = {}
        frechet = {}
        grids = {}
        for run in runs:
            loss[run.folder] = self.loss.rows(run.folder)
            if self.curve:
                rows = self.curves(run).rows(run.folder)
                # Earlier commands may have asked for more steps, of some runs only.
                frechet[run.folder] = rows_at(rows, self.curve.every, run.config.train.steps)
            # A picture of each method, by the first seed.
            if self.curve and run.seed == seeds[0]:
                grids[run.method] = self.grid(run)
        write_report(
            Findings(
                out=self.out,
                runs=runs,
                nproc=self.options.nproc,
                seeds=self.options.seeds,
                held_out=self.held_out,
                loss=loss,
                loss_protocol=self.loss.protocol,
                frechet=frechet,
                frechet_protocol=self.curve.protocol() if self.curve else {},
                grids=grids,
                command=self.command,
            )
        )

    def grid(self, run: Run) -> Path:
        """Draw the first samples of the last checkpoint; returns their picture."""
        # The samples are drawn as those that are scored, so that a picture shows what a number
        # means.
        c = self.curve
        assert c
        out = run.folder / "grid"
        options = Sample(
            run.folder,
            out,
            num_samples=GRID_IMAGES,
            cfg_scale=(c.cfg_scale,),
            sampler=c.sampler,
            steps=c.steps,
            seed=c.seed,
            captions=c.captions,
            vae=c.vae,
            batch_size=c.batch_size,
            step=run.config.train.steps,
            device=c.device,
            replace=True,
        )
        Sampler(options)()
        return folder_of(out, c.cfg_scale) / "grid.png"


def main(args: Sequence[str] | None = None) -> int:
    own, training = split_at_dashes(args)
    options = parse_options(Compare, own, program="eval.compare", description=__doc__)
    serve_stop_signals()
    command = shlex.join(["python", "-m", "eval.compare", *arguments(args)])
    remedy = "what is done stays: correct the cause, and run the same command again"
    return run_program(lambda: Comparison(options, training, command)(), remedy)


if __name__ == "__main__":
    leave(main())
