"""eval.compare: a comparison, what it says when something is wrong, and that it goes on where it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval import compare
from eval.compare import Compare, Comparison
from eval.comparison import report
from eval.comparison.validation_loss import ValidationLoss, figure
from eval.curves.scores import Curves
from eval.training_runs import Run
from largescale import train as train_program
from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.diffusion.build import build_objective
from largescale.distributed.ranks import Ranks
from largescale.errors import ConfigError
from largescale.host import signals
from largescale.monitoring.telemetry import read_metrics
from largescale.training import startup
from tests.conftest import QUIET
from tests.unit.comparisons import one_thread, tiny_extractor  # noqa: F401
from tests.unit.pages import Reader

CPU = torch.device("cpu")


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch, one_rank: Ranks) -> list[tuple[str, int]]:
    """Training runs in this process, as tests.conftest.run_here does; which runs were started. Pictures are left out."""
    started = list[tuple[str, int]]()

    def train(run: Run, nproc: int) -> None:
        started.append((run.method, run.seed))
        train_here(run, nproc)

    monkeypatch.setattr(startup, "Ranks", lambda device, *timeout: one_rank)
    monkeypatch.setattr(Run, "train", train)
    monkeypatch.setattr(report, "plot_panels", lambda *args, **more: None)
    return started


def train_here(run: Run, nproc: int) -> None:
    assert nproc == 1 and train_program.main(list(run.arguments)) == 0
    torch.set_num_threads(1)


@pytest.fixture
def arguments(blobs: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Of a comparison of 9 steps, scored at 4, 8 and 9, on two clusters."""
    def make(*more: Any, extra: tuple[Any, ...] = ()) -> list[str]:
        options = ("--preset", "debug", "--methods", "vanilla,naive", "--seeds", 2, "--out", tmp_path / "out", "--every", 4,
                   "--num-samples", 20, "--sampler-steps", 2, "--loss-images", 3, "--clusters", 2, "--extractor", "tiny", "--device", "cpu", *more,
                   "--", "--data.path", blobs, "--train.steps", 9, *QUIET, *extra)
        return [*map(str, options)]

    return make


Arguments = Callable[..., list[str]]
Started = list[tuple[str, int]]


