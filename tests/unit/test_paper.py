"""eval.paper: that a row is made, resumed and shown, and what does not belong to it is listed."""

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval import paper, score
from eval.curves import scores
from eval.reproduction.found_runs import find_runs
from eval.reproduction.paper_size import MODELS
from eval.reproduction.pictures import write_pictures
from eval.reproduction.progress import status_lines, with_row_filter
from eval.reproduction.rows import Cell, Model, Rows, Scale, Size
from eval.reproduction.sample_steps import INCEPTION, ScoreSamples, Scoring
from eval.reproduction.steps import DataSet, Prepare, Train
from eval.reproduction.study_steps import StudyStage
from eval.reproduction.table import read_tables, row_lines, table_lines
from eval.scoring.extractors import Extractor, Features
from eval.training_runs import Run
from largescale import train as train_program
from largescale.checkpoint.files import checkpoints
from largescale.distributed.ranks import Ranks
from largescale.training import startup
from tests.conftest import QUIET, make_blobs
from tests.ranks import ROOT
from tests.unit.paper_figures import PUBLISHED, standing

CPU = torch.device("cpu")


# ---- the rows


@pytest.fixture(scope="module")
def make_paper() -> Any:
    spec = importlib.util.spec_from_file_location("make_paper", ROOT / "docs/make_paper.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


PAGE = (ROOT / "docs/paper.md").read_text()


def test_the_page_is_current(make_paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the GPU hours, of which one model's are computed here."""
    def without_hours(page: str) -> str:
        head, _, rest = page.partition("## GPU hours")
        return head + re.sub(r"(?m)( \| [\d.,]*){2} \|$", "", rest.partition("## Data")[2])

    config = make_paper.config_of(MODELS["dit_s2_imagenet256"].train(Path(), "vanilla"))
    hours = make_paper.shown(make_paper.of_training(config, "h100"))
    assert re.search(rf"\| DiT-S/2, imagenet256 \| 400,000 (\| \S+ ){{4}}\| {hours} \|", PAGE), hours
    monkeypatch.setattr(make_paper, "hours", lambda step, card: 0.0)
    monkeypatch.setattr(make_paper, "of_models", list)
    assert without_hours(make_paper.page(PAGE)) == without_hours(PAGE), "run python docs/make_paper.py"
    for cell, (fid, *_) in PUBLISHED.items():
        assert f"| {cell} | FID {fid:.2f}, " in PAGE


@pytest.mark.slow  # ten seconds: the operations and the memory of every model
def test_the_hours_are_current(make_paper: Any) -> None:
    assert make_paper.page(PAGE) == PAGE, "run python docs/make_paper.py"


def test_a_toy_table_is_none_of_the_pages(make_paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"scale": "toy", "rows": {}}))
    monkeypatch.setattr(make_paper, "OURS", tmp_path / "ours.json")
    monkeypatch.setattr(sys, "argv", ["make_paper.py", "--results", str(tmp_path / "table.json")])
    assert make_paper.main() == 2 and "is of toy size, not the paper's" in capsys.readouterr().err
    assert not (tmp_path / "ours.json").exists()


# ---- a small paper: Table A, figures A, D, F, and G to K, of the preset debug

SCORING = Scoring("tiny", "FD-tiny", ("class score-tiny", "Precision-tiny", "Recall-tiny"))
SHOWN = ("Table A", "Figure A", "Figure D", "Figure F", "Figures G to K")


