"""eval.difficulty: what it measures, what it trains, what it leaves alone, and what it says when something is wrong."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import difficulty, score, training_runs
from eval.difficulty_study import report
from eval.difficulty_study import study as study_module
from eval.difficulty_study.convergence import read_losses
from eval.difficulty_study.denoising import SplicedSampler
from eval.difficulty_study.relative_entropy import noise_levels, one_kernel
from eval.difficulty_study.study import STUDIES, Plan, Study
from eval.sample import Sample
from eval.training_runs import Run, TrainingFailed
from largescale import train as train_program
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.diffusion.build import build_objective
from largescale.errors import Stopped
from tests.conftest import RunHere, make_blobs
from tests.unit.tiny_extractor import EXTRACTOR


def test_the_papers_settings() -> None:
    for name, study in STUDIES.items():
        plan = Plan(name, replace(study, stages=("report",), device="cpu"))
        assert len(plan.runs) == study.intervals + 1
        Sample(Path("run"), Path("out"), sampler=study.sampler, steps=study.sampler_steps, device="cpu").check()
    for name, preset, evaluations in (("paper", "dit_b2_ffhq256", 250), ("paper_sit", "sit_b2_ffhq256", 250),
                                      ("paper_edm", "edm_ddpmpp_ffhq64", 40)):
        study = STUDIES[name]
        config = Plan(name, replace(study, stages=("report",), device="cpu")).config
        assert (study.preset, study.intervals, study.num_samples, study.entropy_images) == (preset, 20, 10_000, 5_000)
        assert (config.train.global_batch_size, config.diffusion.timesteps, study.patience) == (256, 1000, 200)
        assert study.sampler_steps == evaluations
    assert STUDIES["paper"].steps == STUDIES["paper_sit"].steps == 20_000
    assert STUDIES["paper_edm"].steps * 256 == 4_000_000


def test_what_is_trained() -> None:
    study = replace(STUDIES["digits"], stages=("report",), device="cpu", data=Path("elsewhere"))
    runs = Plan("digits", study, ["--optimizer.lr", "1e-3"]).runs
    for i, run in enumerate(runs):
        c: Config = run.config
        assert (c.curriculum.only_cluster, c.curriculum.n_clusters, c.curriculum.pacing) == (i, 5, "none")
        assert (c.telemetry.log_every, c.train.steps, c.data.path, c.optimizer.lr) == (1, 400, "elsewhere", 1e-3)
        assert run.folder == Path(f"runs/difficulty/digits/interval_{i:02}")
        assert run.command(1)[1:4] == ["-m", "largescale.train", "digits"]
        assert training_runs.configure("digits", run.arguments[1:]) == c     # as the program reads them
        assert run.command(2)[1:3] == ["-m", "torch.distributed.run"] and "--nproc-per-node" in run.command(2)


AFTER = ("--checkpoint.every", 100, "--optimizer.lr", 0.01, "--optimizer.ema-decay", 0.5)   # 8 steps show


@pytest.mark.parametrize(("option", "value"), [
    ("steps", 7), ("intervals", 3), ("full", Path("x")), ("num_samples", 2000), ("sampler", "ddpm"), ("sampler_steps", 9), ("cfg_scale", 2.0),
    ("seed", 1), ("reference", Path("x")), ("extractor", "inception"), ("inception_weights", Path("x")), ("vae", "x")])
def test_what_scores_must_share(option: str, value: Any) -> None:
    study = replace(STUDIES["digits"], device="cpu")
    assert replace(study, **{option: value}).protocol() != study.protocol()
    assert replace(study, out=Path("x"), nproc=2, entropy_images=9, keep_samples=True).protocol() == study.protocol()


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def study(blobs: Path, tmp_path: Path, trained_before: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`eval.difficulty digits` with the model of `debug`, on 300 images; (exit status, what it said, runs trained)."""
    trained: list[str] = []

    def train(run: Run, nproc: int) -> None:
        trained.append(run.folder.name)
        if not (kept := trained_before / run.folder.name).exists():         # all tests train the same
            assert train_program.main(list(run.arguments)) == 0
            shutil.copytree(run.folder, kept)
        shutil.copytree(kept, run.folder, dirs_exist_ok=True)

    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(score, "load_extractor", lambda *args, **more: EXTRACTOR)
    monkeypatch.setattr(study_module, "MIN_SCORED", 20)
    monkeypatch.setattr(study_module, "MIN_POINTS", 100)
    own = ("--preset", "debug", "--out", tmp_path / "out", "--data", blobs, "--intervals", 3, "--steps", 8, "--num-samples", 20,
           "--sampler-steps", 6, "--entropy-images", 120, "--entropy-samples", 20, "--device", "cpu")

    def run(*args: Any, after: tuple[Any, ...] = AFTER) -> tuple[int, str, list[str]]:
        trained.clear()
        code = difficulty.main([str(arg) for arg in ("digits", *own, *args, "--", *after)])
        captured = capsys.readouterr()
        return code, captured.err + captured.out, list(trained)

    return run


