"""Which ids a set has that grows, so that none of them is given to another image too.

OUT/packing/ids_SET.hashes        8 bytes of each id of the set, sorted; made by the rank that comes first
OUT/packing/ids_SOURCE.compared   empty: the source's ids were compared with them, which other ranks and
                                  later starts need not do again
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.content import write_sorted
from data_prep.hashes import among
from data_prep.listing import Listings
from data_prep.sources import Item, Source
from largescale.data.shards import ShardDataset
from largescale.errors import DataError
from largescale.host.launch import env_rank, printable

# Why an image is left out that the set does not have, but its id.
ID_TAKEN = "its id is in the set already; to add it too, give --id-prefix"
# Images of taken ids that are looked at before any work, to find whether they are those of the set.
LOOKED_AT = 32
# Of a source whose ids are known only once it is read: parts, and images of each.
PARTS_READ, READ_OF_EACH = 8, 4
_TYPE = np.dtype("<u8")

Decode = Callable[[Item], tuple[Item, Any]]
"""An item under its row's id, with its content or the reason why it has to be left out."""


def _digests(ids: Iterable[str]) -> bytes:
    """8 bytes of each id."""
    digests = bytearray()
    for id in ids:
        # One that is not UTF-8 is left out later; here it must not stop the others.
        encoded = id.encode(errors="surrogatepass")
        digests += hashlib.blake2b(encoded, digest_size=8).digest()
    return bytes(digests)


class KnownIds:
    """The ids of a set."""

    def __init__(self, data: ShardDataset, listings: Listings) -> None:
        path = listings.file(f"ids_{data.fingerprint[:16]}.hashes", partial(_write, data))
        # Mapped, and searched by halves: those of a large set stay on the disk. Of ten million new ids
        # one is taken for one of ten million others with a probability of 5 in a million.
        self._sorted = np.memmap(path, _TYPE, "r")

    def __contains__(self, id: str) -> bool:
        return bool(self.among([id])[0][0])

    def among(self, ids: Iterable[str]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Which of the ids the set has, and the hashes of all."""
        digests = np.frombuffer(_digests(ids), _TYPE)
        return among(self._sorted, digests), digests


def _write(data: ShardDataset, path: Path) -> None:
    write_sorted(path, _of_shards(data))


def _of_shards(data: ShardDataset) -> Iterator[bytes]:
    """The hashes of the ids of one shard after the other."""
    shards = range(len(data.manifest["shards"]))
    quiet = env_rank() != 0
    for n in tqdm(shards, "read the set's ids", unit="shard", delay=2, disable=quiet):
        yield _digests(id for _, id in data.ids(slice(n, n + 1)))


@dataclass(frozen=True)
class IdCheck:
    """The comparison of a source's ids with those of the set, before any work. `prefix`: of the ids
    that the rows get; `images_known`: whether it can be told which images the set has."""

    known: KnownIds
    data: ShardDataset
    source: Source
    prefix: str
    decode: Decode
    images_known: bool

    def once(self, listings: Listings) -> None:
        """Compares them, unless another rank or an earlier start has. Raises DataError where images
        that are looked at are others than those of the same ids in the set. What they do not show is
        found when it is packed."""
        facts = self.data.fingerprint, self.source.fingerprint, self.prefix
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        listings.file(f"ids_{name}.compared", self._compare)

    def _compare(self, path: Path) -> None:
        ids = self.source.ids()
        if ids is None:
            what = "ids of the source are"
            items = _some_items(self.source)
        else:
            count, taken, numbers = _taken(self.known, ids, self.prefix)
            what = f"{taken:,} of the source's {count:,} ids are"
            one_row_parts = partial(self.source.part, rows_per_shard=1)
            items = chain.from_iterable(map(one_row_parts, numbers))
        looked_at = 0
        others = []
        for row, content in map(self.decode, items):
            looked_at += 1
            # A text is the reason why an image would be left out.
            if isinstance(content, str) and content == ID_TAKEN:
                others.append(row.id)
        if others:
            raise self._refused(what, others, looked_at)
        path.touch()

    def _refused(self, what: str, others: Sequence[str], looked_at: int) -> DataError:
        some = f"{len(others)} of {looked_at} that were looked at, such as {printable(others[0])}"
        which = f"not of the same images: {some}"
        if not self.images_known:
            which = (
                "an older version, which kept no hashes of images, packed it, so that nothing tells "
                f"whether they are of the same ones: {some}; leave out of the source what the set has"
            )
        return DataError(
            f"--append: {what} in {self.data.path} already, and {which}; to add them under other ids, "
            f"give --id-prefix, such as --id-prefix {self.source.name}/"
        )


def _taken(
    known: KnownIds, ids: Iterable[Sequence[str]], prefix: str
) -> tuple[int, int, list[int]]:
    """How many ids there are, how many of them the set has, and the numbers of some of these."""
    count = taken = 0
    digests, numbers = np.empty(0, _TYPE), np.empty(0, np.int64)
    with tqdm(desc="compare ids", unit="id", delay=2, disable=env_rank() != 0) as bar:
        for some in ids:
            found, of_some = known.among(prefix + id for id in some)
            at = np.flatnonzero(found)
            taken += len(at)
            # Those of the least hashes, which lie anywhere in the source.
            digests = np.concatenate([digests, of_some[at]])
            numbers = np.concatenate([numbers, count + at])
            least = np.argsort(digests)[:LOOKED_AT]
            digests, numbers = digests[least], numbers[least]
            count += len(some)
            bar.update(len(some))
    return count, taken, sorted(numbers.tolist())


def _some_items(source: Source) -> Iterator[Item]:
    """The first items of some parts."""
    parts = source.parts(1)
    for part in np.unique(np.linspace(0, parts - 1, min(parts, PARTS_READ)).astype(int)).tolist():
        items = source.part(part, READ_OF_EACH)
        yield from islice(items, READ_OF_EACH)
        # A command whose output is not read to the end may fail for that.
        with suppress(DataError, OSError):
            if isinstance(items, Generator):
                items.close()
