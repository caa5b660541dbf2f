"""Kills the writer of checkpoints, or a whole run, at chosen calls that change files, and looks at what is left.

    under_fire.py writer FOLDER [--every 7] [--moments 20]     the writer by itself: a kill at every 7th call
    under_fire.py controls FOLDER                              the same with a rule broken: each must be found out
    under_fire.py runs FOLDER DATA [--runs 2]                  the training program on two ranks, whole runs

Prints one line of JSON. Every life is a fork of this process, which has imported torch and DeepSpeed for all of them. In a
life each call that creates, writes, syncs, renames or removes is counted, and the n-th is its last: a write is then torn in
the middle. Where the power is cut, what was not synced is lost on top: all of it, or some, at random.
"""

import argparse
import builtins
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
from largescale import train
from largescale.checkpoint import checkpointer as product
from largescale.checkpoint import writer
from largescale.checkpoint.checkpointer import Checkpointer
from largescale.checkpoint.files import (
    CLIENT_KEY,
    MANIFEST,
    MODEL_FILE,
    CheckpointDir,
    checkpoints,
    load,
)
from largescale.config.schema import CheckpointConfig
from largescale.errors import CheckpointError
from largescale.host import files
from largescale.monitoring.run_record import read_starts
from largescale.training import (
    run_directory,
    trainer,  # noqa: F401 (imported once for every life)
)
from tests.conftest import QUIET, assert_same_run
from tests.ranks import free_port

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


# ---- the writer by itself

EVERY, LAST, KEEP = 10, 90, CheckpointConfig(every=10, keep_last=2, keep_every=40)
STOPS = (30, 50)  # saved on a stop
OPTIMIZER_FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Alone:
    rank, world_size = 0, 1

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value]

    def raise_on_all_ranks(self, action: Callable[[], Any]) -> Any:
        return action()


