"""timeouts.py PRESET ARGS: trains; rank 0 prints the time limit, in seconds, of every process group that is left at the end."""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist

from largescale import train
from largescale.host.launch import leave
from largescale.training import startup


def printing(self: startup.Ranks) -> None:
    if self.rank == 0:
        groups = [*dist.distributed_c10d._world.pg_map]
        limits = {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}
        print("limits", len(groups), *sorted(limits))


startup.Ranks.close = printing  # type: ignore[method-assign]
leave(train.main(sys.argv[1:]))
