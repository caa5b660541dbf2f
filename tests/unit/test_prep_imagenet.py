"""ImageNet's folders of classes, and lists of labels: real ones where they are at hand, and every bad input."""

import csv
import os
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep import folder, imagenet, webdataset
from data_prep.images import decode
from largescale.errors import DataError
from tests.unit.source_files import ids, items, shared, table, tar, write


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
