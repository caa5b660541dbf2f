"""Samples of which a model that was trained on one interval of noise levels draws that interval."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.difficulty_study.denoising import (
    Spliced,
    asked_levels,
    bounds,
    check_fits,
    noise_level_of,
)
from largescale.checkpoint.weights import Trained
from largescale.config.derived import cluster_edges
from largescale.config.presets import PRESETS
from largescale.diffusion.build import build_objective
from largescale.diffusion.sampling import SamplingConfig, draw_samples
from largescale.errors import CheckpointError
from largescale.models.build import build_model, latent_shape

CONFIGS = {name: replace(PRESETS[name](), name=name) for name in ("debug", "debug_sit", "debug_edm")}
HOW = {"debug": ("ddpm", 50), "debug_sit": ("euler", 40), "debug_edm": ("euler", 40)}


def untrained(name: str, seed: int) -> Trained:
    """Of weights that are not those at the start, where networks say 0."""
    config = CONFIGS[name]
    torch.manual_seed(seed)
    model = build_model(config.model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return Trained(model, build_objective(config), config, {"data_info": {"kind": "pixels"}, "step": 1})


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Trained, Trained]]:
    torch.set_num_threads(1)
    return {name: (untrained(name, 0), untrained(name, 1)) for name in CONFIGS}


def draw(trained: Trained, model: Any, **how: Any) -> Tensor:
    sampler, steps = HOW[trained.config.name]
    config = SamplingConfig(sampler=sampler, steps=steps, cfg_scale=how.pop("cfg_scale", 1.0), **how)
    return draw_samples(model, trained.objective, config, index=[0], shape=latent_shape(trained.config.model),
                        condition=lambda index: torch.tensor(index), num_classes=10, batch_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_is_asked_where_it_was_trained(name: str, models: dict[str, tuple[Trained, Trained]]) -> None:
    """Every time that training draws for C_i is one at which M_i is asked, and none of the other clusters' is."""
    part, _ = models[name]
    edges = cluster_edges(part.config)
    for i in range(1, len(edges)):
        def inside(x: Tensor, t: Tensor, y: Any) -> Tensor:
            return torch.ones_like(x)

        def outside(x: Tensor, t: Tensor, y: Any) -> Tensor:
            return torch.zeros_like(x)

        spliced = Spliced(inside, outside, noise_level_of(part), *edges[i - 1 : i + 1])
        for k in range(1, len(edges)):
            v = torch.tensor([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
            t = part.objective.draw(v, *edges[k - 1 : k + 1])
            given = t.log() / 4 if name == "debug_edm" else t               # as the network is
            assert spliced(torch.zeros(5, 1, 2, 2), given, torch.zeros(5)).mean() == (1 if i == k else 0), (i, k)


@pytest.mark.parametrize("name", CONFIGS)
def test_splicing(name: str, models: dict[str, tuple[Trained, Trained]]) -> None:
    """The same model twice is that model; another one counts in its interval; all of the axis is that other one."""
    part, full = models[name]
    level, edges = noise_level_of(full), cluster_edges(full.config)
    plain = draw(full, full.model)
    assert torch.equal(draw(full, Spliced(full.model, full.model, level, 0.2, 0.6)), plain)
    assert torch.equal(draw(full, Spliced(part.model, full.model, level, 0.0, 1.0)), draw(full, part.model))
    spliced = [draw(full, Spliced(part.model, full.model, level, *edges[i - 1 : i + 1])) for i in range(1, len(edges))]
    for i, samples in enumerate(spliced):
        assert samples.isfinite().all() and not torch.equal(samples, plain)
        assert all(not torch.equal(samples, other) for other in spliced[:i])
    by_hand = [full.model, part.model]

    def choose(x: Tensor, t: Tensor, y: Any) -> Tensor:
        u = {"debug": lambda: (t + 0.5) / 1000, "debug_sit": lambda: 1 - t,
             "debug_edm": lambda: torch.special.ndtr((4 * t + 1.2) / 1.2)}[name]()
        return by_hand[0.4 <= u[0] < 0.6](x, t, y)

    assert torch.equal(spliced[2], draw(full, choose))


def test_rows_of_both_kinds(models: dict[str, tuple[Trained, Trained]]) -> None:
    """Each row has the answer of the model that it belongs to, and guidance, which asks twice, works."""
    part, full = models["debug"]
    x, t, y = torch.randn(4, 1, 16, 16), torch.tensor([0, 399, 400, 999]), torch.arange(4)
    spliced = Spliced(part.model, full.model, noise_level_of(full), 0.4, 0.6)
    expected = torch.cat([(part if i == 2 else full).model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert torch.allclose(spliced(x, t, y), expected, atol=1e-5)
    guided = [draw(full, model, cfg_scale=2.0) for model in (full.model, spliced, part.model)]
    assert not torch.equal(guided[0], guided[1]) and not torch.equal(guided[1], guided[2])


def test_the_levels_that_a_sampler_asks_for(models: dict[str, tuple[Trained, Trained]]) -> None:
    """In order, whatever the network says; EDM's 40 steps leave some of 20 intervals out, and reach beyond both ends."""
    levels = {name: asked_levels(full, SamplingConfig(sampler=HOW[name][0], steps=HOW[name][1], cfg_scale=2.0))
              for name, (_, full) in models.items()}
    for name, found in levels.items():
        asked: list[float] = []
        full = models[name][1]

        def listening(x: Tensor, t: Tensor, y: Any, full: Trained = full, asked: list[float] = asked) -> Tensor:
            asked.append(noise_level_of(full)(t)[0].item())
            return full.model(x, t, y)

        draw(full, listening)
        assert found == asked == sorted(found, reverse=True) and len(found) == HOW[name][1]
    assert levels["debug"][0] == 0.9995 and levels["debug"][-1] == 0.0005
    assert levels["debug_sit"][0] == 1.0 and levels["debug_sit"][-1] == pytest.approx(1 / 40)
    edges = [i / 20 for i in range(21)]
    inside = [sum(low <= u < high for u in levels["debug_edm"]) for low, high in (bounds(*edges[i : i + 2]) for i in range(20))]
    assert sum(inside) == 40 and min(inside) == 0 < inside[0] and inside[-1] > 0


def test_models_that_do_not_fit(models: dict[str, tuple[Trained, Trained]]) -> None:
    part, full = models["debug"]
    check_fits(part, full, Path("part"), Path("full"))
    others = [replace(full, config=models["debug_sit"][1].config),
              replace(full, config=replace(full.config, model=replace(full.config.model, num_classes=3))),
              replace(full, info={"data_info": {"kind": "latents"}})]
    for other, why in zip(others, ("diffusion is", "num_classes is 10", "kind of the data is pixels"), strict=True):
        with pytest.raises(CheckpointError, match=why):
            check_fits(part, other, Path("part"), Path("full"))
