"""Says what a packed data set is; on request checks every hash, and draws a sheet of its images.

python -m data_prep.describe data/coco2014 --verify --picture coco.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image

from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.data.format import MANIFEST, DatasetInfo
from largescale.data.images import grid, titled, to_uint8
from largescale.data.loader import to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.encoders.vae import load_vae
from largescale.errors import ConfigError, DataError
from largescale.host.launch import printable


@dataclass(frozen=True)
class Describe:
    data: Annotated[Path, tyro.conf.Positional]
    """The folder that a packing program wrote."""
    verify: bool = False
    """Read every shard and compare its hash."""
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
    info, manifest = data.info, data.manifest
    size = sum(shard["bytes"] for shard in manifest["shards"])
    made_with = {
        name.removesuffix("_encoder"): place
        for name, place in manifest.get("made_with", {}).items()
        if place
    }
    lines = [
        ("data set", f"{info.name}, fingerprint {data.fingerprint[:12]}"),
        (
            "images",
            f"{len(data):,} as {info.kind} {info.shape}{', with mirror images' * data.has_mirror}, "
            f"x_start {info.x_shape}, scale factor {info.scale_factor:g}",
        ),
        (
            "labels",
            f"{info.num_classes} classes{_class_names(manifest)}" if info.num_classes else "none",
        ),
        ("captions", _captions(info, manifest)),
        *(
            (
                f"{name} encoder",
                ", from ".join([identity, *([made_with[name]] if name in made_with else [])]),
            )
            for name, identity in info.encoders.items()
        ),
        (
            "on disk",
            f"{size / 1e6:,.1f} MB, shards: {len(manifest['shards'])}, {size / len(data):,.0f} "
            "bytes an image",
        ),
    ]
    job = manifest.get("job", {})
    if "source" not in job:  # eval.sample's, which packed nothing
        lines += [(key, _short(value)) for key, value in job.items()]
    else:
        skipped = manifest["skipped"]
        how = [f"encoded in {job['precision']} on {job['device']}"] if "precision" in job else []
        lines.append(
            ("packed", ", ".join([job["crop"], *how, f"{job['rows_per_shard']} rows a shard"]))
        )
        lines += [(f"source {key}", _short(value)) for key, value in job["source"].items()]
        lines.append(("left out", f"{skipped['count']} images"))
        lines += [("", f"{count} x {reason}") for reason, count in skipped["reasons"].items()]
    width = max(len(name) for name, _ in lines) + 2
    return [printable(f"{name:<{width}}{value}") for name, value in lines]


def _captions(info: DatasetInfo, manifest: dict[str, Any]) -> str:
    if "captions" not in manifest["columns"]:
        return "none"
    said = f"{manifest['captions']:,}" if "captions" in manifest else "texts"
    if info.captions is None:
        return f"{said}, not encoded"
    c = info.captions
    cut = (
        f"; {manifest['captions_cut']:,} were longer, and are cut"
        if manifest.get("captions_cut")
        else ""
    )
    return f"{said}, up to {c.tokens} tokens of {c.width}, and one vector of {c.pooled_width}, a caption{cut}"


def _class_names(manifest: dict[str, Any]) -> str:
    names = manifest.get("class_names") or []
    return f": {_short(names)}" if names else ""


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def sheet(data: ShardDataset, n: int, seed: int, vae: str | None) -> npt.NDArray[np.uint8]:
    """Raises ConfigError for latents whose VAE is not given, or is another."""
    rows = sample_indices(np.arange(min(n, len(data))), len(data), seed)
    gathered = data.gather(rows)
    info, latent = data.info, torch.from_numpy(gathered["latent"])
    mean = (
        torch.zeros(len(rows), *info.x_shape) if info.kind == "moments" else None
    )  # no noise: the mean's image
    x_start = to_x_start(latent, info.kind, info.scale_factor, mean)
    if info.kind == "pixels":
        images = to_uint8(x_start)
    else:
        vae = vae or data.manifest.get("made_with", {}).get("vae")
        if vae is None:
            raise ConfigError(
                f"latents of {info.encoders.get('vae')} need their VAE to be seen; give it with "
                "--vae"
            )
        decoder = load_vae(vae, torch.device("cpu"))
        if decoder.identity != info.encoders.get("vae"):
            raise ConfigError(
                f"--vae {vae} is {decoder.identity}, the latents are of {info.encoders.get('vae')}"
            )
        images = decoder.decode(x_start).permute(0, 2, 3, 1).numpy()
    columns, scale = min(5, len(images)), max(1, 128 // images.shape[1])
    if "captions" in data.manifest["columns"]:
        return titled(images, [texts[0] for texts in data.texts(rows)], columns, scale)
    if not info.num_classes:
        return grid(images, columns, scale)
    names = data.manifest.get("class_names") or []
    labels = gathered["label"].tolist()
    titles = [f"{label} {names[label]}" if names else str(label) for label in labels]
    return titled(images, titles, columns, scale, lines=2)


def run(options: Describe) -> None:
    if options.picture and options.picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(
            f"--picture {options.picture} has no suffix of a picture; try {options.picture}.png"
        )
    check_counts(options, "images")
    data = ShardDataset(options.data, verify=options.verify)
    try:
        print("\n".join(describe(data)))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{data.path / MANIFEST} says what no packing program writes ({error!r}); restore it"
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
