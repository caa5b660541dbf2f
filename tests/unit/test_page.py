"""The page on a run: of made-up runs and of a real one."""

import html
import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from largescale import status
from tests.conftest import RunHere
from tests.unit import test_status as made_up
from tests.unit.pages import Reader, page
from tests.unit.test_status import begin, log, row

now = made_up.now
small_run = made_up.run


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
