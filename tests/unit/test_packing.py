"""What comes out of packing depends on what goes in: not on batches, places, older versions. Bad input is said, or listed."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import folder, packer
from data_prep.images import decode
from data_prep.sources import Item
from largescale.data.format import fingerprint
from largescale.data.shards import ShardDataset
from tests.unit.packed_pictures import BAD, files, interrupted, one_thread, pack, picture  # noqa: F401


def test_what_is_packed(truth: Path, images: Path) -> None:
    data = ShardDataset(truth, verify=True)
    assert sorted(files(truth)) == ["README.md", "content.hashes", "images.png", "manifest.json", *(f"shard_{i:05d}.arrow" for i in range(4)), "skipped.jsonl"]
    good = [i for i in range(37) if f"{i:03d}.png" not in BAD]
    rows = data.gather(np.arange(len(data)))["latent"]
    assert np.array_equal(rows, np.stack([decode(picture(i), 16, 4) for i in good]))
    assert (data.info.kind, data.info.shape, data.info.num_classes) == ("pixels", (3, 16, 16), 0)
    skipped = [json.loads(line) for line in (truth / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == list(BAD) and all(entry["reason"] for entry in skipped)
    manifest = data.manifest
    assert manifest["skipped"]["count"] == 3 and sum(manifest["skipped"]["reasons"].values()) == 3
    assert manifest["job"]["source"]["images"] == str(images) and manifest["job"]["min_side"] == 4


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 7, "--workers", 5)])
def test_batches_and_workers_do_not_matter(images: Path, truth: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    pack(images, tmp_path / "out", *more)
    assert files(tmp_path / "out") == files(truth)


def tree(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_run_again_it_does_nothing(images: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(truth)
    (truth / "packing").mkdir()                         # left by a kill after the manifest was written
    (truth / "packing/job.json").write_text("{}")
    assert pack(images, truth) == 0
    assert "already packed" in capsys.readouterr().out and tree(truth) == before


def test_a_damaged_set_is_not_called_packed(images: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(truth, tmp_path / "out")
    (out / "shard_00002.arrow").unlink()
    assert pack(images, out) == 2
    said = capsys.readouterr().err
    assert "lacks a shard" in said and f"to pack it anew, delete {out} first" in said


@pytest.mark.parametrize("change", [("--resolution", 8), ("--rows-per-shard", 5), ("--min-side", 3)])
def test_a_folder_that_holds_another_data_set(images: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch, change: tuple[Any, ...]) -> None:
    before = tree(truth)
    assert pack(images, truth, *change) == 2
    said = capsys.readouterr().err
    assert f"{truth} holds another data set" in said and "give another --out" in said and tree(truth) == before
    with monkeypatch.context() as patch:                # and one of which only a part is there
        patch.setattr(packer.Packer, "finish", interrupted)
        pack(images, tmp_path / "out")
    before = tree(tmp_path / "out")
    assert pack(images, tmp_path / "out", *change) == 2 and tree(tmp_path / "out") == before


@pytest.mark.parametrize("job", ["[" * 100_000, "[1]", "{", "5"])
def test_a_damaged_job_is_said(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str) -> None:
    (tmp_path / "out/packing").mkdir(parents=True)
    (tmp_path / "out/packing/job.json").write_text(job)
    assert pack(images, tmp_path / "out") == 2
    assert re.search(r"job\.json cannot be used \(.*; delete .*/out, and run again", capsys.readouterr().err)


def test_a_folder_of_shards_of_unknown_origin(images: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(truth / "shard_00002.arrow", tmp_path)
    assert pack(images, tmp_path) == 2
    assert "holds shard_00002.arrow, and nothing that says whose they are" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_that_moved_is_the_same_data_set(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  finished: bool) -> None:
    """Another $SLURM_TMPDIR; of two ranks, each may have its own. What was begun keeps its name."""
    mine = shutil.copytree(images, tmp_path / "a" / "elsewhere")
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(packer.Packer, "finish", interrupted)
        assert pack(mine, tmp_path / "out") == (0 if finished else 75)
    before = {name: stat for name, stat in tree(tmp_path / "out").items() if name.endswith(".arrow")}
    assert pack(images, tmp_path / "out") == 0
    data, other = ShardDataset(tmp_path / "out", verify=True), ShardDataset(truth)
    assert before.items() <= tree(tmp_path / "out").items() and len(before) == 4
    assert data.info.name == "folder-elsewhere" != other.info.name and data.fingerprint == other.fingerprint
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, root in (1, mine), (0, images):
        monkeypatch.setenv("RANK", str(rank))
        assert pack(root, tmp_path / "two") == 0
    assert ShardDataset(tmp_path / "two", verify=True).fingerprint == other.fingerprint


def test_sets_of_older_versions_keep_their_fingerprint_and_go_on(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    """The name took part in the fingerprint, and sizes in no job: the place told folders apart."""
    out = shutil.copytree(truth, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    old = fingerprint(ShardDataset(truth).info, manifest["shards"], None, named=True)
    assert old != manifest["fingerprint"]
    del manifest["job"]["source"]["sizes"]
    (out / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": old}))
    assert pack(images, out) == 0 and ShardDataset(out).fingerprint == old
    assert pack(shutil.copytree(images, tmp_path / "b" / images.name), out) == 2
    assert "source.images: " in capsys.readouterr().err


def test_another_folder_of_images_is_another_data_set(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one in which the files have the same names; and one that got another image."""
    mine = shutil.copytree(images, tmp_path / "a" / images.name)
    pack(mine, tmp_path / "out")
    other = shutil.copytree(images, tmp_path / "b" / images.name)
    (other / "003.png").write_bytes(picture(100))
    assert pack(other, tmp_path / "out") == 2
    assert "What differs:\n  source.sizes: " in capsys.readouterr().err
    (mine / "100.png").write_bytes(picture(100))
    assert pack(mine, tmp_path / "out") == 2
    assert "source.images_listed: 37 there, 38 here" in capsys.readouterr().err


