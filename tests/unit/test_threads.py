"""How many threads a rank on a CPU takes, and what of the machine is its to share."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.errors import ConfigError
from largescale.host import machine
from largescale.host.launch import local_world_size, threads_per_rank
from largescale.training import startup
from tests.conftest import RunHere

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(("env", "ranks"), [
    ({}, 1),
    ({"WORLD_SIZE": "4"}, 4),                                                    # by hand: all are here
    ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),                          # torchrun on two machines
    ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, 4),
    ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
    ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2", "WORLD_SIZE": "11"}, 3),
    ({"SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "8", "SLURM_NODEID": "0"}, 8),  # torchrun, started by srun
    ({"SLURM_NTASKS_PER_NODE": "8"}, 1),                                         # the batch script itself is one process
])
def test_ranks_on_this_machine(env: dict[str, str], ranks: int) -> None:
    assert local_world_size(env) == ranks


@pytest.mark.parametrize(("asked", "env", "cores", "threads"), [
    (None, {}, 16, 16),
    (None, {"WORLD_SIZE": "4"}, 16, 4),
    (None, {"WORLD_SIZE": "3"}, 16, 5),
    (None, {"WORLD_SIZE": "4"}, 2, 1),
    (None, {"WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, 16, 1),                  # the user's, without torchrun
    (None, {"OMP_NUM_THREADS": "6,2"}, 16, 6),
    (None, {"OMP_NUM_THREADS": ""}, 16, 16),
    (None, {"OMP_NUM_THREADS": "0"}, 16, 16),
    (None, {"OMP_NUM_THREADS": "many"}, 16, 16),
    (None, {"OMP_NUM_THREADS": "32"}, 16, 32),                                   # as the user says
    (None, {**TORCHRUN, "OMP_NUM_THREADS": "1"}, 16, 8),                         # torchrun's own 1
    (None, {**TORCHRUN, "OMP_NUM_THREADS": "1"}, 2, 1),
    (None, {**TORCHRUN, "OMP_NUM_THREADS": "2"}, 16, 2),
    (None, {**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 16, 1),  # it sets none for one rank
    (None, TORCHRUN, 16, 8),
    (None, {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "4"}, 4, 4),  # its own cores, not shared again
    (None, {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}, 4, 4),  # of two threads each
    (None, {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "4", "OMP_NUM_THREADS": "3"}, 4, 3),
    (None, {**TORCHRUN, "SLURM_CPUS_PER_TASK": "16", "OMP_NUM_THREADS": "1"}, 16, 8),  # torchrun is the task
    (None, {"SLURM_STEP_TASKS_PER_NODE": "2"}, 16, 8),
    (3, {**TORCHRUN, "OMP_NUM_THREADS": "1"}, 16, 3),
    (1, {**TORCHRUN, "OMP_NUM_THREADS": "1"}, 16, 1),
    (16, {**TORCHRUN, "OMP_NUM_THREADS": "1"}, 16, 16),                          # more than its share: its own affair
    (32, {}, 16, 32),
])
def test_threads_of_a_rank(asked: int | None, env: dict[str, str], cores: int, threads: int) -> None:
    assert threads_per_rank(asked, env, cores) == threads


def test_more_threads_than_make_sense() -> None:
    with pytest.raises(ConfigError, match="train.threads=33 is more than two threads a core: this machine has 16 for its "
                                          "2 ranks; try --train.threads 8"):
        threads_per_rank(33, TORCHRUN, 16)


# ---- this machine


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 processors, two to a core, of which this process may use 6; 24,000 KiB of memory are available."""
    for name, folder in (("_PROC", "proc"), ("_CPUS", "cpu")):
        monkeypatch.setattr(machine, name, tmp_path / folder)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5})
    for cpu in range(8):
        write(tmp_path / f"cpu/cpu{cpu}/topology/core_cpus_list", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}")
    write(tmp_path / "proc/meminfo", "MemTotal:       32000 kB\nMemFree:        100 kB\nMemAvailable:   24000 kB\n")
    mounted(tmp_path, "4:name=systemd:/old\n0::/slurm/job/step", ("cgroup", "/", "cgroup2", "rw"))
    return tmp_path


