"""Packing on Ray: what does not need Ray. Parts are dealt out, what dies goes to another, ranks and Ray do not mix, and every
node has what it needs. tests/dist/test_ray.py has the real cluster."""

import json
import os
import re
from collections import deque
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from data_prep import dealing, progress, ray_engine, ray_worker
from data_prep.dealing import BEGIN, Dealer, Lost
from data_prep.folder import Folder
from data_prep.ray_engine import pack_with, room
from data_prep.ray_worker import Wanted, Worker, given_files, marked, versions
from largescale.data import parts
from largescale.data.parts import Parts
from largescale.errors import ConfigError, DataError, Stopped
from largescale.host.files import try_lock
from tests.ranks import free_port
from tests.unit.packed_pictures import files, one_thread, pack  # noqa: F401

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def wanted(out: Path, **more: Any) -> Wanted:
    """What this machine has; the marker is there where the set's folder for packing is."""
    return Wanted(**{"folder": os.getcwd(), "out": str(out), "marker": str(out), "files": {}, "versions": versions(), **more})


class InProcess:
    """Workers of this process. `deaths`: what ends a worker, before its work ("before") or after it; a worker that died is made anew."""

    def __init__(self, options: Folder, workers: int, deaths: dict[Any, str]) -> None:
        self.options, self.count, self.deaths = options, workers, deaths
        self.workers: dict[int, Worker] = {}
        self.calls: deque[tuple[int, tuple[Any, ...]]] = deque()
        self.done: list[tuple[int, tuple[Any, ...]]] = []

    def start(self, worker: int, method: str, *arguments: Any) -> None:
        self.calls.append((worker, (method, *arguments)))

    def wait(self) -> list[tuple[int, Any]]:
        worker, work = self.calls.popleft()
        if work == BEGIN:
            self.options.out.mkdir(exist_ok=True)
            self.workers[worker] = Worker(self.options, wanted(self.options.out), worker, self.count, 1)
        death = self.deaths.pop(work[:2], None)
        result = Lost("killed") if death == "before" else getattr(self.workers[worker], work[0])(*work[1:])
        self.done.append((worker, work))
        return [(worker, Lost("killed") if death else result)]


