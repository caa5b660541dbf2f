"""python benchmarks/train_step.py PRESET [--against dit=PATH fast-dit=PATH diffusers ddp]: a step,
beside others'.

Ours is the trainer's own step (`Trainer.take_step`: the loader's rows, DeepSpeed's ZeRO-2 engine on
one rank, the EMA, the agreed vector, the preset's curriculum, a line of the log at every step) on
made-up latents with a linear schedule. Peers, in train_step_peers.py, have the same size and
weights, images that lie in memory, and AdamW and an EMA of every step: facebookresearch/DiT and
fast-DiT from checkouts, `diffusers` with accelerate, and our model in PyTorch's DDP. DiT, which has
no bf16 of its own, runs under autocast then. On a GPU all peers have TF32 in fp32, as DiT sets it;
ours has it as train.tf32 says (--tf32).

Each way lives in a process of its own and they take turns, A B C A B C, one at a time. A turn is a
step that is not counted and --steps that are; ours takes as many more, whose time is split (apart,
as clocks are read during backward). A turn gives its mean, a way the median of its turns; a ratio is
the median of those between turns of the same round. Times are wall-clock, on a GPU those of its
events; with --threads 1 the process's own time. Rows are copied to a GPU a step ahead: "data wait"
has what is left of that. On a CPU ours has glibc keep freed memory, as train.py does.

`of the peak`: 3 x the forward pass's matrix products, as a share of what a (4096, 4096) product
reaches here; on a GPU of its data sheet's half precision (MFU). What checkpointing computes again
does not count. (torch's FlopCounterMode finds the same, but for attention's scores, which its
backward computes again, and gradients of inputs, which nobody needs: see
tests/e2e/test_train_step.py.) `memory`: the most that was allocated on the GPU, else the process's
most. `first`: the first step, with compiling. `away`: of the losses of the first two steps, which
have the same inputs, from those of our first way, relative; the run fails where in fp32 that is
more than rounding. diffusers embeds t a little differently, and has no vb, so that its mse is
compared.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from made_up import make_latents
from sampling import peaks
from tqdm import tqdm
from train_step_child import Child, Failed

from largescale.config.presets import PRESETS
from largescale.config.schema import Config, TelemetryConfig
from largescale.config.serialise import to_dict
from largescale.models.build import build_model
from largescale.models.dit import flops_per_image

NAMES = {
    "ours": "ours",
    "dit": "facebookresearch/DiT",
    "fast-dit": "fast-DiT",
    "diffusers": "diffusers",
    "ddp": "our model in DDP",
}
# Peers that are no packages: a path has to be given.
CHECKOUTS = ("dit", "fast-dit")
# The largest difference of losses in fp32, on a GPU with TF32; it is 1e-7, in bf16 1e-5 to 1e-4.
ROUNDING = {"cpu": 2e-6, "cuda": 1e-3}
# A step that no run reaches: never.
FAR = 1 << 30
# The trainer's own names of parts, and those of the tables.
PARTS = {
    "data": "data wait",
    "draws": "draws",
    "rows": "rows of the draws",
    "forward": "forward",
    "backward": "backward",
    "reduce": "reduce (during backward)",
    "AdamW": "AdamW",
    "EMA": "EMA",
    "optimizer": "the engine's step around them",
    "agree": "agreed vector",
    "pacing": "pacing and checks",
    "telemetry": "telemetry",
}
# Parts that any trainer has, and those that are ours only.
COMPUTE = ("forward", "backward", "reduce", "AdamW", "EMA", "optimizer")
OVERHEAD = ("draws", "agree", "pacing", "telemetry")


@dataclass
class Way:
    """One way of taking a step, its process while it has one, and what it has measured."""

    kind: str
    precision: str
    compile: str = "off"
    checkpointing: bool = False
    kernels: str = "inductor"
    tf32: bool = True
    checkout: str | None = None
    first: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    child: Child | None = None

    @property
    def name(self) -> str:
        compiled = {"off": "", "auto": ", compile=auto"}.get(
            self.compile, f", {self.compile} compiled"
        )
        settings = (
            ", checkpointing" * self.checkpointing
            + f", {self.kernels} kernels" * (self.kernels != "inductor")
            + ", without TF32" * (not self.tf32)
        )
        return f"{NAMES[self.kind]}, {self.precision}{compiled}{settings}"

    def config(
        self, preset: Config, options: argparse.Namespace, batch: int, data: Path, run: Path
    ) -> Config:
        """The preset, with a schedule that all peers have, and without checkpoints and previews. With
        fused kernels AdamW is fused too."""
        optimizer = preset.optimizer
        if self.kernels == "fused":
            optimizer = replace(optimizer, kernel="fused")
        return replace(
            preset,
            optimizer=optimizer,
            diffusion=replace(preset.diffusion, schedule="linear"),
            data=replace(preset.data, path=str(data)),
            train=replace(
                preset.train,
                steps=FAR,
                global_batch_size=batch,
                micro_batch_size=None,
                compile=self.compile,
                activation_checkpointing=self.checkpointing,
                kernels=self.kernels,
                tf32=self.tf32,
                threads=options.threads,
                device=options.device,
                ds_config=f"ds_configs/zero2_{self.precision}.json",
            ),
            checkpoint=replace(preset.checkpoint, every=FAR),
            telemetry=TelemetryConfig(log_every=1, reference_every=0, preview_every=0),
            output=str(run),
        )

    def seconds(self) -> list[float]:
        """The mean time of a step, by turn."""
        return [statistics.fmean(turn["times"]) for turn in self.turns]


def take_turns(
    ways: list[Way],
    preset: Config,
    options: argparse.Namespace,
    batch: int,
    data: Path,
    folder: Path,
) -> None:
    """Let the ways take turns; one that fails is left out from there on."""
    # Turn 0 is not counted: it builds and compiles.
    plan = list(itertools.product(range(1 + options.rounds), enumerate(ways)))
    bar = tqdm(plan, f"batches of {batch}", leave=False)
    try:
        for turn, (i, way) in bar:
            if way.error:
                continue
            bar.set_postfix_str(way.name)
            try:
                if way.child is None:
                    run = folder / f"{batch}_{i}"
                    config = to_dict(way.config(preset, options, batch, data, run / f"run_{turn}"))
                    way.child = Child(
                        {
                            "kind": way.kind,
                            "precision": way.precision,
                            "checkout": way.checkout,
                            "config": config,
                        },
                        run,
                    )
                    # It answers once it is built.
                    way.child.answer()
                    first = way.child.ask()
                    way.first = way.first or first
                if turn:
                    way.turns.append(way.child.ask(steps=options.steps))
            except Failed as error:
                way.error = str(error)
                tqdm.write(
                    f"{way.name}: {error}\n{way.child.log_end() if way.child else ''}",
                    file=sys.stderr,
                )
            if way.child and (options.restart or way.error):
                way.child.close()
                way.child = None
    finally:
        for way in ways:
            if way.child:
                way.child.close()
                way.child = None


def ratio(one: Way, other: Way) -> float | None:
    """How many times as fast the other is: the median over turns of the same round."""
    # One that failed has fewer turns.
    ratios = [a / b for a, b in zip(one.seconds(), other.seconds(), strict=False)]
    return statistics.median(ratios) if ratios else None


def found(
    way: Way,
    ways: list[Way],
    base: Way,
    reference: Way,
    batch: int,
    flops: float,
    peak: dict[str, float],
) -> dict[str, Any]:
    """What was measured of a way, for JSON and tables."""
    known = {
        "name": way.name,
        "kind": way.kind,
        "precision": way.precision,
        "compile": way.compile,
        "checkpointing": way.checkpointing,
        "kernels": way.kernels,
        "tf32": way.tf32,
        "checkout": commit(way.checkout),
        "error": way.error,
    } | way.first
    if not way.turns:
        return known
    seconds = way.seconds()
    step_s = statistics.median(seconds)
    # diffusers has no vb, so that its loss is another.
    which = "mses" if way.first["losses"][0] is None else "losses"
    differences = []
    for a, b in zip(way.first[which], reference.first[which], strict=True):
        differences.append(abs(a / b - 1))
    known |= {
        "step_s": step_s,
        "images_s": batch / step_s,
        "spread": [min(seconds) / step_s - 1, max(seconds) / step_s - 1],
        "ratio": ratio(base, way),
        "of_peak": flops * batch / step_s / peak["fp32" if way.precision == "fp32" else "bf16"],
        "away": max(differences),
        "compile_s": way.first["first_s"] - step_s,
        "peak_bytes": max([turn["peak_bytes"] for turn in way.turns]),
        "turns": way.turns,
    }
    if way.kind == "ours":
        known |= parts_of(way)
        peers = [other for other in ways if other.kind != "ours"]
        known["times_as_fast_as"] = {other.name: ratio(other, way) for other in peers}
    return known


def parts_of(way: Way) -> dict[str, Any]:
    """What the time of a step of ours goes to."""
    times: dict[str, float] = {}
    for name in [*PARTS, *way.turns[0]["parts"]]:
        times[name] = statistics.median([turn["parts"].get(name, 0.0) for turn in way.turns])
    total = sum(times.values())
    return {
        "parts": times,
        "outside": 1 - sum(map(times.__getitem__, COMPUTE)) / total,
        "overhead": sum(map(times.__getitem__, OVERHEAD)) / total,
    }


def installed(*names: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def commit(checkout: str | None) -> str | None:
    """The commit of a checkout, where there is one."""
    if checkout is None:
        return None
    try:
        git = subprocess.run(
            ["git", "-C", checkout, "log", "-1", "--format=%H"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown: git is not installed"
    return git.stdout.strip() or "not in git"


def table(*rows: list[str]) -> list[str]:
    """A Markdown table after an empty line; the first row is its head."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return ["", *[f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]]


