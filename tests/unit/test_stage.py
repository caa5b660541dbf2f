"""Copies of data sets on a node's own disk: whole, verified, shared by processes, and no part of what a run is."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from largescale.checkpoint.files import checkpoints
from largescale.data import stage
from largescale.data.format import read_manifest
from largescale.data.shards import ShardDataset
from largescale.data.stage import StagedCopy, plan_copies
from largescale.data.writer import write_manifest
from largescale.errors import DataError, StorageError
from largescale.host.sizes import size_text
from tests.conftest import RunHere, make_blobs

NAMES = ["shard_00000.arrow", "shard_00001.arrow", "shard_00002.arrow"]
ENOUGH_S = 600.0


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a data set or of its copy."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "copying"}


def alter(file: Path) -> None:
    """Another byte in the middle, as many as before."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def filled(data: Path, folder: Path) -> Path:
    """The copy of a data set."""
    (copy,), _ = plan_copies([str(data)], str(folder))
    assert copy.fill(ENOUGH_S) and copy.bytes_to_copy() == 0
    return copy.folder


def grown(data: Path, path: Path) -> Path:
    """The data set with two more shards, as `--append` adds them."""
    more = make_blobs(path.with_name(f"{path.name}_more"), seed=5, rows=150, prefix="m")
    shutil.copytree(data, path)
    manifest = read_manifest(path)
    for entry in read_manifest(more)["shards"]:
        name = entry["file"].replace("shard_", "shard_a1_")
        shutil.copyfile(more / entry["file"], path / name)
        manifest["shards"].append(entry | {"file": name})
    write_manifest(path, manifest["info"], manifest["columns"], manifest["shards"])
    return path


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the shards: which file it is, and when it was written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.arrow")}


