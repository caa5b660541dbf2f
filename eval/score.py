"""python -m eval.score SAMPLES ... --reference REFERENCE: FID, sFID, IS, KID, Precision, Recall,
CLIP score.

SAMPLES: folders that eval.sample wrote, folders of PNGs, or ADM's .npz. REFERENCE: the same, a
packed data set of pixels, or statistics: those that --save-reference wrote, or ADM's .npz. Only
Inception's Frechet distance is called FID; that of another network is FD with its name, and
comparable with nothing but itself.

Each set gets a row in its own results.jsonl. Scoring is one process, on one device: 50,000 images
are a matter of minutes.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

import largescale
from eval.scoring.extractors import Clip, Extractor, load_clip, load_extractor
from eval.scoring.figures import (
    GROUPS,
    METRICS,
    Figure,
    Metric,
    Reference,
    check_resolution,
    extract_features,
    figures,
    open_reference,
    plain,
    text_figure,
)
from eval.scoring.image_sets import ImageSet, open_images
from eval.scoring.reference_statistics import may_hold_statistics, write_statistics
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.distributed.ranks import check_cuda, local_device
from largescale.errors import (
    CheckpointError,
    ConfigError,
    Stopped,
    StorageError,
    usable,
)
from largescale.host.files import append_line, require_writable
from largescale.host.launch import env_world_size, leave
from largescale.host.signals import serve_stop_signals

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Score:
    """Options of eval.score."""

    samples: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Sets of samples, each scored by itself. Without any, only a reference is made."""
    reference: Path | None = None
    """Real images (a folder, or a packed data set), or statistics of them (.npz)."""
    extractor: str = "inception"
    """The network whose features are compared: inception (FID), efficientnet-lite0 (comes with
    pip), clip:MODEL/WEIGHTS (open_clip) or dino:MODEL (timm)."""
    inception_weights: Path | None = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth),
    where there is no network to download them."""
    clip: str | None = None
    """Also compute the CLIP score of text-to-image samples, with this model, such as
    ViT-B-32/openai."""
    metrics: tuple[Metric, ...] = METRICS
    """The metrics to compute."""
    num_samples: int | None = None
    """Score only the first so many images of each set; by default all."""
    resize: int | None = None
    """Crop and scale the images of a folder to this side, as ADM does."""
    keep: int = 50_000
    """Features kept for KID, Precision and Recall, of evenly spaced images of each set."""
    save_reference: Path | None = None
    """Write the reference's statistics to this .npz, to be used again; with --keep features."""
    out: Path | None = None
    """A file that all rows are appended to, besides results.jsonl in each set; enough for sets that
    may only be read."""
    batch_size: int = 64
    """Images shown to the network at a time."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What this runs on; by default a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError for options that cannot work together."""
        check_counts(self, "num_samples", "batch_size")
        if self.keep < 2:
            raise ConfigError(f"keep={self.keep} must be at least 2; 10,000 serve most ends")
        # clip is among the metrics by default, and is then left out without --clip.
        if bool(self.clip) != ("clip" in self.metrics) and (self.clip or self.metrics == ("clip",)):
            raise ConfigError(
                "the CLIP score needs both --clip MODEL/WEIGHTS and clip among --metrics, where it "
                "is by default"
            )
        if not self.metrics:
            raise ConfigError(
                f"--metrics names none; choose of {', '.join(METRICS)}, or leave it out for all"
            )
        # Only the CLIP score does without a reference.
        if self.reference is None and (self.save_reference or not self.clip):
            raise ConfigError("no reference; give --reference, real images or statistics of them")
        if self.save_reference and self.save_reference.suffix != ".npz":
            raise ConfigError(f"--save-reference {self.save_reference} must end in .npz")
        self._check_outputs()
        check_cuda(self.device)

    def _check_outputs(self) -> None:
        """Raises ConfigError for a file to be written that is another one, or another program's, and
        CheckpointError for one in the checkpoints of a run."""
        if self.save_reference:
            require_outside_checkpoints(self.save_reference, "--save-reference")
            _require_other(self.save_reference, self.reference, "--save-reference", "--reference")
            _require_other(self.save_reference, self.out, "--save-reference", "--out")
            if not may_hold_statistics(self.save_reference):
                raise ConfigError(
                    f"--save-reference {self.save_reference} is there, and holds no statistics of "
                    "largescale; give a new file"
                )
        if self.out:
            require_outside_checkpoints(self.out, "--out")
            _require_other(self.out, self.reference, "--out", "--reference")
            require_rows(self.out, "give a new file with --out")


