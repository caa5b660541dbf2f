"""train.micro_batch_size=auto finds the largest micro batch that fits; memory that runs out says what to do."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from largescale.config.deepspeed import final_ds_config
from largescale.config.derived import batch_layout
from largescale.config.presets import debug
from largescale.config.schema import Config, TrainConfig
from largescale.diffusion.build import build_objective
from largescale.errors import ConfigError, DeviceError, LostRankError
from largescale.models.build import build_model
from largescale.models.dit import Block
from largescale.planning import batch_size
from tests.conftest import CAPTIONED, RunHere, assert_same_run, ds_json

GIB = 2**30


def with_auto(global_batch_size: int = 96, **train: Any) -> Config:
    settings = {"global_batch_size": global_batch_size, "micro_batch_size": "auto", "device": "cpu",
                "ds_config": "ds_configs/zero2_fp32.json", **train}
    return replace(debug(), train=TrainConfig(**settings))


class FakeRanks:
    """This rank is the last of those that found `others` on a CPU."""

    def __init__(self, *others: tuple[int, int]):
        self.others, self.world_size, self.device = others, 1 + len(others), torch.device("cpu")

    def raise_on_all_ranks(self, action: Callable[[], Any]) -> Any:
        return action()

    def all_gather_json(self, value: Any) -> list[Any]:
        return [*self.others, value]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A model of 1 GiB, and 1 GiB an image; call it with the GiB that are available."""
    monkeypatch.setattr(batch_size, "memory", lambda config, ds, world, n: {"weights": GIB, f"activations of {n} images": n * GIB})
    monkeypatch.setattr("largescale.planning.memory.memory", lambda config, ds, world, n: {"weights": GIB, f"activations of {n} images": n * GIB})
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda gib: monkeypatch.setattr(batch_size, "available_bytes", lambda: int(gib * GIB))


def found(config: Config, ranks: FakeRanks) -> tuple[Any, list[str]]:
    said: list[str] = []
    config = batch_size.resolve_micro_batch_size(config, final_ds_config(config, ranks.world_size), ranks, said.append)  # type: ignore[arg-type]
    return config.train.micro_batch_size, said


# ---- choosing


@pytest.mark.parametrize(("gib", "micro", "says"), [
    (1000, 96, "micro batch 96 (auto): 1 accumulation step"),
    (60, 48, "micro batch 48 (auto): 2 accumulation steps"),
    (33 / 0.95 + 0.01, 32, "micro batch 32 (auto): 3 accumulation steps"),
    (33 / 0.95 - 0.01, 24, "micro batch 24 (auto): 4 accumulation steps"),  # a margin of 5 % is left
    (2.2, 1, "micro batch 1 (auto): 96 accumulation steps"),
])
def test_the_largest_divisor_that_fits(machine: Callable[[float], None], gib: float, micro: int, says: str) -> None:
    machine(gib)
    assert found(with_auto(), FakeRanks()) == (micro, [says])