def report(results: list[dict[str, Any]], base: str) -> str:
    """All ways in one table, then ours beside peers, and what its time goes to."""
    lines = table_of_ways(results, base)
    ours = [r for r in results if "parts" in r]
    if not ours:
        return "\n".join([*lines, ""])

    # Only peers that were measured.
    names = [r["name"] for r in ours]
    rows = []
    for peer, times_as_fast in ours[0]["times_as_fast_as"].items():
        if times_as_fast:
            rows.append([peer, *[f"{r['times_as_fast_as'][peer]:.2f}" for r in ours]])
    if rows:
        lines += table(["times as fast as", *names], *rows)

    # Each part of a step, in ms and as a share of it.
    parts: dict[str, None] = {}
    for r in ours:
        parts.update(dict.fromkeys(r["parts"]))
    rows = []
    for part in parts:
        rows.append([PARTS.get(part, part), *[part_text(r["parts"], part) for r in ours]])
    lines += table(["part of a step, ms", *names], *rows)
    lines.append("")
    for r in ours:
        lines.append(
            f"{r['name']}: outside forward, backward and optimizer {r['outside']:.2%} of a "
            f"step; curriculum, draws, telemetry and agreed vector {r['overhead']:.2%}"
        )
    return "\n".join(lines)


def part_text(times: dict[str, float], part: str) -> str:
    """One part of a step in ms, with its share."""
    seconds = times.get(part, 0)
    return f"{1e3 * seconds:.2f} ({seconds / sum(times.values()):.1%})"


