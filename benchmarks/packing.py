"""python benchmarks/packing.py: how fast one packer packs, and what it waits for, beside what you
would use instead.

    decode, encode, write   each alone: JPEG to centre crop, latents of the image and its mirror, a
                            shard with its hashes and statistics
    packer                  the whole program

    --img2dataset           beside img2dataset: `--vae none` against its centre crop and JPEG, from
                            local files (file://), in an environment of its own
    --lightningdit PATH     beside extract_features.py of a clone of hustvl/LightningDiT, with one
                            autoencoder of its class, of random weights; without a GPU its calls
                            for CUDA are answered by the CPU

Each way runs as a whole process on `--cores` cores, with some images and with more; the rate is that of
the difference, so imports and loading do not count. Ways take turns, round by round; a ratio is the
median of the rounds' ratios. Images are made: JPEGs of 500 x 375, of smooth noise.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from packing_peers import ENVIRONMENT, Command, img2dataset, lightningdit, make_autoencoder

HERE = Path(__file__).parent
ROOT = HERE.parent
REQUIREMENTS = HERE / "requirements-packing.txt"
SIZE = (500, 375)
SOME, MORE = "some", "more"  # folders of images


def make_images(folder: Path, count: int, some: int) -> None:
    """JPEGs in two folders of one class, the smaller one a part of the larger one."""
    from PIL import Image

    random = np.random.default_rng(0)
    for name in (SOME, MORE):
        (folder / name / "n0").mkdir(parents=True)
    for i in range(count):
        # As compressible as photographs are: detail at several scales.
        picture = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
        for side in (4, 16, 64, 256):
            noise = random.integers(0, 256, (side, side, 3), np.uint8)
            picture += np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC))
        file = folder / MORE / f"n0/{i:06d}.jpg"
        Image.fromarray((picture / 4).astype(np.uint8)).save(file, quality=90)
        if i < some:
            (folder / SOME / f"n0/{i:06d}.jpg").hardlink_to(file)


# ---- one stage at a time


def per_second(work: Callable[[], int], seconds: float) -> float:
    """How much `work` does in a second, after it has run once."""
    work()
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        done += work()
    return done / spent


def stage_rates(
    folder: Path, spec: str, batch: int, cores: int, args: argparse.Namespace
) -> list[float]:
    """Images a second of decoding, of encoding and of writing, each alone."""
    import torch

    from data_prep import images
    from data_prep.folder import Folder
    from data_prep.packer import Packer

    options = Folder(
        images=folder / MORE / "n0",
        out=folder / "stages",
        vae=spec,
        resolution=args.resolution,
        batch_size=batch,
        device=args.device,
    )
    packer = Packer(options)
    files = [path.read_bytes() for path in sorted((folder / MORE / "n0").iterdir())]
    crop = partial(images.decode, resolution=args.resolution, min_side=1)
    pixels = np.stack([crop(file) for file in (files * batch)[:batch]])

    def encode(_: int = 0) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"id": str(i), "label": 0} for i in range(batch)]
        packer.encoders.encode_images(pixels, rows)
        return rows

    rows = encode()

    def write() -> int:
        from largescale.data.writer import Shard

        shard = Shard(packer.info)
        for row in rows:
            shard.add(**row)
        shard.write(folder / "shard.arrow")
        return batch

    one = partial(torch.set_num_threads, 1)
    with ThreadPoolExecutor(cores, initializer=one) as pool:
        decode = per_second(lambda: len(list(pool.map(crop, files))), args.seconds)
        threads = cores if args.device == "cpu" else 1
        encoded = per_second(lambda: sum(map(len, pool.map(encode, range(threads)))), args.seconds)
    shutil.rmtree(folder / "stages", ignore_errors=True)
    return [decode, encoded, per_second(write, args.seconds)]


# ---- whole programs


def ours(folder: Path, vae: object, batch: int, args: argparse.Namespace, name: str) -> Command:
    command = [sys.executable, "-m", "data_prep.imagenet", "--images", folder / name]
    command += ["--vae", vae, "--batch-size", batch, "--resolution", args.resolution]
    return [*command, "--out", folder / "out", "--device", args.device, "--min-side", 1]


def seconds_of(command: Command, cores: int, folder: Path) -> float:
    """How long the program takes on so many cores. SystemExit where it fails."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, chosen)), *map(str, command)],
        env=env | {"OMP_NUM_THREADS": str(cores)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout[-2000:]}"
        )
    shutil.rmtree(folder / "out", ignore_errors=True)
    return seconds


def rate(command: Callable[[str], Command], cores: int, folder: Path, images: int) -> float:
    """Images a second, from the difference between some images and `images` more."""
    some, more = (seconds_of(command(name), cores, folder) for name in (SOME, MORE))
    return images / max(more - some, 1e-3)


# ---- tables


def table_of_rates(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    yield "| encoder | cores | batch | decode | encode | write | packer | of its slowest stage |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for spec, cores, batch in product(args.vae, args.cores, args.batch):
        stages = stage_rates(folder, spec, batch, cores, args)
        packer = partial(ours, folder, spec, batch, args)
        whole = rate(packer, cores, folder, args.count - args.some)
        cells = [f"{value:,.1f}" for value in (*stages, whole)]
        name = "none (pixels)" if spec == "none" else Path(spec).name
        yield f"| {name} | {cores} | {batch} | {' | '.join(cells)} | {whole / min(stages):.2f} x |"


def table_of_peers(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    cores, batch = max(args.cores), max(args.batch)
    pairs: dict[str, list[Callable[[str], Command]]] = {}
    if args.img2dataset:
        theirs = partial(img2dataset, folder, cores, args)
        pairs["img2dataset, pixels"] = [partial(ours, folder, "none", batch, args), theirs]
    if args.lightningdit:
        vae = make_autoencoder(folder, args.lightningdit)
        theirs = partial(lightningdit, folder, cores, args)
        pairs["LightningDiT, f16d32"] = [partial(ours, folder, vae, batch, args), theirs]
    yield "| beside | ours, images/s | theirs | ours / theirs, each round |"
    yield "|---|---:|---:|---|"
    for name, ways in pairs.items():
        rounds = []
        for _ in range(args.rounds):
            rounds.append([rate(way, cores, folder, args.count - args.some) for way in ways])
        ratios = [mine / other for mine, other in rounds]
        mine, other = (statistics.median(column) for column in zip(*rounds, strict=True))
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        yield f"| {name} | {mine:.1f} | {other:.1f} | {statistics.median(ratios):.2f} x ({each}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--vae", nargs="*", default=["none"], help="as the packers' --vae")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--count", type=int, default=1000, help="images in all")
    parser.add_argument("--some", type=int, default=100, help="images of the shorter run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each stage alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--img2dataset", action="store_true")
    parser.add_argument("--lightningdit", metavar="PATH")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from data_prep.finish import ROUND_TRIP_IMAGES

    # So many are decoded again at the end: of fewer, the difference of two runs would have decoding too.
    if not ROUND_TRIP_IMAGES <= args.some < args.count:
        parser.error(f"--some {args.some}: give {ROUND_TRIP_IMAGES} or more, and less than --count")
    if args.img2dataset:
        from loader import make_environment

        make_environment(ENVIRONMENT, REQUIREMENTS)
    print(
        f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}", flush=True
    )
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_images(folder, args.count, args.some)
        tables = [table_of_rates(folder, args)] if args.vae else []
        tables += [table_of_peers(folder, args)] if args.img2dataset or args.lightningdit else []
        for table in tables:
            print()
            for line in table:
                print(line, flush=True)


if __name__ == "__main__":
    main()
