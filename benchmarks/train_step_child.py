"""One way's side of benchmarks/train_step.py: a process of its own, which takes a turn when it is
asked to.

    train_step_child.py '{"kind": "ours" | "dit" | "fast-dit" | "diffusers" | "ddp", ...}'

Answers each line of JSON on stdin with one: {} with what the first steps found and how long the
very first one took, {"steps": n} with the times of n steps, after one that is not counted, and for
ours with what the time of n more went to.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from train_step_peers import GIVEN, PEERS, Job, Step, same_weights

from largescale.config.serialise import from_dict
from largescale.data.loader import to_x_start
from largescale.data.shards import ShardDataset
from largescale.host.machine import keep_freed_memory

# Where answers go; in the child it is not what libraries print to.
ANSWERS = sys.stdout


class Failed(Exception):
    """The child reported an error, or ended."""


class Child:
    """The process, as benchmarks/train_step.py sees it. Raises Failed for what went wrong in it."""

    def __init__(self, job: dict[str, Any], folder: Path):
        """`job`: a Job's fields; `folder`: for its log and what it compiles."""
        folder.mkdir(exist_ok=True)
        # Empty caches: the first step is measured with compiling.
        environment = {}
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            environment[name] = str(folder / name.lower())
        threads = job["config"]["train"]["threads"]
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._log = folder / "log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        assert self._process.stdin and self._process.stdout
        self._asks = self._process.stdin
        self._answers = self._process.stdout

    def ask(self, **what: Any) -> dict[str, Any]:
        """Ask for a turn; returns the answer."""
        # A child that is gone is reported by `answer`.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(what), file=self._asks, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer."""
        if not (line := self._answers.readline()):
            raise Failed(f"it ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def log_end(self) -> str:
        """The end of what the child printed."""
        return self._log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End the child."""
        # It ends with its stdin.
        with contextlib.suppress(BrokenPipeError):
            self._asks.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


class Clock:
    """A clock for steps. On a GPU it is events in its stream: what the device did. With one thread
    on a CPU it is the process's own time, which other programs lengthen less (waiting counts for
    nothing); else wall-clock time."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self._host = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now(self) -> Any:
        """A stamp: an event on a GPU, else seconds."""
        if not self.gpu:
            return self._host()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, stamps: list[Any]) -> list[float]:
        """Seconds from each stamp to the next."""
        if self.gpu:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in pairwise(stamps)]


class Split:
    """What the time of a step goes to: parts within parts, each without those in it, so that they
    add up."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._on = False
        # The parts that are open, the innermost last; what has no name of its own is pacing.
        self._open = ["pacing"]
        # A stamp at each change, and the part that ended with it.
        self._ended: list[str] = []
        self._stamps: list[Any] = []

    def take(self, steps: int, step: Step) -> dict[str, float]:
        """Take steps; returns the seconds a step of each part."""
        self._ended = []
        self._stamps = [self._clock.now()]
        self._on = True
        for _ in range(steps):
            step()
        self._mark()
        self._on = False

        # A part can end several times in a step.
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in zip(self._ended, self._clock.between(self._stamps), strict=True):
            parts[name] += seconds / steps
        return dict(parts)

    def _mark(self) -> None:
        # Only while steps are split: stamps cost time.
        if self._on:
            self._ended.append(self._open[-1])
            self._stamps.append(self._clock.now())

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time goes to this part, but for the parts within it."""
        self._mark()
        self._open.append(name)
        yield
        self._mark()
        self._open.pop()

    def becomes(self, name: str) -> None:
        """End the part that is open, and continue with this one in its place."""
        self._mark()
        self._open[-1] = name

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of a method as this part."""
        inner = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)


def ours(job: Job) -> None:
    """`Trainer.take_step`, as the program takes it, in the loop of `Trainer.train`; it logs at
    every step."""
    os.environ["DS_ACCELERATOR"] = job.device.type
    from largescale.checkpoint.checkpointer import Checkpointer
    from largescale.config.deepspeed import final_ds_config, precision
    from largescale.diffusion.build import build_objective
    from largescale.distributed.ranks import Ranks
    from largescale.distributed.watchdog import Watchdog
    from largescale.monitoring.telemetry import Telemetry
    from largescale.training import step as module
    from largescale.training.recorder import Recorder
    from largescale.training.startup import use_tf32
    from largescale.training.state import TrainingState
    from largescale.training.trainer import Trainer

    class Served(Trainer):
        # What an fp16 step that overflows leaves.
        found = (math.nan, math.nan)

        def take_step(self, batches: Any) -> bool:
            def step() -> tuple[float, float]:
                super(Served, self).take_step(batches)
                return self.found

            serve(job, step, split)
            return True  # asked to stop

        def commit_step(self, report: Any) -> None:
            self.found = report.loss, report.mse
            super().commit_step(report)

    # What the training program builds before its first step.
    c = job.config
    split = Split(Clock(job.device))
    start_time = time.time()
    ds = final_ds_config(c, 1)
    ranks = Ranks(c.train.device)
    if c.train.device == "cuda":
        use_tf32(c.train.tf32)
    dataset = ShardDataset(c.data.path)
    checkpointer = Checkpointer(c.run_dir, c.checkpoint, ranks, c.train.timeout_s)
    objective = build_objective(c)
    state = TrainingState(c, objective)
    with mock.patch.object(module, "build_model", same_weights):
        train_step = module.TrainStep(c, ds, ranks, dataset, objective, state)
    with Telemetry(
        c.run_dir, active=True, tensorboard=True, step=0, steps=c.train.steps
    ) as telemetry:
        recorder = Recorder(
            c,
            ranks,
            state,
            telemetry,
            Watchdog(c.train.timeout_s),
            precision=precision(ds),
            flops_per_step=train_step.flops,
            start_time=start_time,
        )
        trainer = Served(c, ranks, dataset, train_step, state, checkpointer, recorder, {})
        hook(trainer, module, split)
        trainer.train()


def hook(t: Any, module: Any, split: Split) -> None:
    """Split the recorder's laps, and within them what has a name of its own."""
    lap = t.recorder.lap

    @contextlib.contextmanager
    def split_lap(name: str) -> Iterator[None]:
        with split.part({"forward": "rows"}.get(name, name)), lap(name):
            yield

    # The lap of forward starts with taking the rows, which ends where x_start is made of them.
    def x_start(*args: Any) -> Tensor:
        split.becomes("forward")
        return to_x_start(*args)

    t.recorder.lap = split_lap
    module.to_x_start = x_start
    split.watch(t, "run_periodic_tasks", "telemetry")

    # ZeRO-2 takes each parameter's gradient as soon as it exists, during backward.
    zero = t.engine._zero
    split.watch(zero, "process_gradients", "reduce")
    split.watch(zero, "independent_gradient_partition_epilogue", "reduce")
    # A fused update has the EMA in it.
    if hasattr(zero.optimizer, "update"):
        split.watch(zero.optimizer, "update", "AdamW")
        return
    # The class below is AdamW, whose step has no EMA.
    base = type(zero.optimizer).__mro__[1]
    split.watch(base, "step", "AdamW")
    split.watch(zero.optimizer, "step", "EMA")


