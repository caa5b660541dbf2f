"""A source is listed once, as a stream, into files that all ranks read: what is in memory does not grow with it."""

import io
import json
import os
import random
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import (
    folder,
    hashes,
    imagenet,
    labels_csv,
    left_out,
    listing,
    packer,
    parquet,
    parquet_columns,
    parquet_files,
    spool,
    walk,
    webdataset,
)
from data_prep.listing import Found, Listings
from data_prep.sources import ListSource
from data_prep.walk import Walk, missing_files
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.errors import DataError, Stopped
from tests.unit.source_files import tar


def picture(shade: int = 0, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), shade).save(file, "PNG")
    return file.getvalue()


def tree(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i % 256))
    return root


def age(root: Path) -> None:
    """Makes all folders as old as they are when one packs them on another day."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            os.utime(path, (time.time() - 100,) * 2)


NAMES = [f"{folder}{name}.png" for folder in ("", "a/", "a.b/", "a/c/", "a-b/", "é/", "ab/", "a b/x/")
         for name in ("1", "10", "2", "a", "-", "é", "Z", "\u4e2d", "\U0001f600")]


@pytest.mark.parametrize("run", [3, 1000])
def test_what_does_not_fit_in_memory_is_sorted_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(spool, "RUN", run)
    monkeypatch.setattr(hashes, "RANGE", run)
    monkeypatch.setattr(hashes, "BLOCK", run)
    monkeypatch.setattr(walk, "_AT_A_TIME", 2)
    monkeypatch.setattr(walk, "_MOST_FOLDERS", run)
    monkeypatch.setattr(listing, "BATCH", 4)
    tree(tmp_path / "i", NAMES)
    (tmp_path / "i/a/notes.txt").touch()
    there = Walk(tmp_path / "i")
    assert list(chain.from_iterable(there)) == sorted(NAMES) and there.others == 1
    source = folder.read(tmp_path / "i")
    assert [item.id for part in range(source.parts(5)) for item in source.part(part, 5)] == sorted(NAMES)
    # In the order of a list, of which some are missing, and of folders that hold more than the list names.
    asked = [*NAMES[::2], "a/gone.png", "gone/1.png", "a/c/gone.png"]
    random.Random(0).shuffle(asked)
    cut = [asked[:5], asked[5:]]
    missing = missing_files(tmp_path / "i", cut, lambda: cut, tmp_path)
    gone = [name not in NAMES for name in asked]
    assert missing.count == 3 and missing.twice is None and missing.first == [name for name in asked if name not in NAMES]
    assert [missing.among(start, len(asked) - start) for start in range(len(asked))] == [gone[start:] for start in range(len(asked))]
    folders = {os.path.dirname(name) for name in asked}
    assert missing.unlisted == sum(os.path.dirname(name) in folders for name in NAMES) - len(NAMES[::2])
    twice = [["x", *asked[:4]], ["x", asked[1], asked[1]]]
    assert missing_files(tmp_path / "i", twice, lambda: twice, tmp_path).twice == (0, 5, "x")


class Entry:
    def __init__(self, name: str) -> None:
        self.name = name

    def is_dir(self) -> bool:
        return False

    def is_file(self) -> bool:
        return True

    is_symlink = is_dir


class Entries(list[Any]):
    """What os.scandir gives, of files that do not exist."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return (Entry(f"{i * 7919 % self.n:08d}.png") for i in range(self.n))

    def __enter__(self) -> "Entries":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_memory_does_not_grow_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Not of the names, the labels or what is left out: the peak of 3,000 images is that of 1,000."""
    monkeypatch.setattr(spool, "RUN", 250)
    monkeypatch.setattr(spool, "_CHUNK", 5)
    monkeypatch.setattr(walk, "_AT_A_TIME", 100)
    monkeypatch.setattr(listing, "BATCH", 100)
    monkeypatch.setattr(labels_csv, "AT_A_TIME", 100)
    monkeypatch.setattr(hashes, "RANGE", 250)
    monkeypatch.setattr(hashes, "BLOCK", 100)
    scandir, n = os.scandir, 0
    monkeypatch.setattr(os, "scandir", lambda path: Entries(n) if str(path).startswith(str(tmp_path / "i")) else scandir(path))
    (tmp_path / "i").mkdir()
    peaks = []
    for n in 1000, 1000, 3000:                          # the first imports, and fills caches
        labels = tmp_path / "labels.csv"
        labels.write_text("file,label\n" + "".join(f"{i if i % 3 else -i - 1:08d}.png,{i % 5}\n" for i in range(n)))
        tracemalloc.start()
        source = folder.read(tmp_path / "i") if kind == "folder" else imagenet.read(tmp_path / "i", labels, skip_missing=True)
        read = sum(1 for part in range(source.parts(256)) for _ in source.part(part, 256))
        left_out = sum(1 for _ in source.skipped)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (read, left_out) == ((n, 0) if kind == "folder" else (n - -(-n // 3), -(-n // 3)))
    assert peaks[2] < 1.05 * peaks[1] + 40_000          # a file object for each run


@pytest.mark.parametrize("at", range(5))
def test_killed_while_a_list_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """At any renaming: what lies there then is a whole list, or none."""
    tree(tmp_path / "i", ["a.png"])
    age(tmp_path / "i")
    assert folder.read(tmp_path / "i", Listings(tmp_path / "out")).size == 1
    tree(tmp_path / "i", ["b.png", "c.png"])
    age(tmp_path / "i")
    renamed, rename = [], os.rename

    def killed(*args: Any) -> None:
        if len(renamed) == at:
            raise Stopped
        renamed.append(args)
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Stopped) if at < 4 else nullcontext():
            folder.read(tmp_path / "i", Listings(tmp_path / "out"))
    source = folder.read(tmp_path / "i", Listings(tmp_path / "out"))
    assert source.size == 3 and [item.id for item in source.part(0, 9)] == ["a.png", "b.png", "c.png"]


def test_a_start_after_the_first_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a folder has changed, or is so new that it may change at the same time."""
    tree(tmp_path / "i", ["n1/a.png", "n2/deep/b.png"])
    listings, scanned, scandir = Listings(tmp_path / "out/packing"), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))

    def lists() -> tuple[bool, ListSource]:
        scanned.clear()
        source = folder.read(tmp_path / "i", listings)
        return any(str(tmp_path / "i") in path for path in scanned), source

    assert lists()[0] and lists()[0]                    # made just now
    age(tmp_path / "i")
    first = lists()
    found = sorted((tmp_path / "out/packing").iterdir())
    second = lists()
    assert first[0] and not second[0] and sorted((tmp_path / "out/packing").iterdir()) == found
    assert second[1].fingerprint == first[1].fingerprint and second[1].facts == first[1].facts
    assert [item.id for item in second[1].part(0, 9)] == ["n1/a.png", "n2/deep/b.png"]
    tree(tmp_path / "i", ["n2/deep/c.png"])
    listed, third = lists()
    assert listed and third.size == 3 and third.fingerprint != first[1].fingerprint
    # What nobody began to pack is not left behind.
    other = Listings(tmp_path / "other")
    other.get({}, (), lambda writer: Found({}))
    other.discard()
    assert not (tmp_path / "other").exists()
    (tmp_path / "out/packing/job.json").touch()
    listings.discard()
    assert len(sorted((tmp_path / "out/packing").iterdir())) == len(found) + 1
    with pytest.raises(DataError, match="cannot write .* free space, or correct --out"):
        Listings(tmp_path / "i/n1/a.png").get({}, (), lambda writer: Found({}))


