"""Writes packed data sets (see format.py): files are complete or absent, and the same rows give the
same bytes."""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from largescale.data.format import (
    COLUMNS,
    EMBEDDINGS,
    EMPTY_CAPTION,
    FORMAT,
    IMAGES,
    KINDS,
    MANIFEST,
    METADATA_KEY,
    DatasetInfo,
    content_sha256,
    fingerprint,
    read_manifest,
)
from largescale.data.statistics import Statistics, measure_rows, merge
from largescale.errors import DataError
from largescale.host.files import fsync_dir, sha256, system_reason, write_atomically

Array = npt.NDArray[Any]
STATISTICS = "statistics"


class Shard:
    """The rows of one shard, each checked when it is added."""

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info
        self.columns: list[str] = []  # as the first row has them
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        *,
        id: str,
        latent: Array,
        label: int = 0,
        latent_mirror: Array | None = None,
        captions: Sequence[str] | None = None,
        caption_tokens: Sequence[Array] | None = None,
        caption_pooled: Sequence[Array] | None = None,
    ) -> None:
        """Adds a row. Raises DataError for one that does not fit `info` or the rows before it.

        latent, latent_mirror: `info.shape`, uint8 for pixels, else float16. caption_tokens: (n,
        width) each, caption_pooled: (pooled_width,) each, float16. Every row gives the same of
        these.
        """
        # In the order of the file's columns.
        given: dict[str, Any] = {
            "id": id,
            "label": label,
            "latent": latent,
            "latent_mirror": latent_mirror,
            "captions": captions,
            "caption_tokens": caption_tokens,
            "caption_pooled": caption_pooled,
        }
        row = {name: value for name, value in given.items() if value is not None}

        # The first row decides which columns the shard has.
        self.columns = self.columns or list(row)
        if list(row) != self.columns:
            raise DataError(
                f"row {id!r} has the columns {list(row)}, the first row {self.columns}; "
                f"every row must give the same, of {list(given)}"
            )
        for name in IMAGES:
            if name in row:
                row[name] = self._image(id, name, row[name])
        if self.info.captions or set(row) & set(EMBEDDINGS):
            self._check_captions(id, row)
        num_labels = max(self.info.num_classes, 1)  # without labels all of them are 0
        if not isinstance(label, (int, np.integer)) or not 0 <= label < num_labels:
            raise DataError(
                f"row {id!r}: label={label!r} is not an integer in [0, {num_labels}); correct the "
                "label, or num_classes"
            )
        self._rows.append(row)

    def _image(self, id: str, name: str, image: Array) -> Array:
        """A copy of the image. Raises DataError for another shape or type, and for NaN."""
        shape = self.info.shape
        dtype = np.dtype(KINDS[self.info.kind])
        if image.shape != shape or image.dtype != dtype:
            raise DataError(
                f"row {id!r}: {name} is {image.dtype} {image.shape}, but {self.info.kind} "
                f"of {self.info.name!r} are {dtype} {shape}; convert it before writing"
            )
        if not np.isfinite(image).all():
            raise DataError(
                f"row {id!r}: {name} is not finite; encode in fp32 and look for values above fp16's "
                "65504"
            )
        return image.copy()  # the caller may reuse its array

    def _check_captions(self, id: str, row: dict[str, Any]) -> None:
        """Raises DataError unless each caption has its two embeddings, as `info` describes them."""
        expected = self.info.captions
        captions = row.get("captions", ())
        tokens = row.get("caption_tokens", ())
        pooled = row.get("caption_pooled", ())
        if expected is None or not len(captions) == len(tokens) == len(pooled) > 0:
            raise DataError(
                f"row {id!r} has {len(captions)} captions, {len(tokens)} token lists and "
                f"{len(pooled)} pooled vectors, info.captions is {expected}; give one of each a "
                "caption, at least one"
            )

        # A NaN here would be noticed in training only.
        for of_tokens, of_pooled in zip(tokens, pooled, strict=True):
            if (
                of_tokens.ndim != 2
                or not 1 <= len(of_tokens) <= expected.tokens
                or of_tokens.shape[1] != expected.width
                or of_pooled.shape != (expected.pooled_width,)
                or not of_tokens.dtype == of_pooled.dtype == np.float16
            ):
                raise DataError(
                    f"row {id!r}: caption embeddings are {of_tokens.dtype} {of_tokens.shape} and "
                    f"{of_pooled.dtype} {of_pooled.shape}, not float16 of {expected}; encode them "
                    "again"
                )
            if not (np.isfinite(of_tokens).all() and np.isfinite(of_pooled).all()):
                raise DataError(
                    f"row {id!r}: a caption's embedding is not finite in float16; encode in fp32"
                )

    def write(self, path: Path) -> dict[str, Any]:
        """Writes the file completely or not at all; returns its entry for the manifest. Raises
        DataError for a full disk."""
        batch = pa.record_batch({name: self._column(name) for name in self.columns})
        # The labels' range is checked at each start, without reading the shards.
        labels = [int(row["label"]) for row in self._rows]
        facts = {
            "rows": len(labels),
            "label_min": min(labels),
            "label_max": max(labels),
            "content_sha256": content_sha256(batch),
        }
        entry = _write_file(path, batch, {**self.info.plain(), **facts}, facts)
        # Until the manifest has those of all shards.
        if self.info.kind != "pixels":
            latents = [row["latent"] for row in self._rows]
            entry[STATISTICS] = asdict(measure_rows(latents, self.info.kind))
        return entry

    def _column(self, name: str) -> pa.Array:
        values = [row[name] for row in self._rows]
        if name in IMAGES:
            # Of a fixed size, so that a row is found by its number alone.
            flat = pa.array(np.stack(values).reshape(-1))
            return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(self.info.shape)))
        if name in EMBEDDINGS:
            return _lists_of_embeddings(values)
        return pa.array(values, COLUMNS[name])


