"""What comes out of packing depends on what goes in: not on ranks, batches, interruptions. Bad input is said, or listed."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import describe as data_inspect
from data_prep import encoding, folder, imagenet, packer, webdataset
from data_prep.images import decode
from data_prep.sources import Item
from largescale.data.format import LATENT_RGB, fingerprint
from largescale.data.shards import ShardDataset
from largescale.encoders.text import TextEncoder
from largescale.errors import DataError, Stopped
from tests.ranks import ROOT, Forked

RUN = {"folder": folder.main, "imagenet": imagenet.main, "webdataset": webdataset.main}
BAD = {"010.png": b"", "011.png": b"no image", "025.png": None}  # None: too small


def picture(i: int, side: int = 24) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (side + i % 3, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 pictures, of which three cannot be used."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(37):
        (root / f"{i:03d}.png").write_bytes(picture(i))
    for name, content in BAD.items():
        (root / name).write_bytes(picture(0, side=2) if content is None else content)
    os.utime(root, (time.time() - 100,) * 2)            # as of another day: it need not be listed twice
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pack(images: Path, out: Path, *more: Any, program: str = "folder") -> int:
    where = "--shards" if program == "webdataset" else "--images"
    args = [where, images, "--out", out, "--vae", "none", "--resolution", 16, "--rows-per-shard", 10, "--device", "cpu",
            "--workers", 2, *more]
    return RUN[program]([str(arg) for arg in args])


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def truth(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("truth") / "out"
    assert pack(images, out) == 0
    return out


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


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_number_of_ranks_does_not_matter(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             world_size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in reversed(range(world_size)):            # rank 0, which waits for the others, last
        monkeypatch.setenv("RANK", str(rank))
        assert pack(images, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(truth)


def command(images: Path, out: Path, *more: Any, code: str = "") -> list[str]:
    """The program's arguments for Python; `code` breaks it."""
    program = f"import os, sys, time; from data_prep import encoding, folder, packer; from largescale.data import parts\n{code}\nsys.exit(folder.main(sys.argv[1:]))"
    args = ["--images", images, "--out", out, "--vae", "none", "--resolution", 16, "--rows-per-shard", 10, "--device", "cpu", *more]
    return ["-c", program, *map(str, args)]


def start(images: Path, out: Path, rank: int, world_size: int, *more: Any, code: str = "") -> Forked:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return Forked(command(images, out, *more, code=code), env)


def start_with_pipes(images: Path, out: Path, *more: Any, code: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, *command(images, out, *more, code=code)], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ranks_at_once(images: Path, truth: Path, tmp_path: Path) -> None:
    ranks = [start(images, tmp_path / "out", rank, 3) for rank in range(3)]
    said = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert files(tmp_path / "out") == files(truth)


def test_rank_0_does_not_wait_for_one_that_failed(images: Path, truth: Path, tmp_path: Path) -> None:
    broken = "encoding.Encoders.encode = lambda self, batch: (time.sleep(1), 1 / 0)"
    ranks = [start(images, tmp_path / "out", 0, 2), start(images, tmp_path / "out", 1, 2, code=broken)]
    said = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 1] and "rank 1 has failed: division by zero" in said[0]
    ranks = [start(images, tmp_path / "out", rank, 2) for rank in range(2)]
    assert [rank.wait(900) for rank in ranks] == [0, 0] and files(tmp_path / "out") == files(truth)


def test_rank_0_does_not_wait_for_one_that_died(images: Path, truth: Path, tmp_path: Path) -> None:
    """Without a word, as one that the kernel killed for its memory."""
    died = "os.kill(os.getpid(), 9)"
    ranks = [start(images, tmp_path / "out", 0, 2, code="parts.GONE_S = 3"), start(images, tmp_path / "out", 1, 2, code=died)]
    said = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, -9] and "rank 1 is not at work" in said[0]
    ranks = [start(images, tmp_path / "out", rank, 2) for rank in range(2)]
    assert [rank.wait(900) for rank in ranks] == [0, 0] and files(tmp_path / "out") == files(truth)


