"""Run directories that do not fit: of other settings or data, of another program, of another process. Nothing in them is changed."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.checkpoint.files import checkpoints
from largescale.data.format import DatasetInfo, fingerprint
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.host.files import try_lock
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import RunHere, assert_refused, contents, final_state, make_blobs, rewrite

# ---- of other settings or data


@pytest.mark.parametrize(
    ("change", "named"),
    [(("--model.depth", 3), "model.depth: 2 -> 3"), (("--diffusion.schedule", "linear"), "diffusion.schedule: cosine -> linear"),
     (("--curriculum.n-clusters", 4), "curriculum.n_clusters: 5 -> 4"), (("--train.seed", 1), "train.seed: 0 -> 1"),
     (("--train.ds-config", "ds_configs/zero2_bf16.json"), "precision: fp32 -> bf16"),
     (("--train.global-batch-size", 32), "train.global_batch_size: 16 -> 32"),
     (("--curriculum.pacing", "none"), "curriculum.pacing: patience -> none"),
     (("--model.depth", 3, "--train.seed", 1), "model.depth: 2 -> 3\n  train.seed: 0 -> 1")],
)
def test_another_run(run_here: RunHere, change: tuple[Any, ...], named: str) -> None:
    run = run_here("--train.steps", 4).run
    before = read_metrics(run), final_state(run)
    outcome = run_here("--train.steps", 8, *change)
    assert_refused(outcome, "may not change", named, "--output DIR")
    assert read_metrics(run) == before[0] and checkpoints(run)[0].step == 4


def test_dry_run_looks_at_the_run_directory(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    def refusal(*args: Any, **where: Any) -> str:
        outcome = run_here(*args, **where)
        assert_refused(outcome, "may not change")
        return outcome.err[outcome.err.index("error: ") :].partition("--output DIR")[0]

    run = run_here("--train.steps", 4).run
    other = make_blobs(tmp_path / "other", seed=1)
    for change in (("--model.depth", 3), ("--train.ds-config", "ds_configs/zero2_bf16.json")):
        assert refusal(*change, "--dry-run") == refusal(*change)
    assert "dataset: " in refusal("--dry-run", data=other)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    resumed = run_here("--dry-run", "--optimizer.lr", 0.5)
    assert resumed.code == 0 and f"run directory: {run}, would be resumed at step 4" in resumed.err
    changes = [line for line in resumed.err.splitlines() if line.startswith("changed on resume")]
    assert [change.split(": ", 1)[1] for change in changes] == ["optimizer.lr: 0.001 -> 0.5", "train.steps: 4 -> 20"]
    absent = run_here("--dry-run", "--train.steps", 4, data=tmp_path / "nowhere")
    assert f"finished already: {run} is at step 4 of train.steps=4" in absent.err and absent.code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    shutil.rmtree(run / "checkpoints")
    assert_refused(run_here("--dry-run"), "has no checkpoint any more, but step 4 was saved")


def test_other_data(run_here: RunHere, tmp_path: Path) -> None:
    run_here("--train.steps", 4)
    with ShardWriter(tmp_path / "other", DatasetInfo("other", "pixels", (1, 16, 16), 10, 1.0, {})) as writer:
        for i in range(40):
            writer.write(id=str(i), latent=np.full((1, 16, 16), i, np.uint8), label=i % 10)
    assert_refused(run_here("--train.steps", 8, data=tmp_path / "other"), "dataset: ")


def test_data_that_are_packed_anew_are_the_same(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    """An older version made fingerprints from the set's name too: its runs go on with sets of this one."""
    data = shutil.copytree(blobs, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    old = fingerprint(ShardDataset(data).info, manifest["shards"], None, named=True)
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": old}))
    assert run_here("--train.steps", 4, data=data).code == 0
    outcome = run_here("--train.steps", 8)
    assert outcome.code == 0 and "resumed" in outcome.err and old != manifest["fingerprint"], outcome.err


def test_moved_data_is_the_same_data(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    run_here("--train.steps", 4)
    moved = shutil.copytree(blobs, tmp_path / "moved")
    assert run_here("--train.steps", 8, data=moved).code == 0


def test_changed_lr_and_steps_are_said_and_in_force(run_here: RunHere, tmp_path: Path) -> None:
    run_here("--train.steps", 4, "--optimizer.clip-grad-norm", 1)
    outcome = run_here("--train.steps", 8, "--optimizer.lr", 0.125, "--optimizer.ema-decay", 0, "--optimizer.betas", 0.5, 0.6)
    assert outcome.code == 0
    for change in ("optimizer.lr: 0.001 -> 0.125", "train.steps: 4 -> 8", "optimizer.clip_grad_norm: 1.0 -> 0.0"):
        assert f"changed on resume, in force from here on: {change}" in outcome.err
    rows = outcome.trace()
    assert [row["optimizer/lr"] for row in rows] == [0.001] * 4 + [0.125] * 4
    state = final_state(outcome.run)
    moved = [abs(state[n] - state[n.replace("master", "ema")]).max().item() for n in state if n.startswith("master.")]
    assert max(moved) == 0  # the new decay of 0
    unchanged = run_here("--train.steps", 8, output=tmp_path / "unchanged").trace()
    assert rows[3]["loss"] == unchanged[3]["loss"] and rows[7]["loss"] != unchanged[7]["loss"]


def test_what_changes_the_rounding_is_said(run_here: RunHere) -> None:
    """Micro batch, threads, torch, the CPU's instructions: the run goes on, and is not bitwise what it would have been."""
    run, said = run_here("--train.steps", 4).run, "changed on resume, so the same up to rounding, not bitwise: "
    assert said not in run_here("--train.steps", 6, "--train.micro-batch-size", 16).err
    assert f"{said}micro batch: 16 -> 4\n" in run_here("--train.steps", 8, "--train.micro-batch-size", 4).err
    assert said not in run_here("--train.steps", 10, "--train.micro-batch-size", 4).err
    manifest = checkpoints(run)[0].manifest()
    assert manifest["threads"] == 1
    rewrite(checkpoints(run)[0], cpu="another", threads=3, torch="1.0")
    text = run_here("--train.steps", 12, "--train.micro-batch-size", 4).err
    for change in (f"the CPU's instructions: another -> {manifest['cpu']}", "threads of a rank: 3 -> 1",
                   f"torch: 1.0 -> {torch.__version__}"):
        assert f"{said}{change}\n" in text


# ---- of another program


THEIRS = ("checkpoints/step_1000/model.pt", "checkpoints/step_5/model.pt", "checkpoints/step_00000003/model.pt", "metrics.jsonl",
          "samples/step_00000020.png", "starts/notes.txt", "export/config.json", "paper.tex")


@pytest.mark.parametrize("names", [(*THEIRS, "lock"), *((name,) for name in THEIRS)], ids=lambda names: names[0] if len(names) == 1 else "all")
def test_a_folder_of_another_program(names: tuple[str, ...], run_here: RunHere, tmp_path: Path) -> None:
    """Refused, by the dry run too, before anything is changed."""
    folder = tmp_path / "theirs"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"step": 5, "loss": 1.0}\n{"step": 3000, "loss": 0.5')
    before = contents(folder)
    for arguments in (("--train.steps", 4), ("--dry-run",)):
        assert_refused(run_here(*arguments, output=folder), f"{folder} holds {names[0].split('/')[0]}", "and no run", "choose a new or an empty folder with --output DIR")
    assert contents(folder) == before


def test_a_data_set_as_run_directory(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    assert_refused(run_here(output=data, data=data), f"{data} holds manifest.json, shard_", "and no run")
    assert contents(data) == contents(blobs)


def test_what_a_killed_start_leaves_is_no_obstacle(run_here: RunHere, tmp_path: Path) -> None:
    """Nor are hidden files, the log of a batch job, and a link to the folder."""
    run = tmp_path / "real"
    for name, text in {"lock": "7", ".nfs1": "", "job-7.log": "x", "slurm-7.out": "x", "metrics.jsonl": '{"step": 0, "event": "note", "text": ""}\n',
                       "tensorboard/events": "", "starts/start_00001.json.tmp": "{", "lost+found/x": "",
                       "checkpoints/step_00000000/mp_rank_00_model_states.pt": "half", "checkpoints/step_00000000/manifest.json.tmp": ""}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    (tmp_path / "run").symlink_to(run)
    outcome = run_here("--train.steps", 4)
    assert outcome.code == 0, outcome.err
    assert (run / "lock").read_text() == "7" and (run / "job-7.log").read_text() == "x"
    assert "at step 4" in run_here("--train.steps", 8).err


def test_retention_leaves_what_others_have_put_there(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4, "--checkpoint.every", 4).run
    theirs = [run / "checkpoints" / name for name in ("step_1/model.pt", "step_000000003/manifest.json", "step_00000003/model.pt", "step_00000004/notes.txt")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    outcome = run_here("--train.steps", 16, "--checkpoint.every", 4, "--checkpoint.keep-last", 1)
    assert outcome.code == 0, outcome.err
    assert [path.read_text() for path in theirs] == ["mine"] * 4
    assert [c.step for c in checkpoints(run)] == [16] and {path.name for path in theirs[3].parent.iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("inner", ["", "step_00000004", "step_00000004/inner", "mine"])
@pytest.mark.parametrize("by", ["run", "linked run", "linked checkpoints"])
def test_a_run_inside_the_checkpoints_of_another(by: str, inner: str, run_here: RunHere, tmp_path: Path) -> None:
    """The outer run would remove it with its old checkpoints."""
    run = run_here("--train.steps", 4).run
    outer = run
    if by == "linked run":
        outer = tmp_path / "link"
        outer.symlink_to(run)
    elif by == "linked checkpoints":
        (run / "checkpoints").rename(tmp_path / "elsewhere")
        (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = contents(run)
    folder = outer / "checkpoints" / inner
    for arguments in (("--train.steps", 4), ("--dry-run",)):
        assert_refused(run_here(*arguments, output=folder), f"{folder} lies in the checkpoints of the run {outer}", "with --output DIR")
    assert contents(run) == before and not (folder / "lock").exists()


def test_a_folder_named_checkpoints_that_may_not_be_listed(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all users' runs lie in one: no run, so a run may be trained inside."""
    real, shared = Path.iterdir, tmp_path / "checkpoints"

    def listed(self: Path) -> Any:
        if self == shared:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    shared.mkdir()
    monkeypatch.setattr(Path, "iterdir", listed)
    outcome = run_here("--train.steps", 2, output=shared / "mine")
    assert outcome.code == 0, outcome.err


# ---- of another process


def test_a_lock_that_is_none(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4).run
    (run / "lock").unlink()
    (run / "lock").mkdir()
    assert_refused(run_here("--train.steps", 8), f"cannot write to {run / 'lock'}: Is a directory")


def test_two_processes_do_not_train_one_run(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for the other one to end, as after a requeue; not for ever."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("largescale.training.run_directory.LOCK_WAIT_S", 2)
    other = try_lock(tmp_path / "run/lock")
    assert other
    outcome = run_here()
    assert outcome.code == 75 and "error: another process trains" in outcome.err and "--output DIR" in outcome.err
    assert not checkpoints(tmp_path / "run")
    timer = threading.Timer(1, other.close)
    timer.start()
    monkeypatch.setattr("largescale.training.run_directory.LOCK_WAIT_S", 30)
    assert run_here("--train.steps", 2).code == 0
