import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largescale.data.shards import DatasetInfo, ShardWriter

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of pixels in the shape of the `debug` preset: 300 rows, 10 classes, 3 shards."""
    path = tmp_path_factory.mktemp("data") / "blobs"
    random = np.random.default_rng(0)
    row, column = np.mgrid[:16, :16]
    with ShardWriter(path, DatasetInfo("blobs", "pixels", (1, 16, 16), 10, 1.0, {}), rows_per_shard=100) as writer:
        for i in range(300):
            label = i % 10
            x, y = 3 + label, 12 - label + random.uniform(-1, 1)
            image = 255 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 8)
            writer.write(id=f"{i:05d}", latent=image.astype(np.uint8)[None], label=label)
    return path


Train = Callable[..., list["subprocess.CompletedProcess[str]"]]


@pytest.fixture
def train(blobs: Path) -> Train:
    """Run the training program on `ranks` processes, as a launcher would start them.

    `driver`: arguments of tests/dist/driver.py, which breaks a run on purpose.
    """

    def start(*args: Any, ranks: int = 2, preset: str = "debug", driver: tuple[Any, ...] = (), data: Path = blobs,
              timeout_s: float = 120) -> list["subprocess.CompletedProcess[str]"]:
        faulty = [str(ROOT / "tests/dist/driver.py"), *map(str, driver), "--"]
        program = faulty if driver else ["-m", "largescale.train"]
        command = [sys.executable, *program, preset, "--data.path", str(data), "--telemetry.no-tensorboard",
                   "--telemetry.preview-every", "0", "--telemetry.reference-every", "0", *map(str, args)]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
               "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in range(ranks)
        ]
        done = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=timeout_s)
                done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
        finally:
            for process in processes:
                process.kill()
        return done

    return start
