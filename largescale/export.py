"""python -m largescale.export RUN: the EMA weights as safetensors with their config and a model
card, or with --format diffusers a folder that diffusers opens. Needs no DeepSpeed."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from largescale.checkpoint.export_folder import (
    require_export_folder,
    require_writable_export,
    write_export,
)
from largescale.checkpoint.files import checkpoints, require_outside_checkpoints
from largescale.checkpoint.weights import (
    EXPORT_CONFIG,
    EXPORT_WEIGHTS,
    WeightsName,
    load_trained,
    read_weights,
)
from largescale.config.command_line import parse_options, run_program
from largescale.config.serialise import from_dict, to_dict
from largescale.config.validation import ema_note
from largescale.encoders.identity import library
from largescale.errors import ConfigError
from largescale.host.files import require_writable
from largescale.interop.card_text import GRID, CardFacts
from largescale.interop.diffusers_pipeline import (
    PipelineFacts,
    PipelineParts,
    SchedulerName,
    cast,
    check_exportable,
    class_names,
    open_vae,
    write_pipeline,
)
from largescale.interop.hub_upload import EXTRA, check_push, push
from largescale.interop.model_card import (
    CARD,
    find_grid,
    only_card,
    read_scores,
    sample_sets,
    write_card,
)
from largescale.interop.pipeline_folder import (
    card_files,
    known_facts,
    replaced,
    require_pipeline_folder,
)
from largescale.power_ema import residual_note

# Options that only one format reads.
_OF_DIFFUSERS = ("scheduler", "vae", "labels", "max_shard_size")


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, such as runs/digits; or an export, such as largescale.convert makes."""
    out: Path | None = None
    """The folder to write to; by default RUN/export, or RUN/diffusers."""
    step: int | None = None
    """The step of the checkpoint to export; by default the newest valid one."""
    format: Literal["largescale", "diffusers"] = "largescale"
    """largescale: what every program here takes. diffusers: a folder for diffusers' pipelines, of a
    DiT that predicts noise and has no captions."""
    weights: WeightsName | None = None
    """ema: the smoothed weights. raw: those that the optimizer updates. By default ema, and of an
    export what it holds."""
    ema_width: float | None = None
    """In place of the EMA, the power-function average of this width, of a run that was trained with
    --optimizer.ema-widths."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The type that the weights are stored in. By default fp32, and of an export what it has."""
    scheduler: SchedulerName = "ddim"
    """With --format diffusers: the sampler that the pipeline begins with; another can take its
    place there."""
    vae: str | None = None
    """With --format diffusers: where the VAE of a latent model lies now; by default where it was
    when the data were packed. none: leave it out."""
    labels: Path | None = None
    """With --format diffusers: a text file with the name of each class on a line; by default
    ImageNet's names for it, where torchvision is installed, else numbers."""
    max_shard_size: str = "5GB"
    """With --format diffusers: weights above this size are written in several files."""
    samples: tuple[Path, ...] = ()
    """Folders of samples whose scores, and whose grid, the card shows; by default those below
    RUN."""
    license: str | None = None
    """The licence that the card names, as the hub spells it, such as apache-2.0."""
    datasets: tuple[str, ...] = ()
    """Names of the training data on the hub, for the card."""
    card_only: bool = False
    """Write, and with --push-to-hub send, the model card only."""
    push_to_hub: str | None = None
    """Send the folder to this repository on the hub, USER/MODEL, which is made if need be."""
    private: bool = False
    """With --push-to-hub: make the repository private, if it is made."""

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other, before any work."""
        if self.format != "diffusers":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _OF_DIFFUSERS:
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} is an option of --format diffusers; leave it "
                        "out, or add that"
                    )
        elif not re.fullmatch(r"\d+[KMG]B", self.max_shard_size):
            raise ConfigError(f"--max-shard-size {self.max_shard_size} must be as 500MB or 5GB are")
        elif not self.card_only:
            # A missing package is an error now, not after the checkpoint has been read.
            library("diffusers", EXTRA)
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private is an option of --push-to-hub; leave it out, or add that")
        if self.push_to_hub is not None:
            check_push(self.push_to_hub)
        for folder in self.samples:
            if not folder.is_dir():
                raise ConfigError(f"--samples {folder} is not a folder; give one of eval.sample")

    @property
    def folder(self) -> Path:
        """The folder to write to."""
        name = "diffusers" if self.format == "diffusers" else "export"
        return self.out or self.run / name


@dataclass(frozen=True)
class Written:
    """What an export wrote."""

    folder: Path
    description: dict[str, Any]
    notes: tuple[str, ...]


def export(run: Path, out: Path | None = None, step: int | None = None, **options: Any) -> Path:
    """Write the weights and the config of a run's checkpoint, and their card; returns the folder.
    `options`: fields of `Export`."""
    return write(Export(run, out, step, **options)).folder


def write(options: Export) -> Written:
    """Write what the options ask for, and send nothing."""
    options.check()
    _require_folder(options)
    facts: PipelineFacts | None
    if options.format == "diffusers" and not options.card_only:
        description, parameters, facts, notes = _write_pipeline(options)
    else:
        description, weights = read_weights(
            options.run, options.step, options.weights, options.ema_width
        )
        if options.format == "diffusers":
            check_exportable(from_dict(description["config"]))
        dtype = options.dtype or description.pop("dtype", "fp32")
        for name, tensor in weights.items():
            weights[name] = cast(tensor, dtype, name)
        _note_dtype(description, dtype)
        parameters, notes = sum(tensor.numel() for tensor in weights.values()), []
        facts = known_facts(options.folder)
        if not options.card_only:
            write_export(options.folder, weights, description)
    notes += _write_card(options, description, parameters, facts)

    # A short run's EMA may still contain much of the first weights.
    if description.get("weights") != "raw" and "ema" not in description:
        notes.append(ema_note(from_dict(description["config"]), description["step"]))
    if "ema" in description:
        ema = description["ema"]
        notes.append(residual_note(ema["width"], ema["residual"]))
    return Written(options.folder, description, tuple(filter(None, notes)))


def _require_folder(options: Export) -> None:
    """Raise CheckpointError where the folder is something else's, or cannot be written to."""
    out = options.folder
    require_outside_checkpoints(out, "--out")
    if only_card(out):
        require_writable(out / CARD, remedy="choose another --out")
    elif options.format == "diffusers":
        require_pipeline_folder(out)
    else:
        if options.out is not None:
            require_export_folder(out)
        # Before the checkpoint is hashed, which takes long. A run without one is the clearer error.
        if checkpoints(options.run):
            require_writable_export(out)


