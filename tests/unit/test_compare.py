"""eval.compare: that runs differ in their method only, that the statistics are right, and that it goes on where it was."""

import dataclasses
import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import Tensor, nn

from eval import compare, score
from eval.compare import Compare, Comparison
from eval.comparison import report
from eval.comparison.methods import METHODS, read_methods
from eval.comparison.plan import plan
from eval.comparison.statistics import (
    against_first,
    cluster_table,
    holm,
    mean,
    paired,
    standings,
    summary,
    t_test,
    table,
)
from eval.comparison.validation_loss import ValidationLoss, figure
from eval.curves.scores import Curves
from eval.scoring.extractors import Extractor, Features
from eval.training_runs import Run, TrainingFailed, differences
from largescale import train as train_program
from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict
from largescale.config.validation import ema_note, validate
from largescale.data.fixed_noise_set import VALIDATION_SEED
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import Losses
from largescale.distributed.ranks import Ranks
from largescale.errors import ConfigError, DataError, Stopped
from largescale.host import signals
from largescale.monitoring.telemetry import read_metrics
from largescale.randomness import step_draws
from largescale.training import startup
from tests.conftest import QUIET
from tests.unit.test_page import Reader

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


# ---- methods

OF_METHOD: dict[str, dict[str, Any]] = {
    "vanilla": {"curriculum.pacing": "none"},
    "curriculum": {},
    "naive": {"curriculum.pacing": "fixed"},
    "anti": {"curriculum.order": "hard_first"},
    "separate": {"curriculum.stages": "separate"},
    "min_snr": {"curriculum.pacing": "none", "noise.weighting": "min_snr"},
    "p2": {"curriculum.pacing": "none", "noise.weighting": "p2"},
    "logit_normal": {"curriculum.pacing": "none", "noise.sampling": "logit_normal"},
    "loss_second_moment": {"curriculum.pacing": "none", "noise.sampling": "loss_second_moment"},
    "speed": {"curriculum.pacing": "none", "noise.sampling": "speed", "noise.weighting": "p2"},
    "laplace": {"curriculum.pacing": "none", "noise.sampling": "laplace"},
    "beta@noise.beta_alpha=2,noise.beta_beta=0.5": {
        "curriculum.pacing": "none", "noise.sampling": "beta", "noise.beta_alpha": 2.0, "noise.beta_beta": 0.5},
    "mode": {"curriculum.pacing": "none", "noise.sampling": "mode"},
    "curriculum+cosine_map": {"noise.sampling": "cosine_map"},
    "curriculum+min_snr": {"noise.weighting": "min_snr"},
    "p2+curriculum": {"noise.weighting": "p2"},
    "vanilla+p2": {"curriculum.pacing": "none", "noise.weighting": "p2"},
    "speed+p2": {"curriculum.pacing": "none", "noise.sampling": "speed", "noise.weighting": "p2"},
    "naive+anti+separate": {"curriculum.pacing": "fixed", "curriculum.order": "hard_first", "curriculum.stages": "separate"},
    "curriculum@patience=50": {"curriculum.patience": 50},
    "curriculum@loss-smoothing=0.99": {"curriculum.loss_smoothing": 0.99},
    "curriculum@n-clusters=10,optimizer.ema_decay=0.5": {"curriculum.n_clusters": 10, "optimizer.ema_decay": 0.5},
    "anti@patience=3": {"curriculum.order": "hard_first", "curriculum.patience": 3},
    "naive@interval=7": {"curriculum.pacing": "fixed", "curriculum.interval": 7},
    "min_snr@noise.min-snr-gamma=2": {"curriculum.pacing": "none", "noise.weighting": "min_snr", "noise.min_snr_gamma": 2.0},
}


@pytest.mark.parametrize("name", OF_METHOD)
def test_what_a_method_is_to_the_training_program(name: str) -> None:
    """Its options, read by that program itself."""
    assert METHODS.keys() <= {word for method in OF_METHOD for word in method.partition("@")[0].split("+")}
    preset = PRESETS["debug"]()
    [method] = read_methods(name)
    assert method.name == name
    config = train_program.parse(["debug", *method.arguments])
    validate(config, 1)
    before, after = (dict(flatten(to_dict(c))) for c in (preset, config))
    assert {key: value for key, value in after.items() if before[key] != value} == OF_METHOD[name]


