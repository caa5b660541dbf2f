"""One of the ranks of test_resume.py's sweep: a run in each precision, then that run again, cut after every single step.

    sweep.py FOLDER DATA      prints, on rank 0, one line of JSON: {precision: {skipped, stages, cuts, differ}}
"""

import json
import sys
from pathlib import Path

import torch

from largescale import train
from largescale.distributed.ranks import Ranks
from largescale.host.launch import leave
from largescale.training import startup
from tests.conftest import assert_same_run, cut, ds_json, trace

torch.set_num_threads(1)
folder, data = Path(sys.argv[1]), sys.argv[2]
ranks = Ranks("cpu")
close, ranks.close = ranks.close, lambda: None  # type: ignore[method-assign]
startup.Ranks = lambda device, *timeout: ranks  # type: ignore[assignment, misc]
steps, found = 12, {}
for precision in ("fp32", "bf16", "fp16"):
    # A loss scale that overflows at the start, and doubles soon enough to overflow again.
    ds = folder / f"{precision}.json"
    if ranks.rank == 0:
        ds_json(precision, folder, initial_scale_power=24, loss_scale_window=3)
    ranks.barrier()
    args = ["debug", "--data.path", data, "--train.ds-config", ds, "--train.steps", steps, "--train.micro-batch-size", 4, "--model.depth", 1,
            "--optimizer.clip-grad-norm", 0.5, "--curriculum.patience", 1, "--checkpoint.keep-last", 100,
            "--telemetry.log-every", 1, "--telemetry.trackers", "--telemetry.preview-every", 0,
            "--telemetry.reference-every", 0]
    truth = folder / f"{precision}_truth"
    assert train.main([*map(str, args), "--checkpoint.every", "1", "--output", str(truth)]) == 0
    differ = []
    for step in range(steps):
        run = folder / f"{precision}_cut_{step}"
        if ranks.rank == 0:
            cut(truth, run, step)
        ranks.barrier()
        assert train.main([*map(str, args), "--output", str(run)]) == 0  # saves at its end only: saving is a third of it
        if ranks.rank == 0:
            try:
                assert_same_run(run, truth)
            except AssertionError:
                differ.append(step)
    rows = trace(truth)
    found[precision] = {
        "cuts": steps, "differ": differ, "stages": len({row["curriculum/index"] for row in rows}),
        "skipped": [row["optimizer/skipped_steps"] for row in rows],
    }
if ranks.rank == 0:
    print(json.dumps(found))
close()
leave(0)
