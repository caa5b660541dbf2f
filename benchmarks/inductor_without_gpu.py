"""The code that torch.compile writes for a GPU that is not here.

The forward and backward graph are traced on fake CPU tensors, moved to fake CUDA tensors, and
lowered by Inductor, which asks a GPU for its properties only: those come from a table. Kernels are
written and never compiled. Attention is one opaque operator, as cuDNN's is.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call

from largescale.models import dit, fused_blocks, fused_norm, fused_products
from largescale.planning.hardware import Hardware


def properties_of(hardware: Hardware) -> SimpleNamespace:
    """What Inductor asks a GPU."""
    chip = hardware.chip
    assert chip is not None
    return SimpleNamespace(
        name=chip.name,
        major=chip.capability[0],
        minor=chip.capability[1],
        total_memory=int(hardware.memory_bytes),
        multi_processor_count=chip.processors,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        L2_cache_size=chip.l2_mib << 20,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=chip.shared_kib << 10,
        shared_memory_per_multiprocessor=(chip.shared_kib + 1) << 10,
        gcnArchName="",
        uuid="0",
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
    )


@dataclass(frozen=True)
class Half:
    """The forward or the backward pass: its graph, and Inductor's code for it."""

    graph: fx.GraphModule
    code: str


def _opaque(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """An operator that is only traced: `fake` makes results of the right shapes."""

    def never(*_: Any) -> Any:
        raise NotImplementedError

    operator = torch.library.custom_op(f"roofline::{name}", never, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _fake_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    n, heads, tokens, width = q.shape
    out = q.new_empty(n, tokens, heads, width).transpose(1, 2)
    return out, q.new_empty(n, heads, tokens, 1, dtype=torch.float32)


def _fake_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        n, heads, tokens, width = x.shape
        return x.new_empty(n, tokens, heads, width).transpose(1, 2)

    return like(q), like(k), like(v)


_attention = _opaque(
    "attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", _fake_attention
)
_attention_backward = _opaque(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_attention_backward,
)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(_attention_backward(grad, *ctx.saved_tensors))


_attention.register_autograd(_gradients, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """In place of F.scaled_dot_product_attention. A mask of keys costs next to nothing."""
    out: Tensor = _attention(q, k, v)[0]
    return out


@contextlib.contextmanager
def kernels_of(hardware: Hardware) -> Iterator[None]:
    """What is traced on fake CPU tensors calls the kernels that it would call on this GPU: largescale's
    own, and attention, an operator for the whole of it."""
    with contextlib.ExitStack() as stack:
        for module in (fused_norm, fused_products):
            stack.enter_context(mock.patch.object(module, "is_eager", lambda _: False))
        for module in (dit, fused_blocks):
            stack.enter_context(mock.patch.object(module, "attention", attention))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_triton_for(hardware))
        yield


@contextlib.contextmanager
def _triton_for(hardware: Hardware) -> Iterator[None]:
    """Triton finds this GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    assert hardware.chip is not None
    major, minor = hardware.chip.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda:0"),
        get_benchmarker=lambda: None,
        is_active=lambda: True,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = before


def halves(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], hardware: Hardware
) -> list[Half]:
    """The forward and the backward pass of `build()(*inputs())`. Both are made where tensors are
    fake, so their sizes cost nothing; inputs say by `requires_grad` whose gradient is wanted."""
    graphs: list[fx.GraphModule] = []
    with FakeTensorMode(), kernels_of(hardware):
        module = build()
        tensors, rebuild = _flatten(inputs())
        parameters = dict(module.named_parameters())

        def run(*flat: Tensor) -> Any:
            weights = dict(zip(parameters, flat[len(tensors) :], strict=True))
            return functional_call(module, weights, rebuild(flat[: len(tensors)]))

        def partition(graph: fx.GraphModule, joint_inputs: Any, **more: Any) -> Any:
            joint_graph_passes(graph)
            return min_cut_rematerialization_partition(
                graph, joint_inputs, compiler="inductor", **more
            )

        def collect(graph: fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph)

        traced = aot_function(
            run,
            fw_compiler=collect,
            bw_compiler=collect,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        outputs = torch.utils._pytree.tree_leaves(traced(*tensors, *parameters.values()))
        sum(out.float().sum() for out in outputs if out.requires_grad).backward()
    with pretending(hardware):
        return [Half(graph, _lower(graph, backward=i == 1)) for i, graph in enumerate(graphs)]


def _flatten(values: tuple[Any, ...]) -> tuple[list[Tensor], Callable[[Any], tuple[Any, ...]]]:
    leaves, spec = torch.utils._pytree.tree_flatten(values)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Any) -> tuple[Any, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return torch.utils._pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in places], rebuild


@contextlib.contextmanager
def pretending(hardware: Hardware) -> Iterator[None]:
    """torch, Inductor and Triton find this GPU."""
    import torch._inductor.config as settings
    from torch._dynamo.device_interface import CudaInterface

    properties = properties_of(hardware)
    capability = (properties.major, properties.minor)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "synchronize": None,
    }
    of_interface = {
        "get_compute_capability": 10 * capability[0] + capability[1],
        "is_available": True,
        "get_device_properties": properties,
        "current_device": 0,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        for name, value in of_interface.items():
            patch = mock.patch.object(CudaInterface, name, staticmethod(answer(value)))
            stack.enter_context(patch)
        worker = CudaInterface.Worker
        for name, value in {"get_device_properties": properties, "current_device": 0}.items():
            stack.enter_context(mock.patch.object(worker, name, staticmethod(answer(value))))
        # A tensor of its own on the GPU, for autograd: torch 2.11 makes it.
        to_start = "torch._subclasses.fake_tensor.init_gpu_context"
        stack.enter_context(mock.patch(to_start, answer(None)))
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torch") and "has_triton" in vars(module):
                stack.enter_context(mock.patch.object(module, "has_triton", answer(True)))
        stack.enter_context(
            settings.patch(compile_threads=1, benchmark_kernel=True, fx_graph_cache=False)
        )
        stack.enter_context(_triton_for(hardware))
        yield


def _lower(graph: fx.GraphModule, *, backward: bool) -> str:
    """Inductor's code for a graph, on the GPU that torch finds."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda = torch.device("cuda:0")
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)

    def on_cuda(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(mode, meta, cuda)

    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": cuda}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = [on_cuda(node.meta["val"]) for node in placeholders]
    view_to_reshape(graph)
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowering = GraphLowering(
            graph,
            example_inputs=inputs,
            is_backward=backward,
            is_inference=False,
            shape_env=mode.shape_env,
        )
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))
