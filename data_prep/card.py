"""The card of a packed set: README.md, as the hub shows it, and a picture of some of its images.
All of it is read from the set itself, so that it is the same whoever writes it.

    OUT/README.md  OUT/images.png
"""

import io
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image

from data_prep.images import round_trip_words
from largescale.data.format import LATENT_RGB
from largescale.data.images import grid, linear_rgb, to_uint8
from largescale.data.loader import to_x_start
from largescale.data.shards import ShardDataset
from largescale.data.statistics import from_manifest
from largescale.host.files import write_atomically
from largescale.host.sizes import size_text
from largescale.interop.markdown import code, plain, table

CARD = "README.md"
PICTURE = "images.png"
# In a comment, which tells our cards from other people's.
MARK = "written by largescale's data_prep"
SHOWN = 24
COLUMNS = 8
# What the hub calls sets of so many rows, below each.
SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}
# The hub's names of licences; another text is a licence of another name.
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def write_card(out: Path) -> None:
    """Writes the card of a packed set as it is now. Somebody else's README.md stays, which is
    said."""
    if not _write(ShardDataset(out)):
        print(f"note: {out / CARD} is not ours, and stays as it is", file=sys.stderr, flush=True)


def _write(data: ShardDataset) -> bool:
    """Writes the card, unless it is there already; returns False, and writes nothing, where
    somebody else's README.md lies there."""
    path = data.path / CARD
    try:
        there = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = MARK
    except UnicodeDecodeError:
        return False
    if MARK not in there:
        return False
    # A card with this fingerprint is of the set as it is: nothing has to be drawn.
    if data.fingerprint not in there:
        picture = _picture(data)
        if picture is not None:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            write_atomically(data.path / PICTURE, file.getvalue())
        # After its picture: if this is killed between the two, the next start writes both.
        write_atomically(path, card_text(data, picture is not None))
    return True


def card_text(data: ShardDataset, picture: bool) -> str:
    """The whole card."""
    manifest = data.manifest
    parts = [
        f"---\n{front_matter(data)}\n---",
        f"<!-- {MARK}, of the fingerprint {data.fingerprint}; without this line the card stays as "
        "it is when the set grows -->",
        f"# {plain(_title(data))}",
        _summary(data),
    ]
    # Latents are shown without their VAE. The card says so, as the colours are not the true ones.
    if picture:
        what = "" if data.info.kind == "pixels" else ", by a linear map of their latents to colours"
        parts.append(f"![Some of the images{what}]({PICTURE})")
    parts.append(f"## Source\n\n{_sources(data)}")
    parts.append(f"## Left out\n\n{_left_out(manifest)}")
    parts.append(f"## How it was made\n\n{_made(data)}")
    parts.append(
        "## Use\n\nWith largescale: `python -m largescale.train PRESET --data.path FOLDER`. Each "
        "`shard_*.arrow` is an Arrow IPC file of one record batch, described by `manifest.json`."
    )
    return "\n\n".join(parts) + "\n"


def front_matter(data: ShardDataset) -> str:
    """The card's metadata, in YAML."""
    captions = "captions" in data.manifest["columns"]
    # The hub knows licences by short names. Any other text is "other" there, with its name beside
    # it.
    known: dict[str, None] = {}
    names: list[str] = []
    for _, _, licence in _parts(data):
        if licence and LICENCE.fullmatch(licence):
            known[licence] = None
        elif licence:
            known["other"] = None
            names.append(licence)
    licences = list(known)
    size = next((name for limit, name in SIZES.items() if len(data) < limit), "n>1B")
    values: dict[str, Any] = {"pretty_name": _title(data)}
    if licences:
        values["license"] = licences[0] if len(licences) == 1 else licences
    if "other" in licences:
        values["license_name"] = ", ".join(names)
    values |= {
        "size_categories": [size],
        # The hub has no task for images of classes.
        "task_categories": ["text-to-image" if captions else "unconditional-image-generation"],
        "tags": ["largescale", "diffusion", data.info.kind],
    }
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _title(data: ShardDataset) -> str:
    split = data.manifest.get("split")
    return f"{data.info.name}, {split['part']}" if split else data.info.name


def _parts(data: ShardDataset) -> list[tuple[dict[str, Any], int, str | None]]:
    """The sources of the set, or of the one that it is a part of: the job of each, how many of its
    images there are, and the licence that was given."""
    manifest = data.manifest
    whole = manifest.get("split", {})
    # A part may have grown itself.
    additions = [*whole.get("additions", ()), *manifest.get("additions", ())]
    first_rows = whole.get("first_rows", data.first_rows)
    # Programs that encode nothing, and older versions, may have noted no job.
    parts = [(manifest.get("job", {}), first_rows, manifest.get("licence"))]
    for addition in additions:
        parts.append((addition["job"], addition["rows"], addition.get("licence")))
    return parts


