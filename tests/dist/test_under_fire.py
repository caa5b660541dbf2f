"""Whole or absent: kills at any call that writes, power cuts, bit rot. The next start finds the last completed save."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint import files
from largescale.checkpoint.files import (
    MANIFEST,
    MODEL_FILE,
    CheckpointDir,
    checkpoints,
    newest_valid,
    seal,
)
from largescale.checkpoint.weights import load_trained
from largescale.host.files import sha256
from tests.conftest import RunHere, assert_same_run
from tests.ranks import ranks_of

# ---- kills (see under_fire.py)


def under_fire(*args: Any, timeout_s: float = 3000) -> dict[str, Any]:
    (done,) = ranks_of("tests/dist/under_fire.py", *args, ranks=1, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout.splitlines()[-1])
    return result


def assert_hit(result: dict[str, Any], least: int) -> None:
    """Nothing wrong, after so many kills of each kind, in every kind of call."""
    assert result["wrong"] == []
    assert min(result["kills"].values()) >= least and result["moments"] > 0
    assert {call.split()[0] for call in result["at"]} >= {"create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"}
    assert set(result["found"]) == {"the last completed one", "the one being written"}


def test_the_writer_killed(tmp_path: Path) -> None:
    assert_hit(under_fire("writer", tmp_path, "--every", 13, "--moments", 10), least=17)


@pytest.mark.slow
def test_the_writer_killed_at_every_call(tmp_path: Path) -> None:
    """Killed, with a power cut that loses all that was not synced, with one that loses some; and at 100 moments."""
    assert_hit(under_fire("writer", tmp_path, "--every", 1, "--moments", 100, timeout_s=3000), least=200)


def test_a_broken_rule_is_found_out(tmp_path: Path) -> None:
    """The checks above see it when the writer leaves out a sync, or does things in another order."""
    found = under_fire("controls", tmp_path)
    assert [rule for rule, wrong in found.items() if wrong is None] == [] and len(found) == 12


def test_whole_runs_killed(tmp_path: Path, blobs: Path) -> None:
    """Two ranks, one of them killed at some call: after a few starts it is the run that was left in peace, to the bit."""
    result = under_fire("runs", tmp_path, blobs, "--runs", 2, timeout_s=6000)
    assert result["wrong"] == [] and result["kills"] >= 2


@pytest.mark.slow
def test_many_whole_runs_killed(tmp_path: Path, blobs: Path) -> None:
    result = under_fire("runs", tmp_path, blobs, "--runs", 20, "--seed", 1, timeout_s=3000)
    assert result["wrong"] == [] and len(result["runs"]) == 20 and result["kills"] >= 30


# ---- bit rot

SETTINGS = ("--train.steps", 12, "--checkpoint.every", 4)
FILES = (MODEL_FILE, "zero_pp_rank_0_mp_rank_00_optim_states.pt", MANIFEST)


def change(path: Path, at: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(name: str, run_here: RunHere, tmp_path: Path) -> None:
    """In any file, anywhere: found, named, and the checkpoint before is used."""
    truth = run_here(*SETTINGS, output=tmp_path / "truth").run
    newest = checkpoints(truth)[0]
    assert {path.name for path in newest.path.iterdir()} == set(FILES)
    path, at_random = newest.path / name, random.Random(name)
    size = path.stat().st_size
    for at in [0, size - 1, *(at_random.randrange(size) for _ in range(20))]:
        mask = 1 << at_random.randrange(8)
        change(path, at, mask)
        assert str(path) in (newest.problem() or ""), f"bit {mask:#x} at {at}"
        change(path, at, mask)
    assert newest.problem() is None
    for i in range(2):
        run = tmp_path / f"run{i}"
        shutil.copytree(truth, run)
        changed = checkpoints(run)[0].path / name
        change(changed, at_random.randrange(size), 1 << at_random.randrange(8))
        outcome = run_here(*SETTINGS, output=run)
        assert outcome.code == 0 and f"resumed {run} at step 8" in outcome.err
        assert f"skipping a damaged checkpoint: {changed}" in outcome.err
        assert_same_run(run, truth)


def test_every_byte_of_a_manifest(run_here: RunHere) -> None:
    """A size, a hash, the step, the state, a name, a space: each byte in turn, one bit of it and all of it."""
    newest, *older = checkpoints(run_here(*SETTINGS).run)
    path, at_random = newest.path / MANIFEST, random.Random(0)
    content = path.read_bytes()
    for at in range(len(content)):
        for mask in (1 << at_random.randrange(8), at_random.randrange(1, 256)):
            path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
            assert str(path) in (newest.problem(slice(0)) or ""), f"{content[max(0, at - 9) : at + 9]!r}, {mask:#x}"
    said: list[str] = []
    assert newest_valid(newest.path.parent.parent, [newest, *older], said.append)[0] == older[0] and str(path) in said[0]


def test_a_manifest_without_its_hash(run_here: RunHere) -> None:
    """That of an earlier version is read; from this one it is damage."""
    newest = checkpoints(run_here("--train.steps", 4).run)[0]
    manifest = newest.manifest()
    del manifest["sha256"]
    for version, problem in ((1, None), (2, f"{newest.path / MANIFEST} does not have the content that was written")):
        (newest.path / MANIFEST).write_text(json.dumps({**manifest, "format": version}, indent=1))
        assert newest.problem() == problem
    (newest.path / MANIFEST).write_text(seal(manifest))
    assert newest.problem() is None


def test_an_old_manifest_that_rots(run_here: RunHere) -> None:
    """Nobody reads it at the start. It neither ends the run at its next save nor is it removed."""
    run = run_here(*SETTINGS).run
    change(CheckpointDir.at(run, 4).path / MANIFEST, 0, 1)
    outcome = run_here("--train.steps", 20, "--checkpoint.every", 4, "--checkpoint.keep-last", 2)
    assert outcome.code == 0, outcome.err
    assert [c.step for c in checkpoints(run)] == [20, 16, 4]


# ---- nothing is opened before its hash has matched


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def with_code(path: Path, marker: Path) -> None:
    """Unpickling it would make the `marker`."""
    torch.save({"largescale": Evil(marker)}, path)


@pytest.mark.parametrize("name", FILES[:2])
def test_nothing_is_opened_before_its_hash_has_matched(name: str, run_here: RunHere, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_here(*SETTINGS).run
    newest, marker = checkpoints(run)[0], tmp_path / "marker"
    size = (newest.path / name).stat().st_size
    with_code(newest.path / name, marker)
    os.truncate(newest.path / name, size)  # it is not the size that tells
    hashed: list[Path] = []
    opened: list[Path] = []
    load = torch.load

    def hash_seen(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    def load_seen(file: Any, *args: Any, **options: Any) -> Any:
        assert file in hashed
        opened.append(file)
        return load(file, *args, **options)

    monkeypatch.setattr(files, "sha256", hash_seen)
    monkeypatch.setattr(torch, "load", load_seen)
    for use in (lambda: load_trained(run), lambda: run_here(*SETTINGS)):
        hashed.clear()
        opened.clear()
        use()
        assert {path.parent.name for path in opened} == {"step_00000008"} and not marker.exists()
        assert newest.path / name in hashed


def test_code_in_a_file_does_not_run(run_here: RunHere, tmp_path: Path) -> None:
    """Even where the manifest was made to match."""
    run = run_here(*SETTINGS).run
    newest, marker = checkpoints(run)[0], tmp_path / "marker"
    with_code(newest.path / MODEL_FILE, marker)
    manifest = newest.manifest()
    del manifest["sha256"]
    path = newest.path / MODEL_FILE
    manifest["files"][MODEL_FILE] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (newest.path / MANIFEST).write_text(seal(manifest))
    assert newest.problem() is None
    outcome = run_here("--train.steps", 16)
    assert outcome.code == 2 and f"{path} cannot be used" in outcome.err and "UnpicklingError" in outcome.err
    assert not marker.exists()
