"""data_prep.split: a part of a packed set, by the hash of its ids."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep import split, webdataset
from largescale.data.shards import ShardDataset
from tests.conftest import CAPTIONED, RunHere
from tests.unit.packed_pictures import one_thread, picture  # noqa: F401
from tests.unit.source_files import tar
from tests.unit.test_append import pack


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    data = ShardDataset(path, verify=True)
    found = [row for number in range(len(data.manifest["shards"])) for row in data.rows(number)]
    return {row["id"]: row for row in found}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.array_equal(a, b))


@pytest.mark.parametrize("name", ["blobs", "captioned"])
def test_each_row_is_in_one_part_and_as_it_was(name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    path = request.getfixturevalue(name)
    assert split.main([str(path), "--out", str(tmp_path), "--share", "0.2", "--rows-per-shard", "40"]) == 0
    said = capsys.readouterr().out
    every, train, held_out = rows_of(path), rows_of(tmp_path / "train"), rows_of(tmp_path / "validation")
    assert every.keys() == train.keys() | held_out.keys() and not train.keys() & held_out.keys()
    assert f"train {len(train)} rows, validation {len(held_out)} rows" in said and 0.12 < len(held_out) / len(every) < 0.28
    for id, row in (train | held_out).items():
        assert row.keys() == every[id].keys() and all(same(value, every[id][key]) for key, value in row.items()), id
    assert {*held_out} == {id for id in every if split.is_held_out(id, 0.2)}
    manifest = json.loads((tmp_path / "validation/manifest.json").read_text())
    assert manifest["split"] == {"of": ShardDataset(path).fingerprint, "part": "validation", "share": 0.2, "seed": 0, "earlier_seeds": [],
                                 "rows": len(every), "first_rows": len(every), "additions": []}
    if name == "captioned":
        assert all(map(same, ShardDataset(tmp_path / "train").empty_caption, ShardDataset(path).empty_caption))


def test_a_row_keeps_its_side(tmp_path: Path, blobs: Path) -> None:
    """A larger share holds out more, the same and others; another seed others. The numbers are pinned."""
    ids = [f"{i:05d}" for i in range(20_000)]
    small = {id for id in ids if split.is_held_out(id, 0.01)}
    large = {id for id in ids if split.is_held_out(id, 0.1)}
    assert small < large and abs(len(small) - 200) < 50 and abs(len(large) - 2000) < 150
    assert {id for id in ids if split.is_held_out(id, 0.01, seed=1)} != small
    assert [split.is_held_out(id, 0.5) for id in ids[:8]] == PINNED


PINNED = [True, False, False, True, False, True, False, False]


def test_cards_say_of_which_set_and_share(tmp_path: Path) -> None:
    """Of a set that has grown: its sources and their licences, and the whole of what was left out."""
    for name, numbers in ("first", range(20)), ("more", range(20, 40)):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i:03d}.png").write_bytes(picture(i))
    (tmp_path / "more/bad.png").write_bytes(b"no image")
    data = tmp_path / "data"
    assert pack(tmp_path / "first", data, "--licence", "cc-by-4.0") == pack(tmp_path / "more", data, "--append", "--licence", "Mine") == 0
    out = tmp_path / "out"
    assert split.main([str(data), "--out", str(out), "--share", "0.25"]) == 0
    counts = []
    for part in split.PARTS:
        _, front, body = (out / part / "README.md").read_text().split("---\n", 2)
        found = yaml.safe_load(front)
        assert (found["pretty_name"], found["license"], found["license_name"]) == (f"folder-first, {part}", ["cc-by-4.0", "other"], "Mine")
        assert f"the part `{part}` of a set of 40 images with the fingerprint `{ShardDataset(data).fingerprint}`" in body
        assert "a share of 0.25, with the seed 0. The sources of the whole set:" in body
        assert "| folder-first | data\\_prep.folder | 20 | 20 | cc-by-4.0 |\n| folder-more | data\\_prep.folder | 21 | 20 | Mine |" in body
        assert "1 images of the whole set, each with its reason in `skipped.jsonl`." in body and "- ADM's centre crop\n" in body and (out / part / "images.png").exists()
        counts.append(len(ShardDataset(out / part)))
        assert f"{counts[-1]} images, as pixels" in body
    assert sum(counts) == 40 and min(counts) > 0
    # A part of a part names that part, and the same sources. Somebody's own card stays.
    (tmp_path / "again/train").mkdir(parents=True)
    (tmp_path / "again/train/README.md").write_text("# mine")
    assert split.main([str(out / "train"), "--out", str(tmp_path / "again"), "--share", "0.5", "--seed", "1"]) == 0
    assert (tmp_path / "again/train/README.md").read_text() == "# mine"
    # A part that grows has the sources of the whole set, and its own.
    (tmp_path / "third").mkdir()
    (tmp_path / "third/x.png").write_bytes(picture(99))
    (tmp_path / "third/bad.png").write_bytes(b"no image")
    assert pack(tmp_path / "third", out / "train", "--append", "--licence", "cc0-1.0") == 0
    # It is not replaced by a split of the set that does not have them.
    grown = rows_of(out / "train").keys()
    assert split.main([str(data), "--out", str(out), "--share", "0.25"]) == 2 and rows_of(out / "train").keys() == grown
    assert [json.loads(line)["id"] for line in (out / "train/skipped.jsonl").read_text().splitlines()] == ["bad.png", "bad.png"]
    body = (out / "train/README.md").read_text()
    assert f"{counts[0] + 1} images" in body and "21 | 20 | Mine |\n| folder-third | data\\_prep.folder | 2 | 1 | cc0-1.0 |" in body
    (out / "validation/skipped.jsonl").unlink()         # as older versions left it
    assert pack(tmp_path / "third", out / "validation", "--append") == 0 and len(ShardDataset(out / "validation")) == counts[1] + 1
    body = (tmp_path / "again/validation/README.md").read_text()
    assert f"of a set of {counts[0]} images" in body and "| folder-more | data\\_prep.folder | 21 | 20 | Mine |" in body


def test_a_set_that_notes_nothing(blobs: Path, tmp_path: Path) -> None:
    """As eval.sample's, or those of older versions."""
    assert split.main([str(blobs), "--out", str(tmp_path), "--share", "0.2"]) == 0
    body = (tmp_path / "validation/README.md").read_text()
    assert "| blobs |  |  | 300 | none was given |" in body and body.count("\n\nNot noted.\n") == 2


