"""Pictures, the programs that pack them, and what is packed."""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import folder, imagenet, packer, webdataset
from largescale.errors import Stopped
from tests.ranks import Forked

RUN = {"folder": folder.main, "imagenet": imagenet.main, "webdataset": webdataset.main}
BAD = {"010.png": b"", "011.png": b"no image", "025.png": None}  # None: too small


def picture(i: int, side: int = 24) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (side + i % 3, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 pictures, of which three cannot be used."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(37):
        (root / f"{i:03d}.png").write_bytes(picture(i))
    for name, content in BAD.items():
        (root / name).write_bytes(picture(0, side=2) if content is None else content)
    os.utime(root, (time.time() - 100,) * 2)            # as of another day: it need not be listed twice
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pack(images: Path, out: Path, *more: Any, program: str = "folder") -> int:
    where = "--shards" if program == "webdataset" else "--images"
    args = [where, images, "--out", out, "--vae", "none", "--resolution", 16, "--rows-per-shard", 10, "--device", "cpu",
            "--workers", 2, *more]
    return RUN[program]([str(arg) for arg in args])


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def truth(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("truth") / "out"
    assert pack(images, out) == 0
    return out


def command(images: Path, out: Path, *more: Any, code: str = "") -> list[str]:
    """The program's arguments for Python; `code` breaks it."""
    program = f"import os, sys, time; from data_prep import encoding, folder, packer; from largescale.data import parts\n{code}\nsys.exit(folder.main(sys.argv[1:]))"
    args = ["--images", images, "--out", out, "--vae", "none", "--resolution", 16, "--rows-per-shard", 10, "--device", "cpu", *more]
    return ["-c", program, *map(str, args)]


def start(images: Path, out: Path, rank: int, world_size: int, *more: Any, code: str = "") -> Forked:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return Forked(command(images, out, *more, code=code), env)


def interrupted(self: packer.Packer) -> None:
    raise Stopped