def _summary(data: ShardDataset) -> str:
    info = data.info
    manifest = data.manifest
    held = f"{len(data):,} images, as {info.kind} of shape {plain(list(info.shape))}"
    if data.has_mirror:
        held += ", each also mirrored"
    if info.num_classes:
        held += f", of {info.num_classes:,} classes"
        names = manifest.get("class_names")
        if names:
            held += f" ({_some(names)})"
    if "captions" in manifest["columns"]:
        count = f"{manifest['captions']:,} " if "captions" in manifest else ""
        held += f", with {count}captions"
        # Texts that were packed without an encoder have no tokens.
        if info.captions:
            held += f", encoded up to {info.captions.tokens} tokens"
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return f"{held}: {size_text(size)} in {len(manifest['shards']):,} shards."


def _sources(data: ShardDataset) -> str:
    rows = []
    for job, images, licence in _parts(data):
        source = job.get("source", {})
        # Parquet counts rows. Of tar files only reading tells how many images there are.
        listed = source.get("images_listed", source.get("rows"))
        of_format = f", {source['format']}" if "format" in source else ""
        rows.append(
            (
                job.get("info", {}).get("name", data.info.name),
                source.get("program", "") + of_format,
                "" if listed is None else f"{listed:,}",
                f"{images:,}",
                licence or "none was given",
            )
        )
    sources = table(("source", "read by", "images listed", "in the set", "licence"), rows)
    return f"{_part_of(data)}{sources}"


def _part_of(data: ShardDataset) -> str:
    """A paragraph about the set that this is a part of; "" where it is a whole one."""
    split = data.manifest.get("split")
    if not split:
        return ""
    rows = f" of {split['rows']:,} images" if "rows" in split else ""
    return (
        f"This is the part {code(split['part'])} of a set{rows} with the fingerprint "
        f"{code(split['of'])}. Rows are held out by the hash of their ids: a share of "
        f"{split['share']:g}, with the seed {split['seed']}. The sources of the whole set:\n\n"
    )


def _left_out(manifest: dict[str, Any]) -> str:
    skipped = manifest.get("skipped")
    if skipped is None:
        return "Not noted."
    if not skipped["count"]:
        return "Nothing."
    rows = [(reason, f"{count:,}") for reason, count in skipped["reasons"].items()]
    of = " of the whole set" if "split" in manifest else ""
    text = f"{skipped['count']:,} images{of}, each with its reason in `skipped.jsonl`."
    return f"{text}\n\n{table(('reason', 'images'), rows)}"


def _made(data: ShardDataset) -> str:
    manifest = data.manifest
    job = manifest.get("job", {})
    lines = [job["crop"]] if "crop" in job else []
    # Versions before this one noted less.
    if "min_side" in job and "max_pixels" in job:
        lines.append(
            f"without images whose shorter side is below {job['min_side']}, or that have more than "
            f"{job['max_pixels']:,} pixels"
        )
    made_with = manifest.get("made_with", {})
    for name, identity in data.info.encoders.items():
        place = str(made_with.get(name) or made_with.get(f"{name}_encoder") or "")
        # Where it lay on a disk tells nobody anything.
        known = f", {code(place)}" if place and not re.match(r"(\w+:)?/", place) else ""
        precision = f", in {job['precision']}" if "precision" in job else ""
        lines.append(f"{name} encoder: {plain(identity)}{known}{precision}")
    if data.info.kind != "pixels":
        if not data.info.encoders:
            lines.append("encoder: not known")
        lines.append(f"scale factor {data.info.scale_factor:g}")
    statistics = from_manifest(manifest, data.path)
    if statistics:
        lines.append(
            f"latents of {statistics.images:,} images have, over their {len(statistics.mean)} "
            f"channels, means of {_numbers(statistics.mean)} and standard deviations of "
            f"{_numbers(statistics.std)}"
        )
    trip = manifest.get("round_trip")
    if trip:
        lines.append(f"encoded and decoded again: PSNR of {round_trip_words(trip)}")
    return "\n".join(f"- {line}" for line in lines) or "Not noted."


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:8])
    return f"{shown} ..." if len(values) > 8 else shown


def _some(names: Sequence[str]) -> str:
    """The first and the last of many names."""
    shown = names if len(names) < 12 else [*names[:5], "...", names[-1]]
    return ", ".join(map(plain, shown))


def _picture(data: ShardDataset) -> npt.NDArray[np.uint8] | None:
    """A sheet of images from first to last; None of latents without their map to colours."""
    # Evenly spread: in a set that is sorted by class the first images are all of one.
    rows = np.linspace(0, len(data) - 1, min(SHOWN, len(data))).astype(np.int64)
    latent = torch.from_numpy(data.gather(rows)["latent"])
    info = data.packed
    # Of moments the mean: the posterior without noise.
    no_noise = torch.zeros(len(rows), *info.x_shape)
    x = to_x_start(latent, info.kind, info.normalization, no_noise)
    if info.kind != "pixels":
        with suppress(OSError, ValueError, RuntimeError):
            matrix = json.loads((data.path / LATENT_RGB).read_text())
            return _sheet(to_uint8(linear_rgb(x, matrix)))
        return None
    return _sheet(to_uint8(x))


def _sheet(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    # Of about 128 pixels a side each, whether they are latents or photographs.
    side = images.shape[1]
    step = max(1, side // 128)
    return grid(images[:, ::step, ::step], COLUMNS, max(1, 128 // side))
