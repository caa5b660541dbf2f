"""The validation loss of a comparison: that of every checkpoint, for the EMA and the raw weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.curves.rows import rows_of_protocol
from eval.held_out_loss import HeldOutLoss
from eval.score import RESULTS
from largescale.checkpoint.files import CheckpointDir, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.data.fixed_noise_set import over_all
from largescale.errors import DataError
from largescale.host.files import append_line

WEIGHTS = {"EMA": "ema", "raw weights": "master"}


class ValidationLoss(HeldOutLoss):
    """The losses of checkpoints on a fixed set of noised images."""

    def rows(self, run: Path) -> list[dict[str, Any]]:
        """What is known of a run's checkpoints by this protocol, in the order of steps."""
        return rows_of_protocol(run / "loss" / RESULTS, self.protocol)

    def add(self, run: Path, step: int) -> None:
        """Measure the EMA and the raw weights of a checkpoint, and append a row to the run's
        results: the loss of each cluster, and over all noise levels. Raises Stopped."""
        # The EMA is what is used; the raw weights show what it hides early in a run.
        trained = load_trained(run, step)
        model = trained.model.to(self.device)
        figures: dict[str, Any] = {}
        for name, kind in WEIGHTS.items():
            model.load_state_dict(named_weights(CheckpointDir.at(run, step), kind))
            clusters = self(model, trained.objective)
            # A loss that is not finite would make every mean and test of the comparison so.
            if not np.isfinite(clusters).all():
                raise DataError(
                    f"{run} at step {step:,}: the validation loss of its {name} is not finite; "
                    "leave this method out, or train it with a lower --optimizer.lr"
                )
            figures[figure(name)] = {"value": over_all(clusters, self.edges)}
            for i, loss in enumerate(clusters.tolist(), 1):
                figures[figure(name, f" C{i}")] = {"value": loss}

        (run / "loss").mkdir(exist_ok=True)
        row = {"step": step, "protocol": self.protocol, "figures": figures}
        append_line(run / "loss" / RESULTS, json.dumps(row))
        shown = [f"{figure(name)} {figures[figure(name)]['value']:.5g}" for name in WEIGHTS]
        print(f"{run} at step {step:,}: {', '.join(shown)}", flush=True)


def figure(weights: str, cluster: str = "") -> str:
    """The name of a loss in rows and tables. `cluster`: "" for all noise levels, " C1" ..."""
    return f"validation loss ({weights}){cluster}"
