"""Text encoders that cannot be loaded are named, with what to do."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.encoders.text import load_text_encoder
from largescale.errors import DataError
from tests.lazy import Lazy
from tests.unit.text_models import (  # noqa: F401
    CONFIG,
    CPU,
    bert,
    models,
    offline,
    save_tokenizer,
    save_words,
    tiny_clip,
)

transformers = Lazy("transformers")


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pickle-was-run"),)


def test_open_clip_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clip = tiny_clip()
    torch.save(clip.state_dict() | {"malice": Malice()}, "malicious.pt")
    torch.save({n: w for n, w in clip.state_dict().items() if n != "ln_final.bias"}, "incomplete.pt")
    Path("two").mkdir()
    Path("empty").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(clip.state_dict(), Path("two") / name)
    Path("empty/open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    for source, message in {
        "ViT-L14/openai": "no model 'ViT-L14'; the nearest are ViT-L-14",
        "ViT-B-32": "'' is neither a tag of ViT-B-32 .openai, .* nor a path",
        "ViT-B-32/scratch/clip.pt": "neither a tag .* nor a path .a path from the root has two slashes: open_clip:ViT-B-32//",
        "ViT-B-32/openai": "cannot be loaded .*without a network .*: --text-encoder open_clip:MODEL/FILE",
        "Tiny/malicious.pt": "cannot be loaded .*nsupported",
        "Tiny/incomplete.pt": "cannot be loaded .*Missing key.*ln_final.bias",
        "Tiny/two": "two has 2 files that may be the weights; name one: open_clip:Tiny/two/FILE",
        "Tiny/empty": "empty has 0 files",
        "local-dir:empty": "cannot be loaded .*could not be loaded",
        "local-dir:nowhere": "cannot be loaded",
        "Tiny-siglip/two/a.pt": "Tiny-siglip has another text encoder than CLIP's; try hf:DIR",
        "Tiny-coca/two/a.pt": "another text encoder",
    }.items():
        with pytest.raises(DataError, match=message):
            load_text_encoder(f"open_clip:{source}", CPU)
    assert not Path("pickle-was-run").exists()


def test_hf_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("whole")
    save_words(Path("whole"), "bert")

    def damaged(name: str, damage: Callable[[Path], Any]) -> None:
        shutil.copytree("whole", name)
        damage(Path(name))

    def change(key: str, value: Any) -> Callable[[Path], Any]:
        return lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {key: value}))

    damaged("no-config", lambda folder: (folder / "config.json").unlink())
    damaged("no-weights", lambda folder: (folder / "model.safetensors").unlink())
    damaged("no-tokenizer", lambda folder: [path.unlink() for path in folder.glob("tokenizer*")])
    damaged("malicious", lambda folder: (folder / "model.safetensors").unlink())
    torch.save(bert().state_dict() | {"malice": Malice()}, "malicious/pytorch_model.bin")
    damaged("deeper", change("num_hidden_layers", 2))
    damaged("wider", change("intermediate_size", 128))
    damaged("unknown", change("model_type", "no-such-model"))
    damaged("no-padding", lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(
        {k: v for k, v in json.loads((folder / "tokenizer_config.json").read_text()).items() if k != "pad_token"})))
    change("model_type", "siglip")(shutil.copytree("whole", Path("siglip")))
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)).save_pretrained("no-projection")
    save_tokenizer(Path("no-projection"))
    for source, message in {
        "nobody/has-this": "cannot be loaded .*without a network .*: --text-encoder hf:DIR .* `hf download NAME --local-dir DIR`",
        "./nowhere": "is not a folder; give one: --text-encoder hf:DIR",
        "no-config": "no-config cannot be loaded .*fetch the folder anew",
        "no-weights": "no-weights cannot be loaded",
        "no-tokenizer": "no-tokenizer has no tokenizer.json or other vocabulary",    # transformers makes an empty one
        "malicious": "cannot be loaded .*nsupported",
        "deeper": "lacks 16 weights of a BertModel, the first is encoder.layer.1",
        "wider": "wider cannot be loaded .*",
        "unknown": "unknown cannot be loaded .*no-such-model",
        "no-padding": "has no padding token",
        "siglip": "is a siglip; CLIP, T5 and BERT-like text encoders work",
        "no-projection": "lacks 1 weights .*text_projection.weight; give the complete CLIP",
    }.items():
        with pytest.raises(DataError, match=message):
            load_text_encoder(f"hf:{source}", CPU)
    assert not Path("pickle-was-run").exists()


@pytest.mark.parametrize("wrong", ["ViT-L-14/openai", "clip:ViT-L-14", "hf:", "open_clip", ""])
def test_unknown_scheme(wrong: str) -> None:
    with pytest.raises(DataError, match="a text encoder is open_clip:MODEL/WEIGHTS or hf:NAME_OR_DIR, not"):
        load_text_encoder(wrong, CPU)


@pytest.mark.parametrize(("scheme", "name"), [("open_clip", "open_clip"), ("hf", "transformers")])
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, scheme: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"{name} is not installed; in the clone: pip install -e '\.\[prep\]'"):
        load_text_encoder(f"{scheme}:ViT-B-32/openai", CPU)
