"""Statistics of a set of images, to hold samples against: ADM's npz (mu, sigma, mu_s, sigma_s),
pytorch-fid's (mu, sigma), and our own, which hold the same and more.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.scoring import npz
from eval.scoring.npz import Array
from largescale.errors import DataError
from largescale.host.files import fsync_dir

ARRAYS = {
    "mean": "mu",
    "cov": "sigma",
    "mean_spatial": "mu_s",
    "cov_spatial": "sigma_s",
    "features": "features",
}
ABOUT, HASH = "largescale", "sha256"  # keys of our own statistics


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Of the features of a set of images: what a Frechet distance needs, and what tells whether it
    may be taken."""

    mean: Array  # (D,) float64
    cov: Array  # (D, D)
    mean_spatial: Array | None = None  # (S,): sFID's
    cov_spatial: Array | None = None  # (S, S)
    count: int | None = None  # of images; None where the file does not say, as below
    extractor: str | None = None  # its identity
    resolution: tuple[int, int] | None = None  # (H, W) of the images
    features: Array | None = None  # (N, D) float32, of all or some of the images
    facts: dict[str, Any] = field(default_factory=dict)  # what else its writer says, as JSON has it

    def __post_init__(self) -> None:
        """Raises ValueError for arrays that do not fit each other, or are not finite."""
        for mean, cov in ((self.mean, self.cov), (self.mean_spatial, self.cov_spatial)):
            shapes = None if mean is None else mean.shape, None if cov is None else cov.shape
            if shapes != (None, None) and (
                mean is None or mean.ndim != 1 or shapes[1] != mean.shape * 2
            ):
                raise ValueError(
                    f"a mean of shape {shapes[0]} does not fit a covariance of shape {shapes[1]}"
                )
        if self.features is not None and self.features.shape[1:] != self.mean.shape:
            raise ValueError(
                f"features of shape {self.features.shape} do not fit a mean of shape "
                f"{self.mean.shape}"
            )
        if not all(np.isfinite(array).all() for array in self._arrays().values()):
            raise ValueError("they are not finite")

    def _arrays(self) -> dict[str, Array]:
        return {
            key: getattr(self, name)
            for name, key in ARRAYS.items()
            if getattr(self, name) is not None
        }


def write_statistics(path: Path, statistics: Statistics) -> None:
    """An npz with ADM's keys, the rest under one of ours, and a hash over all of it; whole or
    absent."""
    about = {
        "count": statistics.count,
        "extractor": statistics.extractor,
        "resolution": statistics.resolution,
        "facts": statistics.facts,
    }
    arrays = {
        key: array.astype(np.float32 if key == "features" else np.float64)
        for key, array in statistics._arrays().items()
    } | {ABOUT: np.array(json.dumps(about))}
    content: dict[str, Any] = {**arrays, HASH: np.array(_digest(arrays))}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def read_statistics(path: Path) -> Statistics:
    """Ours, ADM's or pytorch-fid's. Raises DataError for what is missing, damaged, or holds
    none."""
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; give statistics (an .npz of ours, ADM's or pytorch-fid's), or "
            "images"
        )
    with npz.reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= names:
            raise DataError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}, and no statistics (mu, "
                "sigma); give a file with them, or images"
            )
        arrays = {
            name: npz.load(archive, f"{name}.npy")
            for name in {*ARRAYS.values(), ABOUT, HASH} & names
        }
        if ABOUT in arrays and str(arrays.pop(HASH, "")) != _digest(arrays):
            raise ValueError("its hash is not that of its content")
        about = json.loads(str(arrays.get(ABOUT, "{}")))
        # ADM's files have images too, all or some
        resolution = about.get("resolution") or (
            npz.header(archive, "arr_0.npy")[0][1:3] if "arr_0" in names else None
        )
        numbers = {
            name: arrays[key].astype(np.float32 if key == "features" else np.float64)
            for name, key in ARRAYS.items()
            if key in arrays
        }
        return Statistics(
            **numbers,
            count=about.get("count"),
            extractor=about.get("extractor"),
            resolution=tuple(resolution) if resolution else None,
            facts=about.get("facts", {}),
        )


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
