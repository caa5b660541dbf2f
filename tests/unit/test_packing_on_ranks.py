"""What comes out of packing does not depend on ranks, on those that fail or die, or on those that come late."""

import shutil
import time
from pathlib import Path

import pytest

from data_prep import packer
from tests.unit.packed_pictures import files, one_thread, pack, start  # noqa: F401


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_number_of_ranks_does_not_matter(images: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             world_size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in reversed(range(world_size)):            # rank 0, which waits for the others, last
        monkeypatch.setenv("RANK", str(rank))
        assert pack(images, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(truth)


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
