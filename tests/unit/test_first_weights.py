"""--train.init-from: a run that starts with trained weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from largescale import convert
from largescale.checkpoint.files import CheckpointDir, checkpoints, named_weights
from largescale.checkpoint.weights import read_weights
from largescale.config.presets import debug
from largescale.errors import ConfigError
from largescale.export import export
from largescale.models.build import build_model
from largescale.training.first_weights import FirstWeights
from tests.conftest import CAPTIONED, RunHere, assert_same_run
from tests.ranks import ranks_of


@pytest.fixture
def pretrained(run_here: RunHere, tmp_path: Path) -> Path:
    """An export of a model whose weights are all trained."""
    outcome = run_here("--train.steps", 6, "--optimizer.lr", 0.01, output=tmp_path / "pretraining")
    assert outcome.code == 0, outcome.err
    return export(outcome.run, tmp_path / "pretrained")


def first(run: Path, kind: str) -> dict[str, torch.Tensor]:
    """The weights in the checkpoint of step 0."""
    return named_weights(CheckpointDir.at(run, 0), kind)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_master_weights_and_ema_are_the_files(precision: str, pretrained: Path, run_here: RunHere) -> None:
    """Also where DeepSpeed has the network in bf16, which keeps 8 bits of them."""
    run = run_here("--train.steps", 3, "--checkpoint.every", 2, "--checkpoint.keep-every", 0, "--train.init-from", pretrained,
                   "--train.ds-config", f"ds_configs/zero2_{precision}.json")
    assert run.code == 0 and f"the first weights are those of {pretrained}: step 6 of debug (sha256 " in run.err, run.err
    weights = load_file(pretrained / "model.safetensors")
    assert_equal(first(run.run, "master"), weights)
    assert_equal(first(run.run, "ema"), weights)
    state = checkpoints(run.run)[0].manifest()["state"]
    assert state["init"]["source"] == str(pretrained) and state["curriculum"]["transitions"] == []
    assert "untrained weights" not in run.err


def test_on_two_ranks(pretrained: Path, blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = ranks_of("-m", "largescale.train", "debug", "--data.path", blobs, "--output", run, "--train.steps", 2,
                    "--train.ds-config", "ds_configs/zero2_bf16.json", "--train.init-from", pretrained)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr
    assert_equal(first(run, "master"), load_file(pretrained / "model.safetensors"))


def test_the_weights_are_needed_for_the_first_checkpoint_only(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Fine-tuning that is cut after its source is gone is the one that is not; and the source may be the run."""
    truth = run_here("--train.steps", 50, "--train.init-from", pretrained, output=tmp_path / "truth")
    random = run_here("--train.steps", 50, output=tmp_path / "random")
    assert truth.trace() != random.trace()

    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "pretraining", moved)
    cut = run_here("--train.steps", 20, "--train.init-from", moved, output=tmp_path / "cut")
    assert cut.code == 0, cut.err
    shutil.rmtree(moved)
    again = run_here("--train.steps", 50, "--train.init-from", moved, output=tmp_path / "cut")
    assert again.code == 0, again.err
    assert_same_run(again.run, truth.run)


