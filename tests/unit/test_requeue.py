"""Whether a batch script shall have its job started again, from what the starts before it brought."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from largescale import requeue
from largescale.checkpoint.files import CheckpointDir
from largescale.monitoring import run_record
from largescale.monitoring.run_record import Start

ROOT = Path(__file__).parents[2]
NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, *where):
        if name.split(".")[0] in ("torch", "deepspeed"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, NoTorch())
"""


def start(run: Path, number: int, restart: int, from_step: int, saved_step: int = -1, job: str | None = "7") -> None:
    """Starts come 100 s apart."""
    run.mkdir(exist_ok=True)
    run_record.write(run, Start(number, 1000.0 + 100 * number, 1, "cpu", from_step, job=job, restart=restart,
                            step=from_step, saved_step=saved_step))


def saved(run: Path, step: int, unix_s: float, **manifest: object) -> None:
    checkpoint = CheckpointDir.at(run, step)
    checkpoint.path.mkdir(parents=True)
    text = json.dumps({"format": 1, "written_unix_s": unix_s, **manifest})
    (checkpoint.path / "manifest.json").write_text(text)


def asked(run: Path, status: int = 137, restart: int = 0, most: int = 2, job: str | None = "7") -> bool:
    return requeue.decide(run, status, most, job, restart)[0]


@pytest.mark.parametrize("status, restart, expected", [
    (0, 0, False), (2, 0, False), (75, 0, True), (1, 0, True), (137, 0, True),
    (75, 1, True), (75, 6, True), (75, 7, False), (1, 1, False),  # four times as many where it was asked to stop
])
def test_status_with_nothing_saved(tmp_path: Path, status: int, restart: int, expected: bool) -> None:
    assert asked(tmp_path / "missing", status, restart) is expected


def test_finished_and_mistaken_runs_end_whatever_was_saved(tmp_path: Path) -> None:
    start(tmp_path, 1, 0, from_step=0, saved_step=100)
    assert asked(tmp_path, 75) and not asked(tmp_path, 0) and not asked(tmp_path, 2)


def test_fruitless_starts_are_counted_from_the_last_fruitful_one(tmp_path: Path) -> None:
    for number, restart, from_step, saved_step in [(1, 0, 0, 50), (2, 1, 50, 90), (3, 2, 90, -1), (4, 3, 90, -1)]:
        start(tmp_path, number, restart, from_step, saved_step)
    assert requeue.last_start_with_progress(tmp_path, "7") == 1
    assert asked(tmp_path, restart=3, most=3) and not asked(tmp_path, restart=3, most=2)
    # Starts that died before they could leave a record count too.
    assert asked(tmp_path, restart=5, most=5) and not asked(tmp_path, restart=6, most=5)
    start(tmp_path, 5, 6, from_step=90, saved_step=91)
    assert asked(tmp_path, restart=6, most=1)


def test_other_jobs_do_not_count(tmp_path: Path) -> None:
    start(tmp_path, 1, 5, from_step=0, saved_step=100, job="6")
    start(tmp_path, 2, 5, from_step=100, saved_step=200, job=None)
    start(tmp_path, 3, 1, from_step=200)
    assert requeue.last_start_with_progress(tmp_path, "7") == -1 and not asked(tmp_path, restart=1)


def test_where_the_next_start_went_on_is_the_truth(tmp_path: Path) -> None:
    start(tmp_path, 1, 0, from_step=0)                    # killed before its record said that it had saved
    start(tmp_path, 2, 1, from_step=40, saved_step=80)    # what it saved was damaged:
    start(tmp_path, 3, 2, from_step=40)
    assert requeue.last_start_with_progress(tmp_path, "7") == 0
    start(tmp_path, 4, 3, from_step=80, job="8")          # whosever the next start is
    assert requeue.last_start_with_progress(tmp_path, "7") == 2


def test_a_checkpoint_that_the_record_does_not_know(tmp_path: Path) -> None:
    start(tmp_path, 1, 4, from_step=40)                   # began at 1100
    assert requeue.last_start_with_progress(tmp_path, "7") == -1
    saved(tmp_path, 40, 1150)
    saved(tmp_path, 80, 1050)                             # damaged, since the start passed it over
    assert requeue.last_start_with_progress(tmp_path, "7") == -1
    saved(tmp_path, 60, 1150)
    assert requeue.last_start_with_progress(tmp_path, "7") == 4


def test_damage_is_no_progress(tmp_path: Path) -> None:
    start(tmp_path, 1, 0, from_step=0, saved_step=10)
    (tmp_path / "starts/start_00002.json").write_text("")
    for step, manifest in [(20, "{"), (30, "[]"), (40, '{"format": 1}'), (50, '{"format": 1, "written_unix_s": "x"}')]:
        saved(tmp_path, step, 2000)
        (CheckpointDir.at(tmp_path, step).path / "manifest.json").write_text(manifest)
    start(tmp_path, 3, 1, from_step=10)
    assert requeue.last_start_with_progress(tmp_path, "7") == 0


@pytest.mark.parametrize("env, args, code, says", [
    ({}, ["--status", "75"], 1, "not asking for another start: SLURM_JOB_ID is not set"),
    ({}, ["--status", "0"], 1, "not asking for another start: the run is finished"),
    ({}, ["--status", "2"], 1, "correct what is reported above"),
    ({"SLURM_JOB_ID": "7"}, ["--status", "75"], 0, "asking for another start: this one of job 7 stopped in good order, with a new checkpoint"),
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "4"}, ["--status", "1"], 0, "job 7 ended with status 1, 4 in a row without a new checkpoint, 5 are too many"),
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "5"}, ["--status", "1"], 1,
     "not asking for another start: 5 starts in a row of job 7 ended without a new checkpoint (the last with status 1); look at the log above"),
    ({"SLURM_JOB_ID": "8"}, ["--status", "1", "--max-restarts", "1"], 1, "a start of job 8 ended without a new checkpoint"),
    ({"SLURM_JOB_ID": "7"}, ["--status", "1", "--max-restarts", "0"], 2, "max_restarts=0 must be at least 1"),
])
def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                     env: dict[str, str], args: list[str], code: int, says: str) -> None:
    start(tmp_path, 1, 0, from_step=0, saved_step=100)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert requeue.main([str(tmp_path), *args]) == code
    captured = capsys.readouterr()
    assert says in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    def stale(run: Path) -> list[Start]:
        raise OSError("Stale file handle")

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(requeue, "read_starts", stale)
    assert requeue.main([str(tmp_path), "--status", "1"]) == 1
    assert "cannot be read: Stale file handle; when it can, sbatch again" in capsys.readouterr().err


def test_no_torch(tmp_path: Path) -> None:
    code = NO_TORCH + "from largescale import requeue; sys.exit(requeue.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), "--status", "75"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"})
    assert done.returncode == 0, done.stderr
