"""A copy of a network that samples are drawn from fast. Nothing global is set, and the model that is
given stays as it is."""

import copy

import torch
from torch import Tensor, nn

from largescale.condition import Condition, select
from largescale.config.deepspeed import Precision
from largescale.errors import ConfigError
from largescale.models.build import Network, flops_per_image
from largescale.models.compile import Gelu, failure, has_compiler, use_private_cache
from largescale.models.dit import Block, DiT
from largescale.models.half_precision import DTYPES, has_instructions

# Images that the model sees at once on a CPU. The activations of more leave the caches and malloc's
# heap.
CPU_ROWS = 8


class Packed(nn.Module):
    """A linear layer, and the GELU after it, as the operation of oneDNN that torch.compile uses,
    with the weights in its order. torch's eager layer copies the bias into place before, and GELU
    reads and writes everything again."""

    def __init__(self, linear: nn.Linear, gelu: bool):
        super().__init__()
        # The second argument is the rows that the order is chosen for: 256 tokens an image.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), CPU_ROWS * 256
        )
        self.bias, self.gelu = linear.bias, gelu

    def forward(self, x: Tensor) -> Tensor:
        after, kind = ("gelu", "tanh") if self.gelu else ("none", "")
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, after, [], kind
        )
        return output


class Linear(nn.Linear):
    """A linear layer that adds the bias in an operation of its own, which a compiler fuses with the
    next; addmm copies the bias into place."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Prepared(nn.Module):
    """A model (x, t, y) -> output that runs another in parts of `rows` images. `pad`: the last part
    is of that size too."""

    def __init__(self, run: nn.Module, rows: int | None, pad: bool):
        super().__init__()
        self.run, self.rows, self.pad = run, rows, pad

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Condition) -> Tensor:
        n = len(x)
        rows = self.rows or n
        # Padding repeats the first images: a compiled model takes one batch size only.
        padded = -(-n // rows) * rows if self.pad else n
        index = torch.arange(padded, device=x.device) % n
        # Copies: tensors made inside and outside inference mode would have a graph each.
        x, t, y = x[index], t[index], select(y, index)
        parts = []
        try:
            for i in range(0, padded, rows):
                part = slice(i, i + rows)
                parts.append(self.run(x[part], t[part], select(y, part)))
        except RuntimeError as error:
            reason = failure(error)
            if not reason:
                raise
            raise ConfigError(f"{reason}; sample without it: --compile off") from error
        return torch.cat(parts)[:n]


def prepare(
    model: Network, *, device: torch.device, precision: Precision, compile: bool
) -> Prepared:
    """A copy of `model` in eval mode on `device`: (x, t, y) -> (N, C or 2C, H, W) float32, without
    gradients.

    In half precision only the weights of the large matrix products, and of a U-Net's blocks, are
    cast: the embeddings, the patches, the null caption and the last projection stay float32.
    Compiled, the first call takes up to a minute (`compile_pays`), on a GPU that of each new batch
    size; `use_private_cache` keeps it for the next process. Raises ConfigError where there is no
    C++ compiler.
    """
    if compile and not has_compiler():
        raise ConfigError(
            "compiling needs a C++ compiler, and $CXX, by default g++, is not found on PATH; "
            "install it, or sample without it: --compile off"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False).to(device)

    # The type itself, as LinearFp32 stays float32. Convolutions are cast in a U-Net's blocks only.
    for module in model.modules():
        if type(module) is nn.Linear:
            module.to(DTYPES[precision])
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.to(DTYPES[precision])

    # On a CPU a DiT gets other layers, for the compiler or instead of it.
    on_cpu = device.type == "cpu"
    if on_cpu and isinstance(model, DiT):
        if compile:
            for_compiler(model)
        elif packs(precision):
            pack(model)
    if compile:
        use_private_cache()
        model.compile(dynamic=False)
    return Prepared(model, CPU_ROWS if on_cpu else None, pad=compile and on_cpu)


def for_compiler(model: DiT) -> None:
    """Replaces layers by others that compiled code computes faster on a CPU."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.mlp.act = Gelu()
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


def pack(model: DiT) -> None:
    """Replaces the linear layers of the blocks by `Packed` ones."""
    for block in model.blocks:
        assert isinstance(block, Block)
        # fc1 computes the GELU of the MLP too.
        for part in filter(None, (block.attn, block.cross_attn, block.mlp)):
            for name, linear in part.named_children():
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Packed(linear, gelu=name == "fc1"))
        block.mlp.act = nn.Identity()


def packs(precision: Precision) -> bool:
    """Whether `pack` works on this CPU, and is faster."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return exists and has_instructions(precision)


def compile_pays(
    model: Network, *, device: torch.device, precision: Precision, evaluations: int
) -> bool:
    """Whether compiling saves more time than it takes. `evaluations`: images that this process
    shows to the model in all, which is images times evaluations of the sampler, twice that while
    guided."""
    flops = evaluations * flops_per_image(model)
    if not has_compiler():
        return False
    # Compiled code calls oneDNN's convolutions too.
    if device.type == "cpu" and not isinstance(model, DiT):
        return False
    if device.type == "cuda":
        # Assumed, not measured: 150 TFLOP/s before, and a third of the time saved.
        return flops / 150e12 / 3 > 30 + 2 * len(model.blocks)

    # A thread's rate before, and the share of the time saved, as measured: docs/benchmarks.md.
    if precision == "fp32":
        flops_per_s, saved = 145e9, 0.03
    else:
        flops_per_s, saved = 500e9, 0.17
    return flops / (flops_per_s * torch.get_num_threads()) * saved > 20 + 0.7 * len(model.blocks)
