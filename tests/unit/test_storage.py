"""Data on slow shared storage: their order, and copies on the disks of nodes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from largescale.checkpoint.files import checkpoints
from largescale.data.shards import ShardDataset
from largescale.data.stage import StagedCopy
from largescale.host import machine
from largescale.host.machine import file_system, is_shared
from largescale.training import dry_run
from tests.conftest import RunHere, final_state
from tests.ranks import ROOT


def test_a_run_in_blocks_is_resumed_bitwise_and_stays_in_blocks(run_here: RunHere, tmp_path: Path) -> None:
    """Over the end of an epoch: 300 rows are 19 steps of 16."""
    blocks = ("--data.order", "blocks")
    whole = run_here("--train.steps", 24, *blocks, output=tmp_path / "whole")
    for steps in (7, 21, 24):
        parts = run_here("--train.steps", steps, *blocks, output=tmp_path / "parts")
    assert whole.code == parts.code == 0, whole.err + parts.err
    assert parts.trace() == whole.trace()
    states = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert all((states[0][name] == states[1][name]).all() for name in states[0])

    other = run_here("--train.steps", 30, output=tmp_path / "parts")
    assert other.code == 2 and "data.order: blocks -> full" in other.err
    assert checkpoints(tmp_path / "parts")[0].step == 24


@pytest.mark.parametrize("kind", ["ext4", "lustre"])
def test_a_dry_run_says_which_order_to_take(kind: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "file_system", lambda path: kind)
    said = run_here("--dry-run").err
    assert f"order: full, each step 16 reads of 0.3 KiB anywhere in 85.3 KB of {kind}" in said and "slow on" not in said
    monkeypatch.setattr(dry_run, "_SOON_CACHED_BYTES", 1000)
    assert ("small reads are slow on lustre: take --data.stage DIR" in run_here("--dry-run").err) == (kind == "lustre")
    said = run_here("--dry-run", "--data.order", "blocks").err
    assert f"order: blocks, 16 x 64 neighbouring rows at a time, each read ahead by the rank that needs them in pieces of 0.02 MiB of {kind}" in said


def test_the_file_system_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(
        "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "23 22 0:40 / /lustre/a\\040b rw,relatime shared:5 - lustre 10.0.0.1@o2ib:/fs rw\n"
        "24 22 0:41 / /lustre rw - autofs systemd rw\n"
        "25 22 0:42 / /lustre rw - nfs4 host:/x rw\n"
    )
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    kinds = [file_system(Path(path)) for path in ("/home/x", "/lustre/a b/data", "/lustre/a", "/lustre2")]
    assert kinds == ["ext4", "lustre", "nfs4", "ext4"]
    assert [is_shared(kind) for kind in (*kinds, "fuse.sshfs", "fuse", "fuseblk", "")] == [False, True, True, False, True, True, False, False]
    monkeypatch.setattr(machine, "_PROC", tmp_path / "nowhere")
    assert file_system(Path("/")) == ""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_what_orders_do_to_a_sorted_set(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/mixing.py: of rows as they lie, of rows that are independent, and of blocks."""
    import mixing

    monkeypatch.setattr(mixing, "ROWS", 40_000)
    monkeypatch.setattr(mixing, "CLASSES", 100)
    monkeypatch.setattr(mixing, "STEPS", 4)
    sorted_rows, full, blocks = (mixing.figures(rows) for rows in (np.arange(40_000), mixing.ours("full"), mixing.ours("blocks")))
    assert sorted_rows["classes"] < 2 and sorted_rows["shards"] < 2 and sorted_rows["neighbours"] == 1 / 40_000
    assert abs(full["classes"] - 92) < 3 and full["shards"] == 10 and abs(full["neighbours"] - 0.293) < 0.01
    assert full["classes"] - 3 < blocks["classes"] <= 100 and blocks["neighbours"] < 0.3
    with pytest.raises(AssertionError, match="not every row once"):
        mixing.figures(np.zeros(40_000, int))
    assert mixing.markdown({"full": full}).splitlines()[2].startswith("| full | 9")


def test_slow_storage(benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/slow_storage.py without FUSE: the set whose shards are one file, a rank's jobs, how long a read takes."""
    monkeypatch.setitem(sys.modules, "mfusepy", SimpleNamespace(Operations=object))
    import slow_files
    import slow_storage

    monkeypatch.setattr(slow_storage, "SHAPE", (1, 2, 2))
    monkeypatch.setenv("RANK", "3")
    slow_storage.make_set(tmp_path / "set", 20)
    data = ShardDataset(tmp_path / "set", verify=True)
    assert len(data) == 20 * 4096 and len({path.stat().st_ino for path in (tmp_path / "set").glob("*.arrow")}) == 1
    (tmp_path / "local").mkdir()
    assert slow_storage.copy_set(str(data.path), str(tmp_path / "local"))["seconds"] > 0
    copy = StagedCopy(data.path, tmp_path / "local").folder
    monkeypatch.setattr(slow_storage, "NEEDED", 10**9)
    for order in ("full", "blocks"):
        read = slow_storage.read_batches(str(data.path), str(copy), order, prefetch=2, seconds=0)
        assert read["images"] == slow_storage.BATCH / slow_storage.RANKS and read["seconds"] > 0

    slept: list[float] = []
    monkeypatch.setattr(slow_files.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(slow_files.time, "sleep", slept.append)
    files = slow_files.SlowFiles(str(tmp_path / "set"), ms=5, mb_per_s=1)
    assert sorted(files.readdir("/", 0)) == sorted([".", "..", *(path.name for path in data.path.iterdir())])
    opened = files.open("/shard_00002.arrow", 0)
    contents = [files.read("/shard_00002.arrow", size, 100, opened) for size in (1000, 20_000, 20_000)]
    assert contents[1] == (data.path / "shard_00000.arrow").read_bytes()[100:20_100]
    assert slept == pytest.approx([0.005, 0.021, 0.041])  # the delay, and then the line that all reads share
    assert files.getattr("/shard_00002.arrow")["st_size"] == data.nbytes // 20 and files.release("", opened) == 0