def _lists_of_embeddings(rows: Sequence[Sequence[Array]]) -> pa.Array:
    """A column of lists of flat embeddings, one of each caption, from (n, width) or (width,)."""
    embeddings = [embedding.reshape(-1) for embedding in chain.from_iterable(rows)]
    # Offsets of the embeddings in the values, and of the rows in the embeddings.
    inner = pa.array(list(accumulate(map(len, embeddings), initial=0)), pa.int64())
    outer = pa.array(list(accumulate(map(len, rows), initial=0)), pa.int32())
    values = pa.array(np.concatenate(embeddings))
    return pa.ListArray.from_arrays(outer, pa.LargeListArray.from_arrays(inner, values))


def write_empty_caption(
    path: Path, info: DatasetInfo, tokens: Array, pooled: Array
) -> dict[str, Any]:
    """Writes the encoding of the empty caption: tokens (n, width), pooled (pooled_width,) float16.
    Returns the file's entry for the manifest."""
    batch = pa.record_batch(
        {
            "caption_tokens": _lists_of_embeddings([[tokens]]),
            "caption_pooled": _lists_of_embeddings([[pooled]]),
        }
    )
    facts = {"content_sha256": content_sha256(batch)}
    return _write_file(path / EMPTY_CAPTION, batch, {**info.plain(), **facts}, facts)


def _write_file(
    path: Path, batch: pa.RecordBatch, metadata: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes one record batch; returns the file's entry for the manifest, with `facts` in it."""
    schema = batch.schema.with_metadata({METADATA_KEY: json.dumps({"format": FORMAT, **metadata})})
    temporary = path.with_name(path.name + ".tmp")
    # The content has to be on disk before the file has its name: a power cut leaves none, or all.
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        entry = {
            "file": path.name,
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
            **facts,
        }
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {path} ({system_reason(error)}); what is packed stays: free space, and run again"
        ) from error
    return entry


