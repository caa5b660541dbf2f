"""Extractors of features that cost nothing, and sets of images to score."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import score
from eval.scoring.extractors import Clip, Extractor, Features
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(images: Tensor) -> Features:
    """Means over quarters of each channel: an extractor that costs nothing."""
    x = images.float() / 255
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)       # (B, 12)
    return Features(pooled, pooled[:, :5] * 2, pooled * 20)


EXTRACTOR = Extractor("tiny", "tiny sha256:0", 12, 5, 12, torch.device("cpu"), tiny)
INCEPTION = dataclasses.replace(EXTRACTOR, name="inception")
CLIP = Clip("tiny-clip", "tiny clip", 12, None, None, torch.device("cpu"), lambda x: Features(tiny(x).pooled),
            forward_text=lambda texts: torch.tensor([[float(len(t))] + [1.0] * 11 for t in texts]))


@pytest.fixture(autouse=True)
def extractors(monkeypatch: pytest.MonkeyPatch) -> None:
    real = score.load_extractor

    def load(spec: str, *args: Any, **more: Any) -> Extractor:
        return {"tiny": EXTRACTOR, "inception": INCEPTION}[spec] if spec in ("tiny", "inception") else real(spec, *args, **more)

    monkeypatch.setattr(score, "load_extractor", load)
    monkeypatch.setattr(score, "load_clip", lambda spec, device: CLIP)


def images(n: int, seed: int, noise: float = 0.0, side: int = 16) -> np.ndarray:
    """Smooth pictures of many colours, with noise on top."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(40, 215, (n, 3, 2, 2)).repeat(side // 2, 2).repeat(side // 2, 3)
    return (coarse + random.normal(0, noise, coarse.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray, texts: bool = False) -> Path:
    with ShardWriter(path, DatasetInfo("set", "pixels", pixels.shape[1:], 10), rows_per_shard=100) as writer:
        for i, image in enumerate(pixels):
            writer.write(id=f"{i:06d}", latent=image, label=i % 10, **({"captions": ["x" * (i % 5)]} if texts else {}))
    return path


def run(*args: Any) -> int:
    return score.main([str(arg) for arg in (*args, "--device", "cpu")])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
