"""The cores and the memory of this machine that a process may use, by the kernel and by the cgroups
(version 1 or 2) that it is in."""

import ctypes
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath

from largescale.errors import ConfigError
from largescale.host.launch import env_local_rank, local_world_size
from largescale.host.sizes import size_text

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")

# In the message of a kill, by which requeue.py finds it in a record.
KILL = "out-of-memory kill"
LESS_MEMORY = (
    "raise the job's memory (Slurm: --mem), start fewer ranks, or set "
    "--train.activation-checkpointing or a smaller --train.micro-batch-size"
)
# Memory of a process that has loaded torch, and of one that has DeepSpeed's engine too. RssAnon in
# /proc/PID/status, which leaves out what can be read from files again, with torch 2.15 and
# DeepSpeed 0.19.8 on x86-64: 305 MB after `import torch`, at most 459 MB in
# `python -m largescale.train debug`; the rest is for the kernel's part.
TORCH_BYTES = 300 * 10**6
PROCESS_BYTES = 520 * 10**6
# File systems that are reached over a network, by how the names that mounts have begin. Those that
# programs serve, such as a bucket's, are fuse.NAME or fuse.
_NETWORK = (
    "lustre",
    "nfs",
    "gpfs",
    "beegfs",
    "ceph",
    "wekafs",
    "orangefs",
    "cifs",
    "smb3",
    "fuse.",
)
# Version 1 writes "no limit" as a number near the largest.
_NO_LIMIT = 2**62


def cores() -> int:
    """The number of physical cores that this process may run on."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    # Two threads of one core share its arithmetic units, and name the same list.
    own = set()
    for cpu in usable:
        own.add(_read(_CPUS / f"cpu{cpu}/topology/core_cpus_list") or str(cpu))

    # A cgroup may allow less time than that of these cores.
    count = len(own)
    for folder in _cgroups("cpu"):
        quota = _cpu_quota(folder)
        if quota:
            count = min(count, math.ceil(quota))
    return count


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed. Elsewhere nothing happens."""
    # A step on a CPU takes and frees the same large tensors each time, and fresh pages from the
    # kernel cost a step of DiT-S/2 15 % in bf16.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h.
        mmap_max = -4
        trim_threshold = -1
        # Nothing is mapped by itself, and so unmapped when it is freed.
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def available_bytes() -> int | None:
    """Memory that processes here can still take without swapping; None where it is not known (not
    on Linux)."""
    found = [1024 * kib for kib in _numbers(_PROC / "meminfo", "MemAvailable:")]
    for folder in _cgroups("memory"):
        limit = _limit(folder)
        if limit:
            used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
            # The kernel gives up the cache first. Version 1 has "inactive_file" without the cgroups
            # below.
            stat = folder / "memory.stat"
            cache = sum(_numbers(stat, "total_inactive_file") or _numbers(stat, "inactive_file"))
            found.append(max(0, limit - int(used or 0) + cache))
    return min(found, default=None)


def file_system(path: Path) -> str:
    """The type of the file system on which a path lies or would lie, such as ext4 or lustre; empty
    where it is not known (not on Linux)."""
    path = path.resolve()
    found, above = "", -1
    for line in _read(_PROC / "self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        # Spaces and the like are written as octal numbers.
        folder = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4]))
        # The innermost, and of several on one folder the last, which hides the others.
        if path.is_relative_to(folder) and len(folder.parts) >= above:
            found, above = kind.split()[0], len(folder.parts)
    return found


def is_shared(kind: str) -> bool:
    """Whether a file system of this type is reached over a network."""
    return kind == "fuse" or kind.startswith(_NETWORK)


def has_swap() -> bool:
    return sum(_numbers(_PROC / "meminfo", "SwapTotal:")) > 0


