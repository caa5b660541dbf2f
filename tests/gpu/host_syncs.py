"""host_syncs.py FIRST [--item] PRESET ARGS: trains, and prints as JSON where the host waited for the GPU, and how often,
in each step after FIRST but the last, which logs. --item: with a loss.item() that should not be there.

CUDA is asked to warn of every operation that waits. It does not count the synchronize() of a device, a stream or an event:
those are caught where Python calls them.
"""

import json
import os
import sys
import warnings
from collections import Counter
from typing import Any

os.environ["DS_ACCELERATOR"] = "cuda"
import torch

from largescale import train
from largescale.host.launch import leave
from largescale.training.step import TrainStep
from largescale.training.trainer import Trainer
from tests.waits import here

first, item, settings = int(sys.argv[1]), "--item" in sys.argv, [arg for arg in sys.argv[2:] if arg != "--item"]
steps: list[Counter[str]] = []
watching = False


def note(*about: Any, **more: Any) -> None:
    if watching:
        steps[-1][":".join(here())] += 1


def warned(message: Any, *where: Any, **more: Any) -> None:
    if "synchronizing CUDA operation" in str(message):
        note()


def noting(function: Any) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noted


warnings.simplefilter("always")
warnings.showwarning = warned
for waiter in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
    waiter.synchronize = noting(waiter.synchronize)  # type: ignore[method-assign, union-attr]
take_step, losses = Trainer.take_step, TrainStep.micro_step_losses


def watched(self: Trainer, loader: Any) -> bool:
    global watching
    if not first <= self.state.step < self.config.train.steps - 1:
        return take_step(self, loader)
    steps.append(Counter())
    torch.cuda.set_sync_debug_mode("warn")
    watching = True
    try:
        return take_step(self, loader)
    finally:
        watching = False
        torch.cuda.set_sync_debug_mode("default")


def with_item(self: TrainStep, *args: Any) -> Any:
    result = losses(self, *args)
    result[0].loss.mean().item()
    return result


Trainer.take_step = watched  # type: ignore[method-assign]
if item:
    TrainStep.micro_step_losses = with_item  # type: ignore[assignment, method-assign]
code = train.main(settings)
print(json.dumps(steps))
leave(code)
