import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale import train as train_program
from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights, seal
from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.distributed.ranks import Ranks
from largescale.host import signals
from largescale.host.machine import available_bytes, cores
from largescale.monitoring.telemetry import read_metrics
from tests.kept_parsers import keep_parsers
from tests.ranks import ROOT, Done, ranks_of

QUIET = ("--telemetry.trackers", "--telemetry.preview-every", 0, "--telemetry.reference-every", 0)

# Under nohup programs ignore a closed terminal, and so would those that are tested.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

keep_parsers()

# What is loaded by now stays: looking through it again and again for cycles is a twentieth of the tests' time.
gc.freeze()
gc.set_threshold(20_000, 10, 5)

WORKER_BYTES = 4 * 10**9  # that a test takes with its ranks, at most


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed
def pytest_xdist_auto_num_workers() -> int:
    """Two more than cores, since tests wait too: for Slurm, for processes that start. pytest-xdist asks for -n auto."""
    fitting = (available_bytes() or WORKER_BYTES) // WORKER_BYTES
    return max(1, min(cores() + 2, 8, fitting))


@pytest.fixture(autouse=True)
def no_stop_signals_left() -> Iterator[None]:
    """Programs that are called in this process serve signals in their way; pytest, afterwards, in its own."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._requested = False


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blobs(tmp_path_factory.mktemp("data") / "blobs")


def make_blobs(path: Path, seed: int = 0, rows: int = 300, prefix: str = "") -> Path:
    """A small data set of pixels in the shape of the `debug` preset: 10 classes, shards of 100 rows."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[:16, :16]
    with ShardWriter(path, DatasetInfo("blobs", "pixels", (1, 16, 16), 10, 1.0, {}), rows_per_shard=100) as writer:
        for i in range(rows):
            label = i % 10
            x, y = 3 + label, 12 - label + random.uniform(-1, 1)
            image = 255 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 8)
            writer.write(id=f"{prefix}{i:05d}", latent=image.astype(np.uint8)[None], label=label)
    return path


CAPTIONED = ("--model.num-classes", 0, "--model.max-caption-tokens", 5, "--model.caption-width", 8,
             "--model.caption-pooled-width", 6)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as `blobs` has them, told apart by captions: 120 rows of one to three, for the settings CAPTIONED."""
    path = tmp_path_factory.mktemp("data") / "captioned"
    random = np.random.default_rng(1)
    row, column = np.mgrid[:16, :16]

    def noise(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float16)

    words = noise(10, 8)
    info = DatasetInfo("captioned", "pixels", (1, 16, 16), 0, captions=CaptionInfo(5, 8, 6))
    with ShardWriter(path, info, rows_per_shard=50) as writer:
        for i in range(120):
            kind, n = i % 10, 1 + i % 3
            image = 255 * np.exp(-((row - 3 - kind) ** 2 + (column - 12 + kind) ** 2) / 8)
            tokens = [np.concatenate([words[[kind]], noise(k + 1, 8)]) for k in range(n)]
            writer.write(id=f"{i:05d}", latent=image.astype(np.uint8)[None], captions=[f"kind {kind}, {k}" for k in range(n)],
                         caption_tokens=tokens, caption_pooled=[noise(6) for _ in range(n)])
        writer.write_empty_caption(noise(2, 8), noise(6))
    return path


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a file, or a folder and all below it, somebody else's, whoever runs the tests (root may write anywhere)."""
    def protect(path: Path) -> None:
        real, writing = os.open, os.O_WRONLY | os.O_RDWR

        def open_as_other(name: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & writing and Path(os.fsdecode(name)).is_relative_to(path):
                raise PermissionError(13, "Permission denied", name)
            return real(name, flags, *more, **options)

        monkeypatch.setattr(os, "open", open_as_other)

    return protect


Train = Callable[..., Done]


@pytest.fixture
def train(blobs: Path) -> Train:
    """The training program on `ranks` processes. `driver`: arguments of dist/driver.py, which breaks it on purpose."""

    def start(*args: Any, ranks: int = 2, preset: str = "debug", driver: tuple[Any, ...] = (), timeout_s: float = 900) -> Done:
        program = ("tests/dist/driver.py", *driver, "--") if driver else ("-m", "largescale.train")
        return ranks_of(*program, preset, "--data.path", blobs, *QUIET, *args, ranks=ranks, timeout_s=timeout_s)

    return start


@dataclass
class Outcome:
    code: int
    err: str
    run: Path

    def trace(self) -> list[dict[str, Any]]:
        return trace(self.run)


RunHere = Callable[..., Outcome]


def assert_refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks("cpu")
    close, ranks.close = ranks.close, lambda: None  # type: ignore[method-assign]
    yield ranks
    close()


@pytest.fixture
def run_here(blobs: Path, tmp_path: Path, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch,
             capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Run the training program in this process on one rank (0.1 s, where a new process takes 4 s)."""
    # The process group outlives a run here: DeepSpeed cannot be given a second one.
    ranks_for = Ranks
    monkeypatch.setattr("largescale.training.startup.Ranks", lambda device, *timeout: one_rank if device == "cpu" else ranks_for(device))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()

    def run(*args: Any, preset: str = "debug", output: Path | None = None, data: Path | None = blobs) -> Outcome:
        output = output or tmp_path / "run"
        where = ["--output", output, *(["--data.path", data] if data else [])]
        settings = [*map(str, (*where, *QUIET, *args))]
        capsys.readouterr()
        try:
            code = train_program.main([preset, *settings])
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return Outcome(code, captured.err + captured.out, output)

    return run


def trace(run: Path) -> list[dict[str, Any]]:
    """All that training computed, step by step; not how long it took."""
    computed = ("loss", "mse", "vb", "curriculum/", "cluster/", "optimizer/")
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith(computed)}
        for row in read_metrics(run) if "loss" in row
    ]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Master weights and EMA by name, and each rank's optimizer state."""
    newest = checkpoints(run)[0]
    state = {f"{kind}.{name}": w for kind in ("master", "ema") for name, w in named_weights(newest, kind).items()}
    for rank in range(newest.manifest()["world_size"]):
        optimizer = newest.optimizer_state(rank)["base_optimizer_state"]["state"][0]
        state |= {f"{key}.{rank}": optimizer[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    return state


def assert_same_run(run: Path, truth: Path) -> None:
    """Bitwise: every number that training computed, the final weights, EMA and moments, and the curriculum's state."""
    assert trace(run) == trace(truth)
    ours, theirs = final_state(run), final_state(truth)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    state, expected = (checkpoints(r)[0].manifest()["state"] for r in (run, truth))
    assert state["curriculum"] == expected["curriculum"] and state["skipped_steps"] == expected["skipped_steps"]


def cut(truth: Path, run: Path, step: int) -> None:
    """What is on disk when the run `truth` is killed after the save of `step`."""
    later = {checkpoint.path.name for checkpoint in checkpoints(truth) if checkpoint.step > step}
    shutil.copytree(truth, run, ignore=lambda folder, names: later.intersection(names))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(checkpoint: CheckpointDir, **changes: Any) -> None:
    """A manifest that says something else, whole in itself."""
    path = checkpoint.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["sha256"]
    path.write_text(seal(manifest))


def ds_json(precision: str, folder: Path, **fp16: Any) -> Path:
    """A shipped DeepSpeed JSON, with other fp16 settings."""
    ds = json.loads((ROOT / f"ds_configs/zero2_{precision}.json").read_text())
    if precision == "fp16":
        ds["fp16"] |= fp16
    path = folder / f"{precision}.json"
    path.write_text(json.dumps(ds))
    return path
