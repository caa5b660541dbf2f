"""What a sample is told: classes, captions, prompts, nothing; and what cannot be told to which model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import sample
from eval.conditions import make_conditions
from largescale.data.shards import ShardDataset
from largescale.models.conditioning import Captions
from largescale.weights import load_trained
from tests.conftest import CAPTIONED, RunHere

CPU = torch.device("cpu")
UNCONDITIONAL = ("--model.num-classes", 0, "--model.class-dropout-prob", 0)


@pytest.fixture
def text_run(run_here: RunHere, captioned: Path) -> Path:
    outcome = run_here("--train.steps", 2, "--optimizer.lr", 0.01, "--optimizer.ema-decay", 0, *CAPTIONED, data=captioned)
    assert outcome.code == 0, outcome.err
    return outcome.run


def draw(run: Path, out: Path, *more: Any) -> int:
    return sample.main([str(run), "--out", str(out), "--num-samples", "6", "--steps", "3", "--device", "cpu", *map(str, more)])


def test_captions_in_turn(text_run: Path, captioned: Path) -> None:
    """Sample i has row i % n's first caption, the next time round its second, and so on."""
    data = ShardDataset(captioned)
    conditions = make_conditions(load_trained(text_run), 2 * len(data) + 3, captioned, (), None, CPU)
    texts = data.texts(np.arange(len(data)))
    for round_ in range(2):
        expected = [of_row[round_ % len(of_row)] for of_row in texts]
        assert conditions.stored.tolist()[round_ * len(data) : (round_ + 1) * len(data)] == expected
    for i in (0, 5, len(data) + 5, 2 * len(data) + 2):
        y = conditions.of([i])
        assert isinstance(y, Captions) and not y.null.any()
        row, k = i % len(data), (i // len(data)) % len(texts[i % len(data)])
        expected = data.gather(np.array([row]), choice=np.array([(k + 0.5) / len(texts[row])]))["caption_pooled"]
        assert np.array_equal(y.pooled.numpy(), expected)


def test_samples_follow_their_captions_and_the_guidance(text_run: Path, captioned: Path, tmp_path: Path) -> None:
    assert draw(text_run, tmp_path / "out", "--captions", captioned, "--cfg-scale", 1, 3, 0) == 0
    images = {}
    for scale in ("1.0", "3.0", "0.0"):
        with np.load(tmp_path / f"out/cfg{scale}/samples.npz") as file:
            images[scale], texts = file["arr_0"], file["arr_1"].tolist()
    assert texts == [some[0] for some in ShardDataset(captioned).texts(np.arange(6))]
    assert (images["1.0"] != images["3.0"]).any() and (images["1.0"] != images["0.0"]).any()
    provenance = json.loads((tmp_path / "out/cfg3.0/provenance.json").read_text())
    assert provenance["captions_of"] == ShardDataset(captioned).fingerprint


@pytest.mark.parametrize(("more", "message"), [
    ((), "give --prompts TEXT ..., or --captions DIR"),
    (("--prompts", "a cat", "--captions", "CAPTIONED"), "not both"),
    (("--prompts", "a cat"), "--prompts needs --text-encoder"),
    (("--captions", "BLOBS"), "has captions encoded by None"),
    (("--captions", "CAPTIONED", "--vae", "somewhere"), "leave out --vae"),
])
def test_what_a_text_model_cannot_be_told(text_run: Path, captioned: Path, blobs: Path, tmp_path: Path, more: tuple[str, ...],
                                          message: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"CAPTIONED": str(captioned), "BLOBS": str(blobs)}
    assert draw(text_run, tmp_path / "out", *(places.get(word, word) for word in more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_captions_of_another_encoder(text_run: Path, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from largescale.data.format import CaptionInfo, DatasetInfo
    from largescale.data.writer import ShardWriter

    info = DatasetInfo("other", "pixels", (1, 16, 16), 0, encoders={"text": "another"}, captions=CaptionInfo(5, 8, 6))
    tokens, pooled = np.zeros((1, 8), np.float16), np.zeros(6, np.float16)
    with ShardWriter(tmp_path / "other", info) as writer:
        writer.write(id="0", latent=np.zeros((1, 16, 16), np.uint8), captions=["a"], caption_tokens=[tokens], caption_pooled=[pooled])
        writer.write_empty_caption(tokens, pooled)
    assert draw(text_run, tmp_path / "out", "--captions", tmp_path / "other") == 2
    assert "has captions encoded by another, the model was trained with None" in capsys.readouterr().err


def test_models_without_captions(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2, *UNCONDITIONAL, "--telemetry.preview-cfg-scale", 1).run
    assert draw(run, tmp_path / "none", "--cfg-scale", 1) == 0
    assert json.loads((tmp_path / "none/cfg1.0/provenance.json").read_text())["labels"] == "none"
    with np.load(tmp_path / "none/cfg1.0/samples.npz") as file:
        assert file["arr_0"].shape == (6, 16, 16, 3) and file["arr_1"].tolist() == [0] * 6
    assert draw(run, tmp_path / "guided", "--cfg-scale", 2) == 2
    assert "set --cfg-scale 1" in capsys.readouterr().err
    assert draw(run, tmp_path / "prompts", "--cfg-scale", 1, "--prompts", "a cat") == 2
    assert "was not trained on captions; leave out --captions and --prompts" in capsys.readouterr().err
