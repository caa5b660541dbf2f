"""A small run on two ranks, disturbed at random until the time is over, against the same run left in peace.

    python tests/e2e/chaos.py --minutes 20 --seed 0        the long test; its last lines are a tally
    ... --starts 4                                          instead of minutes: so many disturbed starts
    ... --fork                                              starts that take half as long
    ... --world-sizes 1 2 3 4                               each start on another number of ranks

The disturbances and their moments follow from the seed. Each round is a run of its own in a fresh folder; at its end the
trace (every loss, gradient norm, cluster mean, the curriculum) and the final state must be bitwise those of the quiet run.
Where the number of ranks changes, every step must be there once, with transitions where they were, and losses agree to
rounding. Needs root for the full disk (a small tmpfs); without it that disturbance is left out, and it says so.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from largescale.checkpoint.files import checkpoints
from largescale.monitoring.run_record import account, read_starts
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import assert_same_run, make_blobs, trace
from tests.ranks import ROOT, Forked, free_port

Process = subprocess.Popen[bytes] | Forked
DISTURBANCES = ("TERM one", "TERM all", "USR1 all", "kill one", "kill all", "kill all, damage", "disk full", "none")
HANGS_S = 900  # no process may live longer after what was done to it: the ranks wait 180 s for one that does not come


class Chaos:
    def __init__(self, folder: Path, steps: int, world_sizes: Sequence[int], seed: int, fork: bool):
        self.folder, self.steps, self.world_sizes, self.random = folder, steps, world_sizes, random.Random(seed)
        self.fork = fork
        self.tally: Counter[str] = Counter()
        self.starts = 0
        self.launched: list[Process] = []
        make_blobs(folder / "data")
        self.args: list[Any] = [
            "debug", "--data.path", folder / "data", "--train.steps", steps, "--train.global-batch-size", 24,
            "--curriculum.patience", 40, "--checkpoint.every", 50, "--telemetry.log-every", 1, "--optimizer.clip-grad-norm",
            1, "--telemetry.trackers", "--telemetry.preview-every", 0, "--telemetry.reference-every", 0,
            "--train.timeout-s", 120,
        ]
        if len(world_sizes) > 1:  # rounding may move a transition of the patience rule
            self.args += ["--curriculum.pacing", "fixed", "--curriculum.interval", steps // 8]
        self.mounted = self.mount(folder / "disk")

    def mount(self, where: Path) -> bool:
        where.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", where], capture_output=True)
        return done.returncode == 0

    def close(self) -> None:
        for process in self.launched:
            process.kill()
            process.wait()
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder / "disk"], check=False)

    # ---- one start

    def launch(self, run: Path, ranks: int) -> list[Process]:
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
               "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = ["-m", "largescale.train", *map(str, self.args), "--output", str(run)]
        envs = [{**env, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        log = self.folder / "log.txt"
        if self.fork:
            self.launched = [Forked(program, env, log) for env in envs]
        else:
            with log.open("a") as file:
                self.launched = [subprocess.Popen([sys.executable, *program], env=env, cwd=ROOT, stdout=file, stderr=file)
                                 for env in envs]
        return self.launched

    def wait(self, processes: list[Process], timeout_s: float) -> bool:
        """Whether all have ended by then."""
        deadline = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        return all(p.poll() is not None for p in processes)

    def begun(self, run: Path, before: int, processes: list[Process]) -> bool:
        """Wait for the first step of this start. False where it ended without one."""
        deadline, began, log = time.monotonic() + 10 * HANGS_S, time.time(), run / "metrics.jsonl"

        def stepped() -> bool:  # rows of the start before are there until this one drops them
            fresh = log.exists() and log.stat().st_mtime > began
            return fresh and any(row["step"] > before for row in read_metrics(run)[-5:])

        while not stepped():
            if self.wait(processes, 0.1):
                return False
            assert time.monotonic() < deadline, "no first step"
        return True

    def disturbed_start(self, run: Path) -> bool:
        """True if the run is finished."""
        what = self.random.choice([d for d in DISTURBANCES if self.mounted or d != "disk full"])
        ranks = self.random.choice(self.world_sizes)
        before = self.step(run)
        processes = self.launch(run, ranks)
        if self.random.random() < 0.2 and what != "disk full":  # while it starts; a full disk it would refuse
            over, where = self.wait(processes, self.random.uniform(0, 4 if self.fork else 8)), "at start"
        else:
            self.begun(run, max(before, 0), processes)
            over, where = self.wait(processes, self.random.uniform(0, 2)), "in training"
        if over:
            return self.end(run, processes, before, f"{what}: too late")
        self.disturb(what, run, processes)
        if what == "none":
            self.wait(processes, 10)
        for process in processes if what == "none" else ():
            process.send_signal(signal.SIGTERM)
        if not self.wait(processes, HANGS_S):
            for process in processes:
                process.kill()
            raise AssertionError(f"{what} {where}: {sum(p.returncode is None for p in processes)} processes hang")
        if what == "kill all, damage":
            self.damage(run)
        return self.end(run, processes, before, f"{what} {where}")

    def disturb(self, what: str, run: Path, processes: list[Process]) -> None:
        one = self.random.choice(processes)
        victims, number = {
            "TERM one": ([one], signal.SIGTERM), "TERM all": (processes, signal.SIGTERM),
            "USR1 all": (processes, signal.SIGUSR1), "kill one": ([one], signal.SIGKILL),
            "kill all": (processes, signal.SIGKILL), "kill all, damage": (processes, signal.SIGKILL),
        }.get(what, ([], signal.SIGTERM))
        for process in victims:
            process.send_signal(number)
        if what == "disk full":
            ballast = run.parent / "ballast"
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(2**16))
                except OSError:
                    pass
            self.wait(processes, self.random.uniform(1, 4))
            if self.random.random() < 0.5:  # asked to leave while it is full
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                self.wait(processes, 30)
            ballast.unlink()
            self.wait(processes, 3)
            for process in processes:
                process.send_signal(signal.SIGTERM)

    def damage(self, run: Path) -> None:
        """A byte of the newest checkpoint, or half a file; never of the only one."""
        if len(found := checkpoints(run)) < 2:
            return
        victim = self.random.choice(sorted(p for p in found[0].path.iterdir() if p.stat().st_size))
        content = bytearray(victim.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        victim.write_bytes(content if self.random.random() < 0.7 else content[: len(content) // 2])

    def end(self, run: Path, processes: list[Process], before: int, what: str) -> bool:
        codes = sorted({p.returncode for p in processes})
        step = self.step(run)
        self.starts += 1
        self.tally[f"{what}: left with {'/'.join(map(str, codes))}"] += 1
        allowed = {0, 75, -9, 1, -15, -10}  # -15 and -10: asked to stop before the program served signals
        assert set(codes) <= allowed, f"{what}: statuses {codes}; see {self.folder}/log.txt"
        if 1 in codes:  # the one that is left says who is gone
            assert "one" in what, f"{what}: statuses {codes}; see {self.folder}/log.txt"
        assert "damage" in what or step >= before, f"{what}: step {before} was saved, and now only {step}"
        print(f"start {self.starts:3}: {what}, on {len(processes)} ranks; left with {codes}, saved step {step}", flush=True)
        return codes == [0]

    def step(self, run: Path) -> int:
        """Of the newest checkpoint."""
        return found[0].step if (found := checkpoints(run)) else -1

    # ---- rounds

    def quiet(self, run: Path) -> None:
        processes = self.launch(run, self.world_sizes[-1])
        assert self.wait(processes, 3600) and {p.returncode for p in processes} == {0}

    def compare(self, run: Path, quiet: Path) -> str:
        if len(self.world_sizes) == 1:
            assert_same_run(run, quiet)
            return "bitwise the quiet run"
        ours, theirs = trace(run), trace(quiet)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, self.steps + 1))
        assert [row["curriculum/index"] for row in ours] == [row["curriculum/index"] for row in theirs]
        apart = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True)]
        return (f"every step once, same transitions; losses apart by {statistics.median(apart):.1e} (median), "
                f"{max(apart):.1e} (worst)")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--starts", type=int, default=None)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2])
    parser.add_argument("--fork", action="store_true", help="ranks start with their libraries loaded: in half of the time")
    options = parser.parse_args(args)
    began, rounds, wall = time.monotonic(), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        chaos = Chaos(Path(name), options.steps, options.world_sizes, options.seed, options.fork)
        try:
            if not chaos.mounted:
                print("no full disk: a tmpfs cannot be mounted here")
            quiet = chaos.folder / "quiet"
            chaos.quiet(quiet)
            print(f"quiet run of {options.steps} steps: {time.monotonic() - began:.0f} s", flush=True)

            def over() -> bool:
                if options.starts is not None:
                    return chaos.starts >= options.starts
                return time.monotonic() - began > 60 * options.minutes

            while not over():
                run = chaos.folder / "disk" / f"run{rounds}"
                finished = False
                while not finished and not over():
                    finished = chaos.disturbed_start(run)
                while not finished:
                    finished = chaos.end(run, left_in_peace(chaos, run), chaos.step(run), "in peace")
                rounds += 1
                spent = account(read_starts(run))
                print(f"round {rounds}: {chaos.compare(run, quiet)}; {len(read_starts(run))} starts; {spent}", flush=True)
                wall += spent.wall_s
                shutil.rmtree(run)
        except AssertionError:
            print((chaos.folder / "log.txt").read_text()[-6000:], file=sys.stderr)
            raise
        finally:
            chaos.close()
    for what, count in sorted(chaos.tally.items()):
        print(f"{count:4}  {what}")
    print(f"{rounds} rounds, {chaos.starts} starts, {time.monotonic() - began:.0f} s: nothing was lost")


def left_in_peace(chaos: Chaos, run: Path) -> list[Process]:
    processes = chaos.launch(run, chaos.world_sizes[-1])
    assert chaos.wait(processes, 3600)
    return processes


if __name__ == "__main__":
    main()
