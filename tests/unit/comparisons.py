"""Comparisons in one thread, whose samples an extractor that costs nothing sees."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eval import score
from eval.scoring.extractors import Extractor, Features

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def tiny(images: Tensor) -> Features:
    x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
    return Features(x, None, x * 20)


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Extractor("tiny", "tiny sha256:0", 12, None, 12, CPU, tiny)
    monkeypatch.setattr(score, "load_extractor", lambda spec, *args, **more: extractor)
