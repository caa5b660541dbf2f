"""Repacked latents are the same to the byte on any number of ranks and wherever it was killed; a source that changes and two packers are
refused."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data_prep import describe, latents, packer, progress, ray_engine
from data_prep.dealing import Dealer
from data_prep.ray_engine import pack_with
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import Stopped
from largescale.host.files import try_lock
from tests.ranks import Forked
from tests.unit.latent_folders import MAKE, N, run, source_files, values
from tests.unit.packed_pictures import files, interrupted, one_thread  # noqa: F401
from tests.unit.test_ray_engine import PLACE, InProcess


@pytest.fixture(scope="module", params=MAKE)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "in"
    MAKE[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def truth(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("truth") / "out"
    assert run(source, out) == 0
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    data = ShardDataset(out, verify=True)
    return [row for number in range(len(data.manifest["shards"])) for row in data.rows(number)]


def test_the_shards_are_those_that_one_writer_writes(truth: Path, tmp_path: Path) -> None:
    """As older versions wrote them, which had one process and a ShardWriter."""
    data = ShardDataset(truth, verify=True)
    with ShardWriter(tmp_path, data.packed, 4) as writer:
        for row in rows_of(truth):
            writer.write(**row)
    written = files(tmp_path)
    shards = {name for name in written if name.endswith(".arrow")}
    assert len(shards) == 3 and all(written[name] == files(truth)[name] for name in shards)
    manifest = ShardDataset(tmp_path).manifest
    assert (manifest["fingerprint"], manifest["statistics"]) == (data.fingerprint, data.manifest["statistics"])


def test_stopped_at_any_write_it_goes_on(source: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the n-th renaming of a file; then two ranks finish it. What is whole is not read twice."""
    calls, at, read, rename, decode = 0, 0, 0, os.replace, latents.Stored.decode

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stopped
        rename(*args)

    def counting(self: latents.Stored, item: Any) -> Any:
        nonlocal read
        read += 1
        return decode(self, item)

    monkeypatch.setattr(latents.Stored, "decode", counting)
    stops = 0
    for at in range(1, 20):
        out = tmp_path / str(at)
        read = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            patch.setattr(Path, "replace", lambda path, target: counted(path, target))
            calls = 0
            status = run(source, out)
        if status == 0:
            break
        stops += 1
        assert status == 75
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            for rank in "1", "0":
                patch.setenv("RANK", rank)
                assert run(source, out) == 0
        assert files(out) == files(truth) and N <= read <= N + 4, at
    assert stops == 10                                  # 3 shards, 3 records, the list, the hashes, the manifest, the card


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_number_of_ranks_does_not_matter(source: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in reversed(range(world_size)):            # rank 0, which waits for the others, last
        monkeypatch.setenv("RANK", str(rank))
        assert run(source, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(truth)


def start(source: Path, out: Path, rank: int, world_size: int, code: str = "") -> Forked:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    program = f"import os, sys, time; from data_prep import latents, packer\n{code}\nsys.exit(latents.main(sys.argv[1:]))"
    return Forked(["-c", program, "--latents", str(source), "--out", str(out), "--rows-per-shard", "4"], env)


def test_ranks_at_once_of_which_one_is_killed(source: Path, truth: Path, tmp_path: Path) -> None:
    """With -9, in its first part."""
    dies = f"packer.Packer.batches = lambda *args: os.kill(os.getpid(), {signal.SIGKILL})"
    out = tmp_path / "out"
    second = start(source, out, 1, 2, dies)
    assert second.wait(900) == -signal.SIGKILL and (out / "packing/job.json").exists()
    ranks = [start(source, out, rank, 2) for rank in range(2)]
    said = [rank.communicate(timeout=900) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert files(out) == files(truth)


def test_ray_deals_the_same_parts_out(source: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.setenv(name, "0" if "RANK" in name else "1")
    monkeypatch.chdir(Path.cwd())
    options = latents.Latents(latents=source, out=tmp_path / "out", rows_per_shard=4, engine="ray")
    calls = InProcess(options, 2, {("pack", 1): "after"})  # type: ignore[arg-type]
    assert "9 images" in pack_with(Dealer(calls, 2, ray_engine._tell), "here")
    assert files(tmp_path / "out") == files(truth)


def test_while_it_is_packed_and_after(source: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        capsys.readouterr()
        assert describe.main([str(out)]) == 0
        return re.sub(" +", " ", capsys.readouterr().out)

    out = tmp_path / "out"
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "finish", interrupted)
        patch.setenv("WORLD_SIZE", "2")
        assert run(source, out) == 75
    lines = said()
    assert "packing in: 5 of 9 images (55.6%), 2 of 3 parts" in lines and "0 of 2 at work, 1 done; rank 1 has not begun" in lines
    assert run(source, out) == 0 and files(out) == files(truth)
    lines = said()
    assert "packed cropped and encoded by others, 4 rows a shard" in lines and f"source latents {source}" in lines
    # Once more it does nothing.
    before = files(out)
    assert run(source, out) == 0 and "already packed" in capsys.readouterr().out and files(out) == before


def test_two_packers_in_one_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "packing").mkdir(parents=True)
    lock = try_lock(out / "packing/rank_0.lock")
    assert lock and run(source, out) == 2
    assert "another process packs into" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")                     # which has another lock, and packs its part
    assert run(source, out) == 0
    lock.close()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run(source, out, "--scale-factor", 0.5) == 2 and "info.scale_factor: 1.0 there, 0.5 here" in capsys.readouterr().err
    assert run(source, out, "--rows-per-shard", 5) == 2 and "rows_per_shard: 4 there, 5 here" in capsys.readouterr().err
    assert run(source, out) == 0


def other_content(folder: Path) -> Callable[[], None]:
    """Other latents in every file, which keeps its size; returns what puts them back."""
    before = {path: path.read_bytes() for path in source_files(folder)}
    z = values(4, 8, 8)
    for path, content in before.items():
        if path.suffix == ".npy":
            np.save(path, np.load(path) + 1)
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
            save_file(tensors | {"latents": tensors["latents"] + 1}, path, metadata={"total_size": "5"})
        else:
            kind = np.float16 if path.suffix == ".mds" else np.float64
            for latent in z:
                content = content.replace(latent.astype(kind).tobytes(), (latent + 1).astype(kind).tobytes())
            path.write_bytes(content)
        assert path.stat().st_size == len(before[path]) and path.read_bytes() != before[path]

    def put_back() -> None:
        for path, content in before.items():
            path.write_bytes(content)

    return put_back


def test_a_source_that_changes(source: Path, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents of another extraction in files of the same size, while it is packed and after a kill; put back, it goes on."""
    out, finish, put_back = tmp_path / "out", packer.Packer.finish, []

    def change_and_finish(self: packer.Packer) -> None:
        put_back.append(other_content(source))
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "finish", change_and_finish)
        status = run(source, out)
    try:
        said = " ".join(capsys.readouterr().err.split())
        assert status == 2 and "has other latents than when packing began, in files of one size: the source changed while it was packed" in said
        assert run(source, out) == 2
        assert "has other latents than when packing began: the source changed while it was packed" in " ".join(capsys.readouterr().err.split())
        assert not (out / "manifest.json").exists()
    finally:
        put_back[0]()
    assert run(source, out) == 0 and files(out) == files(truth)


def test_a_source_of_another_size_or_that_is_gone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, finish = tmp_path / "out", packer.Packer.finish
    path = source_files(source)[-1]
    content = path.read_bytes()
    try:
        for change in (lambda: path.write_bytes(content + b"more")), (lambda: path.unlink()):
            with monkeypatch.context() as patch:
                patch.setattr(packer.Packer, "finish", lambda self, change=change: (change(), finish(self))[1])
                status = run(source, out)
            said = " ".join(capsys.readouterr().err.split())
            if path.exists():
                assert status == 2 and f"{path.name} has {len(content) + 4:,} bytes, and had {len(content):,} when packing began" in said
                path.write_bytes(content)
            else:
                assert status == 0                      # all that was needed of it has been read
        # Gone while it is needed, or before it is.
        read = packer.Packer.pack_part
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(packer.Packer, "pack_part", lambda self, *args: (path.unlink(missing_ok=True), read(self, *args))[1])
            assert run(source, tmp_path / "new") == 2 and path.name in capsys.readouterr().err
        # LightningDiT's files are listed nowhere.
        assert run(source, tmp_path / "newer") == (0 if path.suffix == ".safetensors" else 2)
        assert path.suffix == ".safetensors" or path.name in capsys.readouterr().err
        assert not (tmp_path / "new/manifest.json").exists()
    finally:
        path.write_bytes(content)


def test_a_source_that_moved_is_the_same(source: Path, truth: Path, tmp_path: Path) -> None:
    moved, out = shutil.copytree(source, tmp_path / "other"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer.Packer, "finish", interrupted)
        assert run(source, out) == 75
    assert run(moved, out) == 0 and files(out) == files(truth)


def test_a_set_that_an_older_version_packed(source: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read and described; packing over it, and adding to it, is refused, as nothing says that it is of this source."""
    data, out = ShardDataset(truth), tmp_path / "out"
    job = {"program": "data_prep.latents", "format": "MDS", "latents": str(source), "images": N}
    with ShardWriter(out, data.packed, 4, job=job) as writer:
        for row in rows_of(truth):
            writer.write(**row)
    before = files(out)
    assert describe.main([str(out), "--verify"]) == 0 and "data_prep.latents" in capsys.readouterr().out
    assert run(source, out) == 2 and "holds another data set, or a part of one; give another --out, or delete the folder" in capsys.readouterr().err
    assert run(source, out, "--append") == 2 and "was not packed by a program that prepares images" in capsys.readouterr().err
    (out / "manifest.json").unlink()                    # one that was killed
    assert run(source, out) == 2 and "holds shard_0000" in capsys.readouterr().err
    assert {name: content for name, content in before.items() if name != "manifest.json"} == files(out)
