"""Random access to a packed data set (see format.py)."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from largescale.data.format import (
    EMBEDDINGS,
    FORMAT,
    IMAGES,
    KINDS,
    METADATA_KEY,
    DatasetInfo,
    fingerprint,
    read_manifest,
    remedy,
)
from largescale.errors import DataError, StorageError
from largescale.host.files import from_json, sha256
from largescale.host.launch import env_rank

Array = npt.NDArray[Any]

MAX_MAPPED = 16_384
"""Shards that a process keeps mapped. Linux allows it 65,530 maps in all (vm.max_map_count)."""


class _Lists(NamedTuple):
    """A column of lists, of which one element is one caption's embedding."""

    outer: Array  # (rows + 1,): row r has the elements outer[r] .. outer[r + 1]
    inner: Array  # (elements + 1,): where in `values` each lies
    values: Array  # flat float16, a view of the mapped file

    def element(self, k: int) -> Array:
        return self.values[self.inner[k] : self.inner[k + 1]]


@dataclass(frozen=True)
class _Mapped:
    """One shard's columns as NumPy views of the mapped file."""

    label: Array
    latent: Array  # (rows, C * H * W)
    latent_mirror: Array  # likewise; where there is none, the same
    lists: dict[str, _Lists]
    batch: pa.RecordBatch


