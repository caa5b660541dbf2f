"""eval.difficulty: what it measures, what it trains, what it leaves alone, and what it says when something is wrong."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import difficulty, score, training_runs
from eval.difficulty_study import report
from eval.difficulty_study import study as study_module
from eval.difficulty_study.convergence import LossCurve, converge, rank_correlation, read_losses
from eval.difficulty_study.denoising import (
    Spliced,
    SplicedSampler,
    asked_levels,
    bounds,
    check_fits,
    noise_level_of,
)
from eval.difficulty_study.relative_entropy import noise_levels, one_kernel
from eval.difficulty_study.study import STUDIES, Plan, Study
from eval.sample import Sample
from eval.training_runs import Run, TrainingFailed
from largescale import train as train_program
from largescale.checkpoint.weights import Trained
from largescale.config.derived import cluster_edges
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.diffusion.build import build_objective
from largescale.diffusion.sampling import SamplingConfig, draw_samples
from largescale.errors import CheckpointError, Stopped
from largescale.models.build import build_model, latent_shape
from tests.conftest import RunHere
from tests.unit.test_score import EXTRACTOR

# ---- how a loss converges


def curve(loss: np.ndarray) -> LossCurve:
    return LossCurve(np.arange(1, len(loss) + 1), np.asarray(loss, float))


def test_a_loss_that_only_falls() -> None:
    step = np.arange(1, 4001)
    found = converge(curve(0.3 + np.exp(-step / 500)), patience=200)
    assert (found.rises, found.smoothed_rises, found.oscillates_from, found.steps) == (0, 0, None, 4000)
    # of the mean of the last 100 of exp(-s / tau), all but the start; below a tenth of its range
    lag = (math.exp(100 / 500) - 1) / (100 * (1 - math.exp(-1 / 500)))
    assert found.final == pytest.approx(0.3 + math.exp(-8) * lag * math.exp(-1 / 500), rel=1e-3)
    assert found.falls_until == pytest.approx(500 * math.log(10 * lag), abs=8)


def test_rises_are_counted_after_step_100() -> None:
    """A saw of four steps up and one down has 4 rises in 5 steps; those up to step 100 do not count."""
    loss = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], 60)       # 300 steps: up to each but the first of five
    found = converge(curve(loss), patience=200)
    assert found.rises == 160
    assert converge(curve(loss[:100]), patience=200).rises == 0 and converge(curve(loss[:103]), patience=200).rises == 2
    assert found.smoothed_rises == 0                    # W = 15: the mean is the same at all of them


def test_the_smoothed_loss() -> None:
    loss = np.random.default_rng(0).normal(size=3000)
    smoothed = curve(loss).smoothed
    assert curve(loss).window == 100 and curve(loss[:300]).window == 15 and curve(loss[:3]).window == 1
    assert smoothed[99:] == pytest.approx(np.convolve(loss, np.full(100, 0.01), "valid"))
    assert smoothed[:3] == pytest.approx([loss[0], loss[:2].mean(), loss[:3].mean()])
    assert curve(loss).normalised.max() == 1 and curve(loss).normalised.min() == 0
    assert curve(np.full(40, 2.0)).normalised.tolist() == [0] * 40


def test_where_it_begins_to_oscillate() -> None:
    """It falls to step 1,000 and stays above that from there on; with a patience that outlasts the rest, nowhere."""
    step = np.arange(1, 2001)
    loss = np.where(step <= 1000, 2 - step / 1000, 1.0 + 1e-3 * np.sin(step) ** 2)
    w = 100                                             # the mean over the last 100 is least when all of them are flat
    least = int(np.argmin(curve(loss).smoothed)) + 1
    assert 1000 + w <= least + 60 and converge(curve(loss), patience=200).oscillates_from is not None
    flat = np.where(step <= 1000, 2 - step / 1000, 1.5)
    assert converge(curve(flat), patience=200).oscillates_from == 1000
    assert converge(curve(flat), patience=1000).oscillates_from == 1000
    assert converge(curve(flat), patience=1001).oscillates_from is None


def test_slower_is_told_from_faster() -> None:
    """By all numbers but the count of single steps, which the noise of a batch decides."""
    step, random = np.arange(1, 5001), np.random.default_rng(1)
    found = [converge(curve(np.exp(-step / tau) + random.normal(0, 0.02, 5000)), patience=200) for tau in (1500, 600, 150)]
    for name, falling in (("smoothed_rises", False), ("oscillates_from", True), ("falls_until", True)):
        values = [getattr(c, name) if getattr(c, name) is not None else 5001 for c in found]
        assert values == sorted(values, reverse=falling) and values[0] != values[-1], name
    rises = [c.rises / 4900 for c in found]
    assert max(rises) - min(rises) < 0.03 and rises == pytest.approx([0.5] * 3, abs=0.03)


def test_a_late_peak() -> None:
    """What the loss was before its largest value does not count as having fallen."""
    loss = np.concatenate([np.zeros(5), np.linspace(10, 0, 95)])
    assert converge(curve(loss), patience=5).falls_until > 80


def test_reading_losses(tmp_path: Path) -> None:
    rows = [{"step": 0, "event": "started", "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0},
            {"step": 2, "reference/C1": 0.1}, {"step": 2, "loss": 3.0}, {"step": 4, "loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    found = read_losses(tmp_path)
    assert (found.step.tolist(), found.loss.tolist()) == ([1, 2, 4], [1.0, 3.0, 4.0])
    assert len(read_losses(tmp_path / "nothing").step) == 0


def test_rank_correlation() -> None:
    assert rank_correlation([5, 4, 2, 1]) == pytest.approx(-1) and rank_correlation([1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([None, 7, 3]) == pytest.approx(-1)              # not at all: later than any
    assert rank_correlation([1, 3, 2, 4, 5]) == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert rank_correlation([1, 1, 2]) == pytest.approx(math.sqrt(3) / 2)   # ties share a rank
    assert rank_correlation([1, 1, 2, 3]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation([1, 2]) is None and rank_correlation([3, 3, 3, 3]) is None


# ---- M_i inside its interval, the full model elsewhere

CONFIGS = {name: replace(PRESETS[name](), name=name) for name in ("debug", "debug_sit", "debug_edm")}
HOW = {"debug": ("ddpm", 50), "debug_sit": ("euler", 40), "debug_edm": ("euler", 40)}


def untrained(name: str, seed: int) -> Trained:
    """Of weights that are not those at the start, where networks say 0."""
    config = CONFIGS[name]
    torch.manual_seed(seed)
    model = build_model(config.model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return Trained(model, build_objective(config), config, {"data_info": {"kind": "pixels"}, "step": 1})


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Trained, Trained]]:
    torch.set_num_threads(1)
    return {name: (untrained(name, 0), untrained(name, 1)) for name in CONFIGS}


def draw(trained: Trained, model: Any, **how: Any) -> Tensor:
    sampler, steps = HOW[trained.config.name]
    config = SamplingConfig(sampler=sampler, steps=steps, cfg_scale=how.pop("cfg_scale", 1.0), **how)
    return draw_samples(model, trained.objective, config, index=[0], shape=latent_shape(trained.config.model),
                        condition=lambda index: torch.tensor(index), num_classes=10, batch_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_is_asked_where_it_was_trained(name: str, models: dict[str, tuple[Trained, Trained]]) -> None:
    """Every time that training draws for C_i is one at which M_i is asked, and none of the other clusters' is."""
    part, _ = models[name]
    edges = cluster_edges(part.config)
    for i in range(1, len(edges)):
        def inside(x: Tensor, t: Tensor, y: Any) -> Tensor:
            return torch.ones_like(x)

        def outside(x: Tensor, t: Tensor, y: Any) -> Tensor:
            return torch.zeros_like(x)

        spliced = Spliced(inside, outside, noise_level_of(part), *edges[i - 1 : i + 1])
        for k in range(1, len(edges)):
            v = torch.tensor([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)
            t = part.objective.draw(v, *edges[k - 1 : k + 1])
            given = t.log() / 4 if name == "debug_edm" else t               # as the network is
            assert spliced(torch.zeros(5, 1, 2, 2), given, torch.zeros(5)).mean() == (1 if i == k else 0), (i, k)


@pytest.mark.parametrize("name", CONFIGS)
def test_splicing(name: str, models: dict[str, tuple[Trained, Trained]]) -> None:
    """The same model twice is that model; another one counts in its interval; all of the axis is that other one."""
    part, full = models[name]
    level, edges = noise_level_of(full), cluster_edges(full.config)
    plain = draw(full, full.model)
    assert torch.equal(draw(full, Spliced(full.model, full.model, level, 0.2, 0.6)), plain)
    assert torch.equal(draw(full, Spliced(part.model, full.model, level, 0.0, 1.0)), draw(full, part.model))
    spliced = [draw(full, Spliced(part.model, full.model, level, *edges[i - 1 : i + 1])) for i in range(1, len(edges))]
    for i, samples in enumerate(spliced):
        assert samples.isfinite().all() and not torch.equal(samples, plain)
        assert all(not torch.equal(samples, other) for other in spliced[:i])
    by_hand = [full.model, part.model]

    def choose(x: Tensor, t: Tensor, y: Any) -> Tensor:
        u = {"debug": lambda: (t + 0.5) / 1000, "debug_sit": lambda: 1 - t,
             "debug_edm": lambda: torch.special.ndtr((4 * t + 1.2) / 1.2)}[name]()
        return by_hand[0.4 <= u[0] < 0.6](x, t, y)

    assert torch.equal(spliced[2], draw(full, choose))


def test_rows_of_both_kinds(models: dict[str, tuple[Trained, Trained]]) -> None:
    """Each row has the answer of the model that it belongs to, and guidance, which asks twice, works."""
    part, full = models["debug"]
    x, t, y = torch.randn(4, 1, 16, 16), torch.tensor([0, 399, 400, 999]), torch.arange(4)
    spliced = Spliced(part.model, full.model, noise_level_of(full), 0.4, 0.6)
    expected = torch.cat([(part if i == 2 else full).model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert torch.allclose(spliced(x, t, y), expected, atol=1e-5)
    guided = [draw(full, model, cfg_scale=2.0) for model in (full.model, spliced, part.model)]
    assert not torch.equal(guided[0], guided[1]) and not torch.equal(guided[1], guided[2])


def test_the_levels_that_a_sampler_asks_for(models: dict[str, tuple[Trained, Trained]]) -> None:
    """In order, whatever the network says; EDM's 40 steps leave some of 20 intervals out, and reach beyond both ends."""
    levels = {name: asked_levels(full, SamplingConfig(sampler=HOW[name][0], steps=HOW[name][1], cfg_scale=2.0))
              for name, (_, full) in models.items()}
    for name, found in levels.items():
        asked: list[float] = []
        full = models[name][1]

        def listening(x: Tensor, t: Tensor, y: Any, full: Trained = full, asked: list[float] = asked) -> Tensor:
            asked.append(noise_level_of(full)(t)[0].item())
            return full.model(x, t, y)

        draw(full, listening)
        assert found == asked == sorted(found, reverse=True) and len(found) == HOW[name][1]
    assert levels["debug"][0] == 0.9995 and levels["debug"][-1] == 0.0005
    assert levels["debug_sit"][0] == 1.0 and levels["debug_sit"][-1] == pytest.approx(1 / 40)
    edges = [i / 20 for i in range(21)]
    inside = [sum(low <= u < high for u in levels["debug_edm"]) for low, high in (bounds(*edges[i : i + 2]) for i in range(20))]
    assert sum(inside) == 40 and min(inside) == 0 < inside[0] and inside[-1] > 0


def test_models_that_do_not_fit(models: dict[str, tuple[Trained, Trained]]) -> None:
    part, full = models["debug"]
    check_fits(part, full, Path("part"), Path("full"))
    others = [replace(full, config=models["debug_sit"][1].config),
              replace(full, config=replace(full.config, model=replace(full.config.model, num_classes=3))),
              replace(full, info={"data_info": {"kind": "latents"}})]
    for other, why in zip(others, ("diffusion is", "num_classes is 10", "kind of the data is pixels"), strict=True):
        with pytest.raises(CheckpointError, match=why):
            check_fits(part, other, Path("part"), Path("full"))


# ---- the program


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
