"""Packs COCO: a folder of images and COCO's captions_*.json, or Karpathy's dataset_coco.json.

    python -m data_prep.coco --images train2014 --captions annotations/captions_train2014.json \\
        --vae stabilityai/sd-vae-ft-ema --text-encoder open_clip:ViT-L-14/openai --out data/coco256
"""

import itertools
import posixpath
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import packing
from data_prep.images import Unusable
from data_prep.sources import (
    ListSource,
    clean,
    first_three,
    missing_files,
    name_of,
    refuse_splits,
    relative_name,
    text_of,
)
from largescale.errors import DataError
from largescale.host.files import from_json, sha256

Id = tuple[bool, int | str]  # (whether it is text, it): all can be sorted


class Listed(NamedTuple):
    """What a captions file holds, by image id."""

    files: dict[Id, str]
    captions: dict[Id, tuple[str, ...]]  # in the order of the annotations' ids
    empty: int  # captions of white space, which are dropped
    no_text: list[tuple[Id, Id]]  # image, caption that is null, or half an emoji; dropped too


@dataclass(frozen=True, kw_only=True)
class Coco(packing.Packing):
    images: Path
    """The folder of images, such as train2014."""
    captions: Path
    """COCO's captions file, such as annotations/captions_train2014.json, or Karpathy's
    dataset_coco.json."""
    splits: tuple[str, ...] = ()
    """Which of Karpathy's splits, such as train restval; needed where the file holds several."""
    skip_missing: bool = False
    """Pack what is there when images that the captions file names are missing; without this they
    are an error."""

    def source(self) -> ListSource:
        return read(self.images, self.captions, self.skip_missing, self.splits)


def read(
    images: Path, captions: Path, skip_missing: bool = False, splits: Sequence[str] = ()
) -> ListSource:
    """Images in the order of their ids, numbers before texts; those without a caption are skipped.

    Raises DataError for a file that is not COCO captions, ids or file names given twice, captions
    without their image, and images that are missing.
    """
    listed = parse(captions, splits)
    missing, unlisted = missing_files(images, list(listed.files.values()), captions, skip_missing)
    no_text = {number: "its caption is no text" for number, _ in listed.no_text}
    reasons = {
        number: "the file is missing"
        if file in missing
        else no_text.get(number, "it has no caption")
        for number, file in sorted(listed.files.items())
        if file in missing or not listed.captions.get(number)
    }
    kept = [number for number in sorted(listed.files) if number not in reasons]
    facts = {
        "program": "data_prep.coco",
        "images": str(images.resolve()),
        "captions": str(captions.resolve()),
        "captions_sha256": sha256(captions),
        "images_listed": len(listed.files),
        "images_missing": len(missing),
        "images_without_caption": len(reasons) - len(missing),
        "images_not_listed": unlisted,
        "captions_of_packed": sum(len(listed.captions[number]) for number in kept),
        "captions_empty": listed.empty,
    } | ({"splits": sorted(splits)} if splits else {})
    source = ListSource(
        f"coco-{name_of(captions)}",
        images,
        [listed.files[number] for number in kept],
        ids=[str(number) for _, number in kept],
        captions=[listed.captions[number] for number in kept],
        facts=facts,
        skipped=[(str(number), reason) for (_, number), reason in reasons.items()],
    )
    if listed.no_text:
        facts["captions_no_text"] = len(listed.no_text)
        ids = first_three(id for _, (_, id) in listed.no_text)
        source.notes.append(f"{len(listed.no_text):,} captions that are no text (ids {ids})")
    return source


def parse(path: Path, splits: Sequence[str] = ()) -> Listed:
    text = text_of(path)
    try:
        document = from_json(text)
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); give COCO's captions file, such as "
            "captions_train2014.json"
        ) from error
    try:
        if "annotations" not in document and any(
            "sentences" in image for image in document.get("images", ())
        ):
            document = _karpathy(path, document["images"], splits)
        elif splits:
            raise DataError(f"--splits {' '.join(splits)}: {path} has no splits; leave it out")
        annotations = document["annotations"]
        if annotations and not any("caption" in annotation for annotation in annotations):
            raise DataError(
                f"{path} holds no captions: its annotations have {', '.join(annotations[0])}; give "
                f"{_captions_file(path)} of the same images"
            )
        images = [
            (_id(image["id"]), relative_name(image["file_name"], path))
            for image in document["images"]
        ]
        texts = sorted(
            ((_id(a["image_id"]), _id(a["id"]), a["caption"]) for a in annotations),
            key=lambda a: a[:2],
        )
    except DataError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is not COCO captions ({error!r}): images need id and file_name, annotations "
            "id, image_id and caption; give a file such as captions_train2014.json"
        ) from error
    files = dict(images)
    _refuse(path, "image ids that are given twice", _twice(number for (_, number), _ in images))
    _refuse(path, "file names that are given twice", _twice(file for _, file in images))
    _refuse(
        path,
        "captions of images that it does not list, by image id",
        [number[1] for number, _, _ in texts if number not in files],
    )
    captions: dict[Id, list[str]] = defaultdict(list)
    empty, no_text = 0, []
    for number, caption, text in texts:
        try:
            cleaned = clean([text])
            captions[number] += cleaned
            empty += not cleaned
        except (AttributeError, Unusable):  # null, or half an emoji
            no_text.append((number, caption))
    return Listed(files, {number: tuple(some) for number, some in captions.items()}, empty, no_text)


def _id(value: Any) -> Id:
    """Raises ValueError for a number that is not whole, and what is neither number nor text."""
    number = int(value) if not isinstance(value, str) or value.isdecimal() else None
    if isinstance(value, str):
        return (False, number) if number is not None and str(number) == value else (True, value)
    if number is None or number != value:
        raise ValueError(f"id {value} is not a whole number")
    return False, number


def _karpathy(path: Path, images: list[dict[str, Any]], splits: Sequence[str]) -> dict[str, Any]:
    """As COCO spells it: the images of the splits, which lie where filepath says."""
    found = sorted({image["split"] for image in images})
    if unknown := set(splits) - set(found):
        raise DataError(f"--splits {first_three(unknown)}: {path} has {', '.join(found)}")
    if not splits:
        refuse_splits(path, found, "choose with --splits, such as --splits train restval")
    number = itertools.count()
    document: dict[str, Any] = {"images": [], "annotations": []}
    for image in images:
        if not splits or image["split"] in splits:
            id = image.get("cocoid", image.get("imgid"))
            file = posixpath.join(image.get("filepath", ""), image["filename"])
            document["images"].append({"id": id, "file_name": file})
            document["annotations"] += [
                {"image_id": id, "id": text.get("sentid", next(number)), "caption": text["raw"]}
                for text in image["sentences"]
            ]
    return document


def _captions_file(path: Path) -> str:
    """instances_val2017.json -> captions_val2017.json"""
    _, separator, split = path.name.rpartition("_")
    return f"captions_{split}" if separator else "captions_*.json"


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _refuse(path: Path, what: str, found: list[Any]) -> None:
    if found:
        raise DataError(
            f"{path} has {len(found):,} {what}: {first_three(found)}; correct it, or take the "
            "original"
        )


def main(args: list[str] | None = None) -> int:
    return packing.main(Coco, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
