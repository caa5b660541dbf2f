"""python benchmarks/gpu_check.py [--full]: everything that has to be measured on a CUDA machine, as
one report. `make gpu` starts it, slurm/gpu_check.sh on a node of a cluster.

It runs stages, each a program of its own with a time limit of 10 minutes: a step of DiT-L/2 at
several micro batches, in bf16, fp16 and TF32, with each kind of kernels, beside other trainers;
what the roofline predicts beside what a profile shows; memory; a run with its own figures;
sampling; tests/gpu; and with two GPUs or more ranks that die, stop or hang, and the all-gather.
--full adds DiT-S/2, B/2 and XL/2. Nothing is downloaded.

Each stage's result is written to OUT/stages when it ends, and OUT/gpu_report.md and .json are
written anew: a second start does what is missing or failed, and --again STAGE repeats one. A stage
that fails is reported with its last lines, and the others go on. Exit status: 1 where one failed.

--rehearse runs every stage on the CPU, with tiny models and two ranks over gloo: it shows that
everything starts, and measures nothing.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from gpu_check_report import markdown, trouble, verdicts
from train_step import commit, installed

from largescale.config.derived import divisors
from largescale.config.presets import PRESETS
from largescale.host.files import try_lock

ROOT = Path(__file__).parent.parent
# Each stage ends within ten minutes.
LIMIT_S = 580.0
SIZES = {"l": "L/2", "s": "S/2", "b": "B/2", "xl": "XL/2"}
# Elements of bf16 weights of DiT-L/2 that each of 8 ranks has: as DeepSpeed splits them, and aligned.
PARTS = (57_230_084, 57_230_112)
# The same remainders to 16 bytes, in a hundredth.
SMALL_PARTS = (572_308, 572_336)


@dataclass(frozen=True)
class Stage:
    """One program of the check."""

    name: str
    title: str
    words: list[str]
    """What Python is given; {json} and {folder} stand for the result's file and a folder."""
    kind: str
    """How the report shows the result: steps, profile, ... (gpu_check_report.py)."""
    missing: str | None = None
    """Why it cannot run here."""
    needs_gpu: bool = True
    """Whether it needs the GPUs: they are hidden from others."""


