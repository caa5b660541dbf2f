"""What every packer does: decode, crop, encode, write. Killed at any moment, it goes on when it is
run again.

    OUT/shard_00000.arrow ...  OUT/manifest.json     the data set (largescale/data/format.py)
    OUT/skipped.jsonl                                what was left out, and why
    OUT/latent_rgb.json                              of latents: a linear map to colours, for
                                                     previews without the VAE
    OUT/packing/                                     while packing: what is done of each part
                                                     (parts.py)

A source is cut into parts (4,096 images, or one tar file), and rank r packs the parts r, r +
world_size, ... by itself: what comes out does not depend on the number of ranks. Ranks meet in the
file system only: rank 0 finishes when it finds every part done.
"""

import inspect
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import tyro
from tqdm import tqdm

from data_prep import images
from data_prep.sources import Item, Source
from largescale.config.command_line import check_counts, parse_options, run_program
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
from largescale.host.signals import serve_stop_signals, stop_requested
from largescale.models.half_precision import check_on_cpu

PLACES = {
    "info.name",
    *(f"source.{key}" for key in ("images", "captions", "labels", "classes", "files", "shards")),
}
MOST_HELD = 2**30  # bytes of image files that wait in memory to be decoded
A = TypeVar("A")
B = TypeVar("B")
Image = npt.NDArray[np.uint8]  # (3, R, R)


