"""What leaves a run: the EMA, with its config, without DeepSpeed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eval import sample
from eval.curves.options import Curve
from eval.curves.scores import Curves
from largescale import convert, export
from largescale.checkpoint.files import checkpoints
from largescale.checkpoint.weights import load_trained, read_weights
from largescale.config.presets import emoji
from largescale.config.serialise import from_dict, to_dict
from largescale.errors import CheckpointError, NewerVersionError
from largescale.host.files import sole_writer
from tests.conftest import RunHere


def test_the_export_is_the_ema(run_here: RunHere) -> None:
    run = run_here("--train.steps", 6, "--curriculum.patience", 0).run
    assert export.main([str(run)]) == 0
    weights = load_file(run / "export/model.safetensors")
    # The optimizer's flat tensor, put together here without the code under test: DiT's order, and padding at the end.
    flat = checkpoints(run)[0].optimizer_state(0)["base_optimizer_state"]["state"][0]["ema"]
    trained = load_trained(run / "export")
    names = [name for name, p in trained.model.named_parameters() if p.requires_grad]
    joined = torch.cat([weights[name].flatten() for name in names])
    assert torch.equal(joined, flat[: len(joined)]) and len(flat) - len(joined) < 8
    assert weights.keys() == trained.model.state_dict().keys()
    description = json.loads((run / "export/config.json").read_text())
    assert description["step"] == 6 and description["config"]["model"]["depth"] == 2
    assert description["data_info"]["kind"] == "pixels" and description["curriculum"]["pacing"]["index"] < 5


def test_run_and_export_are_the_same_model(run_here: RunHere) -> None:
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    export.export(run, step=3, out=run / "three")
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([10, 500]), torch.tensor([3, 10])
    three, again, six = (load_trained(*where).model(x, t, y) for where in ((run / "three",), (run, 3), (run,)))
    assert torch.equal(three, again) and not torch.equal(three, six)


def test_at_step_0_the_ema_is_the_weights(run_here: RunHere) -> None:
    run = run_here("--train.steps", 1).run
    assert load_trained(run, 0).info["step"] == 0


def test_an_export_with_the_field_names_of_an_older_version(run_here: RunHere) -> None:
    run = run_here("--train.steps", 2).run
    export.export(run, step=None, out=run / "old")
    expected = load_trained(run / "old").config
    description = json.loads((run / "old/config.json").read_text())
    model = description["config"]["model"]
    model["caption_tokens"] = model.pop("max_caption_tokens")
    (run / "old/config.json").write_text(json.dumps(description))
    assert load_trained(run / "old").config == expected


def test_a_renamed_field_keeps_its_value() -> None:
    config = to_dict(emoji())
    config["model"]["caption_tokens"] = config["model"].pop("max_caption_tokens")
    assert from_dict(config).model.max_caption_tokens == 16
    config["model"]["caption_tokenz"] = 1
    with pytest.raises(NewerVersionError, match="has no field 'caption_tokenz'"):
        from_dict(config)


def test_no_deepspeed(run_here: RunHere) -> None:
    run = run_here("--train.steps", 2).run
    code = (f"import sys; from largescale import export; assert export.main([{str(run)!r}]) == 0\n"
            "import eval.sample; assert 'deepspeed' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_ema_that_holds_untrained_weights_is_said(run_here: RunHere, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At the start of training, at its end, and by what reads its weights."""
    note = "The EMA still holds 94% of the untrained weights at step 6"
    trained = run_here("--train.steps", 6)
    assert trained.err.count(note) == 2 and trained.err.rstrip().splitlines()[-1].startswith(f"note: {note}")
    assert export.main([str(trained.run)]) == 0 and note in capsys.readouterr().err
    assert sample.main([str(trained.run), "--out", str(tmp_path), "--num-samples", "1", "--steps", "2", "--device", "cpu"]) == 0
    assert f"note: {note}" in capsys.readouterr().err
    curves = Curves(Curve((trained.run,), tmp_path / "reference", num_samples=10, device="cpu"))
    (earliest,) = curves.notes()                        # which is checkpoint 5
    assert earliest.startswith(f"{trained.run}: The EMA still holds 95% of the untrained weights at step 5")
    quick = run_here("--train.steps", 6, "--optimizer.ema-decay", 0.4, output=tmp_path / "quick")
    assert "untrained weights" not in quick.err