def test_a_whole_study(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    code, said, trained = study()
    assert code == 0, said
    assert trained == ["interval_00", "interval_01", "interval_02", "interval_03"]
    for i in (1, 2, 3):                                  # each saw its own cluster only
        rows = [json.loads(line) for line in (out / f"interval_{i:02}/metrics.jsonl").read_text().splitlines()]
        losses = [row for row in rows if "loss" in row]
        assert [row["step"] for row in losses] == list(range(1, 9))
        assert {key for row in losses for key in row if key.startswith("cluster/")} == {f"cluster/C{i}"}
    last = said.strip().splitlines()[-1]
    assert last.startswith("digits: the loss has done 90 % of its fall by step") and last.endswith(str(out / "report.html"))

    report = json.loads((out / "report.json").read_text())
    assert report["missing"] == {} and [row["interval"] for row in report["intervals"]] == [1, 2, 3]
    for row in report["intervals"]:
        curve_of = read_losses(out / f"interval_{row['interval']:02}")
        assert row["convergence"]["final"] == curve_of.loss[-1] and row["convergence"]["steps"] == 8
        assert row["denoising"]["evaluations_inside"] == 2 and row["denoising"]["evaluations"] == 6
        assert row["relative_entropy"]["value"] > 0
    assert len({row["denoising"]["value"] for row in report["intervals"]} | {report["full"]["value"]}) == 4
    entropies = [row["relative_entropy"]["value"] for row in report["intervals"]]
    assert entropies == sorted(entropies, reverse=True) and report["rank correlations with the interval"]["D_KL a timestep"] == -1
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 6 and "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", page)
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("losses.png", "denoising.png", "relative_entropy.png"))
    assert sorted(path.name for path in (out / "denoising").iterdir()) == [f"interval_{i:02}.png" for i in range(4)]
    entropy = json.loads((out / "relative_entropy.json").read_text())
    assert entropy["t"] == list(range(1, 1000)) and entropy["settings"]["images"] == 120
    levels = noise_levels(build_objective(PRESETS["debug"]()), 1000)
    assert entropy["single"][0] == pytest.approx(one_kernel(levels[:1], levels[1:2], 256, 200.0)[0], rel=1e-3)

    # again: everything is left alone, and says the same
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and not path.name.startswith(("report", "losses", "denoising.png", "relative_entropy.png"))}
    monkeypatch.setattr(difficulty, "relative_entropy", None)
    monkeypatch.setattr(difficulty, "Sampler", None)
    monkeypatch.setattr(difficulty, "SplicedSampler", None)
    code, said, trained = study()
    assert code == 0 and trained == [] and said.strip().splitlines()[-1] == last
    assert "train: 0 of 4" in said and "denoise: 0 of 4" in said and "left alone" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}

    # other settings of the training are another study
    code, said, _ = study("--stages", "train", after=(*AFTER, "--optimizer.lr", 0.1))
    assert code == 2 and "optimizer.lr: 0.01 -> 0.1" in said


