"""Checkpoints that are damaged, gone, of another version, or not to be read at present: the newest good one is found, none is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale import export, status
from largescale.checkpoint.files import CheckpointDir, checkpoints, seal
from largescale.config.schema import CheckpointConfig, Config
from largescale.config.serialise import to_dict
from largescale.host import signals
from largescale.host.files import sha256
from largescale.monitoring.run_record import read_starts
from largescale.monitoring.telemetry import read_metrics
from tests.conftest import RunHere, assert_refused, assert_same_run, contents, cut, rewrite


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
    from largescale.checkpoint import writer

    write = writer._write

    def full(state: Any, path: Path) -> Any:
        if "step_00000006" in str(path):
            signals._requested = True
            raise OSError(28, "No space left on device")
        return write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", full)
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


def test_a_write_that_did_not_finish_is_no_checkpoint(run_here: RunHere) -> None:
    run = run_here("--train.steps", 8, "--checkpoint.every", 4).run
    (checkpoints(run)[0].path / "manifest.json").unlink()
    assert "at step 4" in run_here("--train.steps", 8).err
