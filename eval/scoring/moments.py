"""Mean and covariance of features that arrive batch by batch, from several ranks, with parts that
can be left out."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largescale.errors import ConfigError, DataError

Array = Tensor | npt.NDArray[Any]


def check_features(features: Tensor, name: str, at_least: int = 1) -> Tensor:
    """The features (N, D), if they can be used. Raises DataError for another shape, too few or not
    finite ones."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(
            f"{name} have shape {tuple(features.shape)}, not (N, D); flatten each sample's to one "
            "row"
        )
    if len(features) < at_least:
        raise DataError(f"{name} are of {len(features)} samples; give {at_least} or more")
    # A single value that is not finite would spread to all of the covariance.
    finite = features.isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0]
        raise DataError(
            f"{name} of {len(bad)} samples are not finite, first of sample {int(bad[0])}; look at "
            "that sample, and extract the features in float32"
        )
    return features.detach()


def check_width(width: int, other: int) -> None:
    """Raises DataError for features of two widths."""
    if width != other:
        raise DataError(
            f"{width} features a sample against {other}; take both from one layer of one network"
        )


class Moments:
    """Count, mean and covariance of features that arrive batch by batch, in float64.

    By the update of Chan, Golub and LeVeque (1979): deviations from the mean so far, so an offset
    of the features costs no digits."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        # (D,).
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        # (D, D), the sum of (x - mean)(x - mean)^T.
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def cov(self) -> Tensor:
        """The covariance (D, D), over count - 1, as numpy.cov(rowvar=False), torch-fidelity and ADM
        have it. Raises DataError."""
        if self.count < 2:
            raise DataError(f"a covariance of {self.count} samples; give 2 or more")
        return self.scatter / (self.count - 1)

    @property
    def singular(self) -> bool:
        """Whether there are too few samples for a covariance of full rank."""
        return self.count <= len(self.mean)

    def add(self, features: Tensor) -> None:
        """Add features (B, D). Raises DataError."""
        # In float64 from here on.
        rows = check_features(features, "features", at_least=0).to(self.mean)
        check_width(rows.shape[1], len(self.mean))
        if not len(rows):
            return
        mean = rows.mean(0)
        total = self.count + len(rows)
        delta = mean - self.mean
        # What lies between the two means counts as one more row of deviations.
        step = math.sqrt(self.count * len(rows) / total) * delta
        deviations = torch.cat([rows - mean, step[None]])
        self.scatter.addmm_(deviations.T, deviations)
        self.mean += delta * (len(rows) / total)
        self.count = total

    def merge(self, other: "Moments") -> None:
        """Add the samples of `other`. Raises DataError."""
        check_width(len(other.mean), len(self.mean))
        if not other.count:
            return
        # The same update as for a batch, whose scatter is known here.
        total = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        self.scatter.add_(other.scatter.to(self.scatter)).addr_(
            delta, delta, alpha=self.count * other.count / total
        )
        self.mean += delta * (other.count / total)
        self.count = total

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(len(self.mean), self.mean.device)
        both.merge(self)
        both.merge(other)
        return both


class GroupedMoments:
    """Moments in groups that can be left out one at a time: sample number i is in group i % groups,
    so what a group holds does not depend on batches and ranks."""

    def __init__(self, dim: int, groups: int = 10, device: torch.device | str = "cpu") -> None:
        if groups < 2:
            raise ConfigError(
                f"groups={groups} leaves nothing when one is left out; give 2 or more"
            )
        self.groups = [Moments(dim, device) for _ in range(groups)]

    def add(self, features: Tensor, numbers: Array) -> None:
        """Add features (B, D) of the samples of these numbers (B,). Raises DataError."""
        if len(numbers) != len(features):
            raise DataError(f"{len(numbers)} numbers for {len(features)} samples; give one each")
        # Checked before any group is changed.
        check_features(features, "features", at_least=0)
        group_of = torch.as_tensor(numbers, device=features.device) % len(self.groups)
        for number, group in enumerate(self.groups):
            group.add(features[group_of == number])

    def merge(self, other: "GroupedMoments") -> None:
        """Add the samples of another rank. Raises DataError."""
        if len(other.groups) != len(self.groups):
            raise DataError(
                f"{len(other.groups)} groups cannot join {len(self.groups)}; use one number on all "
                "ranks"
            )
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            mine.merge(theirs)

    def total(self) -> Moments:
        """The moments of all samples."""
        return self._sum(self.groups)

    def without(self, group: int) -> Moments:
        """The moments of all samples but those of one group."""
        return self._sum(self.groups[:group] + self.groups[group + 1 :])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The state as plain arrays: count (G,), mean (G, D), scatter (G, D, D)."""
        return {
            "count": np.array([g.count for g in self.groups], np.int64),
            "mean": torch.stack([g.mean for g in self.groups]).cpu().numpy(),
            "scatter": torch.stack([g.scatter for g in self.groups]).cpu().numpy(),
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, npt.NDArray[Any]], device: torch.device | str = "cpu"
    ) -> "GroupedMoments":
        """The groups of which `state` returned the state. Raises DataError."""
        shapes = (state["count"].shape, state["mean"].shape, state["scatter"].shape)
        groups, dim = state["mean"].shape if state["mean"].ndim == 2 else (0, 0)
        if shapes != ((groups,), (groups, dim), (groups, dim, dim)):
            raise DataError(
                f"count, mean and scatter have shapes {shapes}, not (G,), (G, D), (G, D, D); give "
                "what GroupedMoments.state returned"
            )
        new = cls(dim, groups, device)
        for i, group in enumerate(new.groups):
            group.count = int(state["count"][i])
            # torch.tensor copies, so that adding to the groups leaves the state as it was.
            group.mean = torch.tensor(state["mean"][i], dtype=torch.float64, device=device)
            group.scatter = torch.tensor(state["scatter"][i], dtype=torch.float64, device=device)
        return new

    def _sum(self, groups: list[Moments]) -> Moments:
        # One after another, in the same order every time: sums round.
        total = Moments(len(groups[0].mean), groups[0].mean.device)
        for moments in groups:
            total.merge(moments)
        return total
