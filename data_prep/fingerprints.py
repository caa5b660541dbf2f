"""What identifies a list of texts, however long it is."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from largescale.errors import DataError

# Texts that are read at a time.
_AT_A_TIME = 4096


def fingerprint(*columns: bytes | Iterable[str | bytes | pa.StringArray]) -> str:
    """sha256 of columns of text, read as streams, and of bytes. Texts come one by one or many in an
    array, which gives the same."""
    # Streams, as the texts of millions of files would take gigabytes.
    digest = hashlib.sha256()
    for column in columns:
        length = 0
        for chunk in [column] if isinstance(column, bytes) else _chunks(column):
            digest.update(chunk)
            length += len(chunk)
        # The end of the column: what follows is not part of it.
        digest.update(f"#{length}".encode())
    return digest.hexdigest()


def _chunks(values: Iterable[str | bytes | pa.StringArray]) -> Iterator[bytes | memoryview]:
    """The bytes of many texts, each with its length before it; bytes as they are."""
    values = iter(values)
    first = next(values, b"")
    values = chain([first], values)
    if not isinstance(first, str):
        for value in values:
            yield value if isinstance(value, bytes) else _array_bytes(value)
        return
    while some := list(islice(values, _AT_A_TIME)):
        try:
            yield "".join(f"{len(text)}:{text!s}" for text in some).encode()
        except UnicodeEncodeError as error:
            raise not_utf8(error) from error


def _array_bytes(texts: pa.StringArray) -> memoryview:
    """The bytes of an array's texts, each with its length before it, as `_chunks` makes them: a
    fifth of the time."""
    lengths = pc.utf8_length(texts).cast(pa.string())
    joined = pc.binary_join_element_wise(lengths, texts, ":")
    _, offsets, data = joined.buffers()
    end = int(np.frombuffer(offsets, np.int32)[len(joined)])
    return memoryview(data)[:end]


def not_utf8(error: UnicodeEncodeError) -> DataError:
    return DataError(
        f"{error.object[max(error.start - 40, 0) : error.end + 10]!r}: a name that is not "
        "UTF-8; rename the file"
    )
