"""Images to extract features of."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eval.scoring import extractors
from eval.scoring.extractors import Extractor


def drawn(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Pictures with edges, areas and some noise, (n, 3, H, W) uint8."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(n):
        picture = Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        for _ in range(5):
            x, y = sorted(random.integers(0, width, 2).tolist()), sorted(random.integers(0, height, 2).tolist())
            draw.ellipse([x[0], y[0], x[1] + 2, y[1] + 2], fill=tuple(random.integers(0, 256, 3).tolist()))
        noisy = np.asarray(picture).astype(int) + random.integers(-9, 10, (height, width, 3))
        pictures.append(noisy.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))


def assert_equal(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float = 0) -> None:
    assert a is not None and b is not None and a.dtype == torch.float32
    assert a.shape == b.shape and a.std() > 1e-3        # what is nothing at all would be equal to much
    torch.testing.assert_close(a, b.float(), rtol=0, atol=tolerance * float(b.abs().max()))


def assert_each_by_itself(extractor: Extractor, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches or one by one, the features are the same but for rounding."""
    monkeypatch.setattr(extractors, "BATCH", 2)
    many, single = extractor(images), [extractor(image[None]) for image in images]
    for whole, parts in zip(many, zip(*single, strict=True), strict=True):
        assert (whole is None) == (parts[0] is None)
        if whole is not None:
            assert len(whole) == len(images)
            assert_equal(whole, torch.cat(parts), 1e-5)