def tiny(root: Path, data: Path, *, options: tuple[str, ...] = (), sampler_steps: int = 2, scoring: Scoring = SCORING,
         rows: tuple[str, ...] = SHOWN) -> Scale:
    """Rows of SHOWN, small. `options`: of every training."""
    of = DataSet("blobs", data, data, 1.5)
    common = ("--train.steps", "4", "--optimizer.ema-decay", "0.1", "--checkpoint.every", "2", "--checkpoint.keep-every", "2", *map(str, QUIET))
    models = {}
    for name, model in MODELS.items():
        # Two models stand for all: less to train.
        same = name if name in ("dit_b2_imagenet256", "dit_b2_imagenet256_linear") else "dit_b2_imagenet256"
        linear = ("--diffusion.schedule", "linear") if "linear" in same else ()
        own = (*linear, *common, *options)
        models[name] = Model(model.title, f"tiny_{same}", "debug", of, own, "ddim", sampler_steps, 1)
    study = ("digits", ("--preset", "debug", "--intervals", "2", "--steps", "3"), ())
    prepare = (Cell("blobs", (Prepare(data, "data_prep.digits", ()),)),)
    size = Size("tiny", models, scoring, prepare, 20, 20, 2, 6, 2, (1, 2, 3), dict.fromkeys(MODELS, study))
    return with_row_filter(Rows(root, size).scale(), rows)


