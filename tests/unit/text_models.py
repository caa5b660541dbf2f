"""Small text encoders, in the forms in which they are published."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.encoders.text import EncodedCaption
from tests.lazy import Lazy

open_clip = Lazy("open_clip")
transformers = Lazy("transformers")

CPU = torch.device("cpu")
TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 77, "vocab_size": 49408}
CONFIG = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
          "text_cfg": TEXT}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip's models and tiny ones: plain, with OpenAI's activation, with a tower of its own, and of other kinds."""
    factory = open_clip.factory
    before = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"Tiny": CONFIG, "Tiny-quickgelu": CONFIG | {"quick_gelu": True}, "Tiny-custom": CONFIG | {"custom_text": True},
                         "Tiny-coca": CONFIG | {"text_cfg": TEXT | {"embed_cls": True}},
                         "Tiny-siglip": CONFIG | {"text_cfg": TEXT | {"hf_tokenizer_name": "x/y", "pool_type": "last"}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    factory._MODEL_CONFIGS, factory._MODEL_CONFIG_PATHS = before


def tiny_clip(seed: int = 0, name: str = "Tiny") -> Any:
    torch.manual_seed(seed)
    model = open_clip.create_model(name).eval()
    for parameter in model.parameters():        # the initial weights are so small that the activation hardly matters
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def save_tokenizer(folder: Path) -> None:
    """transformers' files of the tokenizer that open_clip brings along."""
    tokenizer = open_clip.SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({named.get(k, k): v for k, v in tokenizer.encoder.items()}))
    packed = Path(open_clip.factory.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))


def save_as_transformers(clip: Any, folder: Path, activation: str, eos_token_id: int = 49407) -> None:
    """The text tower of open_clip's model as a CLIPTextModelWithProjection."""
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=24,
        hidden_act=activation, eos_token_id=eos_token_id, bos_token_id=49406, pad_token_id=49407)
    theirs = transformers.CLIPTextModelWithProjection(config)
    weights = {"text_model.embeddings.token_embedding.weight": clip.token_embedding.weight,
               "text_model.embeddings.position_embedding.weight": clip.positional_embedding,
               "text_model.final_layer_norm.weight": clip.ln_final.weight, "text_model.final_layer_norm.bias": clip.ln_final.bias,
               "text_projection.weight": clip.text_projection.T}
    for i, block in enumerate(clip.transformer.resblocks):
        for kind in ("weight", "bias"):
            here = {name: getattr(layer, kind) for name, layer in
                    {"self_attn.out_proj": block.attn.out_proj, "layer_norm1": block.ln_1, "layer_norm2": block.ln_2,
                     "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}.items()}
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            here |= {f"self_attn.{p}_proj": part for p, part in zip("qkv", parts, strict=True)}
            weights |= {f"text_model.encoder.layers.{i}.{name}.{kind}": value for name, value in here.items()}
    theirs.load_state_dict({name: w.detach() for name, w in weights.items()})
    theirs.save_pretrained(folder)
    save_tokenizer(folder)


def assert_close(a: list[EncodedCaption], b: list[EncodedCaption]) -> None:
    assert [x.tokens.shape for x in a] == [x.tokens.shape for x in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.tokens.astype(float), y.tokens.astype(float), atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(x.pooled.astype(float), y.pooled.astype(float), atol=1e-3, rtol=1e-3)


def save_words(folder: Path, kind: str, limit: int = 16) -> None:
    """A tokenizer of few words: BERT's, [CLS] and [SEP] around, or T5's, </s> behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<pad>", "<unk>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, "a", "cat", "on", "the", "mat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(token, vocabulary[token]) for token in special[2:]]
    template = f"{around[0][0]} $A {around[1][0]}" if kind == "bert" else f"$A {around[0][0]}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], unk_token=special[1], model_max_length=limit).save_pretrained(folder)


def bert(seed: int = 0, pooler: bool = True, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32), add_pooling_layer=pooler).eval()
