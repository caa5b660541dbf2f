"""Logs of any length as curves of the page: read at once, read on, thinned."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from largescale.monitoring import run_log
from largescale.monitoring.run_log import Columns, LogReader, read_log
from largescale.page.charts import Line, line_chart, short, ticks
from largescale.page.series import BINS, Curve, Series


@pytest.mark.parametrize("damage", [None, b"{broken\n", b'{"step": 5, "loss": 1, "loss": 2}\n', b'{"loss": 3}\n', b'{"step": 7, "loss": "x"}\n'])
def test_a_large_log_is_read_as_a_small_one(tmp_path: Path, damage: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyarrow, or line by line where a line is not as the others: the same numbers."""
    lines = []
    for step in range(1, 3001):
        values = {"step": step, "loss": 1 / step, "mse": math.nan if step == 7 else 0.5, "note": "a", "flag": True, "big": step * 10**9}
        lines.append(json.dumps({**values, **({"inf": math.inf} if step % 2 else {}), "padding": "x" * 400}).encode() + b"\n")
        if step % 100 == 0:
            lines.append(json.dumps({"step": step, "validation/ema": 2.0 / step}).encode() + b"\n")
    lines.insert(1500, b'{"step": 1400, "event": "spike", "text": "a \\"loss\\": 3 of 7", "ranks": [1, 2]}\n')
    if damage:
        lines.insert(700, damage)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 3001, "lo')

    def columns() -> tuple[run_log.Log, dict[str, list[float]]]:
        found: dict[str, list[float]] = {}

        def take(part: Columns) -> None:
            for key, values in part.items():
                found.setdefault(key, []).extend(values)

        return read_log(tmp_path, take), found

    fast, numbers = columns()
    monkeypatch.setattr(run_log, "_LARGE", 1e12)
    slow, expected = columns()
    assert numbers.keys() == expected.keys() == {"step", "loss", "mse", "big", "inf", "validation/ema"}
    for key, values in expected.items():
        np.testing.assert_array_equal(numbers[key], values)
    assert np.isinf(numbers["mse"]).sum() == 1 and np.isnan(numbers["inf"]).sum() >= 1500
    assert fast == slow and fast.problems == (damage in (b"{broken\n", b'{"loss": 3}\n'))
    events = [r for r in fast.rows if "event" in r]
    assert [r["ranks"] for r in events] == [[1, 2]] and sum("validation/ema" in r for r in fast.rows) == 30
    assert [r["step"] for r in fast.rows if "loss" in r] == [1, 2996, 2997, 2998, 2999, 3000]