def test_what_is_missing_is_named(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(report, "draw", lambda found: {})        # seconds
    code, said, _ = study("--stages", "report")
    assert code == 2 and "holds nothing to report yet" in said
    assert study("--stages", "train", "--interval", 1)[2] == ["interval_01"]
    code, said, _ = study("--stages", "denoise", "--interval", 1)
    assert code == 2 and "error: interval 0 is not trained to step 8" in said and "--stages train --interval 0" in said
    code, said, _ = study("--stages", "denoise")
    assert code == 2 and "intervals 0, 2, 3 are not trained to step 8" in said
    code, said, _ = study("--stages", "report")
    assert code == 0 and "missing: intervals 2, 3 are not there from the stage train; run python -m eval.difficulty digits" in said
    assert "missing: intervals 0, 1, 2, 3 are not there from the stage denoise" in said
    assert "missing: the relative entropy is not there from the stage entropy" in said
    assert json.loads((out / "report.json").read_text())["missing"] == {"train": [2, 3], "denoise": [0, 1, 2, 3], "entropy": []}
    assert "<td>train</td><td>2, 3</td>" in (out / "report.html").read_text()

    # a model of half the steps is not one; the command that is named makes what is missing, and only that
    study("--stages", "train", "--interval", 2)
    study("--stages", "train", "--interval", 0)
    rows = (out / "interval_01/metrics.jsonl").read_text().splitlines()
    (out / "interval_01/metrics.jsonl").write_text("\n".join(rows[: len(rows) // 2]) + "\n")
    code, said, _ = study("--stages", "report")
    assert "missing: intervals 1, 3 are" in said
    shutil.rmtree(out / "interval_01")
    study("--stages", "train", "--interval", 1)
    code, said, _ = study("--stages", "report")
    (command,) = re.findall(r"missing: interval 3 is not there from the stage train; run python -m eval.difficulty (.*)", said)
    assert shlex.split(command)[0] == "digits" and difficulty.main(shlex.split(command)) == 0
    assert "from the stage train" not in study("--stages", "report")[1]


def test_other_settings_are_other_scores(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full model of one's own is not trained; scores of other settings do not mix; samples can be kept."""
    monkeypatch.setattr(difficulty, "ema_note", lambda config: f"The EMA of {config.train.steps} steps is short.")
    study("--stages", "train")
    full = tmp_path / "out/interval_00"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(full, elsewhere)
    shutil.rmtree(full)
    code, said, trained = study("--stages", "train", "denoise", "--full", elsewhere, "--interval", 2)
    assert code == 0 and trained == [] and "2 of 6 evaluations inside" in said, said
    assert "The EMA of 8 steps is short." in said
    code, said, _ = study("--stages", "denoise", "--full", elsewhere, "--interval", 2, "--num-samples", 24, "--keep-samples")
    assert code == 0 and "denoise: 1 of 1" in said
    rows = [json.loads(line) for line in (tmp_path / "out/denoising.jsonl").read_text().splitlines()]
    assert [(row["interval"], row["figure"]) for row in rows] == [(2, "FD-tiny-20"), (2, "FD-tiny-24")]
    # A reference of the same name with other images.
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "reference", ignore_errors=True)
        typed = ("--stages", "denoise", "--full", elsewhere, "--interval", seed, "--reference", make_blobs(tmp_path / "reference", seed=seed, rows=40))
        if seed == 1:
            study("--stages", "train", "--full", elsewhere, "--interval", 1)
        code, said, _ = study(*typed)
        assert (code, "has scores against other images in" in said) == ((0, False), (2, True))[seed - 1], said
    assert rows[0]["drawn"]["sampler"] == "ddim" and rows[0]["reference"]["count"] == 300
    provenance = json.loads((tmp_path / "out/denoising/interval_02/cfg1.0/provenance.json").read_text())
    assert provenance["spliced"]["interval"] == pytest.approx([1 / 3, 2 / 3]) and provenance["spliced"]["step"] == 8
    assert provenance["spliced"]["weights_sha256"] != provenance["weights_sha256"]
    sampler = SplicedSampler(Sample(elsewhere, tmp_path / "x", cfg_scale=(1.0,), device="cpu"), tmp_path / "out/interval_02", (1 / 3, 2 / 3))
    x, y = torch.randn(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    for t, asked in ((500, sampler.part), (900, sampler.trained), (100, sampler.trained)):
        said_by = sampler.model(sampler.configs[0])(x, torch.tensor([t]), y)
        assert torch.allclose(said_by, asked.model(x, torch.tensor([t]), y), atol=1e-5)
    assert not torch.allclose(sampler.part.model(x, torch.tensor([500]), y), sampler.trained.model(x, torch.tensor([500]), y), atol=1e-4)


@pytest.mark.parametrize(("args", "said"), [
    (("--interval", 4), "interval=4 must be one of the intervals 1..3, or 0"),
    (("--interval", -1), "interval=-1 must be one of"),
    (("--intervals", 0), "intervals=0 must be at least 1"),
    (("--intervals", 2000), "curriculum.n_clusters=2000 must not exceed"),
    (("--steps", 0), "steps=0 must be at least 1"),
    (("--entropy-samples", 1), "entropy_samples=1 must be at least 2"),
    (("--entropy-images", 99), "a relative entropy of 99 images of"),
    (("--entropy-images", 301), "holds 300 images, the relative entropy is asked of 301; set --entropy-images 300"),
    (("--num-samples", 19), "a Frechet distance of 19 samples is mostly bias; set --num-samples to 20 or more"),
    (("--preset", "debugg"), "unknown preset 'debugg'; did you mean 'debug'?"),
    (("--preset", "dit_s2_ffhq256"), "holds pixels of shape (1, 16, 16), the model takes (4, 32, 32)"),
    (("--full", "nowhere", "--stages", "denoise", "--interval", 0), "nowhere holds no checkpoint"),
])
def test_bad_input(study: Any, args: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    """Said before any work."""
    code, text, trained = study(*args)
    assert code == 2 and said in text and trained == [] and len(text.strip().splitlines()) <= 2, text
    assert not (tmp_path / "out/interval_01").exists()


def test_too_few_images(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set's own 300, against the numbers as they are shipped."""
    monkeypatch.setattr(study_module, "MIN_POINTS", 1000)
    code, said, _ = study("--entropy-images", 1000)
    assert code == 2 and "a relative entropy of 300 images" in said and "give 1,000 or more, or leave out" in said
    monkeypatch.setattr(study_module, "MIN_SCORED", 1000)
    code, said, _ = study("--stages", "denoise", "--num-samples", 1000)
    assert code == 2 and "a Frechet distance from 300 images" in said and "1,000 images or more" in said


def test_more_bad_input(study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(after=("--output", "runs/one"))[1].startswith("error: --output after -- would put all runs into one")
    for option, value in (("--train.steps", 5), ("--curriculum.pacing", "fixed"), ("--curriculum.n-clusters", 7)):
        code, said, trained = study(after=(*AFTER, option, value))
        assert code == 2 and trained == [] and said.startswith(f"error: {option} after -- is what the study sets"), said
    code, said, _ = study("--preset", "debug_edm")
    assert code == 2 and "preset=debug_edm has diffusion.objective=edm, the study digits is of gaussian; choose another preset, or " \
        "a study of edm: paper_edm, digits_edm" in said
    assert difficulty.main(["digit"]) == 2
    assert "unknown study 'digit'; did you mean 'digits'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study(after=("--optimizer.lrr", "1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the stage train is one process, not 2" in study()[1]


@pytest.mark.parametrize(("error", "status"), [(Stopped(), 75), (TrainingFailed("ended with status 1", 1), 1),
                                               (TrainingFailed("ended with status 2", 2), 2)])
def test_the_status_of_the_training_is_passed_on(study: Any, error: Exception, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that slurm/difficulty.sh knows whether to be requeued."""
    def fail(run: Run, nproc: int) -> None:
        raise error

    monkeypatch.setattr(Run, "train", fail)
    code, said, _ = study("--stages", "train", "report")
    assert code == status and str(error) in said and "report.html" not in said


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert difficulty.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name}\n" in said for name in STUDIES)
    assert isinstance(STUDIES["digits"], Study) and training_runs.Run is Run
