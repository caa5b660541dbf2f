"""The GPU path: skipped, with the reason, where there is no CUDA device."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Train, cut, ds_json, final_state, trace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARGS = ("--train.device", "cuda", "--train.steps", 24, "--telemetry.log-every", 1, "--checkpoint.every", 1,
        "--checkpoint.keep-last", 100, "--curriculum.patience", 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_and_resume(precision: str, tmp_path: Path, train: Train) -> None:
    args = (*ARGS, "--train.ds-config", ds_json(precision, tmp_path))
    done = train(*args, "--output", tmp_path / "truth", ranks=1)
    assert done[0].returncode == 0, done[0].stderr
    losses = [row["loss"] for row in trace(tmp_path / "truth")]
    assert len(losses) == 24 and losses[-1] < losses[0]
    cut(tmp_path / "truth", tmp_path / "run", 11)
    assert train(*args, "--output", tmp_path / "run", ranks=1)[0].returncode == 0
    resumed = [row["loss"] for row in trace(tmp_path / "run")]
    # Bitwise only where every kernel is deterministic; to rounding everywhere.
    assert resumed[:11] == losses[:11] and resumed[11] == pytest.approx(losses[11], rel=1e-5 if precision == "fp32" else 1e-2)
    assert resumed == pytest.approx(losses, rel=1e-3 if precision == "fp32" else 3e-2)
    ours, theirs = final_state(tmp_path / "run"), final_state(tmp_path / "truth")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_and_one(tmp_path: Path, train: Train) -> None:
    """NCCL, and the agreed vector on its side stream."""
    args = (*ARGS, "--train.ds-config", ds_json("fp32", tmp_path))
    for ranks in (1, 2):
        done = train(*args, "--output", tmp_path / f"on{ranks}", ranks=ranks)
        assert done[0].returncode == 0, done[0].stderr
    one, two = ([row["loss"] for row in trace(tmp_path / name)] for name in ("on1", "on2"))
    assert two == pytest.approx(one, rel=1e-3)

