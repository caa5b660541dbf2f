"""A worker of packing on a Ray cluster: what its node must have, and what it does. Nothing here
imports Ray."""

import dataclasses
import importlib
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_prep import finish
from data_prep.card import write_card
from data_prep.packer import Packer, announcement
from data_prep.packing import PackerOptions
from data_prep.progress import Progress
from largescale.data.format import MANIFEST
from largescale.data.parts import Parts
from largescale.distributed.ranks import check_cuda
from largescale.errors import ConfigError, DataError, LargescaleError
from largescale.host.files import sources_sha256
from largescale.host.machine import cores

# What shards depend on, besides our own code.
LIBRARIES = ("torch", "numpy", "pillow", "pyarrow", "diffusers", "transformers", "open_clip_torch")
# Seconds in which a new file is seen on another machine.
SEEN_S = 10.0


def versions() -> dict[str, str]:
    """The code and the libraries that shards depend on, as this process finds them."""
    found = {"Python": platform.python_version()}
    for name in ("largescale", "data_prep"):
        folder = Path(str(importlib.import_module(name).__file__)).parent
        found[f"the code of {name}"] = sources_sha256(folder)[:12]
    for name in LIBRARIES:
        found[name] = "none"
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def given_files(options: PackerOptions) -> dict[str, int | None]:
    """The files and folders that the options name, with the files' sizes."""
    found: dict[str, int | None] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            name = str(each).removeprefix("hf:") if isinstance(each, (str, Path)) else ""
            if field.name not in ("out", "id_prefix") and name and os.path.exists(name):
                found[name] = os.path.getsize(name) if os.path.isfile(name) else None
    return found


@dataclass(frozen=True)
class Wanted:
    """What the driver has, and every node must have too."""

    folder: str  # in which it was started: options may name files relative to it
    out: str
    marker: str  # a new file in `out`
    files: dict[str, int | None]
    versions: dict[str, str]

    def missing_here(self, again: bool = False) -> str | None:
        """What this node lacks, in words; None where it lacks nothing. The process is in the
        driver's folder from then on. `again`: the set may be finished by now."""
        found = versions()
        differ = []
        for name, wanted in self.versions.items():
            if found.get(name) != wanted:
                differ.append(f"{name} {found.get(name)} there, {wanted} here")
        if differ:
            return f"has other versions than this machine: {'; '.join(differ)}; install the same"
        if not os.path.isdir(self.folder):
            return f"does not see {self.folder}, where this program was started; share that folder"
        os.chdir(self.folder)
        for name, size in self.files.items():
            if not os.path.exists(name):
                return f"does not see {name}; put it where all nodes see it, under the same name"
            there = None if size is None else os.path.getsize(name)
            if there != size:
                return f"sees another {name}, of {there:,} bytes and not {size:,}; share one file"
        return None if again and (Path(self.out) / MANIFEST).exists() else self._cannot_write()

    def _cannot_write(self) -> str | None:
        remedy = "give an --out on storage that all nodes share"
        # NFS may have looked for the folder before it was made, and remembers that for a while.
        end = time.monotonic() + SEEN_S
        while not os.path.exists(self.marker):
            if time.monotonic() > end:
                return f"does not see {self.out}; {remedy}"
            time.sleep(0.2)
        try:
            mine = Path(f"{self.marker}.{uuid.uuid4().hex}")
            mine.touch()
            mine.unlink()
        except OSError as error:
            return f"cannot write into {self.out} ({error}); {remedy}"
        return None


@contextmanager
def marked(out: Path) -> Iterator[str]:
    """A new file in the folder, which goes again, with the folders that were made for it. The name
    of one that a kill has left says what it is."""
    made = []
    for folder in (*reversed(out.parents), out):
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            made.append(folder)
    marker = out / f".seen_by_all_{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield str(marker)
    finally:
        marker.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # not empty any more
                folder.rmdir()


class Begun(NamedTuple):
    """What a worker has found out once its encoders are loaded."""

    parts: Parts
    announcement: str
    images: int | None


class Packed(NamedTuple):
    """A part that a worker has packed."""

    worker: int
    images: int  # that it has, with those that were left out
    new: int  # that were encoded now
    counted: int  # by this process, since its first part


class Worker:
    """A process of the cluster that holds the encoders, and packs the parts that it is given."""

    def __init__(
        self, options: PackerOptions, wanted: Wanted, number: int, workers: int, own_cores: int
    ) -> None:
        self._options, self._wanted = options, wanted
        self._number, self._workers, self._cores = number, workers, own_cores
        self._packer: Packer | None = None
        self._stack = ExitStack()
        self._pack: Callable[[int], int] | None = None

    def begin(self) -> Begun:
        """Loads the encoders. Every other call comes after it."""
        with on_this_node():
            # Ray may have started it again, on a node that was not there before.
            if missing := self._wanted.missing_here(again=True):
                raise ConfigError(f"the node {missing}")
            # As a rank that shares its node with as many others as there are such workers on it. A
            # cluster that was started by srun has Slurm's own numbers here.
            beside = max(1, cores() // self._cores)
            place = {"RANK": self._number, "WORLD_SIZE": self._workers}
            place |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": beside}
            os.environ.update({name: str(value) for name, value in place.items()})
            check_cuda(self._options.device)
            packer = self._packer = self._packer or Packer(self._options)
            # It has listed the source for nothing.
            if packer.parts.finished:
                packer.discard()
            return Begun(packer.parts, announcement(packer.source), packer.source.size)

    def pack(self, part: int) -> Packed:
        """Packs a part."""
        with on_this_node():
            packer = self._packer
            assert packer
            if self._pack is None:
                packer.parts.join()
                packer.begin()
                pools = self._stack.enter_context(packer.pools())
                bar = tqdm(disable=True)
                self._progress = Progress(packer.parts.folder, self._number, self._workers, bar)
                self._pack = lambda part: packer.pack_part(part, *pools, self._progress)
            with packer.parts.hold(part):
                new = self._pack(part)
            images = packer.parts.record(part)["items"]
            return Packed(self._number, images, new, self._progress.images)

    def finish(self, done: str) -> str:
        """Writes the manifest, once every part is done; returns a line about the set."""
        with on_this_node():
            packer = self._packer
            assert packer
            # A worker that died may have written the manifest.
            if packer.parts.finished:
                write_card(packer.options.out)
            else:
                packer.parts.join()
                packer.begin()
                packer.finish()
            return finish.summary(packer.options.out, done)


@contextmanager
def on_this_node() -> Iterator[None]:
    """Errors that a user can correct name the node."""
    try:
        yield
    except LargescaleError as error:
        raise type(error)(f"on node {socket.gethostname()}: {error}") from error
    except OSError as error:
        raise DataError(
            f"on node {socket.gethostname()}: {error}; what is packed stays: correct the cause, "
            "and run again"
        ) from error
