"""What every packer does: decode, crop, encode, write. Killed at any moment, it continues when it
is run again.

    OUT/shard_00000.arrow ...  OUT/manifest.json     the data set (largescale/data/format.py)
    OUT/skipped.jsonl                                what was left out, and why
    OUT/content.hashes                               which images there are, to find doubles by later
                                                     (content.py)
    OUT/latent_rgb.json                              of latents: a linear map to colours, for
                                                     previews without the VAE
    OUT/README.md  OUT/images.png                    its card, for people and for the hub (card.py)
    OUT/packing/                                     while packing: the progress of each part
                                                     (parts.py)

A source is cut into parts (4,096 images, or one tar file), and rank r packs the parts r, r +
world_size, ... by itself: the data set does not depend on the number of ranks. Ranks coordinate
through files only: rank 0 finishes when it finds every part done.
"""

import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import tyro
from tqdm import tqdm

from data_prep import images
from data_prep.append import (
    ALREADY,
    AddedParts,
    check_alike,
    check_class_names,
    grown,
    known_images,
)
from data_prep.card import CARD, write_card
from data_prep.content import Known, content_hash, write_hashes
from data_prep.left_out import SKIPPED, Totals, write_skipped
from data_prep.listing import Listings
from data_prep.progress import Progress, write_plan
from data_prep.sources import Item, Source, first_reasons, source_changed
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import check_counts
from largescale.data.format import LATENT_RGB, CaptionInfo, DatasetInfo
from largescale.data.loader import to_x_start
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.data.writer import Shard, write_empty_caption, write_manifest
from largescale.distributed.ranks import check_cuda
from largescale.encoders.text import EncodedCaption, TextEncoder, load_text_encoder
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError, DataError, Stopped
from largescale.host.files import is_unicode, write_atomically
from largescale.host.launch import (
    env_local_rank,
    env_rank,
    env_world_size,
    local_world_size,
    printable,
)
from largescale.host.machine import cores
from largescale.host.signals import stop_requested
from largescale.models.half_precision import check_on_cpu

# Keys of a job that say where its source is, not what it holds.
PLACES = {
    "info.name",
    "source.images",
    "source.captions",
    "source.labels",
    "source.classes",
    "source.files",
    "source.shards",
}
ALREADY_PACKED = "already packed; to pack it anew, delete the folder first"
ROUND_TRIP_IMAGES = 8
HASHES = "content{}.hashes"
# Bytes of image files that wait in memory to be decoded.
MOST_HELD = 2**30

A = TypeVar("A")
B = TypeVar("B")
Image = npt.NDArray[np.uint8]  # (3, R, R)


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
    """Add the images to the set that --out holds already, as new rows behind its own. Its settings must
    be those of the set. Images that it has, by their pixels, are left out."""

    engine: Literal["ranks", "ray"] = "ranks"
    """What shares the work among processes. ranks: torchrun or srun, or there is one process. ray: a Ray
    cluster, on which this program is started once."""
    address: str = "auto"
    """With --engine ray: the cluster's address. auto: of the cluster on this machine, or RAY_ADDRESS;
    HOST:PORT; local: a cluster of this machine alone, which ends with the program."""

    licence: str | None = None
    """The licence of the images, which the set's card names: as the hub spells it, such as cc-by-4.0, or
    any other name."""

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