def test_lists_of_methods() -> None:
    text = "vanilla, curriculum@patience=50,n_clusters=5,curriculum@n_clusters=5 , min_snr+curriculum"
    assert [method.name for method in read_methods(text)] == [
        "vanilla", "curriculum@patience=50,n_clusters=5", "curriculum@n_clusters=5", "min_snr+curriculum"]


@pytest.mark.parametrize(("text", "message"), [
    ("vanila", "unknown method 'vanila'; did you mean 'vanilla'"),
    ("vanilla,", "unknown method ''"),
    ("vanilla,patience=5", "unknown method 'patience=5'"),
    ("curriculum+minsnr", "unknown method 'minsnr'; did you mean 'min_snr'"),
    ("vanilla,vanilla", "names vanilla twice"),
    ("vanilla+curriculum", "vanilla sets curriculum.pacing=none and curriculum curriculum.pacing=patience"),
    ("speed+min_snr", "speed sets noise.weighting=p2 and min_snr noise.weighting=min_snr"),
    ("logit_normal+curriculum+speed", "logit_normal sets noise.sampling=logit_normal and speed noise.sampling=speed"),
    ("curriculum@pacing=none", "curriculum sets curriculum.pacing=patience and @ curriculum.pacing=none"),
    ("vanilla@patience=5", "curriculum.patience has no effect with curriculum.pacing=none"),
    ("naive@patience=5", "curriculum.patience has no effect with curriculum.pacing=fixed"),
    ("curriculum@interval=5", "curriculum.interval has no effect with curriculum.pacing=patience; leave it out, or name a method whose pacing is fixed"),
    ("p2@n_clusters=5", "curriculum.n_clusters has no effect"),
    ("curriculum@patince=5", "'patince=5' is no setting of a method; write FIELD=VALUE, such as curriculum.patience=..."),
    ("curriculum@patience", "'patience' is no setting"),
    ("curriculum@train.steps=5", "'train.steps=5' is no setting"),
    ("curriculum@data.path=x", "'data.path=x' is no setting"),
    ("curriculum@order=a/b", "leave out the slash"),
])
def test_bad_methods(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_methods(text)
    assert message in str(error.value)


# ---- the runs

def planned(methods: str = "vanilla,naive,curriculum", seeds: int = 2, every: int | None = None, naive_interval: int | None = None,
            extra: tuple[str, ...] = (), preset: str = "digits") -> list[Run]:
    return plan(preset, read_methods(methods), seeds=seeds, out=Path("out"), every=every, naive_interval=naive_interval, extra=extra)


def test_runs_differ_in_their_method_only() -> None:
    runs = planned(extra=("--train.seed", "5", "--train.steps", "1001"))
    assert [(run.method, run.seed) for run in runs] == [(m, s) for s in (5, 6) for m in ("vanilla", "naive", "curriculum")]
    first = runs[0].config
    assert (first.train.steps, first.checkpoint.every, first.checkpoint.keep_every) == (1001, 101, 101)
    for run in runs:
        assert run.config == train_program.parse(list(run.arguments))
        assert run.folder == Path(f"out/{run.method}/seed_{run.seed}") and run.config.train.seed == run.seed
        changed = {line.partition(":")[0] for line in differences(to_dict(run.config), to_dict(first))}
        own = {"vanilla": set(), "naive": {"curriculum.pacing", "curriculum.interval"}, "curriculum": {"curriculum.pacing"}}[run.method]
        assert changed == own | ({"train.seed"} if run.seed == 6 else set())
        assert run.command(1) == [sys.executable, "-m", "largescale.train", *run.arguments]
        assert run.command(2)[1:8] == ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                                       "--nproc-per-node", "2"]


def test_how_long_naive_takes() -> None:
    """Half of the run for its N stages, where nobody says otherwise."""
    def interval(methods: str, **more: Any) -> int:
        return planned(methods, seeds=1, **more)[-1].config.curriculum.interval

    assert interval("naive") == 240                     # 2400 steps, N = 5
    assert interval("naive@n_clusters=10") == 120
    assert interval("naive", extra=("--train.steps", "3")) == 1
    assert interval("naive", naive_interval=33) == 33 and interval("naive+anti", naive_interval=33) == 33
    assert interval("naive@interval=44", naive_interval=33) == 44
    assert interval("curriculum", naive_interval=33) == Config("").curriculum.interval


