"""Runs the training program with a fault put in: driver.py [--die-after STEP] [--forget WHAT] ... -- PRESET ARGS.

The faults are patched in from here, so that the program itself has no switch that breaks it.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

os.environ["DS_ACCELERATOR"] = "cuda" if "cuda" in sys.argv else "cpu"
from largescale import train
from largescale.checkpoint import checkpointer as checkpoint
from largescale.checkpoint import writer
from largescale.data.loader import Loader
from largescale.distributed import watchdog
from largescale.distributed.watchdog import Watchdog
from largescale.errors import DataError
from largescale.host.launch import leave
from largescale.planning import batch_size, memory
from largescale.training import run, startup, trainer
from largescale.training.state import TrainingState
from largescale.training.step import TrainStep
from largescale.training.trainer import Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--die-after", type=int, help="kill -9 this process when the step has been taken and its save begun")
parser.add_argument("--sent", action="store_true", help="with --die-after: once the trackers have what was logged")
parser.add_argument("--forget", choices=["patience", "ema", "moments", "loss_scale"], help="lose it on resume")
parser.add_argument("--bad-loss", type=int, nargs=2, metavar=("STEP", "RANK"), help="an infinite loss")
parser.add_argument("--bad-gradient", type=int, nargs=2, metavar=("STEP", "RANK"), help="a finite loss, a NaN gradient")
parser.add_argument("--every", type=int, default=0, help="the bad number again, after so many steps each time")
parser.add_argument("--full-disk", type=int, nargs=2, metavar=("STEP", "RANK"), help="that checkpoint, on that rank only")
parser.add_argument("--no-data", type=int, metavar="RANK", help="the data set cannot be opened on that rank")
parser.add_argument("--other-version", type=int, metavar="RANK", help="other sources on that rank")
parser.add_argument("--leap", type=int, metavar="STEP", help="a loss a million times too high, on rank 1")
parser.add_argument("--lost-files", type=int, nargs=2, metavar=("STEP", "RANK"), help="data that cannot be read any more")
parser.add_argument("--damaged-data", type=int, nargs=2, metavar=("STEP", "RANK"), help="data that are not what was packed")
parser.add_argument("--kill", type=int, nargs=2, metavar=("STEP", "RANK"), help="kill -9 of that rank in the step")
parser.add_argument("--alignment", type=int, help="pad each rank's part of the weights to a multiple of this, as on GPUs")
parser.add_argument("--bug", type=int, nargs=2, metavar=("STEP", "RANK"), help="an error that nobody expects; and as on NCCL "
                    "the process group waits for the other ranks before it closes")
parser.add_argument("--hang", type=int, nargs=2, metavar=("STEP", "RANK"), help="that rank does not come back from its data")
parser.add_argument("--freeze", type=int, nargs=2, metavar=("STEP", "RANK"), help="that rank is stopped, as by SIGSTOP")
parser.add_argument("--watch-from", metavar="WHERE", help="the watch has no minute to spare, and looks from there on")
parser.add_argument("--other-weights", type=int, nargs=2, metavar=("STEP", "RANK"), help="one bit of a weight, on that rank")
parser.add_argument("--out-of-memory", type=int, nargs=2, metavar=("STEP", "RANK"), help="on that rank's GPU, as it were")
parser.add_argument("--available", type=int, nargs=2, metavar=("IMAGES", "RANK"), help="memory for so many, on that rank")
parser.add_argument("--gpu-left", type=float, metavar="GIB", help="take all of the GPU's memory but this, and batch_size.py's margin")
parser.add_argument("--stop-at", type=int, help="send this process SIGTERM at the step")
parser.add_argument("--stop-in", choices=["open_dataset", "TrainStep", "Preview", "ReferenceLoss"], help="SIGTERM in that phase")
separator = sys.argv.index("--")
faults = parser.parse_args(sys.argv[1:separator])



def wait_for_trackers(trainer: Trainer) -> None:
    """Until the notes in the run directory say that everything is with the services."""
    for tracker in trainer.telemetry._trackers:
        note = trainer.telemetry.run_dir / "trackers" / f"{tracker.name}.json"  # type: ignore[attr-defined]
        end = time.monotonic() + 120
        while not note.exists() or json.loads(note.read_text())["step"] < trainer.state.step:
            assert time.monotonic() < end, f"{note} is not at step {trainer.state.step}"
            time.sleep(0.1)


if faults.die_after is not None:
    periodic_tasks = Trainer.run_periodic_tasks

    def run_periodic_tasks(self: Trainer) -> None:
        periodic_tasks(self)
        if self.state.step == faults.die_after:
            self.checkpointer._writer.collect()  # the files are whole, the manifest is not there
            if faults.sent and self.ranks.rank == 0:
                wait_for_trackers(self)
            if faults.sent:
                self.ranks.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.run_periodic_tasks = run_periodic_tasks  # type: ignore[method-assign]

if faults.stop_at is not None:
    commit_step = Trainer.commit_step

    def stop_at(self: Trainer, report: object) -> None:
        commit_step(self, report)  # type: ignore[arg-type]
        if self.state.step == faults.stop_at and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.commit_step = stop_at  # type: ignore[method-assign]

if faults.forget:
    resume = run.resume

    def forgetful(checkpoint: object, train_step: TrainStep, state: TrainingState, say: object) -> None:
        resume(checkpoint, train_step, state, say)  # type: ignore[arg-type]
        engine, curriculum = train_step.engine, state.curriculum
        tensors = engine._zero.optimizer.state[engine._master]
        if faults.forget == "patience":
            curriculum.state = type(curriculum.state)(index=curriculum.index)
        elif faults.forget == "ema":
            tensors["ema"].copy_(engine._master)
        elif faults.forget == "moments":
            tensors["exp_avg"].zero_()
        else:
            engine._zero.loss_scaler.cur_scale *= 2

    run.resume = forgetful  # type: ignore[assignment]

if faults.bad_loss or faults.bad_gradient:
    step, rank = faults.bad_loss or faults.bad_gradient
    losses = TrainStep.micro_step_losses

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * float("nan")

    def bad(self: TrainStep, model: object, batch: object, draws: object, k: int) -> object:
        result, *rest = losses(self, model, batch, draws, k)  # type: ignore[arg-type]
        late = self.state.input_step - step
        if (late == 0 or (faults.every and late > 0 and late % faults.every == 0)) and self.ranks.rank == rank:
            loss = result.loss * float("inf") if faults.bad_loss else NanGradient.apply(result.loss)
            result = result._replace(loss=loss)
        return result, *rest

    TrainStep.micro_step_losses = bad  # type: ignore[assignment, method-assign]

if faults.out_of_memory:
    losses_before = TrainStep.micro_step_losses

    def too_much(self: TrainStep, model: object, batch: object, draws: object, k: int) -> object:
        if (self.state.input_step, self.ranks.rank) == tuple(faults.out_of_memory):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is")
        return losses_before(self, model, batch, draws, k)  # type: ignore[arg-type]

    TrainStep.micro_step_losses = too_much  # type: ignore[assignment, method-assign]

if faults.available:
    batch_size.memory = memory.memory = lambda config, ds, world_size, n: {"images": n}  # type: ignore[assignment]
    batch_size.MARGIN = 0.0
    batch_size.host_bytes = lambda: faults.available[0] if os.environ["RANK"] == str(faults.available[1]) else 10**9

if faults.gpu_left is not None:
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(int(free - faults.gpu_left * 2**30 - batch_size.MARGIN * total), dtype=torch.uint8, device="cuda")

if faults.leap is not None:
    losses_of = TrainStep.micro_step_losses

    def leap(self: TrainStep, model: object, batch: object, draws: object, k: int) -> object:
        result, *rest = losses_of(self, model, batch, draws, k)  # type: ignore[arg-type]
        if self.state.input_step == faults.leap and self.ranks.rank == 1:
            result = result._replace(loss=result.loss * 1e6)
        return result, *rest

    TrainStep.micro_step_losses = leap  # type: ignore[assignment, method-assign]

read_batch = Loader.batch
for fault in ("lost_files", "damaged_data", "kill", "hang", "freeze"):
    if (where := getattr(faults, fault)) and os.environ["RANK"] == str(where[1]):
        def batch(self: Loader, step: int, fault: str = fault, at: int = where[0]) -> object:
            if step == at:
                if fault == "lost_files":  # really: no shard is mapped any more, and none is there
                    self.dataset._mapped.clear()
                    self.dataset._folder = Path("/nowhere")
                    self._pending.clear()
                    return read_batch(self, step)
                if fault == "damaged_data":
                    raise DataError("shard_00000.arrow is damaged")
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1000)
            return read_batch(self, step)

        Loader.batch = batch  # type: ignore[assignment, method-assign]
        trainer.READ_RETRY_S = (0.01, 0.01)

if faults.alignment:
    from largescale.engine import deepspeed_patches

    deepspeed_patches.ALIGNMENT["cpu"] = faults.alignment

if faults.bug:
    batch_of = Loader.batch

    def batch_or_bug(self: Loader, step: int) -> object:
        if [step, int(os.environ["RANK"])] == faults.bug:
            raise ZeroDivisionError("a bug on this rank alone")
        return batch_of(self, step)

    Loader.batch = batch_or_bug  # type: ignore[method-assign,assignment]
    startup.Ranks.close = lambda self: time.sleep(3600)  # type: ignore[method-assign]

if faults.hang or faults.freeze or faults.watch_from:  # a slow machine is not to be taken for one that hangs, before it does
    reached, look, at, batch_before, make = (
        threading.Event(), Watchdog._watch, Watchdog.heartbeat, Loader.batch, checkpoint.Checkpointer.__init__)

    def reach(self: Loader, step: int) -> object:
        if step == (faults.hang or faults.freeze or (None,))[0]:
            reached.set()
        return batch_before(self, step)

    def arrive(self: Watchdog, where: str | None = None) -> None:
        at(self, where)
        if where and where == faults.watch_from:
            reached.set()

    def look_from_there_on(self: Watchdog) -> None:
        while not reached.wait(0.1):
            if self._done.is_set():
                return
        at(self)
        look(self)

    def make_patient(self: checkpoint.Checkpointer, *args: object, patience_s: float, **others: object) -> None:
        make(self, *args, patience_s=600, **others)  # type: ignore[arg-type]

    watchdog.START_S = 0
    Loader.batch = reach  # type: ignore[assignment, method-assign]
    Watchdog._watch, Watchdog.heartbeat = look_from_there_on, arrive  # type: ignore[method-assign]
    checkpoint.Checkpointer.__init__ = make_patient  # type: ignore[assignment, method-assign]

if faults.other_weights and os.environ["RANK"] == str(faults.other_weights[1]):
    commit = Trainer.commit_step

    def commit_and_spoil(self: Trainer, report: object) -> None:
        commit(self, report)  # type: ignore[arg-type]
        if self.state.step == faults.other_weights[0]:
            next(p for p in self.engine.module.parameters() if p.requires_grad).data.view(-1)[0] += 1e-3

    Trainer.commit_step = commit_and_spoil  # type: ignore[method-assign]

if faults.stop_in:
    if faults.stop_in in ("Preview", "ReferenceLoss"):
        cls = getattr(trainer, faults.stop_in)
        call = cls.__call__

        def stop_first(self: object, *args: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return call(self, *args)

        cls.__call__ = stop_first
    elif faults.stop_in == "TrainStep":
        init = TrainStep.__init__

        def init_and_stop(self: TrainStep, *args: object) -> None:
            init(self, *args)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGTERM)

        TrainStep.__init__ = init_and_stop  # type: ignore[assignment, method-assign]
    else:
        open_dataset = startup.open_dataset

        def open_and_stop(*args: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return open_dataset(*args)  # type: ignore[arg-type]

        startup.open_dataset = open_and_stop  # type: ignore[assignment]

if faults.full_disk:
    step, rank = faults.full_disk
    write = writer._write

    def full(state: object, path: Path) -> object:
        if os.environ["RANK"] == str(rank) and path.parent.name == f"step_{step:08d}":
            raise OSError(28, "No space left on device")
        return write(state, path)  # type: ignore[arg-type]

    writer._write = full  # type: ignore[assignment]
    save = checkpoint.Checkpointer.save

    def save_and_fail(self: checkpoint.Checkpointer, at: int, *args: object) -> None:
        save(self, at, *args)  # type: ignore[arg-type]
        if (at, os.environ["RANK"]) == (step, str(rank)):
            self._writer.wait(600)  # so that it is known at the next step, however slow the thread is

    checkpoint.Checkpointer.save = save_and_fail  # type: ignore[assignment, method-assign]

if faults.no_data is not None and os.environ["RANK"] == str(faults.no_data):

    def lost(*args: object) -> None:
        raise DataError("the file system is not mounted here")

    startup.open_dataset = lost  # type: ignore[assignment]

if faults.other_version is not None and os.environ["RANK"] == str(faults.other_version):
    startup.sources_sha256 = lambda folder: "0f"  # type: ignore[attr-defined]

leave(train.main(sys.argv[separator + 1 :]))
