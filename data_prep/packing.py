"""The options that every packer has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from data_prep import images
from data_prep.listing import Listings
from data_prep.sources import Source
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts
from largescale.data.format import read_manifest
from largescale.distributed.ranks import check_cuda
from largescale.errors import ConfigError
from largescale.models.half_precision import check_on_cpu


@dataclass(frozen=True, kw_only=True)
class Packing:
    out: Path
    """The folder for the shards. Run again after an interruption, packing continues there."""
    vae: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(required)")] = None
    """The VAE that makes latents: a folder, or a name on the hub (stabilityai/sd-vae-ft-ema); none:
    pack pixels."""
    text_encoder: Annotated[
        str | None, tyro.conf.arg(help_behavior_hint="(required where there are captions)")
    ] = None
    """The text encoder of captions: open_clip:ViT-L-14/openai, or hf: and a folder or a name on the
    hub (hf:openai/clip-vit-large-patch14); none: pack the texts only."""
    max_tokens: int | None = None
    """Cut captions after so many tokens; by default the text encoder's own limit."""
    resolution: int = 256
    """Height and width of the images, in pixels, after ADM's centre crop."""
    mirror: bool = True
    """Pack the latents of the mirrored image too, for horizontal flips."""
    min_side: int | None = None
    """Leave out images with a shorter side than this; by default a quarter of the resolution."""
    max_pixels: int = images.MAX_PIXELS
    """Leave out images with more pixels than this, without decoding them."""
    rows_per_shard: int = 4096
    """Images in a shard. A rank keeps one shard in memory; an interruption loses at most that."""
    batch_size: int = 64
    """Images that are encoded at a time."""
    workers: int | None = None
    """Threads that decode images; by default one per core, shared among the ranks of a machine."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What the encoders run on; by default a GPU if there is one."""
    precision: Literal["fp32", "bf16"] | None = None
    """What the encoders compute in; by default bf16 on a GPU, fp32 on a CPU."""

    append: bool = False
    """Add the images to the set that --out holds already, as new rows behind its own. Its settings
    must be those of the set. Images that it has, by their pixels, are left out."""

    engine: Literal["ranks", "ray"] = "ranks"
    """What shares the work among processes. ranks: torchrun or srun, or there is one process. ray:
    a Ray cluster, on which this program is started once."""
    address: str = "auto"
    """With --engine ray: the cluster's address. auto: of the cluster on this machine, or
    RAY_ADDRESS; HOST:PORT; local: a cluster of this machine alone, which ends with the program."""

    licence: str | None = None
    """The licence of the images, which the set's card names: as the hub spells it, such as
    cc-by-4.0, or any other name."""

    def source(self) -> Source:
        raise NotImplementedError

    @property
    def listings(self) -> Listings:
        """Where a source keeps the list of what it holds, for all ranks."""
        return Listings(self.out / "packing")

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError for --out, before anything is read."""
        check_counts(self, "resolution", "rows_per_shard", "batch_size", "workers", "max_pixels")
        check_counts(self, "max_tokens", "min_side")
        if self.vae is None:
            raise ConfigError(
                "give --vae a folder or a hub name (such as stabilityai/sd-vae-ft-ema) to pack "
                "latents, or --vae none to pack pixels"
            )
        # With Ray, GPUs are needed where the encoders are.
        if self.engine == "ranks":
            check_cuda(self.device)
        if self.device == "cpu" and self.precision:
            check_on_cpu(self.precision, "--precision {}")
        if self.engine != "ray" and self.address != "auto":
            raise ConfigError(f"--address {self.address} is for --engine ray; give both or neither")
        require_outside_checkpoints(self.out, "--out")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file; give a folder")
        if self.append:
            read_manifest(self.out)  # there has to be a set that can grow