@pytest.mark.parametrize(("options", "message"), [
    ({"preset": "digit"}, "unknown preset 'digit'; did you mean 'digits'"),
    ({"methods": "vanilla,curriculum,curriculum@patience=10"}, "methods 'curriculum' and 'curriculum@patience=10' are the same training"),
    ({"methods": "min_snr+curriculum,curriculum+min_snr"}, "are the same training"),
    ({"methods": "naive,naive@interval=240"}, "are the same training"),
    ({"extra": ("--curriculum.pacing", "none")}, "--curriculum.pacing after -- is for all runs"),
    ({"extra": ("--curriculum.interval", "7"), "methods": "naive@interval=3"}, "--curriculum.interval after -- is for all runs"),
    ({"extra": ("--checkpoint.keep-every", "3")}, "--checkpoint.keep-every after -- is for all runs"),
    ({"extra": ("--output", "here")}, "--output after -- is for all runs"),
])
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(**options)
    assert message in str(error.value)


def test_interval_for_all_is_naives() -> None:
    """Not among the methods' own settings, but set for each: it would be overruled in silence."""
    with pytest.raises(ConfigError, match="--curriculum.interval after -- is for all runs"):
        planned("naive", extra=("--curriculum.interval", "7"))


class Recorded(Run):
    """Runs a program of a line in place of training."""

    program = ""

    def command(self, nproc: int) -> list[str]:
        return [sys.executable, "-c", self.program]


@pytest.mark.parametrize(("status", "ours"), [(2, 2), (75, 75), (1, 1), (-9, 1), (3, 1)])
def test_training_that_fails(status: int, ours: int) -> None:
    run = Recorded("vanilla", 0, PRESETS["debug"](), ())
    exit_so = f"import sys; sys.exit({status})" if status > 0 else f"import os; os.kill(os.getpid(), {-status})"
    with pytest.raises(TrainingFailed, match=f"ended with status {status}") as error:
        type("Fails", (Recorded,), {"program": exit_so})(*dataclasses.astuple(run)[:2], run.config, ()).train(1)
    assert error.value.exit_status == ours


def test_a_stop_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training program is asked to save, and waited for."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    program = f"""
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    time.sleep(0.3)
    Path({str(saved)!r}).write_text(str(number))
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
Path({str(ready)!r}).touch()
time.sleep(600)
"""
    def ask() -> None:
        while not ready.exists():
            threading.Event().wait(0.02)
        signals._requested = True

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Stopped):
        type("Waits", (Recorded,), {"program": program})("vanilla", 0, PRESETS["debug"](), ()).train(1)
    asking.join()
    assert saved.read_text() == str(int(signal.SIGTERM))


# ---- statistics

def rows(*values: float | None, name: str = "FD") -> list[dict[str, Any]]:
    return [{"step": 100 * (i + 1), "figures": {name: {"value": value}, "other": {"value": 0.0}}} for i, value in enumerate(values)]


def test_means_and_differences() -> None:
    assert mean([2.0, 4.0, 9.0]) == mean([9.0, 2.0, 4.0]) and mean([2.0, 4.0, 9.0]).value == 5
    assert mean([2.0, 4.0, 9.0]).spread == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert mean([3.0]).spread is None and str(mean([3.0])) == "3" and str(mean([1.0, 2.0])) == "1.5 ± 0.71"
    # Seeds spread by 10, each difference is -1 but for 0.1: pairing shows what the means hide.
    found = paired([9.0, 19.1, 28.9], [10.0, 20.0, 30.0])
    assert found.value == pytest.approx(-1.0) and found.error == pytest.approx(0.1 / math.sqrt(3)) and found.is_significant
    assert str(found) == "-1 ± 0.058, better (p = 0.00332)"
    assert str(paired([1.0, 1.2], [0.0, 0.0])) == "+1.1 ± 0.1, no significant difference (p = 0.0577)"
    assert str(paired([1.0, 1.02], [0.0, 0.0])) == "+1.01 ± 0.01, worse (p = 0.0063)" and str(paired([2.0], [1.0])) == "+1"
    assert not paired([2.0], [1.0]).is_significant and not paired([1.0, 1.0], [1.0, 1.0]).is_significant
    for seeds, quantile in enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), 2):  # a table's, of 97.5 %
        assert t_test(quantile * 1.001, 1.0, seeds) < 0.05 < t_test(-quantile * 0.999, 1.0, seeds)


def test_p_values() -> None:
    """Of 1 and 2 degrees of freedom in closed form; of more, as scipy has them from the values."""
    for t in (0.3, 1.0, 4.0):
        assert t_test(2 * t, 2.0, 2) == pytest.approx(1 - 2 / math.pi * math.atan(t))
        assert t_test(-t, 1.0, 3) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    ours, theirs = [1.0, 2.5, 3.0, 5.5], [1.5, 2.0, 4.5, 6.0]
    assert paired(ours, theirs).p_value == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)
    assert t_test(0.0, 0.0, 3) == 1 and t_test(0.1, 0.0, 3) == 0  # all differences alike


def test_holms_correction() -> None:
    """By hand: 0.01 x 4; 0.02 x 3; 0.03 x 2, as large as the one before; 0.9 x 1."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.5, 0.6]) == [1, 1] and holm([0.04]) == [0.04] and holm([]) == []