def in_child(work: Callable[[], Any]) -> int:
    """A process that does the work, and ends with status 0 where it succeeds."""
    process = os.fork()
    if not process:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return process


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_run_reads_the_copy_and_is_the_same_run(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    """Bitwise the same; the copy may move, and be left out, on resume; its folder appears nowhere in what a run is."""
    data, local, other = tmp_path / "data", tmp_path / "local", tmp_path / "other"
    shutil.copytree(blobs, data)
    plain = run_here("--train.steps", 8, data=data, output=tmp_path / "plain")
    first = run_here("--train.steps", 3, "--data.stage", local, data=data, output=tmp_path / "staged")
    assert first.code == 0, first.err
    copied = StagedCopy(data, local)
    assert f"data: {data} is read from {copied.folder}" in first.err and " copied in " in first.err
    assert contents(copied.folder) == contents(data)

    # What is read is the copy: a source that is altered, at the same size, changes nothing.
    for name in NAMES:
        alter(data / name)
    second = run_here("--train.steps", 5, "--data.stage", local, data=data, output=tmp_path / "staged")
    assert second.code == 0 and " copied in " not in second.err, second.err
    shutil.rmtree(data)
    shutil.copytree(blobs, data)
    third = run_here("--train.steps", 7, "--data.stage", other, data=data, output=tmp_path / "staged")
    last = run_here("--train.steps", 8, data=data, output=tmp_path / "staged")
    assert third.code == last.code == 0, third.err + last.err
    assert "data.stage" not in second.err + third.err + last.err and last.trace() == plain.trace()
    manifests = [checkpoints(tmp_path / name)[0].manifest()["state"] for name in ("plain", "staged")]
    assert manifests[0]["dataset"] == manifests[1]["dataset"]


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "sha', b"\0" * 700, b"[]", b"{}", b"[" * 100_000, None])
def test_a_copy_whose_manifest_is_broken(blobs: Path, tmp_path: Path, content: bytes | None) -> None:
    """It is written anew, and nothing else is; beside another copy it is in nobody's way."""
    copy = filled(blobs, tmp_path)
    shards = inodes(copy)
    (copy / "manifest.json").unlink()
    if content is not None:
        (copy / "manifest.json").write_bytes(content)
    other = filled(make_blobs(tmp_path / "other", seed=3), tmp_path)
    assert contents(other) == contents(tmp_path / "other")
    assert filled(blobs, tmp_path) == copy and contents(copy) == contents(blobs) and inodes(copy) == shards


def test_held_out_images_are_copied_too(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    held_out = make_blobs(tmp_path / "held_out", seed=7, rows=40, prefix="v")
    validation = ("--data.validation", held_out, "--telemetry.validation-every", 2, "--telemetry.validation-images", 4)
    staged = run_here("--train.steps", 2, *validation, "--data.stage", tmp_path / "local")
    assert staged.code == 0, staged.err
    for data in (blobs, held_out):
        assert contents(StagedCopy(data, tmp_path / "local").folder) == contents(data)
    said = run_here("--dry-run", *validation, "--data.stage", tmp_path / "local").err
    total = sum(StagedCopy(data, tmp_path).nbytes for data in (blobs, held_out))
    assert f"copies: {size_text(total)} in {tmp_path}/local on each node; on this machine 0 B are to be copied, " in said
    assert "B are free" in said and "anywhere in 85.3 KB" in said
    assert "B are free" not in run_here("--dry-run", "--data.stage", "/nowhere/local").err


def test_two_processes_share_the_work(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is copied by one of them, and each process leaves when all are there."""
    data = make_blobs(tmp_path / "data", rows=800)      # eight shards
    copy_file = StagedCopy._copy
    copied = tmp_path / "copied"

    def noted(self: StagedCopy, entry: dict[str, Any]) -> None:
        time.sleep(0.2)                                 # so that both have some, also where one begins late
        with copied.open("a") as file:
            file.write(f"{os.getpid()} {entry['file']}\n")
        copy_file(self, entry)

    monkeypatch.setattr(StagedCopy, "_copy", noted)
    processes = [in_child(lambda: filled(data, tmp_path / "local")) for _ in range(2)]
    assert [status_of(process) for process in processes] == [0, 0]
    assert contents(StagedCopy(data, tmp_path / "local").folder) == contents(data)
    lines = [line.split() for line in copied.read_text().splitlines()]
    assert sorted(name for _, name in lines) == [f"shard_{i:05d}.arrow" for i in range(8)]
    assert {int(process) for process, _ in lines} == {*processes}


def test_a_process_that_is_killed_leaves_the_rest_to_the_others(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that it copies is nobody else's until then, and half of it is never taken for the whole."""
    reading, halfway = os.pipe()
    with monkeypatch.context() as patch:
        def half(file: Any, source: Path) -> bytes:
            if file.tell():
                os.write(halfway, b"!")
                time.sleep(ENOUGH_S)
            return file.read(1000)

        patch.setattr(stage, "_read", half)
        slow = in_child(lambda: filled(blobs, tmp_path / "local"))
        assert os.read(reading, 1) == b"!"
    try:
        (copy,), _ = plan_copies([str(blobs)], str(tmp_path / "local"))
        assert not copy.fill(seconds=0.3) and copy.missing() == [0]
        assert (copy.folder / "shard_00000.arrow.tmp").exists() and not (copy.folder / "manifest.json").exists()
    finally:
        os.kill(slow, signal.SIGKILL)
    assert status_of(slow) == -signal.SIGKILL
    before = (copy.folder / NAMES[1]).stat().st_mtime_ns
    assert contents(filled(blobs, tmp_path / "local")) == contents(blobs)
    assert (copy.folder / NAMES[1]).stat().st_mtime_ns == before


def test_a_disk_that_fills_is_one_clear_error(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    """Nothing half copied stays, and what is whole is used the next time."""
    local = tmp_path / "local"
    small = make_blobs(tmp_path / "small", rows=101)    # a shard of 100 rows, and one of 1
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        failed = run_here("--data.stage", local, data=small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failed.code == 75 and not failed.run.exists()
    assert f"error: cannot write to --data.stage {StagedCopy(small, local).folder} on " in failed.err
    assert "File too large; free space there" in failed.err and failed.err.count("error:") == 1
    assert {*contents(StagedCopy(small, local).folder)} <= {NAMES[1]}
    assert contents(filled(small, local)) == contents(small)


def test_what_does_not_fit_is_refused_with_sizes(run_here: RunHere, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is copied; by what is still missing, and with what else lies there."""
    local = tmp_path / "local"
    other = make_blobs(tmp_path / "other", seed=3)
    filled(other, local)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    refused = run_here("--data.stage", local)
    assert refused.code == 2 and not StagedCopy(blobs, local).folder.exists()
    name = StagedCopy(other, local).folder.name
    assert f"has 30 KB free, and 85.3 KB of {blobs} (85.3 KB) are not there yet" in refused.err
    assert f"delete what is not needed any more in {local} ({name}: blobs)" in refused.err
    assert plan_copies([str(other)], str(local))[1] == 0
    with monkeypatch.context() as patch:                # all but one of three files
        patch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
        (filled(blobs, local) / NAMES[2]).unlink()
    assert plan_copies([str(blobs)], str(local))[1] == (blobs / NAMES[2]).stat().st_size


def test_the_folder_of_another_set_and_one_half_copied(blobs: Path, tmp_path: Path) -> None:
    """Each set has a folder of its own there, also where it was packed anew as other bytes."""
    local, other = tmp_path / "local", make_blobs(tmp_path / "other", seed=3)
    assert filled(other, local) != filled(blobs, local)
    folder = StagedCopy(blobs, local).folder
    assert contents(folder) == contents(blobs) and contents(StagedCopy(other, local).folder) == contents(other)
    assert ShardDataset(folder, verify=True).fingerprint == ShardDataset(blobs).fingerprint

    (folder / NAMES[0]).write_bytes((blobs / NAMES[0]).read_bytes()[:5000])
    (folder / NAMES[1]).rename(folder / f"{NAMES[1]}.tmp")
    (folder / "manifest.json").unlink()
    assert StagedCopy(blobs, local).missing() == [0, 1]
    assert contents(filled(blobs, local)) == contents(blobs)


def test_of_a_set_that_has_grown_the_new_shards_are_copied(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that has room for no more; a job that reads the older copy is not disturbed, and either copy may go."""
    local, data = tmp_path / "local", grown(blobs, tmp_path / "data")
    before = filled(blobs, local)
    job = ShardDataset(blobs)
    job.read_copy(before)
    rows = job.gather(np.arange(300))["latent"]
    old, new = inodes(before), [data / f"shard_a1_{i:05d}.arrow" for i in range(2)]
    size = sum(file.stat().st_size for file in new)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    (copy,), needed = plan_copies([str(data)], str(local))
    assert needed == size and copy.files_to_link() == 3
    copied, copy_file = [], StagedCopy._copy
    monkeypatch.setattr(StagedCopy, "_copy", lambda self, entry: copied.append(entry["file"]) or copy_file(self, entry))
    after = filled(data, local)
    assert copied == [file.name for file in new] and after != before
    assert contents(after) == contents(data) and contents(before) == contents(blobs)
    assert inodes(before) == old and old.items() < inodes(after).items()

    # Back to the older set, and on: nothing is copied for either.
    assert plan_copies([str(blobs)], str(local))[1] == plan_copies([str(data)], str(local))[1] == 0
    shutil.rmtree(after)
    assert np.array_equal(job.gather(np.arange(300))["latent"], rows) and contents(before) == contents(blobs)
    after = filled(data, local)
    shutil.rmtree(before)
    assert ShardDataset(after, verify=True).fingerprint == ShardDataset(data).fingerprint
    assert np.array_equal(job.gather(np.arange(300))["latent"], rows)


@pytest.mark.parametrize("at", ["the second link", "half of a new shard"])
def test_a_kill_while_a_grown_set_is_copied(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The older copy is what it was: nothing is ever written to a file that both have."""
    local, data = tmp_path / "local", grown(blobs, tmp_path / "data")
    before = filled(blobs, local)
    old = inodes(before)
    link, left = os.link, 1

    def second(*args: Any) -> None:
        nonlocal left
        link(*args)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def half(file: Any, source: Path) -> bytes:
        if file.tell():
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(file.read(1000))

    with monkeypatch.context() as patch:
        if at == "the second link":
            patch.setattr(os, "link", second)
        else:
            patch.setattr(stage, "_read", half)
        assert status_of(in_child(lambda: filled(data, local))) == -signal.SIGKILL
    copy = StagedCopy(data, local)
    assert copy.missing() == ([2, 3, 4] if at == "the second link" else [3, 4]) and not (copy.folder / "manifest.json").exists()
    assert contents(filled(data, local)) == contents(data)
    assert inodes(before) == old and contents(before) == contents(blobs)


@pytest.mark.parametrize("case", ["altered", "cut short", "gone", "of another user", "no links", "of a newer version", "another set"])
def test_what_another_copy_cannot_give_is_copied(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    local, data = tmp_path / "local", grown(blobs, tmp_path / "data")
    before = filled(make_blobs(tmp_path / "other", seed=3) if case == "another set" else blobs, local)
    file = before / NAMES[1]
    taken = {*NAMES}
    if case == "altered":
        alter(file)
    elif case == "cut short":
        os.truncate(file, 5000)
    elif case == "gone":
        file.unlink()
    if case in ("altered", "cut short", "gone"):
        taken -= {NAMES[1]}
    else:
        taken = set()
    if case == "of a newer version":
        (before / "manifest.json").write_text((before / "manifest.json").read_text().replace('"format": 1', '"format": 99'))
    with monkeypatch.context() as patch:
        if case == "of another user":
            patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        if case == "no links":
            patch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
        then = contents(before)
        after = filled(data, local)
    assert contents(after) == contents(data) and contents(before) == then
    assert inodes(before).items() & inodes(after).items() == {item for item in inodes(before).items() if item[0] in taken}


def test_a_shard_of_the_set_that_is_another_now(blobs: Path, tmp_path: Path) -> None:
    """Packed anew, at the same size and under the same name: the manifest's hash tells."""
    data = grown(blobs, tmp_path / "data")
    before = filled(data, tmp_path / "local")
    other = make_blobs(tmp_path / "other", seed=3)
    shutil.copyfile(other / NAMES[0], data / NAMES[0])
    manifest = read_manifest(data)
    shards = [read_manifest(other)["shards"][0], *manifest["shards"][1:]]
    write_manifest(data, manifest["info"], manifest["columns"], shards)
    after = filled(data, tmp_path / "local")
    assert contents(after) == contents(data) != contents(before)
    assert {name for name, file in inodes(after).items() if inodes(before)[name] != file} == {NAMES[0]}


def test_an_altered_copy_and_an_altered_source(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    data, local = tmp_path / "data", tmp_path / "local"
    shutil.copytree(blobs, data)
    copy = filled(data, local)
    alter(copy / NAMES[1])
    found = run_here("--data.stage", local, "--data.verify", data=data)
    assert found.code == 2
    assert f"{copy / NAMES[1]} was altered: its hash is not the manifest's; delete this copy of {data}, and run again" in found.err
    (copy / NAMES[1]).unlink()
    alter(data / NAMES[1])
    with pytest.raises(DataError, match=rf"^{data / NAMES[1]} was altered: its hash is not the manifest's; restore the file$"):
        filled(data, local)
    assert NAMES[1] not in contents(copy) and f"{NAMES[1]}.tmp" not in contents(copy)
    (data / NAMES[1]).unlink()
    with pytest.raises(DataError, match="shard_00001.arrow is missing; restore the file"):
        filled(data, local)


def test_a_disk_that_returns_something_else(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.sha256
    monkeypatch.setattr(stage, "sha256", lambda path: "0f" if path.suffix == ".tmp" else real(path))
    with pytest.raises(StorageError, match=r"shard_00000.arrow.tmp is not what was written to it, on .*; its disk is damaged"):
        filled(blobs, tmp_path / "local")
    assert not contents(StagedCopy(blobs, tmp_path / "local").folder)


def test_a_disk_that_is_read_only_is_not_told_to_be_full(run_here: RunHere, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node's may be writable: the batch script may start the run again."""
    def refuse(path: Path, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused = run_here("--data.stage", tmp_path / "local")
    assert refused.code == 75 and "Read-only file system; give another folder, or take another node" in refused.err


def test_what_is_no_folder_for_copies(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    refused = run_here("--data.stage", blobs)
    assert refused.code == 2 and f"--data.stage {blobs} is a packed data set; give a folder for copies" in refused.err
    (tmp_path / "file").touch()
    refused = run_here("--data.stage", tmp_path / "file")
    assert refused.code == 2 and f"--data.stage {tmp_path}/file is a file; give a folder for copies" in refused.err
    refused = run_here("--data.stage", tmp_path / "not mounted/local")
    assert refused.code == 2 and not (tmp_path / "not mounted").exists()
    assert "No such file or directory; give a folder on the node's own disk that is there" in refused.err


def test_a_run_that_is_asked_to_stop_while_it_copies(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_file = StagedCopy._copy

    def asked(self: StagedCopy, entry: dict[str, Any]) -> None:
        copy_file(self, entry)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StagedCopy, "_copy", asked)
    stopped = run_here("--data.stage", tmp_path / "local")
    assert stopped.code == 75 and f"asked to stop while data were copied to {tmp_path}/local; nothing is lost" in stopped.err
    assert not stopped.run.exists() and len([*tmp_path.glob("local/*/*.arrow")]) == 1
