"""The folder of one sample set: its shards, and what is made of them once it is complete.

DIR/shard_00000.arrow ...   id, label, latent: the image (of a latent model without a VAE the
                            latent); captions
DIR/manifest.json           the samples are a data set (docs/data.md); written last, so the set
                            exists once this does
DIR/packing/                only while drawing: which shards are done
DIR/grid.png                the first 100, ten columns (of latents three channels, not decoded,
                            as it says)
DIR/samples.npz             if asked for: arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels, for
                            ADM's evaluator; of a text-to-image model arr_1 are the texts. Of
                            latents latents.npz, (N, C, H, W) float16
DIR/png/000000.png ...      if asked for
DIR/provenance.json         all that the samples depend on, and what drew them; written last
"""

import json
import os
import shutil
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from largescale.data.format import MANIFEST, DatasetInfo
from largescale.data.images import UNDECODED, grid, headed, titled, to_uint8
from largescale.data.job_folder import JOB
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.data.writer import Shard, write_manifest
from largescale.errors import DataError, Stopped
from largescale.host.files import (
    from_json,
    names_of,
    require_writable,
    visible,
    write_atomically,
)
from largescale.host.signals import stop_requested

PROVENANCE = "provenance.json"
GRID = "grid.png"
PNG = "png"
# Another name for latents: as samples.npz they would get an FID, but no true one.
NPZ = {"pixels": "samples.npz", "latents": "latents.npz"}
Format = Literal["npz", "png"]
Array = npt.NDArray[Any]
# Rows that are read at a time.
_BLOCK = 256


def require_sample_folder(folder: Path, *, replace: bool) -> None:
    """Raise an error, before anything is loaded, where samples cannot be drawn into the folder:
    CheckpointError where it cannot be written to, DataError where it holds something else.

    `replace`: other samples that lie there are to be removed; a data set never is."""
    # In this order: another rank that finishes writes the manifest before it removes the job.
    for file in (folder / JOB, folder / MANIFEST):
        if file.exists():
            if replace and not _is_of_samples(file):
                raise DataError(
                    f"{folder} holds a data set and no samples, so --replace does not remove it; "
                    "give another --out"
                )
            return

    # A set that is complete is not written to, this one is.
    require_writable(folder / MANIFEST, remedy="choose another --out")
    theirs = []
    for path in visible(folder):
        if path.name != "packing" and not path.name.startswith("shard_"):
            theirs.append(path)
    # Provenance stays while a complete set is replaced by another.
    if theirs and not (folder / PROVENANCE).exists():
        raise DataError(f"{folder} holds {names_of(theirs)} and no samples; give another --out")


def _is_of_samples(file: Path) -> bool:
    """Whether a manifest, or the job of a set that is not complete, is of samples."""
    try:
        content = from_json(file.read_bytes())
        job = content["job"] if file.name == MANIFEST else content
        return isinstance(job, dict) and "sampling" in job
    # Another rank has removed it just now, to replace it.
    except FileNotFoundError:
        return True
    except (OSError, ValueError, LookupError, TypeError):
        return False


class SampleSet:
    """Samples 0 .. n - 1, `shard_size` to a shard. A shard is what one rank draws before it saves
    again."""

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        job: dict[str, Any],
        n: int,
        shard_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`job`: all that the samples depend on, plain JSON."""
        self.folder = folder
        self.info = info
        self.n = n
        self.shard_size = shard_size
        self.rank = rank
        # Shards of another size would hold other samples under the same names, so the size counts.
        self.parts = Parts(
            folder,
            job | {"shard_size": shard_size},
            -(-n // shard_size),
            rank,
            world_size,
            other="other samples; give another --out, or replace them with eval.sample --replace",
        )

    def numbers(self, part: int) -> range:
        """The numbers of the samples in a shard."""
        return range(part * self.shard_size, min(self.n, (part + 1) * self.shard_size))

    def todo(self) -> list[int]:
        """The shards of this rank that are not drawn yet."""
        return [part for part in self.parts.mine if not self.parts.record(part)["done"]]

    def done(self) -> int:
        """How many samples are in complete shards, of every rank."""
        count = 0
        for part in range(self.parts.parts):
            if self.parts.record(part)["done"]:
                count += len(self.numbers(part))
        return count

    def save(
        self,
        part: int,
        latents: Array,
        labels: Array,
        texts: Sequence[str] | None,
        drawn_with: dict[str, Any],
    ) -> None:
        """Write the samples `numbers(part)`: latents (n, *info.shape) uint8 or float16.
        `drawn_with`: what changes them up to rounding."""
        shard = Shard(self.info)
        for i, number in enumerate(self.numbers(part)):
            captions = None if texts is None else [texts[i]]
            shard.add(
                id=f"{number:06d}", latent=latents[i], label=int(labels[i]), captions=captions
            )

        # The record comes after the shard: what has a record is complete.
        entry = shard.write(self.folder / f"shard_{part:05d}.arrow")
        self.parts.save(
            part,
            {
                "done": True,
                "items": len(shard),
                "captions": 0,
                "columns": shard.columns,
                "shards": [entry],
                "skipped": [],
                "drawn_with": drawn_with,
            },
        )

    def finish(self) -> None:
        """Make the shards one data set; on rank 0, once every rank's shards are done."""
        records = self.parts.all_records()
        # What was made of samples that these replace.
        for name in (PROVENANCE, GRID, *NPZ.values(), PNG):
            _remove(self.folder / name)

        # Starts on several machines have drawn with several things, each of which is listed once.
        shards = []
        drawn_with: list[dict[str, Any]] = []
        for record in records:
            shards += record["shards"]
            if record["drawn_with"] not in drawn_with:
                drawn_with.append(record["drawn_with"])
        write_manifest(
            self.folder,
            self.info,
            records[0]["columns"],
            shards,
            job=self.parts.job,
            drawn_with=drawn_with,
        )
        self.parts.remove()


