"""Weights of other programs that cannot be converted: files, names, shapes, settings, folders."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from largescale import convert
from largescale.interop import hub
from largescale.models.unet import DDPMpp
from tests.diffusers_models import save_pipeline, their_dit
from tests.unit.foreign_weights import HEADS, SIT, arguments, checkpoint, dit, no_network

# ---- EDM's networks


def test_other_networks_of_edm_are_refused(tmp_path: Path, refused: Any) -> None:
    weights = DDPMpp(input_size=8, in_channels=3, num_classes=0, model_channels=16, num_blocks=1, channel_mult=(2, 2), attn_resolutions=()).state_dict()
    torch.save({**weights, "map_noise.freqs": torch.ones(8), "enc.4x4_aux_residual.weight": torch.ones(1)}, tmp_path / "ncsnpp.pt")
    assert "have enc.4x4_aux_residual.weight, map_noise.freqs besides" in refused(tmp_path / "ncsnpp.pt")


# ---- what is refused


def test_a_name_on_the_hub_without_a_network(refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said = refused("facebook/DiT-XL-2-256-no-such-name")
    assert "ConnectionError: Name or service not known" in said and "hf download NAME --local-dir DIR" in said
    assert not hub.is_hub_name("runs/digits.pt") and not hub.is_hub_name("./a/b") and hub.is_hub_name("facebook/DiT-XL-2-256@main")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


SAFE = b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "


@pytest.mark.parametrize(("content", "says"), [
    (b"", "is empty"),
    (b"hello, this is a note", "is no file of weights, or a damaged one"),
    (bytes(range(256)) * 40, "is no file of weights, or a damaged one"),
    (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "is a pointer of git-lfs"),
    (saved({"a": torch.ones(1000)})[:2000], "is half a download"),
    (saved({"model": {"a": Evil()}}), "is a pickle with code (print)"),
    (pickle.dumps(Evil()), "is a pickle with code (builtins.print)"),
    (saved([torch.ones(2)]), "holds a list, not weights by their names"),
    (saved({"epoch": 3, "lr": 0.1}), "holds epoch, lr, and no weights by their names"),
    (saved({}), "holds nothing"),
    (saved({"text_model.embeddings.weight": torch.ones(2)}), "has the weights of another model (text_model.embeddings.weight)"),
    (saved({"transformer_blocks.0.norm1.linear.bias": torch.ones(2)}), "has diffusers' names, and no config.json beside it"),
    (saved({"x_embedder.proj.weight": torch.ones(2, 2)}), "x_embedder.proj.weight has the shape (2, 2), of 2 dimensions instead of 4"),
    (saved({"x_embedder.proj.weight": torch.ones(2, 2, 2, 2)}), "the weights lack pos_embed"),
    (SAFE, "holds nothing"),
    (SAFE[:4] + b"\xff" + SAFE[5:], "is a damaged file of safetensors, or half a download"),
])
def test_what_is_no_checkpoint(content: bytes, says: str, tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    assert says in refused(tmp_path / "file.pt") and "this code ran" not in capsys.readouterr().out


def test_half_of_safetensors(tmp_path: Path, refused: Any) -> None:
    save_file(dit().state_dict(), tmp_path / "dit.safetensors")
    whole = (tmp_path / "dit.safetensors").read_bytes()
    (tmp_path / "dit.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is a damaged file of safetensors, or half a download" in refused(tmp_path / "dit.safetensors", *HEADS)


def test_a_pickle_of_edm(tmp_path: Path, refused: Any) -> None:
    """Such as `pickle.dump(dict(ema=network))` writes with EDM's persistence."""
    pickled = b"\x80\x04\x95\x40\x00\x00\x00\x00\x00\x00\x00}\x8c\x03ema\x8c\x17torch_utils.persistence\x8c\x1e_reconstruct_persistent_obj\x93)Rs."
    (tmp_path / "edm.pkl").write_bytes(pickled)
    said = refused(tmp_path / "edm.pkl")
    assert "is one of EDM's pickles" in said and "github.com/NVlabs/edm" in said
    (first, second, third) = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert first == "import pickle, torch" and second.endswith('["ema"]') and third.startswith("torch.save(network.state_dict(), ")


def change(weights: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name} | ({} if tensor is None else {name: tensor})


