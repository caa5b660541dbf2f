"""Runs the training program with a fault put in: driver.py [--die-after STEP] [--forget WHAT] ... -- PRESET ARGS.

The faults are patched in from here, so that the program itself has no switch that breaks it.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
from largescale import checkpoint, train
from largescale.errors import DataError
from largescale.trainer import Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--die-after", type=int, help="kill -9 this process when the step has been taken and its save begun")
parser.add_argument("--forget", choices=["patience", "ema", "moments", "loss_scale"], help="lose it on resume")
parser.add_argument("--bad-loss", type=int, nargs=2, metavar=("STEP", "RANK"), help="an infinite loss")
parser.add_argument("--bad-gradient", type=int, nargs=2, metavar=("STEP", "RANK"), help="a finite loss, a NaN gradient")
parser.add_argument("--full-disk", type=int, nargs=2, metavar=("STEP", "RANK"), help="that checkpoint, on that rank only")
parser.add_argument("--no-data", type=int, metavar="RANK", help="the data set cannot be opened on that rank")
parser.add_argument("--stop-at", type=int, help="send this process SIGTERM at the step")
separator = sys.argv.index("--")
faults = parser.parse_args(sys.argv[1:separator])

if faults.die_after is not None:
    due = Trainer.do_what_is_due

    def do_what_is_due(self: Trainer) -> None:
        due(self)
        if self.step == faults.die_after:
            self.checkpointer._writer.collect()  # the files are whole, the manifest is not there
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.do_what_is_due = do_what_is_due  # type: ignore[method-assign]

if faults.stop_at is not None:
    count = Trainer.count

    def stop_at(self: Trainer, report: object) -> None:
        count(self, report)  # type: ignore[arg-type]
        if self.step == faults.stop_at and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.count = stop_at  # type: ignore[method-assign]

if faults.forget:
    resume = Trainer.resume

    def forgetful(self: Trainer, checkpoint: object) -> None:
        resume(self, checkpoint)  # type: ignore[arg-type]
        state = self.engine._zero.optimizer.state[self.engine._master]
        if faults.forget == "patience":
            self.curriculum.state = type(self.curriculum.state)(index=self.curriculum.index)
        elif faults.forget == "ema":
            state["ema"].copy_(self.engine._master)
        elif faults.forget == "moments":
            state["exp_avg"].zero_()
        else:
            self.engine._zero.loss_scaler.cur_scale *= 2

    Trainer.resume = forgetful  # type: ignore[method-assign]

if faults.bad_loss or faults.bad_gradient:
    step, rank = faults.bad_loss or faults.bad_gradient
    losses = Trainer.losses

    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * float("nan")

    def bad(self: Trainer, model: object, batch: object, draws: object, k: int) -> object:
        result, t = losses(self, model, batch, draws, k)  # type: ignore[arg-type]
        if self.step == step and self.ranks.rank == rank:
            loss = result.loss * float("inf") if faults.bad_loss else NanGradient.apply(result.loss)
            result = result._replace(loss=loss)
        return result, t

    Trainer.losses = bad  # type: ignore[assignment, method-assign]

if faults.full_disk:
    step, rank = faults.full_disk
    write = checkpoint._write

    def full(state: object, path: Path) -> object:
        if os.environ["RANK"] == str(rank) and path.parent.name == f"step_{step:08d}":
            raise OSError(28, "No space left on device")
        return write(state, path)  # type: ignore[arg-type]

    checkpoint._write = full  # type: ignore[assignment]

if faults.no_data is not None and os.environ["RANK"] == str(faults.no_data):

    def lost(*args: object) -> None:
        raise DataError("the file system is not mounted here")

    train.open_dataset = lost  # type: ignore[assignment]

sys.exit(train.main(sys.argv[separator + 1 :]))
