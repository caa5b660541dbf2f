"""The rows of the paper, from its appendix: what each shows, what makes it, and the figures that were
published. The tables of the main text are not to be had here, so their cells have no figure of the
paper's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.reproduction.found_runs import KINDS
from eval.reproduction.sample_steps import Draw, ScoreOverTraining, ScoreSamples, Scoring
from eval.reproduction.steps import DataSet, Step, Train
from eval.reproduction.study_steps import Measured, StudyStage
from largescale.diffusion.objective import SamplerName

# The figures of Table A, in its order.
FIGURES = ("FID", "IS", "Precision", "Recall")
# Of figures G to K.
CLASSES = (207, 388, 972, 975, 291)


@dataclass(frozen=True)
class Cell:
    """What one row of a table, or one part of a figure, is made by, in this order."""

    name: str
    steps: tuple[Step, ...]
    published: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures, by FIGURES."""


@dataclass(frozen=True)
class Row:
    """A table, figure or section of the paper."""

    name: str
    shows: str
    cells: tuple[Cell, ...]
    published: str
    """What the paper has there, in words."""


@dataclass(frozen=True)
class Scale:
    """All rows at one size."""

    name: str
    root: Path
    rows: tuple[Row, ...]
    scoring: Scoring
    whole: "Scale | None" = None
    """The scale that these rows were chosen of; None for all rows."""

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Model:
    """A model of the paper: a preset, what is changed of it, and how it is sampled."""

    title: str
    name: str
    preset: str
    data: DataSet
    options: tuple[str, ...]
    sampler: SamplerName
    sampler_steps: int
    naive_interval: int

    def train(self, root: Path, kind: str) -> Train:
        """Its training by one of KINDS."""
        method = f"naive@interval={self.naive_interval}" if kind == "naive" else kind
        return Train(root, self.name, self.preset, method, self.data, self.options)


def naive_interval(steps: int, clusters: int) -> int:
    """Steps of a stage of NaiveCL, whose stages take half of the run, as in eval.compare."""
    return steps // (2 * clusters)


@dataclass(frozen=True)
class Size:
    """What differs between the paper's size and a smaller one."""

    name: str
    models: Mapping[str, Model]
    scoring: Scoring
    prepare: tuple[Cell, ...]
    samples: int
    """Samples of a score."""
    curve_samples: int
    curve_every: int
    """Steps between the checkpoints of figure F."""
    picture_samples: int
    class_samples: int
    """Samples of each class of figures G to K."""
    classes: tuple[int, ...]
    studies: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]]
    """By the model's name: the study of eval.difficulty, its options, and those of its training."""


# ---- the rows