@pytest.mark.parametrize(("name", "tensor", "says"), [
    ("blocks.1.attn.qkv.bias", None, "they lack blocks.1.attn.qkv.bias"),
    ("blocks.1.attn.q_norm.weight", torch.ones(8), "they have blocks.1.attn.q_norm.weight besides"),
    ("blocks.1.attn.qkv.bias", torch.ones(5), "blocks.1.attn.qkv.bias has (5,) in place of (96,)"),
    ("blocks.1.attn.qkv.bias", torch.full((96,), torch.nan), "blocks.1.attn.qkv.bias has values that are not finite"),
    ("blocks.1.attn.qkv.bias", torch.ones(96, dtype=torch.int8), "quantised weights cannot be converted"),
    ("blocks.1.attn.qkv.bias", torch.ones(96).to_sparse(), "(torch.sparse_coo), and weights are dense"),
    ("final_layer.linear.weight", torch.ones(7, 32), "final_layer.linear.weight has 7 outputs"),
    ("pos_embed", torch.zeros(1, 15, 32), "pos_embed has 15 positions, which are no square"),
])
def test_names_and_shapes_that_do_not_fit(name: str, tensor: Tensor | None, says: str, tmp_path: Path, refused: Any) -> None:
    torch.save(change(dict(dit().state_dict()), name, tensor), tmp_path / "dit.pt")
    assert says in refused(tmp_path / "dit.pt", *HEADS)


@pytest.mark.parametrize(("args", "says"), [
    (arguments(num_classes=1000), "its settings say num_classes=1000, and its weights have 8 labels"),
    (arguments(image_size=256), "its settings say an image size of 256, and its weights have positions for inputs of 8 x 8"),
    (arguments(model="DiT-XL/2"), "its settings say model=DiT-XL/2, and its weights have depth 2, width 32"),
    (arguments(**SIT | {"prediction": "score"}), "predicts the score"),
    (arguments(**SIT | {"path_type": "VP"}), "was trained on the path VP"),
])
def test_settings_that_contradict_the_weights(args: argparse.Namespace, says: str, tmp_path: Path, refused: Any) -> None:
    torch.save(checkpoint(args=args), tmp_path / "last.pt")
    assert says in refused(tmp_path / "last.pt", *HEADS)


@pytest.mark.parametrize(("options", "says"), [
    ((), "no published DiT has their width of 32; give --num-heads"),
    (("--num-heads", "3"), "hidden_size=32 is not a multiple of num_heads=3"),
    (("--num-heads", "0"), "num_heads=0 must be at least 1"),
    ((*HEADS, "--weights", "ema"), "has one set of weights, and does not say that they are an EMA"),
    ((*HEADS, "--objective", "flow", "--schedule", "linear"), "--schedule linear has no effect: the objective is flow"),
    ((*HEADS, "--noise-at", "1"), "--noise-at 1 has no effect: the objective is gaussian"),
    ((*HEADS, "--objective", "edm"), "model.learn_sigma=True must be off with diffusion.objective=edm"),
    ((*HEADS, "--step", "3"), "--step 3 chooses a checkpoint of a run"),
    ((*HEADS, "--kind", "pixels", "--vae", "x"), "--vae x has no effect: the model draws pixels"),
    ((*HEADS, "--class-dropout-prob", "1"), "class_dropout_prob=1.0 must be in [0, 1)"),
])
def test_options_that_do_not_fit(options: tuple[str, ...], says: str, tmp_path: Path, refused: Any) -> None:
    torch.save(dit().state_dict(), tmp_path / "model.pt")
    assert says in refused(tmp_path / "model.pt", *options)


