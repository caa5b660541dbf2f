"""The recipes of docs/extending.md, carried out as they are printed there."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from eval.scoring import figures as figures_module
from largescale import noise_schedule
from largescale.config.presets import PRESETS
from largescale.curriculum import PACINGS, Curriculum, uniform_clusters
from largescale.curriculum import pacing as pacing_module
from largescale.data.shards import ShardDataset
from largescale.diffusion import gaussian, loss_weighting
from largescale.diffusion.build import OBJECTIVES, build_objective
from largescale.diffusion.samplers import sample

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


def test_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows the answer has no loss, and its samples are the image; the weight is the ratio of the errors."""
    made = defined("An objective", gaussian)["VPrediction"](
        noise_schedule.make_betas("cosine", 50), learn_sigma=False, fixed_variance="large")
    monkeypatch.setitem(OBJECTIVES, "v", lambda config: made)
    config = PRESETS["debug"]()
    objective = build_objective(dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, objective="v")))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(6, 1, 4, 4, generator=generator) for _ in range(2))
    t = objective.draw(torch.linspace(0.05, 0.95, 6, dtype=torch.float64))

    def knowing(error: float) -> Any:
        def v_of(x_t: torch.Tensor, t: torch.Tensor, y: Any) -> torch.Tensor:
            alpha, sigma = (each.float()[:, None, None, None] for each in objective.alpha_sigma(t.long()))
            return (alpha * x_t - (x_start + error)) / sigma

        return v_of

    y = torch.zeros(6).long()
    assert objective.training_losses(knowing(0.0), x_start, t, noise, y).loss.max() < 1e-4
    losses = objective.training_losses(knowing(0.5), x_start, t, noise, y)
    torch.testing.assert_close(losses.mse.double(), 0.25 * objective.x_start_weight(t), rtol=1e-3, atol=1e-4)
    for sampler in objective.samplers:
        found = sample(objective, knowing(0.0), noise, y, sampler=sampler, steps=10, noise=lambda i: torch.zeros_like(noise))
        torch.testing.assert_close(found, x_start, rtol=0, atol=2e-2)


def test_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures_module.FIGURES, "mean distance", defined("A metric", figures_module)["mean_distance"])
    generator = torch.Generator().manual_seed(0)
    true, samples = torch.randn(4000, 3, generator=generator), torch.randn(4000, 3, generator=generator) + torch.tensor([3.0, 4.0, 0.0])
    seen = figures_module.ExtractedFeatures(4000, cast(Any, None), None, None, samples)
    reference: Any = SimpleNamespace(statistics=SimpleNamespace(features=true.numpy()))
    (found,), notes = figures_module.figures(seen, reference, ("mean distance",), torch.device("cpu"))  # type: ignore[arg-type]
    assert abs(found.value - 5) < 3 * found.error < 0.2 and found.better == "lower" and notes == []
    reference.statistics.features = None
    assert figures_module.figures(seen, reference, ("mean distance",), torch.device("cpu"))[0] == []  # type: ignore[arg-type]


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
