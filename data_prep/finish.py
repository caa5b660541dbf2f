"""The end of packing: rank 0 writes the manifest, with which the data set exists, and what lies
beside it."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep import images
from data_prep.append import grown
from data_prep.card import write_card
from data_prep.content import write_hashes
from data_prep.encoding import Content, Encoding
from data_prep.ids import ID_TAKEN
from data_prep.left_out import SKIPPED, Totals, write_skipped
from data_prep.packing import PackerOptions
from data_prep.source_files import source_changed
from data_prep.sources import Item, Source, first_reasons
from largescale.data.format import LATENT_RGB, DatasetInfo
from largescale.data.loader import to_x_start
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.data.writer import write_empty_caption, write_manifest
from largescale.errors import DataError
from largescale.host.files import write_atomically
from largescale.host.sizes import size_text

ALREADY_PACKED = "already packed; to pack it anew, delete the folder first"
ROUND_TRIP_IMAGES = 8
HASHES = "content{}.hashes"


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Makes a data set of the parts that all ranks have packed. `decode`: an item with its content,
    or with the reason why there is none; `base`: the set that grows."""

    options: PackerOptions
    source: Source
    encoders: Encoding
    info: DatasetInfo
    parts: Parts
    base: ShardDataset | None
    decode: Callable[[Item], tuple[Item, Content | str]]

    def __call__(self) -> None:
        """Writes the manifest once every part is done, and removes what only packing needed."""
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
            # No image is lost with it, and the next start may have other options.
            self.parts.remove()
            if not first:
                raise DataError(f"{self.source.name} holds no images; give a source that does")
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
        write_card(out)
        self.parts.remove()

    def _write_skipped(self, totals: Iterable[tuple[str, str]]) -> Counter[str]:
        """Lists what was left out, behind what the set that grows has left out; returns how often
        each reason occurs in the source."""
        path = self.options.out / SKIPPED
        prefix = self.options.id_prefix
        of_source = ((prefix + id, reason) for id, reason in self.source.skipped)
        left_out = chain(of_source, totals)
        # A part of a set may have no list, as older versions of data_prep.split wrote none.
        if self.base is None or not path.is_file():
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
        if taken := reasons[ID_TAKEN]:
            print(
                f"note: {taken:,} images were left out whose ids the set has, of other images; the same "
                "command with --id-prefix adds them too",
                file=sys.stderr,
                flush=True,
            )

    def _write_set(
        self, totals: Totals, reasons: Counter[str], named: dict[str, list[str]]
    ) -> None:
        """Writes the manifest of a new set, and what belongs to it."""
        out = self.options.out
        empty = None
        if self.encoders.text:
            (encoding,) = self.encoders.text([""])
            empty = write_empty_caption(out, self.info, encoding.tokens, encoding.pooled)
        trip = self.round_trip() if self.encoders.has_encoded else []
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
            made_with=self.encoders.made_with(),
            **named,
            **about,
        )
        # The map to colours is fitted to latents as they are read from the data set.
        if self.encoders.vae:
            matrix = self.encoders.vae.fit_rgb(self._some_latents())
            write_atomically(out / LATENT_RGB, json.dumps(matrix) + "\n")

    def round_trip(self) -> list[float]:
        """How well images survive encoding and decoding: PSNR in dB of a few, from first to last.
        Fewer, or none, where they cannot be read any more."""
        assert self.encoders.vae
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

    def _restored(self, image: Content) -> Content:
        """What an image becomes by way of its latent; of moments, their mean."""
        vae = self.encoders.vae
        assert vae
        stored = vae.encode(torch.from_numpy(image)[None].to(self.encoders.device)).cpu()
        no_noise = torch.zeros(1, *self.info.x_shape)
        x_start = to_x_start(stored, self.info.kind, self.info.normalization, no_noise)
        restored: Content = vae.decode(x_start)[0].numpy()
        return restored

    def _some_latents(self) -> torch.Tensor:
        """The latents of a few images, from first to last, as a model learns them: (n, C, H, W)."""
        data = ShardDataset(self.options.out)
        rows = np.linspace(0, len(data) - 1, min(8, len(data))).astype(np.int64)
        latent = torch.from_numpy(data.gather(rows)["latent"])
        # Of moments the mean: the posterior without noise.
        no_noise = torch.zeros(len(rows), *data.info.x_shape)
        return to_x_start(latent, self.info.kind, self.info.normalization, no_noise)


def summary(out: Path, done: str) -> str:
    """A line about the packed data set."""
    # Of the data set as it is on disk, also where it was packed before.
    data = ShardDataset(out)
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
        f"{data.path}: {len(data):,} images{captions}, {size_text(size)} "
        f"({size / len(data):,.0f} bytes an image){encoders}; {done}; {left_out:,} left "
        f"out{listed}"
    )
