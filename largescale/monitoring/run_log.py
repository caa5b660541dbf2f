"""Reads a log of any length, metrics.jsonl of a run of millions of steps, in one pass and in little
memory, and goes on where it was read before."""

import io
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from largescale.host.files import from_json
from largescale.monitoring.same_keys import read_same_keys

Row = dict[str, Any]
# Numbers of many rows by their key, of equal length: NaN where a row lacks it, infinite where it is
# not finite.
Columns = dict[str, np.ndarray]

# Bytes that are read at a time, which a cache holds; pyarrow takes longer to load than a log of
# fewer than _LARGE.
_CHUNK = 2**21
_LARGE = 2**18
# Each has some 15 MB at a time.
_MOST_THREADS = 8
# The largest share of lines with more or fewer keys than the others that are read one by one, which
# is slow.
_MOST_ODD = 0.02
# Only as a key can "loss" stand before a colon: in a text its quotes are escaped.
_METRICS = b'"loss":'
# Rows of metrics that are kept whole at the end of the log.
_LAST = 5
# Bytes, some rows, by which a log is known again that was read before.
_COMPARED = 4096


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
    columns: list[Columns]
    problems: int


class LogReader:
    """Reads the log of a run; asked again, only what was added since. A log that was cut, as by a
    roll-back, or that another one has replaced, is read from its beginning."""

    def __init__(
        self,
        run_dir: Path,
        take: Callable[[Columns], None] = lambda columns: None,
        start_over: Callable[[], None] = lambda: None,
    ):
        """`take` is given the numbers of all rows, a part of them at a time; `start_over` is called
        where those that it was given before count no more."""
        self._path = run_dir / "metrics.jsonl"
        self._take = take
        self._start_over = start_over
        self._forget()

    def _forget(self) -> None:
        # The bytes that were read so far, and the last ones of these.
        self._end = 0
        self._tail = b""
        # The first and the last rows of metrics, and all other rows.
        self._logged: list[Row] = []
        self._others: list[Row] = []
        self._problems = 0
        self._start_over()

    def read(self) -> Log:
        """The log as it is now. Raises OSError."""
        try:
            self._read_on()
        except FileNotFoundError:
            self._forget()
        except BaseException:
            # It may have been read in part.
            self._forget()
            raise
        rows = sorted([*self._logged, *self._others], key=lambda row: row["step"])
        return Log(rows, self._problems)

    def _read_on(self) -> None:
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        rare: list[Row] = []
        # Parts are parsed in threads, while this one adds those before: numpy and pyarrow release the
        # interpreter's lock.
        with self._path.open("rb") as file, ThreadPoolExecutor(threads) as pool:
            if not self._goes_on(file):
                self._forget()
            file.seek(self._end)
            for chunk, part in _parsed_ahead(pool, _chunks(file), threads):
                rare += part.others
                self._add(part)
                self._end += len(chunk)
                self._tail = (self._tail + chunk[-_COMPARED:])[-_COMPARED:]
        self._others += rare
        self._take(_columns_of([row for row in rare if "event" not in row]))

    def _goes_on(self, file: IO[bytes]) -> bool:
        """Whether the file still has what was read of it."""
        # Where rows were dropped and others written in their place, these have other times.
        file.seek(self._end - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _add(self, part: _Part) -> None:
        self._logged = _ends([*self._logged, *part.logged])
        self._problems += part.problems
        for columns in part.columns:
            self._take(columns)


def read_log(run_dir: Path, take: Callable[[Columns], None] = lambda columns: None) -> Log:
    """The log of a run, once; see `LogReader`. Raises OSError."""
    return LogReader(run_dir, take).read()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of the file, many at a time, each with its line break; a last one that is cut short
    only if it is a row."""
    rest = b""
    while part := file.read(_CHUNK):
        cut = part.rfind(b"\n") + 1
        if cut:
            yield b"".join((rest, memoryview(part)[:cut]))
            rest = b""
        rest += part[cut:]
    # A run that is writing has not ended its line yet.
    if parse_row(rest):
        yield rest + b"\n"


def _parsed_ahead(
    pool: ThreadPoolExecutor, chunks: Iterator[bytes], ahead: int
) -> Iterator[tuple[bytes, _Part]]:
    """The chunks in order, each parsed; so many of those that follow are parsed meanwhile."""
    pending: deque[tuple[bytes, Future[_Part]]] = deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(_parse, chunk)))
        if len(pending) > ahead:
            first, part = pending.popleft()
            yield first, part.result()
    for last, part in pending:
        yield last, part.result()


def _parse(content: bytes) -> _Part:
    return (_parse_at_once(content) if len(content) >= _LARGE else None) or _parse_lines(content)


def _parse_lines(content: bytes) -> _Part:
    metrics: list[bytes] = []
    others: list[bytes] = []
    for line in content.split(b"\n")[:-1]:
        (metrics if _METRICS in line else others).append(line)
    rare = _rows(others)
    columns, problems = _columns(metrics)
    return _Part(_rows(_ends(metrics)), rare, [columns], problems + len(others) - len(rare))


def _parse_at_once(content: bytes) -> _Part | None:
    """The same, several times as fast; None where lines are not alike."""
    at = content.find(_METRICS)
    row = parse_row(content[content.rfind(b"\n", 0, at) + 1 : content.find(b"\n", at)])
    found = read_same_keys(content, row) if at >= 0 and row else None
    if not found:
        return None

    def line(number: int) -> bytes:
        return content[found.begins[number] : found.ends[number]]

    odd = np.flatnonzero(~found.have_them).tolist()
    odd_metrics = [number for number in odd if _METRICS in line(number)]
    if len(odd_metrics) > _MOST_ODD * len(found.ends):
        return None

    # All that are odd are read as rows, and of the others those that are kept whole.
    kept = _ends(np.flatnonzero(found.have_them).tolist())
    metrics = sorted([*kept, *odd_metrics])
    others = [number for number in odd if number not in odd_metrics]
    few = _rows(list(map(line, odd_metrics)))
    rare = _rows(list(map(line, others)))
    logged = _ends(_rows(list(map(line, metrics))))
    problems = len(odd) - len(few) - len(rare)
    return _Part(logged, rare, [found.columns, _columns_of(few)], problems)


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