class Plan:
    """The stages of a check, in the order in which they run."""

    def __init__(self, options: argparse.Namespace, gpus: int, card: str):
        self.options = options
        self.gpus = gpus
        self.card = card
        self.rehearse: bool = options.rehearse
        self.device = "cpu" if self.rehearse else "cuda"
        # On a CPU compiling takes a minute each time, and is rehearsed by `recompiles`.
        self.compiled = "off" if self.rehearse else "blocks"

    def stages(self) -> list[Stage]:
        """All of them. L/2 comes first, as time on a card may be short."""
        sizes = list(SIZES) if self.options.full else ["l"]
        found = [
            self._step("l"),
            self._kernels("l"),
            *self._against(),
            *self._parts(),
            self._run(1),
        ]
        found += [*self._precisions(), self._sampling(), self._recompiles(), *self._tests()]
        if self.gpus > 1:
            batch = PRESETS[self.preset("l")]().train.global_batch_size
            found.append(self._run(max(n for n in divisors(batch) if n <= self.gpus)))
        found += self._ranks()
        for size in sizes[1:]:
            found += [self._step(size), self._kernels(size)]
        if self.rehearse:
            found = [dataclasses.replace(stage, needs_gpu=False) for stage in found]
        return found

    def preset(self, size: str) -> str:
        return "debug" if self.rehearse else f"dit_{size}2_imagenet256"

    def _compare(self, size: str, batches: list[int], *more: str) -> list[str]:
        """benchmarks/train_step.py with these micro batches."""
        often = ["--rounds", "2", "--steps", "10"]
        if self.rehearse:
            batches = [4]
            often = ["--rounds", "1", "--steps", "1", "--threads", "1", "--peak", "1e11"]
        words = ["benchmarks/train_step.py", self.preset(size), "--device", self.device]
        return [*words, "--batch", *map(str, batches), *often, "--json", "{json}", *more]

    def _stage(self, what: str, *more: str) -> list[str]:
        """A stage of benchmarks/gpu_check_stages.py."""
        words = ["benchmarks/gpu_check_stages.py", what, "--json", "{json}", "--folder", "{folder}"]
        return [*words, "--device", self.device, *more]

    def _step(self, size: str) -> Stage:
        words = ["--precision", "bf16", "--compile", self.compiled]
        title = f"A step of DiT-{SIZES[size]} at several micro batches, and its memory"
        return Stage(
            f"step_{size}2", title, self._compare(size, [32, 64, 128, 256], *words), "step"
        )

    def _kernels(self, size: str) -> Stage:
        compiled = dict.fromkeys([self.compiled, "off"])
        words = ["--precision", "bf16", "--compile", *compiled, "--kernels", "inductor", "fused"]
        title = f"Kernels of DiT-{SIZES[size]}: Inductor's, fused, and eager"
        return Stage(f"kernels_{size}2", title, self._compare(size, [32], *words), "steps")

    def _against(self) -> Iterator[Stage]:
        """Ours beside each peer, one at a time: the memory holds two."""
        paths = {"dit": self.options.dit, "fast-dit": self.options.fast_dit}
        if self.rehearse:
            stand_in = str(ROOT / "benchmarks/dit_stand_in")
            paths = {peer: path or stand_in for peer, path in paths.items()}
        for peer in ("fast-dit", "ddp", "dit", "diffusers"):
            missing = None
            if peer in paths and not paths[peer]:
                missing = f"no checkout of it: give --{peer} PATH"
            elif peer == "diffusers" and not find_spec("diffusers"):
                missing = "diffusers is not installed: pip install diffusers"
            words = ["--precision", "bf16", "--compile", self.compiled, "--against"]
            words.append(f"{peer}={paths[peer]}" if peer in paths else peer)
            name = f"against_{peer.replace('-', '_')}"
            words = self._compare("l", [32], *words)
            yield Stage(name, f"DiT-L/2 beside {peer}", words, "steps", missing)

    def _parts(self) -> list[Stage]:
        """What the roofline predicts, and what a profile of the same step shows."""
        card = next((c for c in ("b200", "h200", "h100", "a100") if c.upper() in self.card), "h100")
        predicted = "dit_s2_imagenet256" if self.rehearse else self.preset("l")
        words = ["benchmarks/roofline.py", predicted, "--card", card, "--gpus", "1"]
        words += ["--batch-size", "32", "--images", "32", "--json", "{json}"]
        measured = self._stage("profile", "--preset", self.preset("l"), "--batch", "32")
        title = "Parts of a step of DiT-L/2, micro batch 32"
        return [
            Stage("predict_l2", f"{title}: predicted", words, "predict", needs_gpu=False),
            Stage("profile_l2", f"{title}: measured", measured, "profile"),
        ]

    def _run(self, ranks: int) -> Stage:
        words = ["--preset", self.preset("l"), "--ranks", str(ranks)]
        if self.rehearse:
            words += ["--steps", "24", "--samples", "8"]
        name = "run_l2" if ranks == 1 else "run_l2_ranks"
        title = f"A run of DiT-L/2 on {ranks} rank{'s' if ranks > 1 else ''}, and samples of it"
        return Stage(name, title, self._stage("train", *words), "run")

    def _precisions(self) -> list[Stage]:
        compiled = ["--compile", self.compiled, "--tf32"]
        both = ["on"] if self.rehearse else ["on", "off"]
        half = self._compare("l", [32], *compiled, *both, "--precision", "bf16", "fp16")
        full = self._compare("l", [32], *compiled, "on", "off", "--precision", "fp32")
        return [
            Stage(
                "precision_half", "DiT-L/2 in bf16 and fp16, with and without TF32", half, "steps"
            ),
            Stage("precision_fp32", "DiT-L/2 in fp32, with and without TF32", full, "steps"),
        ]

    def _sampling(self) -> Stage:
        words = ["benchmarks/sampling.py", "--device", self.device, "--samplers", "ddim"]
        if self.rehearse:
            words += ["--size", "tiny", "--images", "1", "--steps", "2", "--rounds", "1"]
            words += ["--threads", "1", "--peak", "1e11"]
        else:
            words += ["--size", "L", "--images", "32", "128"]
            words += ["--dit", self.options.dit] if self.options.dit else []
        return Stage(
            "sampling_l2", "Sampling with DiT-L/2", [*words, "--json", "{json}"], "sampling"
        )

    def _recompiles(self) -> Stage:
        words = ["--preset", self.preset("s"), "--batch", "16"]
        title = "What is compiled again over evaluation and preview"
        return Stage("recompiles", title, self._stage("recompiles", *words), "recompiles")

    def _tests(self) -> list[Stage]:
        """tests/gpu, in parts of some minutes each. Without a GPU they are skipped."""
        words = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-k"]
        first, second = "resume or compiled or two_gpus or checkpointing", "systems"
        return [
            Stage("tests_training", "tests/gpu: training", [*words, first], "tests"),
            Stage("tests_systems", "tests/gpu: SiT and EDM", [*words, second], "tests"),
            Stage(
                "tests_other",
                "tests/gpu: memory, and waits of the host",
                [*words, f"not ({first} or {second})"],
                "tests",
            ),
        ]

    def _ranks(self) -> list[Stage]:
        """What needs several GPUs."""
        missing = None if self.gpus > 1 else "needs two GPUs"
        preset = ["--preset", "debug"]
        timeout = ["--timeout-s", "3" if self.rehearse else "20"]
        ranks = min(self.gpus, 8)
        parts = map(str, SMALL_PARTS if self.rehearse else PARTS)
        gather = self._stage("all-gather", "--ranks", str(ranks), "--elements", *parts)
        return [
            Stage(
                "faults",
                "A rank of two that is killed, stopped, or hangs",
                self._stage("faults", *preset, *timeout),
                "faults",
                missing,
            ),
            Stage(
                "all_gather",
                f"Gathering weights on {ranks} ranks, by the alignment of their parts",
                gather,
                "all_gather",
                missing,
            ),
        ]