def tiny_features(images: torch.Tensor) -> Features:
    x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
    return Features(x, None, x * 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, blobs: Path, one_rank: Ranks) -> Path:
    """All of it, by eval.paper run; the trainings and studies in this process."""
    root = tmp_path_factory.mktemp("paper") / "root"
    threads = torch.get_num_threads()

    def train_here(run: Run, nproc: int) -> None:
        assert train_program.main(list(run.arguments)) == 0
        torch.set_num_threads(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        extractor = Extractor("tiny", "tiny sha256:0", 12, None, 12, CPU, tiny_features)
        patch.setattr(score, "load_extractor", lambda spec, *args, **more: extractor)
        patch.setattr(scores, "plot", lambda *args: None)
        patch.setattr(startup, "Ranks", lambda device, *timeout: one_rank)
        patch.setattr(Run, "train", train_here)
        patch.setattr(paper, "toy", lambda folder, cifar10: tiny(folder, blobs))
        assert paper.main(["run", "--scale", "toy", "--root", str(root)]) == 0
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def test_every_row_is_made(made: Path, blobs: Path) -> None:
    scale = tiny(made, blobs)
    assert set(standing(scale, made).values()) == {"done"}
    table = (made / "table.md").read_text()
    assert "| cosine, vanilla | 30.27 | " in table and "| FID-50K, paper | FD-tiny-20, here |" in table and "which is no FID" in table
    assert "## Not in the tables" not in table
    found = json.loads((made / "table.json").read_text())["rows"]["Table A"]
    assert list(found) == [*PUBLISHED] and found["cosine, vanilla"]["FID"] != found["cosine, curriculum"]["FID"]
    assert found["linear, vanilla"]["run"] == "seed 0, fp32"
    for cell in scale.row("Table A").cells:
        last = cell.steps[-1]
        assert isinstance(last, ScoreSamples)
        assert f"{found[cell.name]['FID']:.2f} ± " in table
    pictures = {path.name for path in (made / "figures").glob("*.png")}
    assert pictures == {"figure_a.png", "figure_d.png", "figure_f.png", *(f"figures_g_to_k_class_{label}.png" for label in (1, 2, 3))}
    for name in pictures:
        assert np.asarray(Image.open(made / "figures" / name).convert("RGB")).std() > 0


def test_again_nothing_is_made(made: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(paper, "do", lambda *args: 1 / 0)
    monkeypatch.setattr(paper, "toy", lambda folder, cifar10: tiny(folder, blobs))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if "figures" not in path.parts and path.name[:5] != "table"}
    assert paper.main(["run", "--scale", "toy", "--root", str(made)]) == 0
    assert "0 missing" in capsys.readouterr().out.splitlines()[-1]
    after = {path: path.stat().st_mtime_ns for path in before if path.is_file()}
    assert after == {path: changed for path, changed in before.items() if path.is_file()}


def test_what_is_missing_is_made(copy: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a program that fails leaves its status."""
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    shutil.rmtree(run / "eval")
    done: list[str] = []
    monkeypatch.setattr(paper, "do", lambda step, found: done.append(step.call()[0]))
    monkeypatch.setattr(paper, "toy", lambda folder, cifar10: tiny(folder, blobs))
    assert paper.main(["run", "--scale", "toy", "--root", str(copy), "--rows", "Table A"]) == 0
    assert done == ["eval.sample", "eval.score"]
    monkeypatch.undo()
    scale = tiny(copy, blobs)
    with pytest.raises(paper.StepFailed, match="eval.score ended with status 2") as error:
        paper.do(scale.row("Table A").cells[0].steps[2], find_runs(copy))
    assert error.value.exit_status == 2


def test_the_same_noise_for_all_methods(copy: Path, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or there is no picture."""
    path = copy / "tiny_dit_b2_imagenet256/naive/figure/cfg2.0/provenance.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"device": "cuda"}))
    (copy / "figures/figure_d.png").unlink()
    written, missing = write_pictures(tiny(copy, blobs, rows=("Figure D",)), find_runs(copy), copy / "figures")
    assert missing == ["Figure D: naive was drawn with device=cuda, another with cpu"] and not written


# ---- how a cell stands

TABLE_A = ("Table A",)


def test_how_a_run_stands(copy: Path, blobs: Path) -> None:
    scale, run = tiny(copy, blobs, rows=TABLE_A), copy / "tiny_dit_b2_imagenet256_linear/vanilla"
    shutil.rmtree(run / "checkpoints/step_00000004")
    assert standing(scale, copy)["Table A, linear, vanilla"] == "stopped at step 4 of 4"      # 4 is not on disk
    record = run / "starts/start_00001.json"
    facts = json.loads(record.read_text()) | {"ended": None, "step": 3, "seen_unix_s": time.time()}
    record.write_text(json.dumps(facts))
    assert standing(scale, copy)["Table A, linear, vanilla"] == "running at step 3 of 4"
    record.write_text(json.dumps(facts | {"seen_unix_s": time.time() - 3600}))               # killed
    assert standing(scale, copy)["Table A, linear, vanilla"] == "stopped at step 3 of 4"
    # before its first checkpoint a run is known by the record of its start
    shutil.rmtree(run / "checkpoints")
    assert standing(scale, copy)["Table A, linear, vanilla"] == "stopped at step 3 of 4"
    shutil.rmtree(run)
    assert standing(scale, copy)["Table A, linear, vanilla"] == "missing"
    said = "\n".join(status_lines(scale, find_runs(copy)))
    assert "Table A: 3 of 4 done." in said and "next: python -m largescale.train debug --output" in said


def test_how_samples_and_studies_stand(copy: Path, blobs: Path) -> None:
    scale = tiny(copy, blobs)
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    (run / "eval/cfg1.5/results.jsonl").unlink()
    assert standing(scale, copy)["Table A, cosine, vanilla"] == "missing"
    (run / "eval/cfg1.5/provenance.json").unlink()
    (run / "eval/cfg1.5/packing").mkdir()
    (run / "eval/cfg1.5/packing/job.json").write_text("{}")
    assert standing(scale, copy)["Table A, cosine, vanilla"].endswith("eval/cfg1.5 is partly drawn")
    rows = copy / "tiny_dit_b2_imagenet256/vanilla/curve/results.jsonl"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    assert standing(scale, copy)["Figure F, DiT-S/2, vanilla"] == "1 of 2 checkpoints scored"
    (copy / "difficulty/tiny_dit_b2_imagenet256/interval_02/metrics.jsonl").unlink()
    assert standing(scale, copy)["Figure A, SiT on FFHQ"] == "1 of 2 intervals"


def test_a_run_may_lie_anywhere(copy: Path, blobs: Path) -> None:
    """It is known by its name and pacing; its samples go with it."""
    (copy / "tiny_dit_b2_imagenet256_linear/vanilla").rename(copy / "mine")
    scale = tiny(copy, blobs, rows=TABLE_A)
    assert standing(scale, copy)["Table A, linear, vanilla"] == "done"
    (copy / "mine/eval/cfg1.5/results.jsonl").unlink()
    said = "\n".join(status_lines(scale, find_runs(copy)))
    assert f"next: python -m eval.score {copy}/mine/eval/cfg1.5 --reference" in said


def test_a_run_behind_a_link(copy: Path, blobs: Path, tmp_path: Path) -> None:
    """On another disk, for example; found once, also where links lead in circles."""
    (copy / "tiny_dit_b2_imagenet256_linear").rename(tmp_path / "elsewhere")
    for place, target in ((copy / "mine", tmp_path / "elsewhere"), (copy / "again", tmp_path / "elsewhere"), (copy / "circle", copy)):
        place.symlink_to(target)
    assert standing(tiny(copy, blobs, rows=TABLE_A), copy)["Table A, linear, vanilla"] == "done"


def test_a_folder_that_cannot_be_listed(copy: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs may lie in it."""
    walk = os.walk

    def fails(root: Path, onerror: Any, **options: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", str(copy / "mine")))
        return walk(root, **options)

    monkeypatch.setattr(os, "walk", fails)
    scale = tiny(copy, blobs, rows=TABLE_A)
    assert f"  {copy}/mine cannot be read: Permission denied" in status_lines(scale, find_runs(copy))


def test_chosen_rows_have_no_notes_on_others(made: Path, blobs: Path) -> None:
    """Runs of rows that were not asked for are no strangers."""
    scale = tiny(made, blobs)
    chosen = with_row_filter(scale, ("Figure A",))
    assert status_lines(chosen, find_runs(made))[-1].endswith(", 0 notes") and [row.name for row in chosen.rows] == ["Data", "Figure A"]


# ---- bad input: listed, and not counted


def listed(scale: Scale, root: Path) -> str:
    """What the table says is not in it; no cell of table A's first row has a figure."""
    tables = read_tables(scale, find_runs(root))
    assert ("Table A", "cosine, vanilla") not in tables.scored
    empty = next(line for line in row_lines(scale.row("Table A"), tables) if line.startswith("| cosine, vanilla |"))
    assert empty == "| cosine, vanilla | 30.27 |  | 60.06 |  | 0.55 |  | 0.52 |  |  |"
    said = "\n".join(table_lines(tables)).partition("## Not in the tables")[2]
    assert all(note in "\n".join(status_lines(scale, find_runs(root))) for note in tables.notes if "table's first" not in note)
    return said


def test_other_settings(made: Path, blobs: Path) -> None:
    said = listed(tiny(made, blobs, rows=TABLE_A, options=("--optimizer.lr", "0.5")), made)
    assert "tiny_dit_b2_imagenet256/vanilla has other settings than the row: optimizer.lr: 0.001, not 0.5" in said
    said = listed(tiny(made, blobs, rows=TABLE_A, options=("--train.ds-config", "ds_configs/zero2_bf16.json")), made)
    assert "vanilla has other settings than the row: precision: fp32, not bf16" in said
    # how a run is carried out and watched makes it no other one
    free = ("--telemetry.log-every", "7", "--data.prefetch", "2", "--train.seed", "3", "--train.no-tf32")
    assert set(standing(tiny(made, blobs, options=free, rows=TABLE_A), made).values()) == {"done"}


def test_every_run_with_other_settings_is_listed(copy: Path, blobs: Path) -> None:
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    shutil.copytree(run, copy / "again")
    said = listed(tiny(copy, blobs, rows=TABLE_A, options=("--optimizer.lr", "0.5")), copy)
    assert all(f"{folder} has other settings than the row: optimizer.lr" in said for folder in (run, copy / "again"))


def test_settings_of_a_study(made: Path, blobs: Path) -> None:
    scale = tiny(made, blobs)
    step = scale.row("Figure A").cells[0].steps[0]
    assert isinstance(step, StudyStage)
    other = replace(step, extra=("--optimizer.lr", "0.5"))
    assert "interval_00 has other settings than the row: optimizer.lr: 0.001, not 0.5" in other.standing(find_runs(made)).text


def test_another_data_set(made: Path, blobs: Path, tmp_path: Path) -> None:
    other = make_blobs(tmp_path / "other", seed=1, rows=20)
    assert f"vanilla has other settings than the row: another data set than {other}" in listed(tiny(made, other, rows=TABLE_A), made)
    classes = ("--model.num-classes", "11")
    assert "data of 10 classes, not 11" in listed(tiny(made, blobs, rows=TABLE_A, options=classes), made)


def test_another_protocol(made: Path, blobs: Path) -> None:
    """Of samples, and of scores over training."""
    said = listed(tiny(made, blobs, sampler_steps=3, rows=("Table A", "Figure F")), made)
    assert "vanilla/eval/cfg1.5 has samples of another protocol: sampling.steps: 2, not 3" in said
    assert "tiny_dit_b2_imagenet256/vanilla/curve has 2 rows of another protocol" in said


@pytest.mark.parametrize(("asked", "wrong"), [
    ({"ema": {"width": 0.1}}, "ema.width: 0.1, not None"),
    ({"labels_seed": 0}, "labels_seed: 0, not None"),
    ({"classes": [1]}, "classes: [1], not None"),
])
def test_samples_that_were_asked_for_otherwise(asked: dict[str, Any], wrong: str, copy: Path, blobs: Path) -> None:
    path = copy / "tiny_dit_b2_imagenet256/vanilla/eval/cfg1.5/provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    assert f"samples of another protocol: {wrong}" in listed(tiny(copy, blobs, rows=TABLE_A), copy)


def test_samples_of_another_run(copy: Path, blobs: Path) -> None:
    run = copy / "tiny_dit_b2_imagenet256"
    shutil.rmtree(run / "vanilla/eval")
    shutil.copytree(run / "curriculum/eval", run / "vanilla/eval")
    assert "drawn from another run than the one that it lies in" in listed(tiny(copy, blobs, rows=TABLE_A), copy)


def test_another_network_is_no_fid(made: Path, blobs: Path) -> None:
    said = listed(tiny(made, blobs, rows=TABLE_A, scoring=INCEPTION), made)
    assert "vanilla/eval/cfg1.5 was scored by another network: FD-tiny-20, which is no FID-20" in said


def test_a_score_of_other_samples(copy: Path, blobs: Path) -> None:
    path = copy / "tiny_dit_b2_imagenet256/vanilla/eval/cfg1.5/results.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"fingerprint": "0"}) + "\n" + json.dumps(row | {"n": 10}) + "\n" + path.read_text()[:40])
    assert "vanilla/eval/cfg1.5 was scored with 20 samples, or with others" in listed(tiny(copy, blobs, rows=TABLE_A), copy)


def test_other_references_in_one_table(copy: Path, blobs: Path) -> None:
    path = copy / "tiny_dit_b2_imagenet256/curriculum/eval/cfg1.5/results.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"reference": {"fingerprint": "0"}}) + "\n")
    tables = read_tables(tiny(copy, blobs, rows=TABLE_A), find_runs(copy))
    assert ("Table A", "cosine, curriculum") not in tables.scored and ("Table A", "linear, vanilla") in tables.scored
    assert "curriculum/eval/cfg1.5 was compared with other images than the table's first run" in "\n".join(tables.notes)


def test_two_runs_for_one_cell(copy: Path, blobs: Path) -> None:
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    shutil.copytree(run, copy / "again")
    said = listed(tiny(copy, blobs, rows=TABLE_A), copy)
    assert f"two runs for one cell: {copy / 'again'}, {run}; move all but one out of {copy}" in said


def test_a_toy_run_among_those_of_the_papers_size(made: Path, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = listed(paper.paper(made), made)
    assert "tiny_dit_b2_imagenet256/vanilla is of no row at this size: tiny_dit_b2_imagenet256, vanilla" in said
    assert paper.main(["status", "--root", str(made)]) == 0
    said = capsys.readouterr().out
    assert f"{made}: 0 of {len([0 for row in paper.paper(made).rows for _ in row.cells])} cells done, 5 notes" in said
    assert f"next: PRESET=dit_b2_imagenet256 RUN={made}/dit_b2_imagenet256/vanilla DATA=data/imagenet256 sbatch slurm/train.sh" in said


def test_a_toy_run_with_a_name_of_the_papers(tmp_path: Path, made: Path, blobs: Path) -> None:
    """Its settings are not the paper's."""
    scale = paper.paper(made)
    cells = scale.row("Table A").cells
    named = replace(cells[0].steps[0], name="tiny_dit_b2_imagenet256")  # type: ignore[type-var]
    assert isinstance(named, Train)
    text = named.standing(find_runs(made)).text
    assert "has other settings than the row: " in text and "train.steps: 4, not 400000" in text and "model.depth: 2, not 12" in text


def test_a_run_that_cannot_be_read(copy: Path, blobs: Path) -> None:
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    newest = checkpoints(run)[0].path / "manifest.json"
    newest.write_text(newest.read_text().replace('"step": 4', '"step": 5'))
    assert f"{run} cannot be read: " in listed(tiny(copy, blobs, rows=TABLE_A), copy)


def test_a_model_of_a_study_that_cannot_be_read(copy: Path, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends no look at the others."""
    run = copy / "difficulty/tiny_dit_b2_imagenet256/interval_02"
    newest = checkpoints(run)[0].path / "manifest.json"
    newest.write_text(newest.read_text()[:100])
    scale = tiny(copy, blobs)
    lines = status_lines(scale, find_runs(copy))
    assert any(line.startswith(f"  {run} cannot be read: ") for line in lines)
    assert standing(scale, copy)["Table A, cosine, vanilla"] == "done"
    written, missing = write_pictures(scale, find_runs(copy), copy / "figures")
    assert any("Figure A" in line for line in missing) and copy / "figures/figure_f.png" in written


@pytest.mark.parametrize("foreign", [
    b'{"figures": null, "n": 20, "protocol": null}\n', b'{"figures": {"FD-tiny-20": null}, "fingerprint": null}\n', b'{"figures": {"FD-tiny-20": {"value": "1"}}}\n',
    b"{}\n", b"[1]\n", b"\xff\xfe\n",
])
def test_rows_of_another_program(foreign: bytes, copy: Path, blobs: Path) -> None:
    """They count for nothing, and hide nothing."""
    run = copy / "tiny_dit_b2_imagenet256/vanilla"
    for path in (run / "eval/cfg1.5/results.jsonl", run / "curve/results.jsonl"):
        path.write_bytes(path.read_bytes() + foreign)
    found = standing(tiny(copy, blobs), copy)
    assert found["Table A, cosine, vanilla"] == "done" == found["Figure F, DiT-S/2, vanilla"]


def test_curves_against_other_images(copy: Path, blobs: Path) -> None:
    """Within a run the newest row's images count; a panel has the curves against those of its first."""
    scale = tiny(copy, blobs, rows=("Figure F",))
    path = copy / "tiny_dit_b2_imagenet256/vanilla/curve/results.jsonl"
    first, *rest = path.read_text().splitlines()
    other = json.dumps(json.loads(first) | {"reference": {"fingerprint": "0"}})
    path.write_text("\n".join([other, *rest]) + "\n")
    assert standing(scale, copy)["Figure F, DiT-S/2, vanilla"] == "1 of 2 checkpoints scored"
    path.write_text("\n".join(json.dumps(json.loads(line) | {"reference": {"fingerprint": "0"}}) for line in (first, *rest)) + "\n")
    assert standing(scale, copy)["Figure F, DiT-S/2, vanilla"] == "done"
    _, missing = write_pictures(scale, find_runs(copy), copy / "figures")
    assert sum("against other images than the panel's first" in line for line in missing) > 0


def test_what_lies_in_the_way_is_said_first(copy: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made that comes before it."""
    monkeypatch.setattr(paper, "toy", lambda root, cifar10: tiny(root, blobs))
    shutil.copytree(copy / "tiny_dit_b2_imagenet256_linear/vanilla", copy / "again")
    shutil.rmtree(copy / "tiny_dit_b2_imagenet256/vanilla/eval")
    assert paper.main(["run", "--scale", "toy", "--root", str(copy)]) == 2
    said = capsys.readouterr()
    assert "two runs for one cell" in said.err and "[" not in said.out and not (copy / "tiny_dit_b2_imagenet256/vanilla/eval").exists()
    assert paper.main(["status", "--scale", "toy", "--root", str(copy), "--cifar10", str(copy / "none")]) == 2 and "none" in capsys.readouterr().err
