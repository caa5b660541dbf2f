"""Repacks latents that others have packed, without an encoder: REPA's and EDM2's .npy folders,
LightningDiT's safetensors, micro_diffusion's MDS shards, and `datasets` on disk.

    python -m data_prep.latents --latents imagenet_256/vae-sd --vae stabilityai/sd-vae-ft-mse --out
        data/imagenet256

The VAE is only named by its hash, and says how its latents are scaled; it encodes nothing.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from data_prep.latent_sources import LatentSource, open_source
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.statistics import measure_rows
from largescale.data.writer import ShardWriter
from largescale.encoders.normalization import Normalization
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError, DataError

# Latents that are measured before all are written, to compare them with statistics beside them.
SAMPLE = 256


@dataclass(frozen=True, kw_only=True)
class Latents:
    latents: Path
    """The folder that holds them."""
    out: Path
    """The folder for the shards. Run again, it is written anew."""
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
    rows_per_shard: int = 4096
    """Images in a shard."""

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError for --out."""
        check_counts(self, "rows_per_shard")
        require_outside_checkpoints(self.out, "--out")
        if self.scale_factor is not None and not 0 < self.scale_factor < 1000:
            raise ConfigError(
                f"--scale-factor {self.scale_factor} must lie in (0, 1000); SD's is 0.18215"
            )
        if not self.latents.is_dir():
            raise ConfigError(f"--latents {self.latents} is not a folder; give the one of latents")


def pack(options: Latents) -> str:
    """Writes the set; returns a line about it. Raises DataError and ConfigError."""
    options.check()
    source = open_source(options.latents, options.column, options.shape, options.kind)
    # Nothing is encoded here: only what the VAE is, and how it normalises, is asked of it.
    vae = load_vae(options.vae, torch.device("cpu")) if options.vae else None
    info = _info(source, vae, options)
    _check_statistics(source, options.latents)
    about: dict[str, Any] = {
        "job": {
            "program": "data_prep.latents",
            "format": source.format,
            "latents": str(options.latents.resolve()),
            "images": source.size,
        }
    }
    if options.vae:
        # A folder by its full path: describe looks for it later, from another working folder.
        place = Path(options.vae).expanduser()
        about["made_with"] = {"vae": str(place.resolve()) if place.exists() else options.vae}
    with ShardWriter(options.out, info, options.rows_per_shard, **about) as writer:
        for row in tqdm(_rows(source, vae, info), "repack", source.size, unit="image", delay=2):
            writer.write(**row)
    data = ShardDataset(options.out)
    encoder = info.encoders.get("vae", "of an encoder that --vae did not name")
    return f"{options.out}: {len(data):,} {info.kind} {info.shape} of {source.format}, {encoder}"


def _info(source: LatentSource, vae: Vae | None, options: Latents) -> DatasetInfo:
    """What the set is. Raises ConfigError for a VAE that did not make such latents."""
    norm = vae.normalization if vae else Normalization()
    # Statistics beside the latents are how their own program normalises them.
    if source.mean:
        norm = Normalization(1.0, source.mean, source.std)
    # What the user gives comes last, so that it wins.
    if options.scale_factor is not None:
        norm = replace(norm, scale_factor=options.scale_factor)
    info = DatasetInfo(
        source.name,
        source.kind,
        source.shape,
        source.num_classes,
        norm.scale_factor,
        {"vae": vae.identity} if vae else {},
        latent_mean=norm.mean,
        latent_std=norm.std,
    )
    if vae and vae.latent_channels != info.x_shape[0]:
        raise ConfigError(
            f"--vae {options.vae} has latents of {vae.latent_channels} channels, those in "
            f"{options.latents} have {info.x_shape[0]}; give the VAE that made them"
        )
    return info


def _check_statistics(source: LatentSource, folder: Path) -> None:
    """Raises DataError where the statistics beside latents are not theirs."""
    if source.mean is None or source.std is None:
        return
    # From all of the first rows: shards have images of all classes, in their loader's order.
    latents = [row["latent"] for row in islice(source.rows(), SAMPLE)]
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


def _rows(source: LatentSource, vae: Vae | None, info: DatasetInfo) -> Iterator[dict[str, Any]]:
    """The rows as they are stored: in float16, without the encoder's shift, and not scaled."""
    channels = info.x_shape[0]
    shift = vae.shift_factor if vae else 0.0
    scaled = info.scale_factor if source.scaled else 1.0
    for row in source.rows():
        for name in ("latent", "latent_mirror"):
            if name not in row:
                continue
            latent = row[name].astype(np.float32)
            # Scaled latents are shifted already.
            if source.scaled:
                latent = latent / scaled
            else:
                latent[:channels] -= shift
            # A value beyond float16 becomes infinite, which the writer refuses with the row's id.
            with np.errstate(over="ignore"):
                row[name] = latent.astype(np.float16)
        yield row


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Latents, args, program="data_prep.latents", description=__doc__)
    return run_program(lambda: print(pack(options)), "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
