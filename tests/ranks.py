"""Programs on several processes, as a launcher would start them.

The processes are forked from one that has torch and DeepSpeed loaded, which takes half of the time that a short run
takes. Where there is a GPU they are new ones: CUDA does not outlive a fork, and DeepSpeed chooses a device at import.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Packages may lie in a folder that only the variable names.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
Done = list["subprocess.CompletedProcess[str]"]

_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Running:
    """A Python program, its arguments as python's, on several processes, in the project's folder."""

    def __init__(self, folder: Path, program: Sequence[Any], ranks: int):
        self.arguments = [*map(str, program)]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
               "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        self._files = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(ranks)]
        self.processes = [fork(self.arguments, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *files)
                          for rank, files in enumerate(self._files)]

    def wait(self, *ranks: int, timeout_s: float = 900) -> Done:
        """For the end of these ranks, or of all: what they said."""
        end = time.monotonic() + timeout_s
        waited_for = ranks or range(len(self.processes))
        for rank in waited_for:
            self.processes[rank].join(max(0, end - time.monotonic()))
            if self.processes[rank].exitcode is None:
                said = (file.read_bytes() if file.exists() else b"" for file in self._files[0])
                raise subprocess.TimeoutExpired(self.arguments, timeout_s, *said)
        return [subprocess.CompletedProcess(self.arguments, self.processes[rank].exitcode or 0,
                                            *(file.read_text() for file in self._files[rank])) for rank in waited_for]

    def signal(self, number: int) -> None:
        for process in self.processes:
            assert process.pid
            os.kill(process.pid, number)


@contextlib.contextmanager
def running(*program: Any, ranks: int = 2) -> Iterator[Running]:
    """No process outlives it."""
    with tempfile.TemporaryDirectory() as folder:
        started = Running(Path(folder), program, ranks)
        try:
            yield started
        finally:
            for process in started.processes:
                process.kill()
                process.join()


def ranks_of(*program: Any, ranks: int = 2, timeout_s: float = 900) -> Done:
    with running(*program, ranks=ranks) as started:
        return started.wait(timeout_s=timeout_s)


def fork(arguments: list[str], env: dict[str, str], out: Path, err: Path, cwd: Path = ROOT) -> Any:
    process = _context.Process(target=_run, args=(arguments, env, out, err, cwd))
    process.start()
    return process


class Forked:
    """Such a process, with what of subprocess.Popen tests use. By default it says what it says to `communicate`."""

    def __init__(self, command: Sequence[Any], env: dict[str, str], log: Path | None = None, cwd: Path = ROOT):
        self._folder = tempfile.TemporaryDirectory()
        self._said = (log, log) if log else (Path(self._folder.name) / "out", Path(self._folder.name) / "err")
        self._command = [*map(str, command)]
        self._process = fork(self._command, env, *self._said, cwd)
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text() for file in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)


def _run(arguments: list[str], env: dict[str, str], out: Path, err: Path, cwd: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
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
