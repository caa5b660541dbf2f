"""Which images a packed set holds, by their content: 8 bytes of each, sorted in a file.

OUT/content.hashes                of the images that were packed first
OUT/content_a1.hashes ...         of those that were added
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.hashes import among
from largescale.data.shards import ShardDataset
from largescale.host.files import fsync_dir

_TYPE = np.dtype("<u8")


def content_hash(content: npt.NDArray[Any]) -> bytes:
    """8 bytes that are the same for the same pixels, after the crop and before any encoder; or for
    the same latents, where others have encoded them."""
    # Of ten million images two are taken for one with a probability of 3 in a million.
    return hashlib.blake2b(np.ascontiguousarray(content).data, digest_size=8).digest()


class Known:
    """The images of a set. Of a set without hashes, as older versions packed, those of pixels are
    computed; latents tell nothing, so that `complete` is False."""

    def __init__(self, data: ShardDataset) -> None:
        # Mapped, and searched by halves: the hashes of a large set stay on the disk.
        names = data.manifest.get("content_hashes", [])
        self._sorted: list[npt.NDArray[np.uint64]] = []
        for name in names:
            self._sorted.append(np.memmap(data.path / name, _TYPE, "r"))
        # One hash for each image: fewer mean that a part was packed by a version that kept none.
        self.complete = sum(map(len, self._sorted)) == len(data)
        if not self.complete and data.info.kind == "pixels":
            # Pixels are stored just as they would have been hashed, so that it can be done now.
            self._sorted = [_of_pixels(data)]
            self.complete = True

    def __contains__(self, digest: bytes) -> bool:
        value = np.frombuffer(digest, _TYPE)
        return any(among(hashes, value)[0] for hashes in self._sorted)


def _of_pixels(data: ShardDataset) -> npt.NDArray[np.uint64]:
    found = []
    for number in range(len(data.manifest["shards"])):
        for row in data.rows(number):
            found.append(content_hash(row["latent"]))
    return np.sort(np.frombuffer(b"".join(found), _TYPE))


def write_hashes(path: Path, records: Iterable[dict[str, Any]]) -> bool:
    """Writes the hashes that the records of all parts have; False, and nothing, where there are none,
    or a part was made by a version without."""
    try:
        return write_sorted(path, (bytes.fromhex(record["hashes"]) for record in records))
    except KeyError:
        return False


def write_sorted(path: Path, hashes: Iterable[bytes]) -> bool:
    """Writes hashes, sorted, which are given many at a time; False, and nothing, where there are
    none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for some in hashes:
                file.write(some)
            size = file.tell()
        if not size:
            return False
        # Sorted in the file.
        mapped = np.memmap(temporary, _TYPE, "r+")
        mapped.sort()
        mapped.flush()
        # On the disk before it has its name: the manifest, which names it, is written next.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
