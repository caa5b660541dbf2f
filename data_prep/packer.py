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

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from data_prep import finish
from data_prep.append import AddedParts, SetSoFar, check_alike, check_class_names
from data_prep.card import write_card
from data_prep.encoding import Content
from data_prep.ids import IdCheck
from data_prep.images import Unusable
from data_prep.listing import Listings
from data_prep.packing import PackerOptions
from data_prep.progress import Progress, write_plan
from data_prep.source_files import note_files, refuse_changed
from data_prep.sources import Item, Source
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.data.writer import Shard
from largescale.errors import DataError, Stopped
from largescale.host.files import is_unicode
from largescale.host.launch import env_rank, env_world_size, local_world_size, printable
from largescale.host.machine import cores
from largescale.host.signals import stop_requested

# Keys of a job that say where its source is, not what it holds.
PLACES = {
    "info.name",
    "source.images",
    "source.captions",
    "source.labels",
    "source.classes",
    "source.files",
    "source.shards",
    "source.latents",
}
# Bytes of image files that wait in memory to be decoded.
MOST_HELD = 2**30

A = TypeVar("A")
B = TypeVar("B")


class Packer:
    """A source, the encoders, and this process's share of the parts."""

    def __init__(self, options: PackerOptions) -> None:
        # Everything that can be wrong is found before the encoders are loaded.
        options.check()
        self.options = options
        self._listings = Listings(options.out / "packing")
        try:
            self.source = options.source(self._listings)
            self._prepare()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes what this process has left in OUT/packing, unless a job has begun there."""
        self._listings.discard()

    def _prepare(self) -> None:
        """Loads the encoders, and finds out what is packed already."""
        options = self.options
        self.encoders = options.encoding(self.source)
        self.info = self.encoders.info()

        # Ranks do not talk to each other: each takes parts that no other has claimed.
        self.rank = env_rank()
        self.world_size = env_world_size()
        parts = self.source.parts(options.rows_per_shard)
        place = (parts, self.rank, self.world_size, _places)
        self.base: ShardDataset | None = None  # the set that grows
        self._so_far: SetSoFar | None = None  # what it has
        job = self._job()
        if options.append:
            self.base = ShardDataset(options.out)
            check_alike(self.base, job, self.source.captioned)
            check_class_names(self.base, self.source.class_names)
            # The set keeps its name.
            self.info = replace(self.info, name=self.base.info.name)
            added = AddedParts(options.out, job, *place)
            self.parts: Parts = added
            if not added.finished:
                self._look_at_set(self.base, added)
        else:
            self.parts = Parts(options.out, job, *place)
        self.parts.engine = None if options.engine == "ranks" else options.engine
        refuse_changed(self.parts, self.source.files)

    def _look_at_set(self, base: ShardDataset, added: AddedParts) -> None:
        """Finds out what the set has that grows. Raises DataError where ids of other images would be
        given a second time."""
        self._so_far = SetSoFar(base, self._listings)
        self.source.notes += self._so_far.notes
        # Not where the addition was begun, maybe by an older version: half of it is packed.
        if added.is_new:
            IdCheck(
                known=self._so_far.ids,
                data=base,
                source=self.source,
                prefix=self.options.id_prefix,
                decode=self.decode,
                images_known=self._so_far.images_known,
            ).once(self._listings)

    def _job(self) -> dict[str, Any]:
        """Everything that the shards depend on, to the byte."""
        # Not where there is none, as in jobs of versions that had none.
        prefix = {"id_prefix": self.options.id_prefix} if self.options.id_prefix else {}
        return {
            "source": self.source.facts | {"fingerprint": self.source.fingerprint},
            "info": self.info.plain(),
            "rows_per_shard": self.options.rows_per_shard,
            **self.encoders.settings(),
            **prefix,
        }

    def __call__(self) -> str:
        """Packs this rank's parts; rank 0 then waits for the others' and writes the manifest.
        Returns a line to print."""
        start = time.perf_counter()
        try:
            if not self.parts.claim():
                self.discard()
                if self.rank != 0:
                    return ""
                # A start that was killed right after the manifest has left no card.
                write_card(self.options.out)
                return finish.summary(self.options.out, finish.ALREADY_PACKED)
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
            self.discard()
            raise
        finally:
            self.parts.close()
        if self.rank != 0:
            return ""
        seconds = time.perf_counter() - start
        done = f"rank 0 packed {new:,} now in {seconds:.1f} s, {new / seconds:.1f} images/s"
        return finish.summary(self.options.out, done)

    def begin(self) -> None:
        """What follows from the job in the folder, before the first part."""
        write_plan(self.parts.folder, self.source.size, self.parts.parts, len(self.source.skipped))
        if self.rank == 0:
            note_files(self.parts.folder, self.source.files)
        # A job that was started under another name keeps it.
        if self.base is None:
            self.info = replace(self.info, name=self.parts.job["info"]["name"])

    @contextmanager
    def pools(self) -> Iterator[tuple[Executor, Executor, int]]:
        """Threads that decode, threads that encode, and how many batches they encode ahead."""
        cpus = max(1, cores() // local_world_size(os.environ))
        if self.encoders.device.type == "cuda":
            # A new thread starts on GPU 0. Left there, pinning memory would open a context on that
            # GPU for every rank.
            encoders = 1
            encoder = ThreadPoolExecutor(
                1, "encode", torch.cuda.set_device, (self.encoders.device,)
            )
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
            decoded = _ahead(decoders, self.decode, chunk, 2 * self.encoders.batch_size)
            batches = self.batches(decoded, record["skipped"], progress)
            for rows in _ahead(encoder, self.encoders.encode, batches, batches_ahead):
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

    def decode(self, item: Item) -> tuple[Item, Content | str]:
        """The item under its row's id, with its content, such as the cropped image, or with the
        reason why there is none."""
        row = replace(item, id=self.options.id_prefix + item.id)
        try:
            if not is_unicode(item.id):
                raise Unusable("its name is not UTF-8")
            content = self.encoders.decode(item)
            if self._so_far and (reason := self._so_far.has(row.id, content)):
                raise Unusable(reason)
            return row, content
        except (Unusable, FileNotFoundError) as error:
            return row, str(error)
        except OSError as error:
            # A file system with errors must not thin out the data set.
            raise DataError(
                f"{item.id} cannot be read: {error}; when it can, run again to go on"
            ) from error

    def batches(
        self,
        decoded: Iterable[tuple[Item, Content | str]],
        skipped: list[list[str]],
        progress: Progress,
    ) -> Iterator[list[tuple[Item, Content]]]:
        """Batches of the items that could be decoded; the others are added to `skipped`."""
        batch: list[tuple[Item, Content]] = []
        for item, content in decoded:
            if stop_requested():
                raise Stopped
            # A text is the reason why there is no image.
            if isinstance(content, str):
                progress.update()
                skipped.append([item.id, content])
                progress.left_out(len(skipped))
            else:
                batch.append((item, content))
            if len(batch) == self.encoders.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def finish(self) -> None:
        """Makes the data set once every part is done. For rank 0."""
        # It maps a file that is removed now, which NFS would keep until then.
        self._so_far = None
        finish.Finish(
            options=self.options,
            source=self.source,
            encoders=self.encoders,
            info=self.info,
            parts=self.parts,
            base=self.base,
            decode=self.decode,
        )()


def _places(found: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """The keys by which a job does not differ from another: lists, sizes and hashes tell two data
    sets apart, and names and places of folders do not."""
    # What an older version did not note says nothing.
    new = ours.keys() - found.keys()
    unknown = {"source.shard_ends"} & new
    # A job without sizes is still identified by its places.
    return {"source.sizes"} if "source.sizes" in new else PLACES | unknown


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
