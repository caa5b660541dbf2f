"""One way's side of benchmarks/train_step.py: a process of its own, which takes its turns as it is
told.

    train_step_child.py '{"kind": "ours" | "dit" | "fast-dit" | "diffusers" | "ddp", ...}'

Answers each line of JSON on stdin with one: {} with what the first steps found and how long the
very first one took, {"steps": n} with the times of n steps, after one that is not counted, and for
ours with what n more went to.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
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

ANSWERS = sys.stdout


class Failed(Exception):
    pass


class Child:
    """The process, as benchmarks/train_step.py sees it. Raises Failed for what went wrong in it."""

    def __init__(self, job: dict[str, Any], folder: Path):
        """`job`: a Job's fields; `folder`: for its log and what it compiles, which nobody has
        compiled before."""
        folder.mkdir(exist_ok=True)
        threads = job["config"]["train"]["threads"]
        environment = {
            name: str(folder / name.lower())
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        }
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
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
        self._asks, self._answers = self._process.stdin, self._process.stdout

    def ask(self, **what: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it is gone, which `answer` says
            print(json.dumps(what), file=self._asks, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        if not (line := self._answers.readline()):
            raise Failed(f"it ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def log_end(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._asks.close()  # which it takes as the end
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


class Clock:
    """On a GPU events in its stream: what the device did. With one thread on a CPU the process's
    own time, which what else runs does not lengthen so much (waiting counts for nothing); else
    wall-clock time."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self._host = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now(self) -> Any:
        if not self.gpu:
            return self._host()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, stamps: list[Any]) -> list[float]:
        """Seconds from each to the next."""
        if self.gpu:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in pairwise(stamps)]


class Split:
    """What the time of a step goes to: parts within parts, each without those in it, so that they
    add up."""

    def __init__(self, clock: Clock):
        self._clock, self._open, self._on = clock, ["pacing"], False

    def take(self, steps: int, step: Step) -> dict[str, float]:
        """Seconds a step."""
        self._on, self._ended, self._stamps = True, [], [self._clock.now()]
        for _ in range(steps):
            step()
        self._mark()
        self._on = False
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in zip(self._ended, self._clock.between(self._stamps), strict=True):
            parts[name] += seconds / steps
        return dict(parts)

    def _mark(self) -> None:
        if self._on:
            self._ended.append(self._open[-1])
            self._stamps.append(self._clock.now())

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        yield
        self._mark()
        self._open.pop()

    def becomes(self, name: str) -> None:
        """The part that is open ends here, and this one goes on in its place."""
        self._mark()
        self._open[-1] = name

    def watch(self, owner: Any, method: str, name: str) -> None:
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
    from largescale.training.state import TrainingState
    from largescale.training.trainer import Trainer

    class Served(Trainer):
        def take_step(self, batches: Any) -> bool:
            def step() -> tuple[float, float]:
                super(Served, self).take_step(batches)
                return self.found

            serve(job, step, split)
            return True  # asked to stop

        def commit_step(self, report: Any) -> None:
            self.found = report.loss, report.mse
            super().commit_step(report)

    c, split, began = job.config, Split(Clock(job.device)), time.time()
    ds, ranks, dataset = final_ds_config(c, 1), Ranks(c.train.device), ShardDataset(c.data.path)
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
            start_time=began,
        )
        trainer = Served(c, ranks, dataset, train_step, state, checkpointer, recorder, {})
        hook(trainer, module, split)
        trainer.train()


def hook(t: Any, module: Any, split: Split) -> None:
    """The recorder's laps, and within them what has a name of its own."""
    lap = t.recorder.lap

    @contextlib.contextmanager
    def split_lap(name: str) -> Iterator[None]:
        with split.part({"forward": "rows"}.get(name, name)), lap(name):
            yield

    def x_start(*args: Any) -> Tensor:  # the rows have been taken
        split.becomes("forward")
        return to_x_start(*args)

    t.recorder.lap, module.to_x_start = split_lap, x_start
    split.watch(t, "run_periodic_tasks", "telemetry")
    zero = t.engine._zero
    split.watch(
        zero, "process_gradients", "reduce"
    )  # a parameter's gradient is there, in the midst of backward
    split.watch(zero, "independent_gradient_partition_epilogue", "reduce")
    base = type(zero.optimizer).__mro__[1]  # AdamW's step, without the EMA
    split.watch(base, "step", "AdamW")
    split.watch(zero.optimizer, "step", "EMA")


def serve(job: Job, step: Step, split: Split | None = None) -> None:
    """Take turns until stdin ends."""
    clock, gpu, peak = Clock(job.device), job.device.type == "cuda", 0

    def timed(steps: int) -> list[float]:
        stamps = [clock.now()]
        for _ in range(steps):
            step()
            stamps.append(clock.now())
        return clock.between(stamps)

    answer(built=True)
    spent, since = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        idle = {"idle_s": time.perf_counter() - since, "idle_cpu_s": time.process_time() - spent}
        if "steps" not in (told := json.loads(line)):
            begin = time.perf_counter()
            found = [step()]
            if gpu:
                torch.cuda.synchronize()
            first_s = (
                time.perf_counter() - begin
            )  # whatever the clock: also compiling, which other processes do
            found += [step() for _ in range(GIVEN - 1)]
            losses, mses = (
                [None if value is None else float(value) for value in values]
                for values in zip(*found, strict=True)
            )
            answer(first_s=first_s, losses=losses, mses=mses, **idle)
        else:
            step()  # caches are cold, the GPU's memory was given back
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = timed(told["steps"])
            peak = max(peak, torch.cuda.max_memory_allocated() if gpu else resident())
            parts = split.take(told["steps"], step) if split else None
            answer(times=times, parts=parts, peak_bytes=peak, **idle)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        spent, since = time.process_time(), time.perf_counter()


def resident() -> int:
    """The most this process has had, in bytes. (For getrusage, what its parent had when it forked
    counts too.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def answer(**what: Any) -> None:
    print(json.dumps(what), file=ANSWERS, flush=True)


def main() -> None:
    global ANSWERS
    # whatever a library prints goes to the log
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    job = Job(**given | {"config": from_dict(given["config"])})
    if job.config.train.threads:
        torch.set_num_threads(job.config.train.threads)
    try:
        if job.kind == "ours":
            if job.config.train.device == "cpu":
                keep_freed_memory()  # as train.py does
            ours(job)
        else:
            serve(job, PEERS[job.kind](job))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        raise


if __name__ == "__main__":
    main()