def mounted(box: Path, own: str, *mounts: tuple[str, str, str, str]) -> None:
    """`own`: /proc/self/cgroup; `mounts`: folder, what of the hierarchy it shows, type and options of each."""
    write(box / "proc/self/cgroup", own)
    write(box / "proc/self/mountinfo", "22 1 0:5 / /proc rw - proc proc rw\n" + "\n".join(
        f"{30 + i} 22 0:{30 + i} {root} {box / folder} rw,relatime shared:{i} - {kind} cgroup {options}"
        for i, (folder, root, kind, options) in enumerate(mounts)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def limit(folder: Path, most: str, used: int = 0, cache: int = 0) -> None:
    write(folder / "memory.max", most)
    write(folder / "memory.current", str(used))
    write(folder / "memory.stat", f"anon 5\ninactive_file {cache}\nactive_file 7")


def test_without_limits(box: Path) -> None:
    assert (machine.cores(), machine.available_bytes()) == (3, 24_000 * 1024)
    for cpu in range(8):
        (box / f"cpu/cpu{cpu}/topology/core_cpus_list").unlink()
    assert machine.cores() == 6


@pytest.mark.parametrize("folder", ["slurm/job/step", "slurm/job", "."])
def test_the_nearest_limit_counts(box: Path, folder: str) -> None:
    for around in ("slurm/job/step", "slurm/job", "slurm"):
        limit(box / "cgroup" / around, "max")
        write(box / "cgroup" / around / "cpu.max", "max 100000")
    assert (machine.cores(), machine.available_bytes()) == (3, 24_000 * 1024)
    write(box / "cgroup" / folder / "cpu.max", "150000 100000")
    limit(box / "cgroup" / folder, "10000", used=6000, cache=500)
    assert (machine.cores(), machine.available_bytes()) == (2, 4500)
    limit(box / "cgroup" / folder, "10000", used=11000)
    assert machine.available_bytes() == 0


OF_VERSION_1 = ("4:memory:{0}\n2:cpu,cpuacct:{0}\n0::/", ("cgroup/cpu", "{1}", "cgroup", "rw,cpu,cpuacct"),
                ("cgroup/memory", "{1}", "cgroup", "rw,memory"))
HYBRID = (*OF_VERSION_1, ("cgroup/unified", "/", "cgroup2", "rw"))


@pytest.mark.parametrize("mounts", [OF_VERSION_1, HYBRID])
@pytest.mark.parametrize(("own", "root", "folder"), [
    ("/slurm/job/step", "/", "slurm/job/step"), ("/slurm/job/step", "/", "slurm"),
    ("/docker/0f3", "/docker/0f3", "."),      # a container that is shown its own part only
    ("/docker/0f3/task", "/docker/0f3", "task"),
    ("/docker/0f3", "/", "."),                # the host's path, which is not there
    ("/../../job", "/", "."),                 # the same, with a namespace of its own
])
def test_version_1(box: Path, mounts: Any, own: str, root: str, folder: str) -> None:
    lines, *where = mounts
    mounted(box, lines.format(own), *((place, r.format(own, root), kind, options) for place, r, kind, options in where))
    memory, cpu = box / "cgroup/memory" / folder, box / "cgroup/cpu" / folder
    write(memory / "memory.limit_in_bytes", "9223372036854771712")
    write(cpu / "cpu.cfs_quota_us", "-1")
    write(cpu / "cpu.cfs_period_us", "100000")
    assert (machine.cores(), machine.available_bytes()) == (3, 24_000 * 1024)
    write(memory / "memory.limit_in_bytes", "10000")
    write(memory / "memory.usage_in_bytes", "6000")
    write(memory / "memory.stat", "inactive_file 1\ntotal_inactive_file 500")
    write(cpu / "cpu.cfs_quota_us", "150000")
    assert (machine.cores(), machine.available_bytes()) == (2, 4500)
    write(cpu / "cpu.cfs_quota_us", "50000")
    assert machine.cores() == 1
    write(memory / "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2")
    write(memory / "task_0/memory.oom_control", "oom_kill 1")  # a rank's own
    bound = machine.memory_bound()
    assert bound and (bound.bytes, bound.folder, bound.kills()) == (10000, memory, 3)


def test_half_a_core(box: Path) -> None:
    write(box / "cgroup/slurm/cpu.max", "50000 100000")
    assert machine.cores() == 1 and threads_per_rank(None, {"WORLD_SIZE": "2"}, machine.cores()) == 1


def test_sixty_four_cores(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(100, 164)))
    assert machine.cores() == 64 and threads_per_rank(None, {"WORLD_SIZE": "2"}, machine.cores()) == 32
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7})
    assert machine.cores() == 1


