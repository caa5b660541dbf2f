"""The stages of benchmarks/gpu_check.py that no other program measures:
`gpu_check_stages.py WHAT --json FILE`.

    train        a run of the training program with its checkpoints, evaluation and preview, and
                 eval.sample of it: what its own figures say
    profile      a run with --profile: the time of its kernels, by part of the step and by kind
    recompiles   what torch.compile compiles again over evaluation and preview
    faults       a killed, a stopped and a hung rank: what is printed, when, and each exit status
    all-gather   gathering weights whose parts are aligned to 16 bytes, and not
    card         not a stage: the card's name, how many there are, and their libraries' versions

The program gives each a time limit, a folder for what it writes, and the device.
"""

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from made_up import make_latents
from ports import free_port
from scaling import ranks_of

from largescale.config.presets import PRESETS
from largescale.monitoring.run_record import account, read_starts
from largescale.monitoring.telemetry import read_metrics

ROOT = Path(__file__).parent.parent

# ---- training


def train(
    options: argparse.Namespace,
    run: Path,
    batch: int,
    steps: int,
    settings: dict[str, Any],
    *flags: str,
) -> None:
    """Train the preset on made-up data; SystemExit where it fails. `settings`: more options of the
    training program, without their dashes; `flags`: those without a value."""
    data = run.parent / "data"
    if not data.exists():
        make_latents(data, PRESETS[options.preset]().model, 2048)
    settings = settings | {
        "data.path": data,
        "output": run,
        "train.device": options.device,
        "train.steps": steps,
        "train.global-batch-size": batch,
    }
    words = ["-m", "largescale.train", options.preset, *flags]
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    ranks_of(options.ranks, *words)


