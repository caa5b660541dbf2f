import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from largescale.config.schema import OptimizerConfig
from largescale.engine.deepspeed_engine import adam
from largescale.engine.optimizer import build_optimizer, choose_kernel
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


class CountsAsApex(CountsAsDeepSpeed):
    """Steps are a number in the group."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if self.state[p]:
                    self.state[p]["step"] = group["step"] - 1
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                del self.state[p]["step"]


@pytest.mark.parametrize("first", ["torch", "deepspeed", "apex", "fused"])
@pytest.mark.parametrize("then", ["torch", "deepspeed", "apex", "fused"])
def test_a_run_goes_on_with_another_kernel(first: str, then: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted in three places: without them the bias correction starts anew, and the next losses are others."""
    monkeypatch.setattr("largescale.training.step.adam", lambda: CountsAsDeepSpeed)
    monkeypatch.setattr("largescale.engine.optimizer.check_apex", lambda wanted: None)
    apex = ModuleType("apex.optimizers")
    apex.FusedAdam = CountsAsApex  # type: ignore[attr-defined]
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
