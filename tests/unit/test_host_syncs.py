"""A training step makes the host wait for the GPU nowhere but where tests/waits.py says; found on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.training.step import TrainStep
from tests.conftest import CAPTIONED, QUIET, RunHere, ds_json
from tests.ranks import ranks_of
from tests.waits import NO_WAITS, NO_WAITS_OF_THE_LOG, STAGE_2, Step, expected, here, waits, watch

FIRST = 3  # what the steps before prepare is kept
SHORT = ("--train.steps", 8, "--telemetry.log-every", 1000, "--checkpoint.every", 1000)
PARTS = ("--train.micro-batch-size", 4, "--optimizer.clip-grad-norm", 0.01)
Steps = Callable[..., list[Step]]


@pytest.fixture
def steps(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What the steps of a run on one rank wait for."""
    found = watch(monkeypatch.setattr, FIRST)

    def run(*args: Any, preset: str = "debug") -> list[Step]:
        outcome = run_here(*SHORT, *args, preset=preset)
        assert outcome.code == 0, outcome.err
        return found

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_waits_only_where_it_is_known(precision: str, parts: int, steps: Steps, tmp_path: Path) -> None:
    """With 4 `parts`: gradients summed over micro steps, and clipped."""
    found = steps("--train.ds-config", ds_json(precision, tmp_path), *(PARTS if parts == 4 else ()))
    assert [waits(step) for step in found] == [expected(parts)] * 4
    assert all(NO_WAITS.keys() <= step.keys() for step in found)


def test_a_step_of_two_ranks(blobs: Path, tmp_path: Path) -> None:
    settings = (*QUIET, *SHORT, *PARTS, "--train.ds-config", ds_json("bf16", tmp_path), "--output", tmp_path / "run")
    done = ranks_of("tests/dist/host_syncs.py", "debug", "--data.path", blobs, *settings, ranks=2)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    found = [Step({(*place,): times for *place, times in step}) for step in json.loads(done[0].stdout.splitlines()[-1])]
    assert [waits(step) for step in found] == [expected(2, ranks=2)] * 4


def test_a_wait_is_named_by_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, where DeepSpeed's accelerator is in between: then its caller is named, as on a CPU."""
    import deepspeed
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    places = list[tuple[str, str]]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: places.append(here()))
    epilogue = "def epilogue(accelerator): accelerator.synchronize()"
    names: dict[str, Any] = {}
    exec(compile(epilogue, str(Path(deepspeed.__file__).parents[1] / STAGE_2), "exec"), names)
    names["epilogue"](CUDA_Accelerator())
    assert places == [(STAGE_2, "epilogue")]


def test_captions_and_recomputed_blocks_do_not_wait(steps: Steps, captioned: Path) -> None:
    found = steps("--data.path", captioned, *CAPTIONED, "--train.activation-checkpointing")
    assert [waits(step) for step in found] == [expected()] * 4


@pytest.mark.parametrize("preset, args", [
    ("debug_sit", ("--noise.weighting", "min_snr")),
    ("debug_sit", ("--noise.sampling", "logit_normal", "--curriculum.stages", "separate")),
    ("debug_edm", ("--model.unet.augment-dim", 9, "--data.augment", 0.5, "--train.activation-checkpointing")),
    ("debug", ("--noise.sampling", "speed", "--noise.weighting", "p2")),
    ("debug", ("--noise.sampling", "laplace")),
    ("debug", ("--noise.sampling", "loss_second_moment", "--diffusion.timesteps", 10)),
])
def test_other_systems_do_not_wait(preset: str, args: tuple[Any, ...], steps: Steps) -> None:
    found = steps(*args, preset=preset)
    assert [waits(step) for step in found] == [expected()] * 4


def test_a_skipped_step_waits_no_more(steps: Steps, tmp_path: Path) -> None:
    """The scale doubles at every step until fp16 overflows."""
    found = steps("--train.ds-config", ds_json("fp16", tmp_path, initial_scale_power=20, loss_scale_window=1), "--train.steps", 10)
    assert len(found) > 6 and [waits(step) for step in found] == [expected()] * len(found)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_update_is_launched_before_the_host_waits(precision: str, steps: Steps, tmp_path: Path) -> None:
    """With --optimizer.kernel fused the host waits once too, and later; also where steps are skipped."""
    pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
    ds = ds_json(precision, tmp_path, initial_scale_power=20, loss_scale_window=1)
    found = steps("--optimizer.kernel", "fused", "--train.ds-config", ds, *PARTS)
    for step in found:
        assert waits(step) == {
            ("largescale/engine/deepspeed_patches.py", "_step_ahead_of_host", "_local_scalar_dense"): 1,
            # These are no waits on a GPU: the count of updates lies on the host, and the kernel reads what is finite.
            ("largescale/engine/fused_adamw.py", "update", "_local_scalar_dense"): 1,
            ("largescale/engine/fused_adamw.py", "_update_eagerly", "_local_scalar_dense"): 1,
        }
        places = [function for _, function, operation in step if operation == "_local_scalar_dense"]
        assert places.index("_update_eagerly") < places.index("_step_ahead_of_host")


def test_the_log_waits_for_nothing(steps: Steps) -> None:
    found = steps("--telemetry.log-every", 1)
    assert [waits(step) for step in found] == [expected()] * 4
    assert all(NO_WAITS_OF_THE_LOG.keys() <= step.keys() for step in found)


MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda loss: loss.mean().item(),
    "masked_select": lambda loss: loss.masked_select(loss > 0),
    "nonzero": lambda loss: torch.nonzero(loss),
    "index": lambda loss: loss[loss > 0],
    "index_put_": lambda loss: loss.detach().clone().index_put_((loss > 0,), loss.detach()[0]),
    "masked_fill": lambda loss: loss.masked_fill(loss > 0, loss[0]),
    "tensor": lambda loss: loss * torch.tensor(2.0, device=loss.device),
    "to": lambda loss: loss.to("cpu"),
    "cpu": lambda loss: loss.cpu(),
    "tolist": lambda loss: loss.tolist(),
    "synchronize": lambda loss: torch.cuda.synchronize(),
}


def test_a_wait_in_the_loss_is_found(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, in a step of its own."""
    losses, names = TrainStep.micro_step_losses, list(MISTAKES)

    def waiting(self: TrainStep, *args: Any) -> Any:
        result = losses(self, *args)
        if 0 <= self.state.step - FIRST < len(names):
            MISTAKES[names[self.state.step - FIRST]](result[0].loss)
        return result

    monkeypatch.setattr(TrainStep, "micro_step_losses", waiting)
    found = steps("--train.steps", FIRST + len(names) + 2)
    assert [{*waits(step)} - {*expected()} for step in found] == [
        *({("largescale/training/step.py", "forward_backward", name)} for name in names), set()]
