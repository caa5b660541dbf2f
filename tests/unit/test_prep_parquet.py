"""Parquet files: real ones where they are at hand, and every bad input."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import parquet, parquet_files, sources
from data_prep.images import Unusable, decode
from largescale.errors import DataError
from tests.unit.source_files import ids, items, picture, pictures, rows, shared


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
    for files, message in ([tmp_path], "no \\*.parquet"), ([tmp_path / "1.parquet"], r"1\.parquet does not exist; restore it, or correct --files$"):
        with pytest.raises(DataError, match=message):
            parquet.ParquetSource(files)
    path = rows(tmp_path / "1.parquet", image=pictures(2), label=[0, 1], metadata={"huggingface": "[" * 100_000})
    with pytest.raises(DataError, match=r"1\.parquet: the names of classes in its schema cannot be read .*nested too deeply"):
        parquet.ParquetSource([path], label_column="label")
    path = rows(tmp_path / "1.parquet", image=pictures(0))
    with pytest.raises(DataError, match=r"there are no rows in .*1\.parquet; correct --files"):
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
