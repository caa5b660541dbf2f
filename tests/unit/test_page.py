"""The page on a run: of made-up runs, of a real one, served, and in a browser."""

import contextlib
import html
import http.client
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from largescale import status
from largescale.errors import ConfigError
from largescale.monitoring import run_log
from largescale.monitoring.run_log import Columns, LogReader, read_log
from largescale.page import document
from largescale.page.charts import Line, line_chart, short, ticks
from largescale.page.sections import RunView
from largescale.page.series import BINS, Curve, Series
from largescale.page.server import Server
from tests.conftest import RunHere
from tests.unit import test_status as made_up
from tests.unit.test_requeue import NO_TORCH, ROOT
from tests.unit.test_status import begin, log, row

now = made_up.now
small_run = made_up.run
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as by: apt-get install chromium")


class Reader(HTMLParser):
    """What a page consists of: balanced, or it raises."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self._open}:
            self.text.append(data)


def page(tmp_path: Path, *runs: Path, code: int = 0) -> str:
    path = tmp_path / "pages/page.html"
    assert status.main([*map(str, runs), "--html", str(path)]) == code
    return path.read_text()


def long_run(run: Path, rows: int, every: int) -> None:
    """As of a run of two million steps, with all that a row has, rare rows, and a line that is being written."""
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step, noise in zip(range(every, (rows + 1) * every, every), rng.random(rows), strict=True):
            clusters = {f"cluster/C{i}": noise / i for i in range(1, 21)}
            file.write(json.dumps({**row(4, noise), "step": step, "mse": noise, "vb": noise / 9, "mfu": 0.4, "memory_gib": 61.0, **clusters,
                                   "optimizer/lr": 1e-4, "optimizer/grad_norm": noise, "optimizer/loss_scale": 65536.0,
                                   "time/forward_ms": noise, "time/data_wait_share": noise, "time/overhead_share": noise}) + "\n")
            if step % (50 * every) == 0:
                file.write(json.dumps({"step": step, "validation/ema": noise, "validation/raw": noise, "validation/ema_8_levels": noise,
                                       **{f"validation/ema_C{i}": noise / i for i in range(1, 21)}}) + "\n")
        file.write('{"step": 99, "loss": 0.1, "ms')


# ---- reading


def brute(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]


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


# ---- the page


def test_everything_of_a_run(small_run: Path, tmp_path: Path) -> None:
    for name, settings in ((1, {"optimizer": {"lr": 1e-4}}), (2, {"optimizer": {"lr": 1e-4}}), (3, {"optimizer": {"lr": 5e-5}})):
        path = small_run / f"starts/start_{name:05d}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "settings": settings}))
    log(small_run, *({"step": s, "validation/ema": 0.3, "validation/raw": 0.4, "validation/ema_C1": 0.5, "reference/loss": 0.2} for s in (10, 40)))
    log(small_run, row(46, 0.4, **{"cluster/C1": 0.1, "cluster/C2": 0.2, "optimizer/lr": 1e-4, "optimizer/grad_norm": math.nan, "mfu": 0.4}))
    log(small_run, {"step": 46, "event": "spike", "text": "a leap"})
    (small_run / "config.yaml").write_text("train:\n  # how long\n  steps: 400\n")
    (small_run / "samples").mkdir()
    Image.fromarray(np.zeros((64, 640, 3), np.uint8)).save(small_run / "samples/step_00000020.png")
    (small_run / "samples/step_00000040.png").write_bytes(b"\x89PNG cut")
    text = " ".join(Reader(page(tmp_path, small_run)).text)
    for said in ("step 47 of 400 (11.8 %)", "3 (before the last: 1 killed, 1 stopped or preempted)", "training loss", "noise levels that were trained on",
                 "training loss per cluster", "validation per cluster, EMA", "loss on held-out and on training images", "validation, raw weights",
                 "learning rate", "images per second", "MFU", "goodput 62.0% of 7 min", "7/1", "valid", "a leap", "step 20", "cannot be read",
                 "optimizer.lr: 0.0001 -> 5e-05", "# how long", "index 5, stage 1 of 5", "[0.8, 1)"):
        assert said in text, said


def test_it_needs_nothing_from_elsewhere(small_run: Path, tmp_path: Path) -> None:
    read = Reader(page(tmp_path, small_run))
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        for name in ("src", "href"):
            assert re.match(r"data:|#|$", attributes.get(name) or ""), (tag, attributes)
    content = next(a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert content and content.startswith("default-src 'none'") and "url(" not in page(tmp_path, small_run)


def test_it_can_be_read_without_eyes_or_mouse(small_run: Path, tmp_path: Path) -> None:
    log(small_run, row(46, **{"cluster/C1": 0.1}))
    read = Reader(page(tmp_path, small_run))
    for tag, attributes in read.tags:
        if tag == "svg" and "x" not in attributes:
            assert attributes.get("aria-hidden") or (attributes["role"] == "img" and attributes["aria-label"])
        if tag == "img":
            assert "alt" in attributes
        if "scroll" in (attributes.get("class") or ""):
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    figures = sum(tag == "figure" for tag, _ in read.tags)
    assert figures >= 5 and sum(tag == "figcaption" for tag, _ in read.tags) == figures <= sum(tag == "summary" for tag, _ in read.tags)


EVIL = "</style><script>alert(1)</script>\"'&\x1b[31m\ud83d"


def test_what_files_say_is_text(small_run: Path, tmp_path: Path) -> None:
    log(small_run, {"step": 46, "event": "spike", "text": EVIL}, row(46, **{"cluster/C<b>": 1.0, "time/<b>_ms": 1.0}), {"step": 46, "event": EVIL})
    begin(small_run, 3, time.time() - 100, time.time() - 5, 40, 47, ended=EVIL, job=EVIL, settings={EVIL: {"<i>": EVIL}})
    path = small_run / "checkpoints/step_00000040/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["reason"] = EVIL
    manifest["state"]["config"]["name"] = EVIL
    manifest["state"]["skips"] = [{"at": 1, "count": 2, "why": EVIL}]
    path.write_text(json.dumps(manifest))
    (small_run / "config.yaml").write_text("<script>alert(1)</script>")
    other = tmp_path / "a <b>"
    shutil.copytree(small_run, other)
    for runs in ((small_run,), (small_run, other)):
        made = page(tmp_path, *runs)
        assert "<script" not in made and "<b>" not in made and "\x1b" not in made and html.escape("</style><script>alert(1)") in made
        Reader(made)


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"step": 3}\n', '{"step": 3, "loss": NaN}\n', '{"step": 3, "loss": -Infinity}\n', '{"step": 0, "loss": 0.0}\n',
                                     '{"step": -3, "loss": 1}\n', '{"step": 1e3, "loss": 1}\n', '{"step": 3, "loss": 1e308}\n{"step": 4, "loss": -1e308}\n',
                                     '{"step": 123456789012345678901234567890, "loss": 1}\n', '{"step": 3, "loss": {}, "cluster/C1": []}\n',
                                     '{"step": 3, "event": "spike", "text": 5}\n{"step": 3, "event": []}\n', '{"step": 3, "event": "transition", "index": "x", "lowest": 0}\n',
                                     '{"step": 3, "loss": 1, "curriculum/index": 1.5, "curriculum/lowest": NaN}\n', '{"step": 3, "loss": 1, "images_per_s": {}}\n',
                                     '{"step": 3, "event": "transition", "index": 2, "lowest": 7, "highest": "a"}\n',
                                     '{"step": 3, "loss": 1, "cluster/C1": 1e-300, "cluster/C99999999999999999999": 1e300}\n', '{"step": 3, "reference/C1": 0.0}\n'])
def test_logs_that_hold_little_or_too_much(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    begin(run, 1, time.time() - 100, time.time() - 5, 0, 3)
    (run / "metrics.jsonl").write_text(content)
    record = json.loads((run / "starts/start_00001.json").read_text())
    (run / "starts/start_00002.json").write_text(json.dumps(record | {"number": 2, "ended": False, "job": {}}))
    made = page(tmp_path, run)
    assert status.main([str(run)]) == 0
    Reader(made)
    assert not re.search(r'(?:[dxy]|width|height)="[^"]*(?:nan|inf)', made)


def test_a_run_of_which_nothing_is_left_but_checkpoints(small_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(small_run / "starts")
    (small_run / "metrics.jsonl").unlink()
    assert "index 5, stage 1 of 5" in page(tmp_path, small_run)
    (small_run / "checkpoints/step_00000040/mp_rank_00_model_states.pt").unlink()
    assert "DAMAGED" in page(tmp_path, small_run, code=1)


def test_two_million_steps_are_under_two_megabytes(small_run: Path, tmp_path: Path) -> None:
    long_run(small_run, 20_000, 100)
    (small_run / "samples").mkdir()
    rng = np.random.default_rng(0)
    for i in range(1, 15):
        Image.fromarray(rng.integers(0, 256, (256, 640, 3), np.uint8)).save(small_run / f"samples/step_{50_000 * i:08d}.png")
    made = page(tmp_path, small_run)
    assert len(made) < 1e6 and "A point of a curve stands for 4,096 steps" in made  # two of three runs on one page fit too
    assert made.count("<li><img") == 12 and "step 50,000" in made and "step 700,000" in made


def test_several_runs_side_by_side(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "elsewhere/run"
    shutil.copytree(small_run, other)
    third = tmp_path / "third"
    begin(third, 1, time.time() - 100, time.time() - 5, 0, 3, settings={"train": {"steps": 7}})
    runs = (small_run, other, third)
    text = " ".join(Reader(page(tmp_path, *runs)).text)
    for said in (f"{small_run}, {other}, third", "Side by side", "Compared", "Settings that differ", "train.steps", "curriculum index"):
        assert said in text, said
    capsys.readouterr()
    assert status.main([*map(str, runs), "--json"]) == 0
    assert [f["step"] for f in json.loads(capsys.readouterr().out)] == [47, 47, 3]
    assert status.main([*map(str, runs)]) == 0
    assert sum(": step" in line for line in capsys.readouterr().out.splitlines()) == 3
    assert status.main([str(small_run), str(tmp_path / "nowhere"), "--html", str(tmp_path / "x.html")]) == 2
    assert not (tmp_path / "x.html").exists()


def test_a_real_run_that_was_changed(run_here: RunHere, tmp_path: Path) -> None:
    options = ("--telemetry.log-every", 1, "--curriculum.patience", 1, "--telemetry.reference-every", 5, "--telemetry.preview-every", 6,
               "--telemetry.preview-steps", 2, "--telemetry.preview-images", 4)
    run = run_here("--train.steps", 6, *options).run
    run_here("--train.steps", 12, "--optimizer.lr", 5e-4, *options)
    text = " ".join(Reader(page(tmp_path, run)).text)
    for said in ("step 12 of 12", "finished", "optimizer.lr: ", " -> 0.0005", "train.steps: 6 -> 12", "step 6", "C5", "2 (before the last: 1 finished)"):
        assert said in text, said


def test_words_or_a_page(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(small_run), "--json", "--html", str(tmp_path / "x.html")]) == 2
    assert "ask for one of them at a time" in capsys.readouterr().err and not (tmp_path / "x.html").exists()
    for path in (tmp_path, small_run / "metrics.jsonl"):
        before = sorted(tmp_path.rglob("*")), (small_run / "metrics.jsonl").read_text()
        assert status.main([str(small_run), "--html", str(path)]) == 2
        assert f"--html {path} is there and is no page" in capsys.readouterr().err
        assert before == (sorted(tmp_path.rglob("*")), (small_run / "metrics.jsonl").read_text())
    assert status.main([str(small_run), "--html", str(small_run / "metrics.jsonl/page.html")]) == 2
    assert "metrics.jsonl/page.html cannot be written: " in capsys.readouterr().err
    for port in ("-1", "70000"):
        assert status.main([str(small_run), "--follow", "--port", port]) == 2
        assert f"port={port} cannot be served on" in capsys.readouterr().err


# ---- served


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(make: Any, fresh_s: float = 0.0) -> Server:
        server = Server(make, 0, fresh_s)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: Server, path: str = "/", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_run_that_changes_while_it_is_served(small_run: Path, tmp_path: Path, serve: Any) -> None:
    watched = status.Watched((small_run,))
    server = serve(lambda: status.followed(watched))
    code, made = get(server)
    assert code == 200 and "step 47 of 400" in made and "connect-src 'self'" in made and made.count("<script") == 1
    with (small_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(50)) + '\n{"step": 51, "lo')
    assert "step 50 of 400" in get(server)[1]
    moved = small_run.rename(tmp_path / "moved")
    code, said = get(server)
    assert code == 503 and "does not exist" in said and 'http-equiv="refresh"' in said
    moved.rename(small_run)
    assert get(server)[0] == 200


def test_a_run_that_is_removed_while_it_is_read(small_run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = status.Watched((small_run,))
    server = serve(lambda: status.followed(watched))
    read = status.facts

    def removing(*args: Any) -> Any:
        found = read(*args)
        shutil.rmtree(small_run)
        return found

    monkeypatch.setattr(status, "facts", removing)
    assert get(server)[0] == 200
    assert get(server)[0] == 503


def test_only_this_machine_and_only_the_page(serve: Any) -> None:
    made = []
    server = serve(lambda: made.append(1) or "page", fresh_s=60.0)
    assert get(server) == (200, "page") and get(server, "/?x", "localhost:1") == (200, "page") and made == [1]
    assert get(server, host="127.0.0.1")[0] == 200  # port 80, which a browser leaves out
    assert get(server, "/metrics.jsonl")[0] == 404 and get(server, host="evil.example:80")[0] == 403
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=f"port={server.server_port} cannot be served on: .*; give another --port"):
        Server(lambda: "", server.server_port, 0.0)


def test_follow_until_it_is_interrupted(small_run: Path) -> None:
    code = NO_TORCH + "from largescale import status; sys.exit(status.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(small_run), "--follow", "--port", "0"]  # and so without torch
    # Where the tests run in the background, Ctrl-C is ignored, which a process inherits.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **heard))
        stack.callback(process.kill)
        assert process.stdout
        address = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", process.stdout.readline())
        assert address
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert status.main([str(small_run / "none"), "--follow"]) == 2


# ---- in a browser


def browse(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'chromium'}",
               "--virtual-time-budget=2000", "--enable-logging=stderr", *args]
    return subprocess.run(command, text=True, capture_output=True, timeout=120, check=True)


@NEEDS_BROWSER
def test_in_light_and_dark(small_run: Path, tmp_path: Path) -> None:
    page(tmp_path, small_run)
    mean = []
    for scheme in (0, 1):
        picture = tmp_path / f"{scheme}.png"
        done = browse(tmp_path, "--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
                      f"file://{tmp_path}/pages/page.html")
        assert "CONSOLE" not in done.stderr  # what the policy refuses, and other errors of the page
        with Image.open(picture) as image:
            mean.append(np.asarray(image.convert("L")).mean())
    assert mean[0] < 60 and mean[1] > 200


@NEEDS_BROWSER
def test_a_served_page_takes_its_own_place(small_run: Path, tmp_path: Path, serve: Any) -> None:
    made = []

    def make() -> str:
        made.append(1)
        found = Series()
        view = RunView("run", status.facts(small_run, False, LogReader(small_run, found.take)), found)
        return document.page([view], 1e9 + 86400 * len(made), 0.2)

    done = browse(tmp_path, "--dump-dom", serve(make).address)
    shown = re.search("made 2001-09-([0-9]+)", done.stdout)
    assert shown and int(shown[1]) > 10 and len(made) > 2  # the first one is of the 10th at most
    assert "No newer page" not in done.stdout.split("<script")[0] and "CONSOLE" not in done.stderr


@NEEDS_BROWSER
def test_on_a_phone(small_run: Path, tmp_path: Path) -> None:
    """Nothing but what scrolls by itself is wider than 390 pixels, and keys reach what is folded."""
    log(small_run, {"step": 46, "event": "spike", "text": "x" * 300})
    made = re.sub("<meta http-equiv[^>]*>", "", page(tmp_path, small_run, small_run))
    measure = "d=document.querySelector('iframe').contentDocument;s=[...d.querySelectorAll('summary,section>.scroll')];s.forEach(e=>e.focus());" \
              "document.title=[d.documentElement.scrollWidth,s.length>9&&s.at(-1)===d.activeElement].join()"
    (tmp_path / "phone.html").write_text(f'<iframe width=390 height=800 style="border:0" srcdoc="{html.escape(made)}"></iframe>'
                                         f"<script>onload=()=>{{{measure}}}</script>")
    done = browse(tmp_path, "--dump-dom", f"file://{tmp_path}/phone.html")
    assert re.findall("<title>(.*?)</title>", done.stdout)[-1] == "390,true", done.stdout[-2000:]
