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

from largescale.errors import DataError, NewerVersionError
from largescale.host.files import from_json

FORMAT = 1
MANIFEST = "manifest.json"
EMPTY_CAPTION = "empty_caption.arrow"
LATENT_RGB = "latent_rgb.json"  # beside the data, and no part of what they are
METADATA_KEY = b"largescale"
IMAGES = ("latent", "latent_mirror")
EMBEDDINGS = ("caption_tokens", "caption_pooled")  # one list of float16 a caption, tokens flattened
COLUMNS = {
    "id": pa.string(),
    "label": pa.int32(),
    "captions": pa.list_(pa.string()),
    # large: 2**31 values are 4,096 images with five long captions
    **{name: pa.list_(pa.large_list(pa.float16())) for name in EMBEDDINGS},
}
KINDS = {"pixels": np.uint8, "latents": np.float16, "moments": np.float16}
PROGRAMS = {
    "digits": "digits",
    "emoji": "emoji",
    "imagenet": "imagenet",
    "coco": "coco",
    "ffhq": "folder",
    "cifar": "parquet",
}  # of data_prep, by what stands in a data set's name


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON gives a list, and a dict
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

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in tree.items() if value is not None}


def remedy(what: object) -> str:
    """How a data set comes to be: by the program that its name suggests, or one of them all."""
    for name, program in PROGRAMS.items():
        if name in Path(str(what)).name.lower():
            return f"pack {what} with python -m data_prep.{program}"
    return f"pack {what} with a program of data_prep: imagenet, coco, folder, parquet, webdataset"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with `info` as DatasetInfo. Raises DataError where there is none or it cannot
    be used, and NewerVersionError."""
    if not (path / MANIFEST).is_file():
        if (path / "packing").is_dir():
            raise DataError(
                f"{path} is not packed to the end; run the command that packed it again, and it "
                "goes on"
            )
        what = (
            f"has no {MANIFEST}, so its packing did not finish"
            if path.is_dir()
            else "does not exist"
        )
        if path.is_dir() and not any(path.glob("shard_*")):
            what = f"was never packed: it has no {MANIFEST} and no shards"
        raise DataError(
            f"{path} {what}; correct the path (of training: --data.path), or {remedy(path)}"
        )
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
        content = manifest["info"], manifest["shards"], manifest.get("empty_caption")
        if manifest["fingerprint"] not in (
            fingerprint(*content),
            fingerprint(*content, named=True),
        ):
            raise ValueError("its fingerprint is not that of its content")
    except (AttributeError, LookupError, TypeError, ValueError, PermissionError) as error:
        raise DataError(
            f"{path / MANIFEST} cannot be used ({error!r}); "
            f"restore it, or delete the folder and {remedy(path)}"
        ) from error
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Raises ValueError, LookupError or TypeError for values that no data set has."""
    info: DatasetInfo = manifest["info"]
    numbers = [("shape", side, 1, 2**20) for side in info.shape] + [
        ("num_classes", info.num_classes, 0, 2**31)
    ]
    numbers += (
        [(key, value, 1, 2**20) for key, value in asdict(info.captions).items()]
        if info.captions
        else []
    )
    for shard in manifest["shards"]:
        numbers += [("rows", shard["rows"], 0, 2**40), ("bytes", shard["bytes"], 0, 2**50)]
        numbers += [(key, shard[key], -(2**31), 2**31) for key in ("label_min", "label_max")]
    for key, value, low, high in numbers:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{key}={str(value)[:40]} is not a whole number from {low} to {high}")
    empty = manifest.get("empty_caption")
    for name in (entry["file"] for entry in (*manifest["shards"], *([empty] if empty else []))):
        if name != Path(name).name:
            raise ValueError(f"{name} is not the name of a file")
    if not isinstance(manifest["columns"], list):
        raise TypeError(f"columns={manifest['columns']} is no list")


def fingerprint(
    info: DatasetInfo,
    shards: list[dict[str, Any]],
    empty_caption: dict[str, Any] | None,
    named: bool = False,
) -> str:
    """The same content in the same shards has the same, whatever its name, which may be that of a
    folder. `named`: as it was once made, from the name too; a set that has such a one keeps it."""
    files = [*shards, *([empty_caption] if empty_caption else [])]
    plain = {key: value for key, value in info.plain().items() if named or key != "name"}
    content = [plain, [file["content_sha256"] for file in files]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_sha256(batch: pa.RecordBatch) -> str:
    """Hash of the values: unlike that of the file, it does not depend on the version of Arrow's
    writer."""
    digest = hashlib.sha256(json.dumps(batch.schema.names).encode())
    for buffer in (
        buffer for column in batch.columns for buffer in column.buffers() if buffer is not None
    ):
        digest.update(buffer)
    return digest.hexdigest()