# ---- running a stage


def run(stage: Stage, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a stage in a process group of its own, which does not outlive this call; returns its
    record."""
    if stage.missing:
        return record(stage, "not run", missing=stage.missing)
    result = out / "stages" / f"{stage.name}.result.json"
    result.unlink(missing_ok=True)
    log = out / "stages" / f"{stage.name}.log"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True) as folder:
        places = {"{json}": str(result.absolute()), "{folder}": folder}
        words = [places.get(word, word) for word in stage.words]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment(folder) | ({} if stage.needs_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = "done"
            try:
                if process.wait(limit_s):
                    status = "failed"
            except subprocess.TimeoutExpired:
                status = "over its limit"
            finally:
                # Also what a stage that failed has left running.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = read_json(result)
    if status == "done" and (why := trouble(stage.kind, found)):
        status = f"failed: {why}"
    return record(
        stage,
        status,
        seconds=time.monotonic() - begin,
        exit_status=process.returncode,
        result=found,
        last_lines=last_lines(log),
    )


def record(stage: Stage, status: str, **more: Any) -> dict[str, Any]:
    shown = {"{json}": "FILE", "{folder}": "FOLDER"}
    command = ["python", *[shown.get(word, word) for word in stage.words]]
    about = {"title": stage.title, "kind": stage.kind, "command": command}
    return about | {"status": status, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | more


def environment(folder: str) -> dict[str, str]:
    """Of a stage: this tree's modules first, its own folder for temporary files, no network, and
    nothing of a launcher, as a stage starts its ranks itself."""
    launchers = ("SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return env | offline | {"PYTHONPATH": path, "TMPDIR": folder}


def last_lines(log: Path, count: int = 15) -> list[str]:
    """The end of what a stage printed, with a bar's last state only."""
    lines = log.read_text(errors="replace").splitlines()
    shown = [line.rpartition("\r")[2] for line in lines]
    return [line[:300] for line in shown if line.strip()][-count:]


# ---- the report


def machine(gpu: bool) -> dict[str, Any]:
    """The card, the driver and the versions that the numbers belong to."""
    found: dict[str, Any] = {"card": f"{os.cpu_count()} cores of a CPU", "gpus": 0, "versions": {}}
    found["driver"] = driver() if gpu else "none"
    if gpu:
        with tempfile.TemporaryDirectory() as folder:
            asked = Path(folder, "card.json")
            words = ["benchmarks/gpu_check_stages.py", "card", "--json", str(asked)]
            subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(folder), check=True)
            found |= json.loads(asked.read_text())
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    versions |= installed("torch", "triton", "deepspeed", "diffusers", "accelerate", "timm")
    return found | {"versions": versions | found["versions"], "commit": commit(str(ROOT))}


def driver() -> str:
    """The driver's version, with the card's power limit and clock, by nvidia-smi."""
    query = "driver_version,power.limit,clocks.max.sm"
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: nvidia-smi does not answer"