def test_ranks_that_want_different_things(images: Path, tmp_path: Path) -> None:
    ranks = [start(images, tmp_path / "out", 0, 2), start(images, tmp_path / "out", 1, 2, "--min-side", 3)]
    said = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert ranks[0].returncode == 2 and any("What differs:\n  min_side: " in text for text in said)
    assert not (tmp_path / "out/manifest.json").exists()


def test_two_processes_cannot_be_the_same_rank(images: Path, tmp_path: Path) -> None:
    """One works until the other is refused."""
    slow = ("encode = encoding.Encoders.encode\ndef wait(self, batch):\n"
            f"    while not os.path.exists({str(tmp_path / 'refused')!r}): time.sleep(0.05)\n"
            "    return encode(self, batch)\nencoding.Encoders.encode = wait")
    both = [start(images, tmp_path / "out", 0, 1, code=slow) for _ in range(2)]
    deadline = time.monotonic() + 900
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "refused").touch()
    said = [process.communicate(timeout=900)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert any("another process packs into" in text and "as the same rank" in text for text in said)


def test_a_late_rank_finds_the_work_done(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes the manifest and removes packing/ between a late rank's look at the one and at the other."""
    out = tmp_path / "out"
    shutil.copytree(truth, out)
    looked = iter([False])
    monkeypatch.setattr(packer.Parts, "finished", property(lambda self: next(looked, True)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pack(images, out) == 0 and files(out) == files(truth)


@pytest.mark.parametrize("more", [("--batch-size", 1), ("--batch-size", 7, "--workers", 5)])
def test_batches_and_workers_do_not_matter(images: Path, truth: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    pack(images, tmp_path / "out", *more)
    assert files(tmp_path / "out") == files(truth)


def interrupted(self: packer.Packer) -> None:
    raise Stopped


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


@pytest.mark.parametrize("at", range(1, 15))
def test_stopped_at_any_write_it_goes_on(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str], at: int) -> None:
    """Stopped before the n-th renaming of a file; at most one shard is encoded twice."""
    calls = encoded = 0
    rename, decode_item = os.replace, packer.Packer.decode

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stopped
        rename(*args, **kwargs)

    def counting(self: packer.Packer, item: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return decode_item(self, item)

    monkeypatch.setattr(os, "replace", counted)
    monkeypatch.setattr(Path, "replace", lambda path, target: counted(path, target))
    monkeypatch.setattr(packer.Packer, "decode", counting)
    stopped = pack(images, tmp_path / "out")
    assert (stopped, "run the same command again" in capsys.readouterr().err) == ((75, True) if at <= 13 else (0, False))
    assert (tmp_path / "out/manifest.json").exists() == (at > 11)   # what follows is the card
    monkeypatch.setenv("WORLD_SIZE", "1")
    calls = 100
    assert pack(images, tmp_path / "out", "--batch-size", 3) == 0
    assert files(tmp_path / "out") == files(truth)
    assert 37 <= encoded <= 47


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop_it_goes_on(images: Path, truth: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The whole shards stay, the status asks for another start."""
    out = tmp_path / "out"
    slow = ("decode, n = packer.Packer.decode, 0\ndef wait(self, item):\n    global n\n    n += 1; print(flush=True)\n"
            "    while n > 20 and not packer.stop_requested(): time.sleep(0.01)\n"
            "    return decode(self, item)\npacking.Packer.decode = wait")
    process = start_with_pipes(images, out, "--workers", 1, code=slow)
    assert process.stdout and process.stderr
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(number)
    process.send_signal(number)                         # Slurm's comes twice
    _, err = process.communicate(timeout=900)
    assert process.returncode == 75 and "run the same command again" in err and "Traceback" not in err
    assert not (out / "manifest.json").exists()
    assert pack(images, out) == 0
    assert files(out) == files(truth)


def test_killed_it_goes_on(images: Path, truth: Path, tmp_path: Path) -> None:
    """With -9, at random moments, until it is done."""
    out, killed = tmp_path / "out", 0
    random = np.random.default_rng(0)
    slow = ("decode = packer.Packer.decode\n"
            "packer.Packer.decode = lambda self, item: (print(flush=True), time.sleep(0.03), decode(self, item))[2]")
    while not (out / "manifest.json").exists():
        process = start_with_pipes(images, out, "--workers", 1, code=slow)
        assert process.stdout and process.stderr
        begun = process.stdout.readline()               # to decode; or nothing was left to
        assert begun or process.wait(900) == 0, (process.returncode, process.stderr.read())
        try:
            # a shard takes 0.3 s, or longer on a slow machine, and is done in the end
            process.wait((0.3 + 0.5 * random.random()) * 1.2**killed)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed >= 1
    assert pack(images, out) == 0
    assert files(out) == files(truth)


def test_a_half_written_shard_is_made_again(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "finish", interrupted)
        assert pack(images, tmp_path / "out") == 75
    with pytest.raises(DataError, match="run the command that packed it again"):
        ShardDataset(tmp_path / "out")
    shard = tmp_path / "out/shard_00001.arrow"
    shard.write_bytes(shard.read_bytes()[:500])
    (tmp_path / "out/shard_00003.arrow").unlink()
    assert pack(images, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(truth)


def test_a_full_disk_loses_nothing(images: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        assert pack(images, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert "cannot write" in said and "free space, and run again" in said
    assert not list((tmp_path / "out").glob("*.arrow*"))
    assert pack(images, tmp_path / "out") == 0 and files(tmp_path / "out") == files(truth)


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


# ---- tar files: parts of a length that only reading tells


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tar files of 25 and 20 captioned images: more than two shards of ten, and exactly two."""
    for number, count in enumerate((25, 20)):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i:04d}.png", picture(100 * number + i))
                if i != 7:
                    add(tar, f"{i:04d}.txt", f"picture {i} of {number}".encode())
    return tmp_path / "*.tar"


def test_tar_files(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--text-encoder", "none")
    assert pack(tars, tmp_path / "one", *more, program="webdataset") == 0
    data = ShardDataset(tmp_path / "one", verify=True)
    assert [s["rows"] for s in data.manifest["shards"]] == [9, 10, 5, 9, 10] and data.manifest["captions"] == 43
    expected = [f"picture {i} of {n}" for n, count in enumerate((25, 20)) for i in range(count) if i != 7]
    assert data.texts(np.arange(len(data))) == [[text] for text in expected]
    assert [json.loads(line)["id"] for line in (tmp_path / "one/skipped.jsonl").read_text().splitlines()] == ["00000/0007", "00001/0007"]
    assert np.array_equal(data.gather(np.array([9]))["latent"][0], decode(picture(10), 16, 4))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert pack(tars, tmp_path / "three", *more, program="webdataset") == 0
    assert files(tmp_path / "three") == files(tmp_path / "one")


@pytest.mark.parametrize("at", range(1, 6))
def test_tar_files_stopped_and_gone_on_with(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    more = ("--text-encoder", "none", "--batch-size", 4)
    pack(tars, tmp_path / "truth", *more, program="webdataset")
    written, write, decoded, decode_item = 0, packer.Shard.write, 0, packer.Packer.decode

    def stopping(self: packer.Shard, path: Path) -> dict[str, Any]:
        nonlocal written
        written += 1
        if written == at:
            raise Stopped
        return write(self, path)

    def counting(self: packer.Packer, item: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode_item(self, item)

    monkeypatch.setattr(packer.Shard, "write", stopping)
    assert pack(tars, tmp_path / "out", *more, program="webdataset") == 75
    monkeypatch.setattr(packer.Packer, "decode", counting)
    assert pack(tars, tmp_path / "out", *more, program="webdataset") == 0
    assert files(tmp_path / "out") == files(tmp_path / "truth")
    assert decoded == [45, 35, 25, 20, 10][at - 1]      # the whole shards are not decoded again


def test_a_tar_that_is_cut_short_stops_the_packing(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = tmp_path / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    assert pack(tars, tmp_path / "out", "--text-encoder", "none", program="webdataset") == 2
    said = capsys.readouterr().err
    assert "00001.tar cannot be read to its end" in said and not (tmp_path / "out/manifest.json").exists()


def test_one_bad_sample_costs_one_line(tmp_path: Path) -> None:
    """Half an emoji; a name that is not UTF-8, which the list of what was left out must hold all the same."""
    odd = os.fsdecode(b"caf\xe9")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, caption in ("a", b'"fine"'), ("b", b'"so happy \\ud83d"'), (odd, b'"fine"'):
            add(tar, f"{name}.png", picture(1))
            add(tar, f"{name}.json", b'{"caption": %s}' % caption)
    assert pack(tmp_path / "0.tar", tmp_path / "out", "--text-encoder", "none", program="webdataset") == 0
    assert ShardDataset(tmp_path / "out", verify=True).texts(np.arange(1)) == [["fine"]]
    assert [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()] == [
        {"id": "0/b", "reason": r"its caption is not Unicode: so happy \ud83d"}, {"id": f"0/{odd}", "reason": "its name is not UTF-8"}]


def test_captions_that_are_cut_are_counted(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """A token a word: of "picture 3 of 1" four. None is cut where all just fit."""
    def load(spec: str, device: Any, dtype: Any, limit: int) -> TextEncoder:
        def encode(captions: list[str]) -> tuple[torch.Tensor, ...]:
            lengths = count(captions, limit)
            return torch.zeros(len(captions), max(lengths), 2), torch.zeros(len(captions), 3), torch.tensor(lengths)

        def count(captions: list[str], limit: int) -> list[int]:
            return [max(1, min(len(caption.split()), limit)) for caption in captions]

        return TextEncoder("fake", limit, 2, 3, encode, count)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "load_text_encoder", load)
    for limit, cut in (3, 43), (4, 0):
        out = tmp_path / str(limit)
        assert pack(tars, out, "--text-encoder", "fake", "--max-tokens", limit, program="webdataset") == 0
        assert ShardDataset(out).manifest["captions_cut"] == cut
        assert (", 43 captions (43 are cut at 3 tokens)," in capsys.readouterr().out) == (cut > 0)
        assert data_inspect.main([str(out)]) == 0
        assert ("a caption; 43 were longer, and are cut" in capsys.readouterr().out) == (cut > 0)


def test_captions_need_an_encoder_or_a_word(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(tars, tmp_path / "out", program="webdataset") == 2
    assert "or --text-encoder none to keep the texts only" in capsys.readouterr().err


# ---- encoders


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model.save_pretrained(path := tmp_path_factory.mktemp("vae"))
    return path


def test_moments_of_the_image_and_its_mirror(images: Path, vae: Path, tmp_path: Path) -> None:
    from largescale.encoders.vae import load_vae

    assert pack(images, tmp_path / "out", "--vae", vae) == 0
    data, encoder = ShardDataset(tmp_path / "out", verify=True), load_vae(str(vae), torch.device("cpu"))
    assert (data.info.kind, data.info.shape, data.info.scale_factor) == ("moments", (8, 8, 8), 0.5)
    assert data.info.encoders == {"vae": encoder.identity} and data.has_mirror
    pixels = torch.from_numpy(np.stack([decode(picture(i), 16, 4) for i in range(5)]))
    for flip in (False, True):
        rows = data.gather(np.arange(5), flip=np.full(5, flip))["latent"]
        expected = encoder.encode(pixels.flip(-1) if flip else pixels)
        torch.testing.assert_close(torch.from_numpy(rows).float(), expected.float(), atol=2e-3, rtol=2e-3)
    # Its card, with a picture by the map to colours; without the map there is none, and nothing is said of one.
    card = (tmp_path / "out/README.md").read_text()
    assert "- moments\n" in card and "- vae encoder: AutoencoderKL sha256:" in card and ", in fp32\n" in card and str(vae) not in card
    assert "latents of 34 images have, over their 4 channels, means of" in card and "PSNR of" in card
    assert "by a linear map of their latents to colours](images.png)" in card and np.asarray(Image.open(tmp_path / "out/images.png")).std() > 5
    for name in LATENT_RGB, "README.md", "images.png":
        (tmp_path / "out" / name).unlink()
    assert pack(images, tmp_path / "out", "--vae", vae) == 0
    assert "images.png" not in (tmp_path / "out/README.md").read_text() and not (tmp_path / "out/images.png").exists()
    assert pack(images, tmp_path / "plain", "--vae", vae, "--no-mirror") == 0
    assert not ShardDataset(tmp_path / "plain").has_mirror


def test_bytes_do_not_depend_on_threads_or_ranks(images: Path, vae: Path, tmp_path: Path) -> None:
    """Nor on how a launcher sets them; a resume with another batch size, which would change them, is refused."""
    torch.set_num_threads(2)
    assert pack(images, tmp_path / "one", "--vae", vae, "--batch-size", 4) == 0
    ranks = [start(images, tmp_path / "two", rank, 2, "--vae", vae, "--batch-size", 4, code="import torch; torch.set_num_threads(1)")
             for rank in range(2)]
    assert [rank.wait(900) for rank in ranks] == [0, 0]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    to_colours = np.array(json.loads((tmp_path / "one" / LATENT_RGB).read_text()))
    assert to_colours.shape == (ShardDataset(tmp_path / "one").info.x_shape[0] + 1, 3) and np.abs(to_colours).max() < 10
    assert pack(images, tmp_path / "one", "--vae", vae, "--batch-size", 3) == 2


def test_shards_of_different_encoders_do_not_mix(images: Path, truth: Path, vae: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    pack(images, tmp_path / "a", "--vae", vae)
    with torch.no_grad():
        other = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(vae)
        other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "vae")
    assert pack(images, tmp_path / "a", "--vae", tmp_path / "vae") == 2
    assert "holds another data set" in capsys.readouterr().err
    pack(images, tmp_path / "b", "--vae", tmp_path / "vae")
    # a shard of the one put into the other, with the manifest's size and hash corrected by hand
    shutil.copy(tmp_path / "b/shard_00001.arrow", tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    entry = json.loads((tmp_path / "b/manifest.json").read_text())["shards"][1]
    manifest["shards"][1] |= {key: entry[key] for key in ("bytes", "sha256")}
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"shard_00001.arrow is of another data set than the manifest: .*encoders"):
        ShardDataset(tmp_path / "a", verify=True)


def test_a_vae_that_does_not_fit_the_preset_is_said_by_the_dry_run(images: Path, vae: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "out", "--vae", vae)
    done = subprocess.run([sys.executable, "-m", "largescale.train", "dit_b2_ffhq256", "--data.path", tmp_path / "out", "--dry-run"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds moments of shape (4, 8, 8), the model takes (4, 32, 32), and these latents" in done.stderr and "another stride" in done.stderr


def test_every_thread_of_a_rank_is_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first one, where a stray allocation of each of eight ranks would take half a gigabyte."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    current: list[torch.device] = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 8, "set_device": current.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    packer.Packer(folder.Folder(images=tmp_path, out=tmp_path / "out", vae="none", resolution=16, device="cuda"))
    assert current == [torch.device("cuda", 3)]
