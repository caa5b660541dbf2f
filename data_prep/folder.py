"""Packs a folder of images, such as FFHQ, for unconditional training.

python -m data_prep.folder --images ffhq --vae stabilityai/sd-vae-ft-ema --out data/ffhq256
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep import packing, program
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import SPLIT, ListSource, name_of, refuse_splits, require_outside
from data_prep.walk import Walk


@dataclass(frozen=True, kw_only=True)
class Folder(packing.Packing):
    images: Path
    """The folder; images in folders below it count too."""

    def source(self, listings: Listings) -> ListSource:
        require_outside(self.out, self.images)
        return read(self.images, listings)


def read(images: Path, listings: Listings | None = None) -> ListSource:
    """All images below the folder, sorted by path. Raises DataError where there are none, or
    several splits."""
    # What the manifest says about the source.
    facts = {"program": "data_prep.folder", "images": str(images.resolve())}

    def make(writer: Writer) -> Found:
        walk = Walk(images, scratch=writer.scratch, listed=writer.listed)
        # Folders such as train and test side by side would become one data set.
        splits: set[str] = set()
        for files in walk:
            top, slash, _ = files[0].partition("/")
            if slash and SPLIT.fullmatch(top.lower()):
                splits.add(top.lower())
            writer.extend(files)
        refuse_splits(images, splits, "give one with --images, or a folder of links to both")
        # Names that are not UTF-8 are left out by the writer, and were listed all the same.
        listed = writer.rows + writer.skipped
        return Found({**facts, "images_listed": listed, "other_files": walk.others})

    listing = (listings or Listings()).get(facts, (), make)
    return ListSource(f"folder-{name_of(images)}", images, listing)


def main(args: list[str] | None = None) -> int:
    return program.main(Folder, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
