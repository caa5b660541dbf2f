"""What follows from a config alone: the batch's layout and the curriculum."""

import inspect
import math
from collections.abc import Callable

from largescale import noise_schedule
from largescale.config.schema import Config
from largescale.curriculum import (
    PACINGS,
    Curriculum,
    Pacing,
    snr_clusters,
    uniform_clusters,
)
from largescale.errors import ConfigError
from largescale.registry import look_up


def batch_layout(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps), with global_batch_size = micro_batch_size *
    grad_accum_steps * world_size. "auto", until `fit` has found a number for it, stands for the
    largest: a rank's whole share."""
    total = config.train.global_batch_size
    if total % world_size:
        works = [n for n in range(1, total + 1) if total % n == 0]
        near = [n for n in works if n < world_size][-1:] + [n for n in works if n > world_size][:1]
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of world_size={world_size}; "
            f"start {' or '.join(map(str, near))} ranks, "
            f"or try --train.global-batch-size {math.ceil(total / world_size) * world_size}"
        )
    micro = config.train.micro_batch_size
    if micro is None or micro == "auto":
        micro = total // world_size
    if total % (micro * world_size):
        share = total // world_size
        fits = max(n for n in range(1, micro + 1) if share % n == 0)
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of "
            f"micro_batch_size*world_size={micro * world_size} ({micro}*{world_size}); try "
            f"--train.micro-batch-size {fits}"
        )
    return micro, total // (micro * world_size)


def make_curriculum(config: Config) -> Curriculum:
    c = config.curriculum
    return Curriculum(
        cluster_edges(config),
        pacing(config),
        order=c.order,
        stages=c.stages,
        only_cluster=c.only_cluster,
    )


def least_steps(config: Config) -> int:
    """Until the curriculum is complete: every stage at its shortest."""
    return config.curriculum.n_clusters * pacing(config).shortest_stage


def pacing(config: Config) -> Pacing:
    c = config.curriculum
    rule = look_up(PACINGS, c.pacing, "curriculum.pacing")
    return rule(**{name: getattr(c, name) for name in pacing_settings(c.pacing)})


def pacing_settings(name: str) -> list[str]:
    """What a pacing rule is made with: fields of `CurriculumConfig`, by their own names."""
    return list(inspect.signature(look_up(PACINGS, name, "curriculum.pacing")).parameters)


def cluster_edges(config: Config) -> tuple[float, ...]:
    return look_up(CLUSTERS, config.curriculum.clusters, "curriculum.clusters")(config)


def _uniform_edges(config: Config) -> tuple[float, ...]:
    return uniform_clusters(config.curriculum.n_clusters)


def _snr_edges(config: Config) -> tuple[float, ...]:
    """Edges at the SNR that the uniform ones have under the cosine schedule."""
    own, cosine = (
        noise_schedule.log_snr(noise_schedule.make_betas(name, config.diffusion.timesteps))
        for name in (config.diffusion.schedule, "cosine")
    )
    return snr_clusters(config.curriculum.n_clusters, own, cosine)


CLUSTERS: dict[str, Callable[[Config], tuple[float, ...]]] = {
    "uniform": _uniform_edges,
    "snr": _snr_edges,
}