def test_many_methods_that_do_nothing() -> None:
    """One of twenty looks significant by chance, every other time; with the correction, at most one time of twenty."""
    draws = np.random.default_rng(0).normal(size=(200, 21, 4))
    raw = adjusted = 0
    for draw in draws:
        found = against_first({str(i): list(values) for i, values in enumerate(draw)}).values()
        assert all(d.p_value is not None and d.p_adjusted is not None and d.p_adjusted >= d.p_value for d in found)
        raw += any(d.p_value < 0.05 for d in found if d.p_value is not None)
        adjusted += any(d.is_significant for d in found)
    assert adjusted <= 0.07 * 200 < 0.3 * 200 < raw


def test_standings() -> None:
    runs = {
        "vanilla": {0: rows(9, 5, 4, 4.5), 1: rows(10, 6, 5, 3)},           # best 4 at 300, 3 at 400
        "fast": {0: rows(5, 4, 3, 2), 1: rows(6, 3, 2, 1)},                 # reach these at 200, 200
        "half": {0: rows(5, 4.5, 4.2, 3.5), 1: rows(9, 8, 7, 6)},           # at 400, never
        "never": {0: rows(9, 8, 7, 6), 1: rows(9, 8, 7, 7)},
    }
    found = standings(runs, "FD")
    vanilla, fast, half, never = (found[name] for name in runs)
    assert vanilla.final == mean([4.5, 3]) and vanilla.best == mean([4, 3]) and vanilla.best_at == 350
    assert vanilla.difference is None and vanilla.reached == (300, 400) and vanilla.speedup == 1
    assert fast.difference == replace(paired([2, 1], [4.5, 3]), p_adjusted=fast.difference.p_adjusted) and fast.reached == (200, 200) and fast.speedup == 1.75
    assert half.reached == (400, None) and half.speedup is None
    assert never.reached == (None, None) and never.best == mean([6, 7]) and never.best_at == 350
    lines = table(found).markdown
    assert lines[2] == "| vanilla | 3.75 ± 1.1 | 3.5 ± 0.71 |  | 350 | 1.00 |"
    assert [s.difference.p_adjusted for s in (fast, half, never) if s.difference] == holm(
        [s.difference.p_value or 0 for s in (fast, half, never) if s.difference])
    assert lines[3].endswith("| -2.25 ± 0.25, no significant difference (p = 0.211, raw 0.0704) | 200 | 1.75 |")
    assert lines[4].endswith("| 400 (1 of 2 seeds) |  |") and lines[5].endswith("| not reached |  |")
    said = summary(found, "FD", 400)
    assert "at step 400, FD is 3.75 ± 1.1 by vanilla; 1.5 ± 0.71 by fast (difference -2.25 ± 0.25, no significant difference (p = 0.211, raw 0.0704); reaches vanilla's best at step 200)" in said
    assert "reaches vanilla's best at step 400 (1 of 2 seeds)" in said and "reaches vanilla's best never" in said and "\n" not in said