def test_ranks_take_what_all_of_them_can(machine: Callable[[float], None]) -> None:
    machine(1000)
    assert found(with_auto(), FakeRanks((8, GIB), (12, GIB)))[0] == 8
    assert found(with_auto(), FakeRanks((32, GIB), (32, GIB)))[0] == 32  # a share of 32
    with pytest.raises(ConfigError, match="fits on rank 1, which has 0.50 GiB"):
        found(with_auto(), FakeRanks((32, GIB), (0, GIB // 2)))


def test_ranks_of_one_machine_share_its_memory(machine: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(60)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert found(with_auto(), FakeRanks())[0] == 16


def test_nothing_fits(machine: Callable[[float], None]) -> None:
    machine(1.5)
    expected = (r"not even one image at a time fits on rank 0, which has 1.50 GiB of memory and needs about 2.00 GiB, and a "
                r"margin \(weights 1.00 GiB; activations of 1 images 1.00 GiB\); ")
    with pytest.raises(ConfigError, match=expected + "set --train.activation-checkpointing or start more ranks"):
        found(with_auto(), FakeRanks())
    with pytest.raises(ConfigError, match=expected + "start more ranks"):
        found(with_auto(activation_checkpointing=True), FakeRanks())


def test_a_system_that_does_not_say(machine: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "available_bytes", lambda: None)
    with pytest.raises(ConfigError, match="give a number to --train.micro-batch-size"):
        found(with_auto(), FakeRanks())


def test_a_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "available_bytes", lambda: 0)
    for micro in (8, None):
        assert found(with_auto(micro_batch_size=micro), FakeRanks()) == (micro, [])


def test_auto_is_the_whole_share_until_it_is_known() -> None:
    assert batch_layout(with_auto(), 4) == (24, 1)
    with pytest.raises(ConfigError, match="is not a multiple of world_size=5"):
        batch_layout(with_auto(), 5)


# ---- a trial, of which the CPU can do all but run out of memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trial(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the largest downwards, forward and backward, with the gradients let go of; nothing stays behind."""
    tried: list[tuple[int, bool]] = []
    blocks: list[weakref.ref[Block]] = []
    forward = Block.forward

    def short_of_memory(self: Block, x: torch.Tensor, *args: Any) -> torch.Tensor:
        blocks.append(weakref.ref(self))
        tried.append((len(x), x.dtype == torch.float32 and next(self.parameters()).dtype == torch.bfloat16))
        if len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, *args)

    dropped: list[torch.Tensor] = []
    drop_gradient = batch_size._drop_gradient

    def drop(p: torch.Tensor) -> None:
        dropped.append(p)
        drop_gradient(p)

    monkeypatch.setattr(Block, "forward", short_of_memory)
    monkeypatch.setattr(batch_size, "_drop_gradient", drop)
    state = torch.get_rng_state()
    config = with_auto(activation_checkpointing=checkpointing)
    assert batch_size.largest_that_runs(config, torch.bfloat16, torch.device("cpu"), 10, [12, 8, 6, 4]) == 6
    passes = 2 * (2 if checkpointing else 1)  # blocks, each computed twice with checkpointing
    assert tried == [(n, True) for n in (12, 8, *[6] * passes)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(dropped) == len([p for p in build_model(config.model).parameters() if p.requires_grad])
    assert all(p.grad is None for p in dropped)
    dropped.clear()
    gc.collect()
    assert blocks and [block() for block in blocks] == [None] * len(blocks)
    assert batch_size.largest_that_runs(config, torch.bfloat16, torch.device("cpu"), 10, [12]) == 0


def test_a_trial_is_compiled_as_training_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks keep less than half of the activations: an eager trial would find half of the micro batch."""
    made: list[Any] = []

    class Recorded(batch_size.Compiled):
        def __init__(self, model: Any, what: Any, device: str) -> None:
            made.append((what, device, type(model).__name__))

    resets: list[None] = []
    monkeypatch.setattr(batch_size, "Compiled", Recorded)
    monkeypatch.setattr(batch_size, "what_to_compile", lambda wanted, device, architecture: "off" if wanted == "auto" else wanted)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    for wanted in ("auto", "blocks"):
        config = with_auto()
        config = replace(config, train=replace(config.train, compile=wanted))
        assert batch_size.largest_that_runs(config, torch.float32, torch.device("cpu"), 10, [2]) == 2
    assert made == [("off", "cpu", "DiT"), ("blocks", "cpu", "DiT")] and len(resets) == 1


def test_nccl_without_memory() -> None:
    error = RuntimeError("NCCL error in: ProcessGroupNCCL2.cpp:511, unhandled cuda error, ncclUnhandledCudaError\nCuda failure 2 'out of memory'")
    assert batch_size.out_of_memory(error) and not batch_size.out_of_memory(RuntimeError("NCCL error: ncclRemoteError"))


@pytest.mark.parametrize("told", ["labels", "captions", "nothing"])
def test_a_pass_drops_the_gradients_as_they_come(told: str) -> None:
    config = with_auto()
    if told == "captions":
        model_config = replace(config.model, num_classes=0, max_caption_tokens=5, caption_width=8, caption_pooled_width=6)
        config = replace(config, model=model_config)
    elif told == "nothing":
        config = replace(config, model=replace(config.model, num_classes=0, class_dropout_prob=0.0))
    came: list[bool] = []

    def drop(p: torch.Tensor) -> None:
        came.append(p.grad is not None)
        batch_size._drop_gradient(p)

    model = build_model(config.model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.register_post_accumulate_grad_hook(drop)
    assert batch_size.step_fits(config, model, build_objective(config), torch.device("cpu"), 3)
    assert came == [True] * len(trainable) and all(p.grad is None for p in trainable)


def test_no_room_for_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*size: Any, **kwargs: Any) -> torch.Tensor:
        if size[0] == 12345:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*size, **kwargs)

    monkeypatch.setattr("largescale.planning.batch_size.torch.empty", refuse)
    assert batch_size.largest_that_runs(with_auto(), torch.float32, torch.device("cpu"), 12345, [1]) == 0


@pytest.mark.parametrize(("world_size", "beside"), [(1, 7 + 5), (2, 7 + 5 + 1.5)])
def test_what_a_trial_reserves(world_size: int, beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a rank holds but the weights and activations, which the trial makes itself, and a margin."""
    parts = {"weights": 2 * GIB, "gradients (fp32)": 3 * GIB, "master weights": 4 * GIB, "activations of 1 images": 5 * GIB}
    calls: list[Any] = []
    monkeypatch.setattr(batch_size, "memory", lambda *_: parts)
    monkeypatch.setattr("largescale.planning.memory.memory", lambda *_: parts)
    monkeypatch.setattr(batch_size, "largest_that_runs", lambda *args: calls.append(args[1:]) or 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=100 * GIB))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: calls.append("peak"))
    config = with_auto(ds_config="ds_configs/zero2_fp16.json")
    ranks: Any = SimpleNamespace(world_size=world_size, device=torch.device("cuda", 3))
    ds = final_ds_config(config, world_size)
    assert batch_size.largest_by_trial(config, ds, ranks, [8, 4]) == 4
    assert calls == [(torch.float16, torch.device("cuda", 3), beside * GIB, [8, 4]), "peak"]


# ---- running with what was found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_auto_runs_as_the_number_does(precision: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a run that is resumed where there is less memory goes on with a smaller one."""
    monkeypatch.setattr(batch_size, "memory", lambda config, ds, world, n: {"all": n})
    monkeypatch.setattr("largescale.planning.memory.memory", lambda config, ds, world, n: {"all": n})
    monkeypatch.setattr(batch_size, "host_bytes", lambda: 9)
    settings = ("--train.ds-config", ds_json(precision, tmp_path), "--checkpoint.every", 4)
    auto = run_here(*settings, "--train.steps", 8, "--train.micro-batch-size", "auto", output=tmp_path / "auto")
    assert auto.code == 0 and "micro batch 8 (auto): 2 accumulation steps" in auto.err
    assert run_here(*settings, "--train.steps", 8, "--train.micro-batch-size", 8, output=tmp_path / "eight").code == 0
    assert_same_run(tmp_path / "auto", tmp_path / "eight")
    state = fit_state(tmp_path / "auto")
    assert state["config"]["train"]["micro_batch_size"] == 8

    monkeypatch.setattr(batch_size, "host_bytes", lambda: 3)
    on = run_here(*settings, "--train.steps", 12, "--train.micro-batch-size", "auto", output=tmp_path / "auto")
    assert on.code == 0 and "micro batch 2 (auto): 8 accumulation steps" in on.err
    changed = [line for line in on.err.splitlines() if "changed on resume, in force" in line]
    assert len(changed) == 1 and "train.steps" in changed[0]
    whole = run_here(*settings, "--train.steps", 12, output=tmp_path / "whole").trace()
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}[precision]
    assert [row["loss"] for row in on.trace()] == pytest.approx([row["loss"] for row in whole], rel=tolerance)