def test_who_kills_whoever_takes_too_much(box: Path) -> None:
    """The smallest limit, of equal ones the outermost; without any, the machine."""
    write(box / "proc/vmstat", "oom_kill 4")
    bound = machine.memory_bound()
    assert bound and (bound.bytes, bound.folder, bound.kills()) == (32_000 * 1024, None, 4)
    assert bound.killed_since(4) is None
    assert str(bound.killed_since(3)).startswith("perhaps killed by signal 9; the machine has 32.8 MB, and counts an out-of-memory")
    for around, most in (("slurm/job/step", "10000"), ("slurm/job", "10000"), ("slurm", "20000")):
        limit(box / "cgroup" / around, most)
    write(box / "cgroup/slurm/job/memory.events", "oom 5\noom_kill 3\noom_group_kill 0")
    bound = machine.memory_bound()
    assert bound and (bound.bytes, bound.folder, bound.kills()) == (10000, box / "cgroup/slurm/job", 3)
    assert str(bound.killed_since(1)).startswith("killed by signal 9; the job's memory cgroup has a limit of 10 KB, and counts 2 out")


def test_limits_above_what_there_is(box: Path) -> None:
    limit(box / "cgroup/slurm", str(2**40))
    write(box / "cgroup/slurm/cpu.max", "800000 100000")
    write(box / "cgroup/elsewhere/cpu.max", "100000 100000")
    assert (machine.cores(), machine.available_bytes()) == (3, 24_000 * 1024)


def test_another_system(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROC", box / "nowhere")
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert (machine.cores(), machine.available_bytes(), machine.memory_bound()) == (4, None, None)


# ---- the program


def test_threads(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before any work is done, and said."""
    monkeypatch.setattr("largescale.training.startup.cores", lambda: 2)
    seen: list[int] = []
    open_dataset = startup.open_dataset

    def look(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return open_dataset(*args)

    monkeypatch.setattr("largescale.training.startup.open_dataset", look)
    one = run_here("--train.steps", 2, output=tmp_path / "one")
    two = run_here("--train.steps", 2, "--train.threads", 2, output=tmp_path / "two")
    monkeypatch.delenv("OMP_NUM_THREADS")
    default = run_here("--train.steps", 2, output=tmp_path / "default")
    assert "1 x cpu with 1 thread, fp32" in one.err and "1 x cpu with 2 threads, fp32" in two.err
    assert "1 x cpu with 2 threads, fp32" in default.err
    assert seen == [1, 2, 2]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    """Tensors of 64 MiB, taken and freed: their pages are asked of the kernel once, and otherwise each time."""
    program = ("import resource, sys, torch\nfrom largescale.host.machine import keep_freed_memory\n"
               "if sys.argv[1] == 'keep': keep_freed_memory()\n"
               "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
               "for i in range(24):\n"
               "    if i == 16: before = faults()\n"  # glibc may set some aside at first
               "    torch.ones(2**24)\n"
               "print(faults() - before)")
    kept, given_back = (int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True, text=True).stdout)
                        for how in ("keep", "give back"))
    assert kept < given_back / 4


def test_the_end_leaves_no_semaphore_behind() -> None:
    """As Python 3.14 makes tqdm's lock, whose start method is no fork."""
    program = ("import multiprocessing, tqdm\nfrom largescale.host.launch import leave\n"
               "multiprocessing.set_start_method('spawn')\nlist(tqdm.tqdm([1], disable=False))\nleave(3)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3 and "leaked" not in done.stderr
