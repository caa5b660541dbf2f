"""The options that every packer has, and those of packers of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.encoding import EncoderOptions, Encoders, Encoding
from data_prep.listing import Listings
from data_prep.sources import Source
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts
from largescale.data.format import read_manifest
from largescale.distributed.ranks import check_cuda
from largescale.errors import ConfigError
from largescale.host.files import is_unicode
from largescale.host.launch import printable


@dataclass(frozen=True, kw_only=True)
class PackerOptions:
    out: Path
    """The folder for the shards. Run again after an interruption, packing continues there."""
    rows_per_shard: int = 4096
    """Images in a shard. A rank keeps one shard in memory; an interruption loses at most that."""
    workers: int | None = None
    """Threads that read and decode; by default one per core, shared by the ranks of a machine."""

    append: bool = False
    """Add the images to the set that --out holds already, as new rows behind its own. Its settings
    must be those of the set. Images that it has, by their pixels or their latents, are left out."""

    id_prefix: str = ""
    """Put this before every id, such as more/: for --append, where the source has ids that other images
    of the set have."""

    engine: Literal["ranks", "ray"] = "ranks"
    """What shares the work among processes. ranks: torchrun or srun, or there is one process. ray:
    a Ray cluster, on which this program is started once."""
    address: str = "auto"
    """With --engine ray: the cluster's address. auto: of the cluster on this machine, or
    RAY_ADDRESS; HOST:PORT; local: a cluster of this machine alone, which ends with the program."""

    licence: str | None = None
    """The licence of the images, which the set's card names: as the hub spells it, such as
    cc-by-4.0, or any other name."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What a process needs besides its cores."""
        return "cpu"

    def source(self, listings: Listings) -> Source:
        """What is packed. `listings`: where the source keeps the list of what it holds, for all
        ranks. Raises DataError or ConfigError for one that cannot be."""
        raise NotImplementedError

    def encoding(self, source: Source) -> Encoding:
        """What makes rows of the source's items. Raises ConfigError for options that do not fit
        it."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError for --out, before anything is read."""
        check_counts(self, "rows_per_shard", "workers")
        # With Ray, GPUs are needed where the encoders are.
        if self.engine == "ranks":
            check_cuda(self.device)
        if self.engine != "ray" and self.address != "auto":
            raise ConfigError(f"--address {self.address} is for --engine ray; give both or neither")
        if not is_unicode(self.id_prefix):
            raise ConfigError(f"--id-prefix {printable(self.id_prefix)} is not UTF-8; give another")
        require_outside_checkpoints(self.out, "--out")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file; give a folder")
        for folder in self.out.parents:
            if folder.is_file():
                raise ConfigError(f"--out {self.out}: {folder} is a file; give another folder")
        if self.append:
            read_manifest(self.out)  # there has to be a set that can grow


@dataclass(frozen=True, kw_only=True)
class Packing(EncoderOptions, PackerOptions):
    def encoding(self, source: Source) -> Encoding:
        return Encoders(self, source)

    def check(self) -> None:
        self.check_encoders()
        super().check()