class ShardDataset:
    """Random access to a packed data set; shards are mapped when first asked for, and never read as
    a whole.

    The start reads the manifest and the files' sizes only; `verify` also hashes every file, or
    `part` of them so that ranks can share the work, compares its schema, and checks that it is
    whole Arrow. Raises DataError for what is missing, cut short, altered (which `verify` finds),
    empty, or labelled out of range.
    """

    def __init__(self, path: str | Path, verify: bool = False, part: slice = slice(None)) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.info: DatasetInfo = self.manifest["info"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self.has_mirror = "latent_mirror" in self.manifest["columns"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        self._starts = np.array([0, *accumulate(shard["rows"] for shard in self._shards)])
        self._mapped: dict[int, _Mapped] = {}
        self._lock = threading.Lock()  # the loader's threads map shards
        if not len(self):
            raise DataError(f"{self.path} holds no rows; {remedy(self.path)}")
        if self.info.captions and "empty_caption" not in self.manifest:
            raise DataError(
                f"{self.path} lacks the encoding of the empty caption; {remedy(self.path)}"
            )
        empty_caption = [self.manifest["empty_caption"]] if self.info.captions else []
        for entry in (*self._shards, *empty_caption):
            if not (file := self.path / entry["file"]).is_file():
                raise self._damaged(entry, "is missing")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise self._damaged(entry, f"has {size} bytes, not the manifest's {entry['bytes']}")
        for shard in self._shards:
            if shard["label_min"] < 0 or shard["label_max"] >= max(self.info.num_classes, 1):
                raise self._damaged(
                    shard,
                    f"has labels from {shard['label_min']} to {shard['label_max']}, "
                    f"outside [0, num_classes={self.info.num_classes})",
                )
        to_verify = (
            [*enumerate(self._shards), *((None, entry) for entry in empty_caption)][part]
            if verify
            else []
        )
        for number, entry in tqdm(
            to_verify, "verify", unit="shard", delay=2, disable=env_rank() != 0
        ):
            if sha256(self.path / entry["file"]) != entry["sha256"]:
                raise self._damaged(entry, "was altered: its hash is not the manifest's")
            self._check(entry, self._read(entry) if number is None else self._shard(number).batch)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def has_fingerprint(self, other: str, name: str) -> bool:
        """Whether `other` is of the same content in the same shards, also where it was made when
        the set's name, which was then `name`, was part of it."""
        content = self._shards, self.manifest.get("empty_caption")
        named = fingerprint(replace(self.info, name=name), *content, named=True)
        return other in (self.fingerprint, fingerprint(self.info, *content), named)

    def gather(
        self,
        indices: npt.NDArray[np.int64],
        flip: npt.NDArray[np.bool_] | None = None,
        choice: npt.NDArray[np.float64] | None = None,
    ) -> dict[str, Array]:
        """Rows in the order asked: latent (B, C, H, W) as stored, of the mirrored image where
        `flip` (B,), and label (B,) int64.

        With `choice` (B,), in [0, 1), one of each row's captions too, at that share of their
        number: caption_tokens (B, L, width) float16, zero behind caption_length (B,) int64, and
        caption_pooled (B, pooled_width). Raises IndexError for an index outside [0, len), DataError
        for a shard that is not the manifest's, StorageError for one that cannot be read at present.
        """
        if not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"indices from {indices.min()} to {indices.max()} do not lie in [0, {len(self)})"
            )
        n, captions = len(indices), None if choice is None else self.info.captions
        rows: dict[str, Array] = {
            "label": np.empty(n, np.int64),
            "latent": np.empty((n, *self.info.shape), KINDS[self.info.kind]),
        }
        if captions:
            rows["caption_tokens"] = np.zeros((n, captions.tokens, captions.width), np.float16)
            rows["caption_length"] = np.empty(n, np.int64)
            rows["caption_pooled"] = np.empty((n, captions.pooled_width), np.float16)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        inside = indices - self._starts[shard_of]
        mirrored = [False] * n if flip is None or not self.has_mirror else flip.tolist()
        images = []
        for i, (number, row, mirror) in enumerate(
            zip(shard_of.tolist(), inside.tolist(), mirrored, strict=True)
        ):
            shard = self._mapped.get(number) or self._shard(number)
            images.append((shard.latent_mirror if mirror else shard.latent)[row])
            rows["label"][i] = shard.label[row]
            if captions and choice is not None:
                _copy_caption(shard, row, choice[i], rows, i)
        np.concatenate(
            images, out=rows["latent"].reshape(-1)
        )  # each image is copied once, and without the GIL
        if flip is not None and not self.has_mirror:
            check_flip(self.info, self.has_mirror)
            rows["latent"][flip] = rows["latent"][flip][..., ::-1]
        return rows

    def texts(self, indices: npt.NDArray[np.int64]) -> list[list[str]]:
        """All captions of each row. Raises DataError for a data set without."""
        if "captions" not in self.manifest["columns"]:
            raise DataError(f"{self.path} has no captions; {remedy('captioned images')}")
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        columns = {
            number: self._shard(number).batch.select(["captions"])
            for number in map(int, set(shard_of))
        }
        for (
            number,
            column,
        ) in columns.items():  # else offsets that are damaged would read foreign memory
            self._check(self._shards[number], column)
        return [
            columns[int(number)].column(0)[int(index - self._starts[number])].as_py()
            for number, index in zip(shard_of, indices, strict=True)
        ]

    @cached_property
    def empty_caption(self) -> tuple[Array, Array]:
        """The empty caption's tokens (n, width) and pooled vector (pooled_width,), float16."""
        assert self.info.captions
        batch = self._read(self.manifest["empty_caption"])
        tokens, pooled = (np.from_dlpack(batch.column(name).values.values) for name in EMBEDDINGS)
        return tokens.reshape(-1, self.info.captions.width), pooled

    def _shard(self, number: int) -> _Mapped:
        if shard := self._mapped.get(number):
            return shard
        batch = self._read(self._shards[number])
        view = (
            np.from_dlpack
        )  # not to_numpy(), which imports pandas where that is installed: half a second
        images = [
            view(batch.column(name).values).reshape(-1, math.prod(self.info.shape))
            for name in IMAGES[: 1 + self.has_mirror]
        ]
        lists = {}
        for name in EMBEDDINGS if self.info.captions else ():
            outer = batch.column(name)
            inner = outer.values
            lists[name] = _Lists(view(outer.offsets), view(inner.offsets), view(inner.values))
        shard = _Mapped(view(batch.column("label")), images[0], images[-1], lists, batch)
        with self._lock:
            if len(self._mapped) >= MAX_MAPPED:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[number] = shard
        return shard

    def _read(self, entry: Mapping[str, Any]) -> pa.RecordBatch:
        """A file's only batch, mapped, once its schema is found to be the manifest's."""
        try:
            # the views keep the mapping alive; the file is closed, as thousands of open ones would
            # reach a limit
            with pa.memory_map(str(self.path / entry["file"])) as file:
                batch = pa.ipc.open_file(file).get_batch(0)
            found = from_json(batch.schema.metadata[METADATA_KEY])
            batch.validate()
        except (OSError, pa.ArrowInvalid, LookupError, TypeError, ValueError) as error:
            if (
                isinstance(error, OSError) and error.errno
            ):  # pyarrow calls bad content an OSError too, without a number
                raise StorageError(
                    f"{self.path / entry['file']} cannot be read at present: {error}"
                ) from error
            raise self._damaged(entry, f"cannot be read ({error!r})") from error
        facts = {
            key: value for key, value in entry.items() if key not in ("file", "bytes", "sha256")
        }
        expected = {"format": FORMAT, **self.info.plain(), **facts}
        if differ := [key for key in expected | found if expected.get(key) != found.get(key)]:
            raise self._damaged(
                entry, f"is of another data set than the manifest: {', '.join(differ)} differ"
            )
        if batch.num_rows != entry.get("rows", 1):
            raise self._damaged(
                entry, f"holds {batch.num_rows:,} rows, not the manifest's {entry.get('rows', 1):,}"
            )
        return batch

    def _check(self, entry: Mapping[str, Any], batch: pa.RecordBatch) -> None:
        """Raises DataError for offsets outside the file, and text that is none: what takes a look
        at every value."""
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._damaged(entry, f"is damaged ({error})") from error

    def _damaged(self, entry: Mapping[str, Any], what: str) -> DataError:
        return DataError(
            f"{self.path / entry['file']} {what}; restore the file, or {remedy(self.path)}"
        )


def check_flip(info: DatasetInfo, has_mirror: bool) -> None:
    """Raises DataError where images cannot be flipped: latents must be encoded from mirrored
    images."""
    if info.kind != "pixels" and not has_mirror:
        raise DataError(
            f"data set {info.name!r} has {info.kind} without a latent_mirror column, so images "
            "cannot be flipped; try --data.no-horizontal-flip, or pack it with mirrors"
        )


def _copy_caption(shard: _Mapped, row: int, choice: float, rows: dict[str, Array], i: int) -> None:
    """One caption of the shard's row, into row i of a batch."""
    tokens, pooled = (shard.lists[name] for name in EMBEDDINGS)
    first, end = tokens.outer[row : row + 2]
    chosen = first + int(choice * (end - first))
    embedding = tokens.element(chosen)
    rows["caption_length"][i] = len(embedding) // rows["caption_tokens"].shape[2]
    rows["caption_tokens"][i].reshape(-1)[: len(embedding)] = embedding
    rows["caption_pooled"][i] = pooled.element(chosen)