def test_files_at_equal_steps_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sizes tell two folders apart; which files they are is the same in every version."""
    monkeypatch.setattr(listing, "BATCH", 3)
    monkeypatch.setattr(listing, "SAMPLE", 3)
    names = [f"{i:02d}.png" for i in range(11)]
    source = folder.read(tree(tmp_path, names))
    before = source.changed()
    for name in names:
        (tmp_path / name).write_bytes(b"another size" if name in names[::4] else b"")
        assert (source.changed() is not None) == (name in names[::4]) and before is None
        (tmp_path / name).unlink()


def options(images: Path, out: Path) -> list[str]:
    return ["--images", str(images), "--out", str(out), "--vae", "none", "--resolution", "8", "--rows-per-shard", "4",
            "--device", "cpu", "--workers", "1"]


def test_a_source_that_changes_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is gone, and one of another size, stop the packing; once put back it goes on."""
    images, out, finish = tree(tmp_path / "i", [f"{i}.png" for i in range(8)]), tmp_path / "out", packer.Packer.finish

    def before_the_end(change: Any) -> int:
        monkeypatch.setattr(packer.Packer, "finish", lambda self: (change(), finish(self))[1])
        return folder.main(options(images, out))

    content = (images / "3.png").read_bytes()
    assert before_the_end(lambda: (images / "3.png").write_bytes(content + b"more")) == 2
    said = capsys.readouterr().err
    assert f"3.png has {len(content) + 4} bytes, and had {len(content)} when packing began: the source changed" in said
    assert folder.main(options(images, out)) == 2 and capsys.readouterr().err == said[said.index("error: "):]
    (images / "3.png").write_bytes(content)
    (images / "6.png").rename(tmp_path / "6.png")
    age(images)                                         # a folder as of another day is listed again too
    assert folder.main(options(images, out)) == 2 and "image 7 is 7.png, and was 6.png when packing began (7 images, and 8 then)" in capsys.readouterr().err
    (tmp_path / "6.png").rename(images / "6.png")
    assert before_the_end(lambda: (images / "6.png").unlink()) == 0     # all is packed by then
    assert len(ShardDataset(out)) == 8
    read = packer.Packer.pack_part
    monkeypatch.setattr(packer.Packer, "pack_part", lambda self, *args: ((images / "7.png").unlink(missing_ok=True), read(self, *args))[1])
    assert folder.main(options(images, tmp_path / "new")) == 2
    assert re_joined(capsys.readouterr().err).endswith("put it back as it was and run again, or delete --out and pack it anew")
    assert not (tmp_path / "new/manifest.json").exists()


