"""Mean and standard deviation of each channel of latents: measured shard by shard, merged without
loss of precision, and chosen by data.normalize."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from largescale.data.format import DatasetInfo
from largescale.errors import DataError

Array = npt.NDArray[Any]
Normalize = Literal["encoder", "dataset", "none"]
# A channel that varies less is constant: float16 has steps of 6e-8 near 0.
SMALLEST_STD = 1e-6


@dataclass(frozen=True)
class Statistics:
    """Of each channel over `images` latents, as a network sees them before they are normalised."""

    images: int
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    encoder: str | None = None
    """The identity of the encoder that made the latents."""

    def __post_init__(self) -> None:
        # JSON gives lists.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "variance", tuple(self.variance))

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(np.sqrt(self.variance).tolist())


def measure(latents: Array, kind: str) -> Statistics:
    """Of latents (n, C, H, W) as stored; of moments, of the latents that are drawn from them."""
    latents = latents.astype(np.float64)
    channels = latents.shape[1]
    within: Any = 0.0
    if kind == "moments":
        channels //= 2
        # A draw's variance is that of the means, and the mean of the variances. The bounds are
        # those of to_x_start.
        logvar = latents[:, channels:].clip(-30, 20)
        within = np.exp(logvar).mean((0, 2, 3))
        latents = latents[:, :channels]
    mean = latents.mean((0, 2, 3))
    variance = ((latents - mean[:, None, None]) ** 2).mean((0, 2, 3)) + within
    return Statistics(len(latents), tuple(mean.tolist()), tuple(variance.tolist()))


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of all images of the parts (Chan et al., 1979), in their order. Raises
    ValueError where there are none."""
    images = 0
    mean = variance = np.zeros(1)
    for part in parts:
        total = images + part.images
        share = part.images / total
        delta = np.array(part.mean) - mean
        mean = mean + delta * share
        # Weighted, and not summed: no large number loses the small ones.
        variance = variance * (1 - share) + np.array(part.variance) * share
        variance = variance + delta**2 * share * (1 - share)
        images = total
    if not images:
        raise ValueError("no latents to measure")
    return Statistics(images, tuple(mean.tolist()), tuple(variance.tolist()))


def measure_rows(latents: list[Array], kind: str) -> Statistics:
    """Of a list of latents (C, H, W), a few at a time: in float64 they need four times the memory."""
    chunks = range(0, len(latents), 64)
    return merge(measure(np.stack(latents[first : first + 64]), kind) for first in chunks)


def from_manifest(manifest: dict[str, Any], path: Path) -> Statistics | None:
    """The statistics in a manifest; None where it has none. Raises DataError where they are not of
    these latents."""
    found = manifest.get("statistics")
    if found is None:
        return None
    info: DatasetInfo = manifest["info"]
    channels = info.x_shape[0]
    try:
        statistics = Statistics(**found)
        numbers = np.array([statistics.mean, statistics.variance], np.float64)
        sound = numbers.shape == (2, channels) and np.isfinite(numbers).all() and statistics.images
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the statistics in {path}'s manifest cannot be used ({error}); {_AGAIN}"
        ) from error
    if not sound or statistics.encoder != info.encoders.get("vae"):
        raise DataError(
            f"the statistics in {path}'s manifest are of {len(statistics.mean)} channels of "
            f"{statistics.encoder}, its latents have {channels} channels of "
            f"{info.encoders.get('vae')}: they are another encoder's; {_AGAIN}"
        )
    return statistics


_AGAIN = "measure them anew with python -m data_prep.describe DATA --measure"


def normalized(manifest: dict[str, Any], how: Normalize, path: Path) -> DatasetInfo:
    """The data set as data.normalize has it: what makes x_start of its latents. Raises DataError
    where it lacks what that needs."""
    info: DatasetInfo = manifest["info"]
    if how == "encoder":
        return info
    if info.kind == "pixels":
        raise DataError(
            f"{path} holds pixels, which lie in [-1, 1] always; leave out --data.normalize {how}"
        )
    if how == "none":
        return replace(info, scale_factor=1.0, latent_mean=None, latent_std=None)
    statistics = from_manifest(manifest, path)
    if statistics is None:
        raise DataError(f"{path} has no statistics for --data.normalize dataset; {_AGAIN}")
    for channel, std in enumerate(statistics.std):
        if std < SMALLEST_STD:
            raise DataError(
                f"channel {channel} of the latents in {path} is constant, and cannot be "
                "normalised; set --data.normalize encoder"
            )
    return replace(info, scale_factor=1.0, latent_mean=statistics.mean, latent_std=statistics.std)