class TinyEngine:
    """Hands over files as DeepSpeed does."""

    def save(self, checkpoint: CheckpointDir, state: dict[str, Any], writer: Any) -> None:
        writer.makedirs(str(checkpoint.path.parent), exist_ok=True)
        writer.makedirs(str(checkpoint.path), exist_ok=True)
        for name, content in files_of(checkpoint.step).items():
            writer.save(content, str(checkpoint.path / name))

    def weights_checksum(self) -> int:
        return 7


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "curriculum": {"index": 9 - step // 10, "best_loss": 1 / (1 + step)}, "text": "é"}


def files_of(step: int) -> dict[str, Any]:
    tensors = torch.Generator().manual_seed(step)
    return {
        MODEL_FILE: {"module": {"w": torch.randn(3000, generator=tensors).bfloat16()}, CLIENT_KEY: state_of(step)},
        OPTIMIZER_FILE: {"flat": torch.randn(5000, generator=tensors)},
    }


def kept(saved: list[int]) -> set[int]:
    """What the rules keep: two of the newest, the newest that was written on a stop, every fortieth."""
    stops = [step for step in saved if step in STOPS]
    others = [step for step in saved if step not in STOPS]
    return {*sorted(others)[-KEEP.keep_last :], *sorted(stops)[-1:], *(s for s in saved if s and s % KEEP.keep_every == 0)}


def checkpointer(run: Path, keep: CheckpointConfig = KEEP) -> Checkpointer:
    ranks: Any = Alone()
    return Checkpointer(run, keep, ranks, patience_s=60)


def write_to_the_end(run: Path, tell: Tell, last: int = LAST, keep: CheckpointConfig = KEEP) -> int:
    """Go on from what is there, as a start of the training program does."""
    engine: Any = TinyEngine()
    run_directory.check_writable(run)
    c = checkpointer(run, keep)
    c.newest(lambda text: None)
    for step in range(c.last_saved + EVERY if c.last_saved >= 0 else 0, last + 1, EVERY):
        tell(f"begun {step}")
        reason = "stop" if step in STOPS else "end" if step == LAST else "schedule"
        c.save(step, state_of(step), engine, reason)
        written, problem = c.finish()
        assert written and problem is None, problem
        tell(f"saved {step}")
    return 0


class Scene:
    """A folder as it was before the kill, and what had been saved in it."""

    def __init__(self, folder: Path, name: str, work: Path):
        self.origin, self.name, self.saved, self.damaged, self.last = folder / name, name, [0, 10], -1, LAST
        self.root = work / "scene"
        self.run = self.root / "run"
        self.origin.mkdir()
        if name == "nothing yet":
            self.saved, self.last = [], 10
            return
        # Two whole ones; one that was not finished; and a damaged one, which a start passes over and then overwrites.
        run = self.origin / "run"
        assert Child(lambda tell: write_to_the_end(run, tell, 60, CheckpointConfig(keep_last=100))).wait().status == 0
        for checkpoint in checkpoints(run):
            if checkpoint.step not in (0, 10, 40, 60):
                shutil.rmtree(checkpoint.path)
        unfinished = CheckpointDir.at(run, 40).path
        (unfinished / MANIFEST).rename(unfinished / (MANIFEST + ".tmp"))
        os.truncate(unfinished / MODEL_FILE, 100)
        flip(CheckpointDir.at(run, 60).path / MODEL_FILE, 5000)
        self.damaged = 60

    def restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.origin, self.root)

    def live(self, die_at: int = 0, loss: str = "nothing", seed: int = 0, broken: str | None = None, more: int = 0) -> Life:
        def life(tell: Tell) -> int:
            unsynced = break_rule(broken) if broken else lambda name: False
            disk = Disk(self.root, tell, die_at, loss, seed, unsynced)
            disk.install()
            status = write_to_the_end(self.run, tell, self.last + more)
            disk.tell_calls()
            return status

        return Child(life).wait()

    def wrongs(self, saved: list[int], begun: int, loss: str) -> tuple[list[str], int]:
        """What is not as it must be after a kill, when `saved` were completed and `begun` perhaps; the step found."""
        wrong: list[str] = []
        c = checkpointer(self.run)
        try:
            newest = c.newest(lambda text: None)
        except CheckpointError as error:
            return [f"saved {saved}, but {error}"], -1
        found = newest.step if newest else -1
        if found not in (max(saved, default=-1), begun):
            wrong.append(f"found step {found}; saved {saved}, begun {begun}")
        there = [*saved, begun] if found == begun != -1 else saved
        needed = kept(saved) & kept(there)  # before the next one is valid, all that were kept
        for checkpoint in checkpoints(self.run):
            problem = checkpoint.problem()
            if problem is None and checkpoint.step not in (*saved, begun):
                wrong.append(f"step {checkpoint.step} was never saved")
            if problem is None:
                needed -= {checkpoint.step}
            # Whole or absent; but a power cut may bring back some of what was being removed.
            elif checkpoint.step != self.damaged and (loss != "some" or checkpoint.step > found):
                wrong.append(problem)
        wrong += [f"step {step} is lost; saved {saved}, found {found}" for step in sorted(needed)]
        if newest:
            (model, optimizer), expected = (load(newest.path / name) for name in files_of(found)), files_of(found)
            same = (
                newest.manifest()["state"] == model[CLIENT_KEY] == state_of(found)
                and torch.equal(model["module"]["w"], expected[MODEL_FILE]["module"]["w"])
                and torch.equal(optimizer["flat"], expected[OPTIMIZER_FILE]["flat"])
            )
            if not same:
                wrong.append(f"the content of step {found} is not what was saved")
        return wrong, found

    def wrong_at_the_end(self) -> list[str]:
        files = {str(path.relative_to(self.run / "checkpoints")) for path in self.run.glob("checkpoints/*/*")}
        saved = range(0, self.last + EVERY + 1, EVERY)
        expected = {f"step_{step:08d}/{name}" for step in kept(list(saved)) for name in (MANIFEST, *files_of(0))}
        wrong = [f"at the end there is {files ^ expected} too much or too little"] if files != expected else []
        return wrong + [problem for c in checkpoints(self.run) if (problem := c.problem())]

    def disturb(self, die_at: int, loss: str, lives: int, broken: str | None = None, seed: int = 0) -> tuple[list[str], list[Any]]:
        """Killed at the call, and in later lives at others; then left in peace. (what is wrong, the kills)."""
        self.restore()
        at_random, saved, kills = random.Random(die_at), [*self.saved], list[Any]()
        for life in range(lives):
            number = die_at if life == 0 else at_random.randrange(1, 60)
            lived = self.live(number, loss, seed=die_at + 1000 * life + 10_000 * seed, broken=broken)
            if not lived.killed and lived.status != 0:
                return [f"a life ended with status {lived.status}: {lived.told[-3:]}"], kills
            saved += lived.steps("saved")
            if not lived.killed:
                break
            wrong, found = self.wrongs(saved, ([-1, *lived.steps("begun")])[-1], loss)
            kills.append((lived.all("killed")[0], found - max(saved, default=-1)))
            if wrong:
                return [f"{self.name}, kill at call {number} ({kills[-1][0]}), loses {loss}: {text}" for text in wrong], kills
            saved += [found] if found not in saved and found >= 0 else []
        lived = self.live(broken=broken, more=EVERY)  # one more save, which clears what a kill had left
        wrong = self.wrong_at_the_end() if lived.status == 0 else [f"the last life ended with status {lived.status}"]
        return [f"{self.name}, kill at call {die_at}, loses {loss}: {text}" for text in wrong], kills

    def kill_in_a_moment(self, seconds: float) -> tuple[list[str], int]:
        """From outside, with nothing patched in: (what is wrong, how many steps had been saved)."""
        self.restore()
        child = Child(lambda tell: write_to_the_end(self.run, tell, self.last))
        word = child.wait_for_a_word()
        time.sleep(seconds)
        child.kill()
        lived = child.wait(word)
        saved = [*self.saved, *lived.steps("saved")]
        wrong, _ = self.wrongs(saved, ([-1, *lived.steps("begun")])[-1], "nothing")
        return [f"{self.name}, kill after {seconds:.4f} s: {text}" for text in wrong], len(saved) if lived.killed else -1


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def scenes(folder: Path) -> list[Scene]:
    return [Scene(folder, name, folder) for name in ("nothing yet", "after two")]


