"""Drawing samples that is stopped, or whose ranks die, goes on where it was."""

import json
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import sample
from eval.drawing import sample_set
from largescale.data.parts import Parts
from largescale.errors import DataError, Stopped
from largescale.host import signals
from largescale.models.dit import DiT
from tests.ranks import Forked
from tests.unit.drawn_samples import draw, mtimes, one_thread, rows, write_export  # noqa: F401


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


@pytest.mark.parametrize("shards", [0, 1, 2])
@pytest.mark.parametrize("how", ["full disk", "asked to stop"])
def test_goes_on_where_it_was(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(export, truth := tmp_path / "truth", "--cfg-scale", "1.5", "--num-samples", "17")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        whole, save = [], sample_set.SampleSet.save

        def breaks(self: sample_set.SampleSet, part: int, *args: Any) -> None:
            if len(whole) == shards:
                if how == "full disk":
                    raise OSError(28, "No space left on device")
                signals._requested = True
                raise Stopped
            save(self, part, *args)
            whole.append(part)

        patch.setattr(sample_set.SampleSet, "save", breaks)
        assert draw(export, out, "--cfg-scale", "1.5", "--num-samples", "17") == (2 if how == "full disk" else 75)
    assert not (out / "cfg1.5/manifest.json").exists()
    said = capsys.readouterr().err
    assert "run the same command again" in said
    signals._requested = False
    before = mtimes(out)
    assert draw(export, out, "--cfg-scale", "1.5", "--num-samples", "17") == 0
    assert f"{17 - 6 * shards} drawn now" in capsys.readouterr().out
    kept = [key for key, when in mtimes(out).items() if before.get(key) == when and "shard" in key]
    assert len(kept) == shards
    for one, two in zip(rows(truth / "cfg1.5"), rows(out / "cfg1.5"), strict=True):
        assert np.array_equal(one, two)  # equal batches: bitwise
    assert (truth / "cfg1.5/manifest.json").read_bytes() == (out / "cfg1.5/manifest.json").read_bytes()


def test_asked_to_stop_while_drawing(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one evaluation of the model; what is whole stays."""
    asked = []
    forward = DiT.forward

    def model(self: DiT, *args: Any) -> Any:
        asked.append(len(args[0]))
        signals._requested = len(asked) == 11           # in the third of the first shard's and second shard's batches
        return forward(self, *args)

    monkeypatch.setattr(DiT, "forward", model)
    assert draw(export, tmp_path / "out", "--cfg-scale", "1.5") == 75
    assert len(asked) == 11
    assert [path.name for path in tmp_path.rglob("shard*")] == ["shard_00000.arrow"]


def test_ranks_that_die_and_come_back_draw_the_same_set(export: Path, tmp_path: Path) -> None:
    """Two ranks, of which each is killed once, then three, then one: every image is the one that one process draws."""
    args = [export, "--num-samples", "60", "--steps", "20", "--cfg-scale", "1.5", "--batch-size", "4", "--shard-size",
            "4", "--device", "cpu"]
    draw_ranks = partial(start_ranks, "eval.sample", *args, "--out", tmp_path / "many")
    for victim in (1, 0):
        ranks = draw_ranks(world_size=2)
        had = len(list(tmp_path.glob("many/cfg1.5/shard_*.arrow")))
        deadline = time.monotonic() + 900
        while len(list(tmp_path.glob("many/cfg1.5/shard_*.arrow"))) < had + 3:
            assert time.monotonic() < deadline and None in [rank.poll() for rank in ranks], [r.communicate() for r in ranks]
            time.sleep(0.01)
        ranks[victim].kill()
        ranks[1 - victim].terminate()                   # as Slurm does; rank 0 alone would wait for the dead one
        # 75, or -15 of one that was still starting, which the batch script takes for the same
        assert ranks[victim].wait() == -9 and ranks[1 - victim].wait(900) in (75, -15)
        assert not (tmp_path / "many/cfg1.5/manifest.json").exists()
    ranks = draw_ranks(world_size=3)
    assert [rank.wait(900) for rank in ranks] == [0, 0, 0], [rank.communicate() for rank in ranks]
    assert sample.main([*map(str, args), "--out", str(tmp_path / "one")]) == 0
    for many, one in zip(rows(tmp_path / "many/cfg1.5"), rows(tmp_path / "one/cfg1.5"), strict=True):
        assert np.array_equal(many, one)
    many_says, one_says = (json.loads((tmp_path / n / "cfg1.5/provenance.json").read_text()) for n in ("many", "one"))
    assert [with_["world_size"] for with_ in many_says.pop("drawn_with")] in ([2, 3], [3, 2])
    assert [with_["world_size"] for with_ in one_says.pop("drawn_with")] == [1]
    assert many_says == one_says


def test_ranks_that_replace(export: Path, tmp_path: Path) -> None:
    """None of them writes into, or takes for theirs, what rank 0 has still to remove."""
    args = [export, "--out", tmp_path / "out", "--num-samples", "24", "--steps", "4", "--cfg-scale", "1.5", "--shard-size",
            "4", "--device", "cpu"]
    assert sample.main([*map(str, args)]) == 0
    before = rows(tmp_path / "out/cfg1.5")[0]
    ranks = start_ranks("eval.sample", *args, "--seed", "1", "--replace", world_size=3)
    assert [rank.wait(900) for rank in ranks] == [0, 0, 0], [rank.communicate() for rank in ranks]
    after = rows(tmp_path / "out/cfg1.5")[0]
    assert after.shape == before.shape and (after != before).any(axis=(1, 2, 3)).all()


def test_work_that_goes_on_is_not_replaced(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor disturbed by a command that is refused."""
    args = [export, "--out", tmp_path / "out", "--num-samples", "60", "--steps", "20", "--cfg-scale", "1.5", "--shard-size",
            "4", "--device", "cpu"]
    ranks = start_ranks("eval.sample", *args, world_size=2)
    while len(list(tmp_path.glob("out/cfg1.5/shard_*.arrow"))) < 2:
        assert None in [rank.poll() for rank in ranks]
        time.sleep(0.01)
    assert sample.main([*map(str, args), "--seed", "1", "--replace"]) == 2
    assert "a process still works in" in capsys.readouterr().err
    refused = start_ranks("eval.sample", *args, "--seed", "1", world_size=2)
    assert [rank.wait(900) for rank in refused] == [2, 2]
    assert [rank.wait(900) for rank in ranks] == [0, 0], [rank.communicate() for rank in ranks]
    assert json.loads((tmp_path / "out/cfg1.5/provenance.json").read_text())["sampling"]["seed"] == 0


def test_the_word_of_a_rank_that_owes_nothing_does_not_count(tmp_path: Path) -> None:
    """It is that of a command that was refused, once the rank of this job had done its parts."""
    done = {"done": True, "items": 0, "captions": 0, "columns": [], "shards": [], "skipped": []}
    ours = [Parts(tmp_path, {"seed": 0}, 3, rank, 3) for rank in range(3)]
    assert all(parts.claim() for parts in ours)
    for part in (0, 1):
        ours[part].save(part, done)
    ours[1].close()
    other = Parts(tmp_path, {"seed": 1}, 3, 1, 3)
    with pytest.raises(DataError, match="What differs:\n  seed: 0 there, 1 here") as refused:
        other.claim()
    other.failed(refused.value)
    assert (tmp_path / "packing/failed_1").exists()
    late = threading.Timer(0.2, ours[2].save, (2, done))
    late.start()
    assert len(ours[0].all_records()) == 3
    for parts in ours:
        parts.close()


def test_a_shard_of_another_job_does_not_count(export: Path, tmp_path: Path) -> None:
    """Of a process that had not noticed that its job was replaced."""
    args = [str(export), "--out", str(tmp_path / "out"), "--num-samples", "12", "--steps", "4", "--cfg-scale", "1.5",
            "--shard-size", "4", "--device", "cpu"]
    finish = sample_set.SampleSet.finish
    for seed in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(sample_set.SampleSet, "finish", lambda self: 1 / 0)
            sample.main([*args, "--seed", seed, "--replace"])
        if seed == "0":
            kept = {path: path.read_bytes() for path in tmp_path.rglob("*_00001.*")}
            assert len(kept) == 2
    for path, content in kept.items():
        path.write_bytes(content)
    assert sample_set.SampleSet.finish is finish and sample.main([*args, "--seed", "1"]) == 0
    mixed = rows(tmp_path / "out/cfg1.5")[0]
    assert sample.main([*args[:2], str(tmp_path / "truth"), *args[3:], "--seed", "1"]) == 0
    assert np.array_equal(mixed, rows(tmp_path / "truth/cfg1.5")[0])


def start_ranks(program: str, *args: Any, world_size: int) -> list[Forked]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    return [Forked(["-m", program, *args], env | {"RANK": str(rank)}) for rank in range(world_size)]
