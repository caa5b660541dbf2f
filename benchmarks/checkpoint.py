"""python benchmarks/checkpoint.py: how long training stands still for a checkpoint, three ways, in
one run.

    background   as the trainer does it: a snapshot in host memory, written by a thread while steps
                 are taken
    waited for   the same files and hashes, but no step is taken until they are valid
    DeepSpeed    `engine.save_checkpoint` with its own checkpoint engine: no hashes, no fsync, and a
                 kill leaves a part of it

A model of the preset's size on made-up data, ZeRO-2 fp32 on this machine's CPU, two ranks. The ways
take turns, round by round; what is printed is the median. `stall` is time without a step; `slower`
is what steps lose meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["DS_ACCELERATOR"] = "cpu"

WAYS = ("background", "waited for", "DeepSpeed")


class Rank:
    """One of the ranks: a model that takes steps, and the three ways of saving it."""

    def __init__(self, preset: str, folder: Path) -> None:
        import torch

        from largescale.checkpoint.checkpointer import Checkpointer
        from largescale.config.deepspeed import load_ds_config
        from largescale.config.presets import PRESETS
        from largescale.config.schema import CheckpointConfig
        from largescale.distributed.ranks import Ranks
        from largescale.engine.deepspeed_engine import Engine, adam
        from largescale.engine.optimizer import build_optimizer
        from largescale.models.build import blank_condition, build_model, latent_shape

        # One thread a rank, so that what writes has a share of the machine too.
        torch.set_num_threads(1)
        config = PRESETS[preset]()
        self.folder = folder
        self.ranks = Ranks("cpu")
        ds = load_ds_config("ds_configs/zero2_fp32.json") | {
            "train_batch_size": self.ranks.world_size,
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
        }
        torch.manual_seed(0)
        self.engine = Engine(
            build_model(config.model),
            partial(build_optimizer, config=config.optimizer, device="cpu", deepspeed_adam=adam),
            ds,
        )
        x = torch.randn(1, *latent_shape(config.model))
        self.inputs = (x, torch.tensor([5]), blank_condition(config.model, 1))

        # The engine's own checkpoint engine, which the checkpointer replaces.
        self.stock = self.engine._engine.checkpoint_engine
        (folder / "ours").mkdir(parents=True, exist_ok=True)
        self.checkpointer = Checkpointer(
            folder / "ours", CheckpointConfig(keep_last=1, keep_every=0), self.ranks, patience_s=600
        )

    def step(self) -> float:
        """Take a step; returns its seconds."""
        start = time.perf_counter()
        self.engine.backward(self.engine(*self.inputs).square().mean())
        self.engine.advance()
        self.ranks.barrier()
        return time.perf_counter() - start

    def save_stock(self, number: int) -> float:
        """Save with DeepSpeed; returns the seconds without a step."""
        start = time.perf_counter()
        self.engine._engine.checkpoint_engine = self.stock
        self.engine._engine.save_checkpoint(
            str(self.folder / "stock"), tag=str(number), save_latest=True
        )
        return time.perf_counter() - start

    def save_ours(self, at: int, background: bool) -> tuple[float, list[float]]:
        """Save with the trainer's checkpointer, as that of step `at`; returns the seconds without a
        step, and those of each step that was taken meanwhile."""
        start = time.perf_counter()
        self.checkpointer.save(at, {"step": at}, self.engine, "schedule")
        stall = time.perf_counter() - start

        # Steps until all ranks have written; then only what is left is waited for.
        during = []
        while background and self.ranks.any(self.checkpointer.writing):
            during.append(self.step())
        start = time.perf_counter()
        written, problem = self.checkpointer.finish()
        assert written, problem
        return stall + time.perf_counter() - start, during

    def measure(self, way: str, number: int) -> dict[str, float]:
        """What one checkpoint costs."""
        # What a step takes while nothing is written.
        usual = statistics.median([self.step() for _ in range(5)])
        during: list[float] = []
        if way == "DeepSpeed":
            stall = self.save_stock(number)
        else:
            # Two checkpoints a round, each of a step of its own.
            at = 2 * number + (way == "waited for")
            stall, during = self.save_ours(at, way == "background")
        self.ranks.barrier()
        return {
            "stall_s": stall,
            "slower_s": sum(during) - len(during) * usual,
            "steps_meanwhile": len(during),
            "step_s": usual,
        }


def rank_main(preset: str, folder: Path, rounds: int) -> None:
    """Measure on one of the ranks; rank 0 prints the numbers as JSON."""
    rank = Rank(preset, folder)
    first = rank.ranks.rank == 0
    # The first steps are slower.
    for _ in range(3):
        rank.step()

    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for number in range(1, rounds + 1):
        for way in WAYS:
            for key, value in rank.measure(way, number).items():
                found[way][key].append(value)
        # Ours keeps the newest only; DeepSpeed's would fill the disk.
        if first:
            shutil.rmtree(folder / "stock", ignore_errors=True)
    if first:
        size = 0
        for path in (folder / "ours").rglob("*.pt"):
            size += path.stat().st_size
        print(json.dumps({"found": found, "bytes": size, "parameters": rank.engine.numel}))
    rank.ranks.close()


def main() -> None:
    """Start the ranks, and print the medians of what they measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="dit_s2_imagenet256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the file system to write to; by default that of /tmp"
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # This file is also the program of each rank.
    if options.rank:
        return rank_main(options.preset, options.folder, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", "2", __file__, "--rank", "--preset", options.preset]
        command += ["--rounds", str(options.rounds), "--folder", folder]
        done = subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    result = json.loads(done.stdout.splitlines()[-1])
    medians: dict[str, dict[str, float]] = {}
    for way, of in result["found"].items():
        medians[way] = {key: statistics.median(values) for key, values in of.items()}
    from largescale.host.sizes import size_text

    size = f"{result['parameters']:,} parameters, {size_text(result['bytes'])} a checkpoint"
    print(f"{options.preset}: {size}, 2 ranks")
    print(f"{'':12} {'stall':>9} {'slower':>9} {'steps meanwhile':>16} {'of waiting':>11}")
    # All that a way costs, as a share of waiting.
    waited = medians["waited for"]["stall_s"]
    for way, seconds in medians.items():
        lost = (seconds["stall_s"] + seconds["slower_s"]) / waited
        print(
            f"{way:12} {seconds['stall_s']:7.2f} s {seconds['slower_s']:7.2f} s "
            f"{seconds['steps_meanwhile']:16.0f} {lost:11.0%}"
        )


if __name__ == "__main__":
    main()
