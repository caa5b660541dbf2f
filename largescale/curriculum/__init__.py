"""The denoising-difficulty curriculum of arXiv:2403.10348. Pure: numpy only, usable in any training
loop."""

from largescale.curriculum.clusters import snr_clusters, uniform_clusters
from largescale.curriculum.curriculum import Curriculum, active_levels, stage
from largescale.curriculum.pacing import (
    PACINGS,
    FixedPacing,
    NoPacing,
    Pacing,
    PacingState,
    PatiencePacing,
)
from largescale.curriculum.times import logit_normal, sigma, timesteps

__all__ = [
    "PACINGS",
    "Curriculum",
    "FixedPacing",
    "NoPacing",
    "Pacing",
    "PacingState",
    "PatiencePacing",
    "active_levels",
    "logit_normal",
    "sigma",
    "snr_clusters",
    "stage",
    "timesteps",
    "uniform_clusters",
]
