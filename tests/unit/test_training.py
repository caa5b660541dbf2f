"""What training does with the parts: the noise it draws, the weights it starts from, the state it saves."""

from pathlib import Path

import pytest
import torch

from largescale.checkpoint.files import (
    CheckpointDir,
    checkpoints,
    client_state,
    load,
    named_weights,
)
from largescale.config.presets import debug
from largescale.models.build import build_model
from largescale.monitoring.telemetry import Telemetry
from largescale.training import startup
from tests.conftest import RunHere, assert_same_run, ds_json


def test_only_active_noise_levels_are_drawn(run_here: RunHere) -> None:
    """Each row's clusters are those of the stage that its step was drawn in: the one in force after the step before."""
    rows = run_here("--train.steps", 20, "--curriculum.patience", 0, "--train.global-batch-size", 64).trace()
    index = 5
    for row in rows:
        active = {f"cluster/C{i}" for i in range(max(index, 1), 6)}
        assert {key for key in row if key.startswith("cluster/")} == active, row["step"]
        index = row["curriculum/index"]
    assert index < 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_master_weights_start_unrounded(precision: str, run_here: RunHere, tmp_path: Path) -> None:
    """DeepSpeed casts the module before it copies; the position embedding stays fp32 too."""
    run = run_here("--train.steps", 1, "--train.ds-config", ds_json(precision, tmp_path)).run
    torch.manual_seed(0)
    initial = build_model(debug().model).state_dict()
    saved = named_weights(CheckpointDir.at(run, 0), "master")
    assert saved.keys() == initial.keys()
    assert [name for name in saved if not torch.equal(saved[name], initial[name])] == []
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    module = load(CheckpointDir.at(run, 0).path / "mp_rank_00_model_states.pt")["module"]
    assert module["blocks.0.attn.qkv.weight"].dtype == half and module["pos_embed"].dtype == torch.float32


def test_what_the_client_state_holds(run_here: RunHere) -> None:
    """Everything of ours under one key of DeepSpeed's file, and the manifest's copy of it for tools without torch."""
    run = run_here("--train.steps", 8, "--curriculum.patience", 1).run
    checkpoint = checkpoints(run)[0]
    state = client_state(checkpoint)
    assert (state["step"], state["samples_seen"], state["skipped_steps"]) == (8, 128, 0)
    last = run_here("--train.steps", 8, "--curriculum.patience", 1).trace()[-1]
    pacing = state["curriculum"]["pacing"]
    assert (pacing["index"], pacing["patience_count"]) == (last["curriculum/index"], last["curriculum/patience"])
    assert checkpoint.manifest()["state"] == state
    assert state["precision"] == "fp32" and state["config"]["model"]["depth"] == 2


def test_what_the_bar_shows(run_here: RunHere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parts of the loss by themselves: vb, where it is learnt, can be many times the mse."""
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(Telemetry, "progress", lambda self, step, **more: shown.append(more) if more else None)
    settings = ("--train.steps", 9, "--curriculum.pacing", "fixed", "--curriculum.interval", 1)
    run = run_here(*settings)
    assert [list(more) for more in shown] == [["loss", "mse", "vb", "index"]] * 9
    assert [[more[key] for key in ("loss", "mse", "vb")] for more in shown] == [
        [f"{row[key]:.4f}" for key in ("loss", "mse", "vb")] for row in run.trace()]
    assert [more["index"] for more in shown[:6]] == [
        "4 (stage 2 of 5)", "3 (stage 3 of 5)", "2 (stage 4 of 5)", "1 (stage 5 of 5)", "0 (complete)", "0 (complete)"]
    assert "curriculum index 5 -> 4, stage 2 of 5, training on u in [0.6, 1)" in run.err
    shown.clear()
    run_here(*settings, preset="debug_sit", output=tmp_path / "flow")
    assert list(shown[0]) == ["loss", "mse", "index"]


def test_files_load_without_unpickling(run_here: RunHere) -> None:
    for path in checkpoints(run_here("--train.steps", 2).run)[0].path.glob("*.pt"):
        torch.load(path, weights_only=True)


def test_a_finished_run_has_nothing_left_to_do(run_here: RunHere) -> None:
    first = run_here("--train.steps", 6)
    before = {p: p.stat().st_mtime_ns for p in first.run.rglob("*.pt")}
    again = run_here("--train.steps", 6)
    assert again.code == 0 and "finished already" in again.err and "--output DIR" in again.err
    fewer = run_here("--train.steps", 4)
    assert fewer.code == 0 and "is at step 6 of train.steps=4" in fewer.err
    assert {p: p.stat().st_mtime_ns for p in first.run.rglob("*.pt")} == before and again.trace() == first.trace()


def test_a_loss_scale_that_grows_does_not_halve_the_gradient(run_here: RunHere, tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 unscales after it has moved the scale on. The same run at a scale that grows, and at one that does
    not: powers of two, so equal to rounding in fp16."""
    grows, stays = (
        run_here("--train.steps", 12, "--train.ds-config",
                 ds_json("fp16", tmp_path, initial_scale_power=8, loss_scale_window=window), output=tmp_path / str(window)).trace()
        for window in (3, 1000)
    )
    assert grows[-1]["optimizer/loss_scale"] > stays[-1]["optimizer/loss_scale"] == 2**8
    for key in ("loss", "optimizer/grad_norm"):
        assert [row[key] for row in grows] == pytest.approx([row[key] for row in stays], rel=1e-3), key


def test_tf32_is_a_setting_of_gpus(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it changes nothing."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for wanted in (True, False):
        startup.use_tf32(wanted)
        assert torch.backends.cudnn.allow_tf32 == wanted
    assert asked == ["high", "highest"]
    runs = [run_here("--train.steps", 3, *more, output=tmp_path / str(len(more))) for more in ((), ("--train.no-tf32",))]
    assert [run.code for run in runs] == [0, 0] and len(asked) == 2
    assert_same_run(runs[0].run, runs[1].run)
