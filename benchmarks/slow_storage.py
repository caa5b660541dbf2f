"""Which order and prefetch keeps eight GPUs fed from slow storage; a part of benchmarks/loader.py,
which runs it with --slow MS.

Storage: a FUSE file system over a local folder (slow_files.py), in which each read waits MS, and all
of them share a bandwidth. Shards are mapped, so a delay in read() of Python would delay nothing; here
the kernel asks for pages as it asks NFS or Lustre, in reads of up to 128 KiB. It is mounted anew for
each row of the table, so that nothing is in the page cache. Its shards are one file under many names,
which the kernel does not know: a set of any size takes 64 MiB of disk.

A node: eight processes, a rank each, with global batches of 256 that they throw away. They ask for
8,200 images/s, what eight H100s take at half their peak on DiT-L/2, and where a batch is late, that
time is lost. The rate is that of the slowest rank, for which the others would wait.

    slow_storage.py      a rank, which takes jobs from stdin
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from largescale.data.format import DatasetInfo, read_manifest
from largescale.data.stage import StagedCopy
from largescale.data.writer import ShardWriter, write_manifest

BATCH = 256
RANKS = 8
SHAPE = (8, 32, 32)
NEEDED = 8200
# Steps that are not counted: two million others come.
WARM_UP_STEPS = 64
# Shards of 64 MiB: as many as ImageNet has, and as many as are copied.
SHARDS = 313
SHARDS_STAGED = 10
# (order, prefetch), and whether the set is copied to the local disk first.
CASES = [
    ("full", 4, False),
    ("full", 16, False),
    ("full", 64, False),
    ("blocks", 4, False),
    ("blocks", 16, False),
    ("blocks", 64, False),
    ("full", 4, True),
]


@contextmanager
def mounted(python: Path, folder: Path, mount: Path, ms: float, mb_per_s: float) -> Iterator[Path]:
    """The folder as slow storage."""
    mount.mkdir(exist_ok=True)
    files = Path(__file__).with_name("slow_files.py")
    command = [python, files, folder, mount, str(ms), str(mb_per_s)]
    with (mount.parent / "fuse.log").open("w+") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while not os.path.ismount(mount):
                if server.poll() is not None:
                    said.seek(0)
                    raise SystemExit(
                        f"no FUSE file system can be mounted here ({said.read().strip()[-300:]}); "
                        "--slow needs /dev/fuse, libfuse 3 and the right to mount"
                    )
                time.sleep(0.05)
            yield mount
        finally:
            unmount = shutil.which("fusermount3") or shutil.which("fusermount")
            if os.path.ismount(mount):
                subprocess.run([unmount, "-u", mount] if unmount else ["umount", mount], check=True)
            server.wait(60)


def make_set(folder: Path, shards: int) -> None:
    """Random latents of 16 KiB, 4,096 a shard; all shards are one file."""
    random = np.random.default_rng(0)
    info = DatasetInfo("made-up", "moments", SHAPE, 1000)
    with ShardWriter(folder, info) as writer:
        for i in tqdm(range(4096), "write", leave=False):
            latent = random.standard_normal(SHAPE, np.float32).astype(np.float16)
            writer.write(id=str(i), latent=latent, label=i % 1000)
    manifest = read_manifest(folder)
    (first,) = manifest["shards"]
    entries = [{**first, "file": f"shard_{number:05d}.arrow"} for number in range(shards)]
    for entry in entries[1:]:
        (folder / entry["file"]).hardlink_to(folder / first["file"])
    write_manifest(folder, info, manifest["columns"], entries)


class Readers:
    """The ranks of a node, each a process that is asked again and again."""

    def __init__(self, stack: ExitStack) -> None:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONWARNINGS": "ignore",
        }
        self._ranks = []
        for rank in range(RANKS):
            process = subprocess.Popen(
                [sys.executable, __file__],
                env=env | {"RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            self._ranks.append(process)

    def ask(self, **job: Any) -> list[dict[str, Any]]:
        """What each rank answers to a job that all do at once."""
        for process in self._ranks:
            assert process.stdin
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        answers = []
        for process in self._ranks:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a rank has failed, see above")
            answers.append(json.loads(line))
        return answers


def read() -> None:
    """A rank: answers jobs from stdin until it is closed."""
    for line in sys.stdin:
        job = json.loads(line)
        task = {"stage": copy_set, "read": read_batches}[job.pop("task")]
        print(json.dumps(task(**job)), flush=True)


def copy_set(data: str, stage: str) -> dict[str, float]:
    """Copies a set as data.stage does; how long that took."""
    begin = time.monotonic()
    assert StagedCopy(Path(data), Path(stage)).fill(3600)
    return {"seconds": time.monotonic() - begin}


def read_batches(
    data: str, copy: str | None, order: str, prefetch: int, seconds: float
) -> dict[str, float]:
    """Reads batches for some seconds, at the rate of a step of the GPUs or slower; how many images
    in what time, after the first steps."""
    from largescale.data.loader import Loader
    from largescale.data.shards import ShardDataset

    dataset = ShardDataset(data)
    if copy:
        dataset.read_copy(Path(copy))
    loader = Loader(
        dataset,
        seed=0,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // RANKS,
        rank=int(os.environ["RANK"]),
        world_size=RANKS,
        order=order,
        prefetch=prefetch,
    )
    step = 0
    begin = now = time.monotonic()
    with loader:
        while step <= WARM_UP_STEPS or now < begin + seconds:
            if step == WARM_UP_STEPS:
                begin = now
            # The GPUs have the last step's batch for that long; a wait for data is not made up for.
            time.sleep(max(0.0, now + BATCH / NEEDED - time.monotonic()))
            loader.batch(step)
            step += 1
            now = time.monotonic()
    return {"images": (step - WARM_UP_STEPS) * BATCH / RANKS, "seconds": now - begin}


def measure(work: Path, python: Path, ms: float, mb_per_s: float, seconds: float) -> None:
    """Print the table."""
    make_set(work / "set", SHARDS)
    make_set(work / "small", SHARDS_STAGED)
    print(f"| order | prefetch | images/s | of {NEEDED:,} |\n|---|---:|---:|---:|")
    with ExitStack() as stack:
        readers = Readers(stack)
        for order, prefetch, staged in CASES:
            source = work / ("small" if staged else "set")
            with mounted(python, source, work / "slow", ms, mb_per_s) as data:
                job = {"data": str(data), "order": order, "prefetch": prefetch, "copy": None}
                name = f"`{order}`"
                if staged:
                    (work / "local").mkdir()
                    took = readers.ask(task="stage", data=str(data), stage=str(work / "local"))
                    rate = SHARDS_STAGED * 4096 / max([answer["seconds"] for answer in took])
                    name += f", after `--data.stage` ({rate:,.0f} images/s)"
                    job["copy"] = str(StagedCopy(data, work / "local").folder)
                found = readers.ask(task="read", seconds=seconds, **job)
            # A step ends when all ranks have their rows.
            rate = RANKS * min([answer["images"] / answer["seconds"] for answer in found])
            print(f"| {name} | {prefetch} | {rate:,.0f} | {rate / NEEDED:.0%} |", flush=True)
    print(
        f"\n{SHARDS * 4096:,} rows of 16 KiB, {ms:g} ms and {mb_per_s:,.0f} MB/s, {RANKS} ranks on "
        f"{os.cpu_count()} cores, {seconds:g} s each"
    )


if __name__ == "__main__":
    read()
