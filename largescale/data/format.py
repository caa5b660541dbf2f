"""What a packed data set is: one schema for pixels, latents and moments, and a manifest.

    DIR/shard_00000.arrow ...   one record batch each, so that a column is one zero-copy NumPy view
                                of the mapped file
    DIR/empty_caption.arrow     of a captioned set: the encoding of the empty caption, for
                                classifier-free guidance
    DIR/manifest.json           what the data set is, and each file's size and hashes; a set exists
                                once this does

Columns: id, label, latent, and where the packer has them latent_mirror (of the mirrored image) and
the caption columns.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from largescale.encoders.normalization import Normalization
from largescale.errors import DataError, NewerVersionError
from largescale.host.files import from_json

FORMAT = 1
MANIFEST = "manifest.json"
EMPTY_CAPTION = "empty_caption.arrow"
# Beside the data, and not part of what they are: the fingerprint does not cover it.
LATENT_RGB = "latent_rgb.json"
# The key of the schema's metadata in each file, under which its manifest entry stands.
METADATA_KEY = b"largescale"

IMAGES = ("latent", "latent_mirror")
# Columns of captions: one list of float16 a caption, tokens flattened.
EMBEDDINGS = ("caption_tokens", "caption_pooled")
# Large lists: 4,096 images with five long captions have 2**31 values.
_EMBEDDINGS_TYPE = pa.list_(pa.large_list(pa.float16()))
COLUMNS = {
    "id": pa.string(),
    "label": pa.int32(),
    "captions": pa.list_(pa.string()),
    "caption_tokens": _EMBEDDINGS_TYPE,
    "caption_pooled": _EMBEDDINGS_TYPE,
}
# The kinds of data, and what each is stored in.
KINDS = {"pixels": np.uint8, "latents": np.float16, "moments": np.float16}
# The program of data_prep that probably packs a data set, by a part of its name.
PROGRAMS = {
    "digits": "digits",
    "emoji": "emoji",
    "imagenet": "imagenet",
    "coco": "coco",
    "ffhq": "folder",
    "cifar": "parquet",
}


@dataclass(frozen=True)
class CaptionInfo:
    """How captions are encoded; each is stored up to its last real token."""

    tokens: int  # what the loader pads to
    width: int
    pooled_width: int


@dataclass(frozen=True)
class DatasetInfo:
    """What every row of a data set has in common."""

    name: str
    kind: str  # "pixels" in [0, 255] | "latents" | "moments": means, then log-variances
    shape: tuple[int, int, int]  # (C, H, W) as stored; moments have twice the channels of x_start
    num_classes: int  # 0: no labels, every row's is 0
    scale_factor: float = 1.0  # x_start = latent * scale_factor
    encoders: dict[str, str] = field(default_factory=dict)
    captions: CaptionInfo | None = None
    # Of each channel: x_start = (latent - latent_mean) / latent_std * scale_factor
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # JSON gives a list and a dict, and a frozen dataclass has no other way to replace them.
        object.__setattr__(self, "shape", tuple(self.shape))
        for name in ("latent_mean", "latent_std"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
        if isinstance(self.captions, dict):
            object.__setattr__(self, "captions", CaptionInfo(**self.captions))
        if self.kind not in KINDS:
            raise DataError(
                f"kind={self.kind!r} of data set {self.name!r} is unknown; use one of "
                f"{', '.join(KINDS)}"
            )

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_start."""
        channels, height, width = self.shape
        return (channels // 2 if self.kind == "moments" else channels), height, width

    @property
    def normalization(self) -> Normalization:
        """What makes x_start of a latent."""
        return Normalization(self.scale_factor, self.latent_mean, self.latent_std)

    def plain(self) -> dict[str, Any]:
        """The plain values that JSON has, without the fields that are None."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in tree.items() if value is not None}


def normalization_of(data_info: dict[str, Any]) -> Normalization:
    """What made x_start of a latent, from the data_info of a checkpoint or an export."""
    mean, std = data_info.get("latent_mean"), data_info.get("latent_std")
    return Normalization(
        data_info.get("scale_factor", 1.0), mean and tuple(mean), std and tuple(std)
    )


def remedy(what: object) -> str:
    """How to make a data set: by the program that its name suggests, or by any of them."""
    for name, program in PROGRAMS.items():
        if name in Path(str(what)).name.lower():
            return f"pack {what} with python -m data_prep.{program}"
    return f"pack {what} with a program of data_prep: imagenet, coco, folder, parquet, webdataset"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with `info` as DatasetInfo. Raises DataError where there is none or it cannot
    be used, and NewerVersionError."""
    if not (path / MANIFEST).is_file():
        raise _not_packed(path)
    try:
        manifest: dict[str, Any] = from_json((path / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise NewerVersionError(
                f"{path / MANIFEST} has format {manifest['format']}, this version reads {FORMAT}: "
                "it was made by a newer version; update largescale, or choose other data"
            )
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}; this version reads {FORMAT}")
        manifest["info"] = DatasetInfo(**manifest["info"])
        _check(manifest)

        # Older versions hashed the name too.
        content = manifest["info"], manifest["shards"], manifest.get("empty_caption")
        expected = (fingerprint(*content), fingerprint(*content, named=True))
        if manifest["fingerprint"] not in expected:
            raise ValueError("its fingerprint is not that of its content")
    except (AttributeError, LookupError, TypeError, ValueError, PermissionError) as error:
        raise DataError(
            f"{path / MANIFEST} cannot be used ({error!r}); "
            f"restore it, or delete the folder and {remedy(path)}"
        ) from error
    return manifest


def _not_packed(path: Path) -> DataError:
    """The error for a folder without a manifest, by how far its packing came."""
    if (path / "packing").is_dir():
        return DataError(
            f"{path} is not packed to the end; run the command that packed it again to continue"
        )
    if path.is_file():
        return DataError(f"{path} is a file; give the folder that holds the data set")
    if not path.is_dir():
        what = "does not exist"
    elif any(path.glob("shard_*")):
        what = f"has no {MANIFEST}, so its packing did not finish"
    else:
        what = f"was never packed: it has no {MANIFEST} and no shards"
    return DataError(
        f"{path} {what}; correct the path (of training: --data.path or --data.validation), or "
        f"{remedy(path)}"
    )


def _check(manifest: dict[str, Any]) -> None:
    """Raises ValueError, LookupError or TypeError for values that no data set has."""
    info: DatasetInfo = manifest["info"]
    for side in info.shape:
        _check_number("shape", side, 1, 2**20)
    _check_number("num_classes", info.num_classes, 0, 2**31)
    for values in (info.latent_mean, info.latent_std):
        if values is not None and len(values) != info.x_shape[0]:
            raise ValueError(f"{len(values)} statistics for {info.x_shape[0]} channels")
    if info.latent_std and not min(info.latent_std) > 0:
        raise ValueError("latent_std is not above 0")
    if info.captions:
        for key, value in asdict(info.captions).items():
            _check_number(key, value, 1, 2**20)

    for shard in manifest["shards"]:
        _check_number("rows", shard["rows"], 0, 2**40)
        _check_number("bytes", shard["bytes"], 0, 2**50)
        _check_number("label_min", shard["label_min"], -(2**31), 2**31)
        _check_number("label_max", shard["label_max"], -(2**31), 2**31)

    for addition in manifest.get("additions", ()):
        _check_number("shards_before", addition["shards_before"], 1, len(manifest["shards"]))

    # A name with folders in it could lead out of the data set.
    for entry in all_files(manifest["shards"], manifest.get("empty_caption")):
        name = entry["file"]
        if name != Path(name).name:
            raise ValueError(f"{name} is not the name of a file")
    if not isinstance(manifest["columns"], list):
        raise TypeError(f"columns={manifest['columns']} is not a list")


def _check_number(key: str, value: Any, low: int, high: int) -> None:
    # The type itself: a bool is an int too.
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key}={str(value)[:40]} is not a whole number from {low} to {high}")


def all_files(
    shards: list[dict[str, Any]], empty_caption: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The manifest's entries of all files of a data set: the shards, then the empty caption."""
    return [*shards, empty_caption] if empty_caption else shards


def fingerprint(
    info: DatasetInfo,
    shards: list[dict[str, Any]],
    empty_caption: dict[str, Any] | None,
    named: bool = False,
) -> str:
    """A hash of the content, which is the same for the same content in the same shards.

    It does not depend on the name, which may be that of a folder. `named`: as older versions made
    it, from the name too; a data set that has such a fingerprint keeps it.
    """
    facts = info.plain()
    if not named:
        facts.pop("name", None)
    hashes = [file["content_sha256"] for file in all_files(shards, empty_caption)]
    return hashlib.sha256(json.dumps([facts, hashes], sort_keys=True).encode()).hexdigest()


def content_sha256(batch: pa.RecordBatch) -> str:
    """A hash of the values: unlike the file's, it does not depend on the version of Arrow's
    writer."""
    digest = hashlib.sha256(json.dumps(batch.schema.names).encode())
    for column in batch.columns:
        for buffer in column.buffers():
            if buffer is not None:  # as the validity of a column without nulls
                digest.update(buffer)
    return digest.hexdigest()
