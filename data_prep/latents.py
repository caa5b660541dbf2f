"""Repacks latents that others have packed, without an encoder: REPA's and EDM2's .npy folders,
LightningDiT's safetensors, micro_diffusion's MDS shards, and `datasets` on disk.

    python -m data_prep.latents --latents imagenet_256/vae-sd --vae stabilityai/sd-vae-ft-mse --out
        data/imagenet256

The VAE is only named by its hash, and says how its latents are scaled; it encodes nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_prep import program
from data_prep.content import content_hash
from data_prep.encoding import Content, EncodedRow, Encoding, resolved
from data_prep.latent_files import NpyFolder, open_source
from data_prep.latent_sources import LatentSource, RowFiles
from data_prep.listing import Listings
from data_prep.packing import PackerOptions
from data_prep.sources import Item, Source
from largescale.data.format import DatasetInfo
from largescale.data.statistics import measure_rows
from largescale.encoders.normalization import Normalization
from largescale.encoders.text import TextEncoder
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError, DataError

# Latents that are measured before any is packed, to compare them with statistics beside them.
MEASURED = 256


@dataclass(frozen=True, kw_only=True)
class Latents(PackerOptions):
    latents: Path
    """The folder that holds them."""
    vae: str | None = None
    """The VAE that made the latents, a folder, a file or a name on the hub: its hash becomes a part
    of the set, so that samples can be decoded. By default it is not known."""
    scale_factor: float | None = None
    """x_start is a latent times this; by default the VAE's, or 1."""
    column: str | None = None
    """The column of latents in MDS or datasets; by default latent, latents or moments."""
    shape: tuple[int, int, int] | None = None
    """Channels, height and width of a row's values in MDS or datasets; by default 4 channels."""
    kind: Literal["latents", "moments"] | None = None
    """What a row of MDS or datasets is: latents, or moments, which are means and then
    log-variances; by default latents."""

    def check(self) -> None:
        super().check()
        if self.scale_factor is not None and not 0 < self.scale_factor < 1000:
            raise ConfigError(
                f"--scale-factor {self.scale_factor} must lie in (0, 1000); SD's is 0.18215"
            )
        if not self.latents.is_dir():
            raise ConfigError(f"--latents {self.latents} is not a folder; give the one of latents")

    def source(self, listings: Listings) -> NpyFolder | RowFiles:
        return open_source(self.latents, self.column, self.shape, self.kind, listings)

    def encoding(self, source: Source) -> Encoding:
        assert isinstance(source, LatentSource)
        return Stored(self, source)


class Stored:
    """Latents as a set stores them: in float16, without the encoder's shift, and not scaled.
    Nothing is encoded.

    Raises ConfigError for a VAE that did not make such latents, and DataError where the statistics
    beside them are not theirs.
    """

    device = torch.device("cpu")
    batch_size = 64
    text: TextEncoder | None = None
    has_encoded = False

    def __init__(self, options: Latents, source: LatentSource) -> None:
        self._options, self._source = options, source
        _check_statistics(source, options.latents)
        torch.set_num_threads(1)  # the map to colours is the same on any number of cores
        vae = load_vae(options.vae, self.device) if options.vae else None
        # Statistics beside the latents are how their own program normalises them.
        norm = vae.normalization if vae else Normalization()
        if source.mean:
            norm = Normalization(1.0, source.mean, source.std)
        # What the user gives comes last, so that it wins.
        if options.scale_factor is not None:
            norm = replace(norm, scale_factor=options.scale_factor)
        self._info = DatasetInfo(
            source.name,
            source.kind,
            source.shape,
            source.num_classes,
            norm.scale_factor,
            {"vae": vae.identity} if vae else {},
            latent_mean=norm.mean,
            latent_std=norm.std,
        )
        source.notes.append(f"{source.kind} {source.shape} of {source.format}")
        self._shift = vae.shift_factor if vae else 0.0
        self.vae: Vae | None = None
        if vae:
            self._check_vae(vae)
            self.vae = vae.normalized(norm)
        else:
            source.notes.append("of an encoder that --vae does not name")

    def _check_vae(self, vae: Vae) -> None:
        channels, *sides = self._info.x_shape
        # Samples could not be decoded, which would be found after the training.
        if vae.latent_channels != channels:
            raise ConfigError(
                f"--vae {self._options.vae} has latents of {vae.latent_channels} channels, those "
                f"in {self._options.latents} have {channels}; give the VAE that made them"
            )
        # It could not decode them.
        if vae.only_resolution:
            side = vae.only_resolution // vae.downsampling
            if sides != [side, side]:
                raise ConfigError(
                    f"--vae {self._options.vae} has latents of {side} x {side}, those in "
                    f"{self._options.latents} are {sides[0]} x {sides[1]}; give the VAE that made "
                    "them"
                )

    def info(self) -> DatasetInfo:
        return self._info

    def settings(self) -> dict[str, Any]:
        # A VAE's identity is that of its weights, and the shift stands in its config.
        return {"crop": "cropped and encoded by others", "shift_factor": self._shift}

    def made_with(self) -> dict[str, str | None]:
        return {"vae": resolved(self._options.vae)}

    def decode(self, item: Item) -> Content:
        """The latent as it is stored, and where there is one, behind it that of the mirrored image:
        (1 or 2, C, H, W) float16."""
        channels = self._info.x_shape[0]
        stored = []
        for latent in self._source.latents(item.id, item.read()):
            latent = latent.astype(np.float32)
            # Scaled latents are shifted already.
            if self._source.scaled:
                latent /= self._info.scale_factor
            else:
                latent[:channels] -= self._shift
            # A value beyond float16 becomes infinite, which the shard refuses with the row's id.
            with np.errstate(over="ignore"):
                stored.append(latent.astype(np.float16))
        return np.stack(stored)

    def encode(self, batch: list[tuple[Item, Content]]) -> list[EncodedRow]:
        rows: list[EncodedRow] = []
        for item, content in batch:
            row: dict[str, Any] = {"id": item.id, "label": item.label}
            row |= dict(zip(("latent", "latent_mirror"), content, strict=False))
            if self._source.captioned:
                row["captions"] = list(item.captions)
            # Captions are packed as texts, which nothing cuts.
            rows.append((row, 0, content_hash(content)))
        return rows


def _check_statistics(source: LatentSource, folder: Path) -> None:
    """Raises DataError where the statistics beside latents are not theirs."""
    if source.mean is None or source.std is None:
        return
    # From all of the first rows: shards have images of all classes, in their loader's order.
    latents = []
    for item in source.part(0, MEASURED):
        latents.append(source.latents(item.id, item.read())[0])
    found = measure_rows(latents, source.kind)
    off = np.abs(np.array(found.mean) - source.mean) / source.std
    ratio = np.array(found.std) / source.std
    # Wide bounds: a few hundred latents of the right encoder differ a little from all of them.
    if off.max() > 1 or ratio.max() > 2 or ratio.min() < 0.5:
        channel = int(np.argmax(np.maximum(off, np.abs(np.log2(ratio)))))
        raise DataError(
            f"the statistics beside the latents in {folder} are another encoder's: channel "
            f"{channel} has mean {source.mean[channel]:.3g} and std {source.std[channel]:.3g} "
            f"there, {found.mean[channel]:.3g} and {found.std[channel]:.3g} in {found.images} "
            "latents; restore the file, or remove it"
        )


def main(args: Sequence[str] | None = None) -> int:
    return program.main(Latents, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