def fit_state(run: Path) -> dict[str, Any]:
    from largescale.checkpoint.files import checkpoints

    state: dict[str, Any] = checkpoints(run)[0].manifest()["state"]
    return state


def test_a_finished_run_is_not_tried(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here("--train.steps", 2, "--train.micro-batch-size", "auto").code == 0
    monkeypatch.setattr(batch_size, "host_bytes", lambda: 1 / 0)
    outcome = run_here("--train.steps", 2, "--train.micro-batch-size", "auto")
    assert outcome.code == 0 and "finished already" in outcome.err and "(auto)" not in outcome.err


def test_with_captions_and_a_real_estimate(run_here: RunHere, captioned: Path) -> None:
    outcome = run_here("--train.steps", 2, "--data.path", captioned, *CAPTIONED, "--train.micro-batch-size", "auto")
    assert outcome.code == 0 and "micro batch 16 (auto): 1 accumulation step" in outcome.err


# ---- out of memory


@pytest.mark.parametrize(("where", "settings", "says"), [
    ("forward of step 7", {"micro_batch_size": 24}, "set --train.micro-batch-size 16 (or auto, which finds one) or set "
     "--train.activation-checkpointing or start more ranks, which share the optimizer's state"),
    ("forward of step 7", {"micro_batch_size": 24, "activation_checkpointing": True},
     "set --train.micro-batch-size 16 (or auto, which finds one) or start more ranks"),
    ("backward of step 7", {"micro_batch_size": 1}, "GiB; set --train.activation-checkpointing or start more ranks"),
    ("preview of step 7", {"micro_batch_size": 24}, "GiB; set --telemetry.preview-every 0"),
    ("start-up", {"micro_batch_size": 24}, "GiB; start more ranks"),
])
def test_what_to_do_about_it(where: str, settings: dict[str, Any], says: str) -> None:
    config = with_auto(**settings)
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB. If reserved but unallocated memory is large try"
    with pytest.raises(DeviceError) as caught, batch_size.explain_out_of_memory(config, 2, lambda: where):
        raise torch.OutOfMemoryError(words)
    text = str(caught.value)
    assert text.startswith(f"out of memory in {where}, with a micro batch of {settings['micro_batch_size']}: CUDA out of memory. "
                           "Tried to allocate 2.00 GiB. GPU 0 has 1 GiB; ")
    assert says in text and caught.value.exit_status == 2


def test_what_the_host_refuses() -> None:
    with pytest.raises(DeviceError, match="out of memory in start-up.*you tried to allocate 4611686018427387904 bytes"):
        with batch_size.explain_out_of_memory(with_auto(), 1, lambda: "start-up"):
            torch.empty(2**60)


def test_other_errors_are_not_about_memory() -> None:
    quoted = LostRankError("another rank failed: RuntimeError: DefaultCPUAllocator: not enough memory")
    for error in (quoted, RuntimeError("shapes do not match"), KeyError("out of memory")):
        with pytest.raises(type(error)) as caught, batch_size.explain_out_of_memory(with_auto(), 1, lambda: "start-up"):
            raise error
        assert caught.value is error
