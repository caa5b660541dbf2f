"""What SiT, EDM and the baselines need of several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint.files import checkpoints
from largescale.diffusion.noise_levels import LossSecondMoment
from tests.conftest import Train, assert_same_run, cut, trace

RESAMPLED = ("--noise.sampling", "loss_second_moment", "--diffusion.timesteps", 10)


def test_ranks_share_what_resampling_learns(train: Train, tmp_path: Path) -> None:
    """On two ranks and with accumulation the history is that of one: the losses of all rows, in the batch's order."""
    args = ("--train.steps", 20, "--curriculum.pacing", "none", *RESAMPLED)
    ways: dict[str, tuple[tuple[Any, ...], int]] = {
        "one": ((), 1), "parts": (("--train.micro-batch-size", 4), 1), "two": (("--train.micro-batch-size", 4), 2)}
    states = {}
    for name, (more, ranks) in ways.items():
        done = train(*args, *more, "--output", tmp_path / name, ranks=ranks)
        assert all(p.returncode == 0 for p in done), done[0].stderr
        sampler = LossSecondMoment(10)
        sampler.load_state_dict(checkpoints(tmp_path / name)[0].manifest()["state"]["noise_sampler"])
        states[name] = sampler
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    one, parts, two = (states[name].warp(u, 0.0, 1.0)[0] for name in ways)
    assert not torch.equal(one, u)  # it has warmed up
    torch.testing.assert_close(parts, one, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    losses = [[row["loss"] for row in trace(tmp_path / name)] for name in ways]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_two_ranks_of_edm_resume(train: Train, tmp_path: Path) -> None:
    """Dropout and augmentation draw again what they drew."""
    args = ("--train.steps", 10, "--checkpoint.every", 5, "--train.micro-batch-size", 4, "--model.unet.augment-dim", 9,
            "--data.augment", 0.3)
    for run in ("truth", "cut"):
        if run == "cut":
            cut(tmp_path / "truth", tmp_path / "cut", 5)
        done = train(*args, "--output", tmp_path / run, preset="debug_edm")
        assert all(p.returncode == 0 for p in done), done[0].stderr
    assert_same_run(tmp_path / "cut", tmp_path / "truth")
