"""A real Slurm for tests: two nodes, each a network of its own (lab.sh), and jobs on them.

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge (13 MB), which it installs where they are
missing. It starts no service, writes nothing outside its folder, and is gone when the tests are.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from largescale.monitoring.telemetry import read_metrics
from tests.ranks import ROOT, ranks_of

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
NAMESPACES = ("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
# What the shipped scripts are shrunk by: one task a node, no GPU, and the model and settings of the `debug` preset.
SMALL_JOB = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
STEPS = 250
SMALL_RUN = (
    "--model.input-size", 16, "--model.in-channels", 1, "--model.patch-size", 4, "--model.hidden-size", 32,
    "--model.depth", 2, "--model.num-heads", 2, "--model.num-classes", 10, "--data.no-horizontal-flip",
    "--train.device", "cpu", "--train.ds-config", "ds_configs/zero2_fp32.json", "--train.global-batch-size", 16,
    "--optimizer.lr", 1e-3, "--optimizer.ema-decay", 0.99, "--curriculum.n-clusters", 5, "--curriculum.patience", 5,
    "--checkpoint.every", 100, "--checkpoint.keep-every", 0, "--telemetry.log-every", 1, "--telemetry.trackers",
    "--telemetry.preview-every", 0, "--telemetry.reference-every", 0, "--train.steps", STEPS,
)


def wait_until(what: str, done: Callable[[], Any], timeout_s: float, log: Callable[[], str] = str,
               every_s: float = 0.1) -> Any:
    """What `done` returns, once that is true."""
    end = time.monotonic() + timeout_s
    while not (result := done()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s:.0f} s\n{log()}"
        time.sleep(every_s)
    return result


@dataclass
class Lab:
    folder: Path
    pid: int

    def __call__(self, *command: Any, env: dict[str, str] | None = None, folder: Path = ROOT,
                 check: bool = True) -> str:
        """Run one of Slurm's commands as on a login node, and return what it says."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMP_", "MASTER_"))}
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", *map(str, command)], cwd=folder, text=True, timeout=600,
            env={**clean, **(env or {}), "SLURM_CONF": f"{self.folder}/slurm.conf"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def clear(self) -> None:
        """No job, two nodes, and the partitions' own settings."""
        while jobs := self("squeue", "-h", "-o", "%A").split():
            self("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self("scancel", *jobs, check=False)
            time.sleep(0.2)
        self("scontrol", "update", "PartitionName=low", "GraceTime=20")
        self.cable("n2", "up")
        self.resume("n2")

    def cable(self, node: str, state: str) -> None:
        self("ip", "link", "set", node, state)

    def resume(self, node: str) -> None:
        self("scontrol", "update", f"NodeName={node}", "State=resume", check=False)  # an error where it is up
        wait_until("nodes", lambda: self("sinfo", "-h", "-p", "low", "-o", "%D %T") == "2 idle", 600)


@dataclass
class Job:
    lab: Lab
    id: str
    log: Path
    run: Path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def fact(self, name: str) -> str:
        facts = self.lab("scontrol", "--oneliner", "show", "job", self.id)
        return dict(fact.split("=", 1) for fact in facts.split() if "=" in fact)[name]

    def wait_for(self, what: str, done: Callable[[], Any], timeout_s: float = 1800) -> Any:
        asked = itertools.count(1)

        def done_or_over() -> Any:
            if result := done():
                return result
            # Slurm is asked every two seconds: it takes part of the two cores, and its time to answer.
            if next(asked) % 20 == 0 and self.over():
                return done() or pytest.fail(f"{what}: the job is over\n{self.text()}")
            return None

        return wait_until(what, done_or_over, timeout_s, self.text)

    def over(self) -> bool:
        return self.fact("JobState") in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def step(self) -> int:
        """The newest in the run's log."""
        with contextlib.suppress(FileNotFoundError):
            return max((row["step"] for row in read_metrics(self.run) if "loss" in row), default=0)
        return 0

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.step() >= step)

    def wait_for_said(self, text: str, timeout_s: float = 1800) -> None:
        self.wait_for(text, lambda: text in self.text(), timeout_s)

    def ended(self, state: str, *, restarts: int, perhaps_more: int = 0, timeout_s: float = 1800) -> str:
        """Its log, once it has ended for good: one that comes back goes from COMPLETING to PENDING."""
        wait_until("end of the job", self.over, timeout_s, self.text, every_s=0.5)
        assert self.fact("JobState") == state, self.text()
        assert restarts <= int(self.fact("Restarts")) <= restarts + perhaps_more, self.text()
        return self.text()

    def _runs(self, variables: dict[str, str]) -> bool:
        """Whether a process with these variables is one of its ranks."""
        task = f"{variables.get('SLURM_ARRAY_JOB_ID')}_{variables.get('SLURM_ARRAY_TASK_ID')}"
        return "SLURM_PROCID" in variables and self.id in (task, variables.get("SLURM_JOB_ID"))

    def processes(self) -> list[tuple[int, int]]:
        """(rank, process id) of each of our programs that runs in it; a rank may have started another."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text().split("\0")
                variables = dict(v.split("=", 1) for v in (process / "environ").read_text().split("\0") if "=" in v)
                ours = command[1:2] == ["-m"] and command[2].startswith(("largescale.", "data_prep.", "eval."))
                if ours and self._runs(variables):
                    found.append((int(variables["SLURM_PROCID"]), int(process.name)))
        return found

    def stand_still(self) -> None:
        """The ranks take no step until Slurm asks them to stop with TERM, before which it sends CONT."""
        self.signal(signal.SIGSTOP, 0, 1)

    def save_and_restart(self) -> None:
        """scancel -s USR1, heard by every rank before any takes another step, however long Slurm takes."""
        processes = [process for _, process in self.processes()]
        assert processes, self.text()
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        polls = itertools.count()

        def heard() -> bool:
            # Slurm does not repeat a signal that a busy node did not take in time.
            if next(polls) % 200 == 0:
                self.lab("scancel", "--signal=USR1", self.id)
            try:
                return all(waits_for(process, signal.SIGUSR1) for process in processes)
            except FileNotFoundError as error:
                pytest.fail(f"a rank that stood still is gone: {error}\n{self.text()}")

        self.wait_for("USR1", heard)
        for process in processes:
            os.kill(process, signal.SIGCONT)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        processes = self.processes()
        assert {rank for rank, _ in processes} >= set(ranks), self.text()
        for rank, process in processes:
            if rank in ranks:
                os.kill(process, number)


def waits_for(process: int, number: signal.Signals) -> bool:
    """Whether that signal has come to a process that stands still."""
    pending = re.findall(r"^(?:Sig|Shd)Pnd:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.M)
    return any(int(mask, 16) & 1 << number - 1 for mask in pending)


Submit = Callable[..., Job]


def apt_install(what: str, programs: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Debian's packages, where one of the programs is missing. Skips the test where they cannot be had."""
    if all(map(shutil.which, programs)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"no {what} here, and no apt-get, or not the right to install Debian's")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
        done = subprocess.run(["apt-get", "-qq", *command], env=quiet, text=True, timeout=300, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            pytest.skip(f"no {what} here, and apt-get {command[0]} failed: {done.stdout.strip()[-300:]}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of two nodes needs root: network namespaces, and jobs that a daemon starts")
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where daemons are, and which not every root has on PATH
    apt_install("Slurm", PROGRAMS, PACKAGES)
    probe = "mount -t tmpfs lab /run && ip link add slab type bridge && ip link add slab1 type veth peer name slab2"
    may = subprocess.run([*NAMESPACES, "sh", "-c", probe], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if may.returncode:
        pytest.skip(f"no namespaces for two nodes: {may.stdout.strip()}")
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="slab"))
    lab = subprocess.Popen([*NAMESPACES, "bash", str(ROOT / "tests/slurm/lab.sh"), str(folder)], text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert lab.stdout is not None and lab.stdin is not None
        said = []
        for line in lab.stdout:
            said.append(line)
            if line == "ready\n":
                break
        else:
            pytest.fail("Slurm did not start:\n" + "".join(said))
        yield Lab(folder, lab.pid)
    finally:
        lab.communicate(timeout=300)  # closes its stdin, and comes back when no process of it is left
        shutil.rmtree(folder)


@pytest.fixture
def lab(slurm: Lab) -> Iterator[Lab]:
    yield slurm
    slurm.clear()


@pytest.fixture
def submit(lab: Lab, tmp_path: Path) -> Submit:
    """A shipped script, on one task a node; `job` are options of sbatch, `env` variables, the rest options of its
    program."""

    def start(script: str, *options: Any, run: Path | None = None, job: tuple[str, ...] = (), **env: Any) -> Job:
        run = run or tmp_path / "run"
        log = tmp_path / f"{run.name}.log"
        settings = {"PYTHON": sys.executable, **env}
        number = lab("sbatch", "--parsable", *SMALL_JOB, f"--output={log}", *job, f"slurm/{script}", *options,
                     env={key: str(value) for key, value in settings.items()})
        return Job(lab, number, log, run)

    return start


@pytest.fixture
def training(submit: Submit, blobs: Path, tmp_path: Path) -> Submit:
    """The training script, small."""

    def start(*options: Any, run: Path | None = None, script: str = "dit_l2_2m.sh", **more: Any) -> Job:
        run = run or tmp_path / "run"
        return submit(script, *SMALL_RUN, *options, run=run, RUN=run, DATA=blobs, **more)

    return start


@pytest.fixture(scope="session")
def truth(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never disturbed, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "truth"
    done = ranks_of("-m", "largescale.train", "dit_l2_imagenet256", "--output", run, "--data.path", blobs, *SMALL_RUN,
                   timeout_s=3000)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    return run

