"""python -m eval.sample RUN_OR_EXPORT --out DIR: samples, as many of each class, or of captions or
prompts.

DIR gets a folder for each scale, such as DIR/cfg1.5: Arrow shards, a picture of the first samples
and provenance.json, with all that the samples depend on (eval/drawing/sample_set.py lists the
files). Killed or stopped, it continues where it was when the same command is run again; a complete
set is left alone. Under torchrun or srun the ranks share the samples; they coordinate only through
files, and need not be as many as before.

Sample i depends on (seed, i) alone: it is bitwise the same on one type of device at the same batch
size and shard size, whatever the number of ranks and restarts, and the same up to rounding at
others, or where one start compiles the model and another does not.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import largescale
from eval.drawing.conditions import make_conditions
from eval.drawing.sample_set import Format, SampleSet, Worker, make_of, require_sample_folder
from largescale.checkpoint.files import CheckpointDir, require_outside_checkpoints
from largescale.checkpoint.weights import load_trained, weights_sha256
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.config.validation import ema_note
from largescale.data.format import KINDS, MANIFEST, DatasetInfo, normalization_of
from largescale.data.job_folder import JOB
from largescale.diffusion.objective import Model, SamplerName
from largescale.diffusion.samplers import evaluations
from largescale.diffusion.sampling import SamplingConfig, check_guidance, draw_batches
from largescale.distributed.ranks import check_cuda, local_device
from largescale.encoders.vae import Vae, load_vae, load_vae_of_model
from largescale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Stopped,
    usable,
)
from largescale.host.launch import env_rank, env_world_size, leave
from largescale.host.signals import serve_stop_signals, stop_requested
from largescale.models.build import latent_shape
from largescale.models.half_precision import check_on_cpu
from largescale.models.inference import compile_pays, prepare
from largescale.power_ema import residual_note

# Latents that are decoded at a time: the decoder needs far more memory than the model.
DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class Sample:
    """Options of eval.sample."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run directory, such as runs/digits, or an export."""
    out: Path
    """The folder to write to; it gets a folder for each guidance scale, such as cfg1.5."""
    num_samples: int = 1000
    """How many samples to draw at each guidance scale; papers score 50,000."""
    cfg_scale: tuple[float, ...] = (1.5,)
    """Guidance scales, one or more; 1 is no guidance."""
    sampler: SamplerName | None = None
    """The sampler; by default ddpm, for SiT sde, for EDM heun."""
    steps: int | str | None = None
    """Sampling steps; by default 250, for EDM 18. ddim50: the 50 timesteps of a fixed stride, as the
    DDIM paper and diffusers have them."""
    eta: float = 0.0
    """How much noise DDIM adds in each step: 0 is deterministic, 1 is DDPM's."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels between these two; 0 is no noise, 1 pure noise."""
    cfg_channels: int | None = None
    """Guide only the first k channels, as facebookresearch/DiT does with 3; by default all of
    them."""
    seed: int = 0
    """Seed of the samples: sample i depends on (seed, i) alone."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Labels of a class-conditional model: balanced, the same number of each class; or drawn at
    random."""
    classes: tuple[int, ...] = ()
    """Classes to draw in turn, instead of --labels."""
    prompts: tuple[str, ...] = ()
    """Prompts of a text-to-image model; sample i gets prompt i % n."""
    prompts_file: Path | None = None
    """A file of prompts: a list that eval.prompts froze, or a text file with one prompt a line."""
    captions: Path | None = None
    """A packed data set whose captions are the prompts; sample i gets a caption of row i % n."""
    text_encoder: str | None = None
    """Where the text encoder of the data lies now, for prompts; by default where it was when the
    data were packed."""
    vae: str | None = None
    """Where the VAE of a latent model lies now; by default where it was when the data were packed.
    It decodes the samples. none: keep latents."""
    also: tuple[Format, ...] = ()
    """Formats besides Arrow shards: npz for ADM's evaluator, png for a folder of images."""
    replace: bool = False
    """Remove other samples that lie in the folder; without this they are an error."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What matrix products are computed in; auto: on a GPU the precision of the training, else
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile; auto: where it is expected to pay."""
    batch_size: int | None = None
    """Images that each rank draws at a time, which decides speed and memory; by default 128 on a
    GPU, 32 on a CPU."""
    shard_size: int = 128
    """Images in a shard. A rank that is stopped loses what it drew of its last one."""
    step: int | None = None
    """The step of the checkpoint to use; by default the newest valid one."""
    ema_width: float | None = None
    """Draw with the power-function average of this width (a standard deviation as a share of the
    training), from a run that was trained with --optimizer.ema-widths; by default with the EMA."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What this runs on; by default a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError, or an error of --out, before any work is done, not after the first of
        several scales."""
        check_counts(self, "num_samples", "batch_size", "shard_size")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} must be in [0, 2**64); set --seed")
        for scale in self.cfg_scale:
            if not 0 <= scale < math.inf:
                raise ConfigError(
                    f"cfg_scale={scale} must be 0 or more; 1 is no guidance, the paper uses 1.5"
                )
        if not self.cfg_scale:
            raise ConfigError(
                "--cfg-scale names no scale; give one or more, such as --cfg-scale 1.5 2.0"
            )
        check_cuda(self.device)
        # A CPU may compute in half precision slowly, or not at all.
        if self.device == "cpu" and self.precision != "auto":
            check_on_cpu(self.precision, "--precision {}")
        require_outside_checkpoints(self.out, "--out")
        for scale in self.cfg_scale:
            require_sample_folder(folder_of(self.out, scale), replace=self.replace)


