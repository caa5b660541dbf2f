"""What of this machine a process may use: the kernel's word, and that of the cgroups (version 2) that it is in."""

import ctypes
import math
import os
from pathlib import Path

_CGROUPS, _PROC, _CPUS = Path("/sys/fs/cgroup"), Path("/proc"), Path("/sys/devices/system/cpu")


def cores() -> int:
    """Cores that this process may run on: physical ones, since two threads of one core share its arithmetic units."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    own = len({_read(_CPUS / f"cpu{cpu}/topology/core_cpus_list") or str(cpu) for cpu in usable})
    limits = [_read(folder / "cpu.max").split() for folder in _cgroups()]
    return min([own, *(math.ceil(int(limit[0]) / int(limit[1])) for limit in limits if limit and limit[0] != "max")])


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed: a step on a CPU takes and frees the same large tensors each time, and
    fresh pages from the kernel cost a step of DiT-S/2 15 % in bf16. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt(mmap_max, 0)               # nothing is mapped by itself, and so unmapped when freed
        mallopt(trim_threshold, 2**31 - 1)


def available_bytes() -> int | None:
    """Memory that processes here can still take without swapping; None where nobody says (not Linux)."""
    found = [1024 * kib for kib in _numbers(_PROC / "meminfo", "MemAvailable:")]
    for folder in _cgroups():
        if (limit := _read(folder / "memory.max")).isdecimal():
            cache = sum(_numbers(folder / "memory.stat", "inactive_file"))  # which the kernel gives up first
            found.append(max(0, int(limit) - int(_read(folder / "memory.current")) + cache))
    return min(found, default=None)


def _cgroups() -> list[Path]:
    """This process's cgroup and those around it; in a container the path may be the host's, of which only the root is
    there."""
    own = next((line[3:] for line in _read(_PROC / "self/cgroup").splitlines() if line.startswith("0::")), "/")
    folder = _CGROUPS / own.lstrip("/")
    return [around for around in (folder, *folder.parents) if around.is_relative_to(_CGROUPS)]


def _numbers(file: Path, name: str) -> list[int]:
    lines = (line.split() for line in _read(file).splitlines())
    return [int(words[1]) for words in lines if words[:1] == [name]]


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
