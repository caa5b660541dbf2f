"""Kills the writer of checkpoints, or a whole run, at chosen calls that change files, and looks at what is left.

    under_fire.py writer FOLDER [--every 7] [--moments 20]     the writer by itself: a kill at every 7th call
    under_fire.py controls FOLDER                              the same with a rule broken: each must be found out
    under_fire.py runs FOLDER DATA [--runs 2]                  the training program on two ranks, whole runs

Prints one line of JSON. Every life is a fork of this process, which has imported torch and DeepSpeed for all of them. In a
life each call that creates, writes, syncs, renames or removes is counted, and the n-th is its last: a write is then torn in
the middle. Where the power is cut, what was not synced is lost on top: all of it, or some, at random.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
from largescale import train
from largescale.checkpoint.checkpointer import Checkpointer
from largescale.monitoring.run_record import read_starts
from largescale.training import trainer  # noqa: F401 (imported once for every life)
from tests.conftest import QUIET, assert_same_run
from tests.dist.kill_at_call import Child, Disk, Life, Tell
from tests.dist.writer_alone import checkpointer
from tests.dist.writer_scenes import find_out, kill_the_writer
from tests.ranks import free_port


def train_args(data: Path, run: Path) -> list[str]:
    return ["debug", *map(str, (
        "--data.path", data, "--output", run, *QUIET, "--train.steps", 12, "--train.micro-batch-size", 4, "--telemetry.log-every",
        1, "--checkpoint.every", 3, "--checkpoint.keep-last", 2, "--train.timeout-s", 120, "--optimizer.clip-grad-norm", 0.5))]


def start(data: Path, run: Path, log: Path, victim: int = -1, die_at: int = 0, alone: bool = False) -> list[Life]:
    """Both ranks. `alone`: the other one is left to end by itself, or else killed as a launcher does."""
    port = free_port()

    def life(rank: int) -> Callable[[Tell], int]:
        def go(tell: Tell) -> int:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            finish = Checkpointer.finish

            def finish_and_tell(self: Checkpointer) -> Any:
                written, problem = finish(self)
                if written:
                    tell(f"saved {self.last_saved}")
                return written, problem

            Checkpointer.finish = finish_and_tell  # type: ignore[method-assign]
            disk = Disk(run, tell, die_at if rank == victim else 0, seed=die_at)
            disk.install()
            status = train.main(train_args(data, run))
            disk.tell_calls()
            return status

        return go

    ranks = [Child(life(rank)) for rank in range(2)]
    deadline = time.monotonic() + 3000
    while not all(rank.ended() for rank in ranks):
        if time.monotonic() > deadline or (victim >= 0 and not alone and ranks[victim].ended()):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.wait() for rank in ranks]


def kill_runs(folder: Path, data: Path, runs: int, seed: int) -> dict[str, Any]:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 (half a start's time is what DeepSpeed imports late)

    at_random, wrong, tally = random.Random(seed), [], []
    truth = start(data, folder / "truth", folder / "truth.log")
    if [life.status for life in truth] != [0, 0]:
        return {"wrong": [(folder / "truth.log").read_text()[-2000:]]}
    calls = [json.loads(life.all("calls")[0]) for life in truth]
    for i in range(runs):
        run, log, alone = folder / f"run{i}", folder / f"run{i}.log", i % 3 == 2
        kills = []
        for attempt in range(2):
            victim = (i + attempt) % 2
            early = calls[victim] if attempt == 0 else calls[victim][: len(calls[victim]) // 2]
            kind = at_random.choice(sorted(set(early)))  # or nearly all would be writes of the large files
            die_at = 1 + at_random.choice([n for n, call in enumerate(early) if call == kind])
            lives = start(data, run, log, victim, die_at, alone)
            saved = max(lives[0].steps("saved"), default=-1)
            newest = checkpointer(run).newest(lambda text: None)
            found = newest.step if newest else -1
            if found < max([saved, *(start.saved_step for start in read_starts(run))]):
                wrong.append(f"run {i}: found step {found}, saved {saved}")
            if lives[victim].killed:
                kills.append(f"rank {victim}, {lives[victim].all('killed')[0]}, found {found}")
            if lives[victim].killed and alone and lives[1 - victim].status not in (0, 1):
                wrong.append(f"run {i}: the rank that was left did not end by itself: {lives[1 - victim].status}")
        lives = start(data, run, log)
        if [life.status for life in lives] != [0, 0]:
            wrong.append(f"run {i} did not end well: {log.read_text()[-2000:]}")
            continue
        try:
            assert_same_run(run, folder / "truth")
        except AssertionError as error:
            wrong.append(f"run {i}, {kills}: not the run it would have been: {str(error)[:1000]}")
        tally.append(kills)
    return {"calls": [len(rank) for rank in calls], "kills": sum(map(len, tally)), "runs": tally, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["writer", "controls", "runs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "writer":
        result: Any = kill_the_writer(options.folder, options.every, options.moments, options.seed)
    elif options.what == "controls":
        result = find_out(options.folder)
    else:
        result = kill_runs(options.folder, options.data, options.runs, options.seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
