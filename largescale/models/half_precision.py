"""Half precision on a CPU: whether torch can compute in it, and whether it is fast."""

import functools
import sys

import torch
import torch.nn.functional as F

from largescale.config.deepspeed import Precision
from largescale.errors import ConfigError
from largescale.host.launch import env_rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The option of training that sets the precision, for `check_on_cpu`.
IN_TRAINING = "--train.ds-config ds_configs/zero2_{}.json"
# How to ask oneDNN for instructions, by precision.
_SUPPORTED = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}


def has_instructions(precision: Precision) -> bool:
    """Whether this CPU has instructions that multiply matrices in `precision`."""
    # Without them torch computes slower than in fp32: a step of `digits` in fp16 took 650 ms with
    # AVX512-BF16 and 38 ms with AVX512-FP16 (torch 2.15).
    if precision == "fp32":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(getattr(torch.ops.mkldnn, _SUPPORTED[precision])())


@functools.cache  # reported once
def check_on_cpu(precision: Precision, option: str) -> None:
    """Reports, on rank 0, that `precision` is slow on this CPU. Raises ConfigError where torch does
    not compute in it at all. `option`: what sets another precision, with {} for its name."""
    if has_instructions(precision):
        return
    # A trial: what torch supports without the instructions differs between versions.
    try:
        _compute(DTYPES[precision])
    except RuntimeError as error:
        why, remedy = str(error).partition("\n")[0], option.format("fp32")
        raise ConfigError(
            f"torch does not compute in {precision} on this CPU ({why}); set {remedy}"
        ) from error
    faster: Precision = "bf16" if has_instructions("bf16") else "fp32"
    if env_rank() == 0:
        print(
            f"{precision} is slow on this CPU, which has no instructions for it: {faster} is "
            f"faster, set {option.format(faster)}",
            file=sys.stderr,
            flush=True,
        )


def _compute(dtype: torch.dtype) -> None:
    """Runs forward and backward passes of every kind of layer that our networks have in half
    precision."""
    with torch.enable_grad():
        x = torch.ones(2, 4, 4, 4, dtype=dtype, requires_grad=True)
        x = F.group_norm(F.conv2d(x, torch.ones(4, 4, 3, 3, dtype=dtype), padding=1), 2)
        x = F.layer_norm(F.linear(F.silu(x), torch.ones(4, 4, dtype=dtype)), (4,))
        x = F.scaled_dot_product_attention(x, x, F.gelu(x, approximate="tanh"))
        (x @ x.transpose(-2, -1)).softmax(-1).float().square().mean().backward()