class Sampler:
    """A trained model, and this process's part in sampling from it."""

    def __init__(self, options: Sample) -> None:
        options.check()
        self.options = options
        self.rank = env_rank()
        self.world_size = env_world_size()
        self.device = local_device(options.device)

        # The model, and what it is by default sampled with.
        step = options.step
        if step is None:
            step = self.checkpoint_of_unfinished_samples()
        self.trained = load_trained(options.source, step, ema_width=options.ema_width)
        objective = self.trained.objective
        self.sampler = options.sampler or objective.samplers[0]
        self.steps = objective.default_steps if options.steps is None else options.steps
        model = self.trained.config.model
        check_guidance(
            options.cfg_scale,
            options.cfg_channels,
            class_dropout_prob=model.class_dropout_prob,
            in_channels=model.in_channels,
        )
        self.weights_sha256 = weights_sha256(self.trained.model.state_dict())
        self.pixels = self.trained.info["data_info"]["kind"] == "pixels"

        # What the samples are conditioned on, and what decodes them.
        made_with = self.trained.info.get("made_with", {})
        self.conditions = make_conditions(
            self.trained,
            n=options.num_samples,
            seed=options.seed,
            labels=options.labels,
            classes=options.classes,
            prompts=options.prompts,
            prompts_file=options.prompts_file,
            captions=options.captions,
            text_encoder=options.text_encoder or made_with.get("text_encoder"),
            device=self.device,
        )
        # An encoder that cannot be loaded is an error now, not at the first prompt.
        self.conditions.prepare()
        vae = options.vae or made_with.get("vae") or "none"
        self.vae: Vae | None = None
        if vae != "none":
            self.vae = self.decoder(vae)
        # A batch lies in one shard, as shards are drawn one after another.
        default = 128 if self.device.type == "cuda" else 32
        self.batch_size = min(options.batch_size or default, options.shard_size)

        # All scales are checked before the first of them is drawn.
        self.configs = list(map(self.config, options.cfg_scale))
        self.compile = options.compile == "on" or (
            options.compile == "auto" and self.compile_pays()
        )
        self._model: Model | None = None

    def compile_pays(self) -> bool:
        """Whether torch.compile pays: decided once for all scales, by all of the work, not by what
        is left of it here, as a compiled model rounds differently."""
        return compile_pays(
            self.trained.model,
            device=self.device,
            precision=self.configs[0].precision,
            evaluations=sum(map(self.evaluations, self.configs)),
        )

    def evaluations(self, config: SamplingConfig) -> int:
        """How many images all ranks show to the model; guidance shows each twice."""
        # Solvers of order two ask the model twice in a step.
        rounds = evaluations(self.trained.objective, config.sampler, config.steps)
        return self.options.num_samples * rounds * (1 if config.cfg_scale == 1 else 2)

    def checkpoint_of_unfinished_samples(self) -> int | None:
        """The step of the checkpoint of these very samples, where they are partly drawn, or complete
        and not to be replaced: a run that is still training has a newer one by now."""
        # A manifest is that of a complete set, which --replace draws anew from the newest
        # checkpoint.
        names = (JOB,) if self.options.replace else (JOB, MANIFEST)
        for scale in self.options.cfg_scale:
            folder = folder_of(self.options.out, scale)
            for name in names:
                # A file that is missing or damaged is that of no samples.
                with suppress(OSError, CheckpointError), usable(name):
                    found = json.loads((folder / name).read_text())
                    job = found if name == JOB else found["job"]
                    if self.is_job_of(job, scale):
                        return int(job["step"])
        return None

    def is_job_of(self, job: dict[str, Any], scale: float) -> bool:
        """Whether `job`, of samples on disk, is what these options ask for at this scale, and its
        checkpoint still exists."""
        o = self.options
        wanted: dict[str, Any] = {
            "cfg_scale": scale,
            "eta": o.eta,
            "seed": o.seed,
            "guidance_interval": list(o.guidance_interval),
            "cfg_channels": o.cfg_channels,
        }
        # What is not given depends on the objective, which is not loaded yet.
        if o.sampler:
            wanted["sampler"] = o.sampler
        if o.steps:
            wanted["steps"] = o.steps
        # Another run may lie in the folder by now, so its name is compared too.
        checkpoint = CheckpointDir.at(o.source, int(job["step"]))
        if job.get("ema", {}).get("width") != o.ema_width:
            return False
        return bool(
            checkpoint.exists
            and checkpoint.manifest()["state"]["config"]["name"] == job["run"]
            and job["num_samples"] == o.num_samples
            and wanted.items() <= job["sampling"].items()
        )

    def config(self, cfg_scale: float) -> SamplingConfig:
        """How samples are drawn at one guidance scale. Raises ConfigError."""
        o = self.options
        # A CPU computes in half precision slowly, or not at all, whatever the training had.
        precision = o.precision
        if precision == "auto":
            on_gpu = self.device.type == "cuda"
            precision = self.trained.info.get("precision", "fp32") if on_gpu else "fp32"
        config = SamplingConfig(
            self.sampler,
            self.steps,
            cfg_scale,
            o.guidance_interval,
            o.cfg_channels,
            o.eta,
            seed=o.seed,
            clip_denoised=self.pixels and self.trained.objective.clips_predictions,
            precision=precision,
        )
        config.check(self.trained.objective)
        return config

    def decoder(self, spec: str) -> Vae:
        """Load the VAE. Raises ConfigError for another one than made the model's latents."""
        encoder = self.trained.info["data_info"].get("encoders", {}).get("vae")
        # Converted weights may not say which VAE made their latents.
        if encoder is None and "converted" in self.trained.info and not self.pixels:
            vae = load_vae(spec, self.device)
            self.check_latents(vae, spec)
            return vae
        return load_vae_of_model(
            spec,
            None if self.pixels else encoder,
            normalization_of(self.trained.info["data_info"]),
            self.device,
        )

    def check_latents(self, vae: Vae, spec: str) -> None:
        """Raises ConfigError for a VAE whose latents the model cannot draw. Converted weights do not
        say which made theirs."""
        channels = self.trained.config.model.in_channels
        if vae.latent_channels != channels:
            raise ConfigError(
                f"--vae {spec} has latents of {vae.latent_channels} channels, and the model draws "
                f"{channels}; give the VAE that made its latents"
            )
        if self.rank == 0:
            print(
                f"note: the converted weights do not say which VAE made their latents; {spec} "
                f"({vae.identity}) is taken to be it",
                file=sys.stderr,
                flush=True,
            )

    def __call__(self) -> None:
        """Make a sample set for each scale."""
        sets = list(map(self.sample_set, self.configs))
        # Room is made for all scales at once: later the ranks may be hours apart.
        for made in sets if self.options.replace else ():
            made.parts.make_room()
        for config, made in zip(self.configs, sets, strict=True):
            self.make(config, made)

    def sample_set(self, config: SamplingConfig) -> SampleSet:
        """The sample set of one scale, as far as it is drawn."""
        return SampleSet(
            folder_of(self.options.out, config.cfg_scale),
            self.info(),
            self.job(config),
            self.options.num_samples,
            self.options.shard_size,
            self.rank,
            self.world_size,
        )

    def make(self, config: SamplingConfig, made: SampleSet) -> None:
        """Make one sample set: a complete one is left alone, any other drawn, and completed by rank
        0."""
        o = self.options
        start = time.perf_counter()
        done = "already drawn, left alone"
        # A rank that fails leaves a note, or the others would wait for its shards.
        try:
            if made.parts.claim():
                before = made.done()
                self.draw(config, made, before)
                if self.rank == 0:
                    made.finish()
                seconds = time.perf_counter() - start
                new = o.num_samples - before
                done = f"{new:,} drawn now in {seconds:.1f} s, {new / seconds:.1f} images/s"
        # A stop is no failure: the same ranks continue later.
        except Stopped:
            raise
        except BaseException as error:
            made.parts.failed(error)
            raise
        finally:
            made.parts.close()
        if self.rank == 0:
            # Also where the set was complete: --also may ask for a format that it does not have
            # yet.
            make_of(made.folder, o.also)
            width = f"average of width {o.ema_width:g} at" if o.ema_width else "checkpoint"
            print(
                f"{made.folder}: {o.num_samples:,} images, {config.sampler} {config.steps} steps, "
                f"cfg_scale {config.cfg_scale}, seed {config.seed}, {width} step "
                f"{self.trained.info['step']}; {done}",
                flush=True,
            )

    def draw(self, config: SamplingConfig, made: SampleSet, before: int) -> None:
        """Draw the shards of this rank that are missing; `before`: samples drawn already."""
        n = made.n
        model = self.trained.config.model
        bar = tqdm(
            total=n,
            initial=before,
            desc=made.folder.name,
            unit=" images",
            dynamic_ncols=True,
            disable=self.rank != 0,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            smoothing=0.05,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}{unit} "
            "[{elapsed}<{remaining}, {rate_fmt}]",
        )
        # A batch is decoded and stored by a thread while the next one is drawn.
        with bar, Worker(self.use_device) as finish:
            for part in made.todo():
                numbers = made.numbers(part)
                latents = np.empty((len(numbers), *made.info.shape), KINDS[made.info.kind])
                batches = draw_batches(
                    self.model(config),
                    self.trained.objective,
                    config,
                    index=numbers,
                    condition=self.conditions.of,
                    shape=latent_shape(model),
                    num_classes=model.num_classes,
                    batch_size=self.batch_size,
                    device=self.device,
                    # The bar is of all ranks, which are taken to be as fast as this one.
                    progress=lambda images: bar.update(min(images * self.world_size, n - bar.n)),
                    stop=stop_requested,
                )
                for drawn, x in batches:
                    # Batches arrive in order, so each has its place in the shard.
                    into = latents[drawn[0] - numbers[0] :][: len(drawn)]
                    finish(self.finish_batch, x, drawn, self.ready(), config.precision, into)
                finish(self.save, made, part, latents)

    @torch.inference_mode()
    def finish_batch(
        self, x: Tensor, numbers: Sequence[int], ready: Any, precision: str, into: npt.NDArray[Any]
    ) -> None:
        """Convert samples (B, C, H, W) to what is stored, in the worker's thread and, on a GPU, in
        a stream of its own. Raises DataError for samples that are not finite."""
        with torch.cuda.stream(self._stream) if ready else nullcontext():
            if ready:
                torch.cuda.current_stream().wait_event(ready)
            # Both end in a copy to the host, which is waited for here.
            into[...] = self.stored(x)
            finite = x.isfinite().flatten(1).all(1).cpu()
        if not finite.all():
            raise DataError(
                f"sample {numbers[int(finite.int().argmin())]} is not finite, drawn in {precision}; "
                "try --precision fp32, or another checkpoint"
            )

    def stored(self, x: Tensor) -> npt.NDArray[Any]:
        """Samples as they are stored: uint8 pixels, or float16 latents that nothing decodes."""
        if self.vae:
            return torch.cat([self.vae.decode(part) for part in x.split(DECODED_AT_ONCE)]).numpy()
        # From [-1, 1] to 0 .. 255, rounded to the nearest.
        if self.pixels:
            return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
        return x.half().cpu().numpy()

    def ready(self) -> Any:
        """On a GPU an event that marks the end of the work so far; None on a CPU."""
        if self.device.type != "cuda":
            return None
        # The worker's stream waits for it before it reads the samples.
        event = torch.cuda.Event()
        event.record()  # type: ignore[no-untyped-call]
        return event

    def use_device(self) -> None:
        """Prepare the worker's thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream()
        else:
            # The cores belong to the thread that draws.
            torch.set_num_threads(1)

    def save(self, made: SampleSet, part: int, latents: npt.NDArray[Any]) -> None:
        """Write one shard, with the labels and texts of its samples."""
        numbers = made.numbers(part)
        made.save(
            part,
            latents,
            self.conditions.labels(numbers),
            self.conditions.texts(numbers),
            self.drawn_with(),
        )

    def model(self, config: SamplingConfig) -> Model:
        """The model on its device; prepared when it is first needed, as a complete set needs
        none."""
        if self._model is None:
            self._model = prepare(
                self.trained.model,
                device=self.device,
                precision=config.precision,
                compile=self.compile,
            )
        return self._model

    def info(self) -> DatasetInfo:
        """The samples as a data set."""
        model = self.trained.config.model
        shape = latent_shape(model)
        if self.vae:
            # A decoder returns RGB images, larger than its latents.
            side = model.input_size * self.vae.downsampling
            shape = (3, side, side)
        # The text encoder's captions are not stored beside samples.
        encoders = self.trained.info["data_info"].get("encoders", {})
        kept = {"vae": encoders["vae"]} if "vae" in encoders else {}
        return DatasetInfo(
            name=f"samples of {self.trained.config.name}",
            kind="pixels" if self.pixels or self.vae else "latents",
            shape=shape,
            num_classes=self.conditions.num_classes,
            encoders=kept,
        )

    def job(self, config: SamplingConfig) -> dict[str, Any]:
        """All that the samples depend on but for rounding, as plain JSON values."""
        c = self.trained.config
        decoder = {"decoder": self.vae.identity} if self.vae else {}
        facts = {
            "sampling": asdict(config),
            "num_samples": self.options.num_samples,
            **self.conditions.facts,
            **decoder,
            # torch draws other noise on each type of device.
            "device": self.device.type,
            "run": c.name,
            "model": asdict(c.model),
            "diffusion": asdict(c.diffusion),
            "weights": "ema",
            # Two runs can agree in everything else.
            "weights_sha256": self.weights_sha256,
            **self.trained.info,
        }
        # As JSON has it, where tuples are lists: it is compared with a job that was read from a
        # file.
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def drawn_with(self) -> dict[str, Any]:
        """What the samples depend on by rounding only."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "compiled": self.compile,
            "gpu": gpu,
            "torch": str(torch.__version__),
            "largescale": largescale.__version__,
        }


def folder_of(out: Path, cfg_scale: float) -> Path:
    """The folder of the samples at one guidance scale."""
    return out / f"cfg{cfg_scale}"


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Sample, args, program="eval.sample", description=__doc__)
    serve_stop_signals()

    def draw() -> None:
        sampler = Sampler(options)
        # An EMA early in a run still holds the weights of the start, and draws noise. Of converted
        # weights neither decay nor step are known.
        note = ema_note(sampler.trained.config, sampler.trained.info["step"])
        if "converted" in sampler.trained.info:
            note = ""
        # A power-function average holds nothing of the start, but may be another than it should be.
        if options.ema_width is not None:
            ema = sampler.trained.info["ema"]
            note = residual_note(ema["width"], ema["residual"])
        if note and sampler.rank == 0:
            print(f"note: {note}", file=sys.stderr, flush=True)
        sampler()

    remedy = "what is drawn stays: correct the cause, and run the same command again"
    return run_program(draw, remedy)


if __name__ == "__main__":
    leave(main())
