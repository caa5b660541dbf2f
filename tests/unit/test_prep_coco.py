"""COCO's images and captions, and Karpathy's file of them: real ones where they are at hand, and every bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import coco
from data_prep.images import decode
from largescale.errors import DataError
from tests.unit.source_files import GOOD, captions_file, ids, items, shared, write


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
    ({"images": [], "captions": []}, "x.json lists no images; give the captions file"),
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
    for text, message in {"{": "is not JSON", "[" * 200_000: "is not JSON .it is nested too deeply", "[1]": "is not COCO captions .it is no object in braces", "{}": "is not COCO captions .annotations is missing."}.items():
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