def test_colleagues_can_read_it(run_here: RunHere) -> None:
    out = export.export(run_here("--train.steps", 2).run)
    (out / "as usual").write_text("")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_an_export_that_cannot_be_written(run_here: RunHere, tmp_path: Path, read_only: Any, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the checkpoint is read."""
    run = run_here("--train.steps", 2).run
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "read_weights", lambda *where: 1 / 0)
    read_only(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    for folder, what in (("file/export", "{} is a file"), ("theirs/export", "Permission denied; {} belongs to ")):
        capsys.readouterr()
        assert export.main([str(run), "--out", str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: cannot write to {tmp_path / folder}/model.safetensors: {what.format((tmp_path / folder).parent)}")
        assert said.endswith("; choose another --out\n") and len(said.splitlines()) == 1


@pytest.mark.parametrize("names", [("config.json", "model.safetensors"), ("config.json",), ("model.safetensors",), ("manifest.json",), ("notes.txt",)])
def test_another_librarys_folder_is_not_overwritten(names: tuple[str, ...], run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = run_here("--train.steps", 2).run, tmp_path / "theirs"
    folder.mkdir()
    for name in names:
        (folder / name).write_text('{"model_type": "bert"}')
    monkeypatch.chdir(folder)
    for out in (str(folder), ""):
        assert export.main([str(run), "--out", out]) == 2
        said = capsys.readouterr().err
        assert f"holds {', '.join(sorted(names))} and no export of largescale" in said and "choose a new or an empty folder with --out" in said
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, '{"model_type": "bert"}')


def test_a_run_or_its_checkpoints_are_no_folder_for_an_export(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    before = sorted(run.rglob("*"))
    for out, says in ((run, "and no export of largescale"), (run / "checkpoints/step_00000002", "lies in the checkpoints of the run"),
                      (run / "checkpoints/new", "lies in the checkpoints of the run")):
        assert export.main([str(run), "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("spoil", ["nothing", "killed before the config", "damaged config", "hidden files"])
def test_an_export_is_written_again(spoil: str, run_here: RunHere, tmp_path: Path) -> None:
    run, out = run_here("--train.steps", 2).run, tmp_path / "out"
    if spoil == "hidden files":
        out.mkdir()
        (out / ".gitattributes").write_text("")
    else:
        export.export(run, out)
    if spoil.startswith("killed"):
        (out / "config.json").unlink()
        (out / ".model.safetensors.tmp").write_bytes(b"half")
    elif spoil == "damaged config":
        (out / "config.json").write_text("{")
    assert export.main([str(run), "--out", str(out)]) == 0 and load_trained(out).info["step"] == 2
    assert {path.name for path in out.iterdir()} <= {"config.json", "model.safetensors", "README.md", ".gitattributes"}


def test_an_export_that_is_not_complete_is_called_that(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export.export(run_here("--train.steps", 2).run, tmp_path / "out")
    (out / "config.json").unlink()
    assert convert.main([str(out), "--out", str(tmp_path / "converted")]) == 2
    assert f"error: the export {out} is not complete: it has no config.json" in capsys.readouterr().err


def test_an_export_that_is_written_anew_while_it_is_read(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config may be that of the old weights."""
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    out = export.export(run, tmp_path / "out", 3)

    def load(path: Path) -> Any:
        export.export(run, out)
        return load_file(path)

    monkeypatch.setattr("safetensors.torch.load_file", load)
    with pytest.raises(CheckpointError, match="was written anew while it was read"):
        read_weights(out)
    monkeypatch.undo()
    assert read_weights(out)[0]["step"] == 6


def test_one_process_writes_an_export(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    out = export.export(run, tmp_path / "out")
    with sole_writer(out):
        for program in (export, convert):
            assert program.main([str(run), "--out", str(out)]) == 2
            assert f"error: another process is writing to {out}; wait" in capsys.readouterr().err
    assert export.main([str(run), "--out", str(out)]) == 0 and load_trained(out).info["step"] == 2


def test_a_file_is_no_run(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    log = run_here("--train.steps", 2).run / "metrics.jsonl"
    for program in (lambda: export.main([str(log)]), lambda: sample.main([str(log), "--out", str(log.parent / "samples"), "--device", "cpu"])):
        assert program() == 2
        assert f"error: {log} is a file; give the folder of a run, such as runs/digits\n" == capsys.readouterr().err


# What safetensors raises on a full disk.
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FULL])
def test_a_failed_export_leaves_nothing_half_written(error: Exception, run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """The one before stays, and no part of the new one takes space."""
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    out = export.export(run, step=3)

    def fail(weights: Any, path: Path, **more: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert export.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No space left" in said and "Traceback" not in said
    assert load_trained(out).info["step"] == 3 and {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_damage(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    export.export(run)
    (run / "export/model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read.*export the run again"):
        load_trained(run / "export")
    (checkpoints(run)[0].path / "mp_rank_00_model_states.pt").write_bytes(b"short")
    assert load_trained(run).info["step"] == 3
    assert "skipping a damaged checkpoint" in capsys.readouterr().err
    assert export.main([str(run), "--step", "6"]) == 2 and export.main([str(run / "nothing")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_events_and_measures_of_a_run(run_here: RunHere) -> None:
    """What metrics.jsonl holds besides the losses."""
    from largescale.monitoring.telemetry import read_metrics

    rows = read_metrics(run_here("--train.steps", 8, "--curriculum.patience", 0).run)
    events = [row for row in rows if row.get("event") == "transition"]
    assert events and [e["index"] for e in events] == list(range(4, 4 - len(events), -1))
    last = next(row for row in reversed(rows) if "loss" in row)
    assert {"images_per_s", "memory_gib", "time/data_wait_share", "time/overhead_share", "optimizer/grad_norm",
            "optimizer/loss_scale", "optimizer/skipped_steps", "curriculum/lowest", "cluster/C5"} <= last.keys()
    assert "mfu" not in last  # no peak is known of a CPU
    for event, row in ((e, r) for e in events for r in rows if r["step"] == e["step"] and "loss" in r):
        assert row["curriculum/index"] == event["index"]
