"""How a run stands, told from its folder: of a real run, and of folders made by hand to hold what rarely happens."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from largescale import status
from largescale.checkpoint.files import CheckpointDir, checkpoints
from largescale.config.presets import PRESETS
from largescale.config.serialise import to_dict
from largescale.curriculum import Curriculum, PatiencePacing, uniform_clusters
from largescale.monitoring import run_record
from largescale.monitoring.run_record import Start
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import RunHere
from tests.unit.test_requeue import NO_TORCH, ROOT

NOW = 0.0


@pytest.fixture(autouse=True)
def now() -> None:
    """What is made here is so many seconds old, however late this file's turn comes."""
    global NOW
    NOW = time.time()


def curriculum(step: int) -> dict[str, Any]:
    """5 clusters, and a transition after every 10 steps."""
    c = Curriculum(uniform_clusters(5), PatiencePacing(8))
    for _ in range(step):
        c.observe(0.25)
    return c.state_dict()


def save(run: Path, step: int, written: float | None = None, state: dict[str, Any] | None = None, **manifest: Any) -> CheckpointDir:
    """A checkpoint as training leaves it, of two small files."""
    checkpoint = CheckpointDir.at(run, step)
    checkpoint.path.mkdir(parents=True)
    written = NOW - 100 if written is None else written
    files = {}
    for name, size in (("mp_rank_00_model_states.pt", 30_000), ("zero_pp_rank_0_mp_rank_00_optim_states.pt", 70_000)):
        content = bytes([step % 256]) * size
        (checkpoint.path / name).write_bytes(content)
        files[name] = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    config = to_dict(PRESETS["debug"]())
    config["train"] |= {"steps": 400, "global_batch_size": 16}
    config["curriculum"] |= {"patience": 8}
    state = {"config": config, "precision": "fp32", "step": step, "curriculum": curriculum(step), **(state or {})}
    text = json.dumps({"format": 1, "step": step, "world_size": 2, "files": files, "written_unix_s": round(written),
                       "state": state, **manifest})
    (checkpoint.path / "manifest.json").write_text(text)
    return checkpoint


def begin(run: Path, number: int, began: float, seen: float, from_step: int, step: int, **facts: Any) -> None:
    run.mkdir(exist_ok=True)
    run_record.write(run, Start(number, began, 2, "cpu", from_step, step=step, **facts))
    path = run / f"starts/start_{number:05d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seen_unix_s": seen}))