def test_an_ill_file_system_does_not_thin_out_the_data(images: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> bytes:
        if path.endswith("020.png"):
            raise OSError(5, "Input/output error")
        return Path(path).read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.sources._read", read)
        assert pack(images, tmp_path / "out") == 2
    assert "020.png cannot be read: [Errno 5] Input/output error; when it can, run again" in capsys.readouterr().err
    assert pack(images, tmp_path / "out") == 0 and files(tmp_path / "out") == files(truth)


def test_large_files_do_not_wait_in_memory_by_the_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = most = 0

    def items() -> Iterator[Item]:
        nonlocal under_way, most
        for i in range(20):
            under_way += 1
            most = max(most, under_way)
            yield Item(str(i), bytes, held=40)

    monkeypatch.setattr(packer, "MOST_HELD", 100)
    done = []
    with ThreadPoolExecutor(1) as pool:
        for number in packer._ahead(pool, lambda item: int(item.id), items(), window=16):
            under_way -= 1
            done.append(number)
    assert done == list(range(20)) and most == 3


def test_nothing_that_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"no image")
    assert pack(tmp_path / "images", tmp_path / "out") == 2
    assert "not one image of folder-images could be used; the first: a.png:" in capsys.readouterr().err
    # The next start may have other options.
    assert not (tmp_path / "out").exists()
    (tmp_path / "images/a.png").write_bytes(picture(1))
    assert pack(tmp_path / "images", tmp_path / "out", "--min-side", 25) == 2 and pack(tmp_path / "images", tmp_path / "out") == 0


@pytest.mark.parametrize(("more", "message"), [
    (("--resolution", 0), "resolution=0 must be at least 1"),
    (("--rows-per-shard", 0), "rows_per_shard=0"),
    (("--batch-size", -1), "batch_size=-1"),
    (("--device", "cuda"), "torch sees no CUDA device; to run on the CPU: --device cpu"),
    (("--vae", "nowhere/at-all"), "nowhere/at-all"),
    (("--text-encoder", "hf:x"), "has no captions; omit it"),
    (("--max-tokens", 3), "--max-tokens 3 is a setting of --text-encoder"),
])
def test_bad_settings_are_one_line_and_nothing_is_made(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    more: tuple[Any, ...], message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pack(images, tmp_path / "out", *more) == 2
    *before, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and message in said and not (tmp_path / "out").exists()
    assert all(line.startswith("still loading ") for line in before)    # said where that takes long


def test_the_vae_is_asked_for(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        folder.main(["--help"])
    asked = re.sub(r"[^\w():.-]+", " ", capsys.readouterr().out)
    assert "none: pack pixels. (required)" in asked and "the texts only. (required where there are captions)" in asked
    assert folder.main(["--images", str(images), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "or --vae none to pack pixels" in capsys.readouterr().err


def test_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        path = tmp_path / "images" / f"class_{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    assert pack(tmp_path / "images", tmp_path / "out", "--rows-per-shard", 5, program="imagenet") == 0
    assert capsys.readouterr().err.startswith("imagenet-images: 12 images of 3 classes (class_0 ... class_2)\n")
    data = ShardDataset(tmp_path / "out", verify=True)
    rows = data.gather(np.arange(12))
    assert rows["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data.info.num_classes == 3
    assert data.manifest["class_names"] == ["class_0", "class_1", "class_2"]
    order = [i for c in range(3) for i in sorted(range(c, 12, 3), key=str)]
    assert np.array_equal(rows["latent"], np.stack([decode(picture(i), 16, 4) for i in order]))