def test_a_distance_that_was_not_finite() -> None:
    """It is left out; the curve goes on without it."""
    found = standings({"vanilla": {0: rows(None, 5, 4)}, "other": {0: rows(9, None, 4)}}, "FD")
    assert found["vanilla"].reached == (300,) and found["other"].reached == (300,) and found["other"].best.value == 4
    with pytest.raises(DataError, match="FD was finite at no checkpoint"):
        standings({"vanilla": {0: rows(None, None)}}, "FD")


def test_clusters_in_percent() -> None:
    def run(*clusters: float) -> list[dict[str, Any]]:
        return [{"step": 1, "figures": {figure("EMA", f" C{i}"): {"value": v} for i, v in enumerate(clusters, 1)}}]

    lines = cluster_table({"vanilla": {0: run(2.0, 4.0), 1: run(4.0, 4.0)}, "other": {0: run(1.0, 4.4), 1: run(2.0, 4.8)}}, 2, "EMA").markdown
    assert lines == ["| method | C1 | C2 |", "|---|---|---|", "| vanilla | 3 | 4 |", "| other | -50.00 % ± 0.00 | +15.00 % ± 5.00 |"]


def test_what_is_said_of_a_long_ema() -> None:
    config = PRESETS["debug"]()                         # 20 steps at 0.99
    assert ema_note(config) == ("The EMA still holds 82% of the untrained weights at step 20: ema_decay=0.99 is for longer runs, for "
                                "20 steps try --optimizer.ema-decay 0.5.")
    digits = PRESETS["digits"]()                        # 2,400 at 0.997
    assert not ema_note(digits) and not ema_note(digits, 1533) and "below 1%" in ema_note(digits, 1532)
    assert ema_note(digits, 200) == "The EMA still holds 55% of the untrained weights at step 200: from step 1,533 on it is below 1%."
    none = replace(digits, optimizer=replace(digits.optimizer, ema_decay=0.0))
    assert ema_note(none, 0) and not ema_note(none, 1)


# ---- the validation loss

class Levels:
    """An objective whose loss is the noise level."""

    def draw(self, v: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return v

    def training_losses(self, model: Any, x_start: Tensor, t: Tensor, noise: Tensor, y: Any) -> Losses:
        return Losses(t, t, t)


@pytest.fixture
def validation(blobs: Path) -> Callable[..., ValidationLoss]:
    def make(edges: tuple[float, ...], images: int, batch_size: int = 7) -> ValidationLoss:
        return ValidationLoss(ShardDataset(blobs), PRESETS["debug"](), edges, images, batch_size, CPU)

    return make


def test_which_noise_levels_a_cluster_has(validation: Callable[..., ValidationLoss]) -> None:
    """Evenly spaced in each: the mean is its middle."""
    found = validation((0.0, 0.1, 0.6, 1.0), 5)(nn.Identity(), Levels())  # type: ignore[arg-type]
    assert found == pytest.approx([0.05, 0.35, 0.8])


def test_the_loss_of_a_model_that_says_nothing(validation: Callable[..., ValidationLoss]) -> None:
    """It is that of the noise: its mean square."""
    config = PRESETS["debug"]()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, learn_sigma=False))
    noise = step_draws(VALIDATION_SEED, 0, 12, (1, 16, 16), dropout_prob=0.0, posterior=False, device=CPU).noise
    found = validation((0.0, 0.2, 0.5, 1.0), 4)(lambda x, t, y: torch.zeros_like(x), build_objective(config))  # type: ignore[arg-type]
    assert found == pytest.approx(noise.square().reshape(3, -1).mean(1).double().numpy())


# ---- comparisons

def tiny(images: Tensor) -> Features:
    x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
    return Features(x, None, x * 20)


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


@pytest.fixture(autouse=True)
def tiny_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = Extractor("tiny", "tiny sha256:0", 12, None, 12, CPU, tiny)
    monkeypatch.setattr(score, "load_extractor", lambda spec, *args, **more: extractor)


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
