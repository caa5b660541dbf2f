"""Methods of eval.compare, and that runs differ in theirs only."""

import dataclasses
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.comparison.methods import METHODS, read_methods
from eval.comparison.plan import plan
from eval.training_runs import Run, TrainingFailed, differences
from largescale import train as train_program
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict
from largescale.config.validation import validate
from largescale.errors import ConfigError, Stopped
from largescale.host import signals
from tests.unit.comparisons import one_thread, tiny_extractor  # noqa: F401

CPU = torch.device("cpu")


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
    ("curriculum@patience=5,patience=6", "sets curriculum.patience twice; set it once"),
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
