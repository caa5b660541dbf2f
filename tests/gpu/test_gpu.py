"""The GPU path: skipped, with the reason, where there is no CUDA device."""

import json
from pathlib import Path

import pytest
import torch

from largescale.monitoring.telemetry import read_metrics
from tests.conftest import QUIET, Train, cut, ds_json, final_state, trace
from tests.ranks import ranks_of
from tests.waits import NO_WAITS, WAITS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARGS = ("--train.device", "cuda", "--train.no-tf32", "--train.steps", 24, "--telemetry.log-every", 1, "--checkpoint.every", 1,
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


@pytest.mark.parametrize("preset", ["debug_sit", "debug_edm"])
@pytest.mark.parametrize("sampling", ["uniform", "loss_second_moment"])
def test_other_systems_in_fp16(preset: str, sampling: str, tmp_path: Path, train: Train) -> None:
    args = (*ARGS, "--train.ds-config", ds_json("fp16", tmp_path), "--noise.sampling", sampling, "--diffusion.timesteps", 10)
    if preset == "debug_edm":
        args += ("--model.unet.dropout", 0)  # compiled code draws other masks
    for compiled in ("off", "model"):
        done = train(*args, "--train.compile", compiled, "--output", tmp_path / compiled, ranks=1, preset=preset, timeout_s=300)
        assert done[0].returncode == 0, done[0].stderr
    off, on = ([row["loss"] for row in trace(tmp_path / name)] for name in ("off", "model"))
    assert len(off) == 24 and on == pytest.approx(off, rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_and_one(tmp_path: Path, train: Train) -> None:
    """NCCL, and the agreed vector on its side stream."""
    args = (*ARGS, "--train.ds-config", ds_json("fp32", tmp_path))
    for ranks in (1, 2):
        done = train(*args, "--output", tmp_path / f"on{ranks}", ranks=ranks)
        assert done[0].returncode == 0, done[0].stderr
    one, two = ([row["loss"] for row in trace(tmp_path / name)] for name in ("on1", "on2"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_the_gpu_only_where_it_is_known(precision: str, ranks: int, blobs: Path, tmp_path: Path) -> None:
    """Compiled, as is usual on a GPU, and with gradients summed over two micro steps."""
    def waits(*mistake: str) -> list[dict[str, int]]:
        done, *_ = ranks_of(
            "tests/gpu/host_syncs.py", 8, *mistake, "debug", "--data.path", blobs, *QUIET, "--train.device", "cuda",
            "--train.steps", 16, "--train.micro-batch-size", 8 // ranks, "--telemetry.log-every", 1000, "--checkpoint.every", 1000,
            "--train.ds-config", ds_json(precision, tmp_path), "--output", tmp_path / "".join(["run", *mistake]),
            ranks=ranks, timeout_s=300,
        )
        assert done.returncode == 0, done.stderr
        steps: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
        assert len(steps) == 7
        return steps

    waiting, allowed = ({f"{file}:{function}" for file, function, _ in table} for table in (WAITS, WAITS | NO_WAITS))
    steps = waits()
    assert [place for step in steps for place in step if place not in allowed] == []
    assert all(step.keys() & waiting for step in steps)  # it does look
    assert all(step["largescale/training/step.py:forward_backward"] == 2 for step in waits("--item"))


@pytest.mark.parametrize("what", ["blocks", "model"])
def test_compiled_and_eager(what: str, tmp_path: Path, train: Train) -> None:
    args = (*ARGS, "--train.ds-config", ds_json("bf16", tmp_path))
    for name in ("off", what):
        (done,) = train(*args, "--train.compile", name, "--output", tmp_path / name, ranks=1, timeout_s=300)
        assert done.returncode == 0 and f"compiled: {name}" in done.stderr, done.stderr
    losses = [[row["loss"] for row in trace(tmp_path / name)] for name in ("off", what)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# Activations of 1024 images take more than twice of what is left of the GPU's memory.
LARGE = ("--train.device", "cuda", "--train.steps", 3, "--telemetry.log-every", 1, "--train.global-batch-size", 1024,
         "--model.patch-size", 1, "--model.hidden-size", 256, "--model.depth", 8, "--model.num-heads", 4)
LEFT = ("--gpu-left", 6)


def test_auto_finds_a_micro_batch_that_fits(tmp_path: Path, train: Train) -> None:
    """By a trial that leaves nothing behind: training fits into what is left, and a larger one would not."""
    args = (*LARGE, "--train.ds-config", ds_json("bf16", tmp_path))
    found = {}
    for name, more in (("plain", ()), ("again", ("--train.activation-checkpointing",))):
        (done,) = train(*args, *more, "--train.micro-batch-size", "auto", "--output", tmp_path / name, ranks=1, driver=LEFT)
        assert done.returncode == 0, done.stderr
        found[name] = int(done.stderr.split("micro batch ")[1].split()[0])
    assert 1 < found["plain"] < 1024 and found["plain"] < found["again"]
    (done,) = train(*args, "--train.micro-batch-size", found["plain"], "--output", tmp_path / "number", ranks=1)
    assert [row["loss"] for row in trace(tmp_path / "number")] == pytest.approx(
        [row["loss"] for row in trace(tmp_path / "plain")], rel=1e-2)


def test_out_of_memory(tmp_path: Path, train: Train) -> None:
    args = (*LARGE, "--train.ds-config", ds_json("bf16", tmp_path), "--train.compile", "off", "--output", tmp_path / "run")
    (done,) = train(*args, ranks=1, driver=LEFT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "of step 1, with a micro batch of 1024: CUDA out of memory. Tried to allocate" in done.stderr
    assert "; set --train.micro-batch-size 512 (or auto, which finds one) or set --train.activation-checkpointing" in done.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_activation_checkpointing(precision: str, tmp_path: Path, train: Train) -> None:
    """The same numbers, to the rounding of kernels that are not deterministic, from less memory."""
    args = (*LARGE, "--train.micro-batch-size", 128, "--train.compile", "off", "--train.ds-config", ds_json(precision, tmp_path))
    rows = {}
    for name, more in (("plain", ()), ("again", ("--train.activation-checkpointing",))):
        (done,) = train(*args, *more, "--output", tmp_path / name, ranks=1)
        assert done.returncode == 0, done.stderr
        rows[name] = [row for row in read_metrics(tmp_path / name) if "loss" in row]
    assert [r["loss"] for r in rows["again"]] == pytest.approx([r["loss"] for r in rows["plain"]], rel=1e-4 if precision == "fp32" else 1e-2)
    assert rows["again"][-1]["memory_gib"] < 0.7 * rows["plain"][-1]["memory_gib"]
