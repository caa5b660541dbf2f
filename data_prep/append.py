"""Adds a source to a packed set: new shards behind the old ones, which stay as they are. The set is
the old one until the new manifest is written.

    OUT/shard_a1_00000.arrow ...      the shards of the first addition, then a2 ...
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from data_prep.content import Known, content_hash
from data_prep.ids import ID_TAKEN, KnownIds
from data_prep.left_out import Totals
from data_prep.listing import Listings
from largescale.config.serialise import flatten
from largescale.data.format import read_manifest
from largescale.data.job_folder import APPEND, JOB, difference
from largescale.data.parts import Parts
from largescale.data.shards import ShardDataset
from largescale.errors import DataError

# Why an image is left out that the set has.
ALREADY = "its image is in the set already"
# What of a job an addition may have otherwise: where it comes from, and how the work is cut.
_FREE = (
    "source.",
    "info.name",
    "rows_per_shard",
    "batch_size",
    "device",
    "id_prefix",
    f"{APPEND}.",
)
# Entries of a manifest that write_manifest makes anew.
_WRITTEN = ("format", "info", "columns", "fingerprint", "rows", "shards", "empty_caption")

Places = Callable[[Mapping[str, Any], Mapping[str, Any]], Collection[str]]


class AddedParts(Parts):
    """The parts of a source that is added to a set. `job` names the set by its fingerprint, so that
    only this set grows."""

    def __init__(
        self,
        out: Path,
        job: dict[str, Any],
        parts: int,
        rank: int,
        world_size: int,
        places: Places,
    ) -> None:
        manifest = read_manifest(out)
        # From 1. The names of the new shards carry it, so that they differ from all others.
        self.number = len(manifest.get("additions", ())) + 1
        # By its fingerprint: once the set has grown otherwise, this job no longer fits it.
        addition = {"to": manifest["fingerprint"], "number": self.number}
        super().__init__(
            out,
            job | {APPEND: addition},
            parts,
            rank,
            world_size,
            places,
            other="another addition that is not done; finish it by its own command, or to give it "
            f"up, delete {out / 'packing'}",
        )

    @property
    def finished(self) -> bool:
        return self._addition() is not None

    @property
    def is_new(self) -> bool:
        """Whether nothing was begun in the folder."""
        return not (self.out / JOB).exists()

    def _addition(self) -> dict[str, Any] | None:
        """The job of this addition in the manifest, once that has it."""
        with suppress(DataError):
            ours = dict(flatten(self.job))
            for addition in read_manifest(self.out).get("additions", ()):
                theirs = dict(flatten(addition["job"]))
                places = self._places(theirs, ours)
                if not _differences(theirs, ours, places.__contains__):
                    return dict(addition["job"])
        return None

    def _job_in_folder(self) -> dict[str, Any]:
        done = self._addition()
        # Of the set as it was then: this job's is that of the set as it is.
        return super()._job_in_folder() if done is None else done | {APPEND: self.job[APPEND]}

    def _require_no_stray_shards(self) -> None:
        pass  # the set's own shards are there

    def shard_name(self, name: str) -> str:
        return name.replace("shard_", f"shard_a{self.number}_", 1)


def _differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], free: Callable[[str], bool]
) -> list[str]:
    differ = []
    # The keys of both: what only one of the jobs states is a difference too.
    for key in dict.fromkeys([*theirs, *ours]):
        there, here = theirs.get(key), ours.get(key)
        if there != here and not free(key) and not key.startswith(f"{APPEND}."):
            differ.append(difference(key, there, here))
    return differ


def check_alike(data: ShardDataset, job: dict[str, Any], captioned: bool) -> None:
    """Raises DataError where the images of a job would not be of one kind with those of the set."""
    found = data.manifest.get("job", {})
    if "crop" not in found:
        raise DataError(
            f"--append: {data.path} was not packed by a program that prepares images; pack into "
            "another --out"
        )
    theirs = dict(flatten(found))
    ours = dict(flatten(job))
    # What an older version did not note cannot be compared.
    noted = theirs.keys() | {key for key in ours if key.startswith("info.")}
    differ = _differences(theirs, ours, lambda key: key.startswith(_FREE) or key not in noted)
    has_captions = "captions" in data.manifest["columns"]
    if has_captions != captioned:
        differ.append(f"captions: {has_captions} there, {captioned} here")
    if differ:
        raise DataError(
            f"--append: {data.path} was packed otherwise, and all rows of a set must be alike. What "
            "differs:\n  "
            + "\n  ".join(differ)
            + "\ngive the encoders, --resolution, --max-tokens, "
            "--min-side, --max-pixels, --mirror and --precision of the set, and --classes where "
            "labels differ; or pack into another --out"
        )


def check_class_names(data: ShardDataset, names: Sequence[str]) -> None:
    """Raises DataError where labels stand for other classes than the set's."""
    known = data.manifest.get("class_names") or []
    # Not strict: either may have no names. The numbers of classes are compared with the jobs.
    for number, (there, here) in enumerate(zip(known, names, strict=False)):
        if there != here:
            raise DataError(
                f"--append: class {number} is {there} in {data.path}, and {here} in the source; "
                "name the set's classes, in its order, with --classes FILE"
            )


class SetSoFar:
    """The images and the ids that a set has when it grows, and notes on what cannot be known."""

    def __init__(self, data: ShardDataset, listings: Listings) -> None:
        self._images = Known(data)
        self.ids = KnownIds(data, listings)
        self.notes: list[str] = []
        if not self.images_known:
            self.notes.append(
                "images that the set has already are not found: a version that kept no hashes packed it"
            )

    @property
    def images_known(self) -> bool:
        """Whether it can be told which images the set has."""
        return self._images.complete

    def has(self, id: str, content: npt.NDArray[Any]) -> str | None:
        """Why a new image is left out; None where it is not."""
        if content_hash(content) in self._images:
            return ALREADY
        return ID_TAKEN if id in self.ids else None


def grown(
    data: ShardDataset, job: dict[str, Any], totals: Totals, skipped: Counter[str]
) -> dict[str, Any]:
    """The manifest's entries about a set that has grown, as write_manifest takes them. `totals`: of
    the new parts; `skipped`: how often each reason occurs in the source. Raises DataError where the
    set is no longer what it was."""
    manifest = data.manifest
    # Hours of encoding may lie between the first look at the set and this one.
    if read_manifest(data.path)["fingerprint"] != data.fingerprint:
        raise DataError(f"{data.path} has changed while images were added to it; run again")
    about = {key: value for key, value in manifest.items() if key not in _WRITTEN}
    count = skipped.total()
    # Not all of them: a reason may have a file's name in it, and be another for each image.
    frequent = dict(skipped.most_common(20))
    entry = {
        "job": job,
        "rows_before": len(data),
        "shards_before": len(manifest["shards"]),
        "fingerprint_before": data.fingerprint,
        "rows": sum(shard["rows"] for shard in totals.shards),
        "skipped": {"count": count, "reasons": frequent},
    }
    # Added up, as skipped.jsonl lists what every source of the set has left out.
    before = manifest["skipped"]
    reasons = dict(before["reasons"])
    for reason, times in frequent.items():
        reasons[reason] = reasons.get(reason, 0) + times
    return about | {
        "captions": manifest["captions"] + totals.captions,
        "captions_cut": manifest.get("captions_cut", 0) + totals.captions_cut,
        "skipped": {"count": before["count"] + count, "reasons": reasons},
        "additions": [*manifest.get("additions", ()), entry],
    }
