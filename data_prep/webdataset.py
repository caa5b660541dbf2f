"""Packs tar files in WebDataset's format, as img2dataset writes them: CC3M, CC12M, LAION.

    python -m data_prep.webdataset --shards 'cc3m/{00000..00331}.tar' --vae
      stabilityai/sd-vae-ft-ema \\
        --text-encoder open_clip:ViT-L-14/openai --out data/cc3m

A sample is the files KEY.jpg (or jpeg, png, webp), KEY.txt (its caption) or KEY.json (with the
field caption), and KEY.cls (its label). Each tar file is packed by one rank.
"""

import glob
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from lzma import LZMAError
from tarfile import (  # type: ignore[attr-defined]
    EOFHeaderError,
    HeaderError,
    ReadError,
    TarError,
    TarFile,
    TarInfo,
)
from typing import IO, Any, Self
from urllib.parse import urlparse

from data_prep import packing
from data_prep.images import Unusable
from data_prep.sources import (
    Item,
    class_index,
    clean,
    fingerprint,
    first_three,
    given,
    refuse_splits,
    refuse_twice,
    splits_in,
    unusable,
)
from largescale.errors import DataError
from largescale.host.files import from_json

IMAGES = ("jpg", "jpeg", "png", "webp")
MOST_BYTES = 2**28  # of a file in an archive, which may be compressed


@dataclass(frozen=True, kw_only=True)
class WebDataset(packing.Packing):
    shards: tuple[str, ...]
    """Tar files: paths, globs, or braces such as cc3m/{00000..00331}.tar."""
    caption_key: str | None = None
    """Where a sample's caption is: txt, json (its field caption), or none. By default txt, or json
    where there is no txt; none where --num-classes is given."""
    num_classes: int = 0
    """How many classes there are; 0: no labels are read."""
    label_key: str = "cls"
    """The extension of the file that holds a sample's label."""
    allow_remote: bool = False
    """Allow addresses that run shell commands (pipe:, https:, s3: ...), as webdataset opens
    them."""

    def source(self) -> "TarSource":
        return read(
            self.shards, self.caption_key, self.num_classes, self.label_key, self.allow_remote
        )


def read(
    shards: Iterable[str],
    caption_key: str | None = None,
    num_classes: int = 0,
    label_key: str = "cls",
    allow_remote: bool = False,
) -> "TarSource":
    if caption_key is None:
        caption_key = "none" if num_classes else "txt"
    return TarSource(
        list(shards),
        "" if caption_key == "none" else caption_key,
        num_classes,
        label_key,
        allow_remote,
    )


class TarSource:
    """Tar files; each is a part. What lacks an image, caption or label becomes an item that cannot
    be read.

    Raises DataError for shards that are missing, given twice, or not local files; and while
    reading, for one that is cut short or damaged, keys given twice, and labels outside [0,
    num_classes).
    """

    def __init__(
        self,
        patterns: list[str],
        caption_key: str,
        num_classes: int,
        label_key: str,
        allow_remote: bool,
    ) -> None:
        self._shards = expand(patterns, allow_remote)
        self._caption_key, self._label_key = caption_key, label_key
        self.captioned, self.num_classes = bool(caption_key), num_classes
        self.class_names: Sequence[str] = ()
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.size: int | None = None
        self._stems = [shard.rsplit("/", 1)[-1].split(".tar")[0] for shard in self._shards]
        if len(set(self._stems)) < len(
            self._stems
        ):  # a/000.tar b/000.tar: ids must differ all the same
            self._stems = [f"{number:05d}-{stem}" for number, stem in enumerate(self._stems)]
        local = [shard for shard in self._shards if os.path.isfile(shard)]
        sizes = [os.path.getsize(shard) for shard in local]
        folder = (
            os.path.basename(os.path.dirname(os.path.abspath(local[0])))
            if local
            else self._stems[0]
        )
        self.name = f"webdataset-{folder}"
        self.facts: dict[str, Any] = {
            "program": "data_prep.webdataset",
            "shards": patterns,
            "shard_files": len(self._shards),
            "shard_bytes": sum(sizes),
            "remote_shards": len(self._shards) - len(local),
            "num_classes": num_classes,
            "caption_key": caption_key or None,
            "label_key": label_key if num_classes else None,
        }
        here = set(local)  # by name, as a folder may move
        names = [
            stem if shard in here else shard
            for stem, shard in zip(self._stems, self._shards, strict=True)
        ]
        self.fingerprint = fingerprint(
            names, map(str, sizes), [caption_key, str(num_classes), label_key]
        )

    def parts(self, rows_per_shard: int) -> int:
        return len(self._shards)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        from webdataset.tariterators import group_by_keys

        shard, seen = self._shards[number], set[str]()
        try:
            with closing(_open(shard)) as stream:
                for sample in group_by_keys(_files(stream, shard)):
                    key = sample["__key__"]
                    if key in seen:
                        raise ValueError(
                            f"the key {key} comes twice; the files of a sample must follow each "
                            "other"
                        )
                    seen.add(key)
                    yield from self._items(f"{self._stems[number]}/{key}", sample, shard)
        except DataError:
            raise
        except (OSError, EOFError, ValueError, TarError, zlib.error, LZMAError) as error:
            reason = error.args[0] if isinstance(error, ValueError) and error.args else error
            raise DataError(
                f"{shard} cannot be read to its end: {reason}; restore or download it again, or "
                "leave it out of --shards"
            ) from error

    def _items(self, id: str, sample: dict[str, Any], shard: str) -> Iterator[Item]:
        """Of a sample; of one without an image several, where dots in file names put images
        together."""
        dotted = [key for key in sample if key.rpartition(".")[2] in IMAGES]
        if dotted and not set(dotted) & set(IMAGES):
            for key in dotted:
                yield Item(
                    f"{id}.{key}",
                    unusable("its name has dots: a sample's name ends at the first; rename it"),
                )
        else:
            yield self._item(id, sample, shard)

    def _item(self, id: str, sample: dict[str, Any], shard: str) -> Item:
        label = 0
        captions: tuple[str, ...] = ()
        try:
            kind = next((key for key in IMAGES if key in sample), None)
            if kind is None:
                has = ", ".join(key for key in sample if not key.startswith("__"))
                raise Unusable(f"it has no image ({', '.join(IMAGES)}), but {has}")
            image = _content(sample, kind)
            if self.captioned:
                captions = _captions(sample, self._caption_key)
            if self.num_classes:
                label = self._label(id, sample, shard)
        except Unusable as error:
            return Item(id, unusable(str(error)), captions=captions)
        return Item(id, given(image), label, captions, len(image))

    def _label(self, id: str, sample: dict[str, Any], shard: str) -> int:
        if self._label_key not in sample:
            raise Unusable(f"it has no label ({self._label_key})")
        text = _content(sample, self._label_key).decode("utf-8-sig", "replace").strip()
        try:
            label = class_index(text)
        except ValueError:
            label = None
        if label is None or not 0 <= label < self.num_classes:
            raise DataError(
                f"{shard}: label {text!r} of {id} is not an integer in [0, {self.num_classes}); "
                "correct --num-classes, or give the key of the labels with --label-key"
            )
        return label


