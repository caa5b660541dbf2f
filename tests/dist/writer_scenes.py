"""Kills of the writer by itself, at chosen calls and moments, and what must be true of what is left."""

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

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
from tests.dist.broken_rules import RULES, break_rule
from tests.dist.kill_at_call import Child, Disk, Life, Tell
from tests.dist.writer_alone import (
    EVERY,
    LAST,
    OPTIMIZER_FILE,
    checkpointer,
    files_of,
    kept,
    state_of,
    write_to_the_end,
)


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
