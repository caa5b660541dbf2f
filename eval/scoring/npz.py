"""Arrays in .npz files, mapped rather than loaded: 50,000 images of 256 x 256 are 9.8 GB."""

import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from largescale.errors import DataError
from largescale.host.sizes import size_text

Array = npt.NDArray[Any]
# The most bytes of an array that is a hundredth of that when compressed.
MOST_BYTES = 2**30


def names(path: Path) -> set[str]:
    """The names of the arrays in an .npz; none where it is something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return array_names(archive)
    except (OSError, zipfile.BadZipFile):
        return set()


def array_names(archive: zipfile.ZipFile) -> set[str]:
    """The names of the arrays in an archive."""
    return {name.removesuffix(".npy") for name in archive.namelist()}


def load(archive: zipfile.ZipFile, name: str) -> Array:
    """Load an array. Raises ValueError for one that a small file makes huge: images compress
    threefold at best."""
    info = archive.getinfo(name)
    if info.file_size > MOST_BYTES and info.file_size > 100 * info.compress_size:
        raise ValueError(
            f"{name} expands from {info.compress_size:,} bytes to {info.file_size:,}, more than "
            f"{MOST_BYTES:,}"
        )
    return np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)


def header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """The header of an array in an npz: its shape, whether the first index runs fastest, its type,
    and the length of the header in bytes."""
    # numpy has a function for each version of the format.
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(member)
        return shape, fortran, dtype, member.tell()


def mapped(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    """An array in an npz, not loaded but mapped, unless it is compressed."""
    info = archive.getinfo(name)
    shape, fortran, dtype, length = header(archive, name)
    # A header that does not fit the file would map bytes that are not the array's.
    if info.file_size != length + math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name} has {info.file_size} bytes, which are not an array of shape {shape}"
        )
    # Compressed bytes cannot be mapped.
    if info.compress_type != zipfile.ZIP_STORED:
        print(
            f"{path}: {name} is compressed, so all of its {size_text(info.file_size)} are read "
            "into memory",
            file=sys.stderr,
        )
        return load(archive, name)

    # zip's local header of 30 bytes ends in the lengths of a name and of extra data, which follow.
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + length
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which whatever a damaged file raises becomes a DataError with its path."""
    try:
        yield
    # It has a message of its own, and would be caught below as a ValueError.
    except DataError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        NotImplementedError,
    ) as error:
        raise DataError(
            f"{path} cannot be used ({error}); make it anew, or restore it from where it came"
        ) from error
