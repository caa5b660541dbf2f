"""The figures of a set of samples against a reference: features of both, then every figure that
they allow."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.scoring import npz
from eval.scoring.extractors import Clip, Extractor
from eval.scoring.image_sets import ImageSet, open_images
from eval.scoring.metrics import (
    FrechetReference,
    bias_note,
    class_score,
    clip_score,
    frechet_jackknife,
    kernel_distance,
)
from eval.scoring.moments import GroupedMoments
from eval.scoring.precision_recall import Balls, precision_recall
from eval.scoring.reference_statistics import Statistics, read_statistics
from largescale.errors import DataError, Stopped
from largescale.host.files import sha256
from largescale.host.signals import stop_requested

Metric = Literal["frechet", "spatial", "class", "kid", "neighbours", "clip"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# Groups of the jackknife: a distance is computed again without each of them.
GROUPS = 10


@dataclass(frozen=True)
class Figure:
    """One number of a result. `error`: its standard error, or the deviation between its parts;
    `error_is` names which."""

    name: str
    value: float
    error: float
    error_is: str
    better: Literal["lower", "higher"]


@dataclass
class ExtractedFeatures:
    """What is kept of the features of a set of images."""

    n: int
    moments: GroupedMoments
    spatial: GroupedMoments | None
    logits: Tensor | None  # (n, classes) float32, on the CPU
    kept: Tensor  # (m, D) float32, of evenly spaced images, on the CPU


def extract_features(
    images: ImageSet,
    extractor: Extractor,
    *,
    n: int,
    keep: int,
    batch_size: int,
    device: torch.device,
    what: str,
    logits_too: bool = False,
) -> ExtractedFeatures:
    """Extract the features of the first n images, and keep those of `keep` of them. `what`: the
    title of the progress bar. Raises DataError, Stopped."""
    moments = GroupedMoments(extractor.width, GROUPS, device)
    spatial = None
    if extractor.spatial_width:
        spatial = GroupedMoments(extractor.spatial_width, GROUPS, device)

    # Evenly spaced, as data sets are often sorted by class.
    keep = min(keep, n)
    chosen = np.zeros(n, bool)
    chosen[np.arange(keep) * n // max(keep, 1)] = True

    # Kept on the CPU, so that the GPU's memory does not limit how many.
    kept = []
    logits = []
    for numbers in _batches(n, batch_size, what):
        features = extractor(images.read(numbers))
        moments.add(features.pooled, numbers)
        if spatial is not None and features.spatial is not None:
            spatial.add(features.spatial, numbers)
        kept.append(features.pooled[torch.from_numpy(chosen[numbers]).to(device)].float().cpu())
        if logits_too and features.logits is not None:
            logits.append(features.logits.float().cpu())
    all_logits = torch.cat(logits) if logits else None
    return ExtractedFeatures(n, moments, spatial, all_logits, torch.cat(kept))


def _batches(n: int, batch_size: int, what: str) -> Any:
    """The numbers 0 .. n - 1 in batches, with a progress bar. Raises Stopped."""
    with tqdm(
        total=n,
        desc=what,
        unit=" images",
        dynamic_ncols=True,
        leave=False,
        delay=2,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    ) as bar:
        for start in range(0, n, batch_size):
            # Between batches, where nothing is half done.
            if stop_requested():
                raise Stopped
            numbers = np.arange(start, min(n, start + batch_size))
            yield numbers
            bar.update(len(numbers))


class Reference:
    """What samples are held against: images, or statistics of images, from one extractor.

    Roots of covariances and balls of neighbours, which cost the most, are made once for all
    sets."""

    def __init__(self, extractor: Extractor, statistics: Statistics, facts: dict[str, Any]) -> None:
        """Raises DataError for statistics of another extractor. `facts`: the reference's entry in a
        result."""
        self.extractor = extractor
        self.statistics = statistics
        self.facts = facts
        # ADM's files do not name the network; then the width is all that can be compared.
        if statistics.extractor not in (None, extractor.identity):
            raise DataError(
                f"the reference was made with {statistics.extractor}, the extractor is "
                f"{extractor.identity}; choose that --extractor, or make the reference anew"
            )
        if statistics.mean.shape != (extractor.width,):
            raise DataError(
                f"the reference has {len(statistics.mean)} features, {extractor.name} has "
                f"{extractor.width}; choose the --extractor that made it"
            )
        self._balls: Balls | None = None
        self._frechet: dict[str, FrechetReference] = {}

    def frechet(
        self, kind: Literal["pooled", "spatial"], device: torch.device
    ) -> FrechetReference | None:
        """The Gaussian of one kind of features, kept for all sets; None where there is none."""
        s = self.statistics
        # Roots of covariances are computed once for all sets.
        mean, cov = (s.mean, s.cov) if kind == "pooled" else (s.mean_spatial, s.cov_spatial)
        if mean is None or cov is None:
            return None
        if kind not in self._frechet:
            self._frechet[kind] = FrechetReference(
                torch.as_tensor(mean, device=device), torch.as_tensor(cov, device=device)
            )
        return self._frechet[kind]

    def balls(self, device: torch.device) -> Balls | None:
        """The balls of Precision, kept for all sets; None where there are no single features."""
        if self._balls is None and self.statistics.features is not None:
            features = torch.as_tensor(self.statistics.features, device=device)
            self._balls = Balls(features, name="reference features")
        return self._balls


def statistics_of(
    seen: ExtractedFeatures, extractor: Extractor, resolution: tuple[int, int] | None
) -> Statistics:
    """The statistics of extracted features."""
    # Arrays on the CPU, as a file can hold them.
    pooled = seen.moments.total()
    spatial = seen.spatial and seen.spatial.total()
    return Statistics(
        mean=pooled.mean.cpu().numpy(),
        cov=pooled.cov.cpu().numpy(),
        mean_spatial=spatial.mean.cpu().numpy() if spatial else None,
        cov_spatial=spatial.cov.cpu().numpy() if spatial else None,
        count=seen.n,
        extractor=extractor.identity,
        resolution=resolution,
        features=seen.kept.numpy(),
    )


def open_reference(
    path: Path,
    extractor: Extractor,
    *,
    sizes: Sequence[tuple[int, int]],
    resize: int | None,
    keep: int,
    batch_size: int,
    device: torch.device,
) -> Reference:
    """The reference of samples of these sizes: a file of statistics, or images, whose features are
    extracted now. Raises DataError."""

    def extract(images: ImageSet) -> ExtractedFeatures:
        return extract_features(
            images,
            extractor,
            n=len(images),
            keep=keep,
            batch_size=batch_size,
            device=device,
            what="reference",
        )

    holds = npz.names(path)
    if {"mu", "sigma"} <= holds:
        statistics = read_statistics(path)
        check_resolution(path, statistics.resolution, sizes)
        # ADM's files: statistics of all images, and some of the images for Precision, Recall and
        # KID.
        if statistics.features is None and "arr_0" in holds:
            features = extract(open_images(path)).kept.numpy()
            statistics = replace(statistics, features=features)
        facts = {"path": str(path), "fingerprint": sha256(path), "count": statistics.count}
        return Reference(extractor, statistics, facts)

    # The sizes are compared before the minutes that extraction takes.
    images = open_images(path, verify=True, resize=resize)
    check_resolution(path, images.resolution, sizes)
    statistics = statistics_of(extract(images), extractor, images.resolution)
    facts = {"path": str(path), "fingerprint": images.fingerprint, "count": len(images)}
    return Reference(extractor, statistics, facts)


def check_resolution(
    path: Path, resolution: tuple[int, int] | None, sizes: Sequence[tuple[int, int]]
) -> None:
    """Raises DataError for samples of another size than the reference. Networks scale whatever they
    are given: the difference would be taken for one between the pictures."""
    for size in sizes:
        # A file of statistics need not know the size of its images.
        if resolution is not None and resolution != size:
            of_reference = "x".join(map(str, resolution))
            of_samples = "x".join(map(str, size))
            raise DataError(
                f"the reference {path} has images of {of_reference}, the samples {of_samples}; give "
                f"one of their size, or images and eval.score --resize {size[0]}"
            )


def figures(
    seen: ExtractedFeatures,
    reference: Reference,
    metrics: Sequence[Metric],
    device: torch.device,
    kid_subset: int = 1000,
) -> tuple[list[Figure], list[str]]:
    """Every figure that samples and reference allow, and notes on what a reader must know."""
    found: list[Figure] = []
    notes: list[str] = []
    if {"frechet", "spatial"} & set(metrics):
        notes += _notes_on_counts(seen, reference)
    # Those that need the features of single images.
    if {"kid", "neighbours"} & set(metrics):
        notes += _notes_on_features(seen, reference)
    for metric, figures_of in FIGURES.items():
        if metric in metrics:
            more, remarks = figures_of(seen, reference, device, kid_subset)
            found += more
            notes += remarks
    return found, notes


def _notes_on_counts(seen: ExtractedFeatures, reference: Reference) -> list[str]:
    """Notes on a Frechet distance of so many images."""
    width = reference.extractor.width
    count = reference.statistics.count
    notes = []
    if note := bias_note(seen.n, width):
        notes.append(note)
    # The reference's covariance is singular too where it has fewer images than features.
    if count is not None and count <= width:
        notes.append(
            f"the reference has {count:,} images for {width:,} features: its covariance is "
            "singular; take more"
        )
    return notes


def _notes_on_features(seen: ExtractedFeatures, reference: Reference) -> list[str]:
    """Notes on how many images KID, Precision and Recall are computed from."""
    features = reference.statistics.features
    # ADM's and pytorch-fid's files may hold neither.
    if features is None:
        return ["no KID, Precision and Recall: the reference has neither images nor features"]
    notes = []
    # Both are estimates over what was kept, which a reader has to know.
    if len(seen.kept) < seen.n:
        notes.append(f"KID, Precision and Recall of {len(seen.kept):,} of the {seen.n:,} samples")
    if len(features) != reference.statistics.count:
        notes.append(f"KID, Precision and Recall against {len(features):,} images of the reference")
    return notes


# The figures of one metric, and notes on them; none where the samples or the reference do not allow
# it.
Scored = tuple[list[Figure], list[str]]


def _frechet(seen: ExtractedFeatures, reference: Reference, device: torch.device, _: int) -> Scored:
    """FID, or the distance of another network by its own name."""
    frechet = reference.frechet("pooled", device)
    if not frechet:
        return [], []
    # The name holds the number of samples: distances of different numbers do not compare.
    name = f"{reference.extractor.frechet_name}-{short(seen.n)}"
    of = frechet_jackknife(frechet, seen.moments)
    return [Figure(name, of.value, of.standard_error, "jackknife", "lower")], []


def _spatial(seen: ExtractedFeatures, reference: Reference, device: torch.device, _: int) -> Scored:
    """sFID, or that of another network."""
    frechet = reference.frechet("spatial", device) if seen.spatial else None
    if not frechet or not seen.spatial:
        return [], []
    extractor = reference.extractor
    name = "sFID" if extractor.fid else f"s{extractor.frechet_name}"
    of = frechet_jackknife(frechet, seen.spatial)
    figure = Figure(f"{name}-{short(seen.n)}", of.value, of.standard_error, "jackknife", "lower")
    return [figure], []


def _class_score(
    seen: ExtractedFeatures, reference: Reference, device: torch.device, _: int
) -> Scored:
    """The Inception Score, or another network's; it needs no reference."""
    if seen.logits is None:
        return [], []
    spread = class_score(seen.logits.to(device), splits=min(10, seen.n))
    extractor = reference.extractor
    name = "IS" if extractor.fid else f"class score-{extractor.name}"
    return [Figure(name, spread.mean, spread.std, "between splits", "higher")], []


