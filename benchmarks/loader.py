"""python benchmarks/loader.py: our data loader beside its peers, in one run, on the same samples
and the same machine.

Samples: class-conditional, latents as moments (8, 32, 32) float16 of 16 KiB, random, and a label;
in each library's own format by its own writer (loader_peers.py), on a local disk, uncompressed,
read once before anything is timed: all read from a warm page cache, so what is compared is
software, not disks. Peers run in an environment of their own.

- images/s: glibc keeps freed memory, for all; each library's own shuffle, batches of 256 as torch tensors, thrown away;
  OMP_NUM_THREADS=1 for all. Two processes are two ranks that read half each, started together,
  their rates summed. Peers get the number of DataLoader workers (0, 1 or 2 in all) that is best for
  them, found first; ours has its two threads.
- first batch: from the constructor to the first batch in a fresh process, without imports (they
  have a column too).
- seek: the same, resumed at the middle of an epoch from the state that the library itself saved
  there. `same rows`: the first batch after it is the one an uninterrupted run would have read.
- `gather` is our reading without order and thread, `memcpy` NumPy's fancy indexing on one mapped
  array: the bounds.

Every number is the median of three, with the libraries taking turns. What else runs on the machine
shows in the load.

    --mixing                       instead: how well orders mix a set that is sorted by class, see mixing.py
    --slow MS [--bandwidth MB/s]   instead: which order and prefetch keeps eight H100s fed from storage on
                                   which each read waits so long, see slow_storage.py
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mixing
import numpy as np
import slow_storage
from loader_peers import BATCH, LABELS, LATENTS, OPEN, SHAPE, WRITE
from ports import free_port
from tqdm import tqdm

from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.data.loader import Loader
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".venv-loaders"
REQUIREMENTS = HERE / "requirements-loader.txt"
# What needs none of the peers' packages.
OURS = ("ours", "gather", "memcpy")
PEERS = tuple(name for name in OPEN if name not in OURS)
NAMES = {
    "ours": "**ours**: `Loader.batch`",
    "gather": "ours: `gather` alone",
    "memcpy": "bound: one array, NumPy",
    "streaming": "mosaicml-streaming",
    "datasets": "datasets, numpy format",
    "datasets, arrow": "datasets, arrow format, unwrapped by hand",
}
# Libraries that do not shuffle all rows.
SHUFFLES = {"webdataset": "tars, then 1,000 rows", "litdata": "chunks, then 256 rows"}
REPEATS = 3
# CLIP tokens, start and end included, of the 25,014 captions of COCO's captions_val2017.json:
# {length: captions}
COCO_LENGTHS = {
    9: 96,
    10: 1035,
    11: 3681,
    12: 4915,
    13: 4847,
    14: 3813,
    15: 2493,
    16: 1607,
    17: 916,
    18: 558,
    19: 349,
    20: 215,
    21: 147,
    22: 90,
    23: 54,
    24: 48,
    25: 23,
    26: 26,
    27: 31,
    28: 23,
    29: 14,
    30: 5,
    31: 3,
    32: 3,
    33: 5,
    34: 4,
    35: 1,
    36: 2,
    37: 1,
    39: 1,
    40: 1,
    42: 2,
    46: 1,
    47: 1,
    52: 1,
    53: 1,
    58: 1,
}
# CLIP ViT-L/14's tokens and width; captions an image, as COCO has them.
TOKENS = 77
WIDTH = 768
CAPTIONS = 5


def make_environment(environment: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> None:
    """Make the peers' environment by the requirements, once."""
    # Copied last, so that an environment that was cut short is made again.
    installed = environment / "installed.txt"
    if installed.is_file() and installed.read_text() == requirements.read_text():
        return
    print(f"making {environment} (minutes, some GB) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    command = [str(environment / "bin/python"), "-m", "pip", "install", "-q"]
    command += ["-r", str(requirements)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        # pip ends with hints: the last error is what matters.
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        last = (errors or lines or ["no message"])[-1]
        raise SystemExit(
            f"pip could not install {requirements} ({last}); "
            "it needs a package index: run this once where there is one"
        )
    shutil.copy(requirements, installed)


class Bench:
    """Runs loader_peers.py in processes of its own, on the samples in one folder."""

    def __init__(self, work: Path, rows: int, seconds: float) -> None:
        self.work = work
        self.rows = rows
        self.seconds = seconds

    def folder(self, library: str) -> Path:
        """Where a library's files are; two ways of reading share one."""
        return self.work / {"gather": "ours"}.get(library, library.partition(",")[0])

    def run(self, task: str, library: str, world: int = 1, **job: Any) -> list[dict[str, Any]]:
        """Run a task; returns what each rank printed. Exits with the last line of a rank that
        fails."""
        job = {
            "task": task,
            "library": library,
            "samples": str(self.work / "samples"),
            "rows": self.rows,
            "data": str(self.folder(library)),
            "world": world,
            **job,
        }
        shared = self.environment(world)
        python = sys.executable if library in OURS else str(ENVIRONMENT / "bin/python")
        command = [python, HERE / "loader_peers.py", json.dumps(job)]
        with ExitStack() as stack:
            # Into files: a pipe that nobody reads would stop a rank.
            ranks = []
            for rank in range(world):
                output = stack.enter_context(tempfile.TemporaryFile("w+"))
                errors = stack.enter_context(tempfile.TemporaryFile("w+"))
                own = dict.fromkeys(("RANK", "LOCAL_RANK", "GLOBAL_RANK"), str(rank))
                process = subprocess.Popen(
                    command,
                    env=shared | own,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                )
                stack.callback(process.kill)
                ranks.append((process, output, errors))

            # The last line of each is its result, or its error.
            results = []
            for process, output, errors in ranks:
                code = process.wait(timeout=300)
                output.seek(0)
                errors.seek(0)
                if code:
                    lines = errors.read().splitlines() or [f"exit {code}"]
                    raise SystemExit(f"{library}, {task}: {lines[-1]}")
                results.append(json.loads(output.read().splitlines()[-1]))
        return results

    def environment(self, world: int) -> dict[str, str]:
        """The variables that all ranks have."""
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            # What a library leaves behind is removed with the folder.
            "HOME": str(self.work),
            "TMPDIR": str(self.work),
            "HF_HUB_OFFLINE": "1",
            "LITDATA_DISABLE_VERSION_CHECK": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(HERE.parent),
        }


def make_samples(folder: Path, rows: int) -> None:
    """Random latents, and labels, as NumPy's files."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    latents = np.lib.format.open_memmap(folder / LATENTS, "w+", np.float16, (rows, *SHAPE))
    for first in range(0, rows, 1000):
        latents[first : first + 1000] = random.standard_normal(
            latents[first : first + 1000].shape, np.float32
        )
    np.save(folder / LABELS, np.arange(rows) % 1000)


def size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
    return total


def total_rate(ranks: list[dict[str, Any]]) -> float:
    """The rates of all ranks together."""
    return sum([rank["images_s"] for rank in ranks])


def best_workers(bench: Bench, processes: list[int]) -> dict[tuple[str, int], int]:
    """The number of DataLoader workers in each process that is best: (library, processes) -> it.
    Ours has none."""
    found = dict.fromkeys(itertools.product(OPEN, processes), 0)
    for library, world in tqdm(found, "number of workers", leave=False):
        if library not in PEERS:
            continue
        # Two workers at most in all, as ours has two threads.
        rates = {}
        for n in (0, 1, 2):
            if n * world <= 2:
                rates[n] = total_rate(bench.run("rate", library, world, workers=n))
        found[library, world] = max(rates, key=rates.__getitem__)
    return found


def compare(bench: Bench, processes: list[int]) -> dict[str, dict[str, Any]]:
    """Measure all libraries: library -> its row of the table."""
    make_samples(bench.work / "samples", bench.rows)
    for library in tqdm(WRITE, "write", leave=False):
        bench.run("write", library)
    # Read once, into the page cache.
    for path in bench.work.rglob("*"):
        if path.is_file():
            path.read_bytes()

    # What each library saves at the middle of an epoch, and reads after it.
    workers = best_workers(bench, processes)
    halves = {}
    for library in tqdm(("ours", *PEERS), "halfway", leave=False):
        halves[library] = bench.run("halfway", library, workers=workers[library, processes[0]])[0]

    # The libraries take turns, so that what else runs on the machine slows all of them.
    found: dict[str, dict[str, list[Any]]] = {library: defaultdict(list) for library in OPEN}
    for library in tqdm(REPEATS * list(OPEN), f"{REPEATS} rounds", leave=False):
        values = found[library]
        for world in processes:
            ranks = bench.run(
                "rate", library, world, workers=workers[library, world], seconds=bench.seconds
            )
            values[f"images_s_{world}"].append(total_rate(ranks))
            values["import_s"].append(ranks[0]["import_s"])
            if world == processes[0]:
                values["first_s"].append(ranks[0]["first_s"])
        if library in halves:
            seek = bench.run(
                "seek",
                library,
                workers=workers[library, processes[0]],
                start=bench.rows // 2 // BATCH * BATCH,
                state=halves[library]["state"],
            )[0]
            values["seek_s"].append(seek["first_s"])
            values["same_rows"].append(seek["labels"] == halves[library]["labels"])
        values["version"] = [ranks[0]["version"]]

    rows = {}
    for library, values in found.items():
        rows[library] = row_of(values) | {
            "workers": {str(world): workers[library, world] for world in processes},
            "bytes_per_sample": None
            if library == "memcpy"
            else size(bench.folder(library)) / bench.rows,
        }
    return rows


def row_of(values: dict[str, list[Any]]) -> dict[str, Any]:
    """The medians of what was measured of one library."""
    row: dict[str, Any] = {
        "version": values["version"][0],
        # A library that was not asked to seek has not shown that it can.
        "same_rows": all(values.get("same_rows", [False])),
        "measured": dict(values),
    }
    for name, measured in values.items():
        if name not in row:
            row[name] = statistics.median(measured)
    return row


def markdown(rows: dict[str, dict[str, Any]], processes: list[int]) -> str:
    """The table of all libraries, in Markdown."""
    speeds = []
    for world in processes:
        speeds += [f"images/s, {world} process{'es' * (world > 1)}", "ours is"]
    heads = [
        "library",
        "shuffles",
        *speeds,
        "import s",
        "first batch s",
        "seek s",
        "same rows",
        "bytes/sample",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|---:" * (len(heads) - 2) + "|"]
    for library, row in rows.items():
        cells = [
            f"{NAMES.get(library, library)} {row['version']}",
            SHUFFLES.get(library, "all rows"),
        ]
        for world in processes:
            rate = row[f"images_s_{world}"]
            of_workers = f" ({row['workers'][str(world)]} workers)" if library in PEERS else ""
            cells += [
                f"{rate:,.0f}{of_workers}",
                f"{rows['ours'][f'images_s_{world}'] / rate:.2f} x",
            ]
        cells += [f"{row['import_s']:.2f}", f"{row['first_s']:.3f}"]
        cells += (
            [f"{row['seek_s']:.3f}", "yes" if row["same_rows"] else "no"]
            if "seek_s" in row
            else ["", ""]
        )
        cells.append(f"{row['bytes_per_sample']:,.0f}" if row["bytes_per_sample"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median_ms(call: Callable[[], Any], repeats: int = 30) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def constant_seek(data: Path) -> list[dict[str, Any]]:
    """The time to our first batch at places near and far, with the data set open; and to the order
    alone, with ten times the rows."""
    dataset = ShardDataset(data)
    result = []
    for place, position in (("0", 0), ("N/2", len(dataset) // 2), ("100 N", 100 * len(dataset))):

        def first_batch(step: int = position // BATCH) -> None:
            with Loader(
                dataset,
                seed=0,
                global_batch_size=BATCH,
                micro_batch_size=BATCH,
                rank=0,
                world_size=1,
                start_step=step,
                prefetch=0,
            ) as loader:
                loader.batch(step)

        def order(n_rows: int, position: int = position) -> None:
            sample_indices(position + np.arange(BATCH), n_rows, 0)

        # The first call maps the shards.
        first_batch()
        row: dict[str, Any] = {"position": place, "first_batch_ms": median_ms(first_batch)}
        for times in (1, 10):
            row[f"order_ms_{times}N"] = median_ms(partial(order, times * len(dataset)))
        result.append(row)
    return result


def captions_on_disk(folder: Path, rows: int, seconds: float) -> dict[str, float]:
    """The size and speed of five captions an image, as long as COCO's, stored to their last token;
    beside the size of all padded to 77."""
    random = np.random.default_rng(0)
    info = DatasetInfo("made-up", "moments", SHAPE, 0, captions=CaptionInfo(TOKENS, WIDTH, WIDTH))
    shares = np.array(list(COCO_LENGTHS.values())) / 25_014
    lengths = random.choice(list(COCO_LENGTHS), (rows, CAPTIONS), p=shares)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(np.float16)

    with ShardWriter(folder, info, rows_per_shard=512) as writer:
        writer.write_empty_caption(normal(2, WIDTH), normal(WIDTH))
        for i in tqdm(range(rows), "captions", leave=False):
            writer.write(
                id=str(i),
                latent=normal(*SHAPE),
                label=0,
                captions=["a caption of some fifty letters, as COCO's are"] * CAPTIONS,
                caption_tokens=[normal(n, WIDTH) for n in lengths[i]],
                caption_pooled=[normal(WIDTH) for _ in range(CAPTIONS)],
            )
    # All but the latents: ids, texts and offsets too. Numbers have 2 bytes.
    stored = (size(folder) - rows * 2 * np.prod(SHAPE)) / rows
    padded = CAPTIONS * 2 * (TOKENS * WIDTH + WIDTH)

    images = 0
    begin = 0.0
    with Loader(
        ShardDataset(folder),
        seed=0,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        captions=True,
    ) as loader:
        for step in range(1 << 30):
            loader.batch(step)
            # The clock starts once all shards are mapped.
            if step * BATCH < rows:
                begin = time.perf_counter()
            elif (spent := time.perf_counter() - begin) < seconds:
                images += BATCH
            else:
                break
    return {
        "tokens_mean": lengths.mean(),
        "bytes_per_image": stored,
        "bytes_per_caption": stored / CAPTIONS,
        "padded_bytes_per_image": padded,
        "ratio": stored / padded,
        "images_s": images / spent,
    }


def compare_mixing(report: Path | None) -> None:
    """Print how well the orders of all libraries mix."""
    command = [ENVIRONMENT / "bin/python", HERE / "mixing.py"]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    print(mixing.markdown(found))
    if report:
        report.write_text(json.dumps(found, indent=1) + "\n")


def compare_speeds(options: argparse.Namespace, work: Path) -> None:
    """Print how fast the libraries read, start and seek."""
    begin = time.perf_counter()
    load = os.getloadavg()[0]
    bench = Bench(work, options.rows, options.seconds)
    rows = compare(bench, options.processes)
    seeks = constant_seek(bench.folder("ours"))
    captions = captions_on_disk(
        work / "captioned", max(2 * BATCH, options.rows // 10), options.seconds
    )

    print(markdown(rows, options.processes))
    print(
        "\n| position | first batch, ms | its order alone, ms | with 10 N rows, ms "
        "|\n|---|---:|---:|---:|"
    )
    for row in seeks:
        position, *times = row.values()
        cells = [position, *[f"{value:.2f}" for value in times]]
        print(f"| {' | '.join(cells)} |")
    print(
        f"\ncaptions: {captions['bytes_per_image']:,.0f} bytes an image, "
        f"{captions['bytes_per_caption']:,.0f} each of {captions['tokens_mean']:.1f} tokens: "
        f"{captions['ratio']:.1%} of padded ({captions['padded_bytes_per_image']:,} an image); "
        f"read, padded: {captions['images_s']:,.0f} images/s"
    )
    loads = f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(
        f"{options.rows:,} rows, {platform.processor() or platform.machine()}, {os.cpu_count()} "
        f"cores, {loads}, {time.perf_counter() - begin:.0f} s\n"
    )
    rates = {library: row[f"images_s_{options.processes[0]}"] for library, row in rows.items()}
    best = max(PEERS, key=lambda library: rates[library])
    print(
        f"ours: {rates['ours']:,.0f} images/s, {rates['ours'] / rates[best]:.2f} times the best "
        f"peer ({best})"
    )
    if options.json:
        results = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "load": loads,
            "rows": rows,
            "seek": seeks,
            "captions": captions,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--seconds", type=float, default=2, help="at least, of each of the three repeats"
    )
    parser.add_argument(
        "--work", type=Path, help="a new folder, which stays; else a temporary one, which does not"
    )
    parser.add_argument("--mixing", action="store_true")
    parser.add_argument("--slow", type=float, metavar="MS")
    parser.add_argument("--bandwidth", type=float, default=1000, metavar="MB/s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    least = 4 * BATCH * max(options.processes)
    if options.rows < least:
        parser.error(f"--rows {options.rows} are too few; give at least {least}")
    make_environment()
    if options.mixing:
        compare_mixing(options.json)
        return
    with ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        if work.exists() and any(work.iterdir()):
            parser.error(f"--work {work} is not empty; give a new folder, or empty it")
        if options.slow is None:
            compare_speeds(options, work)
            return
        python = ENVIRONMENT / "bin/python"
        work.mkdir(parents=True, exist_ok=True)
        slow_storage.measure(work, python, options.slow, options.bandwidth, options.seconds)


if __name__ == "__main__":
    main()
