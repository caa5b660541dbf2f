"""Packs COCO: a folder of images and COCO's captions_*.json, or Karpathy's dataset_coco.json.

    python -m data_prep.coco --images train2014 --captions annotations/captions_train2014.json \\
        --vae stabilityai/sd-vae-ft-ema --text-encoder open_clip:ViT-L-14/openai --out data/coco256
"""

import itertools
import posixpath
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import packing, program
from data_prep.images import Unusable
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import (
    ListSource,
    clean,
    first_three,
    name_of,
    refuse_splits,
    relative_name,
    require_file,
    some_missing,
    text_of,
)
from data_prep.walk import Missing, missing_files
from largescale.errors import DataError
from largescale.host.files import from_json, sha256

# (whether it is text, the id): so that numbers and texts can be sorted together.
Id = tuple[bool, int | str]


class Annotation(NamedTuple):
    """A caption, by the ids of its image and of itself."""

    image: Id
    id: Id
    text: Any


class Listed(NamedTuple):
    """The content of a captions file, by image id."""

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

    def source(self, listings: Listings) -> ListSource:
        return read(self.images, self.captions, self.skip_missing, self.splits, listings)


def read(
    images: Path,
    captions: Path,
    skip_missing: bool = False,
    splits: Sequence[str] = (),
    listings: Listings | None = None,
) -> ListSource:
    """Images in the order of their ids, numbers before texts; those without a caption are skipped.

    Raises DataError for a file that is not COCO captions, ids or file names given twice, captions
    without their image, and images that are missing.
    """
    require_file(captions)
    # The list's hash identifies it, wherever it is.
    facts: dict[str, Any] = {
        "program": "data_prep.coco",
        "images": str(images.resolve()),
        "captions": str(captions.resolve()),
        "captions_sha256": sha256(captions),
    }
    # Everything that changes the list is in its key. The order of the splits changes nothing.
    key = facts | {"skip_missing": skip_missing, "splits": sorted(splits)}

    def make(writer: Writer) -> Found:
        return _write(writer, images, captions, skip_missing, splits, facts)

    listing = (listings or Listings()).get(key, ("id", "captions"), make)
    return ListSource(f"coco-{name_of(captions)}", images, listing)


def _write(
    writer: Writer,
    images: Path,
    captions: Path,
    skip_missing: bool,
    splits: Sequence[str],
    facts: dict[str, Any],
) -> Found:
    # Whatever can be refused is refused before the first image is opened. The file is one JSON
    # document, which only the rank that lists has in memory, and only now.
    listed = parse(captions, splits)
    if not listed.files:
        raise DataError(f"{captions} lists no images; give the captions file of those in {images}")
    in_order = dict(sorted(listed.files.items()))
    names = [list(in_order.values())]
    missing = missing_files(images, names, lambda: names, writer.scratch, writer.listed)
    if missing.count and not skip_missing:
        raise some_missing(missing, len(in_order), captions, images)
    of_packed, without = _choose(listed, missing, writer)

    facts = facts | {
        "images_listed": len(listed.files),
        "images_missing": missing.count,
        "images_without_caption": without,
        "images_not_listed": missing.unlisted,
        "captions_of_packed": of_packed,
        "captions_empty": listed.empty,
    }
    if splits:
        facts["splits"] = sorted(splits)
    # A list of hundreds of thousands may have a few nulls.
    notes = []
    if listed.no_text:
        facts["captions_no_text"] = len(listed.no_text)
        ids = first_three(id for _, (_, id) in listed.no_text)
        notes.append(f"{len(listed.no_text):,} captions that are no text (ids {ids})")
    return Found(facts, notes=notes)


def _choose(listed: Listed, missing: Missing, writer: Writer) -> tuple[int, int]:
    """Packs the listed images in the order of their ids, and skips those that lack something; returns
    how many captions the packed ones have, and how many images have none."""
    no_text = dict(listed.no_text)
    of_packed = without = 0
    # The reason is that of the first thing that lacks.
    absent = missing.among(0, len(listed.files))
    for is_gone, (image, file) in zip(absent, sorted(listed.files.items()), strict=True):
        id = str(image[1])
        captions = listed.captions.get(image)
        if is_gone:
            writer.skip(id, "the file is missing")
        elif captions:
            writer.add(file, id, captions=captions)
            of_packed += len(captions)
        else:
            writer.skip(id, "its caption is no text" if image in no_text else "it has no caption")
            without += 1
    return of_packed, without


