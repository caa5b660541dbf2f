"""What of this machine a process may use: the kernel's word, and that of the cgroups (version 1 or
2) that it is in."""

import ctypes
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from largescale.errors import ConfigError
from largescale.host.launch import env_local_rank, local_world_size

_PROC, _CPUS = Path("/proc"), Path("/sys/devices/system/cpu")
KILL = "out-of-memory kill"
LESS_MEMORY = (
    "raise the job's memory (Slurm: --mem), start fewer ranks, or set "
    "--train.activation-checkpointing or a smaller --train.micro-batch-size"
)
# Of a process that has loaded torch; and DeepSpeed's engine too. RssAnon in /proc/PID/status, which
# leaves out what can be read from files again, with torch 2.15 and DeepSpeed 0.19.8 on x86-64: 305
# MB after `import torch`, at most 459 MB in `python -m largescale.train debug`; the rest is for the
# kernel's part.
TORCH_BYTES, PROCESS_BYTES = 300 * 10**6, 520 * 10**6
_NO_LIMIT = 2**62  # version 1 has no word for it but a number near the largest


def cores() -> int:
    """Cores that this process may run on: physical ones, since two threads of one core share its
    arithmetic units."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    own = len({_read(_CPUS / f"cpu{cpu}/topology/core_cpus_list") or str(cpu) for cpu in usable})
    return min(
        [own, *(math.ceil(quota) for folder in _cgroups("cpu") if (quota := _cpu_quota(folder)))]
    )


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed: a step on a CPU takes and frees the same large
    tensors each time, and fresh pages from the kernel cost a step of DiT-S/2 15 % in bf16.
    Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_max, 0)  # nothing is mapped by itself, and so unmapped when freed
        mallopt(trim_threshold, 2**31 - 1)


def available_bytes() -> int | None:
    """Memory that processes here can still take without swapping; None where nobody says (not
    Linux)."""
    found = [1024 * kib for kib in _numbers(_PROC / "meminfo", "MemAvailable:")]
    for folder in _cgroups("memory"):
        if limit := _limit(folder):
            used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
            stat = (
                folder / "memory.stat"
            )  # where version 1 tells "inactive_file" without the cgroups below
            cache = sum(_numbers(stat, "total_inactive_file") or _numbers(stat, "inactive_file"))
            found.append(
                max(0, limit - int(used or 0) + cache)
            )  # the kernel gives up the cache first
    return min(found, default=None)


def has_swap() -> bool:
    return sum(_numbers(_PROC / "meminfo", "SwapTotal:")) > 0


@dataclass(frozen=True)
class MemoryBound:
    """Whoever takes more is killed: the smallest limit of this process's memory cgroups, or the
    machine's memory."""

    bytes: int
    folder: Path | None  # the cgroup's; None for the machine

    def __str__(self) -> str:
        who = "the machine has" if self.folder is None else "the job's memory cgroup has a limit of"
        return f"{who} {self.bytes / 1e9:.1f} GB"

    def killed_since(self, kills: int) -> str | None:
        """What to say where the kernel has killed since there were so many `kills`."""
        if (more := self.kills() - kills) <= 0:
            return None
        # The machine counts those of other programs too.
        return (
            f"{'perhaps ' if self.folder is None else ''}killed by signal 9; {self}, and counts "
            f"{'an' if more == 1 else more} {KILL}{'s' * (more > 1)}: {LESS_MEMORY}"
        )

    def kills(self) -> int:
        """Processes that the kernel has killed there so far because memory had run out."""
        if self.folder is None:
            return sum(_numbers(_PROC / "vmstat", "oom_kill"))
        if (self.folder / "memory.events").exists():
            return sum(_numbers(self.folder / "memory.events", "oom_kill"))
        # Version 1 counts a kill in the victim's own cgroup only.
        return sum(
            sum(_numbers(file, "oom_kill")) for file in self.folder.rglob("memory.oom_control")
        )


def memory_bound() -> MemoryBound | None:
    """Of equal limits the outermost, whose count outlives a step of a job. None where nobody says
    (not Linux)."""
    machine = [MemoryBound(1024 * kib, None) for kib in _numbers(_PROC / "meminfo", "MemTotal:")]
    cgroups = [
        MemoryBound(limit, folder)
        for folder in reversed(_cgroups("memory"))
        if (limit := _limit(folder))
    ]
    return min([*machine, *cgroups], key=lambda bound: bound.bytes, default=None)


def check_process_memory(device: str) -> bool:
    """Before torch is loaded, during which a small limit may kill: warn, once on a machine, where
    the processes of its ranks need more memory, without their models, than the kernel will give
    them. Of a rank on a GPU only torch itself is counted. True where it warned. Raises ConfigError
    where not even torch fits."""
    bound, ranks = memory_bound(), local_world_size(os.environ)
    if bound is None:
        return False
    needed = launcher_bytes() + ranks * (PROCESS_BYTES if device == "cpu" else TORCH_BYTES)
    if launcher_bytes() + ranks * TORCH_BYTES > bound.bytes and not has_swap():
        error = ConfigError(_too_little(needed, bound))
        error.agreed = env_local_rank() != 0  # said on each machine: another may have more
        raise error
    return warn_of_memory(needed, bound)


def warn_of_memory(needed: int, bound: MemoryBound) -> bool:
    """Whether the ranks of this machine need more bytes than `bound`; local rank 0 says so."""
    if needed > bound.bytes and env_local_rank() == 0:
        print(f"warning: {_too_little(needed, bound)}", file=sys.stderr, flush=True)
    return needed > bound.bytes


def _too_little(needed: int, bound: MemoryBound) -> str:
    ranks = local_world_size(os.environ)
    whose = ", most of it for torch and DeepSpeed" if 2 * ranks * PROCESS_BYTES > needed else ""
    return (
        f"{ranks} rank{'s need' if ranks > 1 else ' needs'} about {needed / 1e9:.2f} GB of this "
        f"machine's memory{whose}, but {bound}: {LESS_MEMORY}"
    )


def launcher_bytes() -> int:
    """torchrun has torch loaded, too."""
    return TORCH_BYTES if "TORCHELASTIC_RUN_ID" in os.environ else 0


def _limit(folder: Path) -> int | None:
    """Bytes that a memory cgroup may take; None without a limit."""
    text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time that a cgroup may take; None without a limit, which is "max", or -1 in
    version 1."""
    words = _read(folder / "cpu.max").split()
    quota, period = words or [
        _read(folder / "cpu.cfs_quota_us"),
        _read(folder / "cpu.cfs_period_us"),
    ]
    return int(quota) / int(period) if quota.isdecimal() else None


def _cgroups(controller: str) -> list[Path]:
    """This process's cgroup and those around it, innermost first: of version 2, and of version 1
    for the `controller`.

    In a container the path may be the host's, of which only the root is there."""
    lines = [line.split(":", 2) for line in _read(_PROC / "self/cgroup").splitlines()]
    own = {
        name: PurePosixPath(path) for _, names, path in lines for name in names.split(",")
    }  # "" is version 2
    found = []
    for line in _read(_PROC / "self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name in own and name in ("", *options.split(",")):
            path, (root, top) = own[name], mount.split()[3:5]
            below = (
                path.relative_to(root).parts
                if path.is_relative_to(root) and ".." not in path.parts
                else ()
            )
            found += [Path(top, *below[:n]) for n in range(len(below), -1, -1)]
    return found


def _numbers(file: Path, name: str) -> list[int]:
    lines = (line.split() for line in _read(file).splitlines())
    return [int(words[1]) for words in lines if words[:1] == [name]]


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
