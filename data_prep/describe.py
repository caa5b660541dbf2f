"""Describes a packed data set; on request checks every hash, and draws a sheet of its images. Of a
set that is being packed: how far all ranks have come, and when they will be done.

python -m data_prep.describe data/coco2014 --verify --picture coco.png
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from data_prep.images import round_trip_words
from data_prep.progress import describe_packing, is_being_packed
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.data.format import MANIFEST, DatasetInfo
from largescale.data.images import grid, titled, to_uint8
from largescale.data.loader import to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.data.statistics import from_manifest, measure_rows, merge
from largescale.encoders.vae import load_vae
from largescale.errors import ConfigError, DataError
from largescale.host.files import write_atomically
from largescale.host.launch import printable
from largescale.host.sizes import size_text


@dataclass(frozen=True)
class Describe:
    data: Annotated[Path, tyro.conf.Positional]
    """The folder that a packing program wrote."""
    verify: bool = False
    """Read every shard and compare its hash."""
    measure: bool = False
    """Measure the mean and standard deviation of each channel of latents, which sets of older
    versions lack, and write them into the manifest."""
    picture: Path | None = None
    """Write a picture of images drawn at random, decoded, with their first captions or their
    labels."""
    images: int = 20
    """How many images the picture shows."""
    seed: int = 0
    """Seed of the choice of images."""
    vae: str | None = None
    """Where the VAE of the latents lies now; by default where it was when they were packed."""


def describe(data: ShardDataset) -> list[str]:
    """Lines about a data set: what it is, and how it was made."""
    return _lines([*_content(data), *_origin(data.manifest)])


def _lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    # Values stand in one column, behind the longest name.
    width = max(len(name) for name, _ in facts) + 2
    lines = []
    for name, value in facts:
        lines.append(printable(f"{name:<{width}}{value}"))
    return lines


def _content(data: ShardDataset) -> list[tuple[str, str]]:
    """Names and values of what the data set holds."""
    info = data.info
    # A line each, in the order in which a reader asks.
    manifest = data.manifest
    facts = [("data set", f"{info.name}, fingerprint {data.fingerprint[:12]}")]
    mirrored = ", with mirror images" if data.has_mirror else ""
    images = (
        f"{len(data):,} as {info.kind} {info.shape}{mirrored}, x_start {info.x_shape}, scale "
        f"factor {info.scale_factor:g}"
    )
    facts.append(("images", images))
    facts += _latents(data)
    labels = "none"
    if info.num_classes:
        labels = f"{info.num_classes} classes{_class_names(manifest)}"
    facts.append(("labels", labels))
    facts.append(("captions", _captions(info, manifest)))

    # Where each encoder was when it was used: made_with has the names of packing's options.
    made_with = dict(manifest.get("made_with", {}))
    for name, identity in info.encoders.items():
        place = made_with.get(name) or made_with.get(f"{name}_encoder")
        facts.append((f"{name} encoder", f"{identity}, from {place}" if place else identity))

    # What a copy to another disk takes.
    shards = manifest["shards"]
    size = sum(shard["bytes"] for shard in shards)
    on_disk = f"{size_text(size)}, shards: {len(shards)}, {size / len(data):,.0f} bytes an image"
    facts.append(("on disk", on_disk))
    return facts


def _latents(data: ShardDataset) -> list[tuple[str, str]]:
    """Names and values of what was measured of latents: their statistics and their round trip."""
    facts = []
    info = data.info
    if info.latent_mean and info.latent_std:
        facts.append(("of encoder", _ranges(info.latent_mean, info.latent_std)))
    # Shown beside the encoder's own: data.normalize chooses between the two.
    statistics = from_manifest(data.manifest, data.path)
    if statistics:
        facts.append(("measured", _ranges(statistics.mean, statistics.std)))
    trip = data.manifest.get("round_trip")
    if trip:
        facts.append(("round trip", round_trip_words(trip)))
    return facts


def _ranges(mean: Sequence[float], std: Sequence[float]) -> str:
    """Statistics of channels as their ranges."""
    return (
        f"mean {min(mean):.3g} to {max(mean):.3g}, std {min(std):.3g} to {max(std):.3g} over "
        f"{len(mean)} channels"
    )


def measure(data: ShardDataset) -> None:
    """Writes the statistics of latents into the manifest, of which the fingerprint does not depend.
    Raises ConfigError for pixels."""
    info = data.packed
    if info.kind == "pixels":
        raise ConfigError(f"{data.path} holds pixels, which need no --measure; leave it out")
    shards = tqdm(range(len(data.manifest["shards"])), "measure", unit="shard", delay=2)
    # Shard by shard, as the packer does: the same digits.
    parts = []
    for number in shards:
        parts.append(measure_rows([row["latent"] for row in data.rows(number)], info.kind))
    # With the encoder's identity, by which statistics of another encoder's latents are refused.
    found = replace(merge(parts), encoder=info.encoders.get("vae"))
    file = data.path / MANIFEST
    # Read again, as the file has it: in data.manifest some values are objects already.
    manifest = json.loads(file.read_text()) | {"statistics": asdict(found)}
    write_atomically(file, json.dumps(manifest, indent=1) + "\n")


def _origin(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of how the data set was made."""
    job = manifest.get("job", {})
    # eval.sample's job has no source: it drew the images.
    if "source" not in job:
        return list(zip(job, map(_short, job.values()), strict=True))

    # A packing program's: how the images were prepared, where they come from, what is left out.
    how = [job["crop"]]
    if "precision" in job:
        how.append(f"encoded in {job['precision']} on {job['device']}")
    how.append(f"{job['rows_per_shard']} rows a shard")
    facts = [("packed", ", ".join(how))]
    for key, value in job["source"].items():
        facts.append((f"source {key}", _short(value)))
    for addition in manifest.get("additions", ()):
        source = addition["job"]["info"]["name"]
        facts.append(("added", f"{addition['rows']:,} images of {source}"))
    skipped = manifest["skipped"]
    facts.append(("left out", f"{skipped['count']:,} images"))
    for reason, count in skipped["reasons"].items():
        facts.append(("", f"{count} x {reason}"))
    return facts