def table_of_ways(results: list[dict[str, Any]], base: str) -> list[str]:
    """A Markdown table of all ways, those that failed included."""
    rows = [
        [
            "way",
            "step, ms",
            "images/s",
            "spread",
            f"of {base}",
            "of the peak",
            "memory, GiB",
            "first, s",
            "away",
        ]
    ]
    for r in results:
        if "step_s" not in r:
            rows.append([r["name"], f"failed: {r['error']}", *[""] * 7])
            continue
        rows.append(
            [
                r["name"] + (f" (failed in the end: {r['error']})" if r["error"] else ""),
                f"{1e3 * r['step_s']:.1f}",
                f"{r['images_s']:.2f}",
                "{:+.0%} {:+.0%}".format(*r["spread"]),
                f"{r['ratio']:.2f} x",
                f"{r['of_peak']:.0%}",
                f"{r['peak_bytes'] / 2**30:.2f}",
                f"{r['first_s']:.1f}",
                f"{r['away']:.0e}",
            ]
        )
    return table(*rows)


def add_options_of_ways(parser: argparse.ArgumentParser, gpu: bool) -> None:
    """Add what chooses the ways that are compared."""
    parser.add_argument(
        "preset", metavar="PRESET", help="such as dit_s2_imagenet256; class-conditional"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256] if gpu else [8],
        help="images; by default 8, on a GPU 32, 64, 128 and 256 in turn",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["bf16"] if gpu else ["fp32", "bf16"],
        help="by default fp32 and bf16, on a GPU bf16; fp16 is ours only",
    )
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=("auto", "off", "blocks", "model"),
        default=["off", "blocks"] if gpu else ["off"],
        help="of ours, and of our model in DDP",
    )
    parser.add_argument(
        "--activation-checkpointing",
        nargs="+",
        choices=("off", "on"),
        default=["off"],
        help="of ours",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=("inductor", "fused"),
        default=["inductor"],
        help="of ours: train.kernels, and with fused optimizer.kernel=fused",
    )
    parser.add_argument(
        "--tf32", nargs="+", choices=("on", "off"), default=["on"], help="of ours, on a GPU"
    )
    parser.add_argument(
        "--against",
        nargs="*",
        default=[],
        metavar="PEER",
        help="dit=PATH and fast-dit=PATH (git clone https://github.com/facebookresearch/DiT, "
        "https://github.com/chuanyangjin/fast-DiT; they need timm, torchvision and diffusers), "
        "diffusers, ddp; fast-dit and diffusers use accelerate, or autocast where it is missing",
    )


