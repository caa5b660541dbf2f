"""A source that changed between two starts: the error names a file, or says what changed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep import folder, imagenet, packer, parquet, source_files, webdataset
from largescale.data.shards import ShardDataset
from tests.unit.packed_pictures import interrupted, picture
from tests.unit.source_files import pictures, rows, table, tar

REMEDY = ": the source changed while it was packed; put it back as it was and run again, or delete --out and pack it anew"


def begin(program: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *args: Any) -> list[str]:
    """Packs all but the manifest; returns the command."""
    command = [str(arg) for arg in [*args, "--out", out, "--vae", "none", "--resolution", 16, "--device", "cpu", "--workers", 1]]
    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "finish", interrupted)
        assert program.main(command) == 75
    return command


def said(program: Any, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert program.main(command) == 2
    return capsys.readouterr().err


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "i").mkdir()
    for i in range(4):
        (tmp_path / f"i/{i}.png").write_bytes(picture(i))
    return tmp_path / "i"


def test_images_of_a_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = begin(folder, out, monkeypatch, "--images", images)
    content = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(content + b"more")
    assert f"{images}/1.png has {len(content) + 4:,} bytes, and had {len(content):,} when packing began{REMEDY}" in said(folder, command, capsys)
    (images / "1.png").unlink()
    listed = list((out / "packing").glob("listing_*.rows"))
    before = listed[0].read_bytes()
    assert f"image 2 is 2.png, and was 1.png when packing began (3 images, and 4 then){REMEDY}" in said(folder, command, capsys)
    (images / "1.png").write_bytes(content)
    (images / "new.png").write_bytes(content)
    assert f"image 5 is new.png, and there was none when packing began (5 images, and 4 then){REMEDY}" in said(folder, command, capsys)
    # A process that still packs reads the list that was there.
    assert list((out / "packing").glob("listing_*.rows")) == listed and listed[0].read_bytes() == before
    # Another folder is another source; this one, moved, is the same.
    (images / "new.png").unlink()
    shutil.copytree(images, tmp_path / "j")
    (tmp_path / "j/9.png").write_bytes(content)
    assert "another data set, or a part of one" in said(folder, [arg.replace(str(images), str(tmp_path / "j")) for arg in command], capsys)
    images.rename(tmp_path / "k")
    assert folder.main([arg.replace(str(images), str(tmp_path / "k")) for arg in command]) == 0


def test_a_list_of_files(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    labels = table(tmp_path / "x.csv", *((f"{i}.png", i % 2) for i in range(4)))
    command = begin(imagenet, tmp_path / "out", monkeypatch, "--images", images, "--labels", labels)
    table(labels, *((f"{i}.png", i % 2) for i in range(3)))
    assert f"{images}/3.png was in it when packing began, and is not now{REMEDY}" in said(imagenet, command, capsys)
    table(labels, *((f"{i}.png", (i + 1) % 2) for i in range(4)))
    assert "What differs:\n  source.labels_sha256: not the same\n  source.fingerprint: not the same\n" in said(imagenet, command, capsys)


def test_labels_of_folders(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        shutil.copytree(images, tmp_path / "classes" / name)
    command = begin(imagenet, tmp_path / "out", monkeypatch, "--images", tmp_path / "classes")
    shutil.rmtree(tmp_path / "classes/c")
    assert f"there is no image 9, which was c/0.png when packing began (8 images, and 12 then){REMEDY}" in said(imagenet, command, capsys)


def test_tables_and_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").mkdir()
    table = rows(tmp_path / "t/1.parquet", image=pictures(3))
    command = begin(parquet, tmp_path / "p", monkeypatch, "--files", tmp_path / "t")
    before = table.stat().st_size
    rows(table, image=pictures(2))
    assert f"{table} has {table.stat().st_size:,} bytes, and had {before:,} when packing began{REMEDY}" in said(parquet, command, capsys)
    for i in range(2):
        tar(tmp_path / f"s/{i}.tar", (f"{i}.png", picture(i)))
    command = begin(webdataset, tmp_path / "w", monkeypatch, "--shards", tmp_path / "s/*.tar", "--caption-key", "none")
    (tmp_path / "s/1.tar").unlink()
    assert f"{tmp_path}/s/1.tar is gone{REMEDY}" in said(webdataset, command, capsys)
    # What an older version has begun says no more than before.
    (tmp_path / "w/packing/files.json").unlink()
    assert "source.shard_files: 2 there, 1 here" in said(webdataset, command, capsys)
    assert json.loads((tmp_path / "p/packing/files.json").read_text()) == [[str(table), before, ""]]


def test_an_archive_that_was_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With as many bytes, and by a copy that has the old time; the set of an older version, which did not look, goes on."""
    shards = [tar(tmp_path / f"s/{i}.tar", (f"{i}.png", picture(i)), ("big.bin", bytes(300_000))) for i in range(2)]
    command = begin(webdataset, tmp_path / "w", monkeypatch, "--shards", tmp_path / "s/*.tar", "--caption-key", "none")
    before, times = shards[1].read_bytes(), (shards[1].stat().st_atime, shards[1].stat().st_mtime)
    other = bytearray(before)
    other[:before.index(b"ustar")] = other[:before.index(b"ustar")].replace(b"1.png", b"7.png")

    def rewrite() -> None:
        shards[1].write_bytes(other)
        os.utime(shards[1], times)

    rewrite()
    what = f"{shards[1]} has other content than when packing began, in as many bytes{REMEDY}"
    assert what in said(webdataset, command, capsys)
    # While it is packed.
    shards[1].write_bytes(before)
    finish = packer.Packer.finish
    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "finish", lambda self: (rewrite(), finish(self))[1])
        assert what in said(webdataset, command, capsys)
    job = json.loads((tmp_path / "w/packing/job.json").read_text())
    del job["source"]["shard_ends"]
    (tmp_path / "w/packing/job.json").write_text(json.dumps(job))
    shards[1].write_bytes(before)
    assert webdataset.main(command) == 0
    assert "shard_ends" not in ShardDataset(tmp_path / "w").manifest["job"]["source"]
    assert webdataset.main(command) == 0


def test_ends_of_some_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "SAMPLE", 3)
    for i in range(7):
        (tmp_path / str(i)).write_bytes(bytes([i]) * (100_000 + 50_000 * i))
    files = source_files.with_ends(source_files.seen([*(str(tmp_path / str(i)) for i in range(7)), str(tmp_path / "gone")]))
    assert [bool(file.ends) for file in files] == [True, False, False, True, False, False, True, False]
    assert files[-1].size == -1 and source_files.with_ends([]) == [] and source_files.other_content(files) is None
    for at in 0, 2**16 - 1, -(2**16), -1:
        content = bytearray((tmp_path / "6").read_bytes())
        content[at] ^= 1
        (tmp_path / "6").write_bytes(content)
        assert (source_files.other_content(files) or "").startswith(f"{tmp_path}/6 has other content")
        content[at] ^= 1
        (tmp_path / "6").write_bytes(content)
        assert source_files.other_content(files) is None