@dataclass(frozen=True)
class MemoryBound:
    """The memory above which a process is killed: the smallest limit of its memory cgroups, or the
    machine's memory."""

    bytes: int
    # The cgroup's; None for the machine.
    folder: Path | None

    def __str__(self) -> str:
        who = "the machine has" if self.folder is None else "the job's memory cgroup has a limit of"
        return f"{who} {size_text(self.bytes)}"

    def killed_since(self, kills: int) -> str | None:
        """A message where the kernel has killed a process since there were so many `kills`, or
        None."""
        more = self.kills() - kills
        if more <= 0:
            return None
        # The machine counts those of other programs too.
        perhaps = "perhaps " if self.folder is None else ""
        counted = f"an {KILL}" if more == 1 else f"{more} {KILL}s"
        return f"{perhaps}killed by signal 9; {self}, and counts {counted}: {LESS_MEMORY}"

    def kills(self) -> int:
        """Processes that the kernel has killed there so far because memory had run out."""
        if self.folder is None:
            return sum(_numbers(_PROC / "vmstat", "oom_kill"))
        if (self.folder / "memory.events").exists():
            return sum(_numbers(self.folder / "memory.events", "oom_kill"))
        # Version 1 counts a kill in the victim's own cgroup only.
        count = 0
        for file in self.folder.rglob("memory.oom_control"):
            count += sum(_numbers(file, "oom_kill"))
        return count


def memory_bound() -> MemoryBound | None:
    """The smallest bound of this process's memory; None where it is not known (not on Linux)."""
    bounds = [MemoryBound(1024 * kib, None) for kib in _numbers(_PROC / "meminfo", "MemTotal:")]
    # The outermost cgroup comes first: of equal limits its count outlives a step of a job.
    for folder in reversed(_cgroups("memory")):
        limit = _limit(folder)
        if limit:
            bounds.append(MemoryBound(limit, folder))
    return min(bounds, key=attrgetter("bytes"), default=None)


def check_process_memory(device: str) -> bool:
    """Whether the processes of this machine's ranks need more memory, without their models, than
    the kernel will give them. Local rank 0 prints a warning then.

    Called before torch is loaded, during which a small limit may kill. Of a rank on a GPU only
    torch itself is counted. Raises ConfigError where not even torch fits.
    """
    bound = memory_bound()
    ranks = local_world_size(os.environ)
    if bound is None:
        return False
    needed = launcher_bytes() + ranks * (PROCESS_BYTES if device == "cpu" else TORCH_BYTES)
    if launcher_bytes() + ranks * TORCH_BYTES > bound.bytes and not has_swap():
        error = ConfigError(_too_little(needed, bound))
        # Printed once on each machine: another may have more memory.
        error.agreed = env_local_rank() != 0
        raise error
    return warn_of_memory(needed, bound)


def warn_of_memory(needed: int, bound: MemoryBound) -> bool:
    """Whether the ranks of this machine need more bytes than `bound`; local rank 0 prints a warning
    then."""
    if needed > bound.bytes and env_local_rank() == 0:
        print(f"warning: {_too_little(needed, bound)}", file=sys.stderr, flush=True)
    return needed > bound.bytes


def _too_little(needed: int, bound: MemoryBound) -> str:
    ranks = local_world_size(os.environ)
    who = "1 rank needs" if ranks == 1 else f"{ranks} ranks need"
    # Then a smaller model would not help much.
    whose = ", most of it for torch and DeepSpeed" if 2 * ranks * PROCESS_BYTES > needed else ""
    return (
        f"{who} about {size_text(needed)} of this machine's memory{whose}, but {bound}: "
        f"{LESS_MEMORY}"
    )


def launcher_bytes() -> int:
    """Memory of the launcher itself: torchrun has torch loaded, too."""
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
    for the `controller`."""
    # The path of this process's cgroup by controller; that of version 2 is "".
    own: dict[str, PurePosixPath] = {}
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            own[name] = PurePosixPath(path)

    # Where the cgroups' file systems are mounted, and which of their folders is the mount's root.
    found = []
    for line in _read(_PROC / "self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        mounted = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if mounted in own and mounted in ("", *options.split(",")):
            root, top = mount.split()[3:5]
            found += _folders_up_to_mount(own[mounted], root, Path(top))
    return found


def _folders_up_to_mount(cgroup: PurePosixPath, root: str, top: Path) -> list[Path]:
    """The folders of a cgroup and of those around it, innermost first, where its `root` is mounted
    at `top`."""
    # In a container the path may be the host's, and only the root is visible.
    if not cgroup.is_relative_to(root) or ".." in cgroup.parts:
        return [top]
    folder = top / cgroup.relative_to(root)
    above = len(cgroup.relative_to(root).parts)
    return [folder, *itertools.islice(folder.parents, above)]


def _numbers(file: Path, name: str) -> list[int]:
    """The numbers after `name` in a file with a name and a number on each line."""
    numbers = []
    for line in _read(file).splitlines():
        words = line.split()
        if words[:1] == [name]:
            numbers.append(int(words[1]))
    return numbers


def _read(path: Path) -> str:
    """The text of a file; empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
