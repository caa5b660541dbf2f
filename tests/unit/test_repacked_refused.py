"""What is wrong with latents that others have packed, or with what is said about them, is an error that names it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import latents
from largescale.data.shards import ShardDataset
from tests.random_models import make_vae
from tests.unit.latent_folders import N, lightningdit, mds, on_disk, repa, run
from tests.unit.packed_pictures import one_thread  # noqa: F401


def gone_npy(folder: Path) -> None:
    repa(folder)
    next((folder / "vae-sd/00000").iterdir()).unlink()


def other_npy(folder: Path) -> None:
    repa(folder)
    np.save(sorted((folder / "vae-sd/00000").iterdir())[-1], np.zeros((8, 4, 16), np.float32))


def empty_npy(folder: Path) -> None:
    repa(folder)
    sorted((folder / "vae-sd/00000").iterdir())[-1].write_bytes(b"")


def npy_labels(labels: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        repa(folder)
        (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))

    return make


def index_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    mds(folder)
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def mds_outside(folder: Path) -> None:
    index_of(folder, lambda index: index["shards"][0]["raw_data"].update(basename="../x.mds"))


def mds_columns(folder: Path) -> None:
    index_of(folder, lambda index: index["shards"][1].update(column_names=["caption", "latents_256"]))


def mds_without_shards(folder: Path) -> None:
    index_of(folder, lambda index: index.update(shards=[]))


def mds_without_a_key(folder: Path) -> None:
    index_of(folder, lambda index: index["shards"][0].pop("raw_data"))


def mds_without_rows(folder: Path) -> None:
    index_of(folder, lambda index: [shard.update(samples=0) for shard in index["shards"]])


def mds_of_other_bytes(folder: Path) -> None:
    """The third latent lacks a value, which its neighbour's column has too many."""
    mds(folder)
    path = folder / "0/shard.00000.mds"
    content = bytearray(path.read_bytes())
    bounds = np.frombuffer(bytes(content[4:28]), np.uint32)
    sizes = np.frombuffer(bytes(content[bounds[2] : bounds[2] + 16]), np.uint32).copy()
    sizes[2:] += np.array([-2, 2], np.int32).astype(np.uint32)
    content[bounds[2] : bounds[2] + 16] = sizes.tobytes()
    path.write_bytes(content)


def one_label_missing(folder: Path) -> None:
    on_disk(folder, [None, *range(N - 1)])


def labels_of_text(folder: Path) -> None:
    on_disk(folder, list("abcdefghi"))


def negative_labels(folder: Path) -> None:
    on_disk(folder, [-1] * N)


def without_rows(folder: Path) -> None:
    on_disk(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": []}))


def not_json(folder: Path) -> None:
    folder.mkdir()
    (folder / "state.json").write_text("{")


def unequal_mirrors(folder: Path) -> None:
    lightningdit(folder)
    path = folder / "latents_rank00_shard001.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"latents_flip": tensors["latents_flip"][1:].clone()}, path)


def too_few_labels(folder: Path) -> None:
    lightningdit(folder)
    path = folder / "latents_rank00_shard001.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"labels": tensors["labels"][1:].clone()}, path)


def nothing(folder: Path) -> None:
    folder.mkdir()


def several_sets(folder: Path) -> None:
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def images_only(folder: Path) -> None:
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 6]]}))


def cut_npy(folder: Path) -> None:
    repa(folder)
    next((folder / "vae-sd" / "00000").iterdir()).write_bytes(b"\x93NUMPY")


def odd_shape(folder: Path) -> None:
    repa(folder)
    for path in (folder / "vae-sd" / "00000").iterdir():
        np.save(path, np.zeros((7, 8, 8), np.float32))


def cut_mds(folder: Path) -> None:
    mds(folder)
    path = folder / "1" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-5])