class Worker(AbstractContextManager["Worker"]):
    """One thread that finishes batches while the next is drawn; at most two wait. Its errors are
    raised in the thread that submits."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """`prepare`: runs first, in the thread."""
        self._pool = ThreadPoolExecutor(1, "finish", prepare)
        self._pending: deque[Future[None]] = deque()

    def __call__(self, work: Callable[..., None], *args: Any) -> None:
        """Submit work(*args), after the oldest of two that wait."""
        # Each batch that waits takes memory, on a GPU too.
        while len(self._pending) >= 2:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work, *args))

    def __exit__(self, *error: Any) -> None:
        # After a stop what was drawn is still saved; after an error it is not.
        failed = error[0] is not None and not issubclass(error[0], Stopped)
        self._pool.shutdown(cancel_futures=failed)
        # An error of the thread must not hide the one that ended the block.
        while self._pending and error[0] is None:
            self._pending.popleft().result()


def make_of(folder: Path, also: Sequence[Format]) -> None:
    """Write what the folder of a complete set holds besides its shards, as far as it is missing.
    For rank 0. Raises Stopped."""
    data = ShardDataset(folder)
    makers: dict[str, Callable[[Path, ShardDataset], None]] = {GRID: _write_grid}
    if "npz" in also:
        makers[NPZ[data.info.kind]] = _write_npz
    if "png" in also:
        makers[PNG] = _write_png

    # Without provenance, which is written last, the files are of samples before these.
    known = (folder / PROVENANCE).is_file()
    for name, make in makers.items():
        if known and (folder / name).exists():
            continue
        temporary = folder / f"{name}.tmp"
        _remove(folder / name)
        _remove(temporary)
        make(temporary, data)
        temporary.replace(folder / name)
    if not known:
        # Written last: with it, all other files are of these samples.
        provenance = data.manifest["job"] | {"drawn_with": data.manifest["drawn_with"]}
        write_atomically(folder / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def blocks(data: ShardDataset, what: str) -> Iterator[dict[str, Array]]:
    """All rows in order, a block at a time. Raises Stopped."""
    bar = tqdm(
        total=len(data),
        desc=what,
        unit=" images",
        delay=2,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    with bar:
        for start in range(0, len(data), _BLOCK):
            if stop_requested():
                raise Stopped
            rows = data.gather(np.arange(start, min(start + _BLOCK, len(data))))
            yield rows
            bar.update(len(rows["label"]))


def pictures(rows: dict[str, Array]) -> npt.NDArray[np.uint8]:
    """Rows as pictures (N, H, W, 3) uint8; of latents the first three channels."""
    latent = rows["latent"]
    # Grey pixels are repeated in three channels.
    if latent.dtype == np.uint8:
        return np.broadcast_to(latent, (len(latent), 3, *latent.shape[2:])).transpose(0, 2, 3, 1)
    return to_uint8(torch.from_numpy(latent))


def _write_grid(path: Path, data: ShardDataset) -> None:
    """The first 100 samples as one picture, ten columns, with their texts as titles."""
    first = np.arange(min(100, len(data)))
    images = pictures(data.gather(first))
    columns = min(10, len(first))
    titles = _texts(data, first)

    # Small images are enlarged by a whole number, more where there are titles to read.
    scale = max(1, (96 if titles else 64) // images.shape[2])
    sheet = titled(images, titles, columns, scale) if titles else grid(images, columns, scale)
    if data.info.kind != "pixels":
        sheet = headed(sheet, UNDECODED)
    Image.fromarray(sheet).save(path, "PNG")


def _texts(data: ShardDataset, rows: npt.NDArray[np.int64]) -> list[str] | None:
    """The text of each of these samples; None where they have none."""
    if "captions" not in data.manifest["columns"]:
        return None
    return [texts[0] for texts in data.texts(rows)]


def _write_npz(path: Path, data: ShardDataset) -> None:
    """ADM's npz, written block by block: 50,000 images of 256 x 256 are 9.8 GB."""
    pixels = data.info.kind == "pixels"
    channels, height, width = data.info.shape
    shape = (len(data), height, width, 3) if pixels else (len(data), channels, height, width)
    texts = _texts(data, np.arange(len(data)))
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            # numpy's own writer would need the complete array in memory.
            header = {"descr": "|u1" if pixels else "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            labels = []
            for rows in blocks(data, "npz"):
                array.write(np.ascontiguousarray(pictures(rows) if pixels else rows["latent"]).data)
                labels.append(rows["label"])
        # Of a text-to-image model the texts stand in for labels.
        with archive.open("arr_1.npy", "w") as array:
            extra = np.array(texts) if texts else np.concatenate(labels)
            np.lib.format.write_array(array, extra, allow_pickle=False)
        # The directory of the archive has to be on the disk too.
        archive.close()
        file.flush()
        os.fsync(file.fileno())


def _write_png(path: Path, data: ShardDataset) -> None:
    """A folder of PNGs, named by the samples' numbers."""
    path.mkdir()
    start = 0
    # Compression takes most of the time, and releases the interpreter's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for rows in blocks(data, "png"):
            images = pictures(rows)
            files = [path / f"{start + i:06d}.png" for i in range(len(images))]
            # The list waits for the block, and raises what a thread raised.
            list(pool.map(_save_png, images, files))
            start += len(files)


def _save_png(image: Array, file: Path) -> None:
    Image.fromarray(image).save(file, "PNG")
