"""The options of eval.curve."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from eval.curves.rows import Row
from eval.scoring.figures import GROUPS
from largescale.checkpoint.files import checkpoints, require_outside_checkpoints
from largescale.config.command_line import check_counts
from largescale.diffusion.objective import SamplerName
from largescale.errors import CheckpointError, ConfigError
from largescale.models.half_precision import check_on_cpu
from largescale.power_ema import WIDEST

# Widths of the averages in a range of --ema-widths.
SCANNED = 8
# Widths are rounded to so much.
NARROWEST = 0.0001
# The options that change what a score is: rows that differ in one of them lie on other curves.
PROTOCOL = (
    "reference",
    "num_samples",
    "cfg_scale",
    "guidance_interval",
    "sampler",
    "steps",
    "seed",
    "extractor",
    "inception_weights",
    "prompts_file",
    "captions",
    "precision",
    "device",
)


@dataclass(frozen=True)
class Curve:
    """Options of eval.curve."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, such as runs/vanilla runs/curriculum."""
    reference: Path | None = None
    """Real images, or statistics of them (eval.score --save-reference); not needed without samples."""
    out: Path | None = None
    """The folder for curve.html, curve.png and curve.json, and for everything of a run that may only
    be read; by default RUN/curve of the first run."""
    num_samples: int = 10_000
    """Samples drawn of each checkpoint; 0, with --ema-widths and --validation: none, and the held-out
    loss alone."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is no guidance."""
    sampler: SamplerName | None = None
    """The sampler; by default ddim, or heun where the objective has no ddim."""
    steps: int | None = None
    """Sampling steps; by default 50 for ddim, 18 for heun."""
    seed: int = 0
    """Seed of the samples."""
    extractor: str = "inception"
    """The network whose features are compared: inception (FID), efficientnet-lite0 (comes with
    pip), clip:MODEL/WEIGHTS (open_clip) or dino:MODEL (timm)."""
    inception_weights: Path | None = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth),
    where there is no network to download them."""
    prompts_file: Path | None = None
    """Prompts of text-to-image models, as eval.prompts froze them."""
    captions: Path | None = None
    """A packed data set whose captions are the prompts of text-to-image models."""
    every: int = 1
    """Score only the checkpoints at multiples of this step, and the newest."""
    text_encoder: str | None = None
    """Where the text encoder of the data lies now, for prompts; by default where it was when the
    data were packed."""
    vae: str | None = None
    """Where the VAE of a latent model lies now; by default where it was when the data were packed.
    It decodes the samples."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels between these two; 0 is no noise, 1 pure noise."""
    ema_widths: tuple[str, ...] = ()
    """Score power-function averages of these widths, such as 0.05 0.1, or 0.02:0.25, which is eight
    from one to the other, at each run's newest snapshot; in place of its checkpoints."""
    validation: Path | None = None
    """A packed set of held-out images, whose loss is measured for each of --ema-widths as well."""
    keep_samples: bool = False
    """Keep the samples; by default they are removed once they are scored."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What matrix products are computed in; auto: on a GPU the precision of the training, else
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile; auto: where it is expected to pay."""
    batch_size: int | None = None
    """Images that each rank draws at a time; by default 128 on a GPU, 32 on a CPU."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What this runs on; by default a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError, for options that cannot work."""
        if self.out:
            require_outside_checkpoints(self.out, "--out")
        self.widths()
        check_counts(self, "batch_size")
        if self.validation and not self.ema_widths:
            raise ConfigError(
                "--validation is for --ema-widths; train with --data.validation for the loss of each "
                "checkpoint"
            )
        if self.every < 1:
            raise ConfigError(f"every={self.every} must be at least 1; it counts training steps")
        # By resolved path: a run under two names would be scored twice.
        if len(set(map(Path.resolve, self.runs))) < len(self.runs):
            raise ConfigError("a run is named twice; name each once")
        for run in self.runs:
            if not checkpoints(run):
                raise CheckpointError(
                    f"{run} holds no checkpoint; give the folders of runs, such as runs/digits"
                )
        self._check_samples()
        if self.device == "cpu" and self.precision != "auto":
            check_on_cpu(self.precision, "--precision {}")

    def _check_samples(self) -> None:
        """Raises ConfigError for samples that cannot be scored."""
        if self.num_samples == 0 and self.validation:
            return
        # The jackknife needs a sample in each of its groups.
        if self.num_samples < GROUPS:
            raise ConfigError(
                f"num_samples={self.num_samples} are too few for any figure; set --num-samples "
                f"{GROUPS} or more, or 0 with --ema-widths and --validation"
            )
        if self.reference is None:
            raise ConfigError(
                "samples are compared with real images; give --reference, or --num-samples 0 with "
                "--ema-widths and --validation"
            )

    def widths(self) -> list[float]:
        """The widths of --ema-widths. Raises ConfigError."""
        found: list[float] = []
        for word in self.ema_widths:
            low, colon, high = word.partition(":")
            try:
                ends = [float(low), float(high or low)]
            except ValueError:
                ends = [0.0, 0.0]
            if not NARROWEST <= ends[0] <= ends[1] <= WIDEST or (colon and not high):
                raise ConfigError(
                    f"--ema-widths {word} must be a width from {NARROWEST} to {WIDEST}, or two as in "
                    "0.02:0.25"
                )
            # By equal ratios, rounded to what a name can have.
            ratio = ends[1] / ends[0]
            for i in range(SCANNED if colon else 1):
                found.append(round(ends[0] * ratio ** (i / (SCANNED - 1)), 4))
        return sorted({*found})

    def protocol(self) -> Row:
        """The settings that rows must share to lie on one curve, as plain JSON."""
        settings = {name: getattr(self, name) for name in PROTOCOL}
        plain: Row = json.loads(json.dumps(settings, default=str))
        return plain
