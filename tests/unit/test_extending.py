"""The recipes of docs/extending.md, carried out as they are printed there."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from largescale import noise_schedule
from largescale.config.presets import PRESETS
from largescale.curriculum import PACINGS, Curriculum, uniform_clusters
from largescale.curriculum import pacing as pacing_module
from largescale.data.shards import ShardDataset
from largescale.diffusion import loss_weighting
from largescale.diffusion.build import build_objective

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()


def code_of(title: str) -> str:
    """The block below that title."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return str(block)


def defined(title: str, module: Any) -> dict[str, Any]:
    """What the block defines, in the module that it belongs in."""
    scope = dict(vars(module))
    exec(code_of(title), scope)
    return {name: value for name, value in scope.items() if name not in vars(module)}


def test_a_pacing_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = defined("A pacing rule", pacing_module)["ThresholdPacing"]
    monkeypatch.setitem(PACINGS, "threshold", rule)
    curriculum = Curriculum(uniform_clusters(3), PACINGS["threshold"](0.5))
    for loss in (0.9, 0.4, 0.6):
        curriculum.observe(loss)
    other = Curriculum(uniform_clusters(3), rule(0.5))
    other.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    for each in (curriculum, other):  # resumed, it goes on alike
        assert [each.observe(loss) for loss in (0.7, 0.3, 0.2, 0.1)] == [False, True, True, False]
        assert each.index == 0 and each.transitions == [(2, 2), (5, 1), (6, 0)]


def test_a_noise_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(noise_schedule.SCHEDULES, "sigmoid", defined("A noise schedule", noise_schedule)["sigmoid_betas"])
    debug = PRESETS["debug"]()
    config = dataclasses.replace(debug, diffusion=dataclasses.replace(debug.diffusion, schedule="sigmoid"))
    log_snr = build_objective(config).log_snr(torch.arange(config.diffusion.timesteps))
    assert (log_snr.diff() < 0).all() and log_snr[0] > 8 and log_snr[-1] < -8


def test_a_weighting(monkeypatch: pytest.MonkeyPatch) -> None:
    weighting = defined("A weighting of the loss", loss_weighting)["truncated_snr"]
    monkeypatch.setitem(loss_weighting.WEIGHTINGS, "truncated_snr", lambda config: weighting())
    config = dataclasses.replace(PRESETS["debug"]().noise, weighting="truncated_snr")
    snr = torch.tensor([0.25, 1.0, 9.0], dtype=torch.float64)  # of noise prediction: max(SNR, 1) / SNR
    assert loss_weighting.make_weighting(config)(snr.log(), snr).tolist() == pytest.approx([4, 1, 1])


def test_a_packer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_packer.py").write_text(code_of("A packer"))
    monkeypatch.syspath_prepend(tmp_path)
    packer = importlib.import_module("my_packer")
    (tmp_path / "images").mkdir()
    for label in (0, 2):
        Image.new("RGB", (20, 20), (100 * label, 0, 0)).save(tmp_path / f"images/{label}_0001.png")
    args = ("--images", tmp_path / "images", "--out", tmp_path / "out", "--vae", "none", "--resolution", 16, "--device", "cpu")
    assert packer.main([*map(str, args)]) == 0
    data = ShardDataset(tmp_path / "out", verify=True)
    assert data.info.num_classes == 3 and data.gather(np.arange(2))["label"].tolist() == [0, 2]