def _write_pipeline(options: Export) -> tuple[dict[str, Any], int, PipelineFacts, list[str]]:
    """Write a diffusers folder; returns what a card needs of it, and notes."""
    trained = load_trained(options.run, options.step, options.weights, options.ema_width)
    # Before the VAE is loaded, and anything is written.
    check_exportable(trained.config)
    vae, note = open_vae(options.vae, trained)
    description = {"config": to_dict(trained.config), **trained.info}
    dtype = options.dtype or description.get("dtype", "fp32")
    parts = PipelineParts(
        trained,
        vae,
        class_names(options.labels, trained),
        dtype,
        options.scheduler,
        options.max_shard_size,
    )
    _note_dtype(description, dtype)
    with replaced(options.folder, description) as folder:
        facts = write_pipeline(folder, parts)
        description["diffusers"] = dataclasses.asdict(facts)
    return description, sum(p.numel() for p in trained.model.parameters()), facts, [note]


def _note_dtype(description: dict[str, Any], dtype: str) -> None:
    """Write the type of the weights into their description, which says nothing of fp32."""
    description.pop("dtype", None)
    if dtype != "fp32":
        description["dtype"] = dtype


def _write_card(
    options: Export, description: dict[str, Any], parameters: int, facts: PipelineFacts | None
) -> list[str]:
    """Write the card beside the weights; returns notes."""
    folders = options.samples or sample_sets(options.run)
    # Sets that are given are shown, whatever checkpoint they are of.
    step = None if options.samples else description["step"]
    grid = find_grid(folders, step)
    # An export whose card is written anew in its place keeps the grid that it has.
    own = options.folder / GRID
    if grid is None and own.is_file() and options.run.resolve() == options.folder.resolve():
        grid = own
    card = CardFacts(
        description,
        parameters,
        options.license,
        options.datasets,
        read_scores(folders, step),
        grid is not None,
        options.format == "diffusers",
        facts if options.format == "diffusers" else None,
        options.push_to_hub,
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    if write_card(options.folder, card, grid):
        return []
    return [f"{options.folder / CARD} is not one of largescale, and stays as it is"]


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Export, args, program="largescale.export", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Export) -> None:
    written = write(options)
    out = written.folder
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    kind = "raw" if written.description.get("weights") == "raw" else "EMA"
    if options.card_only:
        print(f"card: {out / CARD}")
    elif options.format == "diffusers":
        print(f"{kind} weights, as a diffusers pipeline: {out}, how to open it: {out / CARD}")
    else:
        print(f"{kind} weights: {out / EXPORT_WEIGHTS}, config: {out / EXPORT_CONFIG}")
    if options.push_to_hub is not None:
        files = card_files(out) if options.card_only else ()
        print(f"sent to {push(out, options.push_to_hub, private=options.private, files=files)}")


if __name__ == "__main__":
    sys.exit(main())