def parse(path: Path, splits: Sequence[str] = ()) -> Listed:
    """The content of a captions file. Raises DataError for one that is not COCO captions, and for
    ids or file names that are given twice."""
    # JSON first, then the shape of its content: each has a remedy of its own.
    text = text_of(path)
    try:
        document = from_json(text)
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); give COCO's captions file, such as "
            "captions_train2014.json"
        ) from error
    try:
        images, annotations = _images_and_annotations(path, document, splits)
    except DataError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path} is not COCO captions ({what}): images need id and file_name, annotations "
            "id, image_id and caption; give a file such as captions_train2014.json"
        ) from error

    # With any of these, other captions than meant would be packed.
    files = dict(images)
    ids = []
    names = []
    for (_, id), name in images:
        ids.append(id)
        names.append(name)
    strangers = [a.image[1] for a in annotations if a.image not in files]
    _refuse(path, "image ids that are given twice", _twice(ids))
    _refuse(path, "file names that are given twice", _twice(names))
    _refuse(path, "captions of images that it does not list, by image id", strangers)

    # Captions that are null or half an emoji are dropped, as empty ones are, and counted apart.
    captions: dict[Id, tuple[str, ...]] = {}
    empty = 0
    no_text: list[tuple[Id, Id]] = []
    for annotation in annotations:
        try:
            cleaned = clean([annotation.text])
        except (AttributeError, Unusable):
            no_text.append((annotation.image, annotation.id))
            continue
        captions[annotation.image] = captions.get(annotation.image, ()) + cleaned
        empty += not cleaned
    return Listed(files, captions, empty, no_text)


def _images_and_annotations(
    path: Path, document: Any, splits: Sequence[str]
) -> tuple[list[tuple[Id, str]], list[Annotation]]:
    """The ids and file names of the images, and the captions sorted by image and then by their own
    id."""
    if not isinstance(document, dict):
        raise TypeError("it is no object in braces")
    if "annotations" not in document and _has_sentences(document.get("images", ())):
        document = _karpathy(path, document["images"], splits)
    elif splits:
        raise DataError(f"--splits {' '.join(splits)}: {path} has no splits; leave it out")

    # instances_*.json and person_keypoints_*.json have annotations too.
    annotations = document["annotations"]
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise DataError(
            f"{path} holds no captions: its annotations have {', '.join(annotations[0])}; give "
            f"{_captions_file(path)} of the same images"
        )

    images = []
    for image in document["images"]:
        images.append((_id(image["id"]), relative_name(image["file_name"], path)))
    captions = []
    for annotation in annotations:
        image, id = _id(annotation["image_id"]), _id(annotation["id"])
        captions.append(Annotation(image, id, annotation["caption"]))
    captions.sort(key=lambda caption: (caption.image, caption.id))
    return images, captions


def _has_sentences(images: Iterable[Any]) -> bool:
    """Whether captions stand with their images, as in Karpathy's file."""
    return any("sentences" in image for image in images)


def _id(value: Any) -> Id:
    """An id that can be sorted among others. Raises ValueError for a number that is not whole, and
    for a value that is neither number nor text."""
    # "007" and 7 are two ids, "7" and 7 are one.
    if isinstance(value, str):
        if value.isdecimal() and str(int(value)) == value:
            return False, int(value)
        # Texts come behind numbers, with which they cannot be compared: True sorts after False.
        return True, value
    number = int(value)
    if number != value:
        raise ValueError(f"id {value} is not a whole number")
    return False, number


def _karpathy(path: Path, images: list[dict[str, Any]], splits: Sequence[str]) -> dict[str, Any]:
    """Karpathy's images of the splits as COCO's document."""
    # A split that is misspelt would silently give fewer images.
    found = sorted({image["split"] for image in images})
    unknown = set(splits) - set(found)
    if unknown:
        raise DataError(f"--splits {first_three(unknown)}: {path} has {', '.join(found)}")
    if not splits:
        refuse_splits(path, found, "choose with --splits, such as --splits train restval")

    # Files of other data sets than COCO lack cocoid, sentid and filepath.
    number = itertools.count()
    document: dict[str, Any] = {"images": [], "annotations": []}
    for image in images:
        if splits and image["split"] not in splits:
            continue
        id = image.get("cocoid", image.get("imgid"))
        file = posixpath.join(image.get("filepath", ""), image["filename"])
        document["images"].append({"id": id, "file_name": file})
        for text in image["sentences"]:
            # Without ids of their own, captions are numbered in the order of the file.
            sentence = text.get("sentid", next(number))
            document["annotations"].append({"image_id": id, "id": sentence, "caption": text["raw"]})
    return document


def _captions_file(path: Path) -> str:
    """The captions file that belongs to another: captions_val2017.json for
    instances_val2017.json."""
    _, separator, split = path.name.rpartition("_")
    return f"captions_{split}" if separator else "captions_*.json"


def _twice(values: Iterable[Any]) -> list[Any]:
    """The values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def _refuse(path: Path, what: str, found: list[Any]) -> None:
    """Raises DataError if anything was found."""
    if found:
        raise DataError(
            f"{path} has {len(found):,} {what}: {first_three(found)}; correct it, or take the "
            "original"
        )


def main(args: list[str] | None = None) -> int:
    return program.main(Coco, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
