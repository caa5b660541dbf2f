"""What the engine does in DeepSpeed's place gives what DeepSpeed's own code gives."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from largescale.config.presets import PRESETS
from largescale.engine import deepspeed_patches
from largescale.engine.deepspeed_patches import ALIGNMENT
from largescale.models.build import build_model
from tests.conftest import QUIET, RunHere, ds_json, final_state, trace
from tests.ranks import ROOT


@pytest.mark.parametrize("preset", [name for name, make in PRESETS.items() if make().model.architecture == "dit"])
def test_every_rank_has_its_part_at_16_bytes(preset: str) -> None:
    """NCCL copies what is not aligned an element at a time. As DeepSpeed pads: the whole to a multiple of the
    alignment times the number of ranks; without it DiT-L/2's parts lie at 8 bytes on 8 ranks, and at 4 on more."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(PRESETS[preset]().model).parameters() if p.requires_grad)
    for ranks in (1, 2, 3, 6, 8, 16, 24, 32, 64, 256):
        padded = parameters + -parameters % (ALIGNMENT["cuda"] * ranks)
        assert 2 * padded // ranks % 16 == 0
    if preset == "dit_l2_imagenet256":
        assert 2 * (parameters + -parameters % (2 * 8)) // 8 % 16 == 8


def test_gpus_that_are_named_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for the free memory at start, and with pynvml takes the names for numbers."""
    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(cuda_accelerator, "pynvml", SimpleNamespace(nvmlDeviceGetHandleByIndex=int))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3a1c2d4e-0000,MIG-77e0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 2**30 + (index or 0), 80 * 2**30))
    monkeypatch.setattr(accelerator, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="GPU-3a1c2d4e"):
        accelerator.available_memory()
    monkeypatch.setattr("deepspeed.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "nccl_start_alignment_factor", None, raising=False)  # put back afterwards
    monkeypatch.setattr("deepspeed.runtime.compiler.compile", None)
    deepspeed_patches.patch_before_build()
    assert accelerator.available_memory() == 70 * 2**30 and accelerator.available_memory(1) == 70 * 2**30 + 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gradient_of_one_rank(precision: str, accumulation: int, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise that of DeepSpeed's buckets: all losses, weights and moments of a run are."""
    args = ("--train.steps", 10, "--curriculum.pacing", "none", "--train.micro-batch-size", 16 // accumulation,
            "--train.ds-config", ds_json(precision, tmp_path, initial_scale_power=4))
    ours = run_here(*args, output=tmp_path / "ours")
    with monkeypatch.context() as patched:
        patched.setattr(deepspeed_patches, "UnreducedGradient", lambda zero, numel: None)
        theirs = run_here(*args, output=tmp_path / "theirs")
    assert (ours.code, theirs.code) == (0, 0), ours.err
    losses, norms = ([[row[key] for row in trace(outcome.run)] for outcome in (ours, theirs)] for key in ("loss", "optimizer/grad_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # another sum
    assert losses[0] == losses[1]
    states = [final_state(outcome.run) for outcome in (ours, theirs)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_a_parameter_without_a_gradient_keeps_none_of_an_earlier_one(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its piece of the buffer is the last step's until it is zeroed: with beta1 = 0 the weight would go on moving."""
    moved: list[torch.Tensor] = []
    end = deepspeed_patches.UnreducedGradient._end_of_backward

    def spied(self: Any) -> None:
        bias = next(p for p in self._pieces if p.shape == (32,))
        if len(moved) == 2:
            self._written.discard(bias)
        end(self)
        moved.append(self._pieces[bias].clone())

    monkeypatch.setattr(deepspeed_patches.UnreducedGradient, "_end_of_backward", spied)
    assert run_here("--train.steps", 4).code == 0
    assert moved[1].any() and not moved[2].any() and moved[3].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_norm(precision: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed computes it, parameter by parameter."""
    norms_agree(ds_json(precision, tmp_path, initial_scale_power=4), run_here, monkeypatch)


def norms_agree(ds: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    ours = deepspeed_patches.StepPatches._global_norm

    def both(self: deepspeed_patches.StepPatches, **kwargs: Any) -> torch.Tensor:
        norm = ours(self)
        pairs.append((float(norm), float(DeepSpeedZeroOptimizer.scaled_global_norm(self.zero))))
        return norm

    monkeypatch.setattr(deepspeed_patches.StepPatches, "_global_norm", both)
    assert run_here("--train.steps", 5, "--train.ds-config", ds).code == 0
    assert len(pairs) == 5 and all(a == pytest.approx(b, rel=1e-5) and a > 0 for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_norm_of_gradients_in_half_precision(precision: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several ranks without grad_accum_dtype: summed in fp32 all the same, where fp16 ends at 65504."""
    monkeypatch.setattr(deepspeed_patches, "UnreducedGradient", lambda zero, numel: None)
    path = ds_json(precision, tmp_path, initial_scale_power=14)
    ds = json.loads(path.read_text())
    ds.pop("data_types", None)
    path.write_text(json.dumps(ds))
    norms_agree(path, run_here, monkeypatch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_norm_stops_a_step_as_deepspeeds_check_did(value: float, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad number in one parameter: the step is not applied and the run says so."""
    keep, seen = deepspeed_patches.UnreducedGradient._keep, [0]

    def spoil(self: Any, parameter: torch.nn.Parameter, group: int) -> None:
        seen[0] += 1
        if seen[0] == 100:
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = value
        keep(self, parameter, group)

    monkeypatch.setattr(deepspeed_patches.UnreducedGradient, "_keep", spoil)
    run = run_here("--train.steps", 6)
    assert run.code != 0 and "the gradient is not finite at step" in run.err


def test_a_start_loads_no_compiler_and_no_pandas(blobs: Path, tmp_path: Path) -> None:
    """Each takes seconds, of every rank. setuptools: by it DeepSpeed would look for a compiler."""
    program = ("import sys; from largescale import train; code = train.main(sys.argv[1:]);"
               "sys.exit(code or str([name for name in ('torch._inductor.compile_fx', 'pandas', 'setuptools') if name in sys.modules]))")
    args = ["debug", "--data.path", blobs, "--output", tmp_path / "run", "--train.steps", 2, *QUIET]
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_another_deepspeed_is_refused(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code that is overridden is not what it was: before anything is built, and with what to install."""
    def step(self: Any, closure: Any = None) -> None:
        """Another one."""

    (code, expected) = next(entry for entry in deepspeed_patches.CODE if entry[0] is DeepSpeedZeroOptimizer.step)
    assert deepspeed_patches.code_hash(code) == expected
    monkeypatch.setattr(deepspeed_patches, "CODE", [(step, expected)])
    deepspeed_patches.check_deepspeed.cache_clear()
    try:
        run = run_here("--train.steps", 2)
    finally:
        deepspeed_patches.check_deepspeed.cache_clear()
    assert run.code == 2 and "step is not what largescale overrides" in run.err and "pip install deepspeed==0.19.8" in run.err
    assert not (run.run / "checkpoints").exists()


def test_a_deepspeed_without_what_is_overridden_is_refused() -> None:
    program = ("import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
               "from deepspeed.runtime.zero import stage_1_and_2; del stage_1_and_2.GradPartitionBufferGroup\n"
               "from largescale.errors import ConfigError\n"
               "try: import largescale.engine.deepspeed_engine\nexcept ConfigError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "GradPartitionBufferGroup" in done.stdout and done.stdout.endswith("pip install deepspeed==0.19.8\n"), done.stderr
