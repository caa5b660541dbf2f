"""Packing that is stopped, killed, or out of disk space goes on where it was, to the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import packer
from largescale.data.shards import ShardDataset
from largescale.errors import DataError, Stopped
from tests.ranks import ROOT
from tests.unit.packed_pictures import command, files, interrupted, one_thread, pack  # noqa: F401


def start_with_pipes(images: Path, out: Path, *more: Any, code: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, *command(images, out, *more, code=code)], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
            "    return decode(self, item)\npacker.Packer.decode = wait")
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
    # Counted in images and not in seconds: a start may take any time before its first image, and any
    # for a shard. A part is saved before the next one begins, so that after 11 images one more is done.
    out, killed = tmp_path / "out", 0
    random = np.random.default_rng(4)
    while not (out / "manifest.json").exists():
        last = int(random.integers(5, 16))
        slow = (f"decode, n = packer.Packer.decode, 0\ndef wait(self, item):\n    global n\n    n += 1; print(flush=True)\n"
                f"    time.sleep(0.01 if n < {last + 3} else 3600)    # it does not end before it is killed\n"
                "    return decode(self, item)\npacker.Packer.decode = wait")
        process = start_with_pipes(images, out, "--workers", 1, code=slow)
        assert process.stdout and process.stderr
        begun = sum(bool(process.stdout.readline()) for _ in range(last))
        time.sleep(0.04 * random.random())
        if begun == last:
            process.send_signal(signal.SIGKILL)         # of a process that has ended by itself meanwhile nothing comes
        _, err = process.communicate()
        assert process.returncode == (-signal.SIGKILL if process.returncode else 0), (process.returncode, err)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 3
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