@dataclass(frozen=True)
class Rows:
    """Makes the rows of one size below a folder."""

    root: Path
    size: Size

    def scale(self) -> Scale:
        """All rows, in the paper's order, after the data that they need."""
        rows = (
            Row("Data", "What is trained on, and compared with.", self.size.prepare, ""),
            self.table_a(),
            *self.difficulty(),
            *self.pictures(),
            self.figure_f(),
            self.figures_g_to_k(),
            *self.main_text(),
        )
        return Scale(self.size.name, self.root, rows, self.size.scoring)

    # ---- steps

    def scored(self, model: str, kind: str) -> tuple[Step, ...]:
        """A training, its samples, and their score."""
        chosen = self.size.models[model]
        train = chosen.train(self.root, kind)
        draw = Draw(
            train,
            "eval",
            self.size.samples,
            chosen.data.cfg_scale,
            chosen.sampler,
            chosen.sampler_steps,
            scored=True,
        )
        return train, draw, ScoreSamples(draw, self.size.scoring)

    def pictured(self, model: str, kind: str) -> tuple[Step, ...]:
        """A training, and a few samples of it: at scale 2.0 where there is something to guide
        with, the same noise whatever the method."""
        chosen = self.size.models[model]
        train = chosen.train(self.root, kind)
        # Scores at scale 1 mean that the model has nothing to guide with.
        guided = chosen.data.cfg_scale != 1
        classes = self.size.classes if guided and not chosen.data.captions else ()
        draw = Draw(
            train,
            "figure",
            self.size.picture_samples,
            2.0 if guided else 1.0,
            chosen.sampler,
            chosen.sampler_steps,
            classes,
        )
        return train, draw

    def study(self, model: str, *stages: Measured) -> tuple[Step, ...]:
        """Stages of the difficulty study of a model."""
        study, options, extra = self.size.studies[model]
        out = self.root / "difficulty" / self.size.models[model].name
        data = self.size.models[model].data
        steps = []
        for stage in stages:
            steps.append(StudyStage(study, stage, out, data, options, extra))
        return tuple(steps)

    # ---- tables and figures

    def table_a(self) -> Row:
        """Table A, whose model the appendix does not name."""
        published: Mapping[tuple[str, str], tuple[float, ...]] = {
            ("cosine", "vanilla"): (30.27, 60.06, 0.55, 0.52),
            ("cosine", "curriculum"): (22.22, 75.98, 0.62, 0.52),
            ("linear", "vanilla"): (16.99, 83.62, 0.68, 0.53),
            ("linear", "curriculum"): (16.03, 87.66, 0.69, 0.53),
        }
        cells = []
        for (schedule, kind), figures in published.items():
            suffix = "_linear" if schedule == "linear" else ""
            steps = self.scored(f"dit_b2_imagenet256{suffix}", kind)
            figures_by_name = dict(zip(FIGURES, figures, strict=True))
            cells.append(Cell(f"{schedule}, {kind}", steps, figures_by_name))
        return Row(
            "Table A",
            "ImageNet 256 x 256, class-conditional: the curriculum under both noise schedules; under "
            "the linear one its clusters lie at the cosine schedule's SNRs.",
            tuple(cells),
            "the figures in the table",
        )

    def difficulty(self) -> tuple[Row, ...]:
        """Figures A and B, and sections B and C: which noise levels are hard."""
        section_b = []
        for title, model in (
            ("DiT-B/2 on FFHQ", "dit_b2_ffhq256"),
            ("SiT on FFHQ", "sit_b2_ffhq256"),
            ("EDM's DDPM++ on FFHQ, 4,000 kimg", "edm_ddpmpp_ffhq64"),
        ):
            # Every cell names all that it needs; a step that several of them share is done once.
            section_b.append(Cell(title, self.study(model, "train", "denoise")))
        return (
            Row(
                "Figure A",
                "SiT, a model M_i for each interval of noise levels: the step at which its loss begins "
                "to oscillate, counted after step 100.",
                (Cell("SiT on FFHQ", self.study("sit_b2_ffhq256", "train")),),
                "lower timesteps later; all stable within 20K steps",
            ),
            Row(
                "Figure B",
                "DiT on ImageNet: the loss of each M_i.",
                (Cell("DiT-B/2 on ImageNet", self.study("dit_b2_imagenet256", "train")),),
                "the same order",
            ),
            Row(
                "Section B",
                "FID of 10K samples in which M_i denoises its own interval and the full model the rest; "
                "20K steps.",
                tuple(section_b),
                "in the main text",
            ),
            Row(
                "Section C",
                "KL(p_{t-1} to p_t) by Monte Carlo, 5,000 images.",
                (Cell("FFHQ, cosine schedule", self.study("dit_b2_ffhq256", "entropy")),),
                "rises as t falls, diverges at 0",
            ),
        )

    def pictures(self) -> tuple[Row, ...]:
        """Figures C to E."""
        rows = []
        for letter, title, model in (
            ("C", "FFHQ", "dit_b2_ffhq256"),
            ("D", "ImageNet", "dit_b2_imagenet256"),
            ("E", "MS-COCO", "dit_b2_coco256"),
        ):
            cells = [Cell(kind, self.pictured(model, kind)) for kind in KINDS.values()]
            rows.append(
                Row(
                    f"Figure {letter}",
                    f"{title}: samples of vanilla, NaiveCL and the curriculum on the same noise; DiT-B "
                    "at the end of training.",
                    tuple(cells),
                    "pictures",
                )
            )
        return tuple(rows)

    def figure_f(self) -> Row:
        """FID-10K over training."""
        cells = []
        for model in ("dit_s2_imagenet256", "dit_l2_imagenet256_400k"):
            chosen = self.size.models[model]
            for kind in ("vanilla", "curriculum"):
                train = chosen.train(self.root, kind)
                curve = ScoreOverTraining(
                    train,
                    self.size.curve_samples,
                    self.size.curve_every,
                    chosen.sampler,
                    chosen.sampler_steps,
                    self.size.scoring,
                )
                cells.append(Cell(f"{chosen.title}, {kind}", (train, curve)))
        return Row(
            "Figure F",
            "FID-10K over training, DiT-S and DiT-L on ImageNet.",
            tuple(cells),
            "the curriculum is ahead in both",
        )

    def figures_g_to_k(self) -> Row:
        """Uncurated samples of single classes."""
        chosen = self.size.models["dit_l2_imagenet256"]
        train = chosen.train(self.root, "curriculum")
        classes = self.size.classes
        # As many of each class, as samples get the classes in turn.
        draw = Draw(
            train,
            "classes",
            self.size.class_samples * len(classes),
            2.0,
            chosen.sampler,
            chosen.sampler_steps,
            classes,
        )
        listed = ", ".join(map(str, CLASSES))
        return Row(
            "Figures G to K",
            f"DiT-L/2 after 2M steps: uncurated 256 x 256 samples of the classes {listed}, at scale 2.0.",
            (Cell("curriculum", (train, draw)),),
            "pictures",
        )

    def main_text(self) -> tuple[Row, ...]:
        """The tables of the main text, by data set."""
        models_of: Mapping[str, Sequence[str]] = {
            "FFHQ": ("dit_b2_ffhq256", "sit_b2_ffhq256", "edm_ddpmpp_ffhq64"),
            "ImageNet": (
                "dit_s2_imagenet256",
                "dit_b2_imagenet256",
                "dit_l2_imagenet256_400k",
                "sit_b2_imagenet256",
            ),
            "MS-COCO": ("dit_b2_coco256",),
            "CIFAR-10": ("edm_ddpmpp_cifar10",),
        }
        rows = []
        for title, models in models_of.items():
            cells = []
            for model in models:
                # A smaller size may lack a data set, and so its models.
                if model not in self.size.models:
                    continue
                for kind in KINDS.values():
                    name = f"{self.size.models[model].title}, {kind}"
                    cells.append(Cell(name, self.scored(model, kind)))
            # The headline was trained with the curriculum.
            if title == "ImageNet":
                headline = self.size.models["dit_l2_imagenet256"].title
                steps = self.scored("dit_l2_imagenet256", "curriculum")
                cells.append(Cell(f"{headline}, curriculum", steps))
            if cells:
                shows = f"{title}: vanilla, NaiveCL and the curriculum."
                rows.append(Row(title, shows, tuple(cells), "in the main text"))
        return tuple(rows)
