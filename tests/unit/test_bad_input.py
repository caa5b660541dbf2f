"""What a user gets wrong: one line that says what to do, before any work, and nothing lost."""

import errno
import importlib.metadata
import json
import os
import pwd
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from largescale import export, status
from largescale import train as train_program
from largescale.checkpoint.files import CheckpointDir, checkpoints, seal
from largescale.config.derived import least_steps, make_curriculum
from largescale.config.schema import CheckpointConfig, Config
from largescale.config.serialise import to_dict
from largescale.data.format import DatasetInfo, fingerprint
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.engine.optimizer import check_apex
from largescale.errors import ConfigError
from largescale.host import signals
from largescale.host.files import sha256, try_lock
from largescale.monitoring import telemetry
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from largescale.training.trainer import Trainer
from tests.conftest import (
    CAPTIONED,
    Outcome,
    RunHere,
    assert_same_run,
    cut,
    final_state,
    make_blobs,
)


def assert_refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def test_unknown_preset(run_here: RunHere) -> None:
    assert_refused(run_here(preset="digts"), "error: unknown preset 'digts'; did you mean 'digits'? python -m largescale.train --help lists them")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--train.stpes", 3), "--train.steps"), (("--train.steps", "many"), "invalid literal for int() with base 10: 'many'"),
     (("--curriculum.pacing", "sometimes"), "sometimes")],
)
def test_unknown_key_and_wrong_type(run_here: RunHere, arguments: tuple[Any, ...], message: str) -> None:
    outcome = run_here(*arguments)
    assert_refused(outcome, message)
    assert not outcome.run.exists()


def test_batch_that_does_not_divide(run_here: RunHere) -> None:
    assert_refused(run_here("--train.micro-batch-size", 5), "try --train.micro-batch-size 4")
    assert_refused(run_here("--train.micro-batch-size", 0), "train.micro_batch_size=0 must be at least 1; set --train.micro-batch-size")
    assert_refused(run_here("--train.micro-batch-size", "most"), "most")


