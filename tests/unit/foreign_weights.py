"""Weights as other programs write them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale import convert
from largescale.models.dit import DiT

HEADS = ("--num-heads", "4")  # of a width that no published network has
SIZES: dict[str, Any] = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "input_size": 8, "num_classes": 7}


def dit(seed: int = 0, **change: Any) -> DiT:
    """A small network with random weights of unequal scales, and the position embedding that all have."""
    model = DiT(**SIZES | change)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name != "pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.05 + 0.02 * (i % 5)))
    return model.eval()


def arguments(**change: Any) -> argparse.Namespace:
    """What facebookresearch/DiT's train.py keeps of its options, of a size that has no published name."""
    return argparse.Namespace(**{"data_path": "imagenet", "model": "DiT-T/2", "image_size": 64, "num_classes": 7, "epochs": 1400, "vae": "ema"} | change)


def checkpoint(**change: Any) -> dict[str, Any]:
    """What facebookresearch/DiT's train.py saves."""
    model = dit(0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.tensor([1])).sum().backward()
    optimizer.step()
    return {"model": dit(1).state_dict(), "ema": dit(2).state_dict(), "opt": optimizer.state_dict(), "args": arguments()} | change


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Converting fails with status 2, says what is wrong in one message, and writes nothing."""
    def fails(source: Path | str, *options: str) -> str:
        capsys.readouterr()
        assert convert.main([str(source), "--out", str(tmp_path / "refused"), *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said and not (tmp_path / "refused").exists()
        return said

    return fails


SIT = {"model": "SiT-T/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None}


def no_network(*args: Any, **options: Any) -> None:
    raise ConnectionError("Name or service not known")
