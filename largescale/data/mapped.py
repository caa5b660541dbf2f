"""A shard's columns in a mapped file."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


class Lists(NamedTuple):
    """A column of lists whose elements are captions' embeddings."""

    outer: Array  # (rows + 1,): row r has the elements outer[r] .. outer[r + 1]
    inner: Array  # (elements + 1,): where in `values` each starts
    values: Array  # flat float16, a view of the mapped file

    def element(self, k: int) -> Array:
        return self.values[self.inner[k] : self.inner[k + 1]]


@dataclass(frozen=True)
class MappedShard:
    """One shard's columns as NumPy views of the mapped file, and its labels in memory."""

    label: memoryview
    latent: Array  # (rows, C * H * W)
    latent_mirror: Array  # of the same shape; where there is none, the same array as `latent`
    lists: dict[str, Lists]
    batch: pa.RecordBatch
    address: int  # of the file's first byte

    def pieces(self, first: int, end: int, *, mirrors: bool, captions: bool) -> list[Array]:
        """What is read of the rows first .. end, each piece in one place of the file."""
        found = [self.latent[first:end]]
        if mirrors and self.latent_mirror is not self.latent:
            found.append(self.latent_mirror[first:end])
        for lists in self.lists.values() if captions else ():
            low, high = lists.outer[first], lists.outer[end]
            found += [lists.outer[first : end + 1], lists.inner[low : high + 1]]
            found.append(lists.values[lists.inner[low] : lists.inner[high]])
        return found
