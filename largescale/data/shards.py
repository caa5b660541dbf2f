"""Data sets as Arrow IPC files: one schema for pixels, latents and moments.

    DIR/shard_00000.arrow ...   one record batch each, so that a column is one zero-copy NumPy view of the mapped file
    DIR/manifest.json           what the data set is, and each shard's size and hashes; a set exists once this does

Columns: id, label, latent, and where the packer has them latent_mirror (of the mirrored image) and the text columns.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from largescale.errors import DataError
from largescale.files import fsync_dir, sha256, write_atomically
from largescale.launch import env_rank

FORMAT = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"largescale"
IMAGES = ("latent", "latent_mirror")
COLUMNS = {
    "id": pa.string(),
    "label": pa.int32(),
    "captions": pa.list_(pa.string()),
    "caption_tokens": pa.list_(pa.list_(pa.float16())),  # one flat list of tokens * width a caption
    "caption_pooled": pa.list_(pa.list_(pa.float16())),
}
KINDS = {"pixels": np.uint8, "latents": np.float16, "moments": np.float16}
REMEDY = "pack {} with the program of data_prep that makes it (the demo's: python -m data_prep.digits)"


@dataclass(frozen=True)
class DatasetInfo:
    """What every row of a data set has in common."""

    name: str
    kind: str                         # "pixels" in [0, 255] | "latents" | "moments": means, then log-variances
    shape: tuple[int, int, int]       # (C, H, W) as stored; moments have twice the channels of x_start
    num_classes: int
    scale_factor: float = 1.0         # x_start = latent * scale_factor
    encoders: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON gives a list
        if self.kind not in KINDS:
            raise DataError(f"kind={self.kind!r} of data set {self.name!r} is unknown; use one of {', '.join(KINDS)}")

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_start."""
        channels, height, width = self.shape
        return (channels // 2 if self.kind == "moments" else channels), height, width


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Packs rows into shards, and writes the manifest when its `with` block ends well; killed before, it leaves none.

    The same rows give the same bytes. Packing the same data set into its folder again replaces it.
    Raises DataError for a folder that holds another data set, and for a row that does not fit `info`.
    """

    def __init__(self, out_dir: str | Path, info: DatasetInfo, rows_per_shard: int = 4096) -> None:
        self.dir, self.info, self.rows_per_shard = Path(out_dir), info, rows_per_shard
        self._rows: list[dict[str, Any]] = []           # of the shard being filled
        self._columns: list[str] = []                   # as the first row has them
        self._shards: list[dict[str, Any]] = []
        self.dir.mkdir(parents=True, exist_ok=True)
        if (self.dir / MANIFEST).exists():
            if (found := _read_manifest(self.dir)["info"]) != info:
                raise DataError(f"{self.dir} already holds another data set, {found}; "
                                f"give another --out, or delete the folder to pack {info} there")
            (self.dir / MANIFEST).unlink()              # first: half of the old set and half of the new is neither
            fsync_dir(self.dir)

    def write(self, *, id: str, latent: npt.NDArray[Any], label: int,
              latent_mirror: npt.NDArray[Any] | None = None, **text: Any) -> None:
        """latent, latent_mirror: `info.shape`, uint8 for pixels, else float16; text: COLUMNS. Every row gives all."""
        given = {"id": id, "label": label, "latent": latent, "latent_mirror": latent_mirror, **text}
        row = {name: value for name, value in given.items() if value is not None}
        self._columns = self._columns or list(row)
        if list(row) != self._columns or not set(text) <= set(COLUMNS):
            raise DataError(f"row {id!r} has the columns {list(row)}, the first row {self._columns}; "
                            f"every row must give the same, of {[*IMAGES, *COLUMNS]}")
        for name in set(row) & set(IMAGES):
            row[name] = self._image(id, name, row[name])
        if not isinstance(label, (int, np.integer)) or not 0 <= label < self.info.num_classes:
            raise DataError(f"row {id!r}: label={label!r} is not an integer in [0, {self.info.num_classes}); "
                            "correct the label, or num_classes")
        self._rows.append(row)
        if len(self._rows) == self.rows_per_shard:
            self._write_shard()

    def _image(self, id: str, name: str, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shape, dtype = self.info.shape, np.dtype(KINDS[self.info.kind])
        if image.shape != shape or image.dtype != dtype:
            raise DataError(f"row {id!r}: {name} is {image.dtype} {image.shape}, but {self.info.kind} "
                            f"of {self.info.name!r} are {dtype} {shape}; convert it before writing")
        if not np.isfinite(image).all():
            raise DataError(f"row {id!r}: {name} is not finite; encode in fp32 and look for values above fp16's 65504")
        return image.copy()                             # the caller may fill its array anew

    def _write_shard(self) -> None:
        batch = pa.record_batch({name: self._column(name) for name in self._columns})
        labels = [int(row["label"]) for row in self._rows]
        facts = {"rows": len(labels), "label_min": min(labels), "label_max": max(labels),
                 "content_sha256": _content_sha256(batch)}
        metadata = json.dumps({"format": FORMAT, **asdict(self.info), **facts})
        schema = batch.schema.with_metadata({METADATA_KEY: metadata})
        path = self.dir / f"shard_{len(self._shards):05d}.arrow"
        temporary = path.with_name(path.name + ".tmp")
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        self._shards.append({"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), **facts})
        self._rows.clear()

    def _column(self, name: str) -> pa.Array:
        values = [row[name] for row in self._rows]
        if name not in IMAGES:
            return pa.array(values, COLUMNS[name])
        return pa.FixedSizeListArray.from_arrays(pa.array(np.stack(values).reshape(-1)), int(np.prod(self.info.shape)))

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            return
        if self._rows:
            self._write_shard()
        if not self._shards:
            raise DataError(f"no rows were written to {self.dir}; check what the packer read")
        fsync_dir(self.dir)
        manifest = {"format": FORMAT, "info": asdict(self.info), "columns": self._columns,
                    "fingerprint": _fingerprint(self.info, self._shards),
                    "rows": sum(shard["rows"] for shard in self._shards), "shards": self._shards}
        write_atomically(self.dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")


class ShardDataset:
    """Random access to a packed data set; shards are mapped when first asked for, and never read as a whole.

    The start reads the manifest and the files' sizes only; `verify` also hashes every file, or `part` of them so that
    ranks can share the work, and compares its schema.
    Raises DataError for what is missing, cut short, altered (which `verify` finds), empty, or labelled out of range.
    """

    def __init__(self, path: str | Path, verify: bool = False, part: slice = slice(None)) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        self.info: DatasetInfo = manifest["info"]
        self.fingerprint: str = manifest["fingerprint"]  # the same content in the same shards has the same
        self.has_mirror = "latent_mirror" in manifest["columns"]
        self._images = IMAGES if self.has_mirror else IMAGES[:1]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._starts = np.array([0, *accumulate(shard["rows"] for shard in self._shards)])
        self._mapped: dict[int, dict[str, npt.NDArray[Any]]] = {}
        if not len(self):
            raise DataError(f"{self.path} holds no rows; {REMEDY.format(self.path)}")
        for shard in self._shards:
            if not (file := self.path / shard["file"]).is_file():
                raise self._damaged(shard, "is missing")
            if (size := file.stat().st_size) != shard["bytes"]:
                raise self._damaged(shard, f"has {size} bytes, not the manifest's {shard['bytes']}")
            if shard["label_min"] < 0 or shard["label_max"] >= self.info.num_classes:
                raise self._damaged(shard, f"has labels from {shard['label_min']} to {shard['label_max']}, "
                                           f"outside [0, num_classes={self.info.num_classes})")
        to_verify = list(enumerate(self._shards))[part] if verify else []
        for number, shard in tqdm(to_verify, "verify", unit="shard", delay=2, disable=env_rank() != 0):
            if sha256(self.path / shard["file"]) != shard["sha256"]:
                raise self._damaged(shard, "was altered: its hash is not the manifest's")
            self._views(number)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, indices: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """Rows in the order asked: latent (B, C, H, W) as stored, label (B,) int64; latent_mirror where there is one.

        Raises IndexError for an index outside [0, len), DataError for a shard that is not the manifest's.
        """
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} do not lie in [0, {len(self)})")
        rows: dict[str, npt.NDArray[Any]] = {"label": np.empty(len(indices), np.int64)}
        rows |= {name: np.empty((len(indices), *self.info.shape), KINDS[self.info.kind]) for name in self._images}
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(shard_of, kind="stable")     # each run of equal shards is one fancy-indexed copy
        for group in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            for name, column in self._views(int(shard_of[group[0]])).items():
                rows[name][group] = column[indices[group] - self._starts[shard_of[group]]]
        return rows

    def _views(self, number: int) -> dict[str, npt.NDArray[Any]]:
        if number not in self._mapped:
            shard = self._shards[number]
            try:
                # the views keep the mapping alive; the file is closed, as thousands of open ones would reach a limit
                with pa.memory_map(str(self.path / shard["file"])) as file:
                    batch = pa.ipc.open_file(file).get_batch(0)
                found = json.loads(batch.schema.metadata[METADATA_KEY])
            except (OSError, pa.ArrowInvalid, LookupError, TypeError, ValueError) as error:
                raise self._damaged(shard, f"cannot be read ({error!r})") from error
            facts = {key: value for key, value in shard.items() if key not in ("file", "bytes", "sha256")}
            expected = json.loads(json.dumps({"format": FORMAT, **asdict(self.info), **facts}))
            if differ := [key for key in expected | found if expected.get(key) != found.get(key)]:
                raise self._damaged(shard, f"is of another data set than the manifest: {', '.join(differ)} differ")
            self._mapped[number] = {"label": batch.column("label").to_numpy()} | {
                name: batch.column(name).values.to_numpy().reshape(-1, *self.info.shape) for name in self._images}
        return self._mapped[number]

    def _damaged(self, shard: Mapping[str, Any], what: str) -> DataError:
        return DataError(f"{self.path / shard['file']} {what}; restore the file, or {REMEDY.format(self.path)}")


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with `info` as DatasetInfo. Raises DataError where there is none or it cannot be used."""
    if not (path / MANIFEST).is_file():
        what = f"has no {MANIFEST}, so its packing did not finish" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; correct --data.path, or {REMEDY.format(path)}")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}; this version reads {FORMAT}")
        manifest["info"] = DatasetInfo(**manifest["info"])
        if manifest["fingerprint"] != _fingerprint(manifest["info"], manifest["shards"]):
            raise ValueError("its fingerprint is not that of its content")
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path / MANIFEST} cannot be used ({error!r}); "
                        f"restore it, or delete the folder and {REMEDY.format(path)}") from error
    return manifest


def _fingerprint(info: DatasetInfo, shards: list[dict[str, Any]]) -> str:
    content = [asdict(info), [shard["content_sha256"] for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content_sha256(batch: pa.RecordBatch) -> str:
    """Hash of the values: unlike that of the file, it does not depend on the version of Arrow's writer."""
    digest = hashlib.sha256(json.dumps(batch.schema.names).encode())
    for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
        digest.update(buffer)
    return digest.hexdigest()
