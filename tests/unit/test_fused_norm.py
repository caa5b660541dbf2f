"""largescale/models/fused_norm.py: the same numbers as plain PyTorch, in its eager form, in Triton's interpreter, and
compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from largescale.models import fused_norm
from largescale.models.fused_norm import residual_norm, residual_norm_eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PARTS = {
    "everything": ("bias", "gate", "shift", "scale"),
    "no bias": ("gate", "shift", "scale"),
    "no gate": ("bias", "shift", "scale"),
    "neither gate nor modulation, as after cross-attention": ("bias",),
    "no modulation": ("bias", "gate"),
}
SHAPES = {"S/2's width": (1, 4, 384), "XL/2's width": (1, 2, 1152), "13 tokens": (2, 13, 24)}


def given(parts: tuple[str, ...], shape: tuple[int, ...], branch_type: torch.dtype) -> dict[str, Any]:
    """gate, shift and scale are columns of one tensor, as in a block."""
    generator = torch.Generator().manual_seed(0)
    images, _, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    modulation = draw(images, 6 * width).to(branch_type)
    values = {"bias": draw(width).to(branch_type), "gate": modulation[:, :width],
              "shift": modulation[:, width : 2 * width], "scale": modulation[:, 2 * width : 3 * width]}
    return {"x": draw(*shape).float() + 3, "branch": draw(*shape).to(branch_type), **{name: values[name] for name in parts}}


def values_and_gradients(function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    x_new, y = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(out.shape, generator=generator).to(y_type).to(out.dtype)
             for out, y_type in ((x_new, torch.float32), (y, torch.bfloat16))]
    torch.autograd.backward([x_new, y], outer)
    return {"x_new": x_new.detach(), "y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("keep_input", [True, False])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("branch_type", [torch.bfloat16] if INTERPRETED else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES["13 tokens"]] if INTERPRETED else SHAPES.values())
def test_the_same_as_in_double_precision(
    shape: tuple[int, ...], branch_type: torch.dtype, parts: tuple[str, ...], keep_input: bool
) -> None:
    inputs = given(parts, shape, branch_type)
    exact = values_and_gradients(residual_norm_eager, {name: value.double() for name, value in inputs.items()})
    found = values_and_gradients(lambda **these: residual_norm(**these, keep_input=keep_input), inputs)
    for name, value in found.items():
        in_stream = name in ("x_new", "dx")
        assert value.dtype == (torch.float32 if in_stream else branch_type), name
        # Triton's interpreter cuts where a GPU rounds to bf16.
        limit = 5e-7 if in_stream or branch_type == torch.float32 else 8e-3
        assert (value.double() - exact[name]).abs().max() <= limit * exact[name].abs().max(), name


@pytest.mark.parametrize("keep_input", [True, False])
@pytest.mark.parametrize("parts", [PARTS["everything"]] if INTERPRETED else PARTS.values())
def test_gradients_are_those_of_finite_differences(parts: tuple[str, ...], keep_input: bool) -> None:
    inputs = {name: value.double().requires_grad_() for name, value in given(parts, (1, 2, 4), torch.float64).items()}

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(**dict(zip(inputs, values, strict=True)), keep_input=keep_input)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Addresses of bytes that kernels load or store in Triton's interpreter, each counted once a launch."""
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    found: set[int] = set()

    def note(pointers: Any, mask: Any) -> None:
        size = _get_np_dtype(pointers.get_element_ty()).itemsize
        for address in pointers.data[mask.data.astype(bool)].reshape(-1).tolist():
            found.update(range(address, address + size))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self: Any, ptrs: Any, mask: Any, *more: Any) -> Any:
        note(ptrs, mask)
        return load(self, ptrs, mask, *more)

    def noted_store(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        note(ptrs, mask)
        return store(self, ptrs, value, mask, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    yield found


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see below")
@pytest.mark.parametrize("keep_input", [True, False])
def test_the_bytes_that_kernels_touch(touched: set[int], keep_input: bool) -> None:
    """12 forward and 18 backward, an element of the stream, as the module says, and what does not grow with it: mean
    and rstd, an image's modulation, sums."""
    images, tokens, width = 2, 64, 32
    inputs = {name: value.detach().clone().requires_grad_()
              for name, value in given(PARTS["everything"], (images, tokens, width), torch.bfloat16).items()}
    x_new, y = residual_norm(**inputs, keep_input=keep_input)
    elements, around = images * tokens * width, 2 * 4 * images * tokens + 2 * width
    assert len(touched) == 12 * elements + around + 3 * 2 * images * width
    touched.clear()
    torch.autograd.backward([x_new, y], [torch.ones_like(x_new), torch.ones_like(y)])
    sums = 4 * 4 * width * images * tokens // fused_norm.ROWS
    assert len(touched) == 18 * elements + around + 2 * 2 * images * width + sums


@pytest.mark.skipif(INTERPRETED, reason="is inside")
def test_in_tritons_interpreter() -> None:
    """What is above, by the kernels themselves."""
    names = "double_precision or finite_differences or bytes"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and re.search(r"\b14 passed", done.stdout), done.stdout


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_compiled_for_a_gpu_that_is_not_here(
    width: int, capability: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No register is spilled to memory, for every width of the presets."""
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    for kernel in (fused_norm.forward_kernel, fused_norm.backward_kernel):
        compiled = triton.compile(
            source(kernel, width), target=GPUTarget("cuda", capability, 32), options={"num_warps": fused_norm.WARPS})
        log = capfd.readouterr().out
        assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")], log
        # 232 with Triton 3.9, 233 with 3.6; there are 255.
        assert int(re.findall(r"Used (\d+) registers", log)[0]) <= 240 and compiled.metadata.shared <= 4096


def source(kernel: Any, width: int) -> ASTSource:
    """As for DiT in bf16."""
    constants = {"width": width, "eps": fused_norm.EPS, "has_bias": True, "has_gate": True, "has_modulation": True,
                 "saved_is_input": True, "rows": fused_norm.ROWS, "block": triton.next_power_of_2(width)}
    half = ("branch", "bias", "gate", "shift", "scale", "y", "dy", "dbranch")
    names = list(kernel.arg_names)
    signature = {}
    for name in names:
        number = name == "tokens" or name.endswith("stride")
        signature[name] = "constexpr" if name in constants else "i32" if number else "*bf16" if name in half else "*fp32"
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
