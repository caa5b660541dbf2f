"""A shard's columns in a mapped file."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from largescale.data.format import EMBEDDINGS, IMAGES, DatasetInfo

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

    @classmethod
    def of(
        cls, batch: pa.RecordBatch, address: int, info: DatasetInfo, has_mirror: bool
    ) -> "MappedShard":
        """The columns of a shard's batch, which is mapped at `address`."""
        # Not to_numpy(), which imports pandas where that is installed, and takes half a second.
        view = np.from_dlpack
        size = math.prod(info.shape)
        names = IMAGES[: 1 + has_mirror]
        images = [view(batch.column(name).values).reshape(-1, size) for name in names]
        lists = {}
        if info.captions:
            for name in EMBEDDINGS:
                outer = batch.column(name)
                inner = outer.values
                lists[name] = Lists(view(outer.offsets), view(inner.offsets), view(inner.values))
        return cls(
            # Copied, as all threads of this process would stand still while Python reads a label
            # from a page that is not in memory. A memoryview gives a label as a plain number.
            label=memoryview(view(batch.column("label")).copy()),
            latent=images[0],
            latent_mirror=images[-1],
            lists=lists,
            batch=batch,
            address=address,
        )

    def copy_caption(self, row: int, choice: float, rows: dict[str, Array], i: int) -> None:
        """Copies one caption of a row into row i of a batch."""
        tokens = self.lists["caption_tokens"]
        pooled = self.lists["caption_pooled"]
        # Row `row` has the captions first .. end, of which `choice` in [0, 1) picks one.
        first, end = tokens.outer[row : row + 2]
        chosen = first + int(choice * (end - first))
        embedding = tokens.element(chosen)
        rows["caption_length"][i] = len(embedding) // rows["caption_tokens"].shape[2]
        rows["caption_tokens"][i].reshape(-1)[: len(embedding)] = embedding
        rows["caption_pooled"][i] = pooled.element(chosen)

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
