"""Random access to a packed data set (see format.py)."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from largescale.data.format import (
    FORMAT,
    KINDS,
    METADATA_KEY,
    DatasetInfo,
    all_files,
    fingerprint,
    read_manifest,
    remedy,
)
from largescale.data.mapped import Array, MappedShard
from largescale.data.statistics import Normalize, normalized
from largescale.errors import DataError, StorageError
from largescale.host.files import from_json, sha256
from largescale.host.launch import env_rank

MAX_MAPPED = 16_384
"""Shards that a process keeps mapped. Linux allows it 65,530 maps in all (vm.max_map_count)."""


class ShardDataset:
    """Random access to a packed data set; shards are mapped when first asked for, and never read
    completely.

    The start reads the manifest and the files' sizes only; `verify` also hashes every file, or
    `part` of them so that ranks can share the work, compares its schema, and checks that it is
    valid Arrow. Raises DataError for what is missing, cut short, altered (which `verify` finds),
    empty, or labelled out of range.
    """

    def __init__(self, path: str | Path, verify: bool = False, part: slice = slice(None)) -> None:
        self.path = Path(path)
        self._folder = self.path  # where the files are read
        self.manifest = read_manifest(self.path)
        self.packed: DatasetInfo = self.manifest["info"]
        self.info = self.packed  # as data.normalize has it; see normalize()
        self.fingerprint: str = self.manifest["fingerprint"]
        self.has_mirror = "latent_mirror" in self.manifest["columns"]
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        self._starts = np.array([0, *accumulate(shard["rows"] for shard in self._shards)])
        self._mapped: dict[int, MappedShard] = {}
        self._lock = threading.Lock()  # the loader's threads map shards
        if not len(self):
            raise DataError(f"{self.path} holds no rows; {remedy(self.path)}")
        if self.info.captions and "empty_caption" not in self.manifest:
            raise DataError(
                f"{self.path} lacks the encoding of the empty caption; {remedy(self.path)}"
            )
        # What costs nothing at each start; the content is read only where that is asked for.
        self._check_sizes()
        self._check_labels()
        if verify:
            self._verify(part)

    def read_copy(self, folder: Path, verify: bool = False, part: slice = slice(None)) -> None:
        """Read the files from a folder with copies of them (stage.py) from here on; all else is as
        before."""
        self._folder = folder
        self._check_sizes()
        if verify:
            self._verify(part)

    def normalize(self, how: Normalize) -> None:
        """Makes `info` what data.normalize says. Raises DataError where the set lacks what that
        needs."""
        self.info = normalized(self.manifest, how, self.path)

    def normalize_as(self, other: "ShardDataset") -> None:
        """Normalise as another set of the same encoder is: held-out images by the training set's
        statistics."""
        self.info = replace(
            self.packed,
            scale_factor=other.info.scale_factor,
            latent_mean=other.info.latent_mean,
            latent_std=other.info.latent_std,
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """The size of all files that are read."""
        return sum(entry["bytes"] for entry in self._files())

    def _files(self) -> list[dict[str, Any]]:
        """The manifest's entries of all files that are read."""
        empty_caption = self.manifest["empty_caption"] if self.info.captions else None
        return all_files(self._shards, empty_caption)

    def _check_sizes(self) -> None:
        for entry in self._files():
            file = self._folder / entry["file"]
            if not file.is_file():
                raise self._damaged(entry, "is missing")
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise self._damaged(entry, f"has {size} bytes, not the manifest's {entry['bytes']}")

    def _check_labels(self) -> None:
        # Without labels all of them are 0.
        for shard in self._shards:
            if shard["label_min"] < 0 or shard["label_max"] >= max(self.info.num_classes, 1):
                raise self._damaged(
                    shard,
                    f"has labels from {shard['label_min']} to {shard['label_max']}, "
                    f"outside [0, num_classes={self.info.num_classes})",
                )

    def _verify(self, part: slice) -> None:
        """Reads these files from start to end, and raises DataError where one is not as it was
        written."""
        numbered = list(enumerate(self._files()))[part]
        for number, entry in tqdm(
            numbered, "verify", unit="shard", delay=2, disable=env_rank() != 0
        ):
            if sha256(self._folder / entry["file"]) != entry["sha256"]:
                raise self._damaged(entry, "was altered: its hash is not the manifest's")
            # The empty caption comes after the shards, and is not mapped as they are.
            is_shard = number < len(self._shards)
            self._check(entry, self._shard(number).batch if is_shard else self._read(entry))

    def has_fingerprint(self, other: str, name: str) -> bool:
        """Whether the fingerprint `other` is of this content in these shards. Older versions
        hashed the data set's name too, which was then `name`."""
        return other == self.fingerprint or other in self._fingerprints(self._shards, name)

    def rows_when(self, other: str, name: str) -> int | None:
        """How many rows the set had when its fingerprint was `other`, before it has grown; None where
        it is of other content."""
        for addition in self.manifest.get("additions", ()):
            number = addition["shards_before"]
            if other in self._fingerprints(self._shards[:number], name):
                return int(self._starts[number])
        return None

    def is_or_was(self, other: str, name: str) -> bool:
        """Whether the fingerprint `other` is of this content, now or before it has grown."""
        return self.has_fingerprint(other, name) or self.rows_when(other, name) is not None

    def _fingerprints(self, shards: list[dict[str, Any]], name: str) -> tuple[str, str]:
        content = shards, self.manifest.get("empty_caption")
        named = fingerprint(replace(self.packed, name=name), *content, named=True)
        return fingerprint(self.packed, *content), named

    @property
    def first_rows(self) -> int:
        """How many rows were packed first: all, unless the set has grown. What is drawn of them stays
        the same then."""
        additions = self.manifest.get("additions") or [{"shards_before": len(self._shards)}]
        return int(self._starts[additions[0]["shards_before"]])

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
        rows = self._empty_rows(len(indices), captions=choice is not None)

        # Where each row lies, as plain Python numbers: NumPy's cost more, one by one.
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        inside = indices - self._starts[shard_of]
        takes_mirror = [False] * len(indices)
        if flip is not None and self.has_mirror:
            takes_mirror = flip.tolist()

        images = []
        labels = []
        places = zip(shard_of.tolist(), inside.tolist(), takes_mirror, strict=True)
        for i, (number, row, mirror) in enumerate(places):
            shard = self._mapped.get(number) or self._shard(number)
            images.append((shard.latent_mirror if mirror else shard.latent)[row])
            labels.append(shard.label[row])
            if choice is not None and self.info.captions:
                shard.copy_caption(row, choice[i], rows, i)

        # Each image is copied once, and without the GIL.
        np.concatenate(images, out=rows["latent"].reshape(-1))
        rows["label"][:] = labels
        if flip is not None and not self.has_mirror:
            check_flip(self.info, self.has_mirror)
            rows["latent"][flip] = rows["latent"][flip][..., ::-1]
        return rows

    def _empty_rows(self, n: int, captions: bool) -> dict[str, Array]:
        """The arrays that `gather` fills. Captions' tokens start as zeros, which is their
        padding."""
        rows: dict[str, Array] = {
            "label": np.empty(n, np.int64),
            "latent": np.empty((n, *self.info.shape), KINDS[self.info.kind]),
        }
        if captions and self.info.captions:
            tokens, width, pooled_width = astuple(self.info.captions)
            rows["caption_tokens"] = np.zeros((n, tokens, width), np.float16)
            rows["caption_length"] = np.empty(n, np.int64)
            rows["caption_pooled"] = np.empty((n, pooled_width), np.float16)
        return rows

    def pieces(
        self, first: int, n: int, *, mirrors: bool, captions: bool
    ) -> Iterator[tuple[Path, int, int]]:
        """Where `n` rows from row `first` on lie: (file, offset, bytes) of each piece. Behind the
        last row of the set comes row 0. Raises as `gather` does."""
        while n:
            number = int(np.searchsorted(self._starts, first, side="right")) - 1
            row = first - int(self._starts[number])
            rows = min(n, self._shards[number]["rows"] - row)
            shard = self._shard(number)
            file = self._folder / self._shards[number]["file"]
            for piece in shard.pieces(row, row + rows, mirrors=mirrors, captions=captions):
                address = piece.__array_interface__["data"][0]
                yield file, address - shard.address, piece.nbytes
            first = (first + rows) % len(self)
            n -= rows

    def texts(self, indices: npt.NDArray[np.int64]) -> list[list[str]]:
        """All captions of each row. Raises DataError for a data set without."""
        if "captions" not in self.manifest["columns"]:
            raise DataError(f"{self.path} has no captions; {remedy('captioned images')}")
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        inside = indices - self._starts[shard_of]
        columns = {}
        for number in set(shard_of.tolist()):
            column = self._shard(number).batch.select(["captions"])
            # Offsets that are damaged would read foreign memory.
            self._check(self._shards[number], column)
            columns[number] = column.column(0)

        texts = []
        for number, row in zip(shard_of.tolist(), inside.tolist(), strict=True):
            texts.append(columns[number][row].as_py())
        return texts

    def ids(self, part: slice = slice(None)) -> Iterator[tuple[int, str]]:
        """(row, id) of the rows of these shards, by default of all."""
        for number in range(len(self._shards))[part]:
            column = self._read(self._shards[number]).column("id")
            yield from enumerate(column.to_pylist(), int(self._starts[number]))

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard, each as `ShardWriter.write` takes it. The arrays are views of the
        mapped file."""
        shard = self._shard(number)
        ids = shard.batch.column("id").to_pylist()
        for i, id in enumerate(ids):
            row = {"id": id, "label": shard.label[i]}
            row["latent"] = shard.latent[i].reshape(self.info.shape)
            if self.has_mirror:
                row["latent_mirror"] = shard.latent_mirror[i].reshape(self.info.shape)
            # Texts may have no encodings.
            if "captions" in self.manifest["columns"]:
                row["captions"] = shard.batch.column("captions")[i].as_py()
            if self.info.captions:
                for name, lists in shard.lists.items():
                    elements = map(lists.element, range(lists.outer[i], lists.outer[i + 1]))
                    row[name] = list(elements)
                width = self.info.captions.width
                row["caption_tokens"] = [each.reshape(-1, width) for each in row["caption_tokens"]]
            yield row

    @cached_property
    def empty_caption(self) -> tuple[Array, Array]:
        """The empty caption's tokens (n, width) and pooled vector (pooled_width,), float16."""
        assert self.info.captions
        batch = self._read(self.manifest["empty_caption"])
        # One row with one caption: the values of the inner list are the caption's.
        tokens = np.from_dlpack(batch.column("caption_tokens").values.values)
        pooled = np.from_dlpack(batch.column("caption_pooled").values.values)
        return tokens.reshape(-1, self.info.captions.width), pooled

    def _shard(self, number: int) -> MappedShard:
        """The shard's columns; mapped when it is first asked for."""
        if shard := self._mapped.get(number):
            return shard
        batch, address = self._map(self._shards[number])
        shard = MappedShard.of(batch, address, self.info, self.has_mirror)
        # The oldest goes: a loader in random order asks for all of them alike.
        with self._lock:
            if len(self._mapped) >= MAX_MAPPED:
                del self._mapped[next(iter(self._mapped))]
            self._mapped[number] = shard
        return shard

    def _read(self, entry: Mapping[str, Any]) -> pa.RecordBatch:
        """A file's only batch, mapped, once its schema is found to be the manifest's."""
        return self._map(entry)[0]

    def _map(self, entry: Mapping[str, Any]) -> tuple[pa.RecordBatch, int]:
        """A file's only batch, and the address at which the file is mapped."""
        try:
            # The views keep the mapping alive. The file is closed, as thousands of open ones would
            # reach a limit.
            with pa.memory_map(str(self._folder / entry["file"])) as file:
                address = file.read_buffer(1).address
                batch = pa.ipc.open_file(file).get_batch(0)
            found = from_json(batch.schema.metadata[METADATA_KEY])
            batch.validate()
        except (OSError, pa.ArrowInvalid, LookupError, TypeError, ValueError) as error:
            # pyarrow calls bad content an OSError too, without a number.
            if isinstance(error, OSError) and error.errno:
                raise StorageError(
                    f"{self._folder / entry['file']} cannot be read at present: {error}"
                ) from error
            raise self._damaged(entry, f"cannot be read ({error!r})") from error

        # The schema repeats the manifest's entry, but for what is known only of the written file.
        expected = {"format": FORMAT, **self.packed.plain(), **entry}
        for key in ("file", "bytes", "sha256"):
            expected.pop(key, None)
        differ = [key for key in expected | found if expected.get(key) != found.get(key)]
        if differ:
            raise self._damaged(
                entry, f"is of another data set than the manifest: {', '.join(differ)} differ"
            )
        if batch.num_rows != entry.get("rows", 1):
            raise self._damaged(
                entry, f"holds {batch.num_rows:,} rows, not the manifest's {entry.get('rows', 1):,}"
            )
        return batch, address

    def _check(self, entry: Mapping[str, Any], batch: pa.RecordBatch) -> None:
        """Raises DataError for offsets outside the file and for text that is not UTF-8, which takes
        a look at every value."""
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise self._damaged(entry, f"is damaged ({error})") from error

    def _damaged(self, entry: Mapping[str, Any], what: str) -> DataError:
        file = self._folder / entry["file"]
        if self._folder != self.path:
            return DataError(f"{file} {what}; delete this copy of {self.path}, and run again")
        return DataError(f"{file} {what}; restore the file, or {remedy(self.path)}")


def check_flip(info: DatasetInfo, has_mirror: bool) -> None:
    """Raises DataError where images cannot be flipped: latents must be encoded from mirrored
    images."""
    if info.kind != "pixels" and not has_mirror:
        raise DataError(
            f"data set {info.name!r} has {info.kind} without a latent_mirror column, so images "
            "cannot be flipped; try --data.no-horizontal-flip, or pack it with mirrors"
        )
