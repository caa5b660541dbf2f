"""python benchmarks/roofline.py PRESET: what a DiT's training step costs on a GPU, counted from the
code that torch.compile writes for it. Needs no GPU.

A block is compiled as in training. For each kernel of Inductor: bytes (every argument once) and the
time that they take at the card's bandwidth. For each matrix product and attention: operations, and
the time at the card's measured rate or at its bandwidth, whichever is longer. To that comes what is
not compiled, the update, gradients and weights on the network (largescale/planning/cost.py), and a
gap between kernels.

`bytes per residual element and block` counts what Inductor's kernels and operators of ours move,
divided by the elements of the residual stream (images, tokens, width). Operands and results of
matrix products and of attention are not in it; what kernels of ours read and write beside a bare
product is named in the same line. Nothing here is measured: lines say what is assumed.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from inductor_without_gpu import Half, halves
from torch import Tensor, nn
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from largescale.config.deepspeed import load_ds_config, precision
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.models import dit, fused_blocks
from largescale.planning.cost import step
from largescale.planning.hardware import (
    ATTENTION_SHARE,
    GAP_S,
    GELU_PRODUCT_SHARE,
    HARDWARE,
    PRODUCT_SHARE,
    Hardware,
    Rates,
)
from largescale.planning.memory import largest_micro_batch
from largescale.training.dry_run import forward_flops, workload

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Of the rate of products, by kind of kernel.
SHARES = {
    "product": PRODUCT_SHARE,
    "product with GELU": GELU_PRODUCT_SHARE,
    "attention": ATTENTION_SHARE,
}


@dataclass(frozen=True)
class Kernel:
    name: str
    kind: str
    """elementwise (Inductor's), ours, product, product with GELU (ours) or attention."""
    backward: bool
    bytes: float
    flops: float = 0.0
    beside_product: float = 0.0
    """Those of the bytes that a bare product does not move."""

    def seconds(self, rates: Rates) -> float:
        share = SHARES.get(self.kind, 1.0)
        return max(self.bytes / rates.copies, self.flops / (rates.products * share))


# ---- what a block launches


def kernels_of_block(
    config: Config, images: int, card: str, kernels: str = "inductor"
) -> list[Kernel]:
    """Of the forward and backward pass of one block of the preset's DiT, for `images` images, by
    train.kernels=inductor or fused."""
    model, kind = config.model, TYPES[precision(load_ds_config(config.train.ds_config))]
    tokens, width = (model.input_size // model.patch_size) ** 2, model.hidden_size
    captions = model.max_caption_tokens

    def build() -> nn.Module:
        # The weights are in the compute type, as DeepSpeed casts them.
        torch.set_default_dtype(kind)
        try:
            block = dit.Block(width, model.num_heads, model.mlp_ratio, captions > 0)
        finally:
            torch.set_default_dtype(torch.float32)
        return fused_blocks.FusedBlock(block) if kernels == "fused" else block

    def inputs() -> tuple[Any, ...]:
        def of_stream(*size: int) -> Tensor:
            return torch.empty(*size, width, dtype=kind).requires_grad_()

        x = torch.empty(images, tokens, width).requires_grad_()
        c = of_stream(images)
        of_captions = None
        if captions:
            mask = torch.empty(images, captions, dtype=torch.bool)
            of_captions = (of_stream(images, captions), mask)
        if kernels != "fused":
            return x, c, of_captions
        # A block in the middle: the one before hands on its last branch.
        pending = fused_blocks.Pending(of_stream(images, tokens), of_stream(), of_stream(images))
        return x, pending, c, of_captions

    passes = halves(build, inputs, HARDWARE[card])
    found: list[Kernel] = []
    for backward, half in enumerate(passes):
        for kernels_of in (_inductors_kernels, _our_kernels, _library_calls):
            found += kernels_of(half, bool(backward))
    return found


def _our_kernels(half: Half, backward: bool) -> list[Kernel]:
    """The fused kernels, with the bytes of each argument and result counted once: tests compare
    them with what Triton's interpreter sees the kernels touch."""
    found = []
    for node in half.graph.graph.nodes:
        if node.target is not triton_kernel_wrapper_mutation:
            continue
        name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        # An argument that is absent, and not read, has another one in its place.
        names = {
            node: name for name, node in node.kwargs["kwargs"].items() if hasattr(node, "meta")
        }
        tensors = {name: node.meta["val"] for node, name in names.items()}
        size = sum(map(_bytes, tensors.values()))
        if not name.startswith("gelu_product"):
            found.append(Kernel(name, "ours", backward, size))
            continue
        # A bare product would neither write GELU's result, nor read h and write sums.
        left = tensors["dbranch" if backward else "y"]
        beside = ("h", "partial") if backward else ("a",)
        flops = 2.0 * tensors["h"].numel() * left.shape[-1]
        extra = sum(_bytes(tensors[each]) for each in beside)
        found.append(Kernel(name, "product with GELU", backward, size, flops, extra))
    return found


def _inductors_kernels(half: Half, backward: bool) -> list[Kernel]:
    """Those that its code launches, with Inductor's own count of bytes."""
    gigabytes = dict(
        re.findall(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([\d.e+-]+)", half.code)
    )
    # Each kernel's source ends in a call() that benchmarks it: the last call() is the graph's.
    body = half.code[half.code.rindex("def call(self") :]
    launched = re.findall(r"^\s+(triton_\w+)\.run\(", body, re.M)
    return [
        Kernel(name, "elementwise", backward, 1e9 * float(gigabytes[name])) for name in launched
    ]


def _library_calls(half: Half, backward: bool) -> list[Kernel]:
    """Matrix products and attention, from the graph's shapes."""
    found = []
    for node in half.graph.graph.nodes:
        name = str(node.target)
        if not name.startswith(("aten.mm", "aten.addmm", "aten.bmm", "roofline.attention")):
            continue
        operands = [arg.meta["val"] for arg in node.args if hasattr(arg, "meta")]
        results = node.meta["val"]
        results = list(results) if isinstance(results, tuple | list) else [results]
        moved = sum(map(_bytes, operands + results))
        if name.startswith("roofline.attention"):
            q, k = operands[-5:-3] if backward else operands[:2]
            n, heads, tokens, width = q.shape
            # q k^T and the weights times v; backward five products instead of two.
            flops = 4.0 * n * heads * tokens * k.shape[2] * width * (2.5 if backward else 1)
            found.append(Kernel(name, "attention", backward, moved, flops))
        else:
            flops = 2.0 * operands[-2].numel() * operands[-1].shape[-1]
            found.append(Kernel(name, "product", backward, moved, flops))
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- the step


@dataclass(frozen=True)
class Prediction:
    gpus: int
    micro_batch: int
    parts: dict[str, float]
    """Seconds of a step."""
    mfu: float
    images_per_s: float
    hours: float
    """Of the preset's steps, without checkpoints and restarts."""


def predict(
    config: Config, card: str, gpus: int, kernels_for: Callable[[int], list[Kernel]]
) -> Prediction:
    """A step of the preset on so many GPUs, in as few micro batches as memory allows."""
    hardware = HARDWARE[card]
    rates = rates_of(hardware)
    ds = load_ds_config(config.train.ds_config)
    total = config.train.global_batch_size
    micro = largest_micro_batch(config, ds, gpus, hardware.usable_bytes)
    if not micro:
        raise SystemExit(f"not one image of {config.name} fits into one {hardware.name}")
    accumulation, depth = total // (gpus * micro), config.model.depth
    kernels = kernels_for(micro)

    def blocks(*kinds: str) -> float:
        chosen = [kernel for kernel in kernels if kernel.kind in kinds]
        return accumulation * depth * sum(kernel.seconds(rates) for kernel in chosen)

    work = workload(config, ds, accumulation)
    around = 3 * forward_flops(config.model)[1] * total / gpus
    parts = {
        "matrix products": blocks("product", "product with GELU"),
        "attention": blocks("attention"),
        "elementwise": blocks("elementwise", "ours"),
        "embedding and final layer, fp32": around / rates.fp32,
        "gaps": accumulation * depth * len(kernels) * GAP_S,
    }
    # The rest hides behind the backward pass as far as it can: cost.py knows how far.
    share = work.flops_per_image * total / (gpus * hardware.peak_flops * sum(parts.values()))
    rest = step(work, replace(hardware, mfu=share), gpus).parts
    parts |= {name: rest[name] for name in ("gradient reduction", "optimizer", "all-gather")}
    seconds = sum(parts.values())
    mfu = work.flops_per_image * total / (gpus * hardware.peak_flops * seconds)
    hours = config.train.steps * seconds / 3600
    return Prediction(gpus, micro, parts, mfu, total / seconds, hours)


def rates_of(hardware: Hardware) -> Rates:
    assert hardware.rates is not None
    return hardware.rates


# ---- the report


def kernel_table(kernels: list[Kernel], rates: Rates, elements: int) -> str:
    lines = [
        "| pass | kernel | MB | bytes an element | GFLOP | µs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for kernel in kernels:
        where = "backward" if kernel.backward else "forward"
        lines.append(
            f"| {where} | {kernel.name} | {kernel.bytes / 1e6:.1f} | "
            f"{kernel.bytes / elements:.1f} | {kernel.flops / 1e9:.1f} | "
            f"{1e6 * kernel.seconds(rates):.0f} |"
        )
    return "\n".join(lines)


def step_table(predictions: list[Prediction]) -> str:
    names = list(predictions[0].parts)
    head = " | ".join(f"{p.gpus} GPUs, micro batch {p.micro_batch}" for p in predictions)
    lines = [f"| part, ms | {head} |", f"|---{'|---:' * len(predictions)}|"]
    for name in names:
        cells = " | ".join(f"{1e3 * p.parts[name]:.1f}" for p in predictions)
        lines.append(f"| {name} | {cells} |")
    totals = {
        "**step**": [f"**{1e3 * sum(p.parts.values()):.0f}**" for p in predictions],
        "images/s": [f"{p.images_per_s:,.0f}" for p in predictions],
        "MFU": [f"{p.mfu:.0%}" for p in predictions],
        "hours for the preset's steps": [f"{p.hours:,.0f}" for p in predictions],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in totals.items()]
    return "\n".join(lines)


def bytes_per_element(kernels: list[Kernel], elements: int) -> float:
    """Moved by Inductor's kernels and ours, an element of the residual stream."""
    return sum(k.bytes for k in kernels if k.kind in ("elementwise", "ours")) / elements


def card_line(card: str) -> str:
    hardware: Hardware = HARDWARE[card]
    rates = rates_of(hardware)
    origin = "measured" if rates.measured else "assumed"
    return (
        f"{hardware.name}: data sheet {hardware.peak_flops / 1e12:.0f} TFLOP/s and "
        f"{hardware.memory_bandwidth / 1e12:.2f} TB/s; {origin} {rates.products / 1e12:.0f} TFLOP/s "
        f"of a (8192, 8192) product and {rates.copies / 1e12:.2f} TB/s of a copy; assumed that "
        f"products reach {SHARES['product']:.0%} of it, those with GELU in a kernel of ours "
        f"{SHARES['product with GELU']:.0%} and attention {SHARES['attention']:.0%}, and "
        f"{1e6 * GAP_S:g} µs between kernels"
    )


def make_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    presets = [name for name, make in PRESETS.items() if make().model.architecture == "dit"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=presets)
    parser.add_argument("--card", choices=HARDWARE, default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--images", type=int, default=32, help="micro batch of the kernels' table")
    parser.add_argument("--batch-size", type=int, help="of a step, over all GPUs")
    parser.add_argument("--kernels", choices=["inductor", "fused"], default="inductor")
    parser.add_argument("--json", help="write everything to this file")
    return parser


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    config = PRESETS[options.preset]()
    batch = options.batch_size or config.train.global_batch_size
    config = replace(config, train=replace(config.train, global_batch_size=batch))
    made: dict[int, list[Kernel]] = {}

    def kernels_for(images: int) -> list[Kernel]:
        if images not in made:
            made[images] = kernels_of_block(config, images, options.card, options.kernels)
        return made[images]

    kernels = kernels_for(options.images)
    tokens = (config.model.input_size // config.model.patch_size) ** 2
    elements = options.images * tokens * config.model.hidden_size
    print(card_line(options.card))
    print(
        f"\nA block of {config.name}, train.kernels={options.kernels}, forward and backward, "
        f"{options.images} images:\n"
    )
    print(kernel_table(kernels, rates_of(HARDWARE[options.card]), elements))
    moved = bytes_per_element(kernels, elements)
    beside = sum(kernel.beside_product for kernel in kernels) / elements
    print(f"\nbytes per residual element and block: {moved:.1f}", end="")
    print(f", and {beside:.1f} beside products in their kernels\n" if beside else "\n")
    predictions = [predict(config, options.card, gpus, kernels_for) for gpus in options.gpus]
    print(step_table(predictions))
    if options.json:
        report = {
            "preset": config.name,
            "card": options.card,
            "train_kernels": options.kernels,
            "bytes_per_element": moved,
            "bytes_beside_products_per_element": beside,
            "kernels": [asdict(kernel) for kernel in kernels],
            "steps": [asdict(prediction) for prediction in predictions],
        }
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