def log(run: Path, *rows: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def row(step: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    index = curriculum(step)["pacing"]["index"]
    return {"step": step, "loss": loss, "images_per_s": 32.0, "curriculum/index": index, "curriculum/patience": step % 10, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 0 to 47, in three starts: killed after 30, stopped at 40, and going on."""
    run = tmp_path / "run"
    for step, reason in ((20, "schedule"), (30, "schedule"), (40, "stop")):
        save(run, step, NOW - 400 + step, reason=reason)
    begin(run, 1, NOW - 400, NOW - 300, 0, 35, job="7", seconds={"training": 70.0, "start-up": 30.0})
    begin(run, 2, NOW - 290, NOW - 190, 30, 40, job="7", restart=1, ended="stopped", seconds={"training": 90.0})
    begin(run, 3, NOW - 100, NOW - 5, 40, 47, seconds={"training": 95.0})
    log(run, *(row(step) for step in range(5, 50, 5) if step <= 47))
    return run


def inspected(run: Path, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    capsys.readouterr()
    code = status.main([str(run), *args])
    return code, capsys.readouterr().out


def section(text: str, title: str) -> list[list[str]]:
    """The rows of a table, in words; without its header."""
    block = next(block for block in text.split("\n\n") if block.startswith(title))
    return [line.split() for line in block.splitlines()[2:]]


def test_a_real_run(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 12, "--checkpoint.every", 4, "--telemetry.log-every", 1, "--curriculum.patience", 1,
                   "--telemetry.reference-every", 5).run
    code, text = inspected(run, capsys)
    assert code == 0 and "DiT, 2 blocks of width 32, 2 heads, patches of 4, on (1, 16, 16)" in text
    state = checkpoints(run)[0].manifest()["state"]
    index = state["curriculum"]["pacing"]["index"]
    last = text.splitlines()[-1]
    assert last.startswith(f"{run}: step 12 of 12 (100.0 %), curriculum index {index}, ")
    assert "3 checkpoints (all valid; newest 12)" in last
    f = status.facts(run)
    assert f["curriculum"]["transitions"] == state["curriculum"]["transitions"] != []
    assert f["curriculum"]["n_clusters"] == 5 and f["precision"] == "fp32" and f["damaged"] == []
    rows = [r for r in read_metrics(run) if "loss" in r]
    assert f["log"] == [rows[0], *rows[-5:]] and [step for step, _ in f["reference"]] == [5, 10]
    for c, checkpoint in zip(f["checkpoints"], checkpoints(run), strict=True):
        on_disk = sum(path.stat().st_size for path in checkpoint.path.iterdir() if path.name != "manifest.json")
        assert (c["step"], c["bytes"], c["usable"]) == (checkpoint.step, on_disk, True)


def test_everything_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = inspected(run, capsys)
    assert code == 0
    head = {line[:13].strip(): line[13:] for line in text.split("\n\n")[0].splitlines()}
    assert head["run"] == f"debug, in {run}: running" and head["training"] == "fp32, batch 16, on 2 x cpu"
    assert head["progress"] == "step 47 of 400 (11.8 %); 3 min to go at the speed of the last lines"  # 353 * 16 / 32 s
    assert head["last seen"].endswith(" s ago") and 4 < float(head["last seen"].split()[-3]) < 60
    assert head["curriculum"] == "index 1, stage 5 of 5, training on u in [-, 1), patience 5 of 8, best loss -"
    assert head[""] == "transitions: 4 at 10, 3 at 20, 2 at 30, 1 at 40"
    assert section(text, "losses") == [
        [str(step), "32.0", str(5 - step // 10), "0.5000", "-", "-", "-"] for step in (5, 25, 30, 35, 40, 45)]
    assert "\n  step  images/s  index    loss  mse  vb  grad norm\n     5      32.0      5  0.5000    -   -  -\n" in text
    assert [[r[0], *r[4:]] for r in section(text, "checkpoints")] == [
        ["40", "KB", "2", "stop", "1", "valid"], ["30", "KB", "2", "schedule", "2", "valid"], ["20", "KB", "2", "schedule", "3", "valid"]]
    assert [[r[0], *r[3:]] for r in section(text, "starts")] == [
        ["1", "7/0", "2", "0", "35", "2", "min", "killed"], ["2", "7/1", "2", "30", "40", "2", "min", "stopped"],
        ["3", "-", "2", "40", "47", "2", "min", "running"]]
    # Of the first start's 35 steps the second took 5 again; 395 s in all.
    account = {r[-1]: r[:-1] for r in section(text, "goodput")}
    assert account["training"] == ["62.0%", "4", "min"] and account["replayed"] == ["2.5%", "10.0", "s"]
    assert account["idle"] == ["25.3%", "2", "min"] and account["start-up"] == ["7.6%", "30.0", "s"]
    assert len(account) == 9 and f"\n\n{run_record.account(run_record.read_starts(run))}\n" in text
    assert text.splitlines()[-1] == (
        f"{run}: step 47 of 400 (11.8 %), curriculum index 1, 3 starts, 3 checkpoints (all valid; newest 40), goodput 62%")
    assert "events" not in text and "left out" not in text and "trouble" not in text


def test_damaged_content(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = CheckpointDir.at(run, 40).path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    code, text = inspected(run, capsys)
    assert code == 1 and text.splitlines()[-1].split(", ")[-2] == "3 checkpoints (damaged: 40; newest 30)"
    assert f"DAMAGED: step_00000040/{path.name} does not have the content that was written\n" in text
    code, text = inspected(run, capsys, "--no-verify")
    assert code == 0 and "3 checkpoints (sizes right, hashes not checked; newest 40)" in text and "valid" not in text


@pytest.mark.parametrize("damage, says", [
    (lambda path: path.unlink(), "is missing"), (lambda path: path.write_bytes(b"short"), "has 5 bytes, not 30000"),
])
def test_damaged_files(run: Path, capsys: pytest.CaptureFixture[str], damage: Any, says: str) -> None:
    damage(CheckpointDir.at(run, 30).path / "mp_rank_00_model_states.pt")
    for option in ("--verify", "--no-verify"):
        code, text = inspected(run, capsys, option)
        assert code == 1 and says in text and "damaged: 30; newest 40" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"format": 1}', '{"format": 9}', '{"format": 1, "files": {"a": 3}}'])
def test_damaged_manifest(run: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (CheckpointDir.at(run, 40).path / "manifest.json").write_text(content)
    code, text = inspected(run, capsys)
    assert code == 1 and "step 47 of 400" in text and "transitions: 4 at 10, 3 at 20, 2 at 30\n" in text
    f = status.facts(run)
    assert f["damaged"] == [40] and f["checkpoints"][0]["problem"] and f["curriculum"]["index"] == 1  # the log's
    for step in (20, 30):
        (CheckpointDir.at(run, step).path / "mp_rank_00_model_states.pt").unlink()
    code, text = inspected(run, capsys)
    assert code == 1 and "(damaged: 40, 30, 20; none can be used)" in text and "of 400" in text  # a manifest that can be read


def test_a_checkpoint_that_is_not_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (CheckpointDir.at(run, 40).path / "manifest.json").unlink()
    (run / "checkpoints/step_00000060").mkdir()
    code, text = inspected(run, capsys)
    assert code == 0 and text.count("not finished") == 2 and "2 checkpoints (all valid; newest 30)" in text


def test_a_checkpoint_that_the_run_removes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = CheckpointDir.check

    def removing(self: CheckpointDir, part: slice) -> Any:
        if self.step == 20:
            shutil.rmtree(self.path, ignore_errors=True)
        return check(self, part)

    monkeypatch.setattr(CheckpointDir, "check", removing)
    f = status.facts(run)
    assert [c["step"] for c in f["checkpoints"]] == [40, 30] and f["damaged"] == []


def test_a_checkpoint_that_was_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last start found the checkpoint of step 40 damaged; without a look at the hashes that shows in nothing else.
    begin(run, 3, NOW - 100, NOW - 5, 30, 33)
    (run / "metrics.jsonl").unlink()
    log(run, row(30), row(33))
    code, text = inspected(run, capsys, "--no-verify")
    assert code == 0 and "sizes right, hashes not checked, but start 3 skipped it" in text
    assert "step 33 of 400" in text and "newest 30" in text and "index 2, stage 4 of 5" in text and "1 at 40" not in text
    save(run, 38, NOW - 50)
    assert status.facts(run)["step"] == 38


@pytest.mark.parametrize("ended, silence_s, expected", [
    ("stopped by a signal", 5, "stopped by a signal"), ("failed:\n  a", 9e5, "failed: a"), (None, 5, "running"), (None, 800, "running"),
    (None, 3601, "killed, or it hangs: no sign of life for 1 h 0 min"),
])
def test_whether_it_runs(run: Path, ended: str | None, silence_s: float, expected: str) -> None:
    begin(run, 3, NOW - 1e6, time.time() - silence_s, 40, 47, ended=ended)
    assert status.facts(run)["standing"] == expected


def test_how_long_silence_may_last_is_the_runs_own_setting(run: Path) -> None:
    path = CheckpointDir.at(run, 40).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["config"]["train"]["timeout_s"] = 4000.0
    path.write_text(json.dumps(manifest))
    begin(run, 3, NOW - 1e6, time.time() - 3601, 40, 47)
    assert status.facts(run)["standing"] == "running"


def test_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run, 400)
    begin(run, 3, NOW - 1e6, NOW - 1e5, 40, 398)
    _, text = inspected(run, capsys)
    assert ": finished\n" in text and "step 400 of 400 (100.0 %)\n" in text
    assert "curriculum   index 0, complete: all noise levels\n" in text


def test_a_last_step_that_is_not_saved_is_not_finished(run: Path) -> None:
    """It waits for room on the disk."""
    begin(run, 3, NOW - 100, NOW - 5, 40, 400)
    found = status.facts(run)
    assert (found["step"], found["standing"]) == (400, "running")


def test_a_run_of_an_older_version(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "starts")
    then = time.time() - 7200
    os.utime(run / "metrics.jsonl", (then, then))
    code, text = inspected(run, capsys)
    assert code == 0 and "running or not, its starts left no record" in text and ", 2 h 0 min ago\n" in text
    assert text.splitlines()[-1] == (
        f"{run}: step 45 of 400 (11.2 %), curriculum index 1, starts not recorded, 3 checkpoints (all valid; newest 40)")
    (run / "metrics.jsonl").unlink()
    code, text = inspected(run, capsys)
    assert code == 0 and "step 40 of 400 (10.0 %)\n" in text and "losses" not in text
    assert "index 1, stage 5 of 5, training on u in [0, 1), patience 0 of 8, best loss -\n" in text


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, 1, time.time() - 3, time.time(), 0, 0)
    code, text = inspected(tmp_path, capsys)
    assert code == 0 and "of unknown settings" in text and "nothing is known yet" in text
    assert text.splitlines()[-1] == f"{tmp_path}: step 0, 1 start, no checkpoint yet, goodput 0%"
    (tmp_path / "metrics.jsonl").touch()
    shutil.rmtree(tmp_path / "starts")
    assert inspected(tmp_path, capsys)[0] == 0
    log(tmp_path, {"step": 5, "loss": 0.5})  # and nothing else
    assert "step 5" in inspected(tmp_path, capsys)[1]


def test_transitions_after_the_last_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, {"step": 40, "event": "transition", "text": "t", "index": 1, "lowest": 0.0})  # the checkpoint knows it
    log(run, {"step": 46, "event": "transition", "text": "t", "index": 0, "lowest": 0.125})
    f = status.facts(run)
    assert f["curriculum"]["transitions"] == [[10, 4], [20, 3], [30, 2], [40, 1], [46, 0]] and f["events"] == []
    assert (f["curriculum"]["index"], f["curriculum"]["lowest"], f["curriculum"]["patience"]) == (0, 0.125, 0)
    log(run, {**row(47), "curriculum/index": 3, "curriculum/lowest": 0.5, "curriculum/best_loss": 0.1})
    assert "index 3, stage 3 of 5, training on u in [0.5, 1), patience 7 of 8, best loss 0.1000" in inspected(run, capsys)[1]


def test_twenty_transitions_fit_on_the_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [[100_000 * i, 20 - i] for i in range(1, 21)]
    save(run, 48, state={"curriculum": {**curriculum(48), "transitions": many}})
    _, text = inspected(run, capsys)
    lines = [line for line in text.splitlines() if " at " in line and line.startswith(" " * 13)]
    assert 1 < len(lines) < 5 and max(map(len, lines)) < 120
    assert " ".join(line.strip() for line in lines) == "transitions: " + ", ".join(f"{i} at {step:,}" for step, i in many)


def test_what_was_left_out_and_what_happened(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run, 48, state={"skips": [{"at": 1040, "count": 7, "why": "the loss was not finite"}]})
    log(run, *({"step": step, "event": "checkpoint failed", "text": f"no\nspace {step}"} for step in range(30, 47)))
    _, text = inspected(run, capsys)
    assert section(text, "data that were left out") == [["1,040", "7", "steps", "the", "loss", "was", "not", "finite"]]
    assert text.count("no space") == 10 and section(text, "events") == [[str(step), "no", "space", str(step)] for step in range(37, 47)]


def test_the_last_twenty_starts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4, 26):
        begin(run, number, NOW - 90, NOW - 80, 40, 40)
    (run / "starts/start_00026.json").write_text("")
    _, text = inspected(run, capsys)
    assert [int(r[0]) for r in section(text, "starts")] == [*range(6, 26)] and " 25 starts," in text
    assert f"trouble      records in {run / 'starts'} that cannot be read, and are left out: 1\n" in text
    assert len(status.facts(run)["starts"]) == 25


def test_metrics_that_cannot_be_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe")
    code, text = inspected(run, capsys)
    assert code == 0 and "step 47 of 400" in text and "trouble" not in text  # as where a line is cut short
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    text = inspected(run, capsys)[1]
    assert f"trouble      lines of {run / 'metrics.jsonl'} that are no rows, and are left out: 1\n" in text
    (run / "metrics.jsonl").write_text('[]\n3\n{"loss": 1}\n{"step": 49, "loss": 1.0}\n{"step": 50, "lo')
    assert "step 49 of 400" in inspected(run, capsys)[1]


def test_a_log_that_is_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    code, text = inspected(run, capsys)
    assert code == 0 and f"trouble      {run / 'metrics.jsonl'} cannot be read: " in text and "step 47 of 400" in text


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    log(run, row(46, loss=0.1 + 0.2, **{"optimizer/grad_norm": math.inf, "optimizer/loss_scale": math.nan}))
    code, text = inspected(run, capsys, "--json")
    f = json.loads(text, parse_constant=refuse)
    assert code == 0 and f["log"][-1]["loss"] == 0.1 + 0.2 and f["log"][-1]["optimizer/grad_norm"] == "Infinity"
    assert [c["step"] for c in f["checkpoints"]] == [40, 30, 20] and f["account"]["goodput"] == pytest.approx(245 / 395)
    assert f["starts"][1]["ended"] == "stopped" and f["step"] == 47
    (CheckpointDir.at(run, 30).path / "mp_rank_00_model_states.pt").unlink()
    code, text = inspected(run, capsys, "--json")
    assert code == 1 and json.loads(text)["damaged"] == [30]


def test_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} does not exist; give the folder that training wrote to, its --output" in capsys.readouterr().err
    assert status.main([str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run; give the folder of one, such as {run}\n" in capsys.readouterr().err
    assert status.main([str(run / "metrics.jsonl")]) == 2
    assert f"{run / 'metrics.jsonl'} is a file; give the folder that training wrote to" in capsys.readouterr().err


def test_nothing_is_written(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status.facts(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_no_torch(run: Path) -> None:
    code = NO_TORCH + "from largescale import status; sys.exit(status.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "all valid" in done.stdout, done.stderr
    assert done.stderr == ""  # no progress bar in a log for what takes no time
