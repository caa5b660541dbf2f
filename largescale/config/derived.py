"""What follows from a config alone: the batch's layout, the kernels and the curriculum."""

import bisect
import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Literal

from largescale import noise_schedule
from largescale.config.schema import Config, TrainConfig
from largescale.curriculum import (
    PACINGS,
    Curriculum,
    Pacing,
    snr_clusters,
    uniform_clusters,
)
from largescale.errors import ConfigError
from largescale.registry import look_up


def resolved_kernels(train: TrainConfig) -> Literal["inductor", "fused"]:
    """train.kernels, or what auto stands for."""
    # Fused kernels are not measured on any card yet.
    return "inductor" if train.kernels == "auto" else train.kernels


def batch_layout(config: Config, world_size: int) -> tuple[int, int]:
    """(micro_batch_size, grad_accum_steps), with global_batch_size = micro_batch_size *
    grad_accum_steps * world_size. "auto" stands for the largest, a rank's complete share, until a
    number has been found for it."""
    total = config.train.global_batch_size
    # Ranks of unequal shares would need weights in the mean over ranks.
    if total % world_size:
        works = divisors(total)
        above = bisect.bisect(works, world_size)
        near = works[above - 1 : above + 1]
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of world_size={world_size}; "
            f"start {' or '.join(map(str, near))} ranks, "
            f"or try --train.global-batch-size {math.ceil(total / world_size) * world_size}"
        )

    # A rank's share is cut into micro batches of one size.
    share = total // world_size
    micro = config.train.micro_batch_size
    if micro is None or micro == "auto":
        micro = share
    if total % (micro * world_size):
        works = divisors(share)
        fits = works[bisect.bisect(works, micro) - 1]
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of "
            f"micro_batch_size*world_size={micro * world_size} ({micro}*{world_size}); try "
            f"--train.micro-batch-size {fits}"
        )
    return micro, total // (micro * world_size)


def divisors(total: int) -> list[int]:
    """The numbers that divide a batch into equal parts, rising."""
    return [n for n in range(1, total + 1) if total % n == 0]


def largest_world_size(config: Config, available: int) -> int:
    """The largest number of ranks, at most `available`, that the batch can be split over. Raises
    ConfigError where one rank is too many already."""
    for world_size in reversed(divisors(config.train.global_batch_size)):
        if 1 < world_size <= available:
            with contextlib.suppress(ConfigError):
                batch_layout(config, world_size)
                return world_size
    batch_layout(config, 1)
    return 1


def make_curriculum(config: Config) -> Curriculum:
    """The curriculum of a run, at its start."""
    c = config.curriculum
    return Curriculum(
        cluster_edges(config),
        pacing(config),
        order=c.order,
        stages=c.stages,
        only_cluster=c.only_cluster,
    )


def least_steps(config: Config) -> int:
    """Steps until the curriculum is complete, if every stage is as short as it can be."""
    return config.curriculum.n_clusters * pacing(config).shortest_stage


def pacing(config: Config) -> Pacing:
    """The pacing rule of a run, with its settings."""
    name = config.curriculum.pacing
    rule = look_up(PACINGS, name, "curriculum.pacing")
    return rule(**{field: getattr(config.curriculum, field) for field in pacing_settings(name)})


def pacing_settings(name: str) -> list[str]:
    """The fields of `CurriculumConfig` that a pacing rule is made with."""
    # A rule names its settings as the config does, so that a new one needs no entry anywhere else.
    return list(inspect.signature(look_up(PACINGS, name, "curriculum.pacing")).parameters)


def cluster_edges(config: Config) -> tuple[float, ...]:
    """The edges of the clusters: N + 1 noise levels from 0 to 1."""
    return look_up(CLUSTERS, config.curriculum.clusters, "curriculum.clusters")(config)


def _uniform_edges(config: Config) -> tuple[float, ...]:
    return uniform_clusters(config.curriculum.n_clusters)


def _snr_edges(config: Config) -> tuple[float, ...]:
    """Edges at the SNR that the uniform ones have under the cosine schedule."""
    timesteps = config.diffusion.timesteps
    own = noise_schedule.make_betas(config.diffusion.schedule, timesteps)
    cosine = noise_schedule.make_betas("cosine", timesteps)
    return snr_clusters(
        config.curriculum.n_clusters, noise_schedule.log_snr(own), noise_schedule.log_snr(cosine)
    )


# The values of curriculum.clusters
CLUSTERS: dict[str, Callable[[Config], tuple[float, ...]]] = {
    "uniform": _uniform_edges,
    "snr": _snr_edges,
}
