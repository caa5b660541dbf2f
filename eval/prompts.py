"""python -m eval.prompts --captions captions_val2014.json --num 30000 --out prompts/coco_30k.json:
FID-30K's prompts.

One caption of each of `num` distinct images of COCO, frozen with their hash: runs are then compared
on the same ones. Which, and in which order, follows from hashes of (seed, id): the first 1,000 of
the file are what --num 1000 gives, and no version of Python or NumPy matters. Wherever prompts are
read, a text file with one prompt a line will do too.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from largescale.config.command_line import parse_options, run_program
from largescale.errors import ConfigError, DataError
from largescale.host.files import from_json, is_unicode, write_atomically

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Freeze:
    captions: Path
    """COCO's captions file; that of FID-30K is annotations/captions_val2014.json."""
    out: Path
    """The file to write, such as prompts/coco_30k.json; one that holds other prompts is not
    replaced."""
    num: int = 30_000
    """How many images to choose, each with one of its captions."""
    seed: int = 0
    """Seed of the choice."""


@dataclass(frozen=True)
class Prompts:
    """A list of prompts, in order."""

    texts: list[str]  # n >= 1, none empty
    sha256: str  # of the rows, or of a text file's prompts
    source: dict[str, Any]  # where they are from: name, and of a frozen list its head
    images: list[str] | None  # (n,) file name of the image of each, of a frozen list


# One row of COCO's captions, in the words of its file: the keys of a frozen list's rows.
class _Caption(NamedTuple):
    image_id: int
    file_name: str
    caption_id: int
    caption: str


def read_prompts(path: Path) -> Prompts:
    """Read a list that this program froze (.json), or a text file, one prompt a line.

    Raises DataError for a file that is neither, or cannot be read; a frozen list that was altered;
    a prompt that is empty.
    """
    # A table's first line would be taken for a prompt, and its commas for text.
    if path.suffix.lower() in TABLES:
        raise DataError(f"{path} is a table; give its prompts as a .txt file, one a line")
    text = _decoded(path, _content(path))
    if path.suffix.lower() == ".json":
        return _frozen(path, text)
    # Empty lines are errors, not skipped: prompt i has to be line i.
    lines = list(map(str.strip, text.removesuffix("\n").split("\n")))
    if not any(lines):
        raise DataError(f"{path} holds no prompts; give one a line")
    if "" in lines:
        raise DataError(
            f"{path}: line {lines.index('') + 1} is empty; delete it, or write a prompt there"
        )
    return Prompts(lines, _sha256_of(lines), {"name": path.name}, None)


def freeze(captions: Path, num: int, seed: int) -> str:
    """The content of the file, a function of the captions file, num and seed. Raises DataError, or
    ConfigError for a number of images that the file does not have."""
    if num < 1:
        raise ConfigError(f"num={num} must be at least 1; set --num")
    content = _content(captions)

    # Of each image the caption of the lowest rank.
    of_image: dict[int, _Caption] = {}
    for row in _parse(captions, _decoded(captions, content)):
        best = of_image.setdefault(row.image_id, row)
        if _rank(seed, "caption", row.caption_id) < _rank(seed, "caption", best.caption_id):
            of_image[row.image_id] = row
    # Captions repeat images: the number of images is what limits the list.
    if num > len(of_image):
        raise ConfigError(
            f"num={num}: {captions} has captions of {len(of_image)} images; set --num "
            f"{len(of_image)} or less, or give another --captions (captions_val2014.json has 40,504 "
            "images)"
        )

    # Of all images the first `num` by rank, so that a shorter list is the start of a longer one.
    chosen = sorted(of_image, key=lambda number: _rank(seed, "image", number))[:num]
    rows = [of_image[number]._asdict() for number in chosen]
    head = {
        "name": f"{captions.stem}-{num}-seed{seed}",
        "source": captions.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "seed": seed,
        "sha256": _sha256_of(rows),
    }
    # One row a line, to be read and compared.
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def _rank(seed: int, what: str, number: int) -> tuple[bytes, int]:
    """A key that orders images, and captions, as if by chance; the number orders two of the same
    hash."""
    return hashlib.blake2b(f"{seed}/{what}/{number}".encode(), digest_size=8).digest(), number


def _sha256_of(value: Any) -> str:
    """The hash of plain JSON in one spelling, ASCII."""
    spelling = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelling.encode()).hexdigest()