def compressed_mds(folder: Path) -> None:
    mds(folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["compression"] = "zstd"
    (folder / "index.json").write_text(json.dumps(index))


def cut_safetensors(folder: Path) -> None:
    lightningdit(folder)
    (folder / "latents_rank00_shard001.safetensors").write_bytes(b"123")


def too_large(folder: Path) -> None:
    lightningdit(folder, stats=False)
    save_file({"latents": torch.full((2, 32, 4, 4), 1e6), "labels": torch.zeros(2)}, folder / "latents_rank00_shard002.safetensors")


@pytest.mark.parametrize(("make", "more", "message"), [
    (nothing, (), "has neither dataset.json"),
    (several_sets, (), "holds several sets; give one of its folders train, test"),
    (images_only, (), "lists images, not latents"),
    (cut_npy, (), "npy cannot be read"),
    (odd_shape, (), "not mean and std of latents"),
    (cut_mds, (), "is cut short"),
    (compressed_mds, (), "only uncompressed MDS is read"),
    (mds, ("--column", "x"), "none of them x; name the one with the latents by --column"),
    (mds, ("--shape", 3, 8, 8), "256 values a row, which --shape"),
    (cut_safetensors, (), "shard001.safetensors cannot be read"),
    (too_large, (), "is not finite"),
    (lightningdit, ("--scale-factor", 0), r"--scale-factor 0.0 must lie in"),
    (repa, ("--rows-per-shard", 0), "rows-per-shard"),
    (gone_npy, (), "is missing, and .*dataset.json lists it; restore it"),
    (other_npy, (), r"has float32 \(8, 4, 16\), others have floats of \(8, 8, 8\)"),
    (empty_npy, (), r"npy cannot be read \(.*\); restore it"),
    (npy_labels([["../../x.npy", 1]]), (), r"names '\.\./\.\./x\.npy', which is no file of its folder"),
    (npy_labels([["/x.npy", 1]]), (), "which is no file of its folder"),
    (npy_labels([["00000/img-mean-std-00000000.npy", -1]]), (), r"labels from -1 to -1 are not in \[0"),
    (npy_labels([["00000/img-mean-std-00000000.npy", None]]), (), "dataset.json cannot be read"),
    (npy_labels([5]), (), "dataset.json cannot be read"),
    (npy_labels(None), (), "lists no labels, by which the latents are found"),
    (repa, ("--column", "x"), "--column is for MDS and datasets, and these are REPA's .npy folder; omit it"),
    (lightningdit, ("--kind", "moments"), "--kind is for MDS and datasets, and these are LightningDiT's"),
    (unequal_mirrors, (), r"has latents \(4, 32, 4, 4\), and \(3, 32, 4, 4\) of mirrored images"),
    (too_few_labels, (), r"has latents \(4, 32, 4, 4\) and labels \(3,\)"),
    (mds_outside, (), "names '../x.mds', which is no file of its folder"),
    (mds_columns, (), "has shards of the columns .*; give a folder of one set"),
    (mds_without_shards, (), "index.json cannot be read"),
    (mds_without_a_key, (), r"index.json cannot be read \('raw_data'\)"),
    (mds_without_rows, (), "holds no rows; give the folder of a whole set"),
    (mds_of_other_bytes, (), "row 000000002 of .* has 510 bytes of latents, others have 512; restore the file"),
    (one_label_missing, (), "the column label is int64 with 1 rows without a value, not whole numbers"),
    (labels_of_text, (), "the column label is string with 0 rows without a value, not whole numbers"),
    (negative_labels, (), "has the label -1; labels count from 0"),
    (without_rows, (), "holds no rows"),
    (not_json, (), "state.json cannot be read"),
    (repa, ("--engine", "ranks", "--address", "local"), "--address local is for --engine ray"),
    (repa, ("--workers", 0), "workers=0 must be at least 1"),
])
def test_what_is_wrong_is_said(tmp_path: Path, make: Callable[[Path], Any], more: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", *more) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said) and "Traceback" not in said, said
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_caption_that_is_not_utf_8_is_left_out(tmp_path: Path) -> None:
    _, captions = mds(tmp_path / "in")
    path = tmp_path / "in/0/shard.00000.mds"
    path.write_bytes(path.read_bytes().replace("é caption 0".encode(), b"\xff\xff caption 0", 1))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert ShardDataset(tmp_path / "out", verify=True).texts(np.arange(N - 1)) == [[caption] for caption in captions[1:]]
    assert json.loads((tmp_path / "out/skipped.jsonl").read_text()) == {"id": "000000000", "reason": "its caption is not UTF-8"}


def test_a_vae_of_one_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As RAE's: latents of another size could not be decoded, which is said before hours of work."""
    repa(tmp_path / "in")
    vae = make_vae(tmp_path / "vae")
    monkeypatch.setattr(latents, "load_vae", lambda *args: replace(vae, only_resolution=32))
    assert run(tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae") == 2
    assert "has latents of 16 x 16, those in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("stats", "message"), [
    ({"mean": torch.zeros(1, 16, 1, 1), "std": torch.ones(1, 16, 1, 1)}, "statistics of 16 channels, the latents have 32: they are another encoder's"),
    ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.full((1, 32, 1, 1), 0.2)}, "another encoder's: channel .* std 0.2 there"),
    ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.zeros(1, 32, 1, 1)}, "another encoder's"),
    ({"other": torch.zeros(1)}, "latents_stats.pt cannot be read"),
])
def test_statistics_of_another_encoder(tmp_path: Path, stats: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    lightningdit(tmp_path / "in")
    torch.save(stats, tmp_path / "in" / "latents_stats.pt")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_vae_of_other_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightningdit(tmp_path / "in")
    make_vae(tmp_path / "vae")
    assert run(tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae") == 2
    assert "has latents of 4 channels, those in" in " ".join(capsys.readouterr().err.split())
