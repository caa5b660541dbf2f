"""What data_prep.describe says of a set that is being packed: of all ranks, in one place."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep import describe, packer, progress
from data_prep.progress import Progress, describe_packing
from largescale.errors import Stopped
from largescale.host import lease
from tests.unit.packed_pictures import picture
from tests.unit.test_append import pack

BAR: Any = SimpleNamespace(update=lambda n: None, set_postfix=lambda **more: None)


def reports(folder: Path, rank: int, world_size: int, begin: float, seconds: float, per_second: float) -> None:
    """What a rank writes that packs so many images a second, from `begin` on."""
    now = begin
    made = Progress(folder, rank, world_size, BAR, lambda: now)
    while now < begin + seconds:
        now += 1
        made.update(int(per_second))


def test_how_far_all_ranks_are(tmp_path: Path) -> None:
    folder = tmp_path / "packing"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"info": {"name": "x"}}))
    progress.write_plan(folder, 10_000, 10, 7)
    for part, record in enumerate([{"items": 1000, "done": True, "skipped": [["a", "b"]]}, {"items": 400, "done": False, "skipped": []}]):
        (folder / f"part_{part:05d}.json").write_text(json.dumps(record))
    end = 100_000.0
    reports(folder, 0, 3, end - 1000, 1000, 2)          # as long as before
    reports(folder, 1, 3, end - 2000, 1000, 50)         # silent since
    reports(folder, 5, 8, end - 9000, 100, 50)          # of an earlier start
    found = dict(describe_packing(tmp_path, end))
    assert found["packing"] == "x: 1,400 of 10,000 images (14.0%), 1 of 10 parts" and found["left out"] == "8 so far"
    rate = found["rate"].split("; ")
    assert rate[0] == "2.0 images/s over the last 5.0 minutes" and rate[1].startswith("done in about 1 h 11 min, at ")
    assert found["ranks"] == "1 of 3 at work; rank 1 silent for 16 min, dead or stuck; rank 2 has not begun"
    (folder / "failed_2").write_text("no space")
    assert "; rank 2 has failed: no space" in dict(describe_packing(tmp_path, end))["ranks"]
    assert dict(describe_packing(tmp_path, end + 9000))["rate"] == "none: no rank is at work"
    reports(folder, 2, 3, end + 9000, 0, 1)             # has just begun
    assert dict(describe_packing(tmp_path, end + 9000))["rate"] == "not known yet"
    # Tar files: how many images there are is known of those that are done.
    progress.write_plan(folder, None, 10, 0)
    found = dict(describe_packing(tmp_path, end))
    assert found["packing"] == "x: 1,400 images, 1 of 10 parts" and "done in about 1 h 11 min" in found["rate"]


def test_ranks_that_were_killed(tmp_path: Path) -> None:
    """Of this machine at once; of another, and of older versions, only once they are silent."""
    folder = tmp_path / "packing"
    folder.mkdir()
    progress.write_plan(folder, 10_000, 10, 0)
    end = 100_000.0
    for rank in range(4):
        reports(folder, rank, 4, end - 100, 100, 2)
    killed = subprocess.Popen(["sleep", "600"])
    of_killed = {"pid": killed.pid, "started": lease.identity()["started"]}
    killed.kill()
    killed.wait()
    for rank, change in (1, of_killed), (2, of_killed | {"host": "another"}), (3, None):
        path = folder / f"rank_{rank}.json"
        report = json.loads(path.read_text())
        report["process"] = None if change is None else report["process"] | change
        path.write_text(json.dumps({key: value for key, value in report.items() if value is not None}))
    found = dict(describe_packing(tmp_path, end))
    assert found["ranks"] == "3 of 4 at work; rank 1 has ended" and found["rate"].startswith("6.0 images/s")
    assert dict(describe_packing(tmp_path, end + 9000))["ranks"].startswith("0 of 4 at work; rank 0 silent for 2 h 30 min, dead or stuck; rank 1 has ended; ")


def test_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real packing that is stopped; then an addition, while the set can be described."""
    for name, numbers in ("first", range(8)), ("more", range(6, 14)):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i:03d}.png").write_bytes(picture(i))
    out = tmp_path / "out"

    def said() -> dict[str, str]:
        capsys.readouterr()
        assert describe.main([str(out)]) == 0
        lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
        return {line[0]: line[-1].strip() for line in lines}

    def stop(self: Any) -> None:
        raise Stopped

    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    for source, more in ("first", ()), ("more", ("--append",)):
        with monkeypatch.context() as patch:
            patch.setattr(packer.Packer, "finish", stop)
            patch.setenv("WORLD_SIZE", "2")
            assert pack(tmp_path / source, out, *more) == 75
        lines = said()
        assert lines["adding to it" if more else "packing"] == f"folder-{source}: 5 of 8 images (62.5%), 1 of 2 parts"
        assert "images/s over the last" in lines["rate"] and lines["ranks"] == "0 of 2 at work, 1 done; rank 1 has not begun"
        assert ("data set" in lines) == bool(more)
        assert pack(tmp_path / source, out, *more) == 0
    lines = said()
    assert "packing" not in lines and "adding to it" not in lines and lines["added"] == "6 images of folder-more"