@dataclass(frozen=True, kw_only=True)
class Packing:
    out: Path
    """The folder for the shards. Run again after an interruption, packing goes on there."""
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

    def source(self) -> Source:
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError before anything is read."""
        check_counts(self, "resolution", "rows_per_shard", "batch_size", "workers", "max_pixels")
        check_counts(self, "max_tokens", "min_side")
        if self.vae is None:
            raise ConfigError(
                "give --vae a folder or a hub name (such as stabilityai/sd-vae-ft-ema) to pack "
                "latents, or --vae none to pack pixels"
            )
        check_cuda(self.device)
        if self.device == "cpu" and self.precision:
            check_on_cpu(self.precision, "--precision {}")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file; give a folder")


class Packer:
    """A source, the encoders, and this process's share of the parts."""

    def __init__(self, options: Packing) -> None:
        options.check()
        self.options, self.source = options, options.source()
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
        self.rank, self.world_size = env_rank(), env_world_size()
        cuda = options.device == "cuda"
        device = (
            torch.device("cuda", env_local_rank() % torch.cuda.device_count())
            if cuda
            else torch.device("cpu")
        )
        if not cuda:  # see `pack`
            torch.set_num_threads(1)
        self.precision = options.precision or ("bf16" if cuda else "fp32")
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.vae: Vae | None = None
        if options.vae is not None and options.vae != "none":
            self.vae = load_vae(options.vae, device, dtype)
        self.text: TextEncoder | None = None
        if (
            self.source.captioned
            and options.text_encoder is not None
            and options.text_encoder != "none"
        ):
            self.text = load_text_encoder(options.text_encoder, device, dtype, options.max_tokens)
        self.device, self.info = device, self._info()
        self.min_side = options.min_side or max(options.resolution // 4, 1)
        job = {  # what the result depends on, to the byte
            "source": self.source.facts | {"fingerprint": self.source.fingerprint},
            "info": self.info.plain(),
            "rows_per_shard": options.rows_per_shard,
            "crop": "ADM's centre crop",
            "min_side": self.min_side,
            "max_pixels": options.max_pixels,
            "mirror": self.vae is not None and options.mirror,
        }
        if self.vae or self.text:
            job |= {
                "precision": self.precision,
                "device": device.type,
                "batch_size": options.batch_size,
            }
        parts = self.source.parts(options.rows_per_shard)
        self.parts = Parts(options.out, job, parts, self.rank, self.world_size, _places)

    def _info(self) -> DatasetInfo:
        side, vae, text = self.options.resolution, self.vae, self.text
        encoders = {"vae": vae.identity} if vae else {}
        return DatasetInfo(
            name=self.source.name,
            num_classes=self.source.num_classes,
            kind=vae.kind if vae else "pixels",
            shape=vae.stored_shape(side) if vae else (3, side, side),
            scale_factor=vae.scale_factor if vae else 1.0,
            encoders=encoders | ({"text": text.identity} if text else {}),
            captions=CaptionInfo(text.max_tokens, text.width, text.pooled_width) if text else None,
        )

    def __call__(self) -> str:
        """Pack this rank's parts; rank 0 then waits for the others' and writes the manifest.
        Returns a line to say."""
        start = time.perf_counter()
        try:
            if not self.parts.claim():
                return self.summary("already packed; to pack it anew, delete the folder first")
            if self.rank == 0:
                print(announcement(self.source), file=sys.stderr, flush=True)
            self.info = replace(self.info, name=self.parts.job["info"]["name"])  # as it was begun
            new = self.pack()
            if self.rank == 0:
                self.finish()
        except Stopped:
            raise  # no failure: the same ranks go on later
        except BaseException as error:
            self.parts.failed(error)
            raise
        finally:
            self.parts.close()
        seconds = time.perf_counter() - start
        return self.summary(
            f"rank 0 packed {new:,} now in {seconds:.1f} s, {new / seconds:.1f} images/s"
        )

    def pack(self) -> int:
        """This rank's parts; returns how many images were packed now."""
        cpus, new = max(1, cores() // local_world_size(os.environ)), 0
        # On a GPU one thread; it is on GPU 0 until told, and pinning would open a context there for
        # every rank. On the CPU threads of one core each: how many cores share a sum changes its
        # last digit, and the shards' bytes.
        encoders, prepare = (
            (1, (torch.cuda.set_device, (self.device,)))
            if self.device.type == "cuda"
            else (cpus, (torch.set_num_threads, (1,)))
        )
        done = sum(self.parts.record(part)["items"] for part in self.parts.mine)
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
        with (
            bar,
            ThreadPoolExecutor(self.options.workers or cpus, "decode") as decoders,
            ThreadPoolExecutor(encoders, "encode", *prepare) as encoder,
        ):
            try:
                for part in self.parts.mine:
                    new += self.pack_part(part, decoders, encoder, encoders + 1, bar)
            except BaseException:  # a pool's exit would first finish what is queued
                decoders.shutdown(wait=False, cancel_futures=True)
                encoder.shutdown(wait=False, cancel_futures=True)
                raise
        return new

    def _share(self) -> int | None:
        """Items of this rank's parts, where that is known."""
        rows, size = self.options.rows_per_shard, self.source.size
        return (
            None if size is None else sum(min(rows, size - part * rows) for part in self.parts.mine)
        )

    def pack_part(
        self, part: int, decoders: Executor, encoder: Executor, batches_ahead: int, bar: Any
    ) -> int:
        """Goes on behind the part's last whole shard; returns how many images were encoded now."""
        record = self.parts.record(part)
        if record["done"] or self.parts.finished:
            return 0
        encoded, items = (
            0,
            islice(self.source.part(part, self.options.rows_per_shard), record["items"], None),
        )
        while not record["done"]:
            chunk = _Counted(islice(items, self.options.rows_per_shard))
            shard, skipped = Shard(self.info), record["skipped"]
            batches = self.batches(
                _ahead(decoders, self.decode, chunk, 2 * self.options.batch_size), skipped, bar
            )
            for rows in _ahead(encoder, self.encode, batches, batches_ahead):
                bar.update(len(rows))
                for row, cut in rows:
                    shard.add(**row)
                    record["captions"] += len(row.get("captions", ()))
                    record["captions_cut"] = record.get("captions_cut", 0) + cut
            if len(shard):
                number = len(record["shards"])  # only tar files have more than one
                name = f"shard_{part:05d}" + (f"_{number}" if number else "") + ".arrow"
                record["shards"].append(shard.write(self.options.out / name))
                record["columns"] = shard.columns
                encoded += len(shard)
            record["items"] += chunk.count
            record["done"] = (
                chunk.count < self.options.rows_per_shard or self.source.size is not None
            )
            self.parts.save(part, record)
        return encoded

    def decode(self, item: Item) -> tuple[Item, Image | str]:
        """The cropped image, or why there is none."""
        try:
            if not is_unicode(item.id):
                raise images.Unusable("its name is not UTF-8")
            data = item.read()
            if self.source.captioned and not item.captions:
                raise images.Unusable("it has no caption")
            return item, images.decode(
                data, self.options.resolution, self.min_side, self.options.max_pixels
            )
        except (images.Unusable, FileNotFoundError) as error:
            return item, str(error)
        except OSError as error:  # a file system that is ill must not thin out the data set
            raise DataError(
                f"{item.id} cannot be read: {error}; when it can, run again to go on"
            ) from error

    def batches(
        self, decoded: Iterable[tuple[Item, Image | str]], skipped: list[list[str]], bar: Any
    ) -> Iterator[list[tuple[Item, Image]]]:
        batch: list[tuple[Item, Image]] = []
        for item, image in decoded:
            if stop_requested():
                raise Stopped
            if isinstance(image, str):
                bar.update()
                skipped.append([item.id, image])
                bar.set_postfix(skipped=len(skipped), refresh=False)
            else:
                batch.append((item, image))
            if len(batch) == self.options.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def encode(self, batch: list[tuple[Item, Image]]) -> list[tuple[dict[str, Any], int]]:
        """The rows of a batch, as `Shard.add` takes them, each with the number of its captions that
        are cut."""
        pixels = np.stack([image for _, image in batch])
        columns: dict[str, Iterable[Any]] = {"latent": pixels}
        if self.vae:
            x = torch.from_numpy(pixels)
            x = (x.pin_memory() if self.device.type == "cuda" else x).to(
                self.device, non_blocking=True
            )
            columns["latent"] = self.vae.encode(x).cpu().numpy()
            if self.options.mirror:
                columns["latent_mirror"] = self.vae.encode(x.flip(-1)).cpu().numpy()
        if self.source.captioned:
            columns["captions"] = [list(item.captions) for item, _ in batch]
        cut = [0] * len(batch)
        if self.text:
            of_all = iter(self.text([caption for item, _ in batch for caption in item.captions]))
            encoded = [list(islice(of_all, len(item.captions))) for item, _ in batch]
            cut = [
                self._cut(item.captions, of_item)
                for (item, _), of_item in zip(batch, encoded, strict=True)
            ]
            columns["caption_tokens"] = [
                [caption.tokens for caption in captions] for captions in encoded
            ]
            columns["caption_pooled"] = [
                [caption.pooled for caption in captions] for captions in encoded
            ]
        values = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        rows = [
            {"id": item.id, "label": item.label, **row}
            for (item, _), row in zip(batch, values, strict=True)
        ]
        return list(zip(rows, cut, strict=True))

    def _cut(self, captions: Sequence[str], encoded: Sequence[EncodedCaption]) -> int:
        """How many of an image's captions are longer than what is kept; only those that fill it are
        looked at again."""
        assert self.text
        full = [
            text
            for text, e in zip(captions, encoded, strict=True)
            if len(e.tokens) == self.text.max_tokens
        ]
        return len(self.text.cut(full))

    def finish(self) -> None:
        """Rank 0, once every part is done: the manifest, and what only packing needed goes."""
        records = self.parts.all_records()
        skipped = [
            *map(list, self.source.skipped),
            *(entry for record in records for entry in record["skipped"]),
        ]
        shards = [shard for record in records for shard in record["shards"]]
        if not shards:
            raise DataError(
                f"not one image of {self.source.name} could be used; the first: "
                + "; ".join(f"{id}: {reason}" for id, reason in skipped[:3])
            )
        out, empty = self.options.out, None
        if self.text:
            (encoding,) = self.text([""])
            empty = write_empty_caption(out, self.info, encoding.tokens, encoding.pooled)
        lines = (json.dumps({"id": id, "reason": reason}) + "\n" for id, reason in skipped)
        write_atomically(out / "skipped.jsonl", "".join(lines))
        columns = next(record["columns"] for record in records if record["columns"])
        write_manifest(
            out,
            self.info,
            columns,
            shards,
            empty,
            job=self.parts.job,
            class_names=list(self.source.class_names),
            captions=sum(record["captions"] for record in records),
            captions_cut=sum(record.get("captions_cut", 0) for record in records),
            skipped={
                "count": len(skipped),
                "reasons": dict(Counter(reason for _, reason in skipped).most_common(20)),
            },
            made_with={"vae": _resolved(self.options.vae), "text_encoder": self._text_encoder()},
        )
        if self.vae:
            write_atomically(
                out / LATENT_RGB, json.dumps(self.vae.fit_rgb(self._some_latents())) + "\n"
            )
        self.parts.remove()

    def _some_latents(self) -> torch.Tensor:
        """Of a few of the images, from first to last, as a model learns them: (n, C, H, W)."""
        data = ShardDataset(self.options.out)
        rows = np.linspace(0, len(data) - 1, min(8, len(data))).astype(np.int64)
        latent = torch.from_numpy(data.gather(rows)["latent"])
        return to_x_start(
            latent,
            self.info.kind,
            self.info.scale_factor,
            torch.zeros(len(rows), *data.info.x_shape),
        )

    def _text_encoder(self) -> str | None:
        scheme, _, where = (self.options.text_encoder or "").partition(":")
        return f"{scheme}:{_resolved(where)}" if self.text else None

    def summary(self, done: str) -> str:
        if self.rank != 0:
            return ""
        data = ShardDataset(self.options.out)
        manifest = data.manifest
        size = sum(shard["bytes"] for shard in manifest["shards"])
        captions = f", {manifest['captions']:,} captions" if manifest["captions"] else ""
        if (cut := manifest.get("captions_cut")) and data.info.captions:
            captions += f", of which {cut:,} are cut at {data.info.captions.tokens} tokens"
        encoders = "".join(f"; {name}: {identity}" for name, identity in data.info.encoders.items())
        left_out = manifest["skipped"]["count"]
        listed = f", see {data.path / 'skipped.jsonl'}" if left_out else ""
        return (
            f"{data.path}: {len(data):,} images{captions}, {size / 1e6:.1f} MB "
            f"({size / len(data):,.0f} bytes an image){encoders}; {done}; {left_out} left "
            f"out{listed}"
        )


def _places(found: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """Names and places of folders are not what the data are: lists, sizes and hashes are. A job
    that was begun before sizes were noted is still told by its places."""
    return {"source.sizes"} if "source.sizes" in ours.keys() - found.keys() else PLACES


def announcement(source: Source) -> str:
    """What is about to be packed, and what is odd about it: to be read before hours of work."""
    count = f"{source.parts(1):,} tar files" if source.size is None else f"{source.size:,} images"
    names = source.class_names or range(source.num_classes)
    of = (
        f" of {source.num_classes:,} classes ({names[0]} ... {names[-1]})"
        if source.num_classes
        else ""
    )
    return printable(f"{source.name}: " + ", ".join([count + of, *source.notes]))


class _Counted(Iterator[A]):
    def __init__(self, items: Iterable[A]) -> None:
        self._items, self.count = iter(items), 0

    def __next__(self) -> A:
        item = next(self._items)
        self.count += 1
        return item


def _ahead(pool: Executor, work: Callable[[A], B], items: Iterable[A], window: int) -> Iterator[B]:
    """`work` of each item in order; under way are up to `window` of them, or those that hold
    MOST_HELD bytes."""
    pending: deque[tuple[Any, int]] = deque()
    held = 0
    for item in items:
        pending.append((pool.submit(work, item), weight := getattr(item, "held", 0)))
        held += weight
        while len(pending) == window or (pending and held > MOST_HELD):
            future, weight = pending.popleft()
            held -= weight
            yield future.result()
    while pending:
        yield pending.popleft()[0].result()


def _resolved(spec: str | None) -> str | None:
    """A local path as it is found from anywhere; a hub name as it is."""
    return (
        str(Path(spec).expanduser().resolve())
        if spec and Path(spec).expanduser().exists()
        else spec
    )


def main(program: type[Packing], args: Sequence[str] | None, description: str | None) -> int:
    """The main program of every packer. `program`: its options."""
    name = Path(inspect.getfile(program)).stem
    options = parse_options(program, args, program=f"data_prep.{name}", description=description)
    serve_stop_signals()

    def pack() -> None:
        line = Packer(options)()
        if line:
            print(line, flush=True)

    return run_program(pack, "what is packed stays: correct the cause, and run again")
