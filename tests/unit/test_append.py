"""A packed set grows: new shards behind the old ones, which stay as they are to the byte, whenever it is killed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import encoding, folder, imagenet, parquet, webdataset
from data_prep.append import ALREADY
from largescale.data.format import fingerprint
from largescale.data.shards import ShardDataset
from largescale.errors import Stopped
from tests.unit.packed_pictures import files, picture
from tests.unit.source_files import tar


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the numbers 0 to 12, and in more/ of 10 to 24 and one that cannot be used."""
    root = tmp_path_factory.mktemp("images")
    for name, numbers in ("first", range(13)), ("more", range(10, 25)):
        (root / name).mkdir()
        for i in numbers:
            (root / name / f"{i:03d}.png").write_bytes(picture(i))
    (root / "more/011b.png").write_bytes(b"no image")
    return root


def pack(source: Path, out: Path, *more: Any, program: Any = folder) -> int:
    where = {webdataset: "--shards", parquet: "--files"}.get(program, "--images")
    args = [where, source, "--out", out, "--vae", "none", "--resolution", 16, "--rows-per-shard", 5, "--device", "cpu", "--workers", 1]
    return int(program.main([str(arg) for arg in [*args, *more]]))


@pytest.fixture(scope="module")
def base(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    assert pack(images / "first", out) == 0
    return out


@pytest.fixture(scope="module")
def truth(images: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(base, tmp_path_factory.mktemp("truth") / "out")
    assert pack(images / "more", out, "--append") == 0
    return out


def test_what_a_set_that_has_grown_holds(images: Path, base: Path, truth: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, before = ShardDataset(truth, verify=True), ShardDataset(base)
    old, new = files(base), files(truth)
    assert sorted(new.keys() - old.keys()) == ["content_a1.hashes", *(f"shard_a1_{i:05d}.arrow" for i in range(4))]
    assert {name for name in old if old[name] != new[name]} == {"manifest.json", "skipped.jsonl", "README.md", "images.png"}
    assert [id for _, id in data.ids()] == [f"{i:03d}.png" for i in range(25)] and len(before) == 13
    assert data.info == before.info and data.fingerprint != before.fingerprint
    manifest = data.manifest
    assert fingerprint(data.info, manifest["shards"][:3], None) == before.fingerprint
    (entry,) = manifest["additions"]
    assert (entry["rows_before"], entry["rows"], entry["shards_before"], entry["fingerprint_before"]) == (13, 12, 3, before.fingerprint)
    assert entry["skipped"]["reasons"][ALREADY] == 3 and manifest["skipped"]["count"] == 4
    skipped = [json.loads(line) for line in (truth / "skipped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"] == ALREADY) for line in skipped] == [("010.png", True), ("011.png", True), ("011b.png", False), ("012.png", True)]
    # Again it does nothing, by either command.
    before_again = files(truth)
    capsys.readouterr()
    assert pack(images / "more", truth, "--append") == 0 and "25 images" in (said := capsys.readouterr().out) and "already packed" in said
    assert pack(images / "first", truth) == 0 and files(truth) == before_again
    # A second addition, and one of nothing new.
    (tmp_path / "third").mkdir()
    (tmp_path / "third/x.png").write_bytes(picture(99))
    out = shutil.copytree(truth, tmp_path / "out")
    assert pack(tmp_path / "third", out, "--append") == 0
    shutil.copy(images / "more/020.png", tmp_path / "third/x.png")
    assert pack(tmp_path / "third", out, "--append") == 0
    grown = ShardDataset(out, verify=True)
    assert [id for _, id in grown.ids()][24:] == ["024.png", "x.png"]
    assert [entry["rows"] for entry in grown.manifest["additions"]] == [12, 1, 0]
    assert [entry["rows_before"] for entry in grown.manifest["additions"]] == [13, 25, 26]


def test_ranks_and_kills_do_not_matter(images: Path, base: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the n-th renaming of a file, the set is what it was; then two ranks finish it."""
    rename, calls, at, stops = os.replace, 0, 1, 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stopped
        rename(*args)

    # The hashes of the ids, a shard, its record, ... the list, the hashes, the manifest, the card's picture and the card.
    for at in 1, 2, 9, 10, 11, 12, 14, 15:
        out = shutil.copytree(base, tmp_path / str(at))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            patch.setattr(Path, "replace", lambda path, target: counted(path, target))
            calls = 0
            status = pack(images / "more", out, "--append")
        if status == 0:
            break
        stops += 1
        assert at < 15
        usable = ShardDataset(out, verify=True)
        assert status == 75 and len(usable) == (13 if at < 13 else 25)
        assert at >= 13 or usable.fingerprint == ShardDataset(base).fingerprint
        if at < 13:                                     # the set's own command ends nothing
            assert pack(images / "first", out) == 0 and (out / "packing/job.json").exists() == (at > 1)
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            for rank in "1", "0":
                patch.setenv("RANK", rank)
                assert pack(images / "more", out, "--append") == 0
        assert files(out) == files(truth)
    assert stops == 7


@pytest.mark.parametrize("more, message", [
    (("--resolution", 8), r"info.shape: \[3, 16, 16\] there, \[3, 8, 8\] here"),
    (("--min-side", 3), "min_side: 4 there, 3 here"),
    (("--max-pixels", 1000), "max_pixels: 178956970 there, 1000 here"),
])
def test_an_addition_of_another_kind(images: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     more: tuple[Any, ...], message: str) -> None:
    before = files(base)
    assert pack(images / "more", base, "--append", *more) == 2
    said = capsys.readouterr().err
    assert "was packed otherwise, and all rows of a set must be alike. What differs:" in said
    assert all(part in said for part in message.replace("\\", "").split("|")) and files(base) == before


def test_another_encoder_or_caption_limit(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from largescale.encoders.text import TextEncoder

    def load(spec: str, device: Any, dtype: Any, limit: int | None) -> TextEncoder:
        def encode(captions: list[str]) -> tuple[torch.Tensor, ...]:
            return torch.zeros(len(captions), 2, 2), torch.zeros(len(captions), 3), torch.tensor([2] * len(captions))

        return TextEncoder(spec, limit, 2, 3, encode, lambda captions, n: [2] * len(captions))  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "load_text_encoder", load)
    paths = []
    for number in range(2):
        samples = [(f"{i}.{kind}", picture(10 * number + i) if kind == "png" else b"x") for i in range(3) for kind in ("png", "txt")]
        paths.append(tar(tmp_path / f"{number}.tar", *samples))
    out = tmp_path / "out"
    assert pack(paths[0], out, "--text-encoder", "a", "--max-tokens", 4, program=webdataset) == 0
    for more, message in {("--text-encoder", "b", "--max-tokens", 4): "info.encoders.text: a there, b here",
                          ("--text-encoder", "a", "--max-tokens", 3): "info.captions.tokens: 4 there, 3 here",
                          ("--text-encoder", "none"): "info.encoders.text: a there, None here"}.items():
        assert pack(paths[1], out, "--append", *more, program=webdataset) == 2
        assert message in capsys.readouterr().err
    assert pack(images / "more", out, "--append") == 2 and "captions: True there, False here" in capsys.readouterr().err
    assert pack(paths[1], out, "--append", "--text-encoder", "a", "--max-tokens", 4, program=webdataset) == 0
    data = ShardDataset(out, verify=True)
    assert len(data) == 6 and data.manifest["captions"] == 6 and data.texts(np.arange(6)) == [["x"]] * 6


def test_labels_that_stand_for_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root, names in ("i", "ab"), ("j", "bc"), ("k", "b"):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / f"{root}.png").write_bytes(picture(ord(name) + ord(root)))
    out = tmp_path / "out"
    assert pack(tmp_path / "i", out, program=imagenet) == 0
    assert pack(tmp_path / "j", out, "--append", program=imagenet) == 2
    assert "class 0 is a in" in (said := capsys.readouterr().err) and "and b in the source; name the set's classes" in said
    assert pack(tmp_path / "k", out, "--append", program=imagenet) == 2 and "info.num_classes: 2 there, 1 here" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("a\nb")
    assert pack(tmp_path / "k", out, "--append", "--classes", tmp_path / "classes.txt", program=imagenet) == 0
    assert ShardDataset(out, verify=True).gather(np.arange(3))["label"].tolist() == [0, 1, 1]


def test_sets_that_cannot_grow_or_have_no_hashes(images: Path, base: Path, tmp_path: Path, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Found before the source is listed, which takes long: this one is not there either.
    assert pack(images / "gone", tmp_path / "none", "--append") == 2 and not (tmp_path / "none").exists()
    assert f"{tmp_path / 'none'} does not exist" in capsys.readouterr().err
    assert pack(images / "more", blobs, "--append") == 2 and "was not packed by a program that prepares images" in capsys.readouterr().err
    # Of an older version: pixels are hashed now, and two additions at once are one too many.
    out = shutil.copytree(base, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["content_hashes"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "packing").mkdir()
    (out / "packing/job.json").write_text(json.dumps(manifest["job"] | {"append": {"to": "x", "number": 1}}))
    assert pack(images / "more", out, "--append") == 2 and "another addition that is not done" in capsys.readouterr().err
    shutil.rmtree(out / "packing")
    assert pack(images / "more", out, "--append") == 0 and len(ShardDataset(out)) == 25