def test_a_comparison(arguments: Arguments, trained_here: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    out, pictures = tmp_path / "out", list[tuple[str, list[str]]]()
    monkeypatch.setattr(report, "plot_panels", lambda runs, names, path, **more: pictures.append((path.name, names)))
    assert compare.main(arguments()) == 0
    said = capsys.readouterr().out
    assert trained_here == [("vanilla", 0), ("naive", 0), ("vanilla", 1), ("naive", 1)]
    assert "run 1 of 4: vanilla, seed 0; 4 to do\n" in said and "run 4 of 4: naive, seed 1; 1 to do, about 0 min\n" in said
    assert said.splitlines()[-1].startswith("at step 9, FD-tiny-20 is ") and "naive (difference " in said.splitlines()[-1]
    assert "1 seed of 2, so far" in said and "2 seeds; 9 steps of 16 images; scored every 4 steps" in (out / "table.md").read_text()
    found = json.loads((out / "results.json").read_text())
    assert list(found["standings"]) == ["FD-tiny-20", figure("EMA"), figure("raw weights")]
    difference = found["standings"]["FD-tiny-20"]["naive"]["difference"]
    assert 0 < difference["p_value"] == difference["p_adjusted"] < 1 and f"(p = {difference['p_value']:.3g})" in (out / "table.md").read_text()
    assert [(run["method"], run["seed"]) for run in found["runs"]] == trained_here
    for run in found["runs"]:
        assert [row["step"] for row in run["loss"]] == [row["step"] for row in run["frechet"]] == [4, 8, 9]
    assert found["runs"][1]["transitions"] == [[i, 5 - i] for i in range(1, 6)] and not found["runs"][0]["transitions"]
    page = " ".join(Reader((out / "report.html").read_text()).text)
    for words in ("debug: vanilla, naive", "FD-tiny-20, change in %", figure("EMA", " C2"), "Samples of the last step", "curriculum complete at step", "--seeds 2"):
        assert words in page, words
    assert "| naive | 5 ± 0 |" in said                  # when its curriculum was complete
    assert np.asarray(Image.open(out / "samples.png").convert("RGB")).std() > 0
    clusters = [figure("EMA"), figure("EMA", " C1"), figure("EMA", " C2")]
    assert pictures[-3:] == [("frechet.png", ["FD-tiny-20"]), ("curves.png", clusters), ("relative.png", clusters)]
    assert found["runs"][0]["loss"] != found["runs"][2]["loss"]             # seeds differ
    # again: nothing is trained, drawn or scored, and the same report comes out
    monkeypatch.setattr(Curves, "add", lambda *args: 1 / 0)
    monkeypatch.setattr(ValidationLoss, "add", lambda *args: 1 / 0)
    monkeypatch.setattr(compare, "make_scorer", lambda *args: 1 / 0)
    assert compare.main(arguments()) == 0 and len(trained_here) == 4
    assert json.loads((out / "results.json").read_text()) == found


def test_losses_of_both_weights(arguments: Arguments, trained_here: Started, tmp_path: Path, blobs: Path) -> None:
    """A row says what its checkpoint's EMA and raw weights give on the set, and the mean weighs clusters by width."""
    snr = ("--diffusion.schedule", "linear", "--curriculum.clusters", "snr")
    assert compare.main(arguments(*NO_SAMPLES, "--methods", "vanilla", "--clusters", 3, extra=snr)) == 0
    comparison = Comparison(Compare("debug", "vanilla", 1, tmp_path / "out", every=4, clusters=3, loss_images=3, num_samples=0),
                            ["--data.path", str(blobs), "--train.steps", "9", *snr])
    run = tmp_path / "out/vanilla/seed_0"
    row = comparison.loss.rows(run)[-1]
    trained = load_trained(run, 9)
    for weights, kind in (("EMA", "ema"), ("raw weights", "master")):
        trained.model.load_state_dict(named_weights(CheckpointDir.at(run, 9), kind))
        each = comparison.loss(trained.model, trained.objective)
        assert [row["figures"][figure(weights, f" C{i}")]["value"] for i in (1, 2, 3)] == each.tolist()
        total = sum(loss * (b - a) for loss, a, b in zip(each, comparison.loss.edges, comparison.loss.edges[1:], strict=False))
        assert row["figures"][figure(weights)]["value"] == pytest.approx(total) != pytest.approx(each.mean())
    assert row["figures"][figure("EMA")] != row["figures"][figure("raw weights")]


def test_draws_are_the_same(arguments: Arguments, trained_here: Started, tmp_path: Path) -> None:
    """And weights at the start: while two curricula are in the same stage, their losses are."""
    methods = ("--methods", "naive@interval=2,naive@interval=4", "--num-samples", 0)
    assert compare.main(arguments(*methods, "--seeds", 1)) == 0
    one, other = ([row["loss"] for row in read_metrics(tmp_path / f"out/naive@interval={k}/seed_0") if "loss" in row] for k in (2, 4))
    assert one[:2] == other[:2] and all(a != b for a, b in zip(one[2:], other[2:], strict=True)) and len(one) == 9


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, blobs: Path, one_rank: Ranks) -> Path:
    """A comparison of one seed, without samples; vanilla by the training program in a process of its own."""
    out, train = tmp_path_factory.mktemp("compare") / "out", Run.train
    options = ("--preset", "debug", "--methods", "vanilla,naive", "--seeds", 1, "--out", out, "--every", 4, "--num-samples", 0,
               "--loss-images", 3, "--clusters", 2, "--device", "cpu", "--", "--data.path", blobs, "--train.steps", 9, *QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(startup, "Ranks", lambda device, *timeout: one_rank)
        patch.setattr(Run, "train", lambda run, nproc: (train if run.method == "vanilla" else train_here)(run, nproc))
        assert compare.main([*map(str, options)]) == 0
    return out


@pytest.fixture
def began(truth: Path, tmp_path: Path) -> Path:
    shutil.copytree(truth, tmp_path / "out")
    return tmp_path / "out"


NO_SAMPLES = ("--num-samples", 0, "--seeds", 1)


def test_a_real_comparison(truth: Path) -> None:
    """Without samples there is no distance, and all the rest."""
    found = json.loads((truth / "results.json").read_text())
    assert list(found["standings"]) == [figure("EMA"), figure("raw weights")] and not (truth / "frechet.png").exists()
    assert [run["frechet"] for run in found["runs"]] == [[], []] and found["runs"][0]["seconds"]["training"] > 0
    assert [checkpoint.step for checkpoint in checkpoints(truth / "vanilla/seed_0") if checkpoint.step] == [9, 8, 4]
    assert "validation loss (EMA) is " in (truth / "table.md").read_text().splitlines()[-1]
    for name in ("curves", "relative"):
        assert np.asarray(Image.open(truth / f"{name}.png").convert("RGB")).std() > 0


def test_more_seeds_and_methods(began: Path, arguments: Arguments, trained_here: Started) -> None:
    """What is there is left alone, also when more is asked for."""
    before = {path: path.stat().st_mtime_ns for path in began.rglob("checkpoints/*/*")}
    assert compare.main(arguments("--num-samples", 0, "--seeds", 2, "--methods", "vanilla,p2")) == 0
    assert trained_here == [("p2", 0), ("vanilla", 1), ("p2", 1)]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in began.rglob("checkpoints/*/*")}.items() and before


