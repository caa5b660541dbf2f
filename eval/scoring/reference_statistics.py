"""Statistics of a set of images, which samples are compared with: ADM's npz (mu, sigma, mu_s,
sigma_s), pytorch-fid's (mu, sigma), and our own, which hold the same and more.
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

# Fields of Statistics -> keys of the file, which are ADM's.
ARRAYS = {
    "mean": "mu",
    "cov": "sigma",
    "mean_spatial": "mu_s",
    "cov_spatial": "sigma_s",
    "features": "features",
}
# Keys that only our own files have.
ABOUT = "largescale"
HASH = "sha256"


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of the features of a set of images: what a Frechet distance needs, and what
    decides whether it may be computed."""

    mean: Array  # (D,) float64
    cov: Array  # (D, D)
    mean_spatial: Array | None = None  # (S,): sFID's
    cov_spatial: Array | None = None  # (S, S)
    count: int | None = None  # of images; None, here and below, where the file does not have it
    extractor: str | None = None  # its identity
    resolution: tuple[int, int] | None = None  # (H, W) of the images
    features: Array | None = None  # (N, D) float32, of all or some of the images
    facts: dict[str, Any] = field(default_factory=dict)  # what else its writer recorded, plain JSON

    def __post_init__(self) -> None:
        """Raises ValueError for arrays that do not fit each other, or are not finite."""
        _check_shapes(self.mean, self.cov)
        _check_shapes(self.mean_spatial, self.cov_spatial)
        # Features of another network would give a wrong KID, not an error.
        if self.features is not None and self.features.shape[1:] != self.mean.shape:
            raise ValueError(
                f"features of shape {self.features.shape} do not fit a mean of shape "
                f"{self.mean.shape}"
            )
        for array in self._arrays().values():
            if not np.isfinite(array).all():
                raise ValueError("they are not finite")

    def _arrays(self) -> dict[str, Array]:
        """The arrays that there are, by their key in a file."""
        found = {}
        for name, key in ARRAYS.items():
            array = getattr(self, name)
            if array is not None:
                found[key] = array
        return found


def _check_shapes(mean: Array | None, cov: Array | None) -> None:
    """Raises ValueError unless they are (D,) and (D, D), or both None."""
    if mean is None and cov is None:
        return
    of_mean = None if mean is None else mean.shape
    of_cov = None if cov is None else cov.shape
    # A mean without its covariance is as useless as one of another width.
    if of_mean is None or len(of_mean) != 1 or of_cov != of_mean * 2:
        raise ValueError(f"a mean of shape {of_mean} does not fit a covariance of shape {of_cov}")


def _stored(key: str, array: Array) -> Array:
    """An array in the precision of its key: float32 for features, of which there are many."""
    return array.astype(np.float32 if key == "features" else np.float64)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write an npz with ADM's keys, the rest under one of ours, and a hash over all of it; complete
    or absent."""
    about = {
        "count": statistics.count,
        "extractor": statistics.extractor,
        "resolution": statistics.resolution,
        "facts": statistics.facts,
    }
    arrays = {}
    for key, array in statistics._arrays().items():
        arrays[key] = _stored(key, array)
    arrays[ABOUT] = np.array(json.dumps(about))
    # The hash is of the arrays as they are stored, in their precision.
    content: dict[str, Any] = {**arrays, HASH: np.array(_digest(arrays))}

    # Under another name until it is on the disk.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def may_hold_statistics(path: Path) -> bool:
    """Whether our statistics may be written to the file: it is absent, empty, or has older ones."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    return {ABOUT, HASH} <= npz.names(path)


def read_statistics(path: Path) -> Statistics:
    """Read our own statistics, ADM's or pytorch-fid's. Raises DataError for a file that is missing,
    damaged, or holds none."""
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; give statistics (an .npz of ours, ADM's or pytorch-fid's), or "
            "images"
        )
    with npz.reading(path), zipfile.ZipFile(path) as archive:
        names = npz.array_names(archive)
        # Sets of images are .npz files too.
        if not {"mu", "sigma"} <= names:
            raise DataError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}, and no statistics (mu, "
                "sigma); give a file with them, or images"
            )
        arrays = {}
        for name in {*ARRAYS.values(), ABOUT, HASH} & names:
            arrays[name] = npz.load(archive, f"{name}.npy")
        # Only our own files have a hash; others are as they are.
        if ABOUT in arrays and str(arrays.pop(HASH, "")) != _digest(arrays):
            raise ValueError("its hash is not that of its content")
        about = json.loads(str(arrays.get(ABOUT, "{}")))

        # ADM's files have images too, all or some, which show their size.
        resolution = about.get("resolution")
        if not resolution and "arr_0" in names:
            resolution = npz.header(archive, "arr_0.npy")[0][1:3]
        numbers = {}
        for name, key in ARRAYS.items():
            if key in arrays:
                numbers[name] = _stored(key, arrays[key])
        return Statistics(
            **numbers,
            count=about.get("count"),
            extractor=about.get("extractor"),
            resolution=tuple(resolution) if resolution else None,
            facts=about.get("facts", {}),
        )


def _digest(arrays: Mapping[str, Array]) -> str:
    """The hash of named arrays: of their names, types, shapes and content."""
    digest = hashlib.sha256()
    # Sorted: the order of an archive says nothing.
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
