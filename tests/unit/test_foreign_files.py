"""What lies in our files and no program of ours wrote: one line that names the file, no traceback, and nothing lost."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import sample, score
from eval.drawing import sample_set
from largescale import export, requeue, status
from largescale.checkpoint.files import CheckpointDir, checkpoints, seal
from largescale.host.files import sha256
from largescale.monitoring.telemetry import Telemetry, read_metrics
from tests.conftest import RunHere, assert_same_run

DEEP = "[" * 100_000 + "]" * 100_000
ROWS = ["{}", "null", "[1]", '"x"', "5", '{"step": "7"}', '{"step": null}', '{"step": 1e999}', f'{{"step": 7, "x": {DEEP}}}', "\udcff"]
SETTINGS: tuple[Any, ...] = ("--train.steps", 8, "--checkpoint.every", 4)


def test_rows_of_the_log_do_not_block_a_resume(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = run_here(*SETTINGS, output=tmp_path / "truth").run
    run = run_here("--train.steps", 4, "--checkpoint.every", 4).run
    whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for row in ROWS:
        whole.insert(2, row.encode(errors="surrogateescape") + b"\n")
    (run / "metrics.jsonl").write_bytes(b"".join(whole))
    assert status.main([str(run)]) == 0
    assert f"lines of {run / 'metrics.jsonl'} that are no rows, and are left out: {len(ROWS)}" in capsys.readouterr().out
    outcome = run_here(*SETTINGS)
    assert outcome.code == 0, outcome.err
    assert_same_run(run, truth)


def rewrite(checkpoint: CheckpointDir, change: Any) -> None:
    """The manifest, with a seal that fits."""
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (checkpoint.path / "manifest.json").write_text(seal(manifest))


def refused_by_all(run: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str], says: str) -> None:
    """Of what is at the newest step, and by its hashes whole: training, the export and sampling."""
    before = read_metrics(run)
    outcome = run_here("--train.steps", 12, output=run)
    assert outcome.code == 2 and says in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert read_metrics(run) == before
    for program in (lambda: export.main([str(run)]), lambda: sample.main([str(run), "--out", str(run / "samples"), "--device", "cpu"])):
        capsys.readouterr()
        assert program() == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("state", [5, None, [], {}, {"config": 5}, {"config": {"name": "x", "model": 5}}, {"config": {}}])
def test_a_state_that_is_none(state: Any, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 4).run
    rewrite(checkpoints(run)[0], lambda manifest: manifest.update(state=state))
    assert status.main([str(run)]) in (0, 2)
    refused_by_all(run, run_here, capsys, "error: ")


@pytest.mark.parametrize("content", [DEEP, '{"format": "2"}', '{"format": 1, "files": 5, "x": 1e999}', '{"format": -1}',
                                     f'{{"format": 1, "files": {{}}, "step": {10**400}}}'])
def test_a_manifest_that_is_none(content: str, run_here: RunHere) -> None:
    run = run_here(*SETTINGS).run
    (checkpoints(run)[0].path / "manifest.json").write_text(content)
    assert status.main([str(run)]) == 1
    outcome = run_here("--train.steps", 12)
    assert outcome.code == 0 and "at step 4" in outcome.err and "skipping a damaged checkpoint" in outcome.err


def saved(what: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


CONTENTS = {
    "empty": b"", "text": b"a text of some length", "a number": saved(5), "a list": saved([1]), "other keys": saved({"x": 1}),
    "a pickle": pickle.dumps({"largescale": {}}), "no dict below": saved({"largescale": 5, "param_shapes": 5, "optimizer_state_dict": 5}),
    "other states": saved({"largescale": {}, "param_shapes": [{"x": 5}], "optimizer_state_dict": {"base_optimizer_state": {}}}),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_file_of_torch_that_is_no_state(name: str, content: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 4).run
    path = checkpoints(run)[0].path / name
    path.write_bytes(CONTENTS[content])
    facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    rewrite(checkpoints(run)[0], lambda manifest: manifest["files"].update({name: facts}))
    assert checkpoints(run)[0].problem() is None
    refused_by_all(run, run_here, capsys, str(path.parent))


@pytest.mark.parametrize("content, says", [
    (DEEP, "cannot be read"), ("[]", "is no export, its config.json lacks config, step or data_info"), ("{", "cannot be read"),
    ('{"config": {"name": "x"}, "step": 1}', "is no export"), ('{"model_type": "bert"}', "is no export, its config.json is another library's, of bert"),
    ('{"_class_name": "DiTTransformer2DModel"}', "another library's, of DiTTransformer2DModel; give a run, or the folder that"),
    ('{"config": 5, "step": 4, "data_info": {}}', "not the config"),
    ('{"config": {"name": "x", "model": {"depth": "many"}}, "step": 4, "data_info": {}}', "cannot be used"),
])
def test_a_folder_that_is_no_export(content: str, says: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export.export(run_here("--train.steps", 4).run)
    (folder / "config.json").write_text(content)
    capsys.readouterr()
    assert sample.main([str(folder), "--out", str(folder / "samples"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("content", [DEEP, "[]", "5", "{}", '{"job": 5}', '{"done": true, "shards": 5}'])
@pytest.mark.parametrize("name", ["job.json", "packing/part_00000.json", "manifest.json", "provenance.json"])
def test_samples_that_are_none(name: str, content: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """Half drawn, and whole: drawn on or refused, by name."""
    run = run_here("--train.steps", 4).run
    program = [str(run), "--out", str(run / "samples"), "--device", "cpu", "--num-samples", "4", "--steps", "2", "--cfg-scale", "1"]
    if name in ("job.json", "packing/part_00000.json"):
        with monkeypatch.context() as patch:
            patch.setattr(sample_set.SampleSet, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sample.main(program)
        for failed in (run / "samples").rglob("failed_*"):
            failed.unlink()
    else:
        assert sample.main(program) == 0
    (file,) = (run / "samples").rglob(name)
    file.write_text(content)
    capsys.readouterr()
    status = sample.main(program)
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ") and "samples/cfg1.0" in line]
    assert (status, len(errors)) in ((0, 0), (2, 1)), said
    assert score.drawn(file.parent) is None or name != "provenance.json"


@pytest.mark.parametrize("change", [{"step": 10**400}, {"seen_unix_s": 1e300}, {"ended": 5}, {"job": 7}, {"host": []}, {"seconds": {"data": 10**400}}])
def test_a_record_of_a_start(change: dict[str, Any], run_here: RunHere, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 4).run
    path = run / "starts/start_00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert status.main([str(run)]) == 0
    assert f"records in {run / 'starts'} that cannot be read, and are left out: 1" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert requeue.main([str(run), "--status", "1"]) == 0
    assert run_here("--train.steps", 8).code == 0


def test_escapes_do_not_reach_the_terminal(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The title of the window, its content, the clipboard: names and texts are shown, not obeyed."""
    run, evil = run_here("--train.steps", 4).run, "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b2J"
    shutil.copy(run / "metrics.jsonl", tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "event": "spike", "text": f"a loss that leaps {evil}"}) + "\n")
    rewrite(checkpoints(run)[0], lambda manifest: manifest["state"]["config"].update(name=f"mine{evil}"))
    assert status.main([str(run)]) == 0
    with Telemetry(tmp_path, active=True, tensorboard=False, step=4, steps=8) as telemetry:
        telemetry.event(4, "spike", f"a loss that leaps {evil}")
    assert export.main([str(tmp_path / evil)]) == 2
    captured = capsys.readouterr()
    for said in (captured.out, captured.err):
        assert r"\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b2J" in said and not {"\x1b", "\x07", "\x9b"} & set(said)
    assert read_metrics(tmp_path)[-1]["text"].endswith(evil)
