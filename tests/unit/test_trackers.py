"""Trackers beside metrics.jsonl: what a service that fails, hangs or is slow costs, and what it has after a resume or a roll-back."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from largescale.config.presets import find_preset
from largescale.config.schema import TelemetryConfig
from largescale.config.serialise import from_dict, to_dict
from largescale.errors import TakenOverError
from largescale.host import extras
from largescale.monitoring.telemetry import Telemetry, read_metrics, rows_from
from largescale.monitoring.trackers import background
from largescale.monitoring.trackers.background import Background
from largescale.monitoring.trackers.build import SERVICES, run_id
from largescale.monitoring.trackers.secrets import without_secrets
from largescale.monitoring.trackers.service import Moment, RunInfo
from tests.conftest import RunHere, cut


class Fake:
    """A service that keeps what it is given, over all starts. `before` is called first, and may raise or wait."""

    settle_s = 0.0

    def __init__(self, before: Callable[[str], None] = lambda what: None):
        self.before = before
        self.rows: list[tuple[int, int, int, dict[str, Any]]] = []  # branch, step, number, metrics
        self.ends: list[tuple[str, dict[str, Any]]] = []
        self.ids: list[str] = []

    def start(self, run: RunInfo) -> str | None:
        self.before("start")
        self.ids.append(run.id)
        return None

    def log(self, at: Moment, metrics: Mapping[str, Any]) -> None:
        self.before("log")
        self.rows.append((at.branch, at.step, at.number, dict(metrics)))

    def event(self, at: Moment, kind: str, text: str) -> None:
        self.log(at, {f"event/{kind}": text})

    def image(self, at: Moment, name: str, image: np.ndarray) -> None:
        self.log(at, {name: image.shape})

    def finish(self, ended: str, summary: Mapping[str, Any]) -> None:
        self.before("finish")
        self.ends.append((ended, dict(summary)))

    def newest(self, key: str) -> dict[int, Any]:
        """The value of each step that counts: of its highest branch."""
        return {step: metrics[key] for _, step, _, metrics in sorted(self.rows, key=lambda row: row[:3]) if key in metrics}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY_S", (0.01, 0.01))
    monkeypatch.setattr(background, "START_RETRY_S", (0.01,))
    monkeypatch.setattr(background, "NOTE_EVERY_S", 0.0)


def tracker(fake: Fake, folder: Path, said: list[str], step: int = 0, config: dict[str, Any] | None = None, deadline_s: float = 20) -> Background:
    folder.mkdir(exist_ok=True)
    return Background("fake", lambda: fake, lambda: RunInfo(run_id(folder), "x", config or {}, folder), folder=lambda: folder,
                      step=step, logged=lambda first: rows_from(folder, first), message=said.append, deadline_s=deadline_s)


def settled(folder: Path, number: int) -> None:
    """Waits until so much is sent, and noted."""
    note, end = folder / "fake.json", time.monotonic() + 20
    while not note.exists() or json.loads(note.read_text())["number"] < number:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_everything_arrives_in_order(tmp_path: Path) -> None:
    fake, said = Fake(), list[str]()
    sent = tracker(fake, tmp_path, said)
    for step in range(1, 6):
        sent.log(step, {"loss": 1 / step})
    sent.event(5, "transition", "on we go")
    sent.image(5, "samples", np.zeros((2, 3, 3), np.uint8))
    sent.close("finished", {"goodput": "all"})
    assert [(step, number) for _, step, number, _ in fake.rows] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (5, 5), (5, 6)]
    assert fake.rows[5][3] == {"event/transition": "on we go"} and fake.rows[6][3] == {"samples": (2, 3, 3)}
    assert fake.ends == [("finished", {"goodput": "all"})] and said == []


def test_a_service_that_hangs_costs_nothing_but_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 50)
    forever = threading.Event()
    said = list[str]()
    sent = tracker(Fake(lambda what: what == "log" and forever.wait()), tmp_path, said, deadline_s=0.2)  # type: ignore[arg-type, return-value]
    for step in range(1, 101):
        sent.log(step, {"loss": 1.0})
    assert sent._queue.qsize() <= 50
    sent.close("stopped", {})
    assert len(said) == 2 and "fallen far behind" in said[0] and "did not get 100 of 100 entries" in said[1]
    forever.set()


def test_pictures_that_wait_take_little_memory(tmp_path: Path) -> None:
    forever = threading.Event()
    fake, said = Fake(lambda what: what == "start" and forever.wait()), list[str]()  # type: ignore[arg-type, return-value]
    sent = tracker(fake, tmp_path, said)
    for step in range(1, 31):
        sent.image(step, "samples", np.zeros((2, 3, 3), np.uint8))
    assert sent._queue.qsize() == background.MOST_PICTURES
    forever.set()
    sent.log(30, {"loss": 1.0})
    settled(tmp_path, background.MOST_PICTURES + 1)
    sent.image(31, "samples", np.zeros((2, 3, 3), np.uint8))
    sent.close("finished", {})
    assert len(fake.rows) == background.MOST_PICTURES + 2 and f"did not get {30 - background.MOST_PICTURES} of 32 entries" in said[1]


def test_a_service_that_hangs_at_the_start_or_the_end(tmp_path: Path) -> None:
    for what in ("start", "finish"):
        forever, said = threading.Event(), list[str]()
        sent = tracker(Fake(lambda now, what=what, forever=forever: now == what and forever.wait()), tmp_path / what, said, deadline_s=0.2)  # type: ignore[misc]
        sent.log(1, {"loss": 1.0})
        if what == "finish":
            settled(tmp_path / what, 1)
        sent.close("finished", {})
        expected = "did not get 1 of 1" if what == "start" else "did not answer in 0.2 s"
        assert len(said) == 1 and expected in said[0]
        forever.set()


def test_a_service_that_raises_is_tried_again(tmp_path: Path) -> None:
    """Every second call fails: nothing is lost, and one line is printed."""
    calls = iter(range(1000))

    def fails(what: str) -> None:
        if next(calls) % 2 == 0:
            raise ConnectionError("no network")

    fake, said = Fake(fails), list[str]()
    sent = tracker(fake, tmp_path, said)
    for step in range(1, 6):
        sent.log(step, {"loss": 1.0})
    settled(tmp_path, 5)
    sent.close("finished", {})
    assert [row[1] for row in fake.rows] == [1, 2, 3, 4, 5]
    assert said == ["fake fails, training continues: ConnectionError: no network"]


def test_an_entry_that_is_refused_is_lost_and_the_next_one_is_not(tmp_path: Path) -> None:
    fake, said = Fake(), list[str]()
    real = fake.log
    fake.log = lambda at, metrics: real(at, metrics) if at.step != 2 else 1 / 0  # type: ignore[assignment, method-assign, return-value]
    sent = tracker(fake, tmp_path, said)
    for step in range(1, 4):
        sent.log(step, {"loss": 1.0})
    sent.close("finished", {})
    assert [row[1] for row in fake.rows] == [1, 3]
    assert len(said) == 2 and "ZeroDivisionError" in said[0] and "did not get 1 of 3 entries" in said[1]


def test_without_a_network_what_is_lost_is_said_and_the_next_start_sends_it(tmp_path: Path) -> None:
    def no_network(what: str) -> None:
        raise ConnectionError("no network")

    fake, said = Fake(no_network), list[str]()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        sent = tracker(fake, tmp_path, said)
        for step in range(1, 4):
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            sent.log(step, {"loss": 1 / step})
        file.write('{"step": 3, "event": "transition", "text": "on we go", "index": 3}\n')
        sent.event(3, "transition", "on we go")
    sent.close("stopped", {})
    assert len(said) == 2 and "did not get 4 of 4" in said[1] and not fake.rows
    fake.before = lambda what: None
    again = tracker(fake, tmp_path, said, step=2)
    again.log(3, {"loss": 0.5})
    again.close("finished", {})
    assert [(row[1], row[3]) for row in fake.rows] == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 0.5})] and len(said) == 2


def test_a_resumed_run_sends_nothing_twice(tmp_path: Path) -> None:
    """Killed at step 5 after the row and before the picture of that step, back to step 2."""
    fake, said = Fake(), list[str]()
    first = tracker(fake, tmp_path, said)
    for step in range(1, 6):
        first.log(step, {"loss": 1 / step})
    settled(tmp_path, 5)
    second = tracker(fake, tmp_path, said, step=2)
    for step in range(3, 8):
        second.log(step, {"loss": 1 / step})
        if step == 5:
            second.image(step, "samples", np.zeros((2, 3, 3), np.uint8))
    second.close("finished", {})
    assert [(row[0], row[1]) for row in fake.rows] == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 5), (0, 6), (0, 7)]
    assert [row[2] for row in fake.rows] == [*range(8)] and len(set(fake.ids)) == 1 and said == []


def test_after_a_roll_back_the_new_values_count(tmp_path: Path) -> None:
    """Also where the run is killed after it, and goes on from before it."""
    fake, said = Fake(), list[str]()
    first = tracker(fake, tmp_path, said)
    for step in range(1, 6):
        first.log(step, {"loss": 1.0})
    first.roll_back(2)
    for step in range(3, 5):
        first.log(step, {"loss": 2.0})
    settled(tmp_path, 7)
    second = tracker(fake, tmp_path, said, step=3)
    for step in range(4, 7):
        second.log(step, {"loss": 3.0})
    second.close("finished", {})
    assert fake.newest("loss") == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 3.0, 6: 3.0}  # step 4 was sent by the first start
    assert [row[:2] for row in fake.rows[5:]] == [(1, 3), (1, 4), (1, 5), (1, 6)]


def test_a_changed_config_is_another_branch_where_steps_are_taken_again(tmp_path: Path) -> None:
    fake, said = Fake(), list[str]()
    for step, rate in ((0, 1.0), (3, 2.0)):
        sent = tracker(fake, tmp_path, said, step=step, config={"lr": rate})
        for later in range(step + 1, 6):
            sent.log(later, {"loss": rate})
        sent.close("stopped", {})
    assert fake.newest("loss") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 1, "steps": 2}', b"\xff"])
def test_a_damaged_note_sends_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fake.json").write_bytes(content)
    fake, said = Fake(), list[str]()
    sent = tracker(fake, tmp_path, said, step=2)
    sent.log(3, {"loss": 1.0})
    sent.close("finished", {})
    assert [row[1] for row in fake.rows] == [3]


# ---- in a run


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """In the place of mlflow, which need not be installed."""
    fake = Fake()
    monkeypatch.setitem(SERVICES, "mlflow", lambda: fake)
    monkeypatch.setattr("largescale.train.require_trackers", lambda names: None)
    return fake


def logged(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}


def test_a_run_and_its_resume(run_here: RunHere, tmp_path: Path, service: Fake) -> None:
    settings = ("--telemetry.trackers", "mlflow", "--curriculum.patience", 0, "--telemetry.preview-every", 8, "--telemetry.preview-steps", 3)
    truth = run_here(*settings, "--train.steps", 12, output=tmp_path / "truth")
    assert truth.code == 0, truth.err
    assert service.newest("loss") == logged(truth.run) and service.ends[0][0] == "finished"
    assert {"step": 12, "saved_step": 12}.items() <= service.ends[0][1].items() and "goodput" in service.ends[0][1]["goodput"]
    events = [row for row in read_metrics(truth.run) if "event" in row]
    assert list(service.newest("event/transition").items()) == [(row["step"], row["text"]) for row in events] != []
    assert list(service.newest("samples")) == [8] and list(service.newest("checkpoint/step").values())[-1] == 12

    sent = len(service.rows)
    cut(truth.run, tmp_path / "cut", 5)
    again = run_here(*settings, "--train.steps", 12, output=tmp_path / "cut")
    assert again.code == 0, again.err
    # Checkpoints are finished when their files are: at which step depends on the disk.
    assert [row[1:] for row in service.rows[sent:] if "checkpoint/step" not in row[3]] == [] and len({*service.ids}) == 1


def test_a_hanging_service_changes_nothing_of_what_is_trained(run_here: RunHere, tmp_path: Path, service: Fake,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largescale.monitoring.trackers.build.DEADLINE_S", 0.1)
    forever = threading.Event()
    service.before = lambda what: forever.wait() and None
    hung = run_here("--train.steps", 6, "--telemetry.trackers", "mlflow", output=tmp_path / "hung")
    forever.set()
    assert hung.code == 0 and "mlflow did not get" in hung.err
    assert hung.trace() == run_here("--train.steps", 6, output=tmp_path / "none").trace()


def test_a_run_that_is_taken_over_sends_nothing(tmp_path: Path) -> None:
    """Neither its rows nor its end: the other process goes on in the same run there."""
    fake, taken = Fake(), [False]

    def require_lock() -> None:
        if taken[0]:
            raise TakenOverError("another process trains it")

    def start(run_dir: Callable[[], Path], message: Callable[[str], None]) -> list[Background]:
        return [tracker(fake, tmp_path, [])]

    with Telemetry(tmp_path, active=True, tensorboard=False, step=0, steps=9, require_lock=require_lock, trackers=start) as telemetry:
        telemetry.log(1, {"loss": 1.0})
        settled(tmp_path, 1)
        taken[0] = True
        telemetry.log(2, {"loss": 1.0})
        telemetry.event(2, "transition", "on we go")
        telemetry.roll_back(1)
    assert [row[1] for row in fake.rows] == [1] and fake.ends == [] and list(logged(tmp_path)) == [1]


def test_other_ranks_start_no_tracker(tmp_path: Path) -> None:
    def never(*args: object) -> Any:
        raise AssertionError

    with Telemetry(tmp_path / "run", active=False, tensorboard=False, step=0, steps=1, trackers=never) as quiet:
        quiet.log(1, {"loss": 1.0})
        quiet.summarise("finished", step=1)
    assert not (tmp_path / "run").exists()


# ---- settings


def test_a_tracker_that_is_not_installed(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "wandb" else found(name))
    done = run_here("--telemetry.trackers", "wandb")
    assert done.code == 2 and "pip install -e '.[wandb]'" in done.err and not done.run.exists()


def test_mlflow_without_a_server(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    done = run_here("--telemetry.trackers", "mlflow")
    assert done.code == 2 and "MLFLOW_TRACKING_URI is not set" in done.err and not done.run.exists()


def test_each_tracker_of_the_option_is_there() -> None:
    names = get_args(get_args(get_type_hints(TelemetryConfig)["trackers"])[0])
    assert names == ("tensorboard", *SERVICES)


def test_a_tracker_that_is_named_twice(run_here: RunHere) -> None:
    """It would send everything twice."""
    run = run_here("--telemetry.trackers", "tensorboard", "tensorboard")
    assert run.code == 2 and "must be named once each" in run.err


def test_an_unknown_tracker(run_here: RunHere) -> None:
    done = run_here("--telemetry.trackers", "wandbb")
    assert done.code == 2 and "wandb" in done.err and not done.run.exists()


def test_configs_and_commands_of_before(run_here: RunHere, tmp_path: Path) -> None:
    """telemetry.tensorboard was a switch."""
    for switch, trackers in ((True, ("tensorboard",)), (False, ())):
        tree = to_dict(find_preset("debug"))
        del tree["telemetry"]["trackers"]
        tree["telemetry"]["tensorboard"] = switch
        assert from_dict(tree).telemetry.trackers == trackers and tree["telemetry"]["tensorboard"] is switch
    for words, made in ((["--telemetry.tensorboard"], True), (["--telemetry.no-tensorboard"], False), (["--telemetry.no_tensorboard"], False)):
        done = run_here("--train.steps", 2, *words, output=tmp_path / "-".join(words))
        assert done.code == 0 and (done.run / "tensorboard").exists() is made, done.err


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame")
    text = "request to https://me:opensesame@host:5000/api failed: key 0123456789abcdef"
    assert without_secrets(text) == "request to https://***@host:5000/api failed: key ***"
