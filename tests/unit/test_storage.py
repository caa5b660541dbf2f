"""Data on slow shared storage: their order, and copies on the disks of nodes."""

from pathlib import Path

import pytest

from largescale.checkpoint.files import checkpoints
from largescale.host import machine
from largescale.host.machine import file_system, is_shared
from largescale.training import dry_run
from tests.conftest import RunHere, final_state


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
    assert f"order: full, each step 16 reads of 0.3 KiB anywhere in 8.53e-05 GB of {kind}" in said and "slow on" not in said
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
    assert [is_shared(kind) for kind in (*kinds, "fuse.sshfs", "tmpfs", "")] == [False, True, True, False, True, False, False]
    monkeypatch.setattr(machine, "_PROC", tmp_path / "nowhere")
    assert file_system(Path("/")) == ""
