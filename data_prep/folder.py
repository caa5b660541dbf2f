"""Packs a folder of images, such as FFHQ, for unconditional training.

python -m data_prep.folder --images ffhq --vae stabilityai/sd-vae-ft-ema --out data/ffhq256
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_prep import packing
from data_prep.sources import SPLIT, ListSource, list_images, name_of, refuse_splits


@dataclass(frozen=True, kw_only=True)
class Folder(packing.Packing):
    images: Path
    """The folder; images in folders below it count too."""

    def source(self) -> ListSource:
        return read(self.images)


def read(images: Path) -> ListSource:
    """All images below the folder, sorted by path. Raises DataError where there are none, or
    several splits."""
    files, others = list_images(images)
    # Folders such as train and test side by side would become one data set.
    tops = {file.partition("/")[0].lower() for file in files}
    refuse_splits(
        images,
        filter(SPLIT.fullmatch, tops),
        "give one with --images, or a folder of links to both",
    )
    # What the manifest says about the source.
    facts = {
        "program": "data_prep.folder",
        "images": str(images.resolve()),
        "images_listed": len(files),
        "other_files": others,
    }
    return ListSource(f"folder-{name_of(images)}", images, files, facts=facts)


def main(args: list[str] | None = None) -> int:
    return packing.main(Folder, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
