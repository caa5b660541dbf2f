"""The folder of one sample set.

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

from largescale.data.format import DatasetInfo
from largescale.data.images import UNDECODED, grid, headed, titled, to_uint8
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.data.writer import Shard, write_manifest
from largescale.errors import Stopped
from largescale.host.files import write_atomically
from largescale.host.signals import stop_requested

PROVENANCE, GRID, PNG = "provenance.json", "grid.png", "png"
NPZ = {
    "pixels": "samples.npz",
    "latents": "latents.npz",
}  # a latent's would get an FID, but no true one
Format = Literal["npz", "png"]
Array = npt.NDArray[Any]
_BLOCK = 256  # rows read at a time


class SampleSet:
    """Samples 0 .. n - 1, `shard_size` to a shard. A shard is what one rank draws between two
    savings."""

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
        self.folder, self.info, self.n, self.shard_size, self.rank = (
            folder,
            info,
            n,
            shard_size,
            rank,
        )
        self.parts = Parts(
            folder,
            job | {"shard_size": shard_size},
            -(-n // shard_size),
            rank,
            world_size,
            other="other samples; give another --out, or replace them with eval.sample --replace",
        )

    def numbers(self, part: int) -> range:
        return range(part * self.shard_size, min(self.n, (part + 1) * self.shard_size))

    def todo(self) -> list[int]:
        return [part for part in self.parts.mine if not self.parts.record(part)["done"]]

    def done(self) -> int:
        """Samples in whole shards, of every rank."""
        return sum(
            len(self.numbers(part))
            for part in range(self.parts.parts)
            if self.parts.record(part)["done"]
        )

    def save(
        self,
        part: int,
        latents: Array,
        labels: Array,
        texts: Sequence[str] | None,
        drawn_with: dict[str, Any],
    ) -> None:
        """The samples `numbers(part)`: latents (n, *info.shape) uint8 or float16. `drawn_with`:
        what changes them up to rounding."""
        shard = Shard(self.info)
        captions = [None] * len(latents) if texts is None else [[text] for text in texts]
        for i, latent, label, caption in zip(
            self.numbers(part), latents, labels.tolist(), captions, strict=True
        ):
            shard.add(id=f"{i:06d}", latent=latent, label=label, captions=caption)
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
        """Rank 0, once every rank's shards are done."""
        records = self.parts.all_records()
        for name in (PROVENANCE, GRID, *NPZ.values(), PNG):  # of samples that these replace
            _remove(self.folder / name)
        shards = [shard for record in records for shard in record["shards"]]
        drawn_with = [
            with_
            for i, record in enumerate(records)
            if (with_ := record["drawn_with"])
            not in [before["drawn_with"] for before in records[:i]]
        ]
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
    """One thread that finishes batches while the next is drawn; at most two wait. What it raises
    comes out here."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._pool, self._pending = ThreadPoolExecutor(1, "finish", prepare), deque[Future[None]]()

    def __call__(self, work: Callable[..., None], *args: Any) -> None:
        while len(self._pending) >= 2:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work, *args))

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(
            cancel_futures=error[0] is not None and not issubclass(error[0], Stopped)
        )
        while self._pending and error[0] is None:
            self._pending.popleft().result()


def make_of(folder: Path, also: Sequence[Format]) -> None:
    """What the folder of a whole set holds besides its shards, as far as it is missing. For rank 0.
    Raises Stopped."""
    data, known = ShardDataset(folder), (folder / PROVENANCE).is_file()
    makers: dict[str, Callable[[Path, ShardDataset], None]] = {GRID: _write_grid}
    makers |= {NPZ[data.info.kind]: _write_npz} if "npz" in also else {}
    makers |= {PNG: _write_png} if "png" in also else {}
    for name, make in makers.items():
        if known and (folder / name).exists():
            continue
        temporary = folder / f"{name}.tmp"
        for path in (folder / name, temporary):  # cut short
            _remove(path)
        make(temporary, data)
        temporary.replace(folder / name)
    if not known:
        provenance = data.manifest["job"] | {"drawn_with": data.manifest["drawn_with"]}
        write_atomically(folder / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _remove(path: Path) -> None:
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
    """(N, H, W, 3) uint8: of latents the first three channels."""
    latent = rows["latent"]
    if latent.dtype == np.uint8:
        return np.broadcast_to(latent, (len(latent), 3, *latent.shape[2:])).transpose(0, 2, 3, 1)
    return to_uint8(torch.from_numpy(latent))


def _write_grid(path: Path, data: ShardDataset) -> None:
    first = np.arange(min(100, len(data)))
    images, columns = pictures(data.gather(first)), min(10, len(first))
    titles = (
        [texts[0] for texts in data.texts(first)]
        if "captions" in data.manifest["columns"]
        else None
    )
    scale = max(1, (96 if titles else 64) // images.shape[2])
    sheet = titled(images, titles, columns, scale) if titles else grid(images, columns, scale)
    if data.info.kind != "pixels":
        sheet = headed(sheet, UNDECODED)
    Image.fromarray(sheet).save(path, "PNG")


def _write_npz(path: Path, data: ShardDataset) -> None:
    """Block by block: 50,000 images of 256 x 256 are 9.8 GB."""
    pixels, (channels, height, width) = data.info.kind == "pixels", data.info.shape
    shape = (len(data), height, width, 3) if pixels else (len(data), channels, height, width)
    labels: Array = np.array([], np.int64)
    if "captions" in data.manifest["columns"]:
        labels = np.array([texts[0] for texts in data.texts(np.arange(len(data)))])
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1" if pixels else "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            each = []
            for rows in blocks(data, "npz"):
                array.write(np.ascontiguousarray(pictures(rows) if pixels else rows["latent"]).data)
                each.append(rows["label"])
        with archive.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(
                array, labels if len(labels) else np.concatenate(each), allow_pickle=False
            )
        archive.close()
        file.flush()
        os.fsync(file.fileno())


def _write_png(path: Path, data: ShardDataset) -> None:
    path.mkdir()
    start = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for rows in blocks(data, "png"):
            names = [path / f"{start + i:06d}.png" for i in range(len(rows["label"]))]
            list(
                pool.map(
                    lambda name, image: Image.fromarray(image).save(name, "PNG"),
                    names,
                    pictures(rows),
                )
            )
            start += len(names)
