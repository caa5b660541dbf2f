"""Samples that eval.sample draws from a small export."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eval import sample
from largescale.checkpoint.weights import EXPORT_CONFIG, EXPORT_WEIGHTS
from largescale.config.presets import PRESETS
from largescale.config.schema import ModelConfig
from largescale.config.serialise import to_dict
from largescale.data.shards import ShardDataset
from largescale.models.build import build_model

CURRICULUM = {"edges": [0.0, 0.5, 1.0], "pacing": {"index": 0, "best_loss": None}, "transitions": [[9, 1]]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads on cores that are busy with other tests take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_export(folder: Path, in_channels: int = 1, weights_seed: int = 0) -> Path:
    """As largescale.export does, of a model that was not trained."""
    config = to_dict(PRESETS["debug"]())
    config["model"] |= {"in_channels": in_channels, "depth": 1}
    config["diffusion"]["schedule"] = "linear"          # cosine enlarges what an untrained model leaves 20,000 times
    model = build_model(ModelConfig(**config["model"]))
    generator = torch.Generator().manual_seed(weights_seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    description = {"config": config, "step": 20, "samples_seen": 320, "dataset": "0f" * 32, "precision": "fp32",
                   "curriculum": CURRICULUM, "data_info": {"kind": "pixels" if in_channels == 1 else "latents"}}
    folder.mkdir()
    save_file(model.state_dict(), folder / EXPORT_WEIGHTS)
    (folder / EXPORT_CONFIG).write_text(json.dumps(description))
    return folder


def draw(export: Path, out: Path, *more: str) -> int:
    args = ["--num-samples", "12", "--steps", "4", "--batch-size", "3", "--shard-size", "6", "--device", "cpu", "--cfg-scale", "1.5", "2.0"]
    return sample.main([str(export), "--out", str(out), *args, *more])


def rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Samples and labels of a whole set, whose hashes are right."""
    data = ShardDataset(folder, verify=True)
    found = data.gather(np.arange(len(data)))
    return found["latent"], found["label"]


def mtimes(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