def write_manifest(
    out_dir: Path,
    info: DatasetInfo,
    columns: list[str],
    shards: list[dict[str, Any]],
    empty_caption: dict[str, Any] | None = None,
    **about: Any,
) -> None:
    """Writes the manifest: the data set exists from here on. `about`: the packer's own entries,
    such as its source; plain JSON."""
    if not shards:
        raise DataError(f"no rows were written to {out_dir}; check what the packer read")
    # The shards' names have to be on disk before a manifest that lists them.
    fsync_dir(out_dir)
    shards, statistics = _with_statistics(info, shards)
    about |= statistics
    manifest = {
        "format": FORMAT,
        "info": info.plain(),
        "columns": columns,
        "fingerprint": fingerprint(info, shards, empty_caption),
        "rows": sum(shard["rows"] for shard in shards),
        **about,
        "shards": shards,
    }
    if empty_caption:
        manifest["empty_caption"] = empty_caption
    write_atomically(out_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _with_statistics(
    info: DatasetInfo, shards: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The shards' entries without statistics, and those of all; none where a shard was written by a
    version that measured nothing."""
    bare, parts = [], []
    for shard in shards:
        bare.append({key: value for key, value in shard.items() if key != STATISTICS})
        if STATISTICS in shard:
            parts.append(Statistics(**shard[STATISTICS]))
    if len(parts) < len(shards):
        return bare, {}
    return bare, {STATISTICS: asdict(replace(merge(parts), encoder=info.encoders.get("vae")))}


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Packs rows into shards, and writes the manifest when its `with` block ends well; killed
    before, it leaves none.

    Packing the same data set into its folder again replaces it. Raises DataError for a folder that
    holds another data set, and for a row that does not fit `info`.
    """

    def __init__(
        self, out_dir: str | Path, info: DatasetInfo, rows_per_shard: int = 4096, **about: Any
    ) -> None:
        """`about`: entries of the manifest, such as the source; plain JSON. More may be added until
        the block ends."""
        self.dir, self.info, self.rows_per_shard = Path(out_dir), info, rows_per_shard
        self.about = about
        self._shard = Shard(info)  # the one being filled
        self._shards: list[dict[str, Any]] = []
        self._empty_caption: dict[str, Any] | None = None
        self.dir.mkdir(parents=True, exist_ok=True)
        if (self.dir / MANIFEST).exists():
            found = read_manifest(self.dir)["info"]
            if found != info:
                raise DataError(
                    f"{self.dir} already holds another data set, {found}; "
                    f"give another --out, or delete the folder to pack {info} there"
                )
            # The manifest goes first: half of the old set and half of the new is neither.
            (self.dir / MANIFEST).unlink()
            fsync_dir(self.dir)

    def write(self, **row: Any) -> None:
        """Adds a row, as `Shard.add` does."""
        self._shard.add(**row)
        if len(self._shard) == self.rows_per_shard:
            self._write_shard()

    def write_empty_caption(self, tokens: Array, pooled: Array) -> None:
        """Writes the encoding of the empty caption, which a captioned data set needs once: tokens
        (n, width), pooled (pooled_width,) float16."""
        self._empty_caption = write_empty_caption(self.dir, self.info, tokens, pooled)

    def _write_shard(self) -> None:
        self._shards.append(self._shard.write(self.dir / f"shard_{len(self._shards):05d}.arrow"))
        # All shards of a data set have the columns of the first.
        columns = self._shard.columns
        self._shard = Shard(self.info)
        self._shard.columns = columns

    def __exit__(self, *error: Any) -> None:
        # After an error there is no manifest, and so no data set.
        if error[0] is not None:
            return
        if len(self._shard):
            self._write_shard()
        if self.info.captions and not self._empty_caption:
            raise DataError(
                f"{self.dir}: a captioned data set needs the encoding of the empty caption; "
                "call write_empty_caption"
            )
        write_manifest(
            self.dir,
            self.info,
            self._shard.columns,
            self._shards,
            self._empty_caption,
            **self.about,
        )
