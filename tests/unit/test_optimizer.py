import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from largescale.checkpoint.files import checkpoints, named_weights
from largescale.config.schema import OptimizerConfig
from largescale.engine.deepspeed_engine import adam
from largescale.engine.optimizer import build_optimizer, choose_kernel, steps_of
from largescale.errors import ConfigError
from tests.conftest import RunHere, cut


def run(steps: int, config: OptimizerConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parameter before and after each step, and the EMA that the optimizer carries."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = build_optimizer([p], config, "cpu", adam)
    history = [p.detach().clone()]
    for step in range(steps):
        p.grad = torch.sin(torch.arange(7.0) + step) * p.detach()
        optimizer.step()
        history.append(p.detach().clone())
    return history, optimizer.state[p]["ema"]


def test_ema_is_the_textbooks() -> None:
    """ema_0 = w_0 and ema_k = d ema_{k-1} + (1 - d) w_k, as in DiT; in float64 here."""
    history, ema = run(20, OptimizerConfig(lr=0.1, ema_decay=0.9))
    expected = history[0].double()
    for w in history[1:]:
        expected = 0.9 * expected + 0.1 * w.double()
    torch.testing.assert_close(ema.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ema, history[-1])


def test_the_update_is_adamws() -> None:
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    history, _ = run(5, config)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    plain = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(5):
        p.grad = torch.sin(torch.arange(7.0) + step) * p.detach()
        plain.step()
        torch.testing.assert_close(p, history[step + 1], rtol=1e-6, atol=1e-7)  # ours is the fused kernel


class CountsAsDeepSpeed(torch.optim.Optimizer):
    """AdamW whose steps are a plain number in the state, as DeepSpeed's two are."""

    def __init__(self, params: Any, **hyper: Any):
        super().__init__(params, hyper)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                (b1, b2), n = group["betas"], state["step"]
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                p.sub_(group["lr"] * (state["exp_avg"] / (1 - b1**n)) / ((state["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"]))


def multi_tensor_adam(chunk_size: int, noop: Any, lists: list[list[torch.Tensor]], lr: float, beta1: float, beta2: float, eps: float,
                      step: int, mode: int, bias_correction: int, weight_decay: float) -> None:
    """What amp_C's kernel of that name computes, with its arguments (csrc/multi_tensor_adam.cu)."""
    assert (mode, bias_correction) == (1, 1)  # AdamW
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + weight_decay * p
        p.sub_(lr * update)


class FusedAdam(torch.optim.Optimizer):
    """What ours relies on of apex's (at 6424da3): its arguments; steps are a number in the group; a state that is empty
    gets exp_avg and exp_avg_sq."""

    def __init__(self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
                 set_grad_none: bool = True, capturable: bool = False, master_weights: bool = False):
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = int(adam_w_mode)

    def step(self, closure: Any = None, grads: Any = None, output_params: Any = None, scale: Any = None,  # type: ignore[override]
             grad_norms: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                lists = [[t] for t in (p.grad, p.data, state["exp_avg"], state["exp_avg_sq"])]
                multi_tensor_adam(65536, None, lists, group["lr"], *group["betas"], group["eps"], group["step"], self.adam_w_mode,
                                  int(group["bias_correction"]), group["weight_decay"])


APEX = os.environ.get("APEX_CLONE")  # a clone of https://github.com/NVIDIA/apex
NO_CLONE = pytest.mark.skipif(not APEX, reason="APEX_CLONE names no clone of NVIDIA/apex")


@pytest.fixture(params=["a stand-in", pytest.param("NVIDIA's", marks=NO_CLONE)])
def apex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """apex as if it were installed: a stand-in, or its own fused_adam.py with a stand-in for its CUDA kernel."""
    monkeypatch.setattr("largescale.engine.optimizer.check_apex", lambda wanted: None)
    packages = {name: ModuleType(name) for name in ("apex", "apex.optimizers", "amp_C")}
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    if request.param == "a stand-in":
        packages["apex.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
        return
    for name in ("", "_capturable", "_capturable_master"):
        setattr(packages["amp_C"], f"multi_tensor_adam{name}", multi_tensor_adam)
    # Without its __init__.py, which imports what needs a GPU.
    for name in ("apex", "apex.optimizers"):
        packages[name].__path__ = [str(Path(str(APEX), *name.split(".")))]
    for name in ("apex.multi_tensor_apply", "apex.multi_tensor_apply.multi_tensor_apply", "apex.optimizers.fused_adam"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None, **more: made(*args, **more))  # it asks for "cuda"
    packages["apex.optimizers"].FusedAdam = importlib.import_module("apex.optimizers.fused_adam").FusedAdam  # type: ignore[attr-defined]


def test_apex_is_adamw(apex: None) -> None:
    """Ten steps; and its state has the names that a checkpoint has."""
    hyper = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "ema_decay": 0.9}
    (ours, ema), (theirs, their_ema) = (run(10, OptimizerConfig(kernel=kernel, **hyper)) for kernel in ("torch", "apex"))  # type: ignore[arg-type]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(their_ema, ema, rtol=1e-5, atol=1e-6)

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = build_optimizer([p], OptimizerConfig(kernel="apex"), "cpu", adam)
    for _ in range(10):
        optimizer.step()
    assert optimizer.state[p].keys() == {"exp_avg", "exp_avg_sq", "ema"}
    assert type(optimizer.param_groups[0]["step"]) is int and steps_of(optimizer.state[p], optimizer.param_groups[0]) == 10


@pytest.mark.parametrize("apex", [pytest.param("NVIDIA's", marks=NO_CLONE)], indirect=True)
@pytest.mark.parametrize(("first", "then"), [("torch", "apex"), ("apex", "torch")])
def test_a_run_goes_on_with_apex_or_without(first: str, then: str, apex: None, run_here: RunHere, tmp_path: Path) -> None:
    """Saved by one after ten steps, and resumed by the other."""
    steps = ("--train.steps", 20, "--checkpoint.every", 10, "--curriculum.pacing", "none")
    truth = run_here(*steps, output=tmp_path / "truth")
    half = run_here(*steps, "--optimizer.kernel", first, output=tmp_path / "half")
    assert (truth.code, half.code) == (0, 0), half.err
    cut(half.run, tmp_path / "run", 10)
    resumed = run_here(*steps, "--optimizer.kernel", then, output=tmp_path / "run")
    assert resumed.code == 0 and f"AdamW of {then}" in resumed.err
    losses = [[row["loss"] for row in outcome.trace()] for outcome in (truth, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    for kind in ("master", "ema"):
        ours, theirs = (named_weights(checkpoints(outcome.run)[0], kind) for outcome in (resumed, truth))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", ["torch", "deepspeed", "apex", "fused"])
@pytest.mark.parametrize("then", ["torch", "deepspeed", "apex", "fused"])
def test_a_run_goes_on_with_another_kernel(first: str, then: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted in three places: without them the bias correction starts anew, and the next losses are others."""
    if "fused" in (first, then):
        pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
    monkeypatch.setattr("largescale.training.step.adam", lambda: CountsAsDeepSpeed)
    monkeypatch.setattr("largescale.engine.optimizer.check_apex", lambda wanted: None)
    apex = ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    steps = ("--train.steps", 12, "--checkpoint.every", 6, "--curriculum.pacing", "none")
    truth = run_here(*steps, output=tmp_path / "truth")
    half = run_here(*steps, "--optimizer.kernel", first, output=tmp_path / "half")
    assert (truth.code, half.code) == (0, 0), half.err
    cut(half.run, tmp_path / "run", 6)
    resumed = run_here(*steps, "--optimizer.kernel", then, output=tmp_path / "run")
    assert resumed.code == 0 and f"AdamW of {then}" in resumed.err
    assert ("optimizer.kernel" in resumed.err) == (first != then)  # a change is said
    losses = [[row["loss"] for row in outcome.trace()] for outcome in (truth, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_steps_that_are_lost_are_noticed(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    steps = ("--train.steps", 12, "--checkpoint.every", 6, "--curriculum.pacing", "none")
    truth = run_here(*steps, output=tmp_path / "truth")
    cut(truth.run, tmp_path / "run", 6)
    monkeypatch.setattr("largescale.engine.deepspeed_engine.steps_of", lambda state, group: 0)
    resumed = run_here(*steps, output=tmp_path / "run")
    losses = [[row["loss"] for row in outcome.trace()] for outcome in (truth, resumed)]
    assert losses[1] != pytest.approx(losses[0], rel=2e-5)


def test_what_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in found else None)
    assert choose_kernel(OptimizerConfig(), "cuda") == "torch"
    found.append("amp_C")  # of NVIDIA's apex, with its extensions
    assert (choose_kernel(OptimizerConfig(), "cuda"), choose_kernel(OptimizerConfig(), "cpu")) == ("apex", "torch")
    assert choose_kernel(OptimizerConfig(kernel="deepspeed"), "cpu") == "deepspeed"


def test_deepspeeds_cannot_be_built() -> None:
    def adam() -> Any:
        raise RuntimeError("ninja: build stopped")

    with pytest.raises(ConfigError, match=r"cannot build it here \(ninja: build stopped\).*--optimizer.kernel torch"):
        build_optimizer([torch.nn.Parameter(torch.ones(1))], OptimizerConfig(kernel="deepspeed"), "cpu", adam)


@pytest.mark.slow
def test_deepspeeds_own(run_here: RunHere, tmp_path: Path) -> None:
    """Compiles it, which takes a minute."""
    runs = [run_here("--train.steps", 8, "--optimizer.kernel", k, output=tmp_path / k) for k in ("torch", "deepspeed")]
    assert [r.code for r in runs] == [0, 0], runs[1].err
    losses = [[row["loss"] for row in r.trace()] for r in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
