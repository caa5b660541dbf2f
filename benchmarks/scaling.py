"""python benchmarks/scaling.py: what a run costs on 8, 64 and 256 GPUs, by the model of
largescale/planning/cost.py.

With --check the model is compared with this machine's CPU: the trainer runs on one rank and on two,
one thread each, at the same global batch; the step of two is predicted from that of one and from
what two processes reach here together, in matrix products, copies and gloo's collectives. This
shows whether the arithmetic holds, and nothing about a GPU. Beside it one rank that has both
threads: the same machine without anything to send.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from made_up import make_latents
from ports import free_port

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.monitoring.telemetry import read_metrics
from largescale.planning.cost import Plan, Workload, daly, step, young
from largescale.planning.hardware import HARDWARE, Hardware
from largescale.planning.memory import largest_micro_batch
from largescale.training.dry_run import prediction_source, workload

ROOT = Path(__file__).parent.parent
FP32 = "ds_configs/zero2_fp32.json"
# Steps of --check that are not counted.
WARM_UP_STEPS = 3
# Fields of Hardware that an option can set, as the data sheet does not have them.
ASSUMED = (
    "mfu",
    "intra-bandwidth",
    "inter-bandwidth",
    "data-bandwidth",
    "write-bandwidth",
    "storage-bandwidth",
    "node-mtbf-hours",
    "restart-s",
)


# ---- the table


def plan(config: Config, hardware: Hardware, gpus: int, steps: int) -> Plan:
    """The plan of a preset's run, in as many micro steps as memory asks for."""
    ds = load_ds_config(config.train.ds_config)
    micro = largest_micro_batch(config, ds, gpus, hardware.usable_bytes)
    if not micro:
        raise SystemExit(f"not one image of {config.name} fits into one {hardware.name}")
    accumulation = config.train.global_batch_size // (gpus * micro)
    return Plan(workload(config, ds, accumulation), hardware, gpus, steps, config.checkpoint.every)


def tables(plans: list[Plan]) -> str:
    """Two Markdown tables: what a step costs, and what checkpoints and failures cost."""
    return "\n".join([*step_table(plans), "", *checkpoint_table(plans)])


def step_table(plans: list[Plan]) -> list[str]:
    """A Markdown table of the step, and of what takes its time."""
    work = plans[0].work
    hardware = plans[0].hardware
    names = [name for name in plans[0].step.parts if name != "compute"]
    lines = [
        "| GPUs | images a GPU | step, ms | images/s | MFU | hours | GPU hours | compute | "
        f"{' | '.join(names)} | first bottleneck | data, MB/s | a node |",
        f"|---{'|---:' * (7 + len(names))}|---|---:|---:|",
    ]
    for p in plans:
        s = p.step
        shares = " | ".join([f"{100 * s.share(name):.1f} %" for name in names])
        micro = f" x {work.grad_accum_steps}" if p.work.grad_accum_steps > 1 else ""
        images = work.global_batch_size // (p.gpus * p.work.grad_accum_steps)
        lines.append(
            f"| {p.gpus} | {images}{micro} | {1e3 * s.seconds:.1f} | {s.images_per_s:,.0f} | "
            f"{p.mfu:.2f} | {p.hours:,.1f} | {p.hours * p.gpus:,.0f} | {100 * s.share('compute'):.0f} % | "
            f"{shares} | {s.bottleneck} | {s.data_rate / 1e6:,.0f} | "
            f"{s.data_rate / 1e6 / hardware.nodes(p.gpus):,.0f} |"
        )
    return lines


def checkpoint_table(plans: list[Plan]) -> list[str]:
    """A Markdown table of checkpoints: how long they take, and how often they are best made."""
    lines = [
        "| GPUs | checkpoint, GB | stall, s | written after, s | failure every, h | best every, "
        "min (Young) | (Daly) | in steps | wasted | configured | wasted |",
        f"|---{'|---:' * 10}|",
    ]
    for p in plans:
        # Both rules weigh the stall of a checkpoint against what a failure loses; in minutes.
        by_young = young(p.stall_s, p.mtbf_s) / 60
        by_daly = daly(p.stall_s, p.mtbf_s) / 60
        lines.append(
            f"| {p.gpus} | {p.work.checkpoint_bytes / 1e9:.1f} | {p.stall_s:.2f} | {p.write_s:.1f} "
            f"| {p.mtbf_s / 3600:,.0f} | {by_young:.1f} | {by_daly:.1f} | {p.best_every:,} | "
            f"{100 * p.wasted(p.best_every):.2f} % | {p.every:,} | {100 * p.wasted(p.every):.2f} % "
            "|"
        )
    return lines


# ---- the check


