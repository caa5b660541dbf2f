"""The rows of the paper at toy size: every program and every row, on digits, emoji and, given its
path, CIFAR-10, in minutes on two cores. It shows that a row can be made, and nothing about the
paper."""

from dataclasses import dataclass, replace
from pathlib import Path

from eval.reproduction.paper_size import MODELS, PAPER
from eval.reproduction.rows import Cell, Model, Rows, Scale, Size, naive_interval
from eval.reproduction.sample_steps import Scoring
from eval.reproduction.steps import DataSet, Prepare

# A distance by the network that pip carries, which is no FID.
NETWORK = "efficientnet-lite0"
SCORING = Scoring(
    NETWORK,
    f"FD-{NETWORK}",
    (f"class score-{NETWORK}", f"Precision-{NETWORK}", f"Recall-{NETWORK}"),
)
# No toy run has the name of one of the paper's.
PREFIX = "toy_"

# The share of each data set that samples are compared with: some 400 images.
HELD_OUT = {"digits": "0.08", "emoji": "0.1", "cifar10": "0.008"}
STEPS = 80
# What figures G to K are drawn of trains for longer, as in the paper.
HEADLINE_STEPS = 160
CLUSTERS = 5
# Short enough that the curriculum is complete, and the EMA forgets the untrained weights.
SHORT = (
    *("--train.global-batch-size", "16", "--optimizer.ema-decay", "0.9"),
    *("--curriculum.patience", "5", "--checkpoint.every", "40", "--checkpoint.keep-every", "40"),
    *("--telemetry.preview-every", "0", "--telemetry.reference-every", "0"),
    "--telemetry.trackers",
)
UNLABELLED = ("--model.num-classes", "0", "--model.class-dropout-prob", "0")
LINEAR = ("--diffusion.schedule", "linear", "--curriculum.clusters", "snr")


@dataclass(frozen=True)
class StandIn:
    """What stands for a model of the paper."""

    preset: str
    data: str
    options: tuple[str, ...] = ()


STAND_INS = {
    "dit_b2_imagenet256": StandIn("digits", "digits"),
    "dit_b2_imagenet256_linear": StandIn("digits", "digits", LINEAR),
    "dit_s2_imagenet256": StandIn("digits", "digits", ("--model.depth", "2")),
    "dit_l2_imagenet256_400k": StandIn("digits", "digits", ("--model.depth", "6")),
    "dit_l2_imagenet256": StandIn("digits", "digits", ("--model.depth", "6")),
    "sit_b2_imagenet256": StandIn("digits_sit", "digits"),
    "dit_b2_ffhq256": StandIn("digits", "digits", UNLABELLED),
    "sit_b2_ffhq256": StandIn("digits_sit", "digits", UNLABELLED),
    "edm_ddpmpp_ffhq64": StandIn("digits_edm", "digits", UNLABELLED),
    "dit_b2_coco256": StandIn("emoji", "emoji", ("--model.depth", "2")),
    "edm_ddpmpp_cifar10": StandIn(
        "digits_edm",
        "cifar10",
        (
            *("--model.in-channels", "3", "--model.input-size", "32"),
            *("--model.unet.attn-resolutions", "16"),
        ),
    ),
}
STUDY = (
    *("--intervals", "2", "--steps", "40", "--patience", "10", "--num-samples", "1000"),
    *("--sampler-steps", "10", "--entropy-images", "1000", "--entropy-samples", "10"),
)
STUDIES = {
    "dit_b2_ffhq256": ("digits", UNLABELLED),
    "sit_b2_ffhq256": ("digits_sit", UNLABELLED),
    "edm_ddpmpp_ffhq64": ("digits_edm", UNLABELLED),
    "dit_b2_imagenet256": ("digits", ()),
}


def toy(root: Path, cifar10: Path | None = None) -> Scale:
    """The rows at toy size. `cifar10`: its packed data set; without it its rows are left out."""
    data = _data(root, with_cifar10=cifar10 is not None)
    models = {}
    for name, stand_in in STAND_INS.items():
        # Without its data set a model is left out, and its cells with it.
        if stand_in.data in data:
            models[name] = _model(MODELS[name], stand_in, data[stand_in.data])
    studies = {}
    for name, (study, options) in STUDIES.items():
        extra = ("--optimizer.ema-decay", "0.9", "--train.global-batch-size", "16", *options)
        studies[name] = (study, STUDY, extra)
    size = Size(
        name="toy",
        models=models,
        scoring=SCORING,
        prepare=_prepare(root, data, cifar10),
        samples=50,
        curve_samples=50,
        curve_every=40,
        picture_samples=20,
        class_samples=20,
        classes=(0, 2, 5, 7, 9),
        studies=studies,
    )
    return Rows(root, size).scale()


def _data(root: Path, *, with_cifar10: bool) -> dict[str, DataSet]:
    """By name, what is trained on. How it is guided is `_model`'s to say, as models share data."""
    names = ["digits", "emoji", *(["cifar10"] if with_cifar10 else [])]
    found = {}
    for name in names:
        found[name] = DataSet(
            name,
            root / "data" / name / "train",
            root / "references" / f"{name}.npz",
            cfg_scale=1.0,
            captions=name == "emoji",
        )
    return found


def _model(paper: Model, stand_in: StandIn, data: DataSet) -> Model:
    """A model of the paper as its toy."""
    steps = HEADLINE_STEPS if paper.name == "dit_l2_imagenet256" else STEPS
    return Model(
        paper.title,
        f"{PREFIX}{paper.name}",
        stand_in.preset,
        # Guided as in the paper: what is unlabelled there is so here, and has nothing to guide with.
        replace(data, cfg_scale=paper.data.cfg_scale),
        ("--train.steps", str(steps), *stand_in.options, *SHORT),
        paper.sampler,
        sampler_steps=10,
        naive_interval=naive_interval(steps, CLUSTERS),
    )


def _prepare(root: Path, data: dict[str, DataSet], cifar10: Path | None) -> tuple[Cell, ...]:
    """What packs the data, holds a part of it out, and computes the statistics of that part."""
    cells = []
    for name, dataset in data.items():
        folder = dataset.path.parent
        steps = []
        # CIFAR-10 is packed already, wherever it lies.
        if name == "cifar10" and cifar10:
            everything = cifar10
        else:
            everything = root / "data" / f"{name}_all"
            steps.append(Prepare(everything, f"data_prep.{name}", ("--out", str(everything))))
        split = (str(everything), "--share", HELD_OUT[name], "--out", str(folder))
        steps.append(Prepare(dataset.path, "data_prep.split", split))

        # Samples are compared with images that no model was trained on.
        reference = dataset.reference
        words = ("--reference", str(folder / "validation"), "--save-reference", str(reference))
        steps.append(Prepare(reference, "eval.score", (*words, *SCORING.options)))
        cells.append(Cell(name, tuple(steps)))
    return tuple(cells)


assert STAND_INS.keys() == MODELS.keys() and STUDIES.keys() == PAPER.studies.keys()
