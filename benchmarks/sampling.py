"""python benchmarks/sampling.py --dit PATH: how fast samples are drawn, beside
facebookresearch/DiT, in one run.

Guided samples (cfg_scale 1.5 at every step, DiT's three channels) from the same random weights and
the same noise. Ours: `draw_samples` with the model from `prepare`. The peer, from a checkout at
PATH (git clone https://github.com/facebookresearch/DiT; needs timm): its `p_sample_loop` and
`ddim_sample_loop` with `forward_with_cfg`, as its sample.py has them, in fp32. Without --dit, ours
only. TF32 is off for all.

Every number is the median of runs in which the ways take turns, after a first, shorter one that is
not counted: it compiles. `of the peak`: the matrix products' share of what this machine's reach in
a (4096, 4096) product of the same type; on a GPU of its data sheet's half precision (MFU).
`farthest`: the largest difference from ours in eager fp32, of the largest value. The run fails
where that is more than rounding in fp32. `first`: ten steps, and compiling.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from largescale.condition import Condition
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.objective import Model
from largescale.diffusion.sampling import SampleNoise, SamplingConfig, draw_samples
from largescale.models.dit import DiT, flops_per_image
from largescale.models.inference import prepare
from largescale.monitoring.telemetry import peak_flops
from largescale.noise_schedule import make_betas

# Width, depth, heads.
SIZES = {
    "tiny": (32, 2, 2),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
CFG_SCALE = 1.5
CLASSES = 1000
SHAPE = (4, 32, 32)
SEED = 0
# Noise levels that are guided in the last way: 40 % of the steps.
INTERVAL = (0.1, 0.5)
# The largest difference in fp32, of the largest value; bf16 is at 6e-5 and more.
ROUNDING = 1e-5
PEER = "facebookresearch/DiT, fp32"
REFERENCE = "ours, fp32"

# (sampler, steps, images) -> samples, and how many images the model was shown.
Way = Callable[[str, int, int], tuple[Tensor, int]]
# The name of a way, and of a sampler.
Run = tuple[str, str]


def make_model(size: str) -> DiT:
    """A model with random weights."""
    width, depth, heads = SIZES[size]
    model = DiT(patch_size=2, hidden_size=width, depth=depth, num_heads=heads, num_classes=CLASSES)
    # adaLN-Zero starts as a function that is 0 everywhere: a wrong one would not be noticed.
    torch.manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def labels(index: Any) -> Tensor:
    """The classes in turn."""
    return torch.tensor(list(index)) % CLASSES


def ours(model: Model, device: torch.device, interval: tuple[float, float] = (0.0, 1.0)) -> Way:
    """Our sampler; guided inside `interval` only."""
    diffusion = GaussianDiffusion(make_betas("linear", 1000), learn_sigma=True)

    def draw(sampler: Any, steps: int, images: int) -> tuple[Tensor, int]:
        evaluated = 0

        def counted(x: Tensor, t: Tensor, y: Condition) -> Tensor:
            nonlocal evaluated
            evaluated += len(x)
            return model(x, t, y)

        config = SamplingConfig(sampler, steps, CFG_SCALE, interval, cfg_channels=3, seed=SEED)
        x = draw_samples(
            counted,
            diffusion,
            config,
            index=range(images),
            condition=labels,
            shape=SHAPE,
            num_classes=CLASSES,
            batch_size=images,
            device=device,
        )
        return x, evaluated

    return draw


def peers(checkout: Path, size: str, state: dict[str, Tensor], device: torch.device) -> Way:
    """The sampler of facebookresearch/DiT. Its random numbers are replaced by the noise that ours
    draws, drawn before."""
    sys.path.insert(0, str(checkout))
    import diffusion as dit_diffusion
    import models as dit_models

    model = dit_models.DiT_models[f"DiT-{size}/2"](input_size=SHAPE[1], num_classes=CLASSES)
    model.load_state_dict(state)
    model.eval().to(device)

    @cache
    def noise(steps: int, images: int) -> list[Tensor]:
        draw = SampleNoise(SEED, range(images), SHAPE, device)
        # Twice: it draws with and without the label as one batch.
        return [draw().repeat(2, 1, 1, 1) for _ in range(steps + 1)]

    @torch.no_grad()
    def draw(sampler: str, steps: int, images: int) -> tuple[Tensor, int]:
        diffusion = dit_diffusion.create_diffusion(str(steps))
        loop = diffusion.p_sample_loop if sampler == "ddpm" else diffusion.ddim_sample_loop
        z, *given = noise(steps, images)
        y = labels(range(images)).to(device)
        kwargs = {"y": torch.cat([y, torch.full_like(y, CLASSES)]), "cfg_scale": CFG_SCALE}
        with mock.patch("torch.randn_like", side_effect=given):
            both = loop(
                model.forward_with_cfg,
                z.shape,
                z,
                clip_denoised=False,
                model_kwargs=kwargs,
                device=device,
            )
        return both.chunk(2)[0].cpu(), steps * len(z)

    return draw


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """How long `action` takes by the wall clock; with one thread on a CPU the process's own time,
    which other programs lengthen less."""
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    action()
    return clock() - begin


def peaks(device: torch.device) -> dict[str, float]:
    """FLOP/s by precision: the data sheet's, or what a large product reaches."""
    if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device), "bf16")):
        return {"fp32": peak, "bf16": peak}
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a = torch.randn(4096, 4096, device=device).to(dtype)
        b = torch.randn(4096, 4096, device=device).to(dtype)
        times = [seconds(lambda a=a, b=b: torch.mm(a, b), device) for _ in range(8)]
        # The first ones warm up; 2 n^3 FLOP a product.
        found[name] = 2 * 4096**3 / statistics.median(times[3:])
    return found


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dit", type=Path, help="a checkout of facebookresearch/DiT")
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--images", type=int, nargs="*", help="batch sizes; 8, and on a GPU 32, 64, 128, 256"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, help="of the CPU; with 1, CPU time is measured, for a busy machine"
    )
    parser.add_argument("--samplers", nargs="*", default=["ddpm", "ddim"])
    parser.add_argument(
        "--peak", type=float, help="FLOP/s to compare with, instead of this machine's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="for what was measured")
    return parser.parse_args()


def make_ways(options: argparse.Namespace, model: DiT, device: torch.device) -> dict[str, Way]:
    """All ways of drawing that are compared, the peer first."""
    found: dict[str, Way] = {}
    if options.dit:
        found[PEER] = peers(options.dit, options.size, model.state_dict(), device)
    for precision in ("fp32", "bf16"):
        for compiled in (False, True):
            prepared = prepare(model, device=device, precision=precision, compile=compiled)
            name = f"ours, {precision}{', compiled' * compiled}"
            found[name] = ours(prepared, device)
    # The last one, compiled in bf16, once more with less guidance.
    found[f"{name}, guided in {INTERVAL}"] = ours(prepared, device, INTERVAL)
    return found


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    model = make_model(options.size)
    ways = make_ways(options, model, device)
    cost = flops_per_image(model)
    peak = {"fp32": options.peak, "bf16": options.peak} if options.peak else peaks(device)
    reached = [f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in peak.items()]
    where = f"{torch.get_num_threads()} threads,"
    if gpu:
        where = torch.cuda.get_device_name(device)
    print(
        f"DiT-{options.size}/2, {cost / 1e9:.2f} GFLOP an image and evaluation; peak "
        f"{', '.join(reached)}; torch {torch.__version__}, {where} load {os.getloadavg()[0]:.1f}",
        flush=True,
    )

    measured: list[dict[str, Any]] = []
    for images in options.images or ([32, 64, 128, 256] if gpu else [8]):
        # torch.compile keeps a limited number of graphs.
        torch.compiler.reset()
        drawn: dict[Run, tuple[Tensor, int]] = {}

        def timed(
            name: str, sampler: str, steps: int, images: int = images, drawn: dict[Run, Any] = drawn
        ) -> float:
            def draw() -> None:
                drawn[name, sampler] = ways[name](sampler, steps, images)

            return seconds(draw, device)

        # The ways take turns, so that what else runs on the machine slows all of them.
        first = {name: timed(name, "ddim", 10) for name in tqdm(ways, "first", leave=False)}
        runs = list(itertools.product(ways, options.samplers))
        times: dict[Run, list[float]] = defaultdict(list)
        for name, sampler in tqdm(runs * options.rounds, f"{options.rounds} rounds", leave=False):
            times[name, sampler].append(timed(name, sampler, options.steps))
        print(f"\nbatches of {images}, {options.steps} steps, load {os.getloadavg()[0]:.1f}\n")
        measured += report(images, times, drawn, first, cost, peak)
        if options.json:
            options.json.write_text(json.dumps({"ways": measured}, indent=1) + "\n")


def report(
    images: int,
    times: dict[Run, list[float]],
    drawn: dict[Run, tuple[Tensor, int]],
    first: dict[str, float],
    cost: float,
    peak: dict[str, float],
) -> list[dict[str, Any]]:
    """Print a Markdown table, and return its numbers. Exits with a message where samples in fp32
    differ by more than rounding."""
    measured = []
    samplers = list(dict.fromkeys([sampler for _, sampler in times]))
    base = PEER if PEER in first else REFERENCE
    heads = [f"{s.upper()}, images/s | spread | of {base} | of the peak" for s in samplers]
    print("| way |", " | ".join(heads), "| farthest | first, s |")
    print("|---|", "---:|" * (4 * len(samplers) + 2), sep="")
    wrong = []
    for name, before in first.items():
        precision = "bf16" if "bf16" in name else "fp32"
        cells = []
        differences = []
        for sampler in samplers:
            runs = times[name, sampler]
            samples, evaluated = drawn[name, sampler]
            median = statistics.median(runs)
            of_peak = evaluated * cost / median / peak[precision]
            measured.append(
                {
                    "way": name,
                    "sampler": sampler,
                    "images": images,
                    "images_s": images / median,
                    "ratio": statistics.median(times[base, sampler]) / median,
                    "base": base,
                    "of_peak": of_peak,
                }
            )
            cells += [
                f"{images / median:.3f}",
                f"{min(runs) / median - 1:+.0%} {max(runs) / median - 1:+.0%}",
                f"{statistics.median(times[base, sampler]) / median:.2f} x",
                f"{of_peak:.0%}",
            ]
            right, _ = drawn[REFERENCE, sampler]
            differences.append(((samples - right).abs().max() / right.abs().max()).item())
        away = max(differences)
        # In bf16 rounding differs with the order of operations.
        if precision == "fp32" and away > ROUNDING:
            wrong.append(f"{name} by {away:.1e}")
        print(f"| {name} |", " | ".join(cells), f"| {away:.1e} | {before:.0f} |")
    if wrong:
        raise SystemExit(
            f"not the samples of '{REFERENCE}': {'; '.join(wrong)}, of the largest value"
        )
    return measured


if __name__ == "__main__":
    main()