def write_report(out: Path, about: dict[str, Any], stages: list[Stage]) -> dict[str, Any]:
    """Write both files from what the stages have left, and return the report."""
    found = {}
    for stage in stages:
        # Before it has run: why it is not in the report.
        found[stage.name] = read(out, stage) or record(stage, "not run", missing="not run yet")
    report = about | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stages": found}
    report["verdicts"] = verdicts(report)
    replace(out / "gpu_report.json", json.dumps(report, indent=1) + "\n")
    replace(out / "gpu_report.md", markdown(report))
    return report


def read(out: Path, stage: Stage) -> dict[str, Any] | None:
    return read_json(out / "stages" / f"{stage.name}.json")


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, and where it was not written to its end."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (FileNotFoundError, ValueError):
        return None


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def claim(out: Path, about: dict[str, Any]) -> IO[str]:
    """Make the folder, and keep other checks out of it until the returned file is closed. SystemExit
    where one runs there, or where results of something else are."""
    (out / "stages").mkdir(parents=True, exist_ok=True)
    lock = try_lock(out / "lock")
    if lock is None:
        raise SystemExit(f"another check writes to {out}; wait for it, or give another --out")
    before = read_json(out / "gpu_report.json") or about
    for key in ("rehearsal", "card", "commit", "versions"):
        if before[key] != about[key]:
            raise SystemExit(
                f"{out} holds results with {key} {before[key]!r}, and this is {about[key]!r}; "
                "give another --out"
            )
    return lock


# ---- the program


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="by default runs/gpu, or runs/gpu_rehearsal")
    parser.add_argument("--full", action="store_true", help="DiT-S/2, B/2 and XL/2 too")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; measures nothing")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these, and those of --again")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="though it is done")
    parser.add_argument("--dit", metavar="PATH", help="a checkout of facebookresearch/DiT")
    parser.add_argument("--fast-dit", metavar="PATH", help="a checkout of chuanyangjin/fast-DiT")
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help=f"of each stage; by default {LIMIT_S:g}"
    )
    parser.add_argument("--list", action="store_true", help="name the stages, and run none")
    return parser


def check_names(parser: argparse.ArgumentParser, wanted: list[str], stages: list[Stage]) -> None:
    """Exit for the name of a stage that there is not."""
    names = [stage.name for stage in stages]
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            parser.error(f"there is no stage {name}; {meant}there are {', '.join(names)}")


def main(args: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(args)
    if not options.rehearse and not options.list and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs every stage on the CPU")
    for name in ("dit", "fast_dit"):
        if path := getattr(options, name):
            setattr(options, name, str(Path(path).resolve()))
    about = machine(not options.rehearse and torch.cuda.is_available())
    about["rehearsal"] = options.rehearse
    stages = Plan(options, 2 if options.rehearse else about["gpus"], about["card"]).stages()
    check_names(parser, [*(options.only or []), *options.again], stages)
    if options.list:
        print("\n".join(f"{stage.name:18}{stage.title}" for stage in stages))
        return 0

    out = options.out or Path("runs/gpu_rehearsal" if options.rehearse else "runs/gpu")
    try:
        return check(options, out, about, stages)
    except OSError as error:
        raise SystemExit(f"error: {error}; give a folder that can be written, by --out") from error


def check(
    options: argparse.Namespace, out: Path, about: dict[str, Any], stages: list[Stage]
) -> int:
    """Run what is missing, and write the report; the exit status."""
    lock = claim(out, about)
    # The stage ends too, as `run` cleans up on the way out.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for stage in stages:
        before = read(out, stage)
        done = before is not None and before["status"] == "done" and stage.name not in options.again
        if done or (options.only and stage.name not in [*options.only, *options.again]):
            continue
        print(f"{stage.name}: {stage.title}", flush=True)
        found = run(stage, out, options.limit_s)
        replace(out / "stages" / f"{stage.name}.json", json.dumps(found, indent=1) + "\n")
        write_report(out, about, stages)
        print(f"    {summary(found)}", flush=True)

    report = write_report(out, about, stages)
    print("\n".join(["", *report["verdicts"], f"report: {out / 'gpu_report.md'}"]))
    lock.close()
    return 1 if any(failed(found) for found in report["stages"].values()) else 0


def summary(found: dict[str, Any]) -> str:
    """What became of a stage, in a line."""
    if "missing" in found:
        return f"not run: {found['missing']}"
    last = f"; {found['last_lines'][-1]}" if failed(found) and found["last_lines"] else ""
    return f"{found['status']} after {found['seconds']:.0f} s{last}"


def failed(found: dict[str, Any]) -> bool:
    return found["status"] not in ("done", "not run")


if __name__ == "__main__":
    sys.exit(main())
