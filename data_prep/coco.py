"""Packs COCO: a folder of images and COCO's captions_*.json.

    python -m data_prep.coco --images train2014 --captions annotations/captions_train2014.json \\
        --vae stabilityai/sd-vae-ft-ema --text-encoder open_clip:ViT-L-14/openai --out data/coco256
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import packing
from data_prep.sources import ListSource, clean, first_three, missing_files, name_of, relative_name, text_of
from largescale.errors import DataError
from largescale.files import sha256


class Listed(NamedTuple):
    """What a captions file holds, by image id."""

    files: dict[int, str]
    captions: dict[int, tuple[str, ...]]                # in the order of the annotations' ids
    empty: int                                          # captions of white space, which are dropped


@dataclass(frozen=True, kw_only=True)
class Coco(packing.Packing):
    images: Path
    """The folder of images, such as train2014."""
    captions: Path
    """COCO's captions file, such as annotations/captions_train2014.json."""
    skip_missing: bool = False
    """Pack what is there where images that the captions file names are missing."""

    def source(self) -> ListSource:
        return read(self.images, self.captions, self.skip_missing)


def read(images: Path, captions: Path, skip_missing: bool = False) -> ListSource:
    """Images in the order of their ids; those without a caption are skipped.

    Raises DataError for a file that is not COCO captions, ids or file names given twice, captions without their image,
    and images that are missing.
    """
    listed = parse(captions)
    missing, unlisted = missing_files(images, list(listed.files.values()), captions, skip_missing)
    reasons = {number: "the file is missing" if file in missing else "it has no caption"
               for number, file in sorted(listed.files.items()) if file in missing or not listed.captions.get(number)}
    kept = [number for number in sorted(listed.files) if number not in reasons]
    facts = {"program": "data_prep.coco", "images": str(images.resolve()), "captions": str(captions.resolve()),
             "captions_sha256": sha256(captions), "images_listed": len(listed.files),
             "images_missing": len(missing), "images_without_caption": len(reasons) - len(missing),
             "images_not_listed": unlisted, "captions_of_packed": sum(len(listed.captions[number]) for number in kept),
             "captions_empty": listed.empty}
    return ListSource(f"coco-{name_of(captions)}", images, [listed.files[number] for number in kept],
                      ids=[str(number) for number in kept], captions=[listed.captions[number] for number in kept],
                      facts=facts, skipped=[(str(number), reason) for number, reason in reasons.items()])


def parse(path: Path) -> Listed:
    text = text_of(path)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give COCO's captions file, such as captions_train2014.json") \
            from error
    try:
        annotations = document["annotations"]
        if annotations and not any("caption" in annotation for annotation in annotations):
            raise DataError(f"{path} holds no captions: its annotations have {', '.join(annotations[0])}; give "
                            f"{_captions_file(path)} of the same images")
        images = [(int(image["id"]), relative_name(image["file_name"], path)) for image in document["images"]]
        texts = sorted((int(a["image_id"]), int(a["id"]), a["caption"].strip()) for a in annotations)
    except DataError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not COCO captions ({error!r}): images need id and file_name, annotations id, "
                        "image_id and caption; give a file such as captions_train2014.json") from error
    files = dict(images)
    _refuse(path, "image ids that are given twice", _twice(number for number, _ in images))
    _refuse(path, "file names that are given twice", _twice(file for _, file in images))
    _refuse(path, "captions of images that it does not list, by image id",
            [number for number, _, _ in texts if number not in files])
    captions = defaultdict(list)
    for number, _, text in texts:
        captions[number].append(text)
    cleaned = {number: clean(some) for number, some in captions.items()}
    return Listed(files, cleaned, len(texts) - sum(map(len, cleaned.values())))


def _captions_file(path: Path) -> str:
    """instances_val2017.json -> captions_val2017.json"""
    _, separator, split = path.name.rpartition("_")
    return f"captions_{split}" if separator else "captions_*.json"


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _refuse(path: Path, what: str, found: list[Any]) -> None:
    if found:
        raise DataError(f"{path} has {len(found):,} {what}: {first_three(found)}; correct it, or take the original")


def main(args: list[str] | None = None) -> int:
    return packing.main(Coco, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
