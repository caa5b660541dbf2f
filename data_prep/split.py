"""Sets a part of a packed data set aside, for the loss on held-out images.

    python -m data_prep.split data/imagenet256 --share 0.01 --out data/imagenet256_split

writes OUT/train and OUT/validation. Which rows are held out follows from the hash of their ids: a row
that is packed again, in another order or with more beside it, stays on its side.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data_prep.card import write_card
from data_prep.left_out import SKIPPED
from largescale.checkpoint.files import is_run, require_outside_checkpoints
from largescale.config.command_line import parse_options, run_program
from largescale.data.format import LATENT_RGB, MANIFEST, read_manifest
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import ConfigError, DataError
from largescale.host.files import require_writable

PARTS = ("train", "validation")
# Entries of a manifest that are of its own shards, not of what was packed.
_OF_THE_SHARDS = (
    "format",
    "info",
    "columns",
    "fingerprint",
    "rows",
    "shards",
    "empty_caption",
    "content_hashes",
    "additions",
    "captions",
    "captions_cut",
)


@dataclass(frozen=True)
class Split:
    data: Annotated[Path, tyro.conf.Positional]
    """The packed data set."""
    out: Path
    """Folder for the two sets, OUT/train and OUT/validation."""
    share: float = 0.01
    """The share of the rows that is held out, above 0 and below 1."""
    seed: int = 0
    """Another seed holds out other rows."""
    rows_per_shard: int = 4096
    """Rows of a shard."""

    def check(self) -> None:
        """Raises ConfigError, or an error of --out, before any work is done."""
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share} must be above 0 and below 1; set --share")
        if self.rows_per_shard < 1:
            raise ConfigError(
                f"rows_per_shard={self.rows_per_shard} must be at least 1; set --rows-per-shard"
            )
        require_outside_checkpoints(self.out, "--out")
        for part in PARTS:
            if (self.out / part).resolve() == self.data.resolve():
                raise ConfigError(f"--out {self.out} would overwrite {self.data}; choose another")
        # In a run, or in a packed set, the parts would be taken for files of it.
        if is_run(self.out) or (self.out / MANIFEST).exists():
            raise ConfigError(
                f"--out {self.out} is a run or a packed set itself; choose a new or an empty folder"
            )
        require_writable(
            *(self.out / part / MANIFEST for part in PARTS), remedy="choose another --out"
        )


def is_held_out(id: str, share: float, seed: int = 0) -> bool:
    """Whether the row of this id belongs to the held-out part."""
    # By the id alone: a row keeps its side when the set grows, or is packed in another order.
    digest = hashlib.sha256(f"{seed}:{id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(options: Split) -> str:
    """Writes both sets, and returns a line about them."""
    options.check()
    data = ShardDataset(options.data)
    earlier = _earlier_seeds(data)
    # Of a part all rows have that seed's hash below the share, or none has.
    if options.seed in earlier:
        raise ConfigError(
            f"{options.data} is itself part of a split with --seed {options.seed}, which would divide "
            f"it again by the same hash; give another --seed than {sorted(earlier)}"
        )
    for part in PARTS:
        _require_same_split(options, data, options.out / part)
    # Before a split that is there is replaced.
    counts = Counter(_part_of(id, options) for _, id in data.ids())
    for part in PARTS:
        if not counts[part]:
            raise DataError(
                f"none of the {len(data):,} rows of {options.data} falls into {part}; choose another "
                "--share or --seed"
            )
    about = {key: value for key, value in data.manifest.items() if key not in _OF_THE_SHARDS}
    captions = dict.fromkeys(PARTS, 0)
    with ExitStack() as stack:
        writers = {}
        for part in PARTS:
            writers[part] = stack.enter_context(_writer(options, data, about, part))
        shards = range(len(data.manifest["shards"]))
        for number in tqdm(shards, "split", unit="shard", delay=2):
            for row in data.rows(number):
                part = _part_of(row["id"], options)
                writers[part].write(**row)
                captions[part] += len(row.get("captions", ()))
        # Within the block, whose end writes the manifests.
        for part in PARTS:
            writers[part].about["captions"] = captions[part]
    # Beside the data, and no part of them: how latents are shown without their VAE, and what was
    # left out of the whole set.
    for part in PARTS:
        for name in (LATENT_RGB, SKIPPED):
            if (options.data / name).is_file():
                shutil.copyfile(options.data / name, options.out / part / name)
        write_card(options.out / part)
    return (
        f"{options.out}: train {counts['train']:,} rows, validation {counts['validation']:,} rows, "
        f"by the hash of their ids; train with --data.path {options.out}/train --data.validation "
        f"{options.out}/validation"
    )


def _part_of(id: str, options: Split) -> str:
    return PARTS[is_held_out(id, options.share, options.seed)]


def _earlier_seeds(data: ShardDataset) -> set[int]:
    """The seeds of the splits that have made a set; none where it is whole."""
    made_by = data.manifest.get("split")
    return {made_by["seed"], *made_by.get("earlier_seeds", ())} if made_by else set()


def _require_same_split(options: Split, data: ShardDataset, part: Path) -> None:
    """Raises ConfigError where a folder holds another packed set than this split has made, or had made
    before the data grew."""
    if not (part / MANIFEST).exists():
        return
    manifest = read_manifest(part)
    written = manifest.get("split")
    if manifest.get("additions"):
        raise ConfigError(
            f"{part} has images that were added after the split, and would be lost; choose another --out"
        )
    if written is None:
        raise ConfigError(
            f"{part} holds a packed set that data_prep.split did not write; choose another --out"
        )
    # A set that has grown is split again, and each row keeps its side. Otherwise rows that somebody
    # has trained with would be held out.
    if (written["share"], written["seed"]) != (options.share, options.seed):
        raise ConfigError(
            f"{part} is of a split with --share {written['share']} and --seed {written['seed']}, not "
            f"{options.share} and {options.seed}; choose another --out, or delete it first"
        )
    if not data.is_or_was(written["of"], data.packed.name):
        raise ConfigError(
            f"{part} is of a split of other data than {options.data}, with the fingerprint "
            f"{written['of']}; choose another --out, or delete it first"
        )


def _writer(options: Split, data: ShardDataset, about: dict[str, Any], part: str) -> ShardWriter:
    # Of a part of a part, the sources are those of the first whole.
    whole = data.manifest.get("split", {})
    split_of = {
        "of": data.fingerprint,
        "part": part,
        "share": options.share,
        "seed": options.seed,
        "earlier_seeds": sorted(_earlier_seeds(data)),
        "rows": len(data),
        "first_rows": whole.get("first_rows", data.first_rows),
        "additions": [*whole.get("additions", ()), *data.manifest.get("additions", ())],
    }
    plain = json.loads(json.dumps({**about, "split": split_of}))
    writer = ShardWriter(options.out / part, data.info, options.rows_per_shard, **plain)
    if data.info.captions:
        writer.write_empty_caption(*data.empty_caption)
    return writer


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Split, args, program="data_prep.split", description=__doc__)
    return run_program(lambda: print(split(options)), "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
