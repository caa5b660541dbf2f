"""Triton's kernels without a GPU: what they touch in its interpreter, and what its compiler makes of them."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAPABILITIES = [80, 90, 100]  # A100, H100, B200


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


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bf16 as 16 bits, and multiplies matrices of these as integers: as floats, here."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def as_float(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *more: dot(self, as_float(a), as_float(b), *more))


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int  # bytes, stored and loaded
    shared: int  # bytes
    ptx: str


Compile = Callable[..., Compiled]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Compile:
    """Compiles a kernel for a GPU of this capability. `types` of its arguments that are not constants; sizes and
    addresses are multiples of 16, as a DiT's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)

    def compile_for(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int) -> Compiled:
        names = list(kernel.arg_names)
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
        )
        capfd.readouterr()
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        log = capfd.readouterr().out
        ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        (registers,) = re.findall(r"Used (\d+) registers", log)
        return Compiled(int(registers), int(stored) + int(loaded), made.metadata.shared, made.asm["ptx"])

    return compile_for
