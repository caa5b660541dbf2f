"""Every choice of the config has one table, and every table its choice."""

import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from eval.scoring.figures import FIGURES, METRICS
from largescale.config import learning_rate
from largescale.config.derived import CLUSTERS, cluster_edges, pacing, pacing_settings
from largescale.config.schema import Config, CurriculumConfig, DiffusionConfig, NoiseConfig
from largescale.curriculum import PACINGS, Curriculum, uniform_clusters
from largescale.data.order import ORDERS
from largescale.diffusion.build import OBJECTIVES, build_objective
from largescale.diffusion.flow import INTERPOLANTS, Flow
from largescale.diffusion.loss_weighting import WEIGHTINGS, make_weighting
from largescale.diffusion.noise_levels import NOISE_SAMPLERS, make_noise_sampler
from largescale.errors import ConfigError
from largescale.models.build import ARCHITECTURES
from largescale.noise_schedule import SCHEDULES
from largescale.registry import look_up

TABLES: dict[str, dict[str, Any]] = {
    "model.architecture": ARCHITECTURES,
    "curriculum.pacing": PACINGS, "curriculum.clusters": CLUSTERS, "noise.sampling": NOISE_SAMPLERS, "noise.weighting": WEIGHTINGS,
    "diffusion.objective": OBJECTIVES, "diffusion.schedule": SCHEDULES, "optimizer.schedule": learning_rate.SCHEDULES, "diffusion.interpolant": INTERPOLANTS,
    "data.order": ORDERS,
}
# Ways of doing one thing, told apart where it is done: nothing is constructed for them.
SWITCHES = {
    "model.null_caption", "model.downscale_freq_shift", "diffusion.fixed_variance", "curriculum.order", "curriculum.stages", "optimizer.kernel",
    "train.micro_batch_size", "train.compile", "train.kernels", "train.device", "anomaly.not_finite", "anomaly.spike", "checkpoint.keep_best",
    "data.normalize", "data.grown",
}


def literals(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(section.field, its names) of each field that is a choice."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from literals(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        for part in get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,):
            if get_origin(part) is Literal:
                yield prefix + name, get_args(part)


CHOICES = dict(literals(Config))


def test_every_choice_is_known_here() -> None:
    assert CHOICES.keys() == TABLES.keys() | SWITCHES


@pytest.mark.parametrize("key", TABLES)
def test_a_choice_and_its_table_have_the_same_names(key: str) -> None:
    assert CHOICES[key] == tuple(TABLES[key])


def test_every_metric_has_figures() -> None:
    """The CLIP score needs texts too, and is made apart."""
    assert (*FIGURES, "clip") == METRICS


def test_a_name_that_is_not_there() -> None:
    table = {"patience": 1, "fixed": 2}
    assert look_up(table, "fixed", "curriculum.pacing") == 2
    with pytest.raises(ConfigError, match=r"^unknown curriculum.pacing 'patient'; did you mean 'patience'\? choose one of patience, fixed$"):
        look_up(table, "patient", "curriculum.pacing")
    with pytest.raises(ConfigError, match="^unknown curriculum.pacing '7'; choose one of patience, fixed$"):
        look_up(table, "7", "curriculum.pacing")
    with pytest.raises(ConfigError, match="^unknown curriculum.pacing None; choose one of patience, fixed$"):
        look_up(table, None, "curriculum.pacing")  # type: ignore[arg-type]


@pytest.mark.parametrize("section, field, make", [
    (CurriculumConfig, "curriculum.pacing", pacing), (CurriculumConfig, "curriculum.clusters", cluster_edges),
    (DiffusionConfig, "diffusion.objective", build_objective), (DiffusionConfig, "diffusion.schedule", build_objective),
    (NoiseConfig, "noise.sampling", lambda config: make_noise_sampler(config.noise, None, 10)),
    (NoiseConfig, "noise.weighting", lambda config: make_weighting(config.noise)),
])
def test_nothing_else_is_made_instead(section, field, make) -> None:
    """As of a config that was saved by another version, which no parser has seen."""
    part, name = field.split(".")
    config = Config("x", **{part: section(**{name: CHOICES[field][0] + "_2"})})
    with pytest.raises(ConfigError, match=f"unknown {field} '{CHOICES[field][0]}_2'; did you mean '{CHOICES[field][0]}'"):
        make(config)


@pytest.mark.parametrize("name", NOISE_SAMPLERS)
def test_a_noise_sampler_saves_its_name(name: str) -> None:
    assert make_noise_sampler(NoiseConfig(sampling=name, beta_alpha=2.0, beta_beta=1.0), Flow(), 10).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PACINGS)
def test_a_pacing_rule_is_made_with_fields_of_the_config(name: str) -> None:
    """Each with its own, and no stage is shorter than it says."""
    values = {setting: 0.75 if setting == "loss_smoothing" else 3 + i for i, setting in enumerate(pacing_settings(name))}
    rule = pacing(Config("x", curriculum=CurriculumConfig(pacing=name, **values)))  # type: ignore[arg-type]
    assert rule == PACINGS[name](**values)
    curriculum = Curriculum(uniform_clusters(4), rule)
    while curriculum.index:
        curriculum.observe(1.0)  # never better than the first
    assert curriculum.observations == 4 * rule.shortest_stage