def serve(job: Job, step: Step, split: Split | None = None) -> None:
    """Take turns until stdin ends."""
    clock = Clock(job.device)
    gpu = job.device.type == "cuda"
    peak = 0

    def timed(steps: int) -> list[float]:
        stamps = [clock.now()]
        for _ in range(steps):
            step()
            stamps.append(clock.now())
        return clock.between(stamps)

    answer(built=True)
    spent, since = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        # A way that works while another has its turn would slow it.
        idle = {"idle_s": time.perf_counter() - since, "idle_cpu_s": time.process_time() - spent}
        asked = json.loads(line)
        if "steps" not in asked:
            # By the wall clock: also compiling, which other processes do.
            begin = time.perf_counter()
            found = [step()]
            if gpu:
                torch.cuda.synchronize()
            first_s = time.perf_counter() - begin
            found += [step() for _ in range(GIVEN - 1)]
            losses, mses = zip(*found, strict=True)
            answer(first_s=first_s, losses=floats(losses), mses=floats(mses), **idle)
        else:
            # Not counted: caches are cold, and the GPU's memory was given back.
            step()
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = timed(asked["steps"])
            peak = max(peak, torch.cuda.max_memory_allocated() if gpu else resident())
            parts = split.take(asked["steps"], step) if split else None
            answer(times=times, parts=parts, peak_bytes=peak, **idle)
        # The next way needs the memory.
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        spent, since = time.process_time(), time.perf_counter()


def floats(values: Sequence[Any]) -> list[float | None]:
    """Losses as numbers; None stays."""
    return [None if value is None else float(value) for value in values]


def resident() -> int:
    """The most memory this process has had, in bytes. (For getrusage, what its parent had when it
    forked counts too.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed("/proc/self/status has no VmHWM; run this on Linux")


def answer(**what: Any) -> None:
    """Print an answer, or an error."""
    print(json.dumps(what), file=ANSWERS, flush=True)


def main() -> None:
    global ANSWERS
    # Whatever a library prints goes to the log.
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    job = Job(**given | {"config": from_dict(given["config"])})
    if job.config.train.threads:
        torch.set_num_threads(job.config.train.threads)
    try:
        if job.kind == "ours":
            # As train.py does.
            if job.config.train.device == "cpu":
                keep_freed_memory()
            ours(job)
        else:
            serve(job, PEERS[job.kind](job))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        raise


if __name__ == "__main__":
    main()
