"""The noise axis, cut into clusters of denoising difficulty (section 4.1 of arXiv:2403.10348).

Edges are noise levels `u`: N + 1 increasing numbers from 0 (no noise) to 1 (pure noise).
Cluster C_i is [edges[i - 1], edges[i]); C_1 is the hardest, C_N the easiest.
"""

import itertools

import numpy as np

from largescale.errors import ConfigError


def uniform_clusters(n_clusters: int) -> tuple[float, ...]:
    """Equal shares of the noise axis, so of the training distribution: C_i = [(i - 1) / N, i /
    N)."""
    if n_clusters < 1:
        raise ConfigError(f"n_clusters={n_clusters} must be at least 1; the paper uses 20")
    return tuple(i / n_clusters for i in range(n_clusters + 1))


def snr_clusters(
    n_clusters: int, log_snr: np.ndarray, reference_log_snr: np.ndarray
) -> tuple[float, ...]:
    """Edges at the SNR that the uniform edges have under another schedule.

    `log_snr`, `reference_log_snr`: (T,), falling with t. An inner edge is the first timestep whose
    SNR is not above the reference's SNR at that edge, so a schedule matched to itself gives the
    uniform clusters. Raises ConfigError, with the largest N that works, where a cluster gets no
    timestep.
    """

    def edges(n: int) -> tuple[float, ...]:
        inner = [round(edge * len(reference_log_snr)) for edge in uniform_clusters(n)[1:-1]]
        first = np.searchsorted(-log_snr, -reference_log_snr[np.array(inner, dtype=int)])
        return (0.0, *(float(t) / len(log_snr) for t in first), 1.0)

    # Raises the error of a number of clusters below 1.
    uniform_clusters(n_clusters)
    # The largest N that gives every cluster a timestep. N = 1 always does.
    for n in range(min(n_clusters, len(log_snr), len(reference_log_snr)), 0, -1):
        found = edges(n)
        if all(low < high for low, high in itertools.pairwise(found)):
            break
    if n < n_clusters:
        raise ConfigError(
            f"n_clusters={n_clusters} leaves a cluster without timesteps under this schedule; "
            f"use at most N={n}, or --curriculum.clusters uniform"
        )
    return found