def training(options: argparse.Namespace) -> dict[str, Any]:
    """A run as a user starts it, with the preset's batch, and samples of it."""
    run = options.folder / "run"
    interval = options.steps // 2
    train(
        options,
        run,
        PRESETS[options.preset]().train.global_batch_size,
        options.steps,
        {
            "train.micro-batch-size": "auto",
            # Untrained models blow up what they draw by the cosine schedule.
            "diffusion.schedule": "linear",
            "telemetry.log-every": max(1, options.steps // 12),
            "telemetry.reference-every": interval,
            "telemetry.preview-every": interval,
            "checkpoint.every": interval,
            "checkpoint.keep-last": 1,
        },
    )
    found = outside(options.preset, read_metrics(run))
    found["goodput"] = str(account(read_starts(run)))
    return found | {"ranks": options.ranks, "sampling": sample(options, run)}


def outside(preset: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a run with the preset's own intervals spends its time, from the log of a short one."""
    config = PRESETS[preset]()
    # The first row has what the first step compiles.
    steps = [row for row in rows if "loss" in row][1:]
    plain = [row for row in steps if not {"time/reference_ms", "time/preview_ms"} & row.keys()]
    images_s = statistics.median([row["images_per_s"] for row in plain or steps])
    step_s = config.train.global_batch_size / images_s

    # An evaluation's time is given for each step of its row.
    width = steps[1]["step"] - steps[0]["step"]
    of_events = {
        "checkpoint": [row["checkpoint/stall_s"] for row in rows if "checkpoint/stall_s" in row]
    }
    for name in ("reference", "preview"):
        key = f"time/{name}_ms"
        of_events[name] = [width * row[key] / 1e3 for row in steps if row.get(key)]
    every = {
        "checkpoint": config.checkpoint.every,
        "reference": config.telemetry.reference_every,
        "preview": config.telemetry.preview_every,
    }
    # Seconds that a step has of each.
    overhead = statistics.median([row["time/overhead_share"] for row in steps])
    events_s = {name: statistics.median(times or [0.0]) for name, times in of_events.items()}
    each = {"data, draws, report, log": overhead * step_s}
    each |= {name: seconds / every[name] for name, seconds in events_s.items()}
    total = step_s + sum(seconds / every[name] for name, seconds in events_s.items())
    shares = {name: seconds / total for name, seconds in each.items()}
    return {
        "step_s": step_s,
        "images_s": images_s,
        "mfu": steps[-1].get("mfu"),
        "memory_gib": steps[-1]["memory_gib"],
        "events_s": events_s,
        "shares": shares,
        "outside": sum(shares.values()),
    }


def sample(options: argparse.Namespace, run: Path) -> dict[str, Any]:
    """What eval.sample says of drawing from the run; its time includes compiling."""
    words = ["--num-samples", str(options.samples), "--sampler", "ddim", "--steps", "50"]
    words += ["--cfg-scale", "1.5", "--vae", "none", "--device", options.device]
    said = python("-m", "eval.sample", str(run), "--out", str(options.folder / "samples"), *words)
    (images_s,) = re.findall(r"([\d.]+) images/s", said)[-1:]
    return {"samples": options.samples, "images_s": float(images_s)}


def python(*words: str) -> str:
    """What a Python program prints; SystemExit where it fails."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {done.returncode}")
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    """Of a program: one thread a process. PYTHONPATH is that of this one."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


# ---- kernels

# The first kind whose pattern a kernel's name contains; in the update everything is the optimizer's.
KINDS = {
    "communication": r"nccl|all_?reduce|all_?gather|c10d",
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"triton_tem|gelu_product|gemm|nvjet|cutlass|cublas|xmma|splitK|aten::(add)?mm|aten::bmm|mkl",
    "copies": r"memcpy|memset|aten::copy_",
}
LAPS = ("data", "draws", "forward", "agree", "backward", "optimizer")


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """The time of kernels in the steps that --profile records, as a step has it."""
    run = options.folder / "run"
    train(options, run, options.batch, 10, {"checkpoint.every": 10**9}, "--profile")
    (trace,) = (run / "profile").glob("*.gz")
    (listed,) = (run / "profile").glob("*.txt")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return kernel_times(events) | {"batch": options.batch, "largest": listed.read_text()}


def kernel_times(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a step by the part of the step that launched a kernel and by kind, and of the gaps
    between kernels."""
    spans = [event for event in events if event.get("ph") == "X"]
    laps = [e for e in spans if e.get("cat") == "user_annotation" and e["name"] in LAPS]
    kernels = [e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = {}
    for event in spans:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation")] = event["ts"]
    times = [event["dur"] for event in kernels]
    if not kernels:
        # Without a GPU: operations, without what they call.
        operations = [event for event in spans if event.get("cat") == "cpu_op"]
        kernels = sorted(operations, key=lambda e: (e["tid"], e["ts"], -e["dur"]))
        times = own_times(kernels)

    steps = max(1, sum(lap["name"] == "optimizer" for lap in laps))
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kernel, time_us in zip(kernels, times, strict=True):
        begin = launched.get(kernel.get("args", {}).get("correlation"), kernel["ts"])
        around = [lap for lap in laps if lap["ts"] <= begin <= lap["ts"] + lap["dur"]]
        part = around[0]["name"] if around else "other"
        parts[part][kind_of(kernel["name"], part)] += time_us / 1e6 / steps
    span, busy = covered((k["ts"], k["ts"] + k["dur"]) for k in kernels)
    return {
        "steps": steps,
        "parts": {part: dict(kinds) for part, kinds in parts.items()},
        "span_s": span / 1e6 / steps,
        "gaps_s": (span - busy) / 1e6 / steps,
    }


def kind_of(kernel: str, part: str) -> str:
    """What a kernel does, by its name."""
    # Inductor names a kernel after all that is fused into it, such as the layout of attention's
    # results; its products are templates.
    if kernel.startswith("triton_") and not kernel.startswith("triton_tem"):
        return "optimizer" if part == "optimizer" else "elementwise"
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE) and (kind != "copies" or part != "optimizer"):
            return kind
    return "optimizer" if part == "optimizer" else "elementwise"


def own_times(operations: list[dict[str, Any]]) -> list[float]:
    """How long each operation took without those that it called, which lie in it; in their order.
    They are sorted by thread and begin."""
    own = [event["dur"] for event in operations]
    open_ones: list[int] = []
    for i, event in enumerate(operations):
        while open_ones and not _lies_in(event, operations[open_ones[-1]]):
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]] -= event["dur"]
        open_ones.append(i)
    return own


def _lies_in(event: dict[str, Any], other: dict[str, Any]) -> bool:
    return event["tid"] == other["tid"] and event["ts"] < other["ts"] + other["dur"]


def covered(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(from the first begin to the last end, how much of it an interval covers)."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0, 0.0
    busy = 0.0
    end = ordered[0][0]
    for begin, finish in ordered:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return end - ordered[0][0], busy


# ---- recompilations


def recompiles(options: argparse.Namespace) -> dict[str, Any]:
    """What torch says that it compiles again."""
    log = options.folder / "recompiles.log"
    # ranks_of passes this process's environment on.
    os.environ |= {"TORCH_LOGS": "recompiles", "TORCH_LOGS_OUT": str(log)}
    train(
        options,
        options.folder / "run",
        options.batch,
        6,
        {
            "train.compile": "blocks",
            "telemetry.reference-every": 3,
            "telemetry.preview-every": 3,
            "telemetry.preview-steps": 4,
            "checkpoint.every": 10**9,
        },
    )
    text = log.read_text() if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if "Recompiling function" in line]
    return {"recompilations": len(lines), "lines": lines[:20]}


# ---- faults

FAULTS = {"killed": "--kill", "stopped": "--freeze", "hung": "--hang"}
FAULT_STEP = 6


def faults(options: argparse.Namespace) -> dict[str, Any]:
    """Break rank 1 of 2 in step 6, in three ways."""
    make_latents(options.folder / "data", PRESETS[options.preset]().model, 512)
    found = {}
    for name, flag in FAULTS.items():
        found[name] = break_rank(options, flag, options.folder / name)
        print(f"{name}: {found[name]}", flush=True)
    return found


def break_rank(options: argparse.Namespace, flag: str, run: Path) -> dict[str, Any]:
    """What rank 0 prints, and when and how each rank ends, from the last step before the fault."""
    words = ["tests/dist/driver.py", flag, str(FAULT_STEP), "1", "--", options.preset]
    settings = {
        "data.path": run.parent / "data",
        "output": run,
        "train.device": options.device,
        "train.steps": 1000,
        "train.global-batch-size": 16,
        "train.timeout-s": options.timeout_s,
        "telemetry.log-every": 1,
        "checkpoint.every": 10**9,
    }
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    env = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    log = run.with_suffix(".log")
    ranks = []
    try:
        for rank in "01":
            # Rank 1 says what it does in the log of the stage.
            with log.open("w") if rank == "0" else open(os.devnull, "w") as said:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env=env | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=said,
                    stderr=said,
                )
            ranks.append(process)
        fault_s, ended_s = watch(ranks, run)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = re.sub(r" *\d+%\|[^\r\n]*?step/s[^\]]*\]", "", log.read_text()).splitlines()
    return {
        "after_s": {rank: t - fault_s for rank, t in ended_s.items()},
        "statuses": {rank: process.returncode for rank, process in enumerate(ranks)},
        "said": [line for line in said if line.strip()][-6:],
        "time_limit_s": options.timeout_s,
    }


def watch(ranks: list[subprocess.Popen[bytes]], run: Path) -> tuple[float, dict[int, float]]:
    """(when the step before the fault was logged, when each rank that ends had ended). Rank 1, which
    may stay, is waited for as long as a watchdog needs to speak."""
    fault_s = 0.0
    ended_s: dict[int, float] = {}
    while 0 not in ended_s or (len(ended_s) < 2 and time.monotonic() < ended_s[0] + 10):
        time.sleep(0.1)
        if not fault_s and len(read_metrics(run)) >= FAULT_STEP:
            fault_s = time.monotonic()
        for rank, process in enumerate(ranks):
            if rank not in ended_s and process.poll() is not None:
                ended_s[rank] = time.monotonic()
    return fault_s or ended_s[0], ended_s


# ---- the all-gather


def all_gather(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of gathering bf16 weights in place, by the elements of each rank's part."""
    words = [__file__, "all-gather-rank", "--device", options.device, "--elements"]
    said = ranks_of(options.ranks, *words, *map(str, options.elements))
    seconds: dict[str, float] = json.loads(said.splitlines()[-1])
    return {"ranks": options.ranks, "seconds": seconds}


def all_gather_rank(options: argparse.Namespace) -> None:
    """One rank of it, in the environment of ranks_of."""
    import torch
    import torch.distributed as dist

    gpu = options.device == "cuda"
    rank, device = int(os.environ["LOCAL_RANK"]), torch.device(options.device)
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpu else "gloo")
    found = {}
    for elements in options.elements:
        weights = torch.zeros(elements * dist.get_world_size(), dtype=torch.bfloat16, device=device)
        mine = weights[rank * elements : (rank + 1) * elements]
        times = []
        for _ in range(12 if gpu else 4):
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(weights, mine)
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        # The first ones set up connections.
        found[str(elements)] = statistics.median(times[2:])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


# ---- the card


def card(options: argparse.Namespace) -> dict[str, Any]:
    """What torch says of the GPUs, in a process that ends: asking takes some of their memory."""
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "card": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "versions": {"cudnn": str(torch.backends.cudnn.version()), "nccl": nccl},
    }


# ---- the program

STAGES = {
    "train": training,
    "profile": profile,
    "recompiles": recompiles,
    "faults": faults,
    "all-gather": all_gather,
    "card": card,
}


def make_parser() -> argparse.ArgumentParser:
    """The options of all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*STAGES, "all-gather-rank"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="for runs and samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--preset", default="dit_l2_imagenet256")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--timeout-s", type=float, default=20)
    parser.add_argument("--elements", type=int, nargs="+")
    return parser


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    if options.what == "all-gather-rank":
        return all_gather_rank(options)
    found = STAGES[options.what](options)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