@pytest.mark.parametrize(("damage", "at_once"), [
    (b"", True), (b'{"step": 5, "loss": 1}\n', True), (b'{"step": 5, "loss": 0.25, "ms\n', True), (b'{"step": 5, "loss": 1, "mse": 2, "big": 3, "C1": 4\n', False),
    (b'{"step": 5, "loss": 1, "mse": 2, "big": 3, "C2": 4}\n', False), (b'{"step": 5, "loss": 1, "mse": 2, "C1": 3, "big": 4}\n', False),
    (b'{"step": 5, "loss": 1, "mse": null, "big": 3, "C1": 4}\n', False), (b'{"step": 5, "loss": 1, "mse":, "big": 3, "C1": 4}\n', False),
    (b'{"step": 5, "loss": 1, "mse": "x", "big": 3, "C1": 4}\n', False), (b'{"step": 5.5, "loss": 1, "mse": 2, "big": 3, "C1": 4}\n', False),
    (b'{"step": 5,\r "loss": 1, "mse": 2, "big": 3, "C1": 4}\n', False), (b'{"step": 5, "loss": 1, "mse": 2, "big": 3, "C1": 4} {}\n', False),
    (b'{"step": 5, "loss": 1, "mse": 2, "big": 3, "C1": 4} \n', False),
    (b'{"step": 5, "loss": 1, "mse": 1e999, "big": 1234567890123456789012, "C1": -Infinity}\n', True), (b'x "loss": 1\n' * 99, False),
])
def test_rows_with_the_same_keys_are_read_at_once(tmp_path: Path, damage: bytes, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as line by line, whatever a line in between is; of few lines that lack a key, all others still at once."""
    lines = []
    for step in range(1, 3001):
        values = {"step": step, "loss": 1 / step, "mse": math.nan if step % 7 == 0 else -1e-5 / step, "big": step * 10**9, "C1": 0.1 * step}
        if step % 100 == 0:
            del values["C1"]
        lines.append(json.dumps(values).encode() + b"\n")
    lines.insert(700, damage)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))

    def read() -> tuple[run_log.Log, dict[str, list[list[float]]]]:
        found: dict[str, list[list[float]]] = {}

        def take(part: Columns) -> None:
            for key, values in part.items():
                found.setdefault(key, []).extend(np.stack([part["step"], values], 1).tolist())

        return read_log(tmp_path, take), {key: sorted(pair for pair in pairs if not math.isnan(pair[1])) for key, pairs in found.items()}

    slow, expected = read()
    one_by_one = []
    real = run_log.parse_row
    monkeypatch.setattr(run_log, "_LARGE", 1e4)
    monkeypatch.setattr(run_log, "_table", lambda content: None)
    monkeypatch.setattr(run_log, "parse_row", lambda line: (one_by_one.append(line), real(line))[1])
    fast, numbers = read()
    assert numbers == expected and fast == slow
    assert (len(one_by_one) < 100) == at_once


def test_a_row_that_is_whole_without_its_line_break_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}')
    assert [r["step"] for r in read_log(tmp_path).rows] == [1, 2]


def test_a_log_is_read_on_where_it_was_read_before(tmp_path: Path) -> None:
    """Whatever happened to it in between, it is what a first look finds; and what was read already is not read again."""
    path = tmp_path / "metrics.jsonl"
    series, taken = Series(), list[float]()

    def take(columns: Columns) -> None:
        series.take(columns)
        taken.extend(columns.get("step", ()))

    reader = LogReader(tmp_path, take, series.clear)

    def rows(first: int, last: int, loss: float) -> str:
        return "".join(json.dumps({"step": s, "loss": loss / s, "padding": "x" * 99}) + "\n" for s in range(first, last + 1)) \
            + json.dumps({"step": last, "validation/ema": loss}) + "\n" + json.dumps({"step": last, "event": "spike", "text": "a"}) + "\n"

    def check(expected: list[int]) -> None:
        taken.clear()
        log, fresh = reader.read(), Series()
        assert log == read_log(tmp_path, fresh.take) and series.keys == fresh.keys and sorted({*taken}) == expected
        for key in fresh.keys:
            for ours, theirs in zip(vars(series.curve(key)).values(), vars(fresh.curve(key)).values(), strict=True):
                np.testing.assert_array_equal(ours, theirs)

    def add(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    check([])
    add(rows(1, 100, 1.0))
    check([*range(1, 101)])
    check([])
    add(rows(101, 700, 1.0) + '{"step": 701, "lo')
    check([*range(101, 701)])
    add('ss": 0.5}')  # whole, though its line is not ended
    check([701])
    add('\n{broken\n' + rows(702, 702, 1.0))
    check([702])
    whole = path.read_text()
    path.write_text(whole[: whole.index('{"step": 51,')])  # rolled back
    check([*range(1, 51)])
    add(rows(51, 900, 2.0))  # another way, and further than before
    check([*range(51, 901)])
    path.write_text(whole[: whole.index('{"step": 51,')] + rows(51, 950, 3.0))  # both between two looks
    check([*range(1, 951)])
    path.unlink()
    check([])
    add(whole)
    check([*range(1, 703)])


@pytest.mark.parametrize("every, rows", [(1, 100), (1, 600), (100, 20_000), (7, 3_001)])
def test_thinned_curves_keep_the_extremes(every: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    step = np.arange(1.0, rows + 1) * every
    values = rng.normal(size=rows)
    values[rows // 3] = 1e6
    values[rows // 2] = np.nan
    values[rows // 4] = np.inf
    series = Series()
    order = rng.permutation(rows)  # as after a roll-back, parts may come in any order
    for part in np.array_split(order, 5):
        series.take({"step": step[part], "loss": values[part]})
    c = series.curve("loss")
    assert c is not None and len(c.step) <= 2 * BINS and c.not_finite == 1 and series.last_step == step[-1]
    finite = np.isfinite(values)
    for b in np.unique(step[finite] // series.width):
        inside = finite & (step // series.width == b)
        (at,) = np.flatnonzero(c.step // series.width == b)
        assert (c.low[at], c.high[at]) == (values[inside].min(), values[inside].max())
        assert c.mean[at] == pytest.approx(values[inside].mean()) and c.step[at] == pytest.approx(step[inside].mean())
    if rows <= 2 * BINS:
        assert len(c.step) == rows - 2 and not c.thinned
    assert c.high.max() == 1e6


def test_what_is_no_step_is_left_out() -> None:
    series = Series()
    series.take({})
    series.take({"step": np.array([-1.0, np.inf, 3.0]), "loss": np.array([1.0, 2.0, 3.0])})
    c = series.curve("loss")
    assert c is not None and list(c.mean) == [3.0] and series.curve("mse") is None


def test_colours_of_bins_without_rows_are_those_before() -> None:
    series = Series()
    series.take({"step": np.array([2.0, 5.0, 8.0]), "a": np.array([1.0, np.nan, 3.0]), "b": np.array([4.0, 5.0, 6.0])})
    edges, means = series.means(["a", "b"])
    np.testing.assert_array_equal(edges, np.arange(2.0, 10.0))
    np.testing.assert_array_equal(means, [[1, 1, 1, np.nan, np.nan, np.nan, 3], [4, 4, 4, 5, 5, 5, 6]])


@pytest.mark.parametrize("low, high, log, expected", [
    (0, 100, False, [0, 20, 40, 60, 80, 100]), (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, False, [3]), (0.011, 0.3, True, [0.02, 0.05, 0.1, 0.2]),
    (1, 9, True, [1, 2, 5]), (1e-9, 1e9, True, [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
])
def test_ticks(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log=log) == pytest.approx(expected)


@pytest.mark.parametrize("value, said", [(0, "0"), (1234, "1.234k"), (2e6, "2M"), (1e-4, "1e-4"), (0.12345, "0.1235"), (math.inf, "not finite"), (-5e3, "-5k")])
def test_short(value: float, said: str) -> None:
    assert short(value) == said


def test_an_axis_of_changes_in_percent() -> None:
    """Near 0 and far from it, with room between its numbers."""
    curve = Curve(*(np.array(x, float) for x in ([1, 2, 3], [-4, -1, 0.1], [500, -0.5, 0.2], [600, 0, 0.3])), 0)
    made = line_chart("loss", [Line("a", curve)], 3, percent=True)
    shown = {label: float(y) for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', made)}
    assert {"0", "3", "-3", "30", "300"} <= shown.keys() and "0.1" not in shown
    at = sorted(shown.values())
    assert min(b - a for a, b in itertools.pairwise(at)) > 17 and "percent: a from 500 at step 1" in made
    small = Curve(*(np.array(x, float) for x in ([1, 2], [-0.02, 0], [-0.02, 0], [-0.02, 0])), 0)
    assert ">-0.01<" in line_chart("loss", [Line("a", small)], 3, percent=True)
    only = Curve(*(np.array(x, float) for x in ([0.02, 0.2], [1, 1], [1, 1], [1, 1])), 0)
    assert "from 1 at width 0.02 to 1 at width 0.2" in line_chart("FID", [Line("b", only)], 0.2, over="width")