class Scorer:
    """One extractor and one reference, for any number of sets. All of `options.samples` are opened
    and checked before any work."""

    def __init__(self, options: Score, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """`sizes`: (height, width) of sets that do not exist yet."""
        options.check()
        self.options = options
        self.device = local_device(options.device)
        # What cannot be written or opened is an error now, not after minutes of work.
        outputs = filter(None, [options.out, options.save_reference])
        require_writable(*outputs, remedy="choose another")
        self.results = {path: self._results(path) for path in options.samples}
        self.sets = {path: self._open(path) for path in options.samples}

        # The networks, and the reference's features by them.
        self.clip: Clip | None = load_clip(options.clip, self.device) if options.clip else None
        self.reference: Reference | None = None
        if options.reference:
            # Sizes are compared before the reference's features are extracted.
            extractor = load_extractor(
                options.extractor, self.device, inception_weights=options.inception_weights
            )
            all_sizes = list(sizes)
            for images in self.sets.values():
                all_sizes.append(images.resolution)
            self.reference = self._open_reference(options.reference, extractor, all_sizes)

    def _results(self, path: Path) -> list[Path]:
        """The files that get a set's row: one beside it, and --out, which is enough where nobody
        may write beside it."""
        beside = folder_of(path) / RESULTS
        out = [self.options.out] if self.options.out else []
        try:
            require_writable(beside, remedy="or give --out FILE, which is enough")
            require_rows(beside, "move it away, or give --out FILE, which is enough")
        except (CheckpointError, ConfigError, StorageError):
            if not out:
                raise
            return out
        return [beside, *out]

    def _open(self, path: Path) -> ImageSet:
        """Open a set. Raises DataError, or ConfigError where the options do not fit it."""
        images = open_images(path, verify=True, resize=self.options.resize)
        n = self.options.num_samples
        if self.options.clip and images.texts(np.arange(1)) is None:
            raise ConfigError(
                f"{path} has no texts that its samples were asked for, so no CLIP score; leave out "
                "--clip"
            )
        # The jackknife needs a sample in each of its groups.
        if (n or len(images)) < GROUPS:
            raise ConfigError(
                f"{path}: {n or len(images)} samples are too few for any figure; score {GROUPS} or "
                "more"
            )
        # Fewer than asked for would be scored under the wrong name.
        if n and n > len(images):
            raise ConfigError(
                f"{path} holds {len(images):,} samples, not --num-samples {n:,}; draw more, or ask "
                "for fewer"
            )
        return images

    def _open_reference(
        self, path: Path, extractor: Extractor, sizes: Sequence[tuple[int, int]]
    ) -> Reference:
        """Open the reference, and save its statistics where that was asked for."""
        o = self.options
        reference = open_reference(
            path,
            extractor,
            sizes=sizes,
            resize=o.resize,
            keep=o.keep,
            batch_size=o.batch_size,
            device=self.device,
        )
        # Kept before any set is scored: it is what takes longest.
        if o.save_reference:
            write_statistics(o.save_reference, reference.statistics)
        return reference

    def __call__(self, path: Path) -> dict[str, Any]:
        """Score one set; returns its row."""
        o = self.options
        # A set may have been drawn since: other programs score each as soon as it exists.
        images = self.sets.get(path) or self._open(path)
        start = time.perf_counter()
        n = o.num_samples or len(images)
        found: list[Figure] = []
        notes: list[str] = []
        if self.reference:
            found, notes = self._against_reference(self.reference, images, n, path)

        # The CLIP score needs texts, not a reference.
        if self.clip and "clip" in o.metrics:
            found.append(
                text_figure(images, self.clip, n=n, batch_size=o.batch_size, device=self.device)
            )
        return {
            "samples": str(path),
            "fingerprint": images.fingerprint,
            "n": n,
            "drawn": drawn(path),
            "figures": {figure.name: plain(figure) for figure in found},
            "notes": notes,
            "reference": self.reference and self.reference.facts,
            "extractor": self.reference and self.reference.extractor.identity,
            "seconds": round(time.perf_counter() - start, 1),
            "unix_s": round(time.time()),
            "versions": {"torch": str(torch.__version__), "largescale": largescale.__version__},
        }

    def _against_reference(
        self, reference: Reference, images: ImageSet, n: int, path: Path
    ) -> tuple[list[Figure], list[str]]:
        """The figures of a set against the reference, and notes on them."""
        o = self.options
        check_resolution(o.reference or path, reference.statistics.resolution, [images.resolution])
        # Single features are needed by KID, Precision and Recall only.
        keep = o.keep if {"kid", "neighbours"} & set(o.metrics) else 0
        features = extract_features(
            images,
            reference.extractor,
            n=n,
            keep=keep,
            batch_size=o.batch_size,
            device=self.device,
            what=path.name,
            logits_too="class" in o.metrics,
        )
        return figures(features, reference, o.metrics, self.device)

    def keep(self, path: Path, row: dict[str, Any]) -> None:
        """Append the row to the set's results."""
        for file in self.results[path]:
            file.parent.mkdir(parents=True, exist_ok=True)
            append_line(file, json.dumps(row))


def _require_other(path: Path, other: Path | None, option: str, other_option: str) -> None:
    """Raise ConfigError where two options name one file."""
    # By where they lead: one may be a link.
    if other and os.path.realpath(path) == os.path.realpath(other):
        raise ConfigError(f"{option} {path} is {other_option} too; give another file")


def require_rows(path: Path, remedy: str) -> None:
    """Raise ConfigError where a row cannot be appended to the file, as it holds something else."""
    # What is no file is reported, with its owner, where it is tried out.
    if not path.is_file():
        return
    with path.open("rb") as file:
        # A crash can cut any line short, but not all of them before this.
        ours = any(line.startswith(b'{"samples": ') for line in file)
        empty = file.tell() == 0
    if not ours and not empty:
        raise ConfigError(f"{path} is there, and holds no rows of eval.score; {remedy}")


def folder_of(path: Path) -> Path:
    """The folder of a set; of a file the one that it lies in."""
    return path if path.is_dir() else path.parent


def drawn(path: Path) -> dict[str, Any] | None:
    """How the samples were made, where eval.sample recorded it: a score means nothing without."""
    with suppress(OSError, CheckpointError), usable(path):
        known = json.loads((folder_of(path) / "provenance.json").read_text())
        return {"run": known["run"], "step": int(known["step"]), **known["sampling"]}
    return None


def text(row: dict[str, Any]) -> str:
    """One set's figures as a table."""
    how = "" if row["drawn"] is None else f"; {drawn_text(row['drawn'])}"
    lines = [f"{row['samples']}: {row['n']:,} images{how}"]
    # Names in one column, values in the next.
    width = max(map(len, row["figures"]), default=0)
    for name, figure in row["figures"].items():
        lines.append(
            f"  {name:<{width}}  {figure['value']:>10.5g} +- {figure['error']:.2g} "
            f"({figure['error_is']}; {figure['better']} is better)"
        )
    lines += [f"  note: {note}" for note in row["notes"]]
    return "\n".join(lines)


def drawn_text(d: dict[str, Any]) -> str:
    """How samples were drawn, in one line; settings that hardly anybody changes only where they
    are."""
    text = (
        f"{d['run']} at step {d['step']:,}, {d['sampler']} {d['steps']} steps, cfg_scale "
        f"{d['cfg_scale']}, seed {d['seed']}, {d['precision']}"
    )
    # What the paper and most others use goes without saying.
    usual = {"eta": 0.0, "guidance_interval": [0.0, 1.0], "cfg_channels": None}
    for key, value in usual.items():
        if d.get(key) != value:
            text += f", {key} {d[key]}"
    return text


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Score, args, program="eval.score", description=__doc__)
    serve_stop_signals()
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Score) -> None:
    """Score each set in turn. Raises Stopped with what is done and what is not."""
    # Under torchrun every rank would score everything, and append its row.
    if env_world_size() > 1:
        raise ConfigError(
            f"scoring is one process, not {env_world_size()}; start it without torchrun or "
            "srun, or with one task"
        )
    if not options.samples and not options.save_reference:
        raise ConfigError(
            "no samples; give the folders that eval.sample wrote, or --save-reference FILE to "
            "keep the reference's statistics only"
        )
    try:
        # A signal can arrive while the reference is opened, too.
        scorer = Scorer(options)
        for path in options.samples:
            # Printed before it is kept: a row that cannot be written is at least seen.
            row = scorer(path)
            print(text(row), flush=True)
            scorer.keep(path, row)
    except Stopped:
        raise Stopped(
            "asked to stop; sets whose figures are printed are done, everything else starts "
            "again: name the others only; what takes long of a reference is kept by "
            "--save-reference FILE.npz"
        ) from None
    if options.save_reference and scorer.reference:
        facts = scorer.reference.facts
        print(
            f"{options.save_reference}: statistics of {facts['count']:,} images of {facts['path']}",
            flush=True,
        )


if __name__ == "__main__":
    leave(main())
