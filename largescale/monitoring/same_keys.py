"""The numbers of lines of JSON that all have the same keys, as rows of metrics nearly always do:
many times as fast as line by line, and exact.

A number begins two bytes after a colon, and ends where the next key begins. So colons are looked
for in all lines at once, what lies between the numbers is compared with the keys, and pyarrow reads
the numbers where they stand. It also takes numbers that are none of JSON, such as 01, which only a
disk that changes bytes makes of others."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

_COLON, _LINE_BREAK = b":\n"


@dataclass(frozen=True)
class SameKeys:
    """What was read of some lines."""

    # By key, (lines with these keys,): infinite what is not finite.
    columns: dict[str, np.ndarray]
    # (lines,): where each line begins, where its line break is, and whether it has these keys.
    begins: np.ndarray
    ends: np.ndarray
    have_them: np.ndarray


def read_same_keys(content: bytes, row: dict[str, Any]) -> SameKeys | None:
    """The numbers of the lines that have as many keys as `row`; None where these are not the keys
    of `row` in their order, a value is no number, or "step" no whole one. Each line ends with a
    line break."""
    found = np.frombuffer(content, np.uint8)
    mask = found == _COLON
    mask |= found == _LINE_BREAK
    marks = np.flatnonzero(mask)

    # A colon for each key, and the line break.
    last = np.flatnonzero(found[marks] == _LINE_BREAK)
    counts = np.diff(last, prepend=-1)
    have_them = counts == len(row) + 1
    ends = marks[last]
    begins = np.concatenate([[0], ends[:-1] + 1])
    marks = marks[np.repeat(have_them, counts)].reshape(-1, len(row) + 1)
    columns = _numbers(content, row, begins[have_them], marks)
    return None if columns is None else SameKeys(columns, begins, ends, have_them)


def _numbers(
    content: bytes, row: dict[str, Any], begins: np.ndarray, marks: np.ndarray
) -> dict[str, np.ndarray] | None:
    """`marks`: (lines, keys + 1)."""
    import pyarrow

    keys = [f"{', ' if i else '{'}{json.dumps(key)}: ".encode() for i, key in enumerate(row)]
    keys.append(b"}\n")

    # The pieces of a line: key and number in turn, the end, and what follows up to the next line.
    lines, pieces = len(marks), 2 * len(keys)
    if not lines:
        return None
    starts = np.empty((lines, pieces), np.int32)
    starts[:, 0] = begins
    starts[:, 1:-1:2] = marks[:, :-1] + 2
    starts[:, -1] = marks[:, -1] + 1
    starts[:, 2:-1:2] = starts[:, 3::2] - list(map(len, keys[1:]))
    offsets = np.append(starts, starts[-1:, -1])
    if not _are_keys(content, keys, offsets, pieces):
        return None

    # Pieces that are no numbers are as if they were missing.
    is_number = np.zeros(pieces, bool)
    is_number[1:-1:2] = True
    known = pyarrow.py_buffer(np.packbits(np.tile(is_number, lines), bitorder="little"))
    buffers = [known, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content)]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), lines * pieces, buffers)
    at_step = 1 + 2 * list(row).index("step") + pieces * np.arange(lines)
    try:
        texts.take(pyarrow.array(at_step)).cast(pyarrow.int64())
        numbers = texts.cast(pyarrow.float64())
    except pyarrow.ArrowInvalid:
        return None
    values = np.frombuffer(numbers.buffers()[1], np.float64, lines * pieces)
    values = np.ascontiguousarray(values.reshape(lines, pieces)[:, 1:-1:2].T)
    values[~np.isfinite(values)] = np.inf
    return dict(zip(row, values, strict=True))


def _are_keys(content: bytes, keys: list[bytes], offsets: np.ndarray, pieces: int) -> bool:
    """Whether every other piece of each line is its key."""
    import pyarrow

    lengths = np.diff(offsets).reshape(-1, pieces)
    if (lengths < 0).any() or (lengths[:, 0] != len(keys[0])).any():
        return False
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content)]
    texts = pyarrow.Array.from_buffers(pyarrow.binary(), lengths.size, buffers)
    which = np.arange(0, lengths.size, 2)
    found = texts.take(pyarrow.array(which)).buffers()[2]
    expected = b"".join(keys) * len(lengths)
    return bool(found.slice(0, len(expected)) == pyarrow.py_buffer(expected))