def _content(path: Path) -> bytes:
    """The bytes of a file. Raises DataError for one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); correct the path") from error


def _decoded(path: Path, content: bytes) -> str:
    """The text of a file in UTF-8. Raises DataError, with the line, for another encoding."""
    # Windows writes a byte order mark, which utf-8-sig drops.
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error


def _json(path: Path, text: str, remedy: str) -> Any:
    """The value of a JSON file. Raises DataError, with line and column, for anything else."""
    try:
        return from_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {remedy}") from error


def _frozen(path: Path, text: str) -> Prompts:
    """The prompts of a frozen list. Raises DataError for one that was altered or damaged."""
    document = _json(
        path, text, "write it again with eval.prompts, or name a list of one prompt a line *.txt"
    )
    # The usual mistake is COCO's own file.
    if not isinstance(document, dict) or not {"name", "sha256", "rows"} <= document.keys():
        raise DataError(
            f"{path} is no list of prompts; make one of COCO's captions with python -m eval.prompts "
            f"--captions {path} --out FILE, or give a .txt file, one prompt a line"
        )

    # What is left of the document is its head: where the rows are from.
    rows = document.pop("rows")
    expected = document.pop("sha256")
    found = _sha256_of(rows)
    if found != expected:
        raise DataError(
            f"{path} was altered: its rows have the sha256 {found}, not {expected}; write it again "
            "with eval.prompts, or give other prompts as a .txt file, one a line"
        )

    # A hash that fits does not make them prompts: the list may be another program's.
    texts: list[str] = []
    images: list[str] = []
    try:
        for row in rows:
            texts.append(row["caption"].strip())
            images.append(str(row["file_name"]))
    except (AttributeError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} has rows that are no prompts ({error!r}); write it again with eval.prompts"
        ) from error
    for number, caption in enumerate(texts, 1):
        if not is_unicode(caption):
            raise DataError(
                f"{path}: row {number} is not Unicode; write it again with eval.prompts"
            )
    if not all(texts) or not texts:
        what = f"row {texts.index('') + 1} is empty" if texts else "it holds no prompts"
        raise DataError(f"{path}: {what}; write it again with eval.prompts")
    return Prompts(texts, found, document, images)


def _parse(path: Path, text: str) -> list[_Caption]:
    """COCO's captions, without those of white space. Raises DataError for anything else."""
    document = _json(path, text, "give COCO's captions file, such as captions_val2014.json")
    try:
        files = [(int(image["id"]), str(image["file_name"])) for image in document["images"]]
        captions = []
        for row in document["annotations"]:
            captions.append((int(row["image_id"]), int(row["id"]), row["caption"]))
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path} is not COCO captions ({what}): images need id and file_name, annotations "
            "id, image_id and caption; give a file such as captions_val2014.json"
        ) from error

    # Ids that are given twice would make the choice depend on the order of the file.
    file_of = dict(files)
    _refuse(path, "image ids that are given twice", _twice([image for image, _ in files]))
    _refuse(path, "caption ids that are given twice", _twice([row[1] for row in captions]))

    # What else is wrong: all captions of one kind at once, with their number.
    unlisted = []
    not_text = []
    found = []
    for image, number, caption in captions:
        if image not in file_of:
            unlisted.append(image)
        elif not isinstance(caption, str) or not is_unicode(caption):
            not_text.append(number)
        elif stripped := caption.strip():
            found.append(_Caption(image, file_of[image], number, stripped))
    _refuse(path, "captions of images that it does not list, by image id", unlisted)
    _refuse(path, "captions that are not Unicode text, by caption id", not_text)
    return found


def _twice(values: Iterable[Hashable]) -> list[Hashable]:
    """The values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def _refuse(path: Path, what: str, found: Sequence[Any]) -> None:
    """Raises DataError where any are found, with their number and the first."""
    if found:
        raise DataError(
            f"{path} has {len(found):,} {what}, such as {found[0]}; correct it, or take the "
            "original"
        )


def run(options: Freeze) -> str:
    """Write the file, unless it is there; returns a line on what was done. Raises ConfigError where
    it holds something else."""
    if options.out.suffix.lower() != ".json":
        raise ConfigError(
            f"--out {options.out} must end in .json, which distinguishes the list from a text file"
        )
    text = freeze(options.captions, options.num, options.seed)

    # A list that runs were compared on is never replaced by another.
    done = "written"
    try:
        if options.out.exists():
            if options.out.read_bytes() != text.encode():
                raise ConfigError(
                    f"{options.out} is there and holds something else; give another --out, or "
                    "delete it"
                )
            done = "already there, left alone"
        else:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.out, text)
    except OSError as error:
        raise DataError(f"{options.out} cannot be written ({error}); give another --out") from error
    return (
        # Read from the file, as the programs that use the prompts do.
        f"{options.out}: {options.num:,} prompts, sha256 {read_prompts(options.out).sha256}; {done}"
    )


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Freeze, args, program="eval.prompts", description=__doc__)
    return run_program(lambda: print(run(options), flush=True), "correct the cause, and run again")


if __name__ == "__main__":
    sys.exit(main())