def _captions(info: DatasetInfo, manifest: dict[str, Any]) -> str:
    """How many captions there are, and how they are encoded."""
    if "captions" not in manifest["columns"]:
        return "none"
    count = f"{manifest['captions']:,}" if "captions" in manifest else "texts"
    if info.captions is None:
        return f"{count}, not encoded"
    c = info.captions
    # What the loader pads to, and the two widths.
    text = f"{count}, up to {c.tokens} tokens of {c.width}, and one vector of {c.pooled_width}, "
    text += "a caption"
    cut = manifest.get("captions_cut")
    if cut:
        text += f"; {cut:,} were longer, and are cut"
    return text


def _class_names(manifest: dict[str, Any]) -> str:
    names = manifest.get("class_names") or []
    return f": {_short(names)}" if names else ""


def _short(value: Any) -> str:
    """A value as text of 100 characters at most."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def sheet(data: ShardDataset, n: int, seed: int, vae: str | None) -> npt.NDArray[np.uint8]:
    """A picture of n images drawn at random, with captions or labels. Raises ConfigError for
    latents whose VAE is not given, or is another."""
    rows = sample_indices(np.arange(min(n, len(data))), len(data), seed)
    gathered = data.gather(rows)
    images = _decoded(data, torch.from_numpy(gathered["latent"]), vae)

    # Small images are enlarged to about 128 pixels a side.
    columns = min(5, len(images))
    scale = max(1, 128 // images.shape[1])
    if "captions" in data.manifest["columns"]:
        return titled(images, [texts[0] for texts in data.texts(rows)], columns, scale)
    if not data.info.num_classes:
        return grid(images, columns, scale)
    # Two lines are enough for a class's name.
    names = data.manifest.get("class_names") or []
    titles = []
    for label in gathered["label"].tolist():
        titles.append(f"{label} {names[label]}" if names else str(label))
    return titled(images, titles, columns, scale, lines=2)


def _decoded(data: ShardDataset, latent: torch.Tensor, vae: str | None) -> npt.NDArray[np.uint8]:
    """The images that stored values stand for, (N, H, W, 3)."""
    info = data.info
    # Of moments the mean: the posterior without noise.
    noise = torch.zeros(len(latent), *info.x_shape) if info.kind == "moments" else None
    x_start = to_x_start(latent, info.kind, info.normalization, noise)
    if info.kind == "pixels":
        return to_uint8(x_start)

    # Latents are decoded by the VAE that made them only: another's pictures would look plausible.
    vae = vae or data.manifest.get("made_with", {}).get("vae")
    if vae is None:
        raise ConfigError(
            f"latents of {info.encoders.get('vae')} need their VAE to be seen; give it with --vae"
        )
    decoder = load_vae(vae, torch.device("cpu"))
    if decoder.identity != info.encoders.get("vae"):
        raise ConfigError(
            f"--vae {vae} is {decoder.identity}, the latents are of {info.encoders.get('vae')}"
        )
    images: npt.NDArray[np.uint8] = (
        decoder.normalized(info.normalization).decode(x_start).permute(0, 2, 3, 1).numpy()
    )
    return images


def run(options: Describe) -> None:
    """Prints the description, verifies the files and draws the picture, as the options ask for."""
    # Refused at once: to verify or to measure a large set takes long.
    if options.picture and options.picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(
            f"--picture {options.picture} has no suffix of a picture; try {options.picture}.png"
        )
    check_counts(options, "images")
    if is_being_packed(options.data):
        print("\n".join(_lines(describe_packing(options.data))))
        # A set to which images are added is there meanwhile.
        if not (options.data / MANIFEST).exists():
            return
    data = ShardDataset(options.data, verify=options.verify)
    if options.measure:
        measure(data)
        # Opened again, to describe the statistics that are new.
        data = ShardDataset(options.data)
    # What a packing program adds to the manifest is not checked when it is read.
    try:
        print("\n".join(describe(data)))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{data.path / MANIFEST} is not what packing programs write ({error!r}); restore it"
        ) from error
    if options.verify:
        print("verified: every file has the hash that the manifest names")
    if options.picture:
        picture = Image.fromarray(sheet(data, options.images, options.seed, options.vae))
        try:
            picture.save(options.picture)
        except OSError as error:
            raise ConfigError(
                f"cannot write {options.picture}: {error}; correct --picture"
            ) from error
        print(f"picture: {options.picture}")


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Describe, args, program="data_prep.describe", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