def _captions(sample: dict[str, Any], key: str) -> tuple[str, ...]:
    try:
        if key in sample and key != "json":
            captions = clean([_content(sample, key).decode()])
        else:
            value = from_json(_content(sample, "json"))["caption"] if "json" in sample else None
            captions = clean([value] if isinstance(value, str) else value or ())
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Unusable(f"its caption cannot be read: {error!r}") from error
    if not captions:
        raise Unusable("it has no caption")
    return captions


def _content(sample: dict[str, Any], key: str) -> bytes:
    """Of one of its files. Raises Unusable for one that was too large to read."""
    if sample[key] is None:
        raise Unusable(f"its {key} is larger than {MOST_BYTES:,} bytes")
    content: bytes = sample[key]
    return content


class _Strict(TarInfo):
    """tarfile takes a member that begins with garbage, or the file's sudden end, for the archive's
    end."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the mark that ends an archive
            raise
        except HeaderError as error:
            raise ReadError(
                f"at byte {tarfile.offset:,} there is neither a file nor the mark that ends an "
                f"archive ({error})"
            ) from error


def _files(stream: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """What webdataset's tar_file_iterator yields, but never a part of the archive only."""
    with TarFile.open(fileobj=stream, mode="r|*", tarinfo=_Strict, encoding="utf-8") as tar:
        while (member := tar.next()) is not None:
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                file = tar.extractfile(member)
                assert file is not None
                data = file.read() if member.size <= MOST_BYTES else None
                yield {"fname": member.name, "data": data, "__url__": shard}
            tar.members = []  # type: ignore[attr-defined] # else the list of them grows
        while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
            if rest.strip(b"\0"):
                raise ReadError(
                    "something follows the mark that ends the archive, such as a second archive"
                )


def _open(shard: str) -> IO[bytes]:
    if os.path.isfile(shard):
        return open(shard, "rb")  # not gopen, which may rewrite the name
    from webdataset.gopen import gopen

    stream: IO[bytes] = gopen(shard)
    return stream


def expand(patterns: list[str], allow_remote: bool) -> list[str]:
    """Shards in the order given. Raises DataError for what is no local file, and addresses unless
    allowed."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(
            "tar files are read with webdataset; in the clone: pip install -e '.[prep]'"
        ) from error
    shards: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        try:
            names = [pattern] if os.path.isfile(pattern) else expand_urls(pattern)
        except (
            AssertionError,
            ValueError,
        ) as error:  # a variable that is not set, braces that do not close
            raise DataError(
                f"--shards {pattern} cannot be expanded: {error}; correct it"
            ) from error
        for name in names:
            if os.path.isfile(name):
                shards.append(name)
            elif urlparse(name).scheme:  # what webdataset would open other than as a local path
                if not allow_remote:
                    raise DataError(
                        f"--shards {name} is not a local file, and webdataset opens such addresses "
                        "by running commands; correct the path, or allow them with --allow-remote"
                    )
                shards.append(name)
            else:
                found = sorted(glob.glob(name)) if glob.has_magic(name) else []
                refuse_splits(name, splits_in(found), "name those of one with --shards")
                shards += found
                missing += [] if found else [name]
    if not patterns:
        raise DataError("--shards names no tar file; give at least one")
    if missing:
        raise DataError(
            f"{len(missing):,} shards are missing: {first_three(missing)}; correct --shards, or "
            "complete the folder"
        )
    refuse_twice("--shards", shards)
    return shards


def main(args: list[str] | None = None) -> int:
    return packing.main(WebDataset, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
