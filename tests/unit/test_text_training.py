"""Text-to-image and unconditional models train, resume, preview and export as class-conditional ones do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from largescale.checkpoint.files import checkpoints, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.data.shards import ShardDataset
from largescale.monitoring.telemetry import read_metrics
from largescale.training import preview
from largescale.training.gathered import gather_model
from tests.conftest import CAPTIONED, RunHere, assert_same_run, cut, ds_json, trace


def test_interrupted_and_resumed_is_the_same_run(run_here: RunHere, captioned: Path, tmp_path: Path) -> None:
    settings = ("--data.horizontal-flip", "--checkpoint.every", 4, "--checkpoint.keep-last", 9, *CAPTIONED)
    truth = run_here(*settings, "--train.steps", 12, data=captioned, output=tmp_path / "truth")
    assert truth.code == 0, truth.err
    cut(truth.run, tmp_path / "cut", step=4)
    assert "resumed" in run_here(*settings, "--train.steps", 12, data=captioned, output=tmp_path / "cut").err
    assert_same_run(tmp_path / "cut", truth.run)
    other = run_here(*settings, "--train.steps", 12, "--train.seed", 1, data=captioned, output=tmp_path / "other")
    assert trace(other.run) != trace(truth.run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_empty_caption_travels_with_the_weights(run_here: RunHere, captioned: Path, tmp_path: Path, precision: str) -> None:
    outcome = run_here("--train.steps", 4, "--train.ds-config", ds_json(precision, tmp_path), *CAPTIONED, data=captioned)
    assert outcome.code == 0, outcome.err
    tokens, pooled = map(torch.tensor, ShardDataset(captioned).empty_caption)
    for kind in ("ema", "master"):
        weights = named_weights(checkpoints(outcome.run)[0], kind)
        assert torch.equal(weights["y_embedder.null_tokens"][:2], tokens.float()) and weights["y_embedder.null_mask"].tolist() == [1, 1, 0, 0, 0]
        assert torch.equal(weights["y_embedder.null_pooled"], pooled.float())
    model: Any = load_trained(outcome.run).model
    assert torch.equal(model.y_embedder.null_tokens[:2], tokens.float())


def test_the_preview_shows_captions_and_sees_the_empty_one(run_here: RunHere, captioned: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    monkeypatch.setattr(preview, "gather_model", lambda *given: models.append(gather_model(*given)) or models[-1])
    learned = ("--train.steps", 8, "--optimizer.lr", 0.01, "--optimizer.ema-decay", 0, "--telemetry.preview-every", 8, *CAPTIONED)
    guided = run_here(*learned, data=captioned, output=tmp_path / "guided")
    assert guided.code == 0, guided.err
    sheet = np.asarray(Image.open(guided.run / "samples/step_00000008.png"))
    assert sheet.shape == (96 + 38 + 4, 4 * 98 + 2, 3)  # 16 pixels six times, and three lines of text
    assert sheet[98:-2].std() > 5
    tokens, pooled = map(torch.tensor, ShardDataset(captioned).empty_caption)
    (used,) = {id(model): model for model in models}.values()
    assert torch.equal(used.y_embedder.null_tokens[:2], tokens.float()) and torch.equal(used.y_embedder.null_pooled, pooled.float())


def test_reference_loss_of_captions(run_here: RunHere, captioned: Path) -> None:
    run = run_here("--train.steps", 4, "--telemetry.reference-every", 2, *CAPTIONED, data=captioned).run
    assert [row["step"] for row in read_metrics(run) if "reference/loss" in row] == [2, 4]


def test_captions_count(run_here: RunHere, captioned: Path, tmp_path: Path) -> None:
    """Without dropping and with everything but a few captions dropped, training is another."""
    rows = [run_here("--train.steps", 6, "--model.class-dropout-prob", p, "--telemetry.preview-cfg-scale", 1, *CAPTIONED,
                     data=captioned, output=tmp_path / str(p)).trace()[-1]["loss"] for p in (0, 0.95)]
    assert rows[0] != rows[1]


UNCONDITIONAL = ("--model.num-classes", 0, "--model.class-dropout-prob", 0, "--telemetry.preview-cfg-scale", 1)


def test_an_unconditional_model_ignores_labels_and_captions(run_here: RunHere, captioned: Path, blobs: Path, tmp_path: Path) -> None:
    for data in (captioned, blobs):
        outcome = run_here(*UNCONDITIONAL, "--telemetry.preview-every", 20, data=data, output=tmp_path / data.name)
        assert outcome.code == 0, outcome.err
        assert not any(name.startswith("y_embedder") for name in named_weights(checkpoints(outcome.run)[0]))
        assert (outcome.run / "samples/step_00000020.png").exists()


@pytest.mark.parametrize(("change", "message"), [
    (("--model.max-caption-tokens", 4), "--model.max-caption-tokens 5 --model.caption-width 8 --model.caption-pooled-width 6"),
    (("--model.caption-width", 9), "(tokens, width, pooled width) (5, 8, 6), the model takes (5, 9, 6)"),
    (("--model.caption-pooled-width", 7), "the model takes (5, 8, 7)"),
    (("--model.max-caption-tokens", 0, "--model.num-classes", 3), "has no labels, the model wants 3 classes; choose other data, or train without: "
     "--model.num-classes 0 --model.class-dropout-prob 0 --telemetry.preview-cfg-scale 1"),
])
def test_captions_that_do_not_fit_the_model(run_here: RunHere, captioned: Path, change: tuple[Any, ...], message: str) -> None:
    for more in ((), ("--dry-run",)):
        outcome = run_here(*CAPTIONED, *change, *more, data=captioned)
        assert outcome.code == 2 and message in outcome.err and not outcome.run.exists()


def test_data_without_captions(run_here: RunHere, blobs: Path) -> None:
    outcome = run_here(*CAPTIONED, data=blobs)
    assert outcome.code == 2 and "has no encoded captions; pack it with --text-encoder" in outcome.err
