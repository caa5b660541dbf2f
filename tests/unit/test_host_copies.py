"""A checkpoint's copies from a GPU through pinned memory, with a device that is made up: the same bytes as torch's own copies."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.engine import deepspeed_engine
from largescale.engine.deepspeed_engine import PlainStates, plain
from largescale.engine.host_copies import StagedCopies, _Part
from tests.conftest import RunHere, assert_same_run


class Event:
    def __init__(self, wait: Callable[[], None]):
        self.synchronize = wait


class Staged(StagedCopies):
    """A GPU that copies at once, or not before it is waited for: both may happen."""

    def __init__(self, size: int, at_once: bool):
        self.at_once, self.started = at_once, 0
        super().__init__(size)

    def _pinned(self, size: int) -> Tensor:
        return torch.full((size,), 0xAB, dtype=torch.uint8)

    def _start(self, source: Tensor, half: Tensor) -> Event:
        self.started += 1

        def copy() -> None:
            half.copy_(source)

        if self.at_once:
            copy()
        return Event((lambda: None) if self.at_once else copy)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are taken for a GPU's."""
    real = StagedCopies.__call__

    class Elsewhere:
        """A tensor of the CPU that says that it is not."""

        def __init__(self, tensor: Tensor):
            self._tensor = tensor
            self.device = torch.device("cuda", 0)

        def detach(self) -> "Elsewhere":
            return Elsewhere(self._tensor.detach())

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tensor, name)

    monkeypatch.setattr(StagedCopies, "__call__", lambda self, tensor: real(self, Elsewhere(tensor)))  # type: ignore[arg-type]


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tensors() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=random)
    return {
        "master": weights, "half": weights.bfloat16().reshape(10, 100), "one": torch.tensor(3.5), "none": torch.empty(0, 4),
        "view": weights[3:40], "turned": weights.reshape(10, 100).T, "flags": weights > 0, "steps": [torch.tensor(7), 7, "x"],
        "weight": torch.nn.Parameter(weights[:5].clone()), "long": torch.arange(33), "shape": torch.Size([2, 3]),
    }


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("size", [2, 64, 66, 4002, 10**6])
def test_the_same_bytes(size: int, at_once: bool, on_gpu: None) -> None:
    """Whatever the block's size, and whenever the GPU copies."""
    state, staged, given = tensors(), Staged(size, at_once), list[Any]()

    class Writer:
        def save(self, state: Any, path: str) -> None:
            given.append(saved(state))

    for _ in range(2):
        PlainStates(Writer(), staged).save(state, "x.pt")
    assert staged.started >= 2 * 8
    assert given == [saved(plain(state))] * 2


class OneHalf(Staged):
    """Fills a half before it is empty."""

    def _send(self, source: Tensor, target: Tensor) -> None:
        half = self._block[: source.numel()]
        self._on_the_way.append(_Part(source, half, target, self._start(source, half)))


@pytest.mark.parametrize("mistake", ["not waited for", "filled too soon"])
def test_a_mistake_would_be_seen(mistake: str, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    staged: Staged = OneHalf(64, at_once=True)
    if mistake == "not waited for":
        staged = Staged(64, at_once=False)
        monkeypatch.setattr(Event, "__init__", lambda self, wait: setattr(self, "synchronize", lambda: None))
    state = plain(tensors(), staged)
    staged.finish()
    assert saved(state) != saved(plain(tensors()))


def test_what_is_on_the_cpu_is_copied_at_once() -> None:
    source = torch.ones(3)
    staged = Staged(64, at_once=False)
    copy = staged(source)
    source.zero_()
    assert copy.tolist() == [1, 1, 1] and staged.started == 0


def test_a_run_that_saves_so(run_here: RunHere, on_gpu: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed from such checkpoints it is the same run, bitwise."""
    settings = ("--checkpoint.every", 4)
    truth = run_here(*settings, "--train.steps", 8, output=tmp_path / "truth").run
    real = deepspeed_engine.PlainStates.__init__
    monkeypatch.setattr(deepspeed_engine.PlainStates, "__init__",
                        lambda self, writer, staged=None: real(self, writer, Staged(1000, at_once=False)))
    run_here(*settings, "--train.steps", 4)
    run = run_here(*settings, "--train.steps", 8)
    assert run.code == 0, run.err
    assert_same_run(run.run, truth)
