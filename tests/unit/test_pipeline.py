"""largescale.load: images from Python, the same that eval.sample draws."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import largescale
from eval import sample
from largescale.checkpoint.weights import EXPORT_CONFIG, load_trained
from largescale.data.shards import ShardDataset
from largescale.encoders import text
from largescale.encoders.text import TextEncoder
from largescale.encoders.vae import load_vae
from largescale.errors import CheckpointError, ConfigError, DataError
from largescale.export import export
from largescale.pipeline import Pipeline
from tests.conftest import CAPTIONED, RunHere

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(run_here: RunHere) -> Path:
    outcome = run_here("--train.steps", 12, "--optimizer.lr", 0.02, "--optimizer.ema-decay", 0)
    assert outcome.code == 0, outcome.err
    return outcome.run


def drawn(source: Path, out: Path, *options: str) -> np.ndarray:
    """What eval.sample draws, (N, C, H, W)."""
    assert sample.main([str(source), "--out", str(out), "--steps", "4", "--cfg-scale", "2.0", "--device", "cpu", *options]) == 0
    data = ShardDataset(out / "cfg2.0")
    return data.gather(np.arange(len(data)))["latent"]


def test_the_samples_of_eval_sample(run: Path, tmp_path: Path) -> None:
    """Bitwise, of labels, of all classes in turn, of a run and of its export; grey images have three channels."""
    model = largescale.load(run)
    images = model.sample(labels=[3, 7], cfg_scale=2.0, steps=4, seed=5)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 0
    by_program = drawn(run, tmp_path / "a", "--num-samples", "2", "--classes", "3", "7", "--seed", "5")
    assert (images.transpose(0, 3, 1, 2) == by_program).all()

    in_turn = largescale.load(export(run, tmp_path / "export")).sample(n=12, cfg_scale=2.0, steps=4)
    assert (in_turn.transpose(0, 3, 1, 2) == drawn(run, tmp_path / "b", "--num-samples", "12")).all()
    assert (model.sample(labels=3, n=2, cfg_scale=2.0, steps=4, seed=5)[0] == images[0]).all()


def test_as_printed_in_the_docs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(import largescale\n.*?)```", (ROOT / "docs/evaluate.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["images"].shape == (2, 16, 16, 3) and names["images"].dtype == np.uint8


def test_what_convert_reads(run: Path, tmp_path: Path) -> None:
    """Loaded as it is: here a pipeline of diffusers."""
    pytest.importorskip("diffusers", reason="pip install -e '.[hub]' brings diffusers")
    folder = export(run, tmp_path / "pipeline", format="diffusers")
    images = largescale.load(folder).sample(labels=[3, 7], steps=4)
    assert (images == largescale.load(run).sample(labels=[3, 7], steps=4)).all()


def test_settings_change_the_samples(run: Path) -> None:
    model = largescale.load(str(run), device="cpu")
    usual = model.sample(labels=[3], steps=4)
    assert (usual == model.sample(labels=[3], steps=4, cfg_scale=1.5, sampler="ddpm", seed=0)).all()
    for change in ({"seed": 1}, {"steps": 5}, {"cfg_scale": 4.0}, {"sampler": "ddim"}, {"labels": [4]}, {"guidance_interval": (0.0, 0.2)},
                   {"sampler": "ddim", "eta": 1.0}):
        assert (model.sample(**{"labels": [3], "steps": 4, **change}) != usual).any(), change
    many = model.sample(labels=[3, 4, 5], steps=4, batch_size=2)
    assert np.abs(many[0].astype(int) - usual[0]).max() <= 1


class FakeEncoder:
    """Noise that follows from the text's length."""

    def __init__(self, max_tokens: int):
        self.encoder = TextEncoder("text:fake", max_tokens, 8, 6, self.encode, lambda texts, limit: [1] * len(texts))

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise = torch.stack([torch.randn(30, generator=torch.Generator().manual_seed(len(text))) for text in texts])
        return noise[:, :24].unflatten(1, (3, 8)), noise[:, 24:], torch.full((len(texts),), 3)


def test_prompts(captioned: Path, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_here("--train.steps", 12, "--optimizer.lr", 0.02, "--optimizer.ema-decay", 0, "--data.path", captioned, *CAPTIONED)
    assert outcome.code == 0, outcome.err
    folder = export(outcome.run, tmp_path / "export")
    description = json.loads((folder / EXPORT_CONFIG).read_text())
    description["data_info"]["encoders"] = {"text": "text:fake"}
    (folder / EXPORT_CONFIG).write_text(json.dumps(description))
    monkeypatch.setattr(text, "load_text_encoder", lambda spec, device, max_tokens: FakeEncoder(max_tokens).encoder)

    model = largescale.load(folder, text_encoder="fake:here")
    images = model.sample(prompts=["a", "something longer"], cfg_scale=2.0, steps=4)
    options = ("--num-samples", "2", "--prompts", "a", "something longer", "--text-encoder", "fake:here")
    assert (images.transpose(0, 3, 1, 2) == drawn(folder, tmp_path / "out", *options)).all()
    assert (model.sample(prompts="a", n=2, cfg_scale=2.0, steps=4)[1] != images[1]).any()
    for wrong, message in (({"labels": [1]}, "trained on captions; give prompts"), ({"prompts": [" "]}, "prompt 0 is empty"),
                           ({"prompts": ["a"], "labels": [1]}, "give prompts, and no labels")):
        with pytest.raises(ConfigError, match=message):
            model.sample(**wrong)
    with pytest.raises(ConfigError, match="prompts need the text encoder that the model was trained with, text:fake"):
        largescale.load(folder).sample(prompts=["a"])
    description["data_info"]["encoders"] = {"text": "text:other"}
    (folder / EXPORT_CONFIG).write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="fake:here is text:fake, the model was trained with text:other"):
        largescale.load(folder, text_encoder="fake:here").sample(prompts=["a"])


