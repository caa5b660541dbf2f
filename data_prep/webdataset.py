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

from data_prep import packing, program
from data_prep.fingerprints import fingerprint
from data_prep.images import Unusable
from data_prep.listing import Listings
from data_prep.source_files import SourceFile, other_content, sizes, whole_tars, with_ends
from data_prep.sources import (
    Item,
    Skips,
    class_index,
    clean,
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
# Bytes of a file in an archive that are read at most: the archive may be compressed.
MOST_BYTES = 2**28


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

    def source(self, listings: Listings) -> "TarSource":
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
    """The source of these tar files. By default samples have captions, or labels where there are
    classes."""
    if caption_key is None:
        # Samples of classes may have no captions, and each would be skipped for that.
        caption_key = "none" if num_classes else "txt"
    if caption_key == "none":
        caption_key = ""
    return TarSource(list(shards), caption_key, num_classes, label_key, allow_remote)


class TarSource:
    """Tar files, each a part. A sample without image, caption or label becomes an item that cannot
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
        self._caption_key = caption_key
        self._label_key = label_key
        self.captioned = bool(caption_key)
        self.num_classes = num_classes
        self.class_names: Sequence[str] = ()
        self.skipped: Skips = []
        self.notes: list[str] = []
        self.size: int | None = None

        # Ids start with the shard's name; those of a/000.tar and b/000.tar must differ too.
        self._stems = list(map(_stem, self._shards))
        if len(set(self._stems)) < len(self._stems):
            self._stems = [f"{number:05d}-{stem}" for number, stem in enumerate(self._stems)]
        # Local shards are identified by name and size, as a folder may move; remote ones by address.
        self._local: list[str] = []
        names = []
        for shard, stem in zip(self._shards, self._stems, strict=True):
            is_local = os.path.isfile(shard)
            names.append(stem if is_local else shard)
            if is_local:
                self._local.append(shard)
        self.files: Sequence[SourceFile] = with_ends(whole_tars(self._local))
        settings = [caption_key, str(num_classes), label_key]
        self.fingerprint = fingerprint(names, map(str, sizes(self.files)), settings)

        # The data set is named after the folder of its first shard.
        folder = self._stems[0]
        if self._local:
            folder = os.path.basename(os.path.dirname(os.path.abspath(self._local[0])))
        self.name = f"webdataset-{folder}"
        self.facts: dict[str, Any] = {
            "program": "data_prep.webdataset",
            "shards": patterns,
            "shard_files": len(self._shards),
            "shard_bytes": sum(sizes(self.files)),
            "shard_ends": fingerprint(file.ends for file in self.files),
            "remote_shards": len(self._shards) - len(self._local),
            "num_classes": num_classes,
            "caption_key": caption_key or None,
            "label_key": label_key if num_classes else None,
        }

    def parts(self, rows_per_shard: int) -> int:
        return len(self._shards)

    def part(self, number: int, rows_per_shard: int) -> Iterator[Item]:
        from webdataset.tariterators import group_by_keys

        shard = self._shards[number]
        seen: set[str] = set()
        # Of keys that come twice webdataset makes two samples, each with a part of the files.
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
            # A ValueError may be webdataset's, whose other arguments are the complete sample.
            reason = error.args[0] if isinstance(error, ValueError) and error.args else error
            raise DataError(
                f"{shard} cannot be read to its end: {reason}; restored with as many bytes, the same "
                "command goes on; else download it again, or leave it out of --shards, with another "
                "--out"
            ) from error

    def ids(self) -> None:
        return None  # they are those of the files in the archives

    def changed(self) -> str | None:
        return other_content(self.files)

    def _items(self, id: str, sample: dict[str, Any], shard: str) -> Iterator[Item]:
        """The item of a sample; several where dots in file names put several images into one."""
        # `a.b.jpg` belongs to the sample `a`, with the key `b.jpg`.
        images = [key for key in sample if key.rpartition(".")[2] in IMAGES]
        if images and not set(images) & set(IMAGES):
            for key in images:
                yield Item(
                    f"{id}.{key}",
                    unusable("its name has dots: a sample's name ends at the first; rename it"),
                )
        else:
            yield self._item(id, sample, shard)

    def _item(self, id: str, sample: dict[str, Any], shard: str) -> Item:
        """The item of a sample; one that cannot be read where something is missing."""
        # A broken sample stays an item, which is skipped later, so that the reasons are in order.
        label = 0
        captions: tuple[str, ...] = ()
        try:
            image = _image(sample)
            if self.captioned:
                captions = _captions(sample, self._caption_key)
            if self.num_classes:
                label = self._label(id, sample, shard)
        except Unusable as error:
            return Item(id, unusable(str(error)), captions=captions)
        return Item(id, given(image), label, captions, len(image))

    def _label(self, id: str, sample: dict[str, Any], shard: str) -> int:
        """The label of a sample. Raises Unusable where it has none, and DataError for one that is
        outside the classes, as then all are probably wrong."""
        if self._label_key not in sample:
            raise Unusable(f"it has no label ({self._label_key})")
        # A label that is not UTF-8 is not a number either, and stands in the message.
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


def _stem(shard: str) -> str:
    """The name of a tar file without its folder and suffixes."""
    return shard.rsplit("/", 1)[-1].split(".tar")[0]


def _image(sample: dict[str, Any]) -> bytes:
    """A sample's image. Raises Unusable where it has none."""
    # The first of the formats counts, where a sample has an image in several.
    for key in IMAGES:
        if key in sample:
            return _content(sample, key)
    has = ", ".join(key for key in sample if not key.startswith("__"))
    raise Unusable(f"it has no image ({', '.join(IMAGES)}), but {has}")


def _captions(sample: dict[str, Any], key: str) -> tuple[str, ...]:
    """A sample's captions, of the file `key`, or where there is none, of the field caption in its
    JSON. Raises Unusable where it has none."""
    # Content of any kind is possible here: each error is a reason to skip the sample.
    texts: Any = ()
    try:
        if key in sample and key != "json":
            texts = [_content(sample, key).decode()]
        elif "json" in sample:
            value = from_json(_content(sample, "json"))["caption"]
            texts = [value] if isinstance(value, str) else value or ()
        captions = clean(texts)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Unusable(f"its caption cannot be read: {error!r}") from error
    if not captions:
        raise Unusable("it has no caption")
    return captions


def _content(sample: dict[str, Any], key: str) -> bytes:
    """The content of one of a sample's files. Raises Unusable for one that was too large to
    read."""
    if sample[key] is None:
        raise Unusable(f"its {key} is larger than {MOST_BYTES:,} bytes")
    content: bytes = sample[key]
    return content


class _Strict(TarInfo):
    """A member whose damaged header is an error. tarfile takes garbage, or the file's sudden end,
    for the end of the archive."""

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
    """The files that webdataset's tar_file_iterator yields. Raises an error where the archive ends
    early, which that does not notice."""
    with TarFile.open(fileobj=stream, mode="r|*", tarinfo=_Strict, encoding="utf-8") as tar:
        while (member := tar.next()) is not None:
            # webdataset skips names such as __meta__ too.
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                file = tar.extractfile(member)
                assert file is not None
                data = file.read() if member.size <= MOST_BYTES else None
                yield {"fname": member.name, "data": data, "__url__": shard}
            # tarfile keeps a list of all members, which would grow with the archive.
            tar.members = []  # type: ignore[attr-defined]

        # Only zeros may follow the end of the archive.
        while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
            if rest.strip(b"\0"):
                raise ReadError(
                    "something follows the mark that ends the archive, such as a second archive"
                )


def _open(shard: str) -> IO[bytes]:
    # Not gopen, which may rewrite the name of a local file.
    if os.path.isfile(shard):
        return open(shard, "rb")
    from webdataset.gopen import gopen

    stream: IO[bytes] = gopen(shard)
    return stream


def expand(patterns: list[str], allow_remote: bool) -> list[str]:
    """The shards that patterns stand for, in the order given. Raises DataError for files that are
    missing, and for addresses unless they are allowed."""
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
        except (AssertionError, ValueError) as error:
            # A variable that is not set, or braces that do not close.
            raise DataError(
                f"--shards {pattern} cannot be expanded: {error}; correct it"
            ) from error
        for name in names:
            found = _shards_named(name, allow_remote)
            shards += found
            if not found:
                missing.append(name)

    # All that are missing are reported at once.
    if not patterns:
        raise DataError("--shards names no tar file; give at least one")
    if missing:
        raise DataError(
            f"{len(missing):,} shards are missing: {first_three(missing)}; correct --shards, or "
            "complete the folder"
        )
    refuse_twice("--shards", shards)
    return shards


def _shards_named(name: str, allow_remote: bool) -> list[str]:
    """The shards of a path, a glob or an address; none where there are no such files."""
    if os.path.isfile(name):
        return [name]
    # webdataset would open this other than as a local path.
    if urlparse(name).scheme:
        if not allow_remote:
            raise DataError(
                f"--shards {name} is not a local file, and webdataset opens such addresses "
                "by running commands; correct the path, or allow them with --allow-remote"
            )
        return [name]
    if os.path.isdir(name):
        raise DataError(
            f"--shards {name} is a folder; name its tar files: '{os.path.join(name, '*.tar')}'"
        )
    found = sorted(glob.glob(name)) if glob.has_magic(name) else []
    refuse_splits(name, splits_in(found), "name those of one with --shards")
    return found


def main(args: list[str] | None = None) -> int:
    return program.main(WebDataset, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
