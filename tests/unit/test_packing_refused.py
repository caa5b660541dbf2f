"""What is refused before packing begins: by one line that says what to do, and nothing is left."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import coco, folder, imagenet, latents, listing, parquet, webdataset
from tests.unit.latent_folders import repa
from tests.unit.packed_pictures import picture
from tests.unit.source_files import SAMPLES, captions_file, pictures, rows, table, tar

PIXELS = ("--vae", "none", "--resolution", "16")
Case = tuple[Any, list[Any]]


def some(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(1))
    return root


def no_images(root: Path) -> Case:
    (root / "i").mkdir()
    return folder, ["--images", root / "i", *PIXELS]


def several_splits(root: Path) -> Case:
    return folder, ["--images", some(root / "i", "train/a.png", "test/b.png"), *PIXELS]


def no_text_encoder(root: Path) -> Case:
    file = captions_file(root / "x.json", [(1, "a.png")], [(1, 1, "b")])
    return coco, ["--images", some(root / "i", "a.png"), "--captions", file, *PIXELS]


def label_outside(root: Path) -> Case:
    labels = table(root / "x.csv", ("a.png", 0), ("b.png", -1))
    return imagenet, ["--images", some(root / "i", "a.png", "b.png"), "--labels", labels, *PIXELS]


def all_missing(root: Path) -> Case:
    labels = table(root / "x.csv", ("c.png", 0))
    return imagenet, ["--images", some(root / "i", "a.png"), "--labels", labels, "--skip-missing", *PIXELS]


def no_caption(root: Path) -> Case:
    file = captions_file(root / "x.json", [(1, "a.png")], [])
    return coco, ["--images", some(root / "i", "a.png"), "--captions", file, *PIXELS]


def id_twice(root: Path) -> Case:
    file = rows(root / "x.parquet", image=pictures(2), id=["a", "a"])
    return parquet, ["--files", file, "--id-column", "id", *PIXELS]


def odd_latents(root: Path) -> Case:
    repa(root / "l")
    (first, *_) = sorted((root / "l/vae-sd/00000").iterdir())
    np.save(first, np.zeros((4, 4), np.float32))
    return latents, ["--latents", root / "l"]


def captions_without_encoder(root: Path) -> Case:
    return webdataset, ["--shards", tar(root / "x.tar", ("a.png", picture(1)), ("a.txt", b"a")), "--text-encoder", "none", "--max-tokens", 0, *PIXELS]


CASES = [no_images, several_splits, no_text_encoder, label_outside, all_missing, no_caption, id_twice, odd_latents, captions_without_encoder]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left(case: Callable[[Path], Case], tmp_path: Path) -> None:
    """Neither OUT nor the folders above it, where they were made; a folder that was there stays."""
    program, args = case(tmp_path)
    for out in tmp_path / "new/out", tmp_path:
        before = sorted(tmp_path.rglob("*"))
        assert program.main([str(arg) for arg in [*args, "--out", out, *([] if program is latents else ["--device", "cpu"])]]) == 2
        assert sorted(tmp_path.rglob("*")) == before


def test_ranks_that_are_all_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever made the folder, and whichever is the last."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = (listing.Listings(tmp_path / "out/packing") for _ in range(2))
    for rank, of_rank in ("0", first), ("1", second):
        monkeypatch.setenv("RANK", rank)
        of_rank.get({"rank": rank}, (), lambda writer: listing.Found({}))
    first.discard()
    assert list((tmp_path / "out/packing").iterdir())
    second.discard()
    assert not (tmp_path / "out/packing").exists()


def a_file(root: Path) -> list[Case]:
    image = some(root, "a.png") / "a.png"
    return [(folder, ["--images", image]), (imagenet, ["--images", image]),
            (imagenet, ["--images", image, "--labels", table(root / "x.csv", ("b.png", 0))]),
            (coco, ["--images", image, "--captions", captions_file(root / "x.json", [(1, "b.png")], [(1, 1, "b")]), "--text-encoder", "none"])]


@pytest.mark.parametrize("number", range(4))
def test_a_file_where_a_folder_is_expected(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, args = a_file(tmp_path)[number]
    assert program.main([str(arg) for arg in [*args, "--out", tmp_path / "out", "--device", "cpu", *PIXELS]]) == 2
    assert f"error: {tmp_path}/a.png is a file; give the folder that holds the images\n" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty, or begins with an empty line; its first line must name file and label"),
    ("\nfile,label\n", "is empty, or begins with an empty line; its first line must name file and label"),
    ("file,label\n", "lists no images; give one line for each"),
])
def test_a_csv_without_images(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text(text)
    args = ["--images", some(tmp_path / "i", "a.png"), "--labels", tmp_path / "x.csv", "--out", tmp_path / "out", "--device", "cpu", *PIXELS]
    assert imagenet.main([str(arg) for arg in args]) == 2 and f"error: {tmp_path}/x.csv {message}\n" in capsys.readouterr().err


def test_other_lists_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = some(tmp_path / "i", "a.png"), ["--out", tmp_path / "out", "--device", "cpu", *PIXELS]
    args = ["--images", images, "--captions", captions_file(tmp_path / "x.json", [], []), "--text-encoder", "none", *out]
    assert coco.main([str(arg) for arg in args]) == 2
    assert f"error: {tmp_path}/x.json lists no images; give the captions file of those in {images}\n" in capsys.readouterr().err
    args = ["--shards", tar(tmp_path / "x/0.tar"), "--caption-key", "none", *out]
    assert webdataset.main([str(arg) for arg in args]) == 2
    assert "error: webdataset-x holds no images; give a source that does\n" in capsys.readouterr().err


def test_a_set_within_its_own_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its images.png would be one of the source at the next start. A list says itself what it is of."""
    images = some(tmp_path / "i", "a/a.png")
    for program in folder, imagenet:
        for out in images, images / "packed":
            assert program.main([str(arg) for arg in ["--images", images, "--out", out, "--device", "cpu", *PIXELS]]) == 2
            assert f"error: --out {out} lies in --images {images}, all of whose images are packed" in capsys.readouterr().err
    assert [path.name for path in sorted(images.rglob("*"))] == ["a", "a.png"]
    args = ["--images", images, "--labels", table(tmp_path / "x.csv", ("a/a.png", 0)), "--out", images / "packed", "--device", "cpu", *PIXELS]
    assert imagenet.main(list(map(str, args))) == 0 == imagenet.main(list(map(str, args)))


