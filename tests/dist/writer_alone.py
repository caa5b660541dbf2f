"""The writer of checkpoints by itself: a run without training, that saves small files as DeepSpeed does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.checkpoint.files import CLIENT_KEY, MODEL_FILE, CheckpointDir
from largescale.config.schema import CheckpointConfig
from largescale.training import run_directory
from tests.dist.kill_at_call import Tell

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
