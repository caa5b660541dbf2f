"""What a user gets wrong: one line that says what to do, before any work, and nothing lost."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from largescale import train as train_program
from largescale.checkpoint.files import checkpoints
from largescale.config.derived import least_steps, make_curriculum
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.engine.optimizer import check_apex
from largescale.errors import ConfigError
from tests.conftest import CAPTIONED, RunHere, assert_refused


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


@pytest.mark.parametrize("setting", ["anomaly.spike-factor", "optimizer.clip-grad-norm", "optimizer.eps", "train.timeout-s"])
def test_settings_that_are_not_finite(setting: str, run_here: RunHere) -> None:
    assert_refused(run_here(f"--{setting}", "inf"), f"=inf must be finite; set --{setting}")


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
