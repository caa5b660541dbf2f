"""Reads a log of any length, metrics.jsonl of a run of millions of steps, in one pass and in little
memory."""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from largescale.host.files import from_json

Row = dict[str, Any]
# Numbers of many rows by their key, of equal length: NaN where a row lacks it, infinite where it is
# not finite.
Columns = dict[str, np.ndarray]

# Bytes that are read at a time, which a cache holds; pyarrow takes longer to load than a log of
# fewer than _LARGE.
_CHUNK = 2**21
_LARGE = 2**19
# Rows of metrics that are kept whole at the end of the log.
_LAST = 5


@dataclass
class Log:
    """What is kept of a log: events and other rows that are rare; of the rows of metrics the first
    and the last five."""

    rows: list[Row] = field(default_factory=list)
    # Lines that are no rows.
    problems: int = 0


@dataclass
class _Part:
    """Some lines of the log, read."""

    logged: list[Row]
    others: list[Row]
    columns: Columns
    problems: int


def read_log(run_dir: Path, take: Callable[[Columns], None] = lambda columns: None) -> Log:
    """The log of a run. `take` is given the numbers of all rows, a part of them at a time. Raises
    OSError."""
    path = run_dir / "metrics.jsonl"
    log = Log()
    if not path.exists():
        return log

    # Parts are parsed in threads: pyarrow releases the interpreter's lock.
    logged: list[Row] = []
    others: list[Row] = []
    threads = os.cpu_count() or 1
    with path.open("rb") as file, ThreadPoolExecutor(threads) as pool:
        chunks = _chunks(file)
        while some := list(itertools.islice(chunks, threads)):
            for part in pool.map(_parse, some):
                logged += part.logged
                logged = _ends(logged)
                others += part.others
                log.problems += part.problems
                take(part.columns)

    take(_columns_of([row for row in others if "event" not in row]))
    log.rows = sorted([*logged, *others], key=lambda row: row["step"])
    return log


def _chunks(file: IO[bytes]) -> Iterator[list[bytes]]:
    """The lines of the file, many at a time; a last one that is cut short only if it is a row."""
    rest = b""
    while part := file.read(_CHUNK):
        *lines, rest = (rest + part).split(b"\n")
        yield lines
    # A run that is writing has not ended its line yet.
    if parse_row(rest):
        yield [rest]


def _parse(lines: list[bytes]) -> _Part:
    # Only as a key can "loss" stand before a colon: in a text its quotes are escaped.
    metrics: list[bytes] = []
    others: list[bytes] = []
    for line in lines:
        (metrics if b'"loss":' in line else others).append(line)
    rare = _rows(others)
    columns, problems = _columns(metrics)
    return _Part(_rows(_ends(metrics)), rare, columns, problems + len(others) - len(rare))


def _ends(items: list[Any]) -> list[Any]:
    """The first and the last ones."""
    return items if len(items) <= _LAST + 1 else [items[0], *items[-_LAST:]]


def _rows(lines: list[bytes]) -> list[Row]:
    return [row for row in map(parse_row, lines) if row is not None]


def parse_row(line: bytes) -> Row | None:
    """The row on this line; None where it is no object with a number for a step."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _columns(lines: list[bytes]) -> tuple[Columns, int]:
    """(the numbers of these lines, how many of them are no rows)."""
    content = b"\n".join(lines)
    table = _table(content) if len(content) >= _LARGE else None
    if table is not None:
        return table, 0
    rows = _rows(lines)
    return _columns_of(rows), len(lines) - len(rows)


def _table(content: bytes) -> Columns | None:
    """The same by pyarrow, several times as fast; None for lines of which one is not as the
    others."""
    import pyarrow
    import pyarrow.json

    try:
        table = pyarrow.json.read_json(
            io.BytesIO(content),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
        )
    except pyarrow.ArrowInvalid:
        return None
    types = pyarrow.types
    columns: Columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not (types.is_integer(column.type) or types.is_floating(column.type)):
            continue
        if name == "step" and (column.null_count or not types.is_integer(column.type)):
            return None
        values = column.to_numpy().astype(np.float64)
        # As in `_number`: what is NaN though the row has it.
        missing = column.is_null().to_numpy() if column.null_count else False
        values[~np.isfinite(values) & ~np.asarray(missing)] = np.inf
        columns[name] = values
    return columns if "step" in columns else None


def _columns_of(rows: list[Row]) -> Columns:
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    columns: Columns = {}
    for key in keys:
        values = np.array([_number(row.get(key)) for row in rows])
        if not np.isnan(values).all():
            columns[key] = values
    return columns


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        return math.nan
    # A whole number of JSON can be larger than any float.
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    return number if math.isfinite(number) else math.inf