def calls_of(scene: Scene, broken: str | None = None) -> list[str]:
    scene.restore()
    calls: list[str] = json.loads(scene.live(loss="all", broken=broken).all("calls")[0])
    return calls


def kill_the_writer(folder: Path, every: int, moments: int, seed: int) -> dict[str, Any]:
    at_random, wrong = random.Random(seed), []
    calls, tally = {}, dict.fromkeys(("nothing", "all", "some"), 0)
    where: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for scene in scenes(folder):
        names = calls_of(scene)
        calls[scene.name] = len(names)
        for i, loss in enumerate(tally):
            points = [(n, 0) for n in range(1 + (seed + i * every // 3) % every, len(names) + 1, every)]
            if loss == "some":  # where a name may be kept that was written last, and others not
                points += [(n, s) for n, name in enumerate(names, 1) if re.search(r"fsync .*step_N$", name) for s in (1, 2)]
            for die_at, salt in points:
                found, kills = scene.disturb(die_at, loss, lives=1 + (die_at % 3 == 0), seed=salt)
                wrong += found
                tally[loss] += len(kills)
                for at, gained in kills:
                    what, path = at.split(" ", 1)
                    where[f"{what} {Path(path).name if '.' in Path(path).name else 'a folder'}"] += 1
                    ends["the one being written" if gained else "the last completed one"] += 1
    scene.restore()
    child = Child(lambda tell: write_to_the_end(scene.run, tell))
    child.wait_for_a_word()
    began = time.monotonic()
    child.wait()
    whole_s, saved_by_then = time.monotonic() - began, []
    for _ in range(moments):
        found, n = scene.kill_in_a_moment(at_random.uniform(0, 0.8 * whole_s))
        wrong += found
        saved_by_then += [n] if n >= 0 else []
    return {"calls": calls, "kills": tally, "moments": len(saved_by_then), "saved by then": Counter(saved_by_then), "at": where,
            "found": ends, "wrong": wrong}


# ---- rules broken on purpose


def break_rule(rule: str) -> Callable[[str], bool]:
    """Patch this process; returns whether a sync of that name is left out."""
    publish, stash = product._publish, []

    def facts_only(state: Any, path: Path) -> Any:
        content = io.BytesIO()
        torch.save(state, content)
        stash.append((path, content.getvalue()))
        facts = {"bytes": len(content.getvalue()), "sha256": hashlib.sha256(content.getvalue()).hexdigest()}
        return path.name, facts

    def publish_first(*args: Any) -> None:
        publish(*args)
        while stash:
            path, content = stash.pop()
            path.write_bytes(content)

    def retain_first(pending: Any, *args: Any) -> None:
        step = pending.checkpoint.step
        there = [c.step for c in checkpoints(pending.checkpoint.path.parents[1]) if c.problem() is None]
        for other in set(there) - kept([*there, step]):
            CheckpointDir.at(pending.checkpoint.path.parents[1], other).remove()
        publish(pending, *args)

    def in_place(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        files.fsync_dir(path.parent)

    def unsynced(path: Path, text: str) -> None:
        in_place(path.with_suffix(".tmp"), text)
        path.with_suffix(".tmp").replace(path)

    if rule == "the manifest before the files":
        writer._write, product._publish = facts_only, publish_first  # type: ignore[assignment]
    elif rule == "old ones removed before the new one is valid":
        product._publish = retain_first  # type: ignore[assignment]
    elif rule == "the manifest written in place":
        product.write_atomically = in_place  # type: ignore[attr-defined]
    elif rule == "removed with the manifest last":
        def remove(checkpoint: CheckpointDir) -> None:
            for name in (*files_of(0), MANIFEST):
                (checkpoint.path / name).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=True)

        CheckpointDir.remove = remove  # type: ignore[method-assign]
    elif rule == "hashes not checked":
        CheckpointDir.check = lambda self, part=None: None  # type: ignore[method-assign, assignment]
    elif rule == "no sync of the step's folder before the manifest":
        product.fsync_dir = lambda path: None if path.name.startswith("step_") else files.fsync_dir(path)
    elif rule == "no sync of the step's folder after the manifest":
        product.write_atomically = unsynced
    return lambda name: name in UNSYNCED.get(rule, ())


UNSYNCED = {
    "no sync of the files": (MODEL_FILE, OPTIMIZER_FILE),
    "no sync of the manifest": (MANIFEST + ".tmp",),
    "no sync of the folder of checkpoints": ("checkpoints",),
    "no sync of the run's folder": ("run",),
    "no sync of the folder above": (".", ""),
}
# What of the unsynced is to be lost to see it, and which calls are worth a kill.
RULES = {
    "the manifest before the files": ("nothing", ""), "old ones removed before the new one is valid": ("nothing", ""),
    "the manifest written in place": ("nothing", "manifest.json$"), "removed with the manifest last": ("nothing", "unlink"),
    "hashes not checked": ("nothing", ""),
    "no sync of the step's folder before the manifest": ("some", "fsync .*step_N$"),
    "no sync of the step's folder after the manifest": ("all", ""), **dict.fromkeys(UNSYNCED, ("all", "")),
}


def find_out(folder: Path) -> dict[str, str | None]:
    """By rule: the first thing that is wrong when it is broken."""
    found: dict[str, str | None] = {}
    there = scenes(folder)
    for rule, (loss, where) in RULES.items():
        kills = [
            (scene, n) for scene in there for n, call in enumerate(calls_of(scene, rule), 1) if re.search(where, call)
            and (scene.name == "nothing yet" or rule not in ("no sync of the run's folder", "no sync of the folder above"))
        ]
        random.Random(rule).shuffle(kills)
        wrong = (text for scene, n in kills for text in scene.disturb(n, loss, 1, broken=rule)[0])
        found[rule] = next(wrong, None)
    return found


# ---- whole runs


def train_args(data: Path, run: Path) -> list[str]:
    return ["debug", *map(str, (
        "--data.path", data, "--output", run, *QUIET, "--train.steps", 12, "--train.micro-batch-size", 4, "--telemetry.log-every",
        1, "--checkpoint.every", 3, "--checkpoint.keep-last", 2, "--train.timeout-s", 120, "--optimizer.clip-grad-norm", 0.5))]


def start(data: Path, run: Path, log: Path, victim: int = -1, die_at: int = 0, alone: bool = False) -> list[Life]:
    """Both ranks. `alone`: the other one is left to end by itself, or else killed as a launcher does."""
    port = free_port()

    def life(rank: int) -> Callable[[Tell], int]:
        def go(tell: Tell) -> int:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            finish = Checkpointer.finish

            def finish_and_tell(self: Checkpointer) -> Any:
                written, problem = finish(self)
                if written:
                    tell(f"saved {self.last_saved}")
                return written, problem

            Checkpointer.finish = finish_and_tell  # type: ignore[method-assign]
            disk = Disk(run, tell, die_at if rank == victim else 0, seed=die_at)
            disk.install()
            status = train.main(train_args(data, run))
            disk.tell_calls()
            return status

        return go

    ranks = [Child(life(rank)) for rank in range(2)]
    deadline = time.monotonic() + 3000
    while not all(rank.ended() for rank in ranks):
        if time.monotonic() > deadline or (victim >= 0 and not alone and ranks[victim].ended()):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return [rank.wait() for rank in ranks]


def kill_runs(folder: Path, data: Path, runs: int, seed: int) -> dict[str, Any]:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 (half a start's time is what DeepSpeed imports late)

    at_random, wrong, tally = random.Random(seed), [], []
    truth = start(data, folder / "truth", folder / "truth.log")
    if [life.status for life in truth] != [0, 0]:
        return {"wrong": [(folder / "truth.log").read_text()[-2000:]]}
    calls = [json.loads(life.all("calls")[0]) for life in truth]
    for i in range(runs):
        run, log, alone = folder / f"run{i}", folder / f"run{i}.log", i % 3 == 2
        kills = []
        for attempt in range(2):
            victim = (i + attempt) % 2
            early = calls[victim] if attempt == 0 else calls[victim][: len(calls[victim]) // 2]
            kind = at_random.choice(sorted(set(early)))  # or nearly all would be writes of the large files
            die_at = 1 + at_random.choice([n for n, call in enumerate(early) if call == kind])
            lives = start(data, run, log, victim, die_at, alone)
            saved = max(lives[0].steps("saved"), default=-1)
            newest = checkpointer(run).newest(lambda text: None)
            found = newest.step if newest else -1
            if found < max([saved, *(start.saved_step for start in read_starts(run))]):
                wrong.append(f"run {i}: found step {found}, saved {saved}")
            if lives[victim].killed:
                kills.append(f"rank {victim}, {lives[victim].all('killed')[0]}, found {found}")
            if lives[victim].killed and alone and lives[1 - victim].status not in (0, 1):
                wrong.append(f"run {i}: the rank that was left did not end by itself: {lives[1 - victim].status}")
        lives = start(data, run, log)
        if [life.status for life in lives] != [0, 0]:
            wrong.append(f"run {i} did not end well: {log.read_text()[-2000:]}")
            continue
        try:
            assert_same_run(run, folder / "truth")
        except AssertionError as error:
            wrong.append(f"run {i}, {kills}: not the run it would have been: {str(error)[:1000]}")
        tally.append(kills)
    return {"calls": [len(rank) for rank in calls], "kills": sum(map(len, tally)), "runs": tally, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["writer", "controls", "runs"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "writer":
        result: Any = kill_the_writer(options.folder, options.every, options.moments, options.seed)
    elif options.what == "controls":
        result = find_out(options.folder)
    else:
        result = kill_runs(options.folder, options.data, options.runs, options.seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
