"""CLIP's text encoder, as open_clip and transformers have it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.encoders.text import load_text_encoder
from tests.lazy import Lazy
from tests.unit.text_models import (  # noqa: F401
    CONFIG,
    CPU,
    assert_close,
    models,
    offline,
    open_clip,
    save_as_transformers,
    save_tokenizer,
    tiny_clip,
)

transformers = Lazy("transformers")

CAPTIONS = ["a cat on a mat", "", "Déjà vu: 3 cafés!", "red " * 100, "two dogs, it's raining"]


@pytest.mark.parametrize("max_tokens", [None, 8])
@pytest.mark.parametrize("eos_token_id", [49407, 2])        # 2: what configs of 2022 say, and what transformers lives with
@pytest.mark.parametrize(("model", "activation"), [("Tiny", "gelu"), ("Tiny-quickgelu", "quick_gelu")])
def test_open_clip_and_transformers_agree(
        tmp_path: Path, model: str, activation: str, eos_token_id: int, max_tokens: int | None) -> None:
    clip = tiny_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    save_as_transformers(clip, tmp_path / "hf", activation, eos_token_id)
    a = load_text_encoder(f"open_clip:{model}/{tmp_path}/clip.pt", CPU, max_tokens=max_tokens)
    b = load_text_encoder(f"hf:{tmp_path}/hf", CPU, max_tokens=max_tokens)
    for encoder in (a, b):
        assert (encoder.max_tokens, encoder.width, encoder.pooled_width) == (max_tokens or 77, 32, 24)
    assert_close(a(CAPTIONS), b(CAPTIONS))
    assert [len(x.tokens) for x in a(CAPTIONS)] == [min(n, max_tokens or 77) for n in (7, 2, 11, 102, 8)]
    assert all(x.tokens.dtype == x.pooled.dtype == np.float16 for x in a(CAPTIONS))


def test_activation_matters_and_is_named(tmp_path: Path) -> None:
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    a, b = (load_text_encoder(f"open_clip:{m}/{tmp_path}/clip.pt", CPU) for m in ("Tiny", "Tiny-quickgelu"))
    assert np.abs(a(["a cat"])[0].tokens - b(["a cat"])[0].tokens).max() > 0.01
    assert a.identity.startswith("open_clip:Tiny sha256:") and b.identity.startswith("open_clip:Tiny-quickgelu sha256:")
    assert a.identity.split()[1] == b.identity.split()[1]


def test_tag_brings_its_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for ViT-L-14/openai, of which open_clip by itself would run the weights with another activation."""
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    tags = sys.modules["open_clip.pretrained"]._PRETRAINED
    monkeypatch.setitem(tags, "Tiny", {"openai": {"url": "", "file": str(tmp_path / "clip.pt"), "quick_gelu": True}})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: cfg["file"])
    by_tag = load_text_encoder("open_clip:Tiny/openai", CPU)
    by_file = load_text_encoder(f"open_clip:Tiny-quickgelu/{tmp_path}/clip.pt", CPU)
    assert by_tag.identity == by_file.identity
    assert_close(by_tag(CAPTIONS), by_file(CAPTIONS))


def test_open_clip_pooled_is_encode_text(tmp_path: Path) -> None:
    clip = tiny_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer("Tiny")(CAPTIONS)).numpy()
    for x, y in zip(load_text_encoder(f"open_clip:Tiny/{tmp_path}/clip.pt", CPU)(CAPTIONS), expected, strict=True):
        np.testing.assert_allclose(x.pooled, y, atol=1e-3, rtol=1e-3)


def test_every_way_to_name_localopen_clip_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    clip = tiny_clip()
    weights = {name: w.contiguous() for name, w in clip.state_dict().items()}
    hub, single = tmp_path / "hub", tmp_path / "single"
    hub.mkdir()
    single.mkdir()
    save_file(weights, hub / "open_clip_model.safetensors")
    torch.save(weights, hub / "open_clip_pytorch_model.bin")
    torch.save({"not": torch.zeros(1)}, hub / "pytorch_model.bin")
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save({"state_dict": {f"module.{n}": w for n, w in weights.items()}}, single / "epoch_32.pt")
    monkeypatch.chdir(tmp_path)
    encoders = [load_text_encoder(f"open_clip:{source}", CPU) for source in (
        f"Tiny/{hub}", "Tiny/hub/open_clip_pytorch_model.bin", "Tiny/single", f"Tiny-custom/{hub}", f"local-dir:{hub}")]
    for encoder in encoders:
        assert_close(encoder(CAPTIONS), encoders[0](CAPTIONS))
        assert str(tmp_path) not in encoder.identity
    assert len({encoder.identity for encoder in encoders[:3]}) == 1
    clip.visual.proj.data += 1          # of the other tower, which is not used
    torch.save(clip.state_dict(), single / "epoch_32.pt")
    assert load_text_encoder("open_clip:Tiny/single", CPU).identity == encoders[2].identity
    torch.save(tiny_clip(seed=1).state_dict(), single / "epoch_32.pt")
    assert load_text_encoder("open_clip:Tiny/single", CPU).identity != encoders[2].identity


def test_whole_clip_of_transformers(tmp_path: Path) -> None:
    """Both towers in one folder, where text_config may give another width than the projection has."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    assert clip.config.text_config.projection_dim != 24
    clip.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_text_encoder(f"hf:{tmp_path}", CPU)
    assert encoder.pooled_width == 24 and encoder.identity.startswith("hf:CLIPTextModelWithProjection sha256:")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(["a cat"], return_tensors="pt")
    with torch.no_grad():
        tokens = clip.text_model(**ids).last_hidden_state[0]
        pooled = clip.get_text_features(**ids)
    pooled = getattr(pooled, "pooler_output", pooled)[0]
    np.testing.assert_allclose(encoder(["a cat"])[0].tokens, tokens.numpy(), atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(encoder(["a cat"])[0].pooled, pooled.numpy(), atol=1e-3, rtol=1e-3)
