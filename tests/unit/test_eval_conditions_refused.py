"""What a sample cannot be told, of which model and which data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.errors import ConfigError
from tests.unit.conditioned_models import ENCODER, made, text_model, trained

CPU = torch.device("cpu")


# ---- captions of a data set


def test_captions_of_another_encoder(captioned: Path, blobs: Path, tmp_path: Path) -> None:
    info = DatasetInfo("other", "pixels", (1, 16, 16), 0, encoders={"text": "another"}, captions=CaptionInfo(5, 8, 6))
    tokens, pooled = np.zeros((1, 8), np.float16), np.zeros(6, np.float16)
    with ShardWriter(tmp_path / "other", info) as writer:
        writer.write(id="0", latent=np.zeros((1, 16, 16), np.uint8), captions=["a"], caption_tokens=[tokens], caption_pooled=[pooled])
        writer.write_empty_caption(tokens, pooled)
    for encoder, path, message in (
        (None, tmp_path / "other", "has captions encoded by another, the model was trained with None; pack them"),
        (ENCODER, captioned, f"has captions encoded by None, the model was trained with {ENCODER}"),
        (None, blobs, "has captions encoded by None"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(text_model(encoder), captions=path)
    made(text_model("another"), captions=tmp_path / "other")


# ---- what cannot be told

UNCONDITIONAL: dict[str, Any] = {"num_classes": 0, "class_dropout_prob": 0.0}


@pytest.mark.parametrize(("model", "options", "message"), [
    ({}, {"prompts": ["a"]}, "the model was not trained on captions; leave out --prompts"),
    ({}, {"prompts_file": Path("x.txt"), "captions": Path("x")}, "was not trained on captions; leave out --prompts-file and --captions"),
    ({}, {"labels": "drawn", "classes": [1]}, "--classes sets the label of each sample; leave out --labels drawn"),
    ({}, {"classes": [3, 10]}, r"--classes: label 10 lies outside the classes 0\.\.9 that the model was trained on"),
    ({}, {"classes": [-1]}, r"--classes: label -1 lies outside the classes 0\.\.9"),
    (UNCONDITIONAL, {"prompts": ["a"]}, "was not trained on captions; leave out --prompts"),
    (UNCONDITIONAL, {"classes": [0]}, "the model was trained without labels; leave out --classes"),
    (UNCONDITIONAL, {"labels": "drawn"}, "the model was trained without labels; leave out --labels drawn"),
])
def test_what_a_model_without_captions_cannot_be_told(model: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(trained(**model), **options)


@pytest.mark.parametrize(("options", "message"), [
    ({}, r"give --prompts TEXT \.\.\., or --captions DIR, a packed data set whose captions to use, or --prompts-file FILE$"),
    ({"prompts": ["a"], "captions": Path("x")}, "; one of them, not --prompts and --captions$"),
    ({"prompts": ["a"], "prompts_file": Path("x")}, "; one of them, not --prompts and --prompts-file$"),
    ({"prompts_file": Path("x"), "captions": Path("x")}, "; one of them, not --prompts-file and --captions$"),
    ({"prompts": ["a"], "labels": "drawn"}, "was trained on captions, not on labels; leave out --labels drawn"),
    ({"prompts": ["a"], "classes": [0]}, "was trained on captions, not on labels; leave out --classes"),
    ({"prompts": ["a"]}, f"--prompts needs --text-encoder, the one that the model was trained with: {ENCODER}"),
    ({"prompts_file": Path("x")}, f"--prompts-file needs --text-encoder, the one that the model was trained with: {ENCODER}"),
    ({"prompts": ["caf\udce9"], "text_encoder": "fake:spec"}, r"prompt 0 of --prompts is not UTF-8: 'caf\\udce9'; give it in UTF-8"),
    ({"prompts": ["a", " "], "text_encoder": "fake:spec"}, "prompt 1 of --prompts is empty; give a text, or --cfg-scale 0"),
])
def test_what_a_text_model_cannot_be_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(text_model(), **options)


def test_prompts_for_data_of_an_unknown_encoder() -> None:
    with pytest.raises(ConfigError, match="do not say which text encoder made their captions; give --captions"):
        made(text_model(None), prompts=["a"], text_encoder="fake:spec")