def re_joined(text: str) -> str:
    return " ".join(text.split())


def test_tar_files_and_tables_that_change(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", ("1.jpg", b""), ("1.txt", b"x"))
    pq.write_table(pa.table({"image": pa.array([picture()], pa.binary())}), tmp_path / "0.parquet")
    for source, file in (webdataset.read([str(path)]), path), (parquet.ParquetSource([tmp_path / "0.parquet"]), tmp_path / "0.parquet"):
        assert source.changed() is None
        size = file.stat().st_size
        file.write_bytes(file.read_bytes() + b"more")
        assert source.changed() == f"{file} has {size + 4:,} bytes, and had {size:,} when packing began"
        file.unlink()
        assert source.changed() is None                 # gone: all that was needed of it has been read


def test_two_packers_of_other_numbers_of_ranks(tmp_path: Path) -> None:
    """One rank packs all parts, of two the second packs half: both would write the same files."""
    one, second = Parts(tmp_path, {"seed": 0}, 4, 0, 1), Parts(tmp_path, {"seed": 0}, 4, 1, 2)
    assert one.claim()
    with pytest.raises(DataError, match="another packer works in .*, as 1 ranks, and this one as 2 ranks; wait for it or stop it"):
        second.claim()
    second.close()
    one.close()
    second, third = (Parts(tmp_path, {"seed": 0}, 4, rank, 2) for rank in (1, 0))
    assert second.claim() and third.claim()             # another number, once nobody works
    second.close()
    third.close()


def test_more_reasons_than_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "MOST_REASONS", 2)
    skipped = [(str(i), why) for i, why in enumerate(["a", "b", "c", "a", "d"])]
    assert left_out.write_skipped(tmp_path / "x", iter(skipped)) == {"a": 2, "b": 1, "other reasons": 2}
    assert [json.loads(line)["reason"] for line in (tmp_path / "x").read_text().splitlines()] == list("abcad")


def test_ids_and_labels_of_tables_are_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows at a time, and the same as all at once."""
    table = {"image": pa.array([picture(i) for i in range(9)], pa.binary()), "l": list("cabcabcab"), "id": [f"{i:02d}" for i in range(9)]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet", row_group_size=4)
    whole = parquet.ParquetSource([tmp_path / "0.parquet"], label_column="l", id_column="id")
    monkeypatch.setattr(parquet_files, "TEXTS_READ", 2)
    monkeypatch.setattr(spool, "RUN", 2)
    source = parquet.ParquetSource([tmp_path / "0.parquet"], label_column="l", id_column="id")
    assert source.fingerprint == whole.fingerprint and source.num_classes == 3
    # A later start reads neither, unless a file was written anew.
    listings, columns = Listings(tmp_path / "out/packing"), ("image", "l", None, "id")
    parquet.ParquetSource([tmp_path / "0.parquet"], *columns, listings)
    with monkeypatch.context() as patch:
        patch.setattr(parquet_columns.Columns, "_read", None)
        later = parquet.ParquetSource([tmp_path / "0.parquet"], *columns, listings)
        assert (later.fingerprint, later.facts, later.class_names, later.notes) == (source.fingerprint, source.facts, ("a", "b", "c"), source.notes)
        os.utime(tmp_path / "0.parquet")
        with pytest.raises(TypeError):
            parquet.ParquetSource([tmp_path / "0.parquet"], *columns, listings)
    assert [(item.id, item.label) for item in source.part(1, 4)] == [("04", 0), ("05", 1), ("06", 2), ("07", 0)]
    pq.write_table(pa.table(table | {"id": [*"abcdefgha"]}), tmp_path / "1.parquet", row_group_size=4)
    with pytest.raises(DataError, match="column id: 1 ids are given more than once: a;"):
        parquet.ParquetSource([tmp_path / "1.parquet"], id_column="id")


def test_a_rank_that_died_while_it_listed(tmp_path: Path) -> None:
    """What it left is written over; a listing counts once its .json is there."""
    images, out = tree(tmp_path / "i", ["a.png", "b.png"]), tmp_path / "out"
    folder.read(images, Listings(out / "packing"))
    (made,) = (out / "packing").glob("*.json")
    for suffix in ".json", ".folders":
        Path(f"{str(made).removesuffix('.json')}{suffix}").unlink()
        (out / "packing" / f"{made.stem}.0.rows").write_bytes(b"half")
        source = folder.read(images, Listings(out / "packing"))
        assert [item.id for item in source.part(0, 5)] == ["a.png", "b.png"] and made.exists()
    assert folder.main(options(images, out)) == 0 and not (out / "packing").exists()