def _kid(
    seen: ExtractedFeatures, reference: Reference, device: torch.device, subset: int
) -> Scored:
    """KID over subsets of `subset` images, or of half of them where there are fewer."""
    if reference.statistics.features is None:
        return [], []
    extractor = reference.extractor
    # In subsets, as papers report it, so that an error comes with it.
    features = torch.as_tensor(reference.statistics.features, device=device)
    # Subsets that hold all images would not differ.
    fewest = min(len(seen.kept), len(features))
    size = subset if fewest >= subset else max(2, fewest // 2)
    spread = kernel_distance(seen.kept.to(device), features, subset_size=size)
    name = "KID" if extractor.fid else f"KD-{extractor.name}"
    notes = [f"KID over subsets of {size:,}, not of {subset:,}"] if size < subset else []
    return [Figure(name, spread.mean, spread.std, "between subsets", "lower")], notes


def _neighbours(
    seen: ExtractedFeatures, reference: Reference, device: torch.device, _: int
) -> Scored:
    """Precision and Recall."""
    balls = reference.balls(device)
    # Statistics without features, as pytorch-fid's, have no neighbours.
    if not balls:
        return [], []
    both = precision_recall(Balls(seen.kept.to(device), name="samples"), balls)
    suffix = "" if reference.extractor.fid else f"-{reference.extractor.name}"
    found = []
    for name, share in (("Precision", both.precision), ("Recall", both.recall)):
        found.append(Figure(name + suffix, share.value, share.standard_error, "binomial", "higher"))
    return found, []


# By metric, in the order of the report. The CLIP score, which reads texts too, is `text_figure`.
FIGURES: dict[str, Callable[[ExtractedFeatures, Reference, torch.device, int], Scored]] = {
    "frechet": _frechet,
    "spatial": _spatial,
    "class": _class_score,
    "kid": _kid,
    "neighbours": _neighbours,
}


def text_figure(
    images: ImageSet, clip: Clip, *, n: int, batch_size: int, device: torch.device
) -> Figure:
    """How well the images fit the texts that they were asked for. Raises DataError where they have
    none."""
    of_images = []
    of_texts = []
    for numbers in _batches(n, batch_size, "CLIP score"):
        texts = images.texts(numbers)
        if texts is None:
            raise DataError(
                "the CLIP score needs the texts that the samples were asked for, and there are "
                "none; leave out --clip"
            )
        of_images.append(clip(images.read(numbers)).pooled)
        # Of several captions the first is the one that was asked for.
        of_texts.append(clip.encode_text([captions[0] for captions in texts]))
    score = clip_score(torch.cat(of_images), torch.cat(of_texts))
    return Figure(
        f"CLIP score-{clip.name}", score.value, score.standard_error, "standard error", "higher"
    )


def short(n: int) -> str:
    """A number of samples as the names of figures have it: 50000 as 50K."""
    return f"{n // 1000}K" if n % 1000 == 0 else str(n)


def plain(figure: Figure) -> dict[str, Any]:
    """A figure as JSON values, which have no infinity: a value that is not finite is None."""
    return {**asdict(figure), "value": figure.value if math.isfinite(figure.value) else None}
