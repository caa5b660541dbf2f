"""AdamW, the EMA of the weights and their cast to half precision in one pass over a rank's partition.

An element is read once (master weight, gradient, two moments, EMA) and written once (the same but
the gradient, and the weight in half precision): 38 bytes, where unscaling the gradient, torch's
fused AdamW, the EMA and the cast take 54. Whether the gradient is finite, and what it is multiplied
by, are read on the GPU, so that the update can be launched before the host knows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from largescale.engine.power_averages import update_averages

BLOCK = 1024
WARPS = 4


# fmt: off
@triton.jit
def adamw_kernel(
    master: tl.tensor, grad: tl.tensor, exp_avg: tl.tensor, exp_avg_sq: tl.tensor, ema: tl.tensor,
    half: tl.tensor, finite: tl.tensor, factor: tl.tensor, kept: tl.tensor, step_size: tl.tensor,
    to_first: tl.tensor, beta2: tl.tensor, to_second: tl.tensor, root: tl.tensor, eps: tl.tensor,
    to_ema: tl.tensor, numel: tl.tensor, has_half: tl.constexpr, block: tl.constexpr,
) -> None:
    """Nothing is written where `finite` is 0. The numbers are those of `Coefficients`."""
    if tl.load(finite) == 0:
        return
    # In 64 bits: an offset in a large tensor does not fit into 32.
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < numel
    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(factor)
    weight = tl.load(master + at, mask=inside, other=0.0)
    first = tl.load(exp_avg + at, mask=inside, other=0.0)
    second = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    average = tl.load(ema + at, mask=inside, other=0.0)

    first += to_first * (g - first)
    second = beta2 * second + to_second * g * g
    weight = kept * weight - step_size * first / (tl.sqrt(second) / root + eps)
    average += to_ema * (weight - average)

    tl.store(master + at, weight, mask=inside)
    tl.store(exp_avg + at, first, mask=inside)
    tl.store(exp_avg_sq + at, second, mask=inside)
    tl.store(ema + at, average, mask=inside)
    if has_half:
        tl.store(half + at, weight.to(half.dtype.element_ty), mask=inside)
# fmt: on


@dataclass(frozen=True)
class Coefficients:
    """Numbers of one update of AdamW (Loshchilov and Hutter, arXiv:1711.05101) and of the EMA,
    which the host computes in double precision."""

    kept: float
    """Of the weight, after weight decay: 1 - lr weight_decay."""
    step_size: float
    """lr / (1 - beta1 ** n) in the n-th update."""
    to_first: float
    """1 - beta1."""
    beta2: float
    to_second: float
    """1 - beta2."""
    root: float
    """sqrt(1 - beta2 ** n)."""
    eps: float
    to_ema: float
    """1 - ema_decay."""

    @classmethod
    def of(cls, group: dict[str, Any], n: int) -> "Coefficients":
        beta1, beta2 = group["betas"]
        return cls(
            kept=1 - group["lr"] * group["weight_decay"],
            step_size=group["lr"] / (1 - beta1**n),
            to_first=1 - beta1,
            beta2=beta2,
            to_second=1 - beta2,
            root=math.sqrt(1 - beta2**n),
            eps=group["eps"],
            to_ema=1 - group["ema_decay"],
        )


class FusedAdamW(torch.optim.Optimizer):
    """AdamW that keeps the EMA of its weights, with the state of `carrying_ema(torch.optim.AdamW)`.

    Its parameters are flat and float32. Without a GPU plain PyTorch computes the same.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float,
    ):
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**given, "ema_decay": ema_decay, "power_ema_decays": {}})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    one = torch.ones((), device=p.device)
                    self.update(p, p.grad, None, finite=one, factor=one)
                    self.count(p)

    @torch.no_grad()
    def update(
        self, p: Tensor, grad: Tensor, half: Tensor | None, *, finite: Tensor, factor: Tensor
    ) -> None:
        """Update p by grad x factor, and write it to `half` too, unless `finite` is 0: 0-dim
        float32 tensors on the device of p. `count` what was updated afterwards."""
        (group,) = (g for g in self.param_groups if any(p is each for each in g["params"]))
        state = self.state[p]
        if not state:
            # On the host, which so knows it without waiting.
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            state["ema"] = p.detach().clone()
        numbers = Coefficients.of(group, int(state["step"]) + 1)
        tensors = (p, grad, state["exp_avg"], state["exp_avg_sq"], state["ema"])
        if p.device.type == "cpu" and isinstance(adamw_kernel, JITFunction):
            _update_eagerly(*tensors, half, finite, factor, numbers)
        else:
            adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
                *tensors,
                p if half is None else half,
                finite,
                factor,
                **vars(numbers),
                numel=p.numel(),
                has_half=half is not None,
                block=BLOCK,
                num_warps=WARPS,
            )
        update_averages(state, p, group["power_ema_decays"], finite)

    def count(self, p: Tensor) -> None:
        """Note that the last update of p was finite."""
        self.state[p]["step"] += 1

    def set_steps(self, steps: int) -> None:
        """Set how many updates the state, which is not empty, has seen."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = torch.tensor(float(steps))


def _update_eagerly(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    half: Tensor | None,
    finite: Tensor,
    factor: Tensor,
    numbers: Coefficients,
) -> None:
    # The kernel's arithmetic for a CPU, where looking at `finite` waits for nothing.
    if not finite:
        return
    grad = grad * factor
    exp_avg.lerp_(grad, numbers.to_first)
    exp_avg_sq.mul_(numbers.beta2).addcmul_(grad, grad, value=numbers.to_second)
    denominator = (exp_avg_sq.sqrt() / numbers.root).add_(numbers.eps)
    p.mul_(numbers.kept).addcdiv_(exp_avg, denominator, value=-numbers.step_size)
    ema.lerp_(p, numbers.to_ema)
    if half is not None:
        half.copy_(p)