def make_parser() -> argparse.ArgumentParser:
    """The options; their defaults are those of this machine."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options_of_ways(parser, gpu)
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each way that are counted; by default 3"
    )
    parser.add_argument(
        "--steps", type=int, default=20 if gpu else 3, help="that are counted in a turn"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="a new process for each turn, where not all ways fit in memory together",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--threads", type=int, help="of each process, on a CPU; with 1, CPU time is measured"
    )
    parser.add_argument(
        "--peak", type=float, help="FLOP/s to compare with, instead of this machine's"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="for everything that was measured"
    )
    return parser


def parse(args: list[str] | None) -> tuple[argparse.Namespace, Config, dict[str, str | None]]:
    """The options, the preset, and the peers with their checkouts. Exits for what is wrong."""
    parser = make_parser()
    options = parser.parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if min(*options.batch, options.rounds, options.steps) < 1:
        parser.error("--batch, --rounds and --steps are 1 or more")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.preset not in PRESETS:
        parser.error(f"there is no preset {options.preset}; there are {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]()
    if not (
        preset.model.num_classes
        and preset.model.learn_sigma
        and preset.diffusion.timesteps == 1000
        and preset.diffusion.objective == "gaussian"
    ):
        parser.error(
            f"{options.preset} is not class-conditional with learned variances, which all peers are"
        )
    against: dict[str, str | None] = {}
    for peer in options.against:
        kind, _, path = peer.partition("=")
        if kind not in NAMES or kind == "ours":
            parser.error(
                f"there is no peer {kind}; there are dit=PATH, fast-dit=PATH, diffusers, ddp"
            )
        if bool(path) != (kind in CHECKOUTS):
            parser.error(
                f"--against {peer}: it "
                + ("takes no path" if path else f"is {kind}=PATH, of a checkout")
            )
        for name in ("models.py", "train.py", "diffusion"):
            if path and not Path(path, name).exists():
                parser.error(f"--against {peer}: no checkout of it; there is no {name}")
        if kind == "diffusers" and not find_spec("diffusers"):
            parser.error("--against diffusers needs diffusers: pip install diffusers")
        against[kind] = str(Path(path).resolve()) if path else None
    return options, preset, against


def make_ways(options: argparse.Namespace, against: dict[str, str | None]) -> list[Way]:
    """All ways that are compared, ours first."""
    ways = []
    for precision, compiled, on, kernels, tf32 in itertools.product(
        options.precision,
        options.compile,
        options.activation_checkpointing,
        options.kernels,
        options.tf32,
    ):
        ways.append(Way("ours", precision, compiled, on == "on", kernels, tf32 == "on"))
    for kind, path in against.items():
        # Peers with models of their own are not compiled, as their programs do not.
        compiles = options.compile if kind == "ddp" else ["off"]
        # Their mixed precision in fp16 would need a loss scale each.
        precisions = [precision for precision in options.precision if precision != "fp16"]
        for precision, compiled in itertools.product(precisions, compiles):
            ways.append(Way(kind, precision, compiled, checkout=path))
    return ways


def not_the_same(results: list[dict[str, Any]], reference: Way, device: str) -> list[str]:
    """The ways whose losses in fp32 are away from the reference's by more than rounding."""
    wrong = []
    for r in results:
        # In bf16, in TF32 and with fused kernels rounding differs; diffusers embeds t differently.
        exact = (
            r["precision"] == reference.precision == "fp32"
            and r["kernels"] == reference.kernels
            and r["tf32"] == reference.tf32
            and r["kind"] != "diffusers"
        )
        if exact and r.get("away", 0) > ROUNDING[device]:
            wrong.append(f"{r['name']} by {r['away']:.0e} from {reference.name}")
    return wrong


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return all numbers. Exits where ways differ by more than
    rounding."""
    options, preset, against = parse(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.device("meta"):
        model = build_model(preset.model)
    flops, device = 3 * flops_per_image(model), torch.device(options.device)
    peak = {"fp32": options.peak, "bf16": options.peak} if options.peak else peaks(device)
    versions = installed("torch", "deepspeed", "accelerate", "diffusers", "timm")
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    measured = {
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if args is None else args)],
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": where,
        "versions": versions,
        "preset": options.preset,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops_per_image": flops,
        "peak_flops": peak,
        "batches": [],
    }
    reached = [f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in peak.items()]
    listed = [f"{name} {number}" for name, number in versions.items()]
    print(
        f"{options.preset}, {measured['parameters']:,} parameters, {flops / 1e9:.1f} GFLOP an "
        f"image; {where}; peak {', '.join(reached)}; {', '.join(listed)}",
        flush=True,
    )
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        make_latents(data, preset.model, max(512, 2 * max(options.batch)))
        for batch in options.batch:
            ways = make_ways(options, against)
            load = os.getloadavg()[0]
            take_turns(ways, preset, options, batch, data, Path(temporary))
            # Speeds are compared with the first peer, losses with our first way.
            alive = [way for way in ways if way.turns]
            reference = (alive or ways)[0]
            peers = [way for way in alive if way.kind != "ours"]
            base = peers[0] if peers else reference
            results = [found(way, ways, base, reference, batch, flops, peak) for way in ways]
            # Written after each batch size, as the next may fail.
            measured["batches"].append(
                {"batch": batch, "base": base.name, "load": load, "ways": results}
            )
            print(
                f"\nbatches of {batch}, {options.rounds} rounds of {options.steps} steps, load "
                f"{load:.1f} before, {os.getloadavg()[0]:.1f} after\n{report(results, base.name)}",
                flush=True,
            )
            wrong += not_the_same(results, reference, options.device)
            if options.json:
                options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"these do not learn the same: {'; '.join(wrong)}")
    return measured


if __name__ == "__main__":
    main()