def test_latents_are_decoded(run: Path, tmp_path: Path) -> None:
    """By the VAE that the training data were packed with, wherever it lies; without one latents come out."""
    diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[prep]' brings diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=1, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(tmp_path / "vae")
    folder = export(run, tmp_path / "export")
    description = json.loads((folder / EXPORT_CONFIG).read_text())
    identity = load_vae(str(tmp_path / "vae"), torch.device("cpu")).identity
    description["data_info"] |= {"kind": "moments", "encoders": {"vae": identity}, "latent_mean": [0.5], "latent_std": [2.0]}
    description["made_with"] = {"vae": str(tmp_path / "vae")}
    (folder / EXPORT_CONFIG).write_text(json.dumps(description))

    images = largescale.load(folder).sample(labels=[1, 2, 3], cfg_scale=2.0, steps=4)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    by_program = drawn(folder, tmp_path / "out", "--num-samples", "3", "--classes", "1", "2", "3")
    assert (images.transpose(0, 3, 1, 2) == by_program).all()
    latents = largescale.load(folder, vae="none").sample(labels=[1, 2, 3], cfg_scale=2.0, steps=4)
    assert latents.shape == (3, 1, 16, 16) and latents.dtype == np.float32
    with torch.no_grad():  # whose mean and std are undone, and not the VAE's own scale
        decoded = (vae.eval().decode(torch.from_numpy(latents) * 2 + 0.5).sample + 1) * 127.5
    assert np.abs(decoded.clamp(0, 255).permute(0, 2, 3, 1).numpy() - images).max() <= 1

    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=f"other is .*, the model was trained with {identity}"):
        largescale.load(folder, vae=str(tmp_path / "other")).sample(labels=[1])
    with pytest.raises(DataError, match="gone"):
        largescale.load(folder, vae=str(tmp_path / "gone")).sample(labels=[1])


@pytest.mark.parametrize(("options", "message"), [
    ({}, "n=0 images; give labels or prompts, or n of 1 or more"),
    ({"labels": []}, "n=0 images"),
    ({"n": 0}, "n=0 images"),
    ({"labels": [10]}, "label 10 lies outside the classes 0..9"),
    ({"labels": [-1]}, "label -1 lies outside"),
    ({"labels": ["3"]}, "label '3' is no whole number; give those of the classes, 0..9"),
    ({"labels": "37"}, "label '3' is no whole number"),
    ({"labels": [3.5]}, "label 3.5 is no whole number"),
    ({"labels": np.array([])}, "n=0 images"),
    ({"prompts": ["a"]}, "not trained on captions; leave out prompts"),
    ({"n": 1, "steps": 1}, "steps=1"),
    ({"n": 1, "sampler": "dddim"}, "unknown sampler='dddim'"),
    ({"n": 1, "cfg_scale": -1}, "cfg_scale=-1 must be 0 or more"),
    ({"n": 1, "cfg_channels": 5}, "cfg_channels=5 must be at most 1"),
])
def test_what_cannot_be_drawn(options: dict[str, Any], message: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        largescale.load(run).sample(**options)


def test_labels_of_an_array(run: Path) -> None:
    model = largescale.load(run)
    expected = model.sample(labels=[3, 7], steps=2)
    for same in (np.array([3, 7]), torch.tensor([3, 7]), (np.int64(3), 7)):
        assert (model.sample(labels=same, steps=2) == expected).all()  # type: ignore[arg-type]


def test_what_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        largescale.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no snapshots of averages"):
        largescale.load(run, ema_width=0.1)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; there are: "):
        largescale.load(run, step=3)
    with pytest.raises(ConfigError, match="unknown precision='fp8'; choose one of auto, fp32, bf16, fp16"):
        largescale.load(run, precision="fp8")


def test_without_labels_and_guidance(run_here: RunHere) -> None:
    """A model that knows no null label is drawn from without guidance, unless that is asked for."""
    outcome = run_here("--train.steps", 2, "--model.num-classes", 0, "--model.class-dropout-prob", 0, "--telemetry.preview-cfg-scale", 1)
    model = largescale.load(outcome.run)
    assert (model.sample(n=2, steps=4) == model.sample(n=2, steps=4, cfg_scale=1.0)).all()
    for wrong, message in (({"n": 1, "cfg_scale": 1.5}, "knows no null label"), ({"labels": [0]}, "trained without labels")):
        with pytest.raises(ConfigError, match=message):
            model.sample(**wrong)


def test_samples_that_are_not_finite(run: Path) -> None:
    trained = load_trained(run)
    trained.model.final_layer.linear.bias.data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite, drawn in fp32"):
        Pipeline(trained).sample(n=1, steps=2)


def test_the_package_does_not_load_torch() -> None:
    code = "import sys, largescale; assert callable(largescale.load); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
