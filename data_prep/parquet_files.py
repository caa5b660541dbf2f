"""What is read of a single Parquet file: the types, sizes and texts of its columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from largescale.errors import DataError
from largescale.host.files import from_json

# Labels or ids that are read at a time.
TEXTS_READ = 2**16
# Bytes of a column chunk that is less than a hundredth of it when compressed.
MOST_BYTES = 2**30


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes errors of reading a file a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; restore it, or correct --files") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}); restore it, or leave it out of --files"
        ) from error


def is_text(type: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    return bool(
        pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
    )


def fits(key: str, type: pa.DataType) -> bool:
    """Whether a column of this type can be the images, the labels, the captions or the ids."""
    if pa.types.is_dictionary(type):
        type = type.value_type
    if key == "image":
        # Hugging Face's struct of bytes and path
        if pa.types.is_struct(type) and type.get_field_index("bytes") >= 0:
            type = type.field("bytes").type
        return bool(
            pa.types.is_binary(type)
            or pa.types.is_large_binary(type)
            or pa.types.is_binary_view(type)
        )
    if key == "caption":
        lists = (
            pa.types.is_list(type)
            or pa.types.is_large_list(type)
            or pa.types.is_fixed_size_list(type)
        )
        return is_text(type.value_type if lists else type)
    return bool(
        is_text(type)
        or pa.types.is_integer(type)
        or (key == "label" and pa.types.is_floating(type))
    )


def text_of(value: pa.Scalar) -> tuple[str, bool]:
    """The text of a large_string, and whether it is UTF-8, which Arrow does not check."""
    # Bytes that are not UTF-8 are shown as \xNN, so that ids stay different.
    data = value.cast(pa.large_binary()).as_py()
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode(errors="backslashreplace"), False


def largest_chunk(path: Path, group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """Bytes of the largest chunk of these columns that shrinks to a quarter when compressed; at
    least 1. Raises DataError for one that is made huge so."""
    # Images do not shrink. A dictionary may repeat one large value in every row.
    largest = 1
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        size = column.total_uncompressed_size
        stored = column.total_compressed_size
        if size > MOST_BYTES and size > 100 * stored:
            raise DataError(
                f"{path}: column {column.path_in_schema} expands from {stored:,} bytes to "
                f"{size:,}, more than {MOST_BYTES:,}; write smaller row groups, or leave it out "
                "of --files"
            )
        if size > 4 * stored:
            largest = max(largest, size)
    return largest


def texts_of_group(file: pq.ParquetFile, group: int, name: str) -> Iterator[pa.Array]:
    """A column of a row group as text, many rows at a time."""
    for batch in file.iter_batches(TEXTS_READ, row_groups=[group], columns=[name]):
        yield batch.column(name).cast(pa.large_string())


def class_names(path: Path, label_column: str) -> tuple[str, ...]:
    """The names of the classes, from the schema's own `classes` or Hugging Face's description of
    the column; () where it has neither."""
    metadata = pq.read_schema(path).metadata or {}
    # Whatever else stands there is not ours to read, and may be anything.
    try:
        # Written as a JSON list, or as names with commas between them.
        if b"classes" in metadata:
            text = metadata[b"classes"].decode()
            names = from_json(text) if text.lstrip().startswith("[") else text.split(",")
            return tuple(map(str, names))
        description = from_json(metadata.get(b"huggingface", b"{}"))
        features = description.get("info", {}).get("features", {})
        return tuple(map(str, features.get(label_column, {}).get("names") or ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: the names of classes in its schema cannot be read ({error!r}); write it anew"
        ) from error


def version(path: Path) -> tuple[int, int]:
    """A file's size, and when it was written."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def footer(path: Path) -> bytes:
    """The description of a file's columns at its end: places, sizes and statistics, which differ
    where the content does."""
    # The last 8 bytes are the footer's length and a magic number.
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return file.read(length)