def test_published_weights_that_were_converted(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    """50 steps from facebookresearch/DiT's kind of file are those from our own export of the same weights."""
    options = ("--train.steps", 50, "--checkpoint.every", 20, "--train.init-from")
    truth = run_here(*options, pretrained, output=tmp_path / "truth")
    torch.save({"ema": load_file(pretrained / "model.safetensors"), "args": None}, tmp_path / "0400000.pt")
    assert convert.main([str(tmp_path / "0400000.pt"), "--out", str(tmp_path / "converted"), "--num-heads", "2"]) == 0
    tuned = run_here(*options, tmp_path / "converted", output=tmp_path / "tuned")
    assert truth.code == tuned.code == 0, tuned.err
    assert_same_run(tuned.run, truth.run)


def test_other_first_weights_are_refused_on_resume(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    with_them = ("--train.init-from", pretrained)
    run = run_here("--train.steps", 2, *with_them)
    plain = run_here("--train.steps", 2, output=tmp_path / "plain")
    assert (run.code, plain.code) == (0, 0)
    refused = run_here("--train.steps", 4, *with_them, output=tmp_path / "plain")
    assert refused.code == 2 and "was started with other first weights: random ones, and" in refused.err
    refused = run_here("--train.steps", 4, *with_them, "--train.init-new", "final_layer")
    assert refused.code == 2 and "new: final_layer" in refused.err
    refused = run_here("--train.steps", 4, "--train.init-from", export(run.run, tmp_path / "own"), "--dry-run")  # from after two steps
    assert refused.code == 2 and "was started with other first weights: step 6 of debug" in refused.err
    # Weights that are not there are taken for those of the run, but a run of random ones has none.
    gone = ("--train.init-from", tmp_path / "gone")
    refused = run_here("--train.steps", 4, *gone, output=tmp_path / "plain")
    assert refused.code == 2 and f"error: --train.init-from {tmp_path / 'gone'}: " in refused.err
    refused = run_here("--train.steps", 4, *gone, "--train.init-new", "final_layer")
    assert refused.code == 2 and "new: final_layer" in refused.err
    trained_on = run_here("--train.steps", 8, "--optimizer.lr", 0.01, output=tmp_path / "pretraining")  # its step 6 is what counts
    assert trained_on.code == 0
    for same in ((), ("--train.init-from", tmp_path / "pretraining"), ("--train.init-from", tmp_path / "gone")):
        steps = checkpoints(run.run)[0].step + 1
        assert run_here("--train.steps", steps, *same).code == 0


def test_parts_that_start_anew(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Other classes and another variance: these parts are the ones that the seed gives, all others the file's."""
    options = ("--train.steps", 2, "--model.num-classes", 12, "--model.no-learn-sigma")
    refused = run_here(*options, "--train.init-from", pretrained)
    assert refused.code == 2 and refused.err.rstrip().endswith("start these parts anew: --train.init-new final_layer y_embedder")
    assert "y_embedder.embedding_table.weight: (11, 32) there, (13, 32) here" in refused.err
    assert "(model.num_classes=10 there, 12 here)" in refused.err and "(model.learn_sigma=True there, False here)" in refused.err
    run = run_here(*options, "--train.init-from", pretrained, "--train.init-new", "final_layer", "y_embedder", output=tmp_path / "new")
    seed = run_here(*options, output=tmp_path / "seed")
    assert (run.code, seed.code) == (0, 0), run.err + seed.err
    found, fresh, weights = first(run.run, "master"), first(seed.run, "master"), load_file(pretrained / "model.safetensors")
    new = {name for name in found if name.startswith(("final_layer.", "y_embedder."))}
    assert len(new) == 5
    assert_equal(found, {name: fresh[name] if name in new else weights[name] for name in found})
    assert checkpoints(run.run)[0].manifest()["state"]["init"]["new"] == ["final_layer", "y_embedder"]


def test_captions_in_place_of_classes(pretrained: Path, captioned: Path, run_here: RunHere) -> None:
    """The new cross-attention starts as zero, so that the network begins as the one without captions."""
    options = ("--train.steps", 2, "--data.path", captioned, *CAPTIONED, "--train.init-from", pretrained, "--train.init-new")
    refused = run_here(*options, "y_embedder")
    assert refused.code == 2 and "--train.init-new cross_attn" in refused.err
    run = run_here(*options, "y_embedder", "cross_attn")
    assert run.code == 0, run.err
    found, weights = first(run.run, "master"), load_file(pretrained / "model.safetensors")
    proj = [value for name, value in found.items() if ".cross_attn.proj." in name]
    assert len(proj) == 4 and not any(map(torch.count_nonzero, proj))
    assert [name for name in found if name in weights and not torch.equal(found[name], weights[name])] == []


def test_another_resolution(pretrained: Path) -> None:
    """The position table is computed for it."""
    config = debug()
    config = replace(config, model=replace(config.model, input_size=32), train=replace(config.train, init_from=str(pretrained)))
    with pytest.raises(ConfigError, match="--train.init-new pos_embed"):
        FirstWeights.read(config).check(config)
    config = replace(config, train=replace(config.train, init_new=("pos_embed",)))
    model = build_model(config.model)
    table = model.pos_embed.clone()
    FirstWeights.read(config).load_into(model, config)
    weights = load_file(pretrained / "model.safetensors")
    assert torch.equal(model.pos_embed, table) and table.shape[1] == 4 * weights["pos_embed"].shape[1]
    assert torch.equal(model.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(("options", "message"), [
    (("--train.init-from", "nowhere"), "--train.init-from nowhere: nowhere holds no checkpoint"),
    (("--train.init-new", "final_layer"), "train.init_new=['final_layer'] must be empty without train.init_from"),
    (("--train.init-from", "PRETRAINED", "--model.num-heads", 4), "has model.num_heads=2, and this run 4; set --model.num-heads 2"),
    (("--train.init-from", "PRETRAINED", "--model.depth", 3), "blocks.2.adaLN_modulation.1.bias: absent there, (192,) here"),
    (("--train.init-from", "PRETRAINED", "--train.init-new", "final_layr"), "is no part of the network; did you mean final_layer?"),
])
@pytest.mark.parametrize("dry", [False, True])
def test_what_does_not_fit_is_one_error(options: tuple[str, ...], message: str, dry: bool, pretrained: Path, run_here: RunHere) -> None:
    words = [pretrained if word == "PRETRAINED" else word for word in options]
    outcome = run_here(*words, *(["--dry-run"] if dry else []))
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert not checkpoints(outcome.run)


def test_weights_that_are_not_finite(pretrained: Path, run_here: RunHere) -> None:
    weights = load_file(pretrained / "model.safetensors")
    weights["blocks.0.mlp.fc1.bias"][3] = torch.nan
    save_file(weights, pretrained / "model.safetensors")
    outcome = run_here("--train.init-from", pretrained)
    assert outcome.code == 2 and "blocks.0.mlp.fc1.bias holds values that are not finite" in outcome.err


def test_another_task_is_said(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    run = run_here("--train.steps", 1, "--train.init-from", pretrained, "--diffusion.schedule", "linear")
    assert run.code == 0 and "note: the first weights were trained with diffusion.schedule=cosine, this run has linear" in run.err
    dry = run_here("--train.init-from", pretrained, "--diffusion.objective", "flow", "--dry-run", output=tmp_path / "flow")
    assert dry.code == 0 and "diffusion.objective=gaussian, this run has flow" in dry.err


def test_the_export_names_the_first_weights(pretrained: Path, run_here: RunHere, tmp_path: Path) -> None:
    run = run_here("--train.steps", 1, "--train.init-from", pretrained).run
    description, _ = read_weights(export(run, tmp_path / "out"))
    assert description["init"] == json.loads(json.dumps(FirstWeights.read(
        replace(debug(), train=replace(debug().train, init_from=str(pretrained)))).record()))
