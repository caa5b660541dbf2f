"""python benchmarks/overhead.py: the share of a training step outside forward, backward and optimizer, per part.

DiT-S/2 on made-up latents, one rank on this machine's CPU. What is counted: waiting for data, draws, the agreed vector,
the curriculum, telemetry at every step, and the loop itself. Host time; on a GPU use a profiler.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.telemetry import read_metrics

ROOT = Path(__file__).parent.parent


def make_latents(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    info = DatasetInfo("made-up", "moments", (8, 32, 32), 1000, 0.18215, {})
    with ShardWriter(path, info) as writer:
        for i in range(rows):
            moments = random.standard_normal((2, 8, 32, 32)).astype(np.float16)
            writer.write(id=str(i), latent=moments[0], latent_mirror=moments[1], label=i % 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="dit_s2_imagenet256")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_latents(Path(folder, "data"), 512)
        command = [
            sys.executable, "-m", "largescale.train", options.preset, "--data.path", f"{folder}/data", "--output",
            f"{folder}/run", "--train.device", "cpu", "--train.ds-config", "ds_configs/zero2_fp32.json",
            "--train.steps", str(options.steps), "--train.global-batch-size", str(options.batch_size),
            "--telemetry.log-every", "1", "--telemetry.reference-every", "0", "--telemetry.preview-every", "0",
        ]
        subprocess.run(command, check=True, cwd=ROOT)
        rows = [row for row in read_metrics(Path(folder, "run")) if "loss" in row][3:]  # after warming up
    parts = sorted({key for row in rows for key in row if key.startswith("time/") and key.endswith("_ms")})
    medians = {key: statistics.median(row[key] for row in rows) for key in parts}
    for key, value in medians.items():
        print(f"{key.removeprefix('time/').removesuffix('_ms'):12} {value:10.3f} ms")
    share = statistics.median(row["time/overhead_share"] for row in rows)
    print(f"outside forward, backward and optimizer: {share:.3%} of a step (median of {len(rows)} steps)")


if __name__ == "__main__":
    main()