@pytest.fixture
def in_process(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in PLACE:
        monkeypatch.setenv(name, "0" if "RANK" in name else "1")
    monkeypatch.chdir(Path.cwd())

    def calls(deaths: dict[Any, str], workers: int = 2) -> InProcess:
        options = Folder(images=images, out=tmp_path / "out", vae="none", resolution=16, rows_per_shard=10, device="cpu", workers=2, engine="ray")
        return InProcess(options, workers, deaths)

    return calls


def test_what_dies_goes_to_another(in_process: Any, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it has packed anything, after it has packed all without a word, and when the set was finished: the same to the byte."""
    calls = in_process({("pack", 1): "before", ("pack", 2): "after", ("finish", "37"): ""})
    line = pack_with(Dealer(calls, 2, ray_engine._tell), "here")
    assert files(tmp_path / "out") == files(truth) and "34 images" in line and ", here; 3 left out" in line
    assert [work[1] for _, work in calls.done if work[0] == "pack"].count(1) == 2
    said = capsys.readouterr().err
    assert "37 images; here" in said and "and its work (pack 1) goes to another" in said and "37/37" in said
    # Done again, it does nothing.
    assert "already packed" in pack_with(Dealer(in_process({}), 2), "here")


def test_finished_by_one_that_died(in_process: Any, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = in_process({})
    ended = []

    def wait() -> list[tuple[int, Any]]:
        (worker, result), = InProcess.wait(calls)
        if isinstance(result, str) and not ended:
            ended.append(result)
            return [(worker, Lost("killed"))]
        return [(worker, result)]

    monkeypatch.setattr(calls, "wait", wait)
    assert pack_with(Dealer(calls, 2), "here") and ended and files(tmp_path / "out") == files(truth)


@pytest.mark.parametrize("first", ["ray", "ranks"])
def test_either_goes_on_with_what_the_other_has_begun(first: str, in_process: Any, images: Path, truth: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stops = lambda: len(list((out / "packing").glob("part_*.json"))) >= 2                                       # noqa: E731
        patch.setattr("data_prep.packer.stop_requested" if first == "ranks" else "data_prep.dealing.stop_requested", stops)
        if first == "ranks":
            assert pack(images, out) == 75
        else:
            calls = in_process({})
            with pytest.raises(Stopped):
                pack_with(Dealer(calls, 2), "here")
            for worker in calls.workers.values():       # as Ray does
                assert worker._packer
                worker._packer.parts.close()
            for name in PLACE:
                monkeypatch.delenv(name)
    assert not (out / "manifest.json").exists()
    if first == "ranks":
        pack_with(Dealer(in_process({}), 2), "here")
    else:
        assert pack(images, out) == 0
    assert files(out) == files(truth)


class Dies:
    """Workers that begin, and die over everything else; with `again`, whatever they do."""

    def __init__(self, again: bool = False) -> None:
        self.again, self.calls, self.began = again, deque[tuple[int, str]](), 0

    def start(self, worker: int, method: str, *arguments: Any) -> None:
        self.calls.append((worker, method))

    def wait(self) -> list[tuple[int, Any]]:
        if not self.calls:
            return []
        worker, method = self.calls.popleft()
        self.began += method == "begin"
        return [(worker, "begun" if method == "begin" and not (self.again and self.began > 3) else Lost("signal 11"))]


def test_a_part_that_kills_everyone() -> None:
    with pytest.raises(DataError, match=r"^5 processes died over one piece of work \(pack 7\), the last: signal 11; see the logs of Ray"):
        Dealer(Dies(), 3).deal([("pack", 7)], print)


def test_no_worker_stays_alive() -> None:
    said: list[str] = []
    with pytest.raises(DataError, match="^no worker stays alive, the last: signal 11; see the logs of Ray"):
        Dealer(Dies(again=True), 3, said.append).deal([("pack", 7)], print)
    assert "worker 1 is given up: signal 11" in said


def test_a_cluster_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "REPORT_S", -1.0)
    said: list[str] = []
    calls = Dies()
    monkeypatch.setattr(calls, "wait", lambda: [] if not said else Dies.wait(calls))
    assert Dealer(calls, 2, said.append).begin() == "begun"
    assert said == ["no worker is ready: 2 wait for room, or load the encoders"]


# ---- two packers in one folder


def make(out: Path, engine: str | None, world_size: int = 1) -> Parts:
    made = Parts(out, {"seed": 0}, 4, 0, world_size)
    made.engine = engine
    return made


def test_ranks_and_ray_in_one_folder(tmp_path: Path) -> None:
    driver, worker, ranks = make(tmp_path, "ray"), make(tmp_path, "ray"), make(tmp_path, None, 2)
    assert driver.claim()
    worker.join()
    with pytest.raises(DataError, match="another packer works in .*, as ray, and this one as 2 ranks; wait for it"):
        ranks.claim()
    ranks.close()
    with pytest.raises(DataError, match="another program packs into .* on ray; wait for it or stop it$"):
        make(tmp_path, "ray").claim()
    # The driver is killed: until its workers are, ranks stay out.
    driver.close()
    with pytest.raises(DataError, match="as ray, and this one as 2 ranks"):
        ranks.claim()
    for each in (ranks, worker):
        each.close()
    assert ranks.claim()
    with pytest.raises(DataError, match="as 2 ranks, and this one as ray"):
        make(tmp_path, "ray").claim()


def test_a_worker_that_would_make_something_else(tmp_path: Path) -> None:
    assert make(tmp_path, "ray").claim()
    other = Parts(tmp_path, {"seed": 1}, 4, 1, 2)
    with pytest.raises(DataError, match="this process would not make the set that was begun in .*\n  seed: 0 there, 1 here"):
        other.join()


def test_a_part_that_a_lost_machine_still_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make(tmp_path, "ray")
    assert ours.claim()
    with ours.hold(3):
        assert try_lock(ours.folder / "part_00003.lock") is None
        monkeypatch.setattr(parts, "GONE_S", 0.1)
        with make(tmp_path, "ray").hold(3):             # after minutes
            pass
    assert try_lock(ours.folder / "part_00003.lock")


def test_what_describe_says_of_workers(tmp_path: Path) -> None:
    ours = make(tmp_path, "ray")
    assert ours.claim()
    for rank in range(2):
        report = {"rank": rank, "world_size": 3, "time": 1000.0 * rank, "history": [[1000.0 * rank - 10, 0], [1000.0 * rank, 50]]}
        (ours.folder / f"rank_{rank}.json").write_text(json.dumps(report))
    assert dict(progress.describe_packing(tmp_path, 1001))["ranks"] == "1 of 3 workers of ray at work"
    assert progress.counted(ours.folder, 1) == 50 and progress.counted(ours.folder, 2) == 0


def test_a_requeued_job_waits_for_the_locks_of_its_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same rank, and of another number of ranks; for minutes, and not for ever."""
    lost = make(tmp_path, None, 2)
    assert lost.claim()
    monkeypatch.setattr(parts, "GONE_S", 0.5)
    with pytest.raises(DataError, match="as the same rank"):
        make(tmp_path, None, 2).claim()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for ranks, message in (2, "as the same rank"), (1, "as the same rank"):
        with pytest.raises(DataError, match=message):
            make(tmp_path, None, ranks).claim()
    assert lost._lock and lost._together
    lost._lock.close()
    alone = make(tmp_path, None)
    with pytest.raises(DataError, match="as 2 ranks, and this one as 1 ranks"):
        alone.claim()
    alone.close()
    free = Timer(0.2, lost._together.close)
    free.start()
    assert alone.claim()
    free.join()


# ---- before any work


@pytest.mark.parametrize("more, env, message", [
    (("--engine", "ray"), {"no ray": "1"}, "Ray is not installed; pip install 'largescale[ray]'"),
    (("--engine", "ray", "--address", "ray://head:10001"), {}, "--address ray://head:10001: give auto, local, or HOST:PORT"),
    (("--engine", "ray", "--address", "head"), {}, "--address head: give auto, local, or HOST:PORT"),
    (("--engine", "ray", "--address", "127.0.0.1:{port}"), {}, "nothing answers there ("),
    (("--engine", "ray"), {"WORLD_SIZE": "2"}, "--engine ray is started once, and not as 2 ranks by torchrun or srun"),
    (("--address", "local"), {}, "--address local is for --engine ray; give both or neither"),
])
def test_refused(more: tuple[str, ...], env: dict[str, str], message: str, images: Path, tmp_path: Path,
                 monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None if env.pop("no ray", None) else True)
    for name, value in env.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    assert pack(images, out, *(word.format(port=free_port()) for word in more)) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("change, message", [
    ({"versions": {**versions(), "torch": "1.0", "the code of data_prep": "0"}},
     "has other versions than this machine: the code of data_prep .* there, 0 here; torch .* there, 1.0 here; install the same"),
    ({"folder": "/nowhere/at/all"}, "does not see /nowhere/at/all, where this program was started; share that folder"),
    ({"files": {"/nowhere/images": None}}, "does not see /nowhere/images; put it where all nodes see it, under the same name"),
    ({"files": {__file__: 1}}, "sees another .*test_ray_engine.py, of .* bytes and not 1; share one file"),
    ({"marker": "/nowhere/marker"}, "does not see .*; give an --out on storage that all nodes share"),
    ({"marker": "/proc/version"}, "cannot write into .*; give an --out on storage that all nodes share"),
])
def test_a_node_that_lacks_something(change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "SEEN_S", 0.0)
    assert wanted(tmp_path).missing_here() is None
    found = wanted(tmp_path, **change).missing_here()
    assert found and re.fullmatch(message, found), found


def test_a_worker_on_a_node_that_lacks_something(images: Path, tmp_path: Path) -> None:
    options = Folder(images=images, out=tmp_path, vae="none")
    with pytest.raises(ConfigError, match=r"^on node \S+: the node does not see /nowhere, where this program was started"):
        Worker(options, wanted(tmp_path, folder="/nowhere"), 0, 1, 1).begin()


def test_a_new_worker_finds_the_set_finished(truth: Path) -> None:
    assert wanted(truth, marker="/nowhere").missing_here(again=True) is None


def test_what_is_looked_for(images: Path, tmp_path: Path) -> None:
    options = Folder(images=images, out=tmp_path, vae=__file__, text_encoder=f"hf:{tmp_path}", licence="cc0-1.0")
    assert given_files(options) == {str(images): None, __file__: os.path.getsize(__file__), str(tmp_path): None}


def test_the_marker_goes_again(tmp_path: Path) -> None:
    with marked(tmp_path / "a/b") as marker:
        assert Path(marker).exists()
    assert not (tmp_path / "a").exists()
    with marked(tmp_path / "a"):
        (tmp_path / "a/job.json").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["job.json"]


NODES = [{"Resources": {"CPU": 16.0, "GPU": 4.0}}, {"Resources": {"CPU": 64.0, "GPU": 8.0}}, {"Resources": {"CPU": 6.0}}, {"Resources": {}}]


@pytest.mark.parametrize("device, workers, cores, count", [
    ("cuda", None, 4, 12), ("cuda", 8, 8, 10), ("cpu", None, 6, 13), ("cpu", 1, 1, 86),
])
def test_room(device: str, workers: int | None, cores: int, count: int) -> None:
    """One for each GPU, as far as its cores go; or of the smallest node's cores."""
    assert room(NODES, device, workers) == (cores, count)


def test_no_room() -> None:
    with pytest.raises(ConfigError, match="no node of the Ray cluster has a GPU, which --device cuda needs"):
        room(NODES[2:], "cuda", None)
    with pytest.raises(ConfigError, match="--workers 100: no node of the Ray cluster has so many cores; give at most 64"):
        room(NODES, "cpu", 100)
