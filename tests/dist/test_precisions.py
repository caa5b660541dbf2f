"""The same run in fp32, bf16 and fp16: the same losses but for rounding, and fp16's loss scale and skipped steps."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largescale.checkpoint.files import checkpoints, client_state
from largescale.engine.deepspeed_engine import Engine
from tests.conftest import Outcome, RunHere, ds_json

STEPS, STAGE, WINDOW = 200, 40, 20
SETTINGS = (
    "--train.steps", STEPS, "--checkpoint.every", 1000,
    # Stages begin at given steps: a rounding that moved a transition would make two runs incomparable.
    "--curriculum.pacing", "fixed", "--curriculum.interval", STAGE,
    # With Adam's eps above most gradients their scale matters, which Adam otherwise divides out.
    "--optimizer.lr", 1e-2, "--optimizer.eps", 1e-2,
)
# Begins where every gradient overflows, and grows again and again.
FP16 = {"initial_scale_power": 28, "loss_scale_window": 40}


def windows(run: Outcome, key: str) -> np.ndarray:
    """(windows, steps) of what was logged."""
    return np.array([row[key] for row in run.trace()]).reshape(-1, WINDOW)


def differences(run: Outcome, truth: Outcome, key: str) -> np.ndarray:
    """Between the means of windows, in standard errors of the true one."""
    values, true = windows(run, key), windows(truth, key)
    return np.abs(values.mean(1) - true.mean(1)) / (true.std(1, ddof=1) / math.sqrt(WINDOW))


def test_three_precisions_learn_alike(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, skipped = Engine.advance, 0

    def counting(self: Engine) -> bool:
        nonlocal skipped
        applied = advance(self)
        skipped += not applied
        return applied

    monkeypatch.setattr(Engine, "advance", counting)

    def run(name: str, precision: str, *more: Any) -> Outcome:
        nonlocal skipped
        skipped = 0
        outcome = run_here(*SETTINGS, "--train.ds-config", ds_json(precision, tmp_path, **FP16), *more, output=tmp_path / name)
        assert outcome.code == 0, outcome.err
        rows, state = outcome.trace(), client_state(checkpoints(outcome.run)[0])
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and state["step"] == STEPS
        assert rows[-1]["optimizer/skipped_steps"] == state["skipped_steps"] == skipped
        return outcome

    fp32, other = run("fp32", "fp32"), run("other", "fp32", "--train.seed", 1)
    for precision in ("bf16", "fp16"):
        half = run(precision, precision)
        stages = [[row["curriculum/index"] for row in outcome.trace()] for outcome in (half, fp32)]
        assert stages[0] == stages[1] and len(set(stages[0])) == 1 + STEPS // STAGE
        # Rounding is far below the noise; of other data, drawn by another seed, the same measure is of its size.
        for key, bound in (("loss", 0.1), ("mse", 0.1), ("optimizer/grad_norm", 0.5)):
            assert differences(half, fp32, key).max() < bound, (precision, key)
            assert differences(other, fp32, key).max() > 1, key
        rows = half.trace()
        scales = [row["optimizer/loss_scale"] for row in rows]
        if precision == "bf16":
            assert skipped == 0 and set(scales) == {1.0}
            continue
        assert all(math.log2(scale).is_integer() and 2**14 <= scale <= 2**26 for scale in scales)
        steps_up = sum(after > before for before, after in itertools.pairwise(scales))
        assert steps_up >= 2 and skipped == FP16["initial_scale_power"] + steps_up - math.log2(scales[-1])
        # at the first step until it fits, and later where the scale has outgrown the gradient
        assert 1 < rows[0]["optimizer/skipped_steps"] < skipped