def test_no_room_for_one_image(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largescale.planning.batch_size.available_bytes", lambda: 2**20)
    outcome = run_here("--train.micro-batch-size", "auto")
    assert_refused(outcome, "not even one image at a time fits on rank 0, which has 0.00 GiB of memory and needs about",
                   "master weights", "set --train.activation-checkpointing or start more ranks")
    assert not checkpoints(outcome.run)


def test_threads_that_make_no_sense(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largescale.training.startup.cores", lambda: 4)
    assert_refused(run_here("--train.threads", 9), "train.threads=9 is more than two threads a core", "try --train.threads 4")
    assert_refused(run_here("--train.threads", 0), "train.threads=0 must be at least 1; set --train.threads")


def test_missing_device_is_not_replaced(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(run_here("--train.device", "cuda"), "torch sees no CUDA device", "--train.device cpu")


def test_missing_data(run_here: RunHere, tmp_path: Path) -> None:
    outcome = run_here(data=tmp_path / "nowhere")
    assert_refused(outcome, f"{tmp_path}/nowhere does not exist", f"pack {tmp_path}/nowhere with a program of data_prep")
    assert not outcome.run.exists()


def test_empty_data(run_here: RunHere, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(run_here(data=tmp_path / "empty"), "manifest.json", "pack")


def test_truncated_shard(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    shard = data / "shard_00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(run_here(data=data), "shard_00001.arrow", "bytes")


def test_verify_finds_an_altered_shard(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    content = bytearray((data / "shard_00002.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (data / "shard_00002.arrow").write_bytes(content)
    assert run_here("--train.steps", 2, data=data, output=tmp_path / "unseen").code == 0
    assert_refused(run_here("--data.verify", data=data), "shard_00002.arrow")


def test_labels_outside_the_classes(run_here: RunHere) -> None:
    assert_refused(run_here("--model.num-classes", 9), "labels up to 9", "--model.num-classes 10")


def test_more_classes_than_the_data_have(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def draw(*_: Any, index: Any, condition: Any, shape: tuple[int, ...], **__: Any) -> torch.Tensor:
        told.extend(condition(list(index)).tolist())
        return torch.zeros(len(index), *shape)

    monkeypatch.setattr("largescale.training.preview.draw_samples", draw)
    note = "note: model.num_classes=1,000, and the data have 10: the others are never trained; to leave them out, --model.num-classes 10"
    wide = ("--model.num-classes", 1000, "--train.steps", 2)
    assert note in run_here(*wide, "--dry-run").err
    assert note in run_here(*wide, "--telemetry.preview-every", 2, "--telemetry.preview-images", 12).err
    assert told == [*range(10), 0, 1]
    assert "the others are never trained" not in run_here("--dry-run").err


def test_a_model_that_cannot_be_guided(run_here: RunHere, captioned: Path) -> None:
    note = "note: model.class_dropout_prob=0: samples of this model cannot be guided; if they are to be, --model.class-dropout-prob 0.1"
    off = ("--model.class-dropout-prob", 0, "--telemetry.preview-cfg-scale", 1, "--train.steps", 2)
    assert note in run_here(*off, "--dry-run").err and note in run_here(*off).err
    assert note in run_here(*off, *CAPTIONED, "--dry-run", data=captioned).err
    for guided in ((), (*off, "--model.num-classes", 0)):  # and where there is nothing to guide with
        assert "cannot be guided" not in run_here(*guided, "--dry-run").err


def test_shape_of_the_data(run_here: RunHere) -> None:
    for setting in (("--model.input-size", 32), ("--model.in-channels", 3)):
        assert_refused(run_here(*setting), "(1, 16, 16), the model takes", "--model.input-size")
        assert_refused(run_here(*setting, "--dry-run"), "(1, 16, 16), the model takes")


def test_latents_that_cannot_be_flipped(run_here: RunHere, tmp_path: Path) -> None:
    info = DatasetInfo("latents", "moments", (2, 16, 16), 10, 0.18, {})
    with ShardWriter(tmp_path / "latents", info) as writer:
        for i in range(40):
            writer.write(id=str(i), latent=np.full((2, 16, 16), i / 40, np.float16), label=i % 10)
    data = tmp_path / "latents"
    assert_refused(run_here("--data.horizontal-flip", data=data), "--data.no-horizontal-flip")
    assert run_here("--data.no-horizontal-flip", "--telemetry.reference-every", 10, data=data).code == 0


def test_dry_run_starts_nothing(run_here: RunHere, tmp_path: Path) -> None:
    outcome = run_here("--dry-run")
    assert outcome.code == 0 and not outcome.run.exists()
    for part in ("300 images of pixels (1, 16, 16), 10 classes", "parameters:", "GFLOP per image", "memory per rank", "steps per epoch: 18.8", "complete after 15 steps or more, of 20",
                 f"run directory: {outcome.run}, without a checkpoint"):
        assert part in outcome.err
    assert not {"config:", "deepspeed:"} & set(outcome.err.split())
    _, _, settings = run_here("--dry-run", "--verbose").err.partition("config: ")
    config, _, rest = settings.partition("deepspeed: ")
    ds, _ = json.JSONDecoder().raw_decode(rest)
    assert json.loads(config)["name"] == "debug" and ds["zero_optimization"]["stage"] == 2
    absent = run_here("--dry-run", data=tmp_path / "nowhere")
    assert absent.code == 0 and "nowhere does not exist" in absent.err


def test_dry_run_of_the_headline(run_here: RunHere) -> None:
    outcome = run_here("--dry-run", preset="dit_l2_imagenet256", data=None)
    assert "parameters: 457,840,672 trainable" in outcome.err and "484.2 GFLOP per image" in outcome.err


# ---- a run directory that does not fit


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


@pytest.mark.parametrize(("pacing", "least", "remedy"), [
    (("patience", "--curriculum.patience", 3), 25, "patience"), (("fixed", "--curriculum.interval", 6), 30, "interval"), (("none",), 0, "")])
def test_fewer_steps_than_the_curriculum_takes(run_here: RunHere, pacing: tuple[Any, ...], least: int, remedy: str) -> None:
    options = ("--curriculum.pacing", *pacing)
    config = train_program.parse(["debug", *map(str, options)])
    curriculum = make_curriculum(config)
    while curriculum.index:
        curriculum.observe(1.0)  # never better than the first
    assert least_steps(config) == least == curriculum.observations
    note = (f"note: train.steps={least - 1} end before the curriculum does, which takes at least {least} steps: some noise levels are "
            f"never trained; raise --train.steps, or lower --curriculum.{remedy}")
    for dry in (("--dry-run",), ()):
        assert not least or note in run_here(*options, "--train.steps", least - 1, *dry).err
        assert "end before the curriculum" not in run_here(*options, "--train.steps", least or 1, "--dry-run").err


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


# ---- damaged checkpoints


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": lambda c: flip_a_byte(next(c.path.glob("*optim_states.pt"))),
    "truncated": lambda c: (c.path / "mp_rank_00_model_states.pt").write_bytes(b"short"),
    "missing file": lambda c: (c.path / "mp_rank_00_model_states.pt").unlink(),
    "broken manifest": lambda c: (c.path / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_checkpoint(damage: str, run_here: RunHere, tmp_path: Path) -> None:
    """Falls back to the one before, says so, and the run becomes what it would have been."""
    settings = ("--train.steps", 12, "--checkpoint.every", 4)
    truth = run_here(*settings, output=tmp_path / "truth").run
    run = tmp_path / "run"
    shutil.copytree(truth, run)
    DAMAGE[damage](checkpoints(run)[0])
    outcome = run_here(*settings, output=run)
    assert outcome.code == 0
    assert "skipping a damaged checkpoint" in outcome.err and f"resumed {run} at step 8" in outcome.err
    assert_same_run(run, truth)


def test_all_checkpoints_damaged(run_here: RunHere) -> None:
    """Stops; never starts again at step 0, never removes what might still be repaired."""
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    for checkpoint in checkpoints(run):
        flip_a_byte(next(checkpoint.path.glob("*optim_states.pt")))
    metrics = read_metrics(run)
    outcome = run_here("--train.steps", 8)
    assert_refused(outcome, "none of the 3 checkpoints", "--output DIR")
    assert read_metrics(run) == metrics and len(checkpoints(run)) == 3


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(run_here: RunHere) -> None:
    """Retention of the last 1, with a damaged newer one about: the good ones stay, the damaged one is left for repair."""
    run = run_here("--train.steps", 12, "--checkpoint.every", 4).run
    flip_a_byte(next(checkpoints(run)[0].path.glob("*optim_states.pt")))
    outcome = run_here("--train.steps", 10, "--checkpoint.keep-last", 1)
    assert outcome.code == 0 and "at step 8" in outcome.err
    assert [c.step for c in checkpoints(run)] == [12, 10]
    assert "at step 10" in run_here("--train.steps", 12, "--checkpoint.keep-last", 1).err
    assert [c.step for c in checkpoints(run)] == [12] and checkpoints(run)[0].problem() is None


def test_a_manifest_edited_by_hand_is_not_believed(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4).run
    manifest = checkpoints(run)[0].path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"index": 5', '"index": 4'))
    outcome = run_here("--train.steps", 8)
    assert outcome.code == 0 and f"skipping a damaged checkpoint: {manifest} does not have" in outcome.err


def test_a_manifest_that_is_not_the_checkpoints(run_here: RunHere) -> None:
    """Whole in itself, and at odds with the state in DeepSpeed's file."""
    run = run_here("--train.steps", 4).run
    path = checkpoints(run)[0].path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["state"]["curriculum"]["pacing"]["index"] = 4
    path.write_text(seal(manifest))
    assert_refused(run_here("--train.steps", 8), "the manifest's copy of the state is not the checkpoint's")


def test_a_checkpoint_of_the_version_before(run_here: RunHere, tmp_path: Path) -> None:
    """Format 1: a manifest without a hash of itself, a state that knows neither skips nor spikes."""
    settings = ("--train.steps", 8, "--checkpoint.every", 4)
    truth = run_here(*settings, output=tmp_path / "truth").run
    cut(truth, tmp_path / "run", 4)
    checkpoint = checkpoints(tmp_path / "run")[0]
    manifest, model = json.loads((checkpoint.path / "manifest.json").read_text()), checkpoint.path / "mp_rank_00_model_states.pt"
    content = torch.load(model, weights_only=True)
    for state in (content["largescale"], manifest["state"]):
        del state["skips"], state["spikes"]
    torch.save(content, model)
    del manifest["sha256"]
    manifest |= {"format": 1, "files": manifest["files"] | {model.name: {"bytes": model.stat().st_size, "sha256": sha256(model)}}}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    assert "at step 4" in run_here(*settings).err
    assert_same_run(tmp_path / "run", truth)


def test_checkpoints_that_are_gone(run_here: RunHere, tmp_path: Path) -> None:
    """Purged, or on a file system that is not mounted: never a silent restart at step 0, and the log stays."""
    run = run_here("--train.steps", 4).run
    metrics = read_metrics(run)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert_refused(run_here("--train.steps", 8), "has no checkpoint any more, but step 4 was saved", f"delete {run}")
    assert read_metrics(run) == metrics
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert "at step 4" in run_here("--train.steps", 8).err


def test_a_finished_run_that_could_not_be_saved_is_not_finished(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries again until it is asked to stop, and then comes back."""
    from largescale.checkpoint import checkpointer as checkpoint

    write = checkpoint._write

    def full(state: Any, path: Path) -> Any:
        if "step_00000006" in str(path):
            signals._requested = True
            raise OSError(28, "No space left on device")
        return write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        outcome = run_here("--train.steps", 6, "--checkpoint.every", 4)
    assert outcome.code == 75 and "all after step 4 will be trained again" in outcome.err
    assert read_starts(outcome.run)[-1].ended == "stopped"
    signals._requested = False
    again = run_here("--train.steps", 6, "--checkpoint.every", 4)
    assert again.code == 0 and "at step 4" in again.err and checkpoints(again.run)[0].step == 6


def test_files_that_cannot_be_read_at_present_are_not_damaged(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here("--train.steps", 8, "--checkpoint.every", 4)
    monkeypatch.setattr("largescale.checkpoint.files.READ_AGAIN_S", (0.0,))

    def ill(path: Path) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("largescale.checkpoint.files.sha256", ill)
        outcome = run_here("--train.steps", 12)
    assert outcome.code == 75 and "cannot be read at present" in outcome.err and "damaged" not in outcome.err
    assert "none of the 3 checkpoints" in outcome.err and "try again later" in outcome.err
    assert "at step 8" in run_here("--train.steps", 12).err


def bad_sector(checkpoint: CheckpointDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        if path.parent == checkpoint.path:
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr("largescale.checkpoint.files.sha256", read)


def folder_as_manifest(checkpoint: CheckpointDir, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint.path / "manifest.json").unlink()
    (checkpoint.path / "manifest.json").mkdir()


@pytest.mark.parametrize("spoil", [bad_sector, folder_as_manifest])
def test_a_newest_checkpoint_that_can_never_be_read(spoil: Any, run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path) -> None:
    """It is passed over, once it was tried again, and the run becomes what it would have been."""
    settings = ("--train.steps", 12, "--checkpoint.every", 4)
    truth = run_here(*settings, output=tmp_path / "truth").run
    shutil.copytree(truth, tmp_path / "run")
    monkeypatch.setattr("largescale.checkpoint.files.READ_AGAIN_S", (0.0,))
    newest = checkpoints(tmp_path / "run")[0]
    with monkeypatch.context() as patch:
        spoil(newest, patch)
        outcome = run_here(*settings)
    assert outcome.code == 0 and "at step 8" in outcome.err and "skipping a damaged" not in outcome.err
    assert f"skipping a checkpoint: {newest.path}" in outcome.err and "cannot be read at present" in outcome.err
    assert_same_run(tmp_path / "run", truth)


def test_retention_with_an_old_manifest_that_cannot_be_read(run_here: RunHere) -> None:
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    folder_as_manifest(CheckpointDir.at(run, 4), pytest.MonkeyPatch())
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 4, "--checkpoint.keep-last", 1)
    assert outcome.code == 0 and "cannot be removed" not in outcome.err and "Traceback" not in outcome.err
    assert [c.step for c in checkpoints(run)] == [12, 4]


def rewrite(checkpoint: CheckpointDir, **changes: Any) -> None:
    """A manifest that says something else, whole in itself."""
    path = checkpoint.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["sha256"]
    path.write_text(seal(manifest))


def test_a_checkpoint_of_a_newer_version(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    """No damage: an older one does not make up for it, and nothing is overwritten or cut."""
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    rewrite(checkpoints(run)[0], format=3)
    (run / "lease").unlink()
    before = contents(run)
    expected = ("step_00000008/manifest.json has format 3", "made by a newer version; update largescale", "--output DIR")
    outcome = run_here("--train.steps", 12)
    assert_refused(outcome, *expected)
    assert "skipping" not in outcome.err
    for program in (export.main, status.main):
        assert program([str(run)]) == 2
        assert expected[0] in capsys.readouterr().err
    (run / "lease").unlink()
    assert contents(run) == before


def test_a_setting_of_a_newer_version(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4).run
    state = checkpoints(run)[0].manifest()["state"]
    rewrite(checkpoints(run)[0], state={**state, "config": {**state["config"], "rope": True}})
    assert_refused(run_here("--train.steps", 8), "Config has no field 'rope'", "made by a newer version; update", "--output DIR")


def test_a_run_with_the_field_names_of_an_older_version(run_here: RunHere) -> None:
    """It is resumed, and reports no change of that setting."""

    def with_old_names(config: Config) -> dict[str, Any]:
        tree = to_dict(config)
        tree["model"]["caption_tokens"] = tree["model"].pop("max_caption_tokens")
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("largescale.training.run.to_dict", with_old_names)
        run = run_here("--train.steps", 4).run
    assert "caption_tokens" in checkpoints(run)[0].manifest()["state"]["config"]["model"]
    outcome = run_here("--train.steps", 8)
    assert outcome.code == 0 and checkpoints(run)[0].step == 8 and "caption_tokens" not in outcome.err


def test_data_of_a_newer_version(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "format": manifest["format"] + 1}))
    for arguments in ((), ("--dry-run",)):
        outcome = run_here(*arguments, data=data)
        assert_refused(outcome, "was made by a newer version; update largescale, or choose other data")
        assert "pack" not in outcome.err


def test_a_checkpoint_under_another_name(run_here: RunHere, tmp_path: Path) -> None:
    """A folder whose name says another step than its manifest is not that step's checkpoint."""
    settings = ("--train.steps", 12, "--checkpoint.every", 4)
    truth = run_here(*settings, output=tmp_path / "truth").run
    cut(truth, tmp_path / "run", 8)
    CheckpointDir.at(tmp_path / "run", 8).path.rename(tmp_path / "run/checkpoints/step_99999999")
    outcome = run_here(*settings)
    assert outcome.code == 0 and f"resumed {tmp_path}/run at step 4" in outcome.err
    assert "step_99999999/manifest.json is that of step 8" in outcome.err
    assert [c.step for c in checkpoints(tmp_path / "run")][:2] == [99999999, 12]
    CheckpointDir.at(tmp_path / "run", 99999999).path.rename(tmp_path / "aside")
    assert_same_run(tmp_path / "run", truth)


def test_a_file_in_the_place_of_a_checkpoint(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4).run
    (run / "checkpoints/step_00000002").write_text("mine")
    outcome = run_here("--train.steps", 8, "--checkpoint.every", 4)
    assert outcome.code == 0 and "cannot be removed" not in outcome.err
    assert (run / "checkpoints/step_00000002").read_text() == "mine"


def test_an_archived_checkpoint_is_left_alone(run_here: RunHere, tmp_path: Path) -> None:
    """Moved away, with a link in its place: retention, and a save of the same step, remove the link only."""
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    for step in (4, 8):
        CheckpointDir.at(run, step).path.rename(tmp_path / f"archived{step}")
        CheckpointDir.at(run, step).path.symlink_to(tmp_path / f"archived{step}")
    (tmp_path / "archived8/mp_rank_00_model_states.pt").unlink()  # damaged, so that the step is taken and saved again
    kept = [sorted(path.name for path in (tmp_path / f"archived{step}").iterdir()) for step in (4, 8)]
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 4, "--checkpoint.keep-last", 2)
    assert outcome.code == 0, outcome.err
    assert [c.step for c in checkpoints(run)] == [12, 8] and not CheckpointDir.at(run, 8).path.is_symlink()
    assert kept == [sorted(path.name for path in (tmp_path / f"archived{step}").iterdir()) for step in (4, 8)]


class OneOfTwo:
    """Rank 1, beside a rank 0 that sees everything."""

    rank, world_size = 1, 2

    def __init__(self, seen: list[int]):
        self.seen = seen

    def all_gather_json(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [self.seen, value]
        where_the_run_is = isinstance(value, tuple) and isinstance(value[0], str)
        return [value if where_the_run_is else None, value]

    def raise_on_all_ranks(self, action: Any) -> Any:
        return action()


def test_a_manifest_that_one_rank_does_not_see_yet(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a network file system shows a new file late: waited for, not called damage. One that all miss is not."""
    from largescale.checkpoint import checkpointer as checkpoint
    from largescale.checkpoint.checkpointer import Checkpointer

    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    manifest, said, pauses = checkpoints(run)[0].path / "manifest.json", list[str](), list[float]()
    ranks: Any = OneOfTwo([c.step for c in checkpoints(run)])
    manifest.rename(manifest.with_suffix(".late"))

    def show(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2 and manifest.with_suffix(".late").exists():
            manifest.with_suffix(".late").rename(manifest)

    monkeypatch.setattr(checkpoint.time, "sleep", show)
    found = Checkpointer(run, CheckpointConfig(), ranks, patience_s=60).newest(said.append)
    assert found is not None and found.step == 8 and said == [] and pauses == [1.0, 5.0]
    manifest.unlink()
    pauses.clear()
    found = Checkpointer(run, CheckpointConfig(), ranks, patience_s=60).newest(said.append)
    assert found is not None and found.step == 4 and len(said) == 1 and len(pauses) == 4


@pytest.mark.parametrize("setting", ["anomaly.spike-factor", "optimizer.clip-grad-norm", "optimizer.eps", "train.timeout-s"])
def test_settings_that_are_not_finite(setting: str, run_here: RunHere) -> None:
    assert_refused(run_here(f"--{setting}", "inf"), f"=inf must be finite; set --{setting}")


def test_a_log_that_cannot_be_written_does_not_end_the_run(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("largescale.monitoring.telemetry.tqdm.write", full)
    monkeypatch.setattr("largescale.monitoring.telemetry.tqdm.update", full)
    assert run_here("--train.steps", 8, "--curriculum.patience", 0).code == 0


def test_a_full_disk_delays_the_log_and_not_the_run(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is kept, to the half line, until it can."""
    write = telemetry.Telemetry._write

    def full(self: telemetry.Telemetry, row: Any) -> None:
        file = self._file

        class Disk:
            def write(self, data: bytes) -> int:
                if row["step"] == 4:
                    raise OSError(28, "No space left on device")
                if row["step"] == 3 and len(data) < 20:
                    raise OSError(28, "No space left on device")
                return int(file.write(data[:-10] if row["step"] == 3 else data))

        self._file = Disk()  # type: ignore[assignment]
        write(self, row)
        self._file = file

    monkeypatch.setattr(telemetry.Telemetry, "_write", full)
    outcome = run_here("--train.steps", 6)
    assert outcome.code == 0 and outcome.err.count("telemetry cannot be written") == 1
    assert [row["step"] for row in outcome.trace()] == [1, 2, 3, 4, 5, 6]


def test_a_write_that_did_not_finish_is_no_checkpoint(run_here: RunHere) -> None:
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    (checkpoints(run)[0].path / "manifest.json").unlink()
    assert "at step 4" in run_here("--train.steps", 8).err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_unwritable_run_directory(run_here: RunHere, tmp_path: Path) -> None:
    """Found at the start, not at the first checkpoint hours later."""
    (tmp_path / "file").write_text("")
    assert_refused(run_here(output=tmp_path / "file" / "run"), f"cannot write to {tmp_path}/file/run", "--output")
    assert_refused(run_here("--dry-run", output=tmp_path / "file"), f"cannot read {tmp_path}/file: Not a directory; choose another --output DIR")


def test_a_folder_in_which_nothing_can_be_made(run_here: RunHere, tmp_path: Path) -> None:
    """Status 2, not 75: another try changes nothing. What may go away, such as a link to a disk that is not mounted, stays 75."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output, why in ((Path("/proc/largescale"), ""), (tmp_path / ("x" * 300), "File name too long"),
                        (tmp_path / "new" / ("x" * 300), "File name too long"), (tmp_path / "loop", "Too many levels of symbolic links")):
        assert_refused(run_here(output=output), f"error: cannot write to {output}/lock: {why}", "choose another --output")
        # It makes nothing, so it finds only what lies in a folder that is there.
        if why and output.parent == tmp_path:
            assert_refused(run_here("--dry-run", output=output), f"error: cannot read {output}: {why}; choose another --output DIR")
    (tmp_path / "not mounted").symlink_to(tmp_path / "nowhere")
    assert run_here(output=tmp_path / "not mounted").code == 75


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOENT, errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_which_errors_are_permanent(error: int, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**where: Any) -> Any:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("largescale.host.files.tempfile.TemporaryFile", fail)
    outcome = run_here()
    assert outcome.code == (2 if error in (errno.EINVAL, errno.ENOENT) else 75) and os.strerror(error) in outcome.err


@pytest.mark.parametrize("name", ["", "lock", "metrics.jsonl", "checkpoints", "starts"])
def test_a_run_directory_of_somebody_else(name: str, run_here: RunHere, read_only: Any) -> None:
    """The folder, or only what lies in it: one line that says what, and whose."""
    run = run_here("--train.steps", 4).run
    before = read_metrics(run)
    read_only(run / name)
    outcome = run_here("--train.steps", 8)
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert_refused(outcome, f"error: cannot write to {run / name}", f": Permission denied; {run / name}", f" belongs to {owner} (mode ")
    assert "; choose another --output" in outcome.err and len(outcome.err.splitlines()) == 1
    assert read_metrics(run) == before


def test_a_lock_that_is_none(run_here: RunHere) -> None:
    run = run_here("--train.steps", 4).run
    (run / "lock").unlink()
    (run / "lock").mkdir()
    assert_refused(run_here("--train.steps", 8), f"cannot write to {run / 'lock'}: Is a directory")


def test_a_run_directory_that_vanishes(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training goes on; what is saved after that is whole, and locked again. (Step 5 is tried again where it was still
    being written.)"""
    commit_step, locks = Trainer.commit_step, list[Any]()

    def vanish(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            shutil.rmtree(tmp_path / "run")
        if self.state.step == 11:
            locks.append(try_lock(tmp_path / "run/lock"))

    monkeypatch.setattr(Trainer, "commit_step", vanish)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 5)
    assert outcome.code == 0 and locks == [None], outcome.err
    found = {c.step: c.problem() for c in checkpoints(outcome.run)}
    assert found == dict.fromkeys(found) and {10, 12} <= found.keys() and min(found) > 7


def test_a_run_directory_that_vanishes_and_is_anothers(run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path) -> None:
    commit_step, locks = Trainer.commit_step, list[Any]()

    def replace(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").mkdir()
            locks.append(try_lock(tmp_path / "run/lock"))

    monkeypatch.setattr(Trainer, "commit_step", replace)
    outcome = run_here("--train.steps", 12, "--checkpoint.every", 10)
    assert_refused(outcome, f"{outcome.run} was deleted, and another process trains there now", "--output DIR")
    assert locks[0] and not checkpoints(outcome.run)


@pytest.mark.parametrize("old_name", ["free", "taken by another run"])
def test_a_run_directory_that_is_renamed(old_name: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                         tmp_path: Path) -> None:
    """The run goes on in it, and says so: nothing is lost, or lies at the old name, and nobody else gets it."""
    settings = ("--train.steps", 12, "--checkpoint.every", 5, "--telemetry.preview-every", 9, "--telemetry.preview-steps", 2)
    truth = run_here(*settings, output=tmp_path / "truth").run
    old, new, commit_step, locks = tmp_path / "run", tmp_path / "moved", Trainer.commit_step, list[Any]()

    def rename(self: Trainer, report: Any) -> None:
        commit_step(self, report)
        if self.state.step == 7:
            old.rename(new)
            if old_name != "free":
                (old / "starts").mkdir(parents=True)
        if self.state.step in (8, 11):
            locks.append(try_lock(new / "lock"))

    monkeypatch.setattr(Trainer, "commit_step", rename)
    outcome = run_here(*settings)
    assert outcome.code == 0 and locks == [None, None], outcome.err
    assert f"{old} was moved: continuing in {new}; a later start needs --output {new}" in outcome.err
    assert [*old.rglob("*")] == ([] if old_name == "free" else [old / "starts"]) and old.exists() == (old_name != "free")
    assert_same_run(new, truth)
    assert read_starts(new)[-1].ended == "finished" and (new / "samples/step_00000009.png").exists()


def test_the_old_name_does_not_come_back(tmp_path: Path) -> None:
    """Renamed between two calls of a save: that save fails, and is tried again where the run lies then."""
    from largescale.checkpoint.checkpointer import Writer

    writer = Writer()
    writer.makedirs(str(tmp_path / "run/checkpoints"), exist_ok=True)
    writer.makedirs(str(tmp_path / "run/checkpoints/step_00000004"))
    assert writer.failed and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    writer = Writer()
    writer.makedirs(str(tmp_path / "run/checkpoints/step_00000004"))
    assert not writer.failed and (tmp_path / "run/checkpoints/step_00000004").is_dir()


def test_data_that_can_be_read_at_the_third_try(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gather, failures = ShardDataset.gather, 2

    def flaky(self: ShardDataset, *args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures and kwargs.get("choice") is None and len(args) == 3 and args[0].tolist() == bad:
            failures -= 1
            raise OSError(5, "Input/output error")
        return gather(self, *args, **kwargs)

    settings = ("--train.steps", 6, "--optimizer.lr", 0.01)
    truth = run_here(*settings, output=tmp_path / "truth").run
    rows = np.arange(16) + 3 * 16
    bad = sample_indices(rows, 300, 0).tolist()
    monkeypatch.setattr(ShardDataset, "gather", flaky)
    monkeypatch.setattr("largescale.training.trainer.READ_RETRY_S", (0.0, 0.0))
    assert run_here(*settings).code == 0 and failures == 0
    assert_same_run(tmp_path / "run", truth)


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


def test_a_disk_that_is_full_at_the_start(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 0 proves that the run can be saved."""
    from largescale.checkpoint import checkpointer as checkpoint

    def full(state: Any, path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    outcome = run_here()
    assert_refused(outcome, "checkpoint of step 0 was not written", "No space left on device", "free space")
    assert read_metrics(outcome.run) == []


def test_a_limit_on_the_size_of_files(run_here: RunHere) -> None:
    """ulimit -f: what the system says, not what torch makes of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        outcome = run_here()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(outcome, "checkpoint of step 0 was not written: rank 0: OSError: [Errno 27] File too large; free space")


def test_a_failed_write_is_said_and_tried_again(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a while: training goes on, the last good checkpoint stays, the next one is written."""
    from largescale.checkpoint import checkpointer as checkpoint

    write = checkpoint._write

    def full(state: Any, path: Path) -> Any:
        if "step_00000004" in str(path):
            raise OSError(28, "No space left on device")
        return write(state, path)

    monkeypatch.setattr(checkpoint, "_write", full)
    outcome = run_here("--train.steps", 8, "--checkpoint.every", 2)
    assert outcome.code == 0
    assert "checkpoint of step 4 was not written: rank 0: OSError: [Errno 28] No space left on device" in outcome.err
    assert [c.step for c in checkpoints(outcome.run)] == [8, 6, 5]  # tried again at the next step


def test_ranks_that_disagree() -> None:
    from largescale.checkpoint.checkpointer import _require_equal
    from largescale.errors import CheckpointError

    states = [json.dumps({"step": 5, "curriculum": {"index": i}}) for i in (3, 3, 2)]
    _require_equal(states[:2])
    with pytest.raises(CheckpointError, match="rank 2 disagrees with rank 0 on curriculum"):
        _require_equal(states)


# ---- apex


@pytest.mark.parametrize("wanted", [True, False])
def test_pypis_apex_is_recognised(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    files = ["apex/__init__.py", "apex/interfaces.py", "apex/models.py", "apex/views.py"]  # as in apex 0.9.10.dev0
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version="0.9.10", files=files))
    with pytest.raises(ConfigError, match="is PyPI's, a web toolkit.*pip uninstall apex"):
        check_apex(wanted)


def test_nvidias_apex_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["apex/__init__.py", "apex/optimizers/fused_adam.py"]
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(version="0.1", files=files))
    check_apex(wanted=True)


def test_apex_is_not_installed(run_here: RunHere) -> None:
    assert_refused(run_here("--optimizer.kernel", "apex"), "apex is not installed", "--optimizer.kernel torch")



# ---- devices


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(1, 0, 0), (1, 5, 0), (8, 5, 5)])
def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int) -> None:
    from largescale.distributed.ranks import local_device

    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    current: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert local_device("cuda").index == index and current == [index]
    assert local_device("cpu").type == "cpu" and current == [index]


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from largescale.distributed.ranks import local_device
    from largescale.errors import DeviceError

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(DeviceError, match="local rank 3 has no GPU of its own, 2 are visible"):
        local_device("cuda")


def test_what_has_no_effect_is_said(run_here: RunHere) -> None:
    """Of what was set beside the preset; a preset's own settings serve several ways of training."""
    quiet = run_here("--dry-run", "--curriculum.pacing", "none")
    assert quiet.code == 0 and "no effect" not in quiet.err
    told = run_here("--dry-run", "--curriculum.pacing", "none", "--curriculum.patience", 7, "--model.caption-width", 5, "--anomaly.max-skips", 9,
                    "--telemetry.preview-every", 0, "--telemetry.preview-images", 3, "--checkpoint.every", 10, "--checkpoint.keep-every", 7)
    assert told.code == 0
    for text in ("--curriculum.patience has no effect with curriculum.pacing=none", "--model.caption-width has no effect without captions",
                 "--anomaly.max-skips has no effect unless one of the policies is skip",
                 "--telemetry.preview-images has no effect with telemetry.preview_every=0",
                 "checkpoint.keep_every=7 is not a multiple of checkpoint.every=10: only multiples of 70 are kept; try --checkpoint.keep-every 10"):
        assert text in told.err
    assert told.err.count("no effect") == 4
