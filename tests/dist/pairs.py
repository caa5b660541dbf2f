"""The runs of test_world_sizes.py: pairs.py PLAN.json, which holds

    args     of the training program, for every run
    micro    {ranks: micro-batch size}
    phases   one after the other, each a list of runs, each {name, ranks, precision, source, cut, fault, go_on}:
             `source`, the name of an earlier run, is continued from its checkpoint of step `cut`; `fault` is put in; not
             `go_on`, it ends where it was loaded. Without a source it is a new run.

Each run leaves its folder NAME beside the plan; NAME.pt, all that was in its ranks' memory at the cut or as loaded; and
NAME.json, what the rows of its steps were: {step: [hash of a row's x_start, t, noise and y]}.

Ranks are forked, when all is imported: as 18 programs they would take longer to start than to train.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

os.environ["DS_ACCELERATOR"] = "cpu"
from largescale import train
from largescale.data.loader import Batch, Loader
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.loss_weighting import OptimisedLosses
from largescale.diffusion.objective import Losses
from largescale.distributed.ranks import Ranks
from largescale.engine.deepspeed_engine import Engine, plain
from largescale.randomness import Draws
from largescale.training import run as training_run
from largescale.training import startup
from largescale.training.state import TrainingState
from largescale.training.step import TrainStep
from largescale.training.trainer import Trainer
from tests.conftest import cut
from tests.ranks import free_port

# What a run imports when it gets there; the first, for a decorator in DeepSpeed's optimizers, takes 2 s.
for module in ("deepspeed.runtime.zero.muon.muon_optimizer", "tyro"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

Plan = dict[str, Any]
Run = dict[str, Any]

fill, resume, run_periodic_tasks = Engine._fill, training_run.resume, Trainer.run_periodic_tasks
micro_step_losses = TrainStep.micro_step_losses
batch, training_losses = Loader.batch, GaussianDiffusion.training_losses


class LoadedError(BaseException):
    """Enough was seen of this run. No Exception: one of those that several ranks do not share ends the process."""


# ---- what is written beside a run


def optimizer_state(train_step: TrainStep) -> dict[str, Tensor]:
    state: dict[str, Tensor] = train_step.engine._zero.optimizer.state[train_step.engine._master]
    return state


def snapshot(train_step: TrainStep, path: Path) -> None:
    """Collective. The ranks' own tensors, joined as they are: no saving, DeepSpeed's or ours, comes in between."""
    engine, ranks, state = train_step.engine, train_step.ranks, optimizer_state(train_step)
    sharded = {"master": engine._master.detach()} | {k: v for k, v in state.items() if k != "step"}
    whole = {kind: ranks.all_gather_flat(partition) for kind, partition in sharded.items()}
    named = [(name, p.detach()) for name, p in engine.module.named_parameters() if p.requires_grad]
    weights = torch.cat([p.reshape(-1) for _, p in named])
    mine = {
        **train_step.state.state_dict(),
        "adam_step": float(state["step"]) if state else None, "scaler": plain(engine._zero.loss_scaler),
        "weights are the masters": torch.equal(weights, whole["master"][: len(weights)].to(weights.dtype)),
    }
    each = ranks.all_gather_json(mine)  # lists for tuples, as after a load
    if ranks.rank == 0:
        torch.save({"whole": whole, "ranks": each, "shapes": {name: list(p.shape) for name, p in named}}, path)


class Rows:
    """Hashes what the model and the loss are given, row by row of the global batch."""

    def __init__(self) -> None:
        self.mine: dict[int, dict[int, str]] = defaultdict(dict)  # step -> row -> hash

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        def hashing(train_step: TrainStep, model: Any, batch: Batch, draws: Draws, k: int) -> tuple[OptimisedLosses, Tensor, Tensor]:
            def hashed(self_: GaussianDiffusion, model: Any, *inputs: Tensor) -> Losses:
                for row, *values in zip(train_step._rows[k].tolist(), *inputs, strict=True):
                    found = hashlib.blake2b(b"".join(v.numpy().tobytes() for v in values), digest_size=8).hexdigest()
                    assert self.mine[train_step.state.step].setdefault(row, found) == found, "a retry, and other inputs"
                return training_losses(self_, model, *inputs)  # type: ignore[arg-type]

            with patch.object(GaussianDiffusion, "training_losses", hashed):
                return micro_step_losses(train_step, model, batch, draws, k)

        with patch.object(TrainStep, "micro_step_losses", hashing):
            yield

    def write(self, path: Path, ranks: Ranks) -> None:
        """Collective."""
        found: dict[int, dict[int, str]] = defaultdict(dict)
        for theirs in ranks.all_gather_json([(step, row, h) for step, rows in self.mine.items() for row, h in rows.items()]):
            assert not any(row in found[step] for step, row, _ in theirs), "two ranks had the same row"
            for step, row, hashed in theirs:
                found[step][row] = hashed
        if ranks.rank == 0:
            path.write_text(json.dumps({step: [hash for _, hash in sorted(rows.items())] for step, rows in found.items()}))


# ---- faults: what can go wrong between two numbers of ranks


def fill_moved(engine: Engine, partition: Tensor, pieces: Iterable[Tensor]) -> None:
    fill(engine, partition, itertools.chain([torch.zeros(1)], pieces))


def fill_as_rank_0(engine: Engine, partition: Tensor, pieces: Iterable[Tensor]) -> None:
    with patch.object(engine, "_rank", 0):
        fill(engine, partition, pieces)


def fill_with_padding(engine: Engine, partition: Tensor, pieces: Iterable[Tensor]) -> None:
    fill(engine, partition, pieces)
    partition.data[max(engine.numel - engine._rank * partition.numel(), 0) :] = 1


PATCHES: dict[str, Any] = {
    "moved by one": lambda: patch.object(Engine, "_fill", fill_moved),
    "all of rank 0": lambda: patch.object(Engine, "_fill", fill_as_rank_0),
    "padding": lambda: patch.object(Engine, "_fill", fill_with_padding),
    "weights": lambda: patch.object(Engine, "gather_weights", lambda engine: None),
    "data position": lambda: patch.object(Loader, "batch", lambda loader, step: batch(loader, step + 1)),
}
CHANGES: dict[str, Callable[[TrainStep], Any]] = {
    "exp_avg": lambda step: optimizer_state(step)["exp_avg"].zero_(),
    "exp_avg_sq": lambda step: optimizer_state(step)["exp_avg_sq"].zero_(),
    "ema": lambda step: optimizer_state(step)["ema"].copy_(step.engine._master.detach()),
    "adam_step": lambda step: optimizer_state(step)["step"].zero_(),
    "loss scale": lambda step: setattr(step.engine._zero.loss_scaler, "cur_scale", 2.0**10),
    "skipped steps": lambda step: setattr(step.state, "skipped_steps", 0),
    "curriculum": lambda step: setattr(
        step.state.curriculum, "state", step.state.curriculum.pacing.start(step.state.curriculum.n_clusters)),
    "draws": lambda step: setattr(step, "_rows", (step._rows + 1) % step.config.train.global_batch_size),
}


# ---- the runs


def start(plan: Plan, folder: Path, run: Run, ranks: Ranks) -> None:
    path, fault = folder / run["name"], run["fault"]
    args = [*plan["args"], "--output", path, "--train.ds-config", folder / f"{run['precision']}.json",
            "--train.micro-batch-size", plan["micro"][str(ranks.world_size)]]
    assert not fault or fault in PATCHES or fault in CHANGES

    def resume_and_look(checkpoint: Any, train_step: TrainStep, state: TrainingState, say: Any) -> None:
        resume(checkpoint, train_step, state, say)
        CHANGES.get(fault, lambda step: None)(train_step)
        snapshot(train_step, folder / f"{run['name']}.pt")
        if not run["go_on"]:
            raise LoadedError

    def look_at_the_cut(trainer: Trainer) -> None:
        if run["source"] is None and trainer.state.step == run["cut"]:
            snapshot(trainer.train_step, folder / f"{run['name']}.pt")
        run_periodic_tasks(trainer)

    if run["source"] is not None and ranks.rank == 0:
        cut(folder / run["source"], path, run["cut"])
    ranks.barrier()
    rows = Rows()
    with contextlib.suppress(LoadedError), contextlib.ExitStack() as patched:
        patched.enter_context(rows.watched())
        patched.enter_context(patch.object(training_run, "resume", resume_and_look))
        patched.enter_context(patch.object(Trainer, "run_periodic_tasks", look_at_the_cut))
        patched.enter_context(PATCHES.get(fault, contextlib.nullcontext)())
        assert train.main([*map(str, args)]) == 0
        rows.write(folder / f"{run['name']}.json", ranks)


def one_rank(plan: Plan, folder: Path, runs: list[Run], rank: int, port: int) -> None:
    world_size = runs[0]["ranks"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    ranks = Ranks("cpu")
    close, ranks.close = ranks.close, lambda: None  # type: ignore[method-assign]
    startup.Ranks = lambda device, *timeout: ranks  # type: ignore[assignment, misc]
    for run in runs:
        start(plan, folder, run, ranks)
    close()


def main(path: Path, timeout_s: float = 3000) -> int:
    plan, fork = json.loads(path.read_text()), multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    for phase in plan["phases"]:
        processes = []
        for n in sorted({run["ranks"] for run in phase}):
            runs, port = [run for run in phase if run["ranks"] == n], free_port()
            processes += [fork.Process(target=one_rank, args=(plan, path.parent, runs, rank, port)) for rank in range(n)]
        for process in processes:
            process.start()
        running = processes
        while running:
            woken = multiprocessing.connection.wait([process.sentinel for process in running], timeout_s)
            if not woken or any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                return 1
            running = [process for process in running if process.exitcode is None]
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
