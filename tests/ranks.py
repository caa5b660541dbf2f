"""Programs on several processes, as a launcher would start them.

The processes are forked from one that has torch and DeepSpeed loaded, which takes half of the time that a short run
takes. Where there is a GPU they are new ones: CUDA does not outlive a fork, and DeepSpeed chooses a device at import.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
Done = list["subprocess.CompletedProcess[str]"]

_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ranks_of(*program: Any, ranks: int = 2, timeout_s: float = 900) -> Done:
    """Run a Python program, its arguments as python's, on several processes, in the project's folder."""
    arguments = [*map(str, program)]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"out{rank}", Path(folder) / f"err{rank}") for rank in range(ranks)]
        processes = [
            _context.Process(target=_run, args=(arguments, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *files[rank]))
            for rank in range(ranks)
        ]
        end = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0, end - time.monotonic()))
                if process.exitcode is None:
                    raise subprocess.TimeoutExpired(arguments, timeout_s, *(f.read_bytes() for f in files[0]))
        finally:
            for process in processes:
                if process.pid:
                    process.kill()
        return [subprocess.CompletedProcess(arguments, process.exitcode or 0, out.read_text(), err.read_text())
                for process, (out, err) in zip(processes, files, strict=True)]


def _run(arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    what, *rest = arguments
    if what in ("-m", "-c"):
        sys.path.insert(0, str(ROOT))
        sys.argv = rest if what == "-m" else ["-c", *rest[1:]]
        if what == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str((ROOT / what).parent))
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")
