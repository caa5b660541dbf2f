"""Sources of latents that others have packed: what they say of their latents, and what those have
in common that are files of many rows. The formats are in latent_files.py and latent_columns.py."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.fingerprints import fingerprint
from data_prep.images import Unusable
from data_prep.source_files import SourceFile, other_content, seen, sizes
from data_prep.sources import Item, Skips
from largescale.errors import DataError, LargescaleError
from largescale.host.files import from_json

Array = npt.NDArray[Any]
Kind = Literal["latents", "moments"]
# Files of which latents are read to tell one folder from another: files of as many latents of one
# shape have one size, whatever is in them.
SAMPLE = 256
# Ids that are made at a time.
IDS_AT_A_TIME = 4096


class LatentSource:
    """What a source says of its latents besides what every source does."""

    format: str
    kind: Kind = "latents"
    shape: tuple[int, int, int]  # of a row's latent, as we store it
    scaled = False
    """Whether the encoder's scaling_factor is already a factor of the latents."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Statistics that lie beside the latents, by which their own program normalises them."""

    name: str
    num_classes: int
    captioned: bool
    facts: dict[str, Any]
    notes: list[str]

    def latents(self, id: str, data: bytes) -> Sequence[Array]:
        """The latent that an item's `read` gives, and where there is one that of the mirrored
        image, each of `shape`, as their own program stored them. Raises DataError."""
        raise NotImplementedError

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        raise NotImplementedError

    def some(self) -> Iterator[bytes]:
        """A few latents from all over the source."""
        raise NotImplementedError

    def state_facts(self, folder: Path) -> dict[str, Any]:
        """What every manifest says of such a source."""
        place = str(folder.resolve())
        return {"program": "data_prep.latents", "format": self.format, "latents": place}

    def other_latents(self) -> str | None:
        """Words for latents that are not those that lay there when packing began; None where none
        is known. What is gone does not count."""
        with suppress(DataError, OSError):
            if fingerprint(self.some()) != self.facts["sample"]:
                place = self.facts["latents"]
                return f"{place} has other latents than when packing began, in files of one size"
        return None


class RowFiles(LatentSource):
    """Files of many rows, one file after the other. A part is `rows_per_shard` rows, and reads only
    their files."""

    class_names: Sequence[str] = ()
    captioned = False
    dtype: type[np.generic] = np.float32  # of the latents that items read
    per_row = 1  # latents: 2 with that of the mirrored image

    def _describe(
        self,
        folder: Path,
        files: Sequence[Path],
        rows: Sequence[int],
        labels: Iterable[Array] = (),
        **settings: Any,
    ) -> None:
        """Sets what follows from the files, how many rows each has and the labels of all, which are
        read as a stream. `settings`: what else the rows depend on; plain JSON. Raises DataError."""
        self.name = name_of_folder(folder)
        self.notes = []
        self.skipped: Skips = []
        self._files, self._starts = files, [0, *accumulate(rows)]
        self.size: int | None = self._starts[-1]
        if not self.size:
            raise no_rows(folder)
        # Found while the labels are hashed, as they are read but once.
        low, high = 0, -1

        def hashed() -> Iterator[bytes]:
            nonlocal low, high
            for array in labels:
                if len(array):
                    low, high = min(low, int(array.min())), max(high, int(array.max()))
                yield array.astype("<i8").tobytes()

        # Sizes and a few latents stand for the files' content, which would take hours to hash.
        self.files: Sequence[SourceFile] = seen(map(str, files))
        self.fingerprint = fingerprint(
            [self.format, self.kind, json.dumps(settings, sort_keys=True)],
            (file.relative_to(folder).as_posix() for file in files),
            map(str, sizes(self.files)),
            map(str, rows),
            hashed(),
        )
        if low < 0:
            raise DataError(f"{folder} has the label {low}; labels count from 0: correct it")
        self.num_classes = max(high + 1, len(self.class_names))
        if len(self.class_names) < self.num_classes:
            self.class_names = ()
        self.facts = self.state_facts(folder) | {
            "rows": self.size,
            "files": len(files),
            "bytes": sum(sizes(self.files)),
            **settings,
            "sample": fingerprint(self.some()),
        }

    def _rows(self, number: int, first: int, last: int) -> Iterator[Item]:
        """The rows in [first, last) of a file."""
        raise NotImplementedError

    def parts(self, rows_per_shard: int) -> int:
        return -(-self._starts[-1] // rows_per_shard)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        # A part may begin in one file and end in another.
        start = number * rows_per_shard
        stop = min(start + rows_per_shard, self._starts[-1])
        for file, (first, last) in enumerate(pairwise(self._starts)):
            if first < stop and start < last:
                with reading(self._files[file]):
                    yield from self._rows(file, max(start - first, 0), min(stop, last) - first)

    def _id(self, number: int, row: int) -> str:
        """The id of a row of a file."""
        return f"{self._starts[number] + row:09d}"

    def ids(self) -> Iterator[Sequence[str]]:
        for number, (first, last) in enumerate(pairwise(self._starts)):
            for start in range(0, last - first, IDS_AT_A_TIME):
                stop = min(start + IDS_AT_A_TIME, last - first)
                yield [self._id(number, row) for row in range(start, stop)]

    def some(self) -> Iterator[bytes]:
        step = -(-len(self._files) // SAMPLE)
        for number in range(0, len(self._files), step):
            rows = self._starts[number + 1] - self._starts[number]
            for row in sorted({0, rows // 2, rows - 1} if rows else ()):
                with reading(self._files[number]), suppress(Unusable):
                    yield next(self._rows(number, row, row + 1)).read()

    def latents(self, id: str, data: bytes) -> Sequence[Array]:
        values = np.frombuffer(data, np.uint8)
        size = self.per_row * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        if len(values) != size:
            raise DataError(
                f"row {id} of {self.facts['latents']} has {len(values):,} bytes of latents, others "
                f"have {size:,}; restore the file"
            )
        return list(values.view(self.dtype).reshape(self.per_row, *self.shape))

    def changed(self) -> str | None:
        return other_content(self.files) or self.other_latents()


def inside(name: Any, index: Path) -> str:
    """The name of a file in a folder, as its index has it. Raises DataError for one that leads out
    of the folder, by which an index could have any file read."""
    if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in Path(name).parts:
        raise DataError(f"{index} names {name!r}, which is no file of its folder; restore it")
    return name


def no_rows(folder: Path) -> DataError:
    return DataError(f"{folder} holds no rows; give the folder of a whole set")


def name_of_folder(folder: Path) -> str:
    """The name of a data set that comes from a folder."""
    return Path(os.path.abspath(folder)).name


def json_of(path: Path) -> Mapping[str, Any]:
    with reading(path):
        found = from_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    return found


@contextmanager
def reading(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Makes a DataError that names the file of what libraries raise for content of another kind.
    `more`: errors that are of one library only."""
    foreign: tuple[type[Exception], ...] = (
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        *more,
    )
    try:
        yield
    except LargescaleError:
        raise
    except foreign as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); restore it") from error