def test_two_models_in_one_state_dict(tmp_path: Path, refused: Any) -> None:
    weights = dit().state_dict()
    torch.save({**weights, **{f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "dit.pt")
    assert "the weights have pos_embed twice, with and without a prefix (module.pos_embed)" in refused(tmp_path / "dit.pt", *HEADS)


def test_weights_that_are_not_there(tmp_path: Path, refused: Any) -> None:
    torch.save({"model": dit().state_dict()}, tmp_path / "dit.pt")
    assert "has no weights of --weights ema; it has those of model" in refused(tmp_path / "dit.pt", *HEADS, "--weights", "ema")
    assert "there is no file or folder" in refused(tmp_path / "nothing.pt")
    torch.save({"model": dit().state_dict(), "ema": {"shadow_params": [torch.ones(2)]}}, tmp_path / "dit.pt")
    assert "has an EMA (ema) that is not weights by their names" in refused(tmp_path / "dit.pt", *HEADS)


def test_folders_of_something_else(tmp_path: Path, refused: Any) -> None:
    def folder(name: str, **files: Any) -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        return tmp_path / name

    says = {
        folder("text_encoder", config={"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}): "is of CLIPTextModel, a model of transformers such as a text encoder",
        folder("unet", config={"_class_name": "UNet2DConditionModel"}): "is of diffusers' class UNet2DConditionModel",
        folder("sd", model_index={"_class_name": "StableDiffusionPipeline"}): "is a pipeline of diffusers' class StableDiffusionPipeline",
        folder("half", model_index={"_class_name": "DiTPipeline"}): "lacks transformer/config.json",
        folder("pixart", config={"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}): "has norm_type=ada_norm_single, and a DiT has ada_norm_zero",
        folder("bare", config={"_class_name": "DiTTransformer2DModel"}): "has no weights",
        folder("wordy", config={"_class_name": "DiTTransformer2DModel", "num_layers": "many"}): 'has num_layers="many", which no DiT has',
        folder("large", config={"_class_name": "DiTTransformer2DModel", "sample_size": 10**9}): "has sample_size=1000000000, which no DiT has",
        folder("list", config=[]): "it is no object",
        folder("empty"): "holds nothing, and neither config.json nor model_index.json",
        folder("notes", notes={}): "holds notes.json, and neither",
    }
    for path, said in says.items():
        assert said in refused(path)


def test_shards_that_do_not_belong_together(tmp_path: Path, refused: Any) -> None:
    folder = tmp_path / "model"
    their_dit().save_pretrained(folder, max_shard_size="30KB")
    first, second, *_ = sorted(folder.glob("*-of-*"))
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert "is not the shard that diffusion_pytorch_model.safetensors.index.json describes" in refused(folder)
    first.write_bytes(whole)
    save_file({name: tensor.half() for name, tensor in load_file(second).items()}, second)
    assert "has float16 and diffusion_pytorch_model-00001-of-00009.safetensors float32: the shards are of several downloads" in refused(folder)
    second.unlink()
    assert f"lacks {second.name}, of the 9 shards" in refused(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "has shards without diffusion_pytorch_model.safetensors.index.json" in refused(folder)


def test_a_config_of_diffusers_that_contradicts_its_weights(tmp_path: Path, refused: Any) -> None:
    their_dit().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for key, value, found in (("num_layers", 4, 3), ("attention_head_dim", 16, 24), ("num_embeds_ada_norm", 1000, 10), ("out_channels", 4, 8), ("sample_size", 9, 8)):
        (tmp_path / "model/config.json").write_text(json.dumps(config | {key: value}))
        said = refused(tmp_path / "model")
        assert "contradicts the weights beside it" in said and key in said and f"the weights have {found}" in said
    weights = load_file(tmp_path / "model/diffusion_pytorch_model.safetensors")
    weights["proj_out_2.bias"][0] = torch.inf
    save_file(weights, tmp_path / "model/diffusion_pytorch_model.safetensors")
    assert "proj_out_2.bias has values that are not finite" in refused(tmp_path / "model")


@pytest.mark.parametrize(("change", "says"), [
    ({"prediction_type": "v_prediction"}, "has prediction_type=v_prediction"),
    ({"beta_schedule": "scaled_linear"}, "has a noise schedule that largescale does not (scaled_linear"),
    ({"beta_end": 0.03}, "has a noise schedule that largescale does not (linear, beta 0.0001 to 0.03"),
    ({"rescale_betas_zero_snr": True}, "1000 timesteps, changed further"),
    ({"num_train_timesteps": 10**12}, "has num_train_timesteps=1000000000000"),
    ({"num_train_timesteps": "many"}, 'has num_train_timesteps="many"'),
    ({"beta_start": "small"}, 'has betas from "small" to 0.02'),
])
def test_schedulers_that_are_not_ours(change: dict[str, Any], says: str, tmp_path: Path, refused: Any) -> None:
    save_pipeline(tmp_path / "pipeline", their_dit())
    path = tmp_path / "pipeline/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refused(tmp_path / "pipeline")


def test_a_folder_that_holds_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dit().state_dict(), tmp_path / "dit.pt")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"model_type": "bert"}')
    assert convert.main([str(tmp_path / "dit.pt"), "--out", str(tmp_path / "theirs"), *HEADS]) == 2
    assert "holds config.json and no export of largescale" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]
