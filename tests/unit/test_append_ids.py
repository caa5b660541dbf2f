"""No id is given to two images of a set that grows: many are refused before any work, a few left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import ids, imagenet, parquet, webdataset
from data_prep.append import ALREADY, AddedParts
from data_prep.content import Known
from data_prep.ids import ID_TAKEN, KnownIds
from data_prep.listing import Listings
from largescale.data.compatibility import _shared_rows
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import Stopped
from tests.conftest import make_blobs
from tests.unit.packed_pictures import files, picture
from tests.unit.source_files import table, tar
from tests.unit.test_append import pack


def folder_of(root: Path, pictures: dict[str, int]) -> Path:
    root.mkdir()
    for name, number in pictures.items():
        (root / f"{name}.png").write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the pictures 0 to 11, named by their numbers."""
    root = tmp_path_factory.mktemp("base")
    assert pack(folder_of(root / "images", {f"{i:02d}": i for i in range(12)}), root / "out") == 0
    return root / "out"


@pytest.fixture
def out(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "out")


def ids_of(out: Path) -> list[str]:
    return [id for _, id in ShardDataset(out, verify=True).ids()]


def left_out(out: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    return [(line["id"], line["reason"]) for line in lines]


def test_ids_of_other_images_are_refused_before_any_work(base: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With how many there are; under other ids they are added, and once only."""
    source = folder_of(tmp_path / "more", {"00": 0, "01": 101, "02": 102, "03": 103, "new": 104})
    assert pack(source, out, "--append") == 2
    said = capsys.readouterr().err
    assert f"--append: 4 of the source's 5 ids are in {out} already, and not of the same images: 3 of 4 that were looked at, such as 0" in said
    assert "give --id-prefix, such as --id-prefix folder-more/" in said and files(out) == files(base)
    assert not (out / "packing").exists()
    assert pack(source, out, "--append", "--id-prefix", "more/") == 0
    assert ids_of(out)[12:] == ["more/01.png", "more/02.png", "more/03.png", "more/new.png"]
    assert left_out(out) == [("more/00.png", ALREADY)]
    packed = files(out)
    capsys.readouterr()
    assert pack(source, out, "--append", "--id-prefix", "more/") == 0 and "already packed" in capsys.readouterr().out
    assert files(out) == packed and ShardDataset(out).manifest["additions"][0]["job"]["id_prefix"] == "more/"
    # The prefix may be taken too.
    other = folder_of(tmp_path / "other", {"01": 201})
    assert pack(other, out, "--append", "--id-prefix", "more/") == 2 and "1 of the source's 1 ids are in" in capsys.readouterr().err


def test_numbered_rows_and_names_in_archives(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, tars = [], []
    for part in range(2):
        pictures = [picture(300 + 10 * part + i) for i in range(7)]
        tables.append(tmp_path / f"{part}.parquet")
        pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), tables[-1])
        tars.append(tar(tmp_path / f"tar{part}/0.tar", *((f"{i}.png", picture(400 + 10 * part + i)) for i in range(7 + 5 * part))))
    for program, (first, second), more, what in (
            (parquet, tables, (), "7 of the source's 7 ids are in"),
            (webdataset, tars, ("--caption-key", "none"), "ids of the source are in")):
        assert pack(first, out, "--append", *more, program=program) == 0
        rows = len(ShardDataset(out))
        before = files(out)
        capsys.readouterr()
        assert pack(second, out, "--append", *more, program=program) == 2
        assert f"--append: {what} {out} already, and not of the same images: " in capsys.readouterr().err and files(out) == before
        assert pack(second, out, "--append", *more, "--id-prefix", "x/", program=program) == 0
        assert len(ShardDataset(out)) == rows + (7 if program is parquet else 12)
    assert len(set(ids_of(out))) == 12 + 4 * 7 + 5


def test_a_new_set_with_a_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is left out too; what is added to the set need not have it."""
    source, out = folder_of(tmp_path / "i", {"a": 1, "b": 2}), tmp_path / "out"
    labels = table(tmp_path / "x.csv", ("b.png", 1), ("gone.png", 0), ("a.png", 0))
    options = ("--labels", labels, "--skip-missing")
    assert pack(source, out, *options, "--id-prefix", "x/", program=imagenet) == 0
    assert ids_of(out) == ["x/b.png", "x/a.png"] and left_out(out) == [("x/gone.png", "the file is missing")]
    assert pack(source, out, *options, program=imagenet) == 2 and "id_prefix: x/ there, None here" in capsys.readouterr().err
    more = folder_of(tmp_path / "j", {"a": 3})
    assert pack(more, out, "--append", "--labels", table(tmp_path / "y.csv", ("a.png", 1)), program=imagenet) == 0
    assert ids_of(out)[2:] == ["a.png"]
    assert pack(source, tmp_path / "other", "--id-prefix", "\udcff") == 2 and "is not UTF-8" in capsys.readouterr().err


def test_a_few_that_were_not_seen_are_left_out(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost: the same source with a prefix adds those and nothing else."""
    source = folder_of(tmp_path / "more", {f"{i:02d}": i if i != 3 else 103 for i in range(12)} | {"new": 104})
    monkeypatch.setattr(ids, "_taken", lambda known, texts, prefix: (13, 12, [0]))
    assert pack(source, out, "--append") == 0
    assert "note: 1 images were left out whose ids the set has, of other images; the same command with --id-prefix adds" in capsys.readouterr().err
    assert ids_of(out)[12:] == ["new.png"] and left_out(out)[3] == ("03.png", ID_TAKEN)
    assert [reason for _, reason in left_out(out)].count(ALREADY) == 11
    assert pack(source, out, "--append", "--id-prefix", "b/") == 0
    assert ids_of(out)[12:] == ["new.png", "b/03.png"] and "note:" not in capsys.readouterr().err


def test_some_are_looked_at_wherever_they_are(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many taken ids a few, spread over the source, however its ids are cut."""
    known = KnownIds(ShardDataset(out), Listings(tmp_path / "packing"))
    names = [f"{i:02d}.png" for i in range(100)]
    for size in 1, 7, 100:
        pieces = [names[i:i + size] for i in range(0, 100, size)]
        assert ids._taken(known, pieces, "") == (100, 12, list(range(12)))
    assert ids._taken(known, [names], "x") == (100, 0, []) and "00.png" in known and "xy" not in known and "\udcff" not in known
    monkeypatch.setattr(ids, "LOOKED_AT", 5)
    found = ids._taken(known, [names], "")[2]
    assert len(set(found)) == 5 and found == sorted(found) and found == ids._taken(known, [names[:6], names[6:]], "")[2]


def test_a_set_without_hashes_of_images(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As older versions packed latents: whether the images are the same cannot be told, and is not guessed."""
    make = Known.__init__

    def unknown(self: Known, data: ShardDataset) -> None:
        make(self, data)
        self._sorted, self.complete = [], False

    monkeypatch.setattr(Known, "__init__", unknown)
    source = folder_of(tmp_path / "more", {"00": 0, "new": 104})
    assert pack(source, out, "--append") == 2
    assert "and an older version, which kept no hashes of images, packed it, so that nothing tells" in capsys.readouterr().err
    assert pack(source, out, "--append", "--id-prefix", "b/") == 0 and ids_of(out)[12:] == ["b/00.png", "b/new.png"]


def test_ids_are_compared_once(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of the ranks; and an addition that was begun, as by a version that compared none, is finished."""
    source = folder_of(tmp_path / "more", {"00": 0, "new": 104, "newer": 105})
    calls: list[Any] = []
    take = ids._taken
    monkeypatch.setattr(ids, "_taken", lambda *args: calls.append(args) or take(*args))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def stop(*args: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:                # as where the other rank has not begun yet
        patch.setattr(AddedParts, "claim", stop)
        assert pack(source, out, "--append", "--rows-per-shard", 2) == 75 and len(calls) == 1
    assert pack(source, out, "--append", "--rows-per-shard", 2) == 0 and len(calls) == 1
    monkeypatch.setenv("RANK", "0")
    for path in (out / "packing").glob("ids_*"):
        path.unlink()
    assert pack(source, out, "--append", "--rows-per-shard", 2) == 0 and len(calls) == 1
    assert ids_of(out)[12:] == ["new.png", "newer.png"] and not (out / "packing").exists()
    # Refused, nothing stays; stopped, the next start goes on.
    other = folder_of(tmp_path / "other", {"00": 200})
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pack(other, out, "--append") == 2 and not (out / "packing").exists()
    with monkeypatch.context() as patch:
        patch.setattr(ids, "_taken", stop)
        assert pack(folder_of(tmp_path / "third", {"03": 3, "x": 300}), out, "--append") == 75
    assert pack(tmp_path / "third", out, "--append") == 0 and ids_of(out)[14:] == ["x.png"]


def test_held_out_rows_of_one_id(tmp_path: Path) -> None:
    """Sets that older versions let grow have several: each is compared."""
    training = ShardDataset(make_blobs(tmp_path / "training", rows=20))
    held_out = make_blobs(tmp_path / "held_out", seed=1, rows=20)
    assert _shared_rows(ShardDataset(held_out), training, slice(None)) == []
    rows = list(training.rows(0))
    for order in [3, 0], [0, 3]:
        out = tmp_path / f"double{order[0]}"
        with ShardWriter(out, training.info, rows_per_shard=100) as writer:
            for number in order:
                writer.write(**(rows[number] | {"id": "00003"}))
        assert _shared_rows(ShardDataset(out), training, slice(None)) == ["00003"]
    assert np.array_equal(ShardDataset(out).gather(np.array([1]))["latent"][0], rows[3]["latent"])