def ranks_of(count: int, *program: str) -> str:
    """Run a Python program on so many processes of one thread each; returns what rank 0 prints."""
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    processes = []
    for rank in range(count):
        process = subprocess.Popen(
            [sys.executable, *program],
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            # All ranks report the same; one is enough.
            stderr=None if rank == 0 else subprocess.DEVNULL,
        )
        processes.append(process)

    # A rank that fails leaves the others waiting for it.
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        if process.returncode:
            status = process.returncode
            raise SystemExit(f"{' '.join(program)} on {count} ranks: exit status {status}")
    return outputs[0]


def probe(elements: int, bucket: int) -> None:
    """Measure, on one of two ranks, the seconds of the same work alone and beside the other rank,
    and of a step's collectives in fp32."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    a = torch.randn(1024, 1024)
    b = torch.randn(1024, 1024)
    # ZeRO-2 reduces all gradients, and gathers the half of the weights that each rank updates.
    flat = torch.randn(elements)
    part = torch.randn(elements // 2)
    gathered = torch.empty(2 * len(part))

    def median_s(work: Callable[[], object], times: int = 7) -> float:
        def once() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        # The first time warms caches up.
        work()
        return statistics.median([once() for _ in range(times)])

    def reduce_buckets() -> None:
        for bucket_of in flat.split(bucket):
            dist.all_reduce(bucket_of)

    found: dict[str, float] = {}
    for name, work in (("products", lambda: a @ b), ("copies", lambda: flat.clone())):
        if dist.get_rank() == 0:
            found[f"{name} alone"] = median_s(work)
        dist.barrier()
        found[f"{name} together"] = median_s(work)
        dist.barrier()
    found["all-reduce"] = median_s(reduce_buckets)
    dist.barrier()
    found["all-gather"] = median_s(lambda: dist.all_gather_into_tensor(gathered, part))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def measure(
    preset: str, data: Path, run: Path, ranks: int, threads: int, batch: int, steps: int
) -> dict[str, float]:
    """Train, and measure the seconds of forward and backward, and of `engine.step`: medians over
    the steps after warming up."""
    options = {
        "data.path": data,
        "output": run,
        "train.device": "cpu",
        "train.ds-config": FP32,
        "train.steps": steps,
        "train.global-batch-size": batch,
        "train.threads": threads,
        # Every step is logged, and nothing else is done.
        "telemetry.log-every": 1,
        "telemetry.reference-every": 0,
        "telemetry.preview-every": 0,
    }
    words = ["-m", "largescale.train", preset, "--telemetry.trackers"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    ranks_of(ranks, *words)

    # The first steps are slower, as memory is touched for the first time.
    rows = [row for row in read_metrics(run) if "loss" in row][WARM_UP_STEPS:]
    compute = [row["time/forward_ms"] + row["time/backward_ms"] for row in rows]
    optimizer = [row["time/optimizer_ms"] for row in rows]
    return {
        "forward and backward": statistics.median(compute) / 1e3,
        "optimizer": statistics.median(optimizer) / 1e3,
    }


def calibrated(work: Workload, one: dict[str, float], probed: dict[str, float]) -> Hardware:
    """This machine, one core a rank, as two ranks find it together. What one rank reaches alone is
    slowed down by what the probe lost to the other rank: cores of one processor share its
    memory."""
    # What one rank alone reaches: bytes/s in the update, FLOP/s in the rest of its step.
    memory = work.update_bytes / one["optimizer"]
    compute_s = one["forward and backward"] - work.staging_bytes(1) / memory
    flops = work.flops_per_image * work.global_batch_size / compute_s
    # Bytes that each of two ranks sends to the other.
    sent = work.parameters * (work.reduce_bytes + work.weight_bytes / 2)
    link = sent / (probed["all-reduce"] + probed["all-gather"])
    return Hardware(
        "CPU",
        peak_flops=flops * probed["products alone"] / probed["products together"],
        mfu=1.0,
        launch_s=0.0,
        memory_bandwidth=memory * probed["copies alone"] / probed["copies together"],
        memory_bytes=0.0,
        intra_bandwidth=link,
        inter_bandwidth=link,
    )


def predicted(work: Workload, hardware: Hardware) -> dict[str, float]:
    """What `measure` should find on two ranks, by the model."""
    parts = step(work, hardware, 2).parts
    return {
        "forward and backward": parts["compute"] + parts["gradient reduction"],
        "optimizer": parts["optimizer"] + parts["all-gather"],
    }


def check(preset: str, batch: int, steps: int) -> None:
    """Measure one rank and two, and print how well the model predicts the latter."""
    config = PRESETS[preset]()
    config = replace(
        config, train=replace(config.train, device="cpu", ds_config=FP32, global_batch_size=batch)
    )
    work = workload(config, load_ds_config(FP32), grad_accum_steps=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        make_latents(data, config.model, 512)
        one = measure(preset, data, folder / "run1x1", 1, 1, batch, steps)
        two = measure(preset, data, folder / "run2x1", 2, 1, batch, steps)
        # One rank with both threads has nothing to send.
        both = measure(preset, data, folder / "run1x2", 1, 2, batch, steps)
    options = (str(work.parameters), str(work.reduce_bucket_size))
    probed = json.loads(ranks_of(2, __file__, "--probe", *options).splitlines()[-1])
    hardware = calibrated(work, one, probed)
    guess = predicted(work, hardware)
    print(
        f"{preset}, {work.parameters:,} parameters, fp32, batch {batch}, medians of "
        f"{steps - WARM_UP_STEPS} steps, one thread a rank"
    )
    seconds = [f"{key} {value:.4f}" for key, value in probed.items()]
    print(f"seconds of the probe: {', '.join(seconds)}")
    print(
        f"so two ranks have {hardware.peak_flops / 1e9:.1f} GFLOP/s, "
        f"{hardware.memory_bandwidth / 1e9:.1f} GB/s of memory each, and "
        f"{hardware.intra_bandwidth / 1e9:.2f} GB/s between them"
    )
    print(
        "\n| | 1 rank, s | 2 ranks, predicted | measured | predicted / measured "
        "|\n|---|---:|---:|---:|---:|"
    )
    # The step is the sum of its parts.
    for times in (one, two, both, guess):
        times["step"] = sum(times.values())
    for name in one:
        print(
            f"| {name} | {one[name]:.3f} | {guess[name]:.3f} | {two[name]:.3f} | "
            f"{guess[name] / two[name]:.2f} |"
        )
    print(
        f"\none rank with two threads: {both['step']:.3f} s a step; two ranks take "
        f"{both['step'] / two['step']:.2f} times as many images/s"
    )


def make_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="PRESET",
        help="by default dit_l2_imagenet256; of --check, dit_s2_imagenet256",
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8, 64, 256], help="by default 8, 64 and 256"
    )
    parser.add_argument("--steps", type=int, help="by default 2,000,000; of --check, 15")
    parser.add_argument("--batch-size", type=int, help="by default the preset's; of --check, 8")
    parser.add_argument("--hardware", choices=HARDWARE, default="h100")
    for name in ASSUMED:
        default = getattr(HARDWARE["h100"], name.replace("-", "_"))
        unit = " bytes/s" if name.endswith("bandwidth") else ""
        value = "by default predicted" if default is None else f"of an H100 {default:g}{unit}"
        parser.add_argument(f"--{name}", type=float, help=f"{value}; see planning/hardware.py")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the model with 1 and 2 ranks on this machine",
    )
    parser.add_argument("--probe", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message for a number that is not positive."""
    for key, value in vars(options).items():
        if isinstance(value, int | float) and key != "check" and value <= 0:
            parser.error(f"--{key.replace('_', '-')} must be positive")
    if min(options.gpus) < 1:
        parser.error("--gpus must be positive")


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    check_positive(parser, options)
    if (options.mfu or 0) > 1:
        parser.error(f"--mfu {options.mfu:g} is a share of the peak, at most 1")
    if options.probe:
        return probe(*options.probe)
    if options.check:
        return check(
            options.preset or "dit_s2_imagenet256", options.batch_size or 8, options.steps or 15
        )

    # What is not given is as the machine has it.
    given = {}
    for name in ASSUMED:
        key = name.replace("-", "_")
        if getattr(options, key) is not None:
            given[key] = getattr(options, key)
    hardware = replace(HARDWARE[options.hardware], **given)
    config = PRESETS[options.preset or "dit_l2_imagenet256"]()
    batch = options.batch_size or config.train.global_batch_size
    config = replace(config, train=replace(config.train, global_batch_size=batch))
    for gpus in options.gpus:
        if batch % gpus:
            parser.error(
                f"a batch of {batch} cannot be shared by {gpus} GPUs; give --batch-size or other "
                "--gpus"
            )
    steps = options.steps or 2_000_000
    plans = [plan(config, hardware, n, steps) for n in options.gpus]
    print(
        f"{config.name}, batch {batch}, {steps:,} steps, {hardware.name}, never measured.\nOn "
        f"{plans[0].gpus} GPUs {prediction_source(plans[0])}.\nAssumed: "
        f"{1e6 * hardware.launch_s:.0f} us a kernel on the host, and a failure of a node every "
        f"{hardware.node_mtbf_hours:,.0f} h. Published trainers of this kind report an MFU of 12 to "
        "25 %.\n"
    )
    print(tables(plans))


if __name__ == "__main__":
    main()
