"""Tar files as webdataset has them, here and at addresses: every bad input."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep import parquet, webdataset
from data_prep.images import Unusable
from largescale.errors import DataError
from tests.unit.source_files import SAMPLES, ids, items, picture, pictures, rows, tar


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
        with pytest.raises(DataError, match=r"cut\.tar (is cut short: |cannot be read to its end: ).*; restore"):
            items(webdataset.read([str(cut)]))
    cut.write_bytes(whole[:end + 512])                  # one block of the mark will do
    assert len(items(webdataset.read([str(cut)]))) == 2
    packed = gzip.compress(whole)
    (tmp_path / "whole.tar.gz").write_bytes(packed)
    assert ids(webdataset.read([str(tmp_path / "whole.tar.gz")])) == ["whole/1", "whole/d/2"]
    for length in range(0, len(packed) - 200, 7):
        (tmp_path / "whole.tar.gz").write_bytes(packed[:length])
        with pytest.raises(DataError, match="cannot be read to its end" if length else "is cut short"):
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
    with pytest.raises(DataError, match=rf"is a folder; name its tar files: '{tmp_path}/\*\.tar'"):
        webdataset.read([str(tmp_path)])
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