def test_out_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--images", some(tmp_path, "a.png"), "--out", tmp_path / "a.png/b/c", "--device", "cpu", *PIXELS]
    assert folder.main(list(map(str, args))) == 2
    assert f"error: --out {tmp_path}/a.png/b/c: {tmp_path}/a.png is a file; give another folder\n" in capsys.readouterr().err


def test_a_tar_that_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before packing begins, so that the whole file can take its place. Compressed ones have any length, and zeros end an archive."""
    path = tar(tmp_path / "x/0.tar", *SAMPLES)
    whole = path.read_bytes()
    args = ["--shards", path, "--text-encoder", "none", "--out", tmp_path / "out", "--device", "cpu", *PIXELS, "--min-side", 1]
    cut = len(whole.rstrip(b"\0")) // 2 // 512 * 512 + 300
    path.write_bytes(whole[:cut - 512] + b"x" * 512)
    assert webdataset.main(list(map(str, args))) == 2
    assert f"error: {path} is cut short: it ends after {cut:,} bytes, and not with the mark of an archive's end; restore or download it again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for good in whole[:-100], gzip.compress(whole), whole:
        path.write_bytes(good)
        assert webdataset.main([*map(str, args), "--id-prefix", str(len(good)), "--out", str(tmp_path / str(len(good)))]) == 0


def test_what_another_program_has_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What only one of them notes of its source is not listed, nor are hashes."""
    out = ["--out", tmp_path / "out", "--device", "cpu", *PIXELS, "--min-side", 1]
    assert folder.main([str(arg) for arg in ["--images", some(tmp_path / "i", "a.png"), *out]]) == 0
    file = rows(tmp_path / "x.parquet", image=pictures(2))
    assert parquet.main([str(arg) for arg in ["--files", file, *out, "--rows-per-shard", 7]]) == 2
    _, _, differ = capsys.readouterr().err.partition("What differs:\n")
    assert differ == "  source.program: data_prep.folder there, data_prep.parquet here\n  rows_per_shard: 4096 there, 7 here\n"
