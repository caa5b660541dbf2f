"""Records of starts, and the account of a run's time: cases whose answer is known in closed form."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from largescale.monitoring import goodput, run_record, step_timer
from largescale.monitoring.run_record import (
    KINDS,
    Account,
    Start,
    account,
    begin,
    duration,
    read_starts,
)
from largescale.monitoring.telemetry import Telemetry


def start(began: float, seen: float, from_step: int = 0, step: int = 0, **kinds: float) -> Start:
    """`start_up` and the like: seconds by KINDS."""
    seconds = {kind.replace("_", "-"): s for kind, s in kinds.items()}
    assert seconds.keys() <= set(KINDS)
    return Start(1, began, 1, "cpu", from_step, step=step, seen_unix_s=seen, seconds=seconds)


def spent(*records: Start) -> dict[str, Any]:
    """By kind, what is not 0; and every second is accounted for, once."""
    a = account(iter(records))
    assert sum(a.seconds.values()) == pytest.approx(a.wall_s) and min(a.seconds.values()) >= 0
    assert a.wall_s == records[-1].seen_unix_s - records[0].began_unix_s
    return {kind: pytest.approx(s) for kind, s in a.seconds.items() if s}


def test_nothing() -> None:
    a = account([])
    assert (a.wall_s, a.goodput, str(a)) == (0, 0, "goodput 0.0% of 0.0 s") and set(a.seconds.values()) == {0.0}
    unseen = account([start(50, 50)])
    assert unseen.wall_s == unseen.goodput == 0 and str(unseen) == "goodput 0.0% of 0.0 s"


def test_one_start() -> None:
    one = start(1000, 1100, 0, 50, training=60, data=5, evaluation=4, checkpoint=3, compile=2, start_up=16)
    expected = {"training": 60, "data": 5, "evaluation": 4, "checkpoint": 3, "compile": 2, "start-up": 16, "other": 10}
    assert spent(one) == expected and account([one]).goodput == 0.6
    assert str(account([one])) == (
        "goodput 60.0% of 2 min (start-up 16.0%, other 10.0%, data 5.0%, evaluation 4.0%, checkpoint 3.0%, compile 2.0%)"
    )


def test_clocks_that_disagree_a_little_leave_nothing_negative() -> None:
    assert account([start(0, 10, training=10.5)]).seconds["other"] == 0
    assert account([start(0, 10), start(9, 20)]).seconds["idle"] == 0


def test_a_clock_that_was_set_back() -> None:
    """Nothing is negative, and every second that was counted is in the whole."""
    for records in ([start(5000, 5100, training=100), start(1000, 1100, training=90)],
                    [start(5000, 4000, training=100)], [start(9000, 9000), start(10, 10)]):
        a = account(records)
        assert min(a.wall_s, *a.seconds.values()) >= 0 and 0 <= a.goodput <= 1 and "-" not in str(a).replace("start-up", "")
        assert sum(a.seconds.values()) == pytest.approx(a.wall_s)


def test_an_account_looks_at_each_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    class Counted(Start):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "from_step"
            return super().__getattribute__(name)

    counts = []
    for n in (100, 1000):
        records = [Counted(i, 100 * i, 1, "cpu", 10 * i, step=10 * i + 12, seen_unix_s=100 * i + 90) for i in range(n)]
        looks = 0
        account(records)
        counts.append(looks)
    assert counts[1] == pytest.approx(10 * counts[0], rel=0.01)


def test_an_account_goes_on_from_the_one_before() -> None:
    """The sum of what is settled and of the last start is the whole, whatever the last one is at."""
    records = [start(0, 100, 0, 100, training=100), start(100, 130, 100, 130, training=30), start(140, 240, 50, 150, training=90)]
    settled = account([*records[:2], replace(records[2], seen_unix_s=records[2].began_unix_s, seconds={})])
    assert settled + account(records[2:]) == account(records)


def test_idle_between_starts() -> None:
    assert spent(start(0, 100, 0, 10, training=100), start(130, 200, 10, 17, training=70)) == {"training": 170, "idle": 30}


def test_steps_that_are_taken_again() -> None:
    # Killed at step 40, whose last checkpoint was step 30: a quarter of the work is lost, of every kind that steps take.
    first = start(0, 100, 0, 40, training=60, data=8, evaluation=4, compile=8, checkpoint=12, start_up=8)
    assert spent(first, start(100, 120, 30, 40, training=20)) == {
        "training": 45 + 20, "data": 6, "evaluation": 3, "compile": 6, "replayed": 20, "checkpoint": 12, "start-up": 8
    }
    # Of a start that resumed, only its own steps can be lost.
    resumed = start(0, 100, 60, 100, training=100)
    assert spent(resumed, start(100, 110, 70, 71, training=10)) == {"training": 25 + 10, "replayed": 75}


def test_a_record_older_than_the_checkpoint_loses_nothing() -> None:
    # Killed after the checkpoint of step 40, before the record said so.
    assert spent(start(0, 90, 0, 38, training=90), start(100, 120, 40, 45, training=20)) == {"training": 110, "idle": 10}


def test_nothing_was_saved() -> None:
    assert spent(start(0, 50, 0, 20, training=50), start(50, 100, 0, 20, training=50)) == {"training": 50, "replayed": 50}
    assert spent(start(0, 50, start_up=50), start(50, 100, 0, 20, training=50)) == {"training": 50, "start-up": 50}


def test_falling_back_replays_several_starts() -> None:
    # The third start finds the checkpoints of steps 100 and 120 damaged, and goes on from 50.
    records = [start(0, 100, 0, 100, training=100), start(100, 130, 100, 130, training=30), start(130, 230, 50, 150, training=100)]
    assert spent(*records) == {"training": 50 + 100, "replayed": 50 + 30}
    # A later start that goes on from further back counts, whichever comes next.
    records[1:1] = [start(100, 100, 100, 100)]
    assert spent(*records) == {"training": 150, "replayed": 80}


def test_the_goodput_is_of_steps_that_stayed() -> None:
    a = account([start(0, 100, 0, 100, training=100), start(100, 200, 50, 150, training=100)])
    assert a.goodput == 0.75 and str(a) == "goodput 75.0% of 3 min (replayed 25.0%)"


@pytest.mark.parametrize("seconds, text", [
    (0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min"), (60, "1 min"), (89, "1 min"), (59.4 * 60, "59 min"), (3599, "1 h 0 min"),
    (2 * 3600 + 5 * 60, "2 h 5 min"), (86400, "1 d 0 h"), (3 * 86400 + 4 * 3600 + 59 * 60, "3 d 4 h"),
])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- on disk


def test_numbers_go_up_and_are_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    args: dict[str, Any] = {"began_unix_s": 5.0, "world_size": 4, "device": "cuda", "from_step": 30, "settings": {"train": {"steps": 40}}}
    first = begin(tmp_path, **args)
    assert (first.number, first.job, first.restart, first.step, first.saved_step) == (1, None, 0, 30, -1)
    assert not list(tmp_path.iterdir())
    run_record.write(tmp_path, first)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    second = begin(tmp_path, **args)
    assert (second.number, second.job, second.restart, second.world_size, second.device) == (2, "77", 3, 4, "cuda")
    (tmp_path / "starts/start_00012.json").write_text("")       # a full disk
    (tmp_path / "starts/start_00013.json.tmp").write_text("{}")
    assert begin(tmp_path, **args).number == 13


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        one = Start(number, 1.5, 8, "cuda", 100, job="7", restart=2, host="a", step=250, saved_step=200,
                    seconds={"training": 0.1 + 0.2}, ended="stopped")
        run_record.write(tmp_path, one)
    one.step = 300
    run_record.write(tmp_path, one)
    assert one.seen_unix_s > 1.7e9
    found = read_starts(tmp_path)
    assert [s.number for s in found] == [1, 2, 10] and found[0] == one and found[1].step == 250


def test_a_record_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == read_starts(tmp_path / "missing") == []
    run_record.write(tmp_path, Start(1, 0.0, 1, "cpu", 0))
    good = json.loads((tmp_path / "starts/start_00001.json").read_text())
    bad: list[Any] = ["", "{", "\0\0\0", "[]", "null", "3", "{}", {**good, "step": "3"}, {**good, "seconds": []},
                      {**good, "seconds": {"data": None}}, {**good, "seen_unix_s": float("nan")}, {**good, "step": 10**400},
                      {**good, "seconds": {"data": 10**400}}, {**good, "ended": 5}, {**good, "job": 7}, {**good, "host": None},
                      "[" * 100_000]
    for i, record in enumerate(bad, 2):
        text = record if isinstance(record, str) else json.dumps(record)
        (tmp_path / f"starts/start_{i:05d}.json").write_text(text)
    (tmp_path / "starts/start_00050.json").write_bytes(b"\xff\xfe")
    (tmp_path / "starts/start_00051.json").mkdir()
    (tmp_path / "starts/start_00052.json").write_text(json.dumps({**good, "number": 52, "of a later version": 1}))
    assert [s.number for s in read_starts(tmp_path)] == [1, 52]


@pytest.mark.parametrize("from_step, saved_step, expected", [(0, -1, False), (0, 0, False), (0, 1, True), (9, 9, False)])
def test_progress(from_step: int, saved_step: int, expected: bool) -> None:
    assert Start(1, 0.0, 1, "cpu", from_step, saved_step=saved_step).made_progress is expected


def test_an_account_is_of_what_is_on_disk(tmp_path: Path) -> None:
    run_record.write(tmp_path, Start(1, 0.0, 1, "cpu", 0, seconds={"training": 10.0}))
    (record,) = read_starts(tmp_path)
    assert account([record]) == Account(record.seen_unix_s, account([record]).seconds)


def test_a_record_is_kept_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back while the run goes on; and what lies before this start is looked at once, not at each line of the log."""
    clock = SimpleNamespace(time=lambda: 10_000.0, monotonic=lambda: 50.0)
    for module in (goodput, run_record):
        monkeypatch.setattr(module, "time", clock)
    for number in range(1, 4):
        run_record.write(tmp_path, Start(number, 9_000.0 + number, 1, "cpu", 0, step=5))
    counts, count = list[int](), run_record.account
    monkeypatch.setattr(run_record, "account", lambda records: counts.append(len(list(records))) or count(records))
    timer: Any = SimpleNamespace(lifetime={"training": 1.0})
    with Telemetry(tmp_path, active=True, tensorboard=False, step=0, steps=10) as telemetry:
        account = goodput.Goodput(telemetry, timer, start_time=9_990.0, world_size=1, device="cpu", from_step=3, settings={})
        for line in range(1, 4):
            clock.time, clock.monotonic = partial(float, 10_000 - 1000 * line), partial(float, 50 + 11 * line)
            account.note(3 + line, -1)
            assert read_starts(tmp_path)[-1].step == 3 + line
            assert min(account.metrics().values()) >= 0
    assert counts == [4, 1, 1, 1]
    whole = count(read_starts(tmp_path))
    assert (account.account().wall_s, account.account().seconds) == (pytest.approx(whole.wall_s), pytest.approx(whole.seconds))


def test_what_is_done_beside_training_is_not_counted_as_training() -> None:
    source = (Path(step_timer.__file__).parents[1] / "training/trainer.py").read_text()
    names = re.findall(r'_side_task\("(\w+)"\)', source)
    assert {"reference", "preview"} <= {*names}
    assert {name: step_timer._KIND.get(name, "training") for name in names} == dict.fromkeys(names, "evaluation")