def test_a_comparison_that_is_stopped(began: Path, arguments: Arguments, trained_here: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it scores: it leaves with 75, and goes on with what is missing."""
    shutil.rmtree(began / "naive/seed_0/loss")
    add, added = ValidationLoss.add, list[int]()

    def stops(self: ValidationLoss, run: Path, step: int) -> None:
        signals._requested = step == 8
        add(self, run, step)
        added.append(step)

    monkeypatch.setattr(ValidationLoss, "add", stops)
    before = json.loads((began / "results.json").read_text())
    assert compare.main(arguments(*NO_SAMPLES)) == 75 and added == [4]
    signals._requested = False
    monkeypatch.setattr(ValidationLoss, "add", lambda self, run, step: (add(self, run, step), added.append(step)))
    assert compare.main(arguments(*NO_SAMPLES)) == 0 and added == [4, 8, 9] and not trained_here
    assert json.loads((began / "results.json").read_text())["standings"] == before["standings"]


def test_a_run_that_was_killed(began: Path, arguments: Arguments, trained_here: Started) -> None:
    """It is trained on, and scored where it was not yet."""
    before = json.loads((began / "results.json").read_text())
    shutil.rmtree(began / "vanilla/seed_0/checkpoints/step_00000009")
    losses = (began / "vanilla/seed_0/loss/results.jsonl").read_text().splitlines(keepends=True)
    (began / "vanilla/seed_0/loss/results.jsonl").write_text("".join(losses[:2]) + losses[2][:30])
    assert compare.main(arguments(*NO_SAMPLES)) == 0 and trained_here == [("vanilla", 0)]
    assert json.loads((began / "results.json").read_text())["standings"] == before["standings"]


def test_tasks_of_an_array_job(tmp_path: Path, arguments: Arguments, trained_here: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """Each does its run; the same command without --run only reports."""
    assert compare.main(arguments(*NO_SAMPLES, "--run", 1)) == 0 and trained_here == [("naive", 0)]
    said = capsys.readouterr().out
    assert "run 2 of 2: naive, seed 0; 1 to do" in said and "done; of all 2 runs 1 are not" in said
    assert not (tmp_path / "out/table.md").exists()
    assert compare.main(arguments(*NO_SAMPLES, "--only", "vanilla")) == 0 and trained_here[1:] == [("vanilla", 0)]
    assert "done; of all 2 runs 0 are not" in capsys.readouterr().out
    assert compare.main(arguments(*NO_SAMPLES)) == 0 and len(trained_here) == 2 and (tmp_path / "out/table.md").exists()


def test_checkpoints_that_are_discarded(began: Path, arguments: Arguments, trained_here: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """Their rows stay; what was not scored by then is not compared in silence."""
    shutil.rmtree(began / "vanilla")
    before = json.loads((began / "results.json").read_text())["standings"]
    assert compare.main(arguments(*NO_SAMPLES, "--discard")) == 0 and trained_here == [("vanilla", 0)]
    assert [[checkpoint.step for checkpoint in checkpoints(began / f"{name}/seed_0")] for name in ("vanilla", "naive")] == [[9], [9, 8, 4]]
    assert json.loads((began / "results.json").read_text())["standings"] == before
    assert compare.main(arguments(*NO_SAMPLES, "--loss-images", 4)) == 2
    assert "naive/seed_0 was scored at steps [4, 8, 9]" in (said := capsys.readouterr().err) and "vanilla/seed_0 at [9]" in said


def test_a_validation_set(arguments: Arguments, began: Path, trained_here: Started, tmp_path: Path) -> None:
    """Another set, another protocol; said in the report."""
    assert "trained on (no --validation was given)" in (began / "table.md").read_text()
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 16, 16), np.uint8)
    with ShardWriter(tmp_path / "other", DatasetInfo("other", "pixels", (1, 16, 16), 10, 1.0, {}), rows_per_shard=20) as writer:
        for i, image in enumerate(images):
            writer.write(id=str(i), latent=image, label=i % 10)
    before = json.loads((began / "results.json").read_text())["standings"]
    assert compare.main(arguments(*NO_SAMPLES, "--validation", tmp_path / "other")) == 0 and not trained_here
    assert "that were not trained on" in (began / "table.md").read_text()
    assert json.loads((began / "results.json").read_text())["standings"] != before


@pytest.mark.parametrize(("options", "extra", "message"), [
    (("--seeds", 0), (), "seeds=0 must be at least 1"),
    (("--every", 0), (), "every=0 must be at least 1"),
    (("--methods", "vanilla,p2@noise.p2_gamma=-1"), (), "method 'p2@noise.p2_gamma=-1': noise.p2_gamma=-1.0 must be at least 0, 0 for no weighting; set --noise.p2-gamma"),
    (("--methods", "vanilla,p2@p2_gamma=2"), (), "write FIELD=VALUE, such as noise.p2_gamma=..."),
    (("--methods", "vanilla,p2", "--naive-interval", 2), (), "naive_interval=2 has no effect, none of --methods vanilla,p2 is naive"),
    (("--frechet-every", 6), (), "frechet_every=6 must be a multiple of the 4 steps between checkpoints"),
    (("--num-samples", 5), (), "num_samples=5 must be 10 or more"),
    (("--methods", "vanilla,nave"), (), "did you mean 'naive'"),
    (("--methods", "vanilla+naive"), (), "vanilla sets curriculum.pacing=none and naive curriculum.pacing=fixed"),
    (("--preset", "debugg"), (), "unknown preset 'debugg'; did you mean 'debug'"),
    (("--run", 2), (), "--run 2 must lie in 0..1: 2 methods times 1 seeds"),
    (("--only", "p2"), (), "--only p2 is none of --methods vanilla,naive"),
    (("--run", 0, "--only", "naive"), (), "give one of them"),
    (("--validation", "SMALL"), (), "has shape=(1, 8, 8), the training set"),
    (("--validation", "nothing"), (), "nothing does not exist"),
    ((), ("--data.path", "SMALL"), "small holds pixels of shape (1, 8, 8), the model takes (1, 16, 16)"),
    ((), ("--data.path", "nothing"), "nothing does not exist"),
    ((), ("--train.global-batch-size", 0), "global_batch_size=0 must be at least 1"),
    (("--num-samples", 20, "--cfg-scale", 2, "--out", "NEW"), ("--model.class-dropout-prob", 0), "cfg_scale=2.0 needs a null label"),
    (("--num-samples", 20, "--sampler", "heun3"), (), "sampler='heun3'"),
    # runs that lie there and are others
    ((), ("--train.steps", 12), "train.steps: 9 -> 12"),
    (("--every", 3), (), "checkpoint.every: 4 -> 3"),
    (("--naive-interval", 2), (), "curriculum.interval: 1 -> 2"),
    ((), ("--optimizer.lr", 0.5), "optimizer.lr: 0.001 -> 0.5"),
    ((), ("--train.ds-config", "ds_configs/zero2_bf16.json"), "precision: fp32 -> bf16"),
    ((), ("--data.path", "BLOBS2"), "dataset: "),
])
def test_bad_input(options: tuple[Any, ...], extra: tuple[Any, ...], message: str, truth: Path, blobs: Path, arguments: Arguments,
                   trained_here: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in one line, before any work."""
    if {"SMALL"} & {*options, *extra}:
        with ShardWriter(tmp_path / "small", DatasetInfo("small", "pixels", (1, 8, 8), 10, 1.0, {}), rows_per_shard=20) as writer:
            for i in range(20):
                writer.write(id=str(i), latent=np.zeros((1, 8, 8), np.uint8), label=i % 10)
    if "BLOBS2" in extra:
        shutil.copytree(blobs, tmp_path / "blobs2")
        manifest = json.loads((tmp_path / "blobs2/manifest.json").read_text())
        for shard in manifest["shards"][-1:]:           # one shard fewer is another data set
            (tmp_path / "blobs2" / shard["file"]).unlink()
        make_blobs_of_two_shards(tmp_path / "blobs2", manifest)
    monkeypatch.setattr(compare, "make_scorer", lambda *args: 1 / 0)
    monkeypatch.setattr(ValidationLoss, "add", lambda *args: 1 / 0)
    places = {"SMALL": tmp_path / "small", "BLOBS2": tmp_path / "blobs2", "NEW": tmp_path / "new"}
    options, extra = (tuple(places.get(part, part) for part in parts) for parts in (options, extra))
    assert compare.main(arguments(*NO_SAMPLES, "--out", truth, *options, extra=extra)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and not said.out and not trained_here


def make_blobs_of_two_shards(path: Path, manifest: dict[str, Any]) -> None:
    from largescale.data.format import fingerprint

    manifest["shards"] = manifest["shards"][:-1]
    manifest["fingerprint"] = fingerprint(DatasetInfo(**manifest["info"]), manifest["shards"], None)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_one_process_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, not 2; start it without torchrun or srun, or with one task, and give --nproc"):
        Compare("debug").check()


@pytest.mark.parametrize(("preset", "options", "expected"), [
    ("debug", {}, ("ddim", 50, "efficientnet-lite0")),
    ("debug", {"sampler": "heun"}, ("heun", 18, "efficientnet-lite0")),
    ("debug", {"sampler": "ddpm", "extractor": "dino:x"}, ("ddpm", 250, "dino:x")),
    ("debug", {"inception_weights": Path("file"), "sampler_steps": 5}, ("ddim", 5, "inception")),
])
def test_how_samples_are_drawn(preset: str, options: dict[str, Any], expected: tuple[Any, ...], blobs: Path, tmp_path: Path) -> None:
    options = {"device": "cpu", "out": tmp_path, **options}
    comparison = Comparison(Compare(preset, **options), ["--data.path", str(blobs)])
    assert comparison.curve and (comparison.curve.sampler, comparison.curve.steps, comparison.curve.extractor) == expected
    assert comparison.curve.reference == blobs and comparison.curve.every == 2


def test_samples_of_fewer_checkpoints(arguments: Arguments, trained_here: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments("--seeds", 1, "--frechet-every", 8)) == 0
    for run in json.loads((tmp_path / "out/results.json").read_text())["runs"]:
        assert [row["step"] for row in run["loss"]] == [4, 8, 9] and [row["step"] for row in run["frechet"]] == [8, 9]
    assert "by tiny, at steps 8, 9." in capsys.readouterr().out
    # More of one run, by another command: the report is of the steps that are asked for.
    before = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert compare.main(arguments("--seeds", 1, "--frechet-every", 4, "--only", "naive")) == 0
    assert len((tmp_path / "out/naive/seed_0/curve/results.jsonl").read_text().splitlines()) == 3
    assert compare.main(arguments("--seeds", 1, "--frechet-every", 8)) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["runs"] == before


def test_clusters_of_the_loss_are_the_presets(blobs: Path, tmp_path: Path) -> None:
    """Whatever a method's curriculum has: it is the same loss for all."""
    def edges(**options: Any) -> tuple[float, ...]:
        options = {"device": "cpu", "out": tmp_path, "num_samples": 0, "loss_images": 1, **options}
        return Comparison(Compare("debug", "curriculum@n_clusters=3,vanilla", **options), ["--data.path", str(blobs)]).loss.edges

    assert edges() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and edges(clusters=2) == (0, 0.5, 1)


@pytest.mark.parametrize(("objective", "sampler"), [("flow", "heun"), ("edm", "heun")])
def test_objectives_without_ddim(objective: str, sampler: str, blobs: Path, tmp_path: Path) -> None:
    extra = ["--data.path", str(blobs), "--diffusion.objective", objective, *(["--model.no-learn-sigma"] if objective == "edm" else [])]
    comparison = Comparison(Compare("debug", out=tmp_path, device="cpu", loss_images=2), extra)
    assert comparison.curve and (comparison.curve.sampler, comparison.curve.steps) == (sampler, 18)
    assert np.isfinite(comparison.loss(lambda x, *_: torch.zeros_like(x) if objective == "edm" else torch.zeros_like(x).repeat(1, 2, 1, 1),
                                       build_objective(comparison.config))).all()  # type: ignore[arg-type]


def test_a_method_without_effect_is_named(arguments: Arguments, trained_here: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1,000 timesteps none has been drawn 10 times."""
    assert compare.main(arguments(*NO_SAMPLES, "--methods", "vanilla,loss_second_moment,p2")) == 0
    assert "The same as vanilla to the last digit, and so without effect in these steps: loss_second_moment. (" in capsys.readouterr().out


@pytest.mark.parametrize(("methods", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 3, 2)])
def test_samples_side_by_side(methods: int, columns: int, rows: int, tmp_path: Path) -> None:
    """Three in a row, that of a method in its place."""
    grids = {}
    for i in range(methods):
        Image.new("RGB", (60, 30), (0, 60 * (i + 1), 0)).save(tmp_path / f"{i}.png")
        grids[f"method {i}"] = tmp_path / f"{i}.png"
    report.plot_side_by_side(grids, tmp_path / "all.png")
    found = np.asarray(Image.open(tmp_path / "all.png").convert("RGB"))
    height, width = (np.array(found.shape[:2]) / (rows, columns)).astype(int)
    for i in range(methods):
        assert tuple(found[i // 3 * height + height // 2, i % 3 * width + width // 2]) == (0, 60 * (i + 1), 0)
    assert width == 600
