"""Processes that die at a chosen call that changes files, and what they have told until then.

Where the power is cut too, what was not synced is lost on top.
"""

import builtins
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

Tell = Callable[[str], None]
REAL = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir")}
REAL_OPEN = io.open


# ---- the disk


@dataclass
class Node:
    """A file or folder as it is (`now`) and as it is after a power cut (`safe`)."""

    folder: bool
    now: dict[str, "Node"] = field(default_factory=dict)
    safe: dict[str, "Node"] = field(default_factory=dict)
    content: bytes = b""  # of a file, when it was synced last


class Disk:
    """Counts the calls of this process that change what is under `root`, from all threads, and dies at one of them."""

    def __init__(self, root: Path, tell: Tell, die_at: int = 0, loss: str = "nothing", seed: int = 0,
                 unsynced: Callable[[str], bool] = lambda name: False):
        """`loss`: of what was not synced, 'nothing', 'all' or 'some'; `unsynced`: names whose syncs have no effect."""
        self.root, self.tell, self.die_at, self.loss, self.unsynced = os.path.realpath(root), tell, die_at, loss, unsynced
        self.random, self.calls, self.lock, self.off = random.Random(seed), list[str](), threading.RLock(), False
        self.tree = self._scan(self.root) if loss != "nothing" else None

    def _scan(self, path: str) -> Node:
        if not os.path.isdir(path):
            return Node(False, content=Path(path).read_bytes())
        entries = {name: self._scan(os.path.join(path, name)) for name in os.listdir(path)}
        return Node(True, dict(entries), dict(entries))

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root, or None for what lies elsewhere."""
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        whole = os.path.normpath(os.path.join(base, os.fspath(path)))
        inside = not self.off and (whole == self.root or whole.startswith(self.root + "/"))
        return os.path.relpath(whole, self.root) if inside else None

    def node(self, path: str) -> Node | None:
        node = self.tree
        for part in () if path == "." else path.split("/"):
            node = node.now.get(part) if node else None
        return node

    def call(self, what: str, path: str, act: Callable[[], Any], torn: Callable[[], Any] = lambda: None) -> Any:
        with self.lock:
            self.calls.append(f"{what} {path}")
            if len(self.calls) == self.die_at:
                torn()
                self.die(f"{what} {path}")
            result = act()
            if self.tree is not None:
                self._follow(what, path)
            return result

    def _follow(self, what: str, path: str) -> None:
        folder, name = os.path.split(path)
        parent = self.node(folder or ".")
        assert parent is not None
        if what in ("create", "mkdir"):
            parent.now.setdefault(name, Node(what == "mkdir"))
        elif what in ("unlink", "rmdir"):
            del parent.now[name]
        elif what == "rename from":
            self._moved = parent.now.pop(name)
        elif what == "rename":
            parent.now[name] = self._moved
        elif what == "fsync" and not self.unsynced(name) and (node := self.node(path)):
            node.safe = dict(node.now)
            if not node.folder:
                node.content = Path(self.root, path).read_bytes()

    def die(self, where: str) -> NoReturn:
        self.off = True
        if self.tree is not None:
            files = {id(node): Path(self.root, path).read_bytes() for path, node in self._walk(self.tree, "") if not node.folder}
            for name in os.listdir(self.root):
                path = Path(self.root, name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._restore(self.tree, Path(self.root), files)
        self.tell(f"killed {where}")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def tell_calls(self) -> None:
        """What was counted, without numbers: for a choice among them."""
        if self.tree is not None:  # nothing has gone past this
            there = {os.path.relpath(path, self.root) for path in Path(self.root).rglob("*")}
            assert there == {path for path, _ in self._walk(self.tree, "")}
        self.tell("calls " + json.dumps([re.sub(r"\d+", "N", call) for call in self.calls]))

    def _walk(self, node: Node, path: str) -> Iterator[tuple[str, Node]]:
        for name, child in node.now.items():
            yield (inner := os.path.join(path, name)), child
            yield from self._walk(child, inner)

    def _restore(self, node: Node, path: Path, files: dict[int, bytes]) -> None:
        if not node.folder:
            kept, written = node.content, files.get(id(node), node.content)
            if self.loss == "some" and written != kept:
                part = written[: self.random.randrange(len(written) + 1)]
                kept = self.random.choice([kept, written, part, part.ljust(len(written), b"\0")])
            path.write_bytes(kept)
            return
        path.mkdir(exist_ok=True)
        for name in sorted(node.now.keys() | node.safe.keys()):
            entries = [node.safe] if self.loss == "all" else [node.safe, node.now]
            if child := self.random.choice(entries).get(name):
                self._restore(child, path / name, files)

    def install(self) -> None:
        """Into os and io, where pathlib, shutil, tempfile and the product find what they call."""
        def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                   newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:
            path = None if isinstance(file, int) or not set(mode) & set("wax+") else self.inside(file)
            if path is None:
                return REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
            plain = mode.replace("b", "").replace("t", "")
            if os.path.isdir(file):  # a file without a name
                raw = self.call("open", path, lambda: Raw(file, plain, closefd, opener))
            else:
                raw = self.call("create", path, lambda: Raw(file, plain, closefd, opener))
            raw.disk, raw.path = self, path
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        def synced(fd: int) -> None:  # without the real one: this process dies, not the machine
            path = self.inside(os.readlink(f"/proc/self/fd/{fd}"))
            return REAL["fsync"](fd) if path is None else self.call("fsync", path, lambda: None)

        def renamed(source: Any, target: Any, **folders: Any) -> None:
            old, new = self.inside(source), self.inside(target)
            if old is None or new is None:
                return REAL["rename"](source, target, **folders)

            def act() -> None:
                REAL["replace"](source, target)
                if self.tree is not None:
                    self._follow("rename from", old)

            return self.call("rename", new, act)

        def changed(what: str) -> Callable[..., Any]:
            def change(path: Any, *args: Any, dir_fd: int | None = None) -> Any:
                inner = self.inside(path, dir_fd)
                if inner is None:
                    return REAL[what](path, *args, dir_fd=dir_fd)
                return self.call(what, inner, lambda: REAL[what](path, *args, dir_fd=dir_fd))

            return change

        io.open = builtins.open = opened  # type: ignore[assignment]
        os.fsync, os.replace, os.rename = synced, renamed, renamed  # type: ignore[assignment]
        os.mkdir, os.rmdir = changed("mkdir"), changed("rmdir")
        os.unlink = os.remove = changed("unlink")


class Raw(io.FileIO):
    """What is under a buffer: each write is a system call."""

    disk: Disk
    path: str

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        torn = self.disk.random.choice([0, len(view) // 2, len(view)])
        return self.disk.call("write", self.path, lambda: io.FileIO.write(self, view),
                              lambda: io.FileIO.write(self, view[:torn]))


# ---- lives


@dataclass
class Life:
    status: int
    told: list[str]

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def all(self, what: str) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.told if line.startswith(what + " ")]

    def steps(self, what: str) -> list[int]:
        return [int(step) for step in self.all(what)]


class Child:
    """A fork of this process, and what it tells through a pipe."""

    def __init__(self, action: Callable[[Tell], int]):
        self._pipe, inner = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            status = 1

            def tell(line: str) -> None:
                os.write(inner, f"{line}\n".encode())

            try:
                status = action(tell)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(inner)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """It stays a zombie, to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_for_a_word(self) -> bytes:
        return os.read(self._pipe, 1)

    def wait(self, begun: bytes = b"") -> Life:
        with os.fdopen(self._pipe, "rb") as pipe:
            told = (begun + pipe.read()).decode().splitlines()
        return Life(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), told)