class Packer:
    """A source, the encoders, and this process's share of the parts."""

    def __init__(self, options: Packing) -> None:
        # Everything that can be wrong is found before the encoders are loaded.
        options.check()
        self.options = options
        self.source = options.source()
        try:
            self._prepare()
        except BaseException:
            self.source.discard()
            raise

    def _prepare(self) -> None:
        """Loads the encoders, and finds out what is packed already."""
        options = self.options
        self._check_text_encoder()

        # Ranks do not talk to each other: each takes parts that no other has claimed.
        self.rank = env_rank()
        self.world_size = env_world_size()
        if options.device == "cuda":
            # Of this rank, for every thread: memory that one takes elsewhere is on the first GPU.
            self.device = torch.device("cuda", env_local_rank() % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            self.precision = options.precision or "bf16"
        else:
            self.device = torch.device("cpu")
            self.precision = options.precision or "fp32"
            torch.set_num_threads(1)  # see `pack`

        # "none" is a choice, of pixels or of texts; None is an option that was not given.
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.vae: Vae | None = None
        if options.vae is not None and options.vae != "none":
            self.vae = load_vae(options.vae, self.device, dtype)
        self.text: TextEncoder | None = None
        spec = options.text_encoder
        if self.source.captioned and spec is not None and spec != "none":
            self.text = load_text_encoder(spec, self.device, dtype, options.max_tokens)

        # A quarter of the resolution: smaller images would be enlarged more than four times.
        self.info = self._info()
        self.min_side = options.min_side or max(options.resolution // 4, 1)
        parts = self.source.parts(options.rows_per_shard)
        place = (parts, self.rank, self.world_size, _places)
        self.base: ShardDataset | None = None  # the set that grows
        self._known: Known | None = None
        job = self._job()
        if options.append:
            self.base = ShardDataset(options.out)
            check_alike(self.base, job, self.source.captioned)
            check_class_names(self.base, self.source.class_names)
            self._known, notes = known_images(self.base)
            self.source.notes += notes
            # The set keeps its name.
            self.info = replace(self.info, name=self.base.info.name)
            self.parts: Parts = AddedParts(options.out, job, *place)
        else:
            self.parts = Parts(options.out, job, *place)
        self.parts.engine = None if options.engine == "ranks" else options.engine

    def _check_text_encoder(self) -> None:
        """Raises ConfigError unless captions have a text encoder, and only they."""
        options = self.options
        # Texts without embeddings cannot be trained on, so they have to be asked for.
        if self.source.captioned and options.text_encoder is None:
            raise ConfigError(
                "the images have captions: give --text-encoder (such as open_clip:ViT-L-14/openai "
                "or hf:openai/clip-vit-large-patch14), or --text-encoder none to keep the texts "
                "only"
            )
        if not self.source.captioned and options.text_encoder not in (None, "none"):
            raise ConfigError(
                f"--text-encoder {options.text_encoder}: {self.source.name} has no captions; omit "
                "it"
            )
        if options.max_tokens is not None and options.text_encoder is None:
            raise ConfigError(
                f"--max-tokens {options.max_tokens} is a setting of --text-encoder; give both or "
                "none"
            )

    def _info(self) -> DatasetInfo:
        side = self.options.resolution
        # Pixels, unless there is a VAE.
        info = DatasetInfo(
            name=self.source.name,
            num_classes=self.source.num_classes,
            kind="pixels",
            shape=(3, side, side),
        )
        if vae := self.vae:
            info = replace(
                info,
                kind=vae.kind,
                shape=vae.stored_shape(side),
                scale_factor=vae.scale_factor,
                latent_mean=vae.normalization.mean,
                latent_std=vae.normalization.std,
                encoders={"vae": vae.identity},
            )
        if text := self.text:
            info = replace(
                info,
                encoders=info.encoders | {"text": text.identity},
                captions=CaptionInfo(text.max_tokens, text.width, text.pooled_width),
            )
        return info

    def _job(self) -> dict[str, Any]:
        """Everything that the shards depend on, to the byte."""
        options = self.options
        job: dict[str, Any] = {
            "source": self.source.facts | {"fingerprint": self.source.fingerprint},
            "info": self.info.plain(),
            "rows_per_shard": options.rows_per_shard,
            "crop": "ADM's centre crop",
            "min_side": self.min_side,
            "max_pixels": options.max_pixels,
            "mirror": self.vae is not None and options.mirror,
        }
        # Encoders round differently in another type, on another device and in another batch.
        if self.vae or self.text:
            job |= {
                "precision": self.precision,
                "device": self.device.type,
                "batch_size": options.batch_size,
            }
        return job

    def __call__(self) -> str:
        """Packs this rank's parts; rank 0 then waits for the others' and writes the manifest.
        Returns a line to print."""
        start = time.perf_counter()
        try:
            if not self.parts.claim():
                self.source.discard()
                # A start that was killed right after the manifest has left no card.
                if self.rank == 0:
                    self.write_card()
                return self.summary(ALREADY_PACKED) if self.rank == 0 else ""
            if self.rank == 0:
                print(announcement(self.source), file=sys.stderr, flush=True)
            self.begin()
            new = self.pack()
            if self.rank == 0:
                self.finish()
        except Stopped:
            raise  # not a failure: the same ranks continue later
        except BaseException as error:
            self.parts.failed(error)
            self.source.discard()  # not where a job has begun
            raise
        finally:
            self.parts.close()
        if self.rank != 0:
            return ""
        seconds = time.perf_counter() - start
        return self.summary(
            f"rank 0 packed {new:,} now in {seconds:.1f} s, {new / seconds:.1f} images/s"
        )

    def begin(self) -> None:
        """What follows from the job in the folder, before the first part."""
        write_plan(self.parts.folder, self.source.size, self.parts.parts, len(self.source.skipped))
        # A job that was started under another name keeps it.
        if self.base is None:
            self.info = replace(self.info, name=self.parts.job["info"]["name"])

    @contextmanager
    def pools(self) -> Iterator[tuple[Executor, Executor, int]]:
        """Threads that decode, threads that encode, and how many batches they encode ahead."""
        cpus = max(1, cores() // local_world_size(os.environ))
        if self.device.type == "cuda":
            # A new thread starts on GPU 0. Left there, pinning memory would open a context on that
            # GPU for every rank.
            encoders = 1
            encoder = ThreadPoolExecutor(1, "encode", torch.cuda.set_device, (self.device,))
        else:
            # Threads of one core each: how many cores share a sum changes its last digit, and the
            # shards' bytes.
            encoders = cpus
            encoder = ThreadPoolExecutor(cpus, "encode", torch.set_num_threads, (1,))
        with ThreadPoolExecutor(self.options.workers or cpus, "decode") as decoders, encoder:
            try:
                yield decoders, encoder, encoders + 1
            except BaseException:
                # A pool's exit would first finish what is queued.
                decoders.shutdown(wait=False, cancel_futures=True)
                encoder.shutdown(wait=False, cancel_futures=True)
                raise

    def pack(self) -> int:
        """Packs this rank's parts; returns how many images were packed now."""
        new = 0
        done = sum(self.parts.record(part)["items"] for part in self.parts.mine)
        # What earlier starts have packed counts. In a log file each refresh is a line of its own,
        # so there are only a few.
        bar = tqdm(
            total=self._share(),
            initial=done,
            unit="image",
            desc="pack",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=self.rank != 0,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        with bar, self.pools() as pools:
            progress = Progress(self.parts.folder, self.rank, self.world_size, bar)
            for part in self.parts.mine:
                new += self.pack_part(part, *pools, progress)
        return new

    def _share(self) -> int | None:
        """The number of items of this rank's parts, where it is known."""
        rows = self.options.rows_per_shard
        size = self.source.size
        if size is None:
            return None
        # Only the last part may have fewer rows than a shard.
        return sum(min(rows, size - part * rows) for part in self.parts.mine)

    def pack_part(
        self,
        part: int,
        decoders: Executor,
        encoder: Executor,
        batches_ahead: int,
        progress: Progress,
    ) -> int:
        """Packs a part, from behind its last complete shard; returns how many images were encoded
        now."""
        record = self.parts.record(part)
        if record["done"] or self.parts.finished:
            return 0
        rows_per_shard = self.options.rows_per_shard
        encoded = 0
        items = islice(self.source.part(part, rows_per_shard), record["items"], None)
        while not record["done"]:
            # Decoders and encoders work ahead of this loop, in order.
            chunk = _Counted(islice(items, rows_per_shard))
            shard = Shard(self.info)
            hashes = b""
            decoded = _ahead(decoders, self.decode, chunk, 2 * self.options.batch_size)
            batches = self.batches(decoded, record["skipped"], progress)
            for rows in _ahead(encoder, self.encode, batches, batches_ahead):
                progress.update(len(rows))
                for row, cut, digest in rows:
                    shard.add(**row)
                    record["captions"] += len(row.get("captions", ()))
                    record["captions_cut"] = record.get("captions_cut", 0) + cut
                    hashes += digest

            # All images of a chunk may have been skipped.
            if len(shard):
                number = len(record["shards"])  # only tar files have more than one
                name = f"shard_{part:05d}" + (f"_{number}" if number else "") + ".arrow"
                name = self.parts.shard_name(name)
                record["shards"].append(shard.write(self.options.out / name))
                record["columns"] = shard.columns
                encoded += len(shard)

            # The shard first, then the record of it: a kill between the two packs it again.
            record["items"] += chunk.count
            if "hashes" in record:  # not where an older version has begun the part
                record["hashes"] += hashes.hex()
            record["done"] = chunk.count < rows_per_shard or self.source.size is not None
            self.parts.save(part, record)
        return encoded

    def decode(self, item: Item) -> tuple[Item, Image | str]:
        """The item with its cropped image, or with the reason why there is none."""
        options = self.options
        try:
            if not is_unicode(item.id):
                raise images.Unusable("its name is not UTF-8")
            data = item.read()
            if self.source.captioned and not item.captions:
                raise images.Unusable("it has no caption")
            image = images.decode(data, options.resolution, self.min_side, options.max_pixels)
            if self._known is not None and content_hash(image) in self._known:
                raise images.Unusable(ALREADY)
            return item, image
        except (images.Unusable, FileNotFoundError) as error:
            return item, str(error)
        except OSError as error:
            # A file system with errors must not thin out the data set.
            raise DataError(
                f"{item.id} cannot be read: {error}; when it can, run again to go on"
            ) from error

    def batches(
        self,
        decoded: Iterable[tuple[Item, Image | str]],
        skipped: list[list[str]],
        progress: Progress,
    ) -> Iterator[list[tuple[Item, Image]]]:
        """Batches of the images that could be decoded; the others are added to `skipped`."""
        batch: list[tuple[Item, Image]] = []
        for item, image in decoded:
            if stop_requested():
                raise Stopped
            # A text is the reason why there is no image.
            if isinstance(image, str):
                progress.update()
                skipped.append([item.id, image])
                progress.left_out(len(skipped))
            else:
                batch.append((item, image))
            if len(batch) == self.options.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def encode(self, batch: list[tuple[Item, Image]]) -> list[tuple[dict[str, Any], int, bytes]]:
        """The rows of a batch, as `Shard.add` takes them, each with the number of its captions that
        are cut, and the hash of its image."""
        rows: list[dict[str, Any]] = []
        pictures: list[Image] = []
        for item, picture in batch:
            row: dict[str, Any] = {"id": item.id, "label": item.label}
            if self.source.captioned:
                row["captions"] = list(item.captions)
            rows.append(row)
            pictures.append(picture)
        self._encode_images(np.stack(pictures), rows)
        cut = self._encode_captions(rows) if self.text else [0] * len(rows)
        return list(zip(rows, cut, map(content_hash, pictures), strict=True))

    def _encode_images(self, pixels: npt.NDArray[np.uint8], rows: list[dict[str, Any]]) -> None:
        """Adds to each row its image as it is stored, and the mirrored one where it is packed.
        `pixels`: (N, 3, R, R)."""
        stored: npt.NDArray[Any] = pixels
        mirrored: npt.NDArray[Any] | None = None
        # Pixels are mirrored when they are read. Latents are not those of the mirrored image.
        if self.vae:
            x = torch.from_numpy(pixels)
            if self.device.type == "cuda":
                x = x.pin_memory()
            x = x.to(self.device, non_blocking=True)
            stored = self.vae.encode(x).cpu().numpy()
            if self.options.mirror:
                mirrored = self.vae.encode(x.flip(-1)).cpu().numpy()
        for i, row in enumerate(rows):
            row["latent"] = stored[i]
            if mirrored is not None:
                row["latent_mirror"] = mirrored[i]

    def _encode_captions(self, rows: list[dict[str, Any]]) -> list[int]:
        """Adds to each row the embeddings of its captions; returns how many of them are cut."""
        assert self.text
        # All captions of the batch are encoded together, and then dealt out again.
        texts: list[str] = []
        for row in rows:
            texts += row["captions"]
        encoded = iter(self.text(texts))
        cut = []
        for row in rows:
            of_row = list(islice(encoded, len(row["captions"])))
            row["caption_tokens"] = [caption.tokens for caption in of_row]
            row["caption_pooled"] = [caption.pooled for caption in of_row]
            cut.append(self._count_cut(row["captions"], of_row))
        return cut

    def _count_cut(self, captions: Sequence[str], encoded: Sequence[EncodedCaption]) -> int:
        """How many of an image's captions are longer than what is kept."""
        assert self.text
        # Only captions that fill all tokens can be, so only these are tokenised again.
        full = []
        for text, encoding in zip(captions, encoded, strict=True):
            if len(encoding.tokens) == self.text.max_tokens:
                full.append(text)
        return len(self.text.cut(full))

    def finish(self) -> None:
        """Writes the manifest once every part is done, and removes what only packing needed. For
        rank 0."""
        self.parts.wait_for_all()
        # Looked at only now, when every part has been read from the source.
        if what := self.source.changed():
            raise source_changed(what)
        totals = Totals(self.parts.records())
        # Written as it is read: millions may have been left out.
        out = self.options.out
        reasons = self._write_skipped(totals)
        if not totals.shards and self.base is None:
            with (out / SKIPPED).open() as file:
                first = []
                for line in islice(file, 3):
                    first.append(tuple(json.loads(line).values()))
            (out / SKIPPED).unlink()
            raise DataError(
                f"not one image of {self.source.name} could be used; the first: "
                f"{first_reasons(first)}"
            )

        # All other files come before the manifest, with which the data set exists.
        number = len(self.base.manifest.get("additions", ())) + 1 if self.base else 0
        hashes = HASHES.format(f"_a{number}" if number else "")
        known = write_hashes(out / hashes, self.parts.records())
        named = {"content_hashes": [hashes]} if known else {}
        if self.base is None:
            self._write_set(totals, reasons, named)
        else:
            self._write_grown_set(self.base, totals, reasons, named)
        self.write_card()
        self.parts.remove()

    def write_card(self) -> None:
        """Writes the card, which a start writes that was killed before it could."""
        if not write_card(ShardDataset(self.options.out)):
            print(
                f"note: {self.options.out / CARD} is not ours, and stays as it is",
                file=sys.stderr,
                flush=True,
            )

    def _write_skipped(self, totals: Iterable[tuple[str, str]]) -> Counter[str]:
        """Lists what was left out, behind what the set that grows has left out; returns how often
        each reason occurs in the source."""
        path = self.options.out / SKIPPED
        left_out = chain(self.source.skipped, totals)
        if self.base is None:
            return write_skipped(path, left_out)
        # Not what a start has added that was killed before it wrote the manifest.
        count = self.base.manifest["skipped"]["count"]
        with path.open() as before:
            return write_skipped(path, left_out, islice(before, count))

    def _write_grown_set(
        self,
        base: ShardDataset,
        totals: Totals,
        reasons: Counter[str],
        named: dict[str, list[str]],
    ) -> None:
        """Writes the manifest of the set that has grown. The statistics stay those of its first rows:
        a run that goes on must learn the same x_start of them."""
        manifest = base.manifest
        about = grown(base, self.parts.job, totals, reasons)
        if self.options.licence:
            about["additions"][-1]["licence"] = self.options.licence
        # Each addition has its own file of hashes, and the set has all of them.
        for key, names in named.items():
            about[key] = [*manifest.get(key, ()), *names]
        columns = manifest["columns"]
        # Every image of a source may have been left out: then there are no columns to compare.
        if totals.shards and totals.columns != columns:
            raise DataError(
                f"--append: the new rows have the columns {totals.columns}, those of {base.path} "
                f"{columns}; pack into another --out"
            )
        shards = [*manifest["shards"], *totals.shards]
        empty = manifest.get("empty_caption")
        write_manifest(base.path, base.packed, columns, shards, empty, **about)

    def _write_set(
        self, totals: Totals, reasons: Counter[str], named: dict[str, list[str]]
    ) -> None:
        """Writes the manifest of a new set, and what belongs to it."""
        out = self.options.out
        empty = None
        if self.text:
            (encoding,) = self.text([""])
            empty = write_empty_caption(out, self.info, encoding.tokens, encoding.pooled)
        trip = self.round_trip() if self.vae else []
        about: dict[str, Any] = {}
        if trip:
            about["round_trip"] = {"images": len(trip), "psnr": trip}
        if self.options.licence:
            about["licence"] = self.options.licence
        write_manifest(
            out,
            self.info,
            totals.columns,
            totals.shards,
            empty,
            job=self.parts.job,
            class_names=list(self.source.class_names),
            captions=totals.captions,
            captions_cut=totals.captions_cut,
            skipped={"count": reasons.total(), "reasons": dict(reasons.most_common(20))},
            made_with={"vae": _resolved(self.options.vae), "text_encoder": self._text_encoder()},
            **named,
            **about,
        )
        # The map to colours is fitted to latents as they are read from the data set.
        if self.vae:
            matrix = self.vae.fit_rgb(self._some_latents())
            write_atomically(out / LATENT_RGB, json.dumps(matrix) + "\n")

    def round_trip(self) -> list[float]:
        """How well images survive encoding and decoding: PSNR in dB of a few, from first to last.
        Fewer, or none, where they cannot be read any more."""
        assert self.vae
        values: list[float] = []
        count = min(ROUND_TRIP_IMAGES, self.parts.parts)
        each = -(-ROUND_TRIP_IMAGES // count)
        for part in np.linspace(0, self.parts.parts - 1, count).astype(int).tolist():
            items = self.source.part(part, self.options.rows_per_shard)
            found = 0
            # One by one: a batch would need the memory of all. All is packed by now, and a source
            # that is gone is no reason to fail.
            with suppress(DataError, OSError):
                # A part whose images are all unusable is not read to its end.
                for item in islice(items, 10 * each):
                    _, image = self.decode(item)
                    if isinstance(image, str):
                        continue
                    values.append(round(images.psnr(image, self._restored(image)), 2))
                    found += 1
                    if found == each:
                        break
        return values

    def _restored(self, image: Image) -> Image:
        """What an image becomes by way of its latent; of moments, their mean."""
        assert self.vae
        stored = self.vae.encode(torch.from_numpy(image)[None].to(self.device)).cpu()
        no_noise = torch.zeros(1, *self.info.x_shape)
        x_start = to_x_start(stored, self.info.kind, self.info.normalization, no_noise)
        restored: Image = self.vae.decode(x_start)[0].numpy()
        return restored

    def _some_latents(self) -> torch.Tensor:
        """The latents of a few images, from first to last, as a model learns them: (n, C, H, W)."""
        data = ShardDataset(self.options.out)
        rows = np.linspace(0, len(data) - 1, min(8, len(data))).astype(np.int64)
        latent = torch.from_numpy(data.gather(rows)["latent"])
        # Of moments the mean: the posterior without noise.
        no_noise = torch.zeros(len(rows), *data.info.x_shape)
        return to_x_start(latent, self.info.kind, self.info.normalization, no_noise)

    def _text_encoder(self) -> str | None:
        scheme, _, where = (self.options.text_encoder or "").partition(":")
        return f"{scheme}:{_resolved(where)}" if self.text else None

    def summary(self, done: str) -> str:
        """A line about the packed data set."""
        # Of the data set as it is on disk, also where it was packed before.
        data = ShardDataset(self.options.out)
        manifest = data.manifest
        size = sum(shard["bytes"] for shard in manifest["shards"])
        captions = f", {manifest['captions']:,} captions" if manifest["captions"] else ""
        cut = manifest.get("captions_cut")
        if cut and data.info.captions:
            captions += f" ({cut:,} are cut at {data.info.captions.tokens} tokens)"
        encoders = ""
        for name, identity in data.info.encoders.items():
            encoders += f"; {name}: {identity}"
        if trip := manifest.get("round_trip"):
            encoders += f"; round trip: {images.round_trip_words(trip)}"
        left_out = manifest["skipped"]["count"]
        listed = f", see {data.path / 'skipped.jsonl'}" if left_out else ""
        return (
            f"{data.path}: {len(data):,} images{captions}, {size / 1e6:.1f} MB "
            f"({size / len(data):,.0f} bytes an image){encoders}; {done}; {left_out} left "
            f"out{listed}"
        )


def _places(found: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """The keys by which a job does not differ from another: lists, sizes and hashes tell two data
    sets apart, and names and places of folders do not."""
    # A job of an older version, without sizes, is still identified by its places.
    return {"source.sizes"} if "source.sizes" in ours.keys() - found.keys() else PLACES


def announcement(source: Source) -> str:
    """A line about what will be packed, and what is odd about it: to be read before hours of
    work."""
    count = f"{source.parts(1):,} tar files" if source.size is None else f"{source.size:,} images"
    if source.num_classes:
        names = source.class_names or range(source.num_classes)
        count += f" of {source.num_classes:,} classes ({names[0]} ... {names[-1]})"
    return printable(f"{source.name}: " + ", ".join([count, *source.notes]))


class _Counted(Iterator[A]):
    """An iterator that counts the items that were taken from it."""

    def __init__(self, items: Iterable[A]) -> None:
        self._items, self.count = iter(items), 0

    def __next__(self) -> A:
        item = next(self._items)
        self.count += 1
        return item


def _ahead(pool: Executor, work: Callable[[A], B], items: Iterable[A], window: int) -> Iterator[B]:
    """The results of `work` of each item, in order. Up to `window` items are in progress, or fewer
    where they hold more than MOST_HELD bytes."""
    pending: deque[tuple[Any, int]] = deque()
    held = 0
    for item in items:
        weight = getattr(item, "held", 0)
        pending.append((pool.submit(work, item), weight))
        held += weight
        # The oldest is waited for, even if later ones are done: rows keep the source's order.
        while len(pending) == window or (pending and held > MOST_HELD):
            future, weight = pending.popleft()
            held -= weight
            yield future.result()
    while pending:
        yield pending.popleft()[0].result()


def _resolved(spec: str | None) -> str | None:
    """A local path made absolute; a hub name as it is."""
    if spec and Path(spec).expanduser().exists():
        return str(Path(spec).expanduser().resolve())
    return spec