def test_texts_without_encodings(tmp_path: Path) -> None:
    """They stay with their rows, and are counted."""
    samples = [(f"{i}.{kind}", picture(i) if kind == "png" else f"text {i}".encode()) for i in range(20) for kind in ("png", "txt")]
    assert pack(tar(tmp_path / "0.tar", *samples), tmp_path / "data", "--text-encoder", "none", program=webdataset) == 0
    assert split.main([str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--share", "0.3"]) == 0
    for part in split.PARTS:
        data = ShardDataset(tmp_path / "out" / part, verify=True)
        assert data.manifest["captions"] == len(data) < 20
        assert data.texts(np.arange(len(data))) == [[f"text {id.removeprefix('0/')}"] for _, id in data.ids()]
        assert f"with {len(data)} captions" in (data.path / "README.md").read_text()


def test_the_parts_train_and_validate(run_here: RunHere, captioned: Path, tmp_path: Path) -> None:
    assert split.main([str(captioned), "--out", str(tmp_path / "parts"), "--share", "0.3"]) == 0
    run = run_here("--train.steps", 2, "--data.path", tmp_path / "parts/train", "--data.validation", tmp_path / "parts/validation", *CAPTIONED)
    assert run.code == 0, run.err
    wrong = run_here("--train.steps", 2, "--data.path", captioned, "--data.validation", tmp_path / "parts/validation", *CAPTIONED, output=tmp_path / "wrong")
    assert wrong.code == 2 and "rows with the training set" in wrong.err


def test_what_cannot_be_split(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in ((["--share", "0"], "share=0.0 must be above 0 and below 1"), (["--share", "1"], "share=1.0 must be"),
                             (["--rows-per-shard", "0"], "rows_per_shard=0 must be at least 1"), (["--share", "1e-9"], "falls into validation")):
        assert split.main([str(blobs), "--out", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out/train/manifest.json").exists()
    assert split.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "train").symlink_to(blobs)
    assert split.main([str(blobs), "--out", str(tmp_path)]) == 2 and "would overwrite" in capsys.readouterr().err


def test_what_is_not_overwritten(blobs: Path, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A packed set that is no part of a split; the folders of a set and of a run; another split. The same one is written again."""
    shutil.copytree(blobs, tmp_path / "mine/train")
    before = (tmp_path / "mine/train/manifest.json").read_bytes()
    (tmp_path / "file").write_text("")
    run = run_here("--train.steps", 1).run
    for out, says in ((tmp_path / "mine", "mine/train holds a packed set that data_prep.split did not write"), (tmp_path / "mine/train", "packed set itself"),
                      (run, "is a run or a packed set itself"), (tmp_path / "file", "cannot write to")):
        assert split.main([str(blobs), "--share", "0.2", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err and not (out / "validation").exists()
    assert (tmp_path / "mine/train/manifest.json").read_bytes() == before
    typed = [str(blobs), "--share", "0.2", "--out", str(tmp_path / "out")]
    assert split.main(typed) == split.main(typed) == 0
    before = rows_of(tmp_path / "out/validation").keys()
    for other, says in (["--share", "0.3"], "--share 0.2 and --seed 0, not 0.3 and 0;"), (["--seed", "1"], "--share 0.2 and --seed 0, not 0.2 and 1;"):
        assert split.main([*typed, *other]) == 2
        assert says in capsys.readouterr().err and rows_of(tmp_path / "out/validation").keys() == before
    # Other data, of which all rows would be lost, and rows of which none falls into a part.
    for name, share, says in ("other", "0.2", "is of a split of other data than"), ("one", "0.2", "none of the 1 rows"):
        pictures = tmp_path / name
        pictures.mkdir()
        for i in range(1 if name == "one" else 30):
            (pictures / f"{i}.png").write_bytes(picture(i))
        data = tmp_path / f"{name}_data"
        assert pack(pictures, data) == 0
        out = tmp_path / "out" if name == "other" else tmp_path / "one_out"
        if name == "one":
            shutil.copytree(tmp_path / "out", out)
            for part in split.PARTS:
                manifest = json.loads((out / part / "manifest.json").read_text())
                manifest["split"]["of"] = ShardDataset(data).fingerprint
                (out / part / "manifest.json").write_text(json.dumps(manifest))
        assert split.main([str(data), "--share", share, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err and rows_of(out / "validation").keys() == before


def test_a_part_is_not_split_by_the_same_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of its rows lie on one side of it, at whatever depth."""
    for i in range(60):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{i}.png").write_bytes(picture(i))
    assert pack(tmp_path / "pictures", tmp_path / "data") == 0
    assert split.main([str(tmp_path / "data"), "--share", "0.2", "--out", str(tmp_path / "1")]) == 0
    assert split.main([str(tmp_path / "1/train"), "--share", "0.4", "--seed", "1", "--out", str(tmp_path / "2")]) == 0
    for part, seeds in ("1/train", "[0]"), ("1/validation", "[0]"), ("2/train", "[0, 1]"):
        assert split.main([str(tmp_path / part), "--share", "0.5", "--out", str(tmp_path / "3")]) == 2
        assert f"part of a split with --seed 0, which would divide it again by the same hash; give another --seed than {seeds}" in capsys.readouterr().err
    assert split.main([str(tmp_path / "2/train"), "--share", "0.5", "--seed", "2", "--out", str(tmp_path / "3")]) == 0


def test_a_set_that_has_grown_is_split_again(tmp_path: Path) -> None:
    for name, numbers in ("first", range(20)), ("more", range(20, 40)):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i:03d}.png").write_bytes(picture(i))
    typed = [str(tmp_path / "data"), "--share", "0.25", "--out", str(tmp_path / "out")]
    assert pack(tmp_path / "first", tmp_path / "data") == split.main(typed) == 0
    before = {part: rows_of(tmp_path / "out" / part).keys() for part in split.PARTS}
    assert pack(tmp_path / "more", tmp_path / "data", "--append") == split.main(typed) == 0
    after = {part: rows_of(tmp_path / "out" / part).keys() for part in split.PARTS}
    assert all(before[part] <= after[part] for part in split.PARTS) and sum(map(len, after.values())) == 40
