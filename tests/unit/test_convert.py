"""Weights that other programs wrote become an export that computes the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eval import sample
from largescale import convert, export
from largescale.checkpoint.weights import Trained, load_trained
from largescale.data.shards import ShardDataset
from largescale.interop.diffusers_weights import to_diffusers
from largescale.interop.dit_weights import reverse_time
from largescale.models.dit import DiT
from largescale.models.unet import DDPMpp
from tests.conftest import RunHere
from tests.diffusers_models import save_pipeline, their_dit, their_vae
from tests.unit.foreign_weights import HEADS, SIT, SIZES, arguments, checkpoint, dit, no_network


@pytest.fixture
def converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Trained, str]]:
    """Convert a source, and load what became of it, with what was printed."""
    def convert_to(source: Path | str, *options: str) -> tuple[Trained, str]:
        capsys.readouterr()
        assert convert.main([str(source), "--out", str(tmp_path / "out"), *options]) == 0, capsys.readouterr().err
        return load_trained(tmp_path / "out"), capsys.readouterr().out

    return convert_to


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- DiT's and SiT's files


def test_a_bare_state_dict_of_dit(tmp_path: Path, converted: Any) -> None:
    torch.save(dit().state_dict(), tmp_path / "DiT-T-2.pt")
    trained, said = converted(tmp_path / "DiT-T-2.pt", *HEADS)
    assert equal(dict(trained.model.state_dict()), dict(dit().state_dict()))
    model, diffusion = trained.config.model, trained.config.diffusion
    assert {key: getattr(model, key) for key in SIZES} == SIZES and model.learn_sigma and model.class_dropout_prob == 0.1
    assert (diffusion.objective, diffusion.schedule, diffusion.timesteps) == ("gaussian", "linear", 1000)
    assert (model.downscale_freq_shift, model.mlp_norm_eps, trained.config.name) == (0, 1e-6, "DiT-T-2")
    record = trained.info["converted"]
    assert f"assumed: diffusion.objective: {record['assumed']['diffusion.objective']}" in said and "as in DiT, by the file's name" in said
    assert record["assumed"].keys() == {"model.class_dropout_prob", "diffusion.objective", "diffusion.schedule", "data", "vae"}
    assert record["files"] == {"DiT-T-2.pt": record["sha256"]} and record["source"] == str(tmp_path / "DiT-T-2.pt")
    assert trained.info["data_info"] | {"name": ""} == {
        "name": "", "kind": "latents", "shape": [4, 8, 8], "num_classes": 7, "scale_factor": 1.0, "encoders": {}}


@pytest.mark.parametrize(("depth", "width", "heads"), [(12, 384, 6), (1, 1152, 16)])
def test_published_widths_have_their_heads(depth: int, width: int, heads: int, tmp_path: Path, converted: Any) -> None:
    model = dit(depth=depth, hidden_size=width, num_heads=heads, patch_size=8, learn_sigma=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    trained, said = converted(tmp_path / "model.safetensors")
    assert trained.config.model.num_heads == heads and f"assumed: model.num_heads: {heads}, as" in said
    assert not trained.config.model.learn_sigma and "would need --objective flow" in said


def test_a_checkpoint_of_train_py(tmp_path: Path, converted: Any) -> None:
    torch.save(checkpoint(), tmp_path / "0400000.pt")
    trained, said = converted(tmp_path / "0400000.pt", *HEADS)
    assert equal(dict(trained.model.state_dict()), dict(dit(2).state_dict())) and trained.info["step"] == 400_000
    assert trained.info["converted"]["weights"] == "ema" and trained.info["converted"]["args"]["vae"] == "ema"
    assert "model.class_dropout_prob" not in said                        # its arguments have the number of classes
    trained, _ = converted(tmp_path / "0400000.pt", *HEADS, "--weights", "model")
    assert equal(dict(trained.model.state_dict()), dict(dit(1).state_dict())) and trained.info["converted"]["weights"] == "model"


def test_labels_that_were_never_dropped(tmp_path: Path, converted: Any) -> None:
    model = dit(class_dropout_prob=0.0)
    torch.save({"ema": model.state_dict(), "args": arguments()}, tmp_path / "last.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    for source, options in (("last.pt", ()), ("bare.pt", ("--class-dropout-prob", "0"))):
        trained, _ = converted(tmp_path / source, *HEADS, *options)
        assert trained.config.model.num_classes == 7 and trained.config.model.class_dropout_prob == 0


def test_no_labels(tmp_path: Path, converted: Any) -> None:
    torch.save(dit(num_classes=0, class_dropout_prob=0.0).state_dict(), tmp_path / "dit.pt")
    trained, _ = converted(tmp_path / "dit.pt", *HEADS)
    assert trained.config.model.num_classes == 0 and trained.config.model.class_dropout_prob == 0


@pytest.mark.parametrize("wrap", [
    lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    lambda weights: {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()},
    lambda weights: {"ema": {"n_averaged": torch.tensor(5)} | {f"module.{name}": tensor for name, tensor in weights.items()}},
    lambda weights: {name.replace("attn.", "_orig_mod.attn."): tensor for name, tensor in weights.items()},
    lambda weights: {f"ema.{name}": tensor for name, tensor in weights.items()} | {"model.x_embedder.proj.bias": torch.zeros(1)},
    lambda weights: {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, "global_step": 3},
    lambda weights: {"ema": {f"module.{name}": tensor for name, tensor in weights.items()}, "optimizer": {"lr": 1.0}},
])
def test_prefixes(wrap: Any, tmp_path: Path, converted: Any) -> None:
    torch.save(wrap(dit().state_dict()), tmp_path / "dit.pt")
    trained, _ = converted(tmp_path / "dit.pt", *HEADS)
    assert equal(dict(trained.model.state_dict()), dict(dit().state_dict()))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: torch.dtype, tmp_path: Path, converted: Any) -> None:
    halves = {name: tensor.to(kind) for name, tensor in dit().state_dict().items()}
    save_file(halves, tmp_path / "dit.safetensors")
    trained, said = converted(tmp_path / "dit.safetensors", *HEADS)
    assert equal(dict(trained.model.state_dict()), {name: tensor.float() for name, tensor in halves.items()} | {"pos_embed": dit().pos_embed.data})
    assert "assumed: pos_embed: sines and cosines in fp32" in said


def test_another_position_embedding_stays(tmp_path: Path, converted: Any) -> None:
    weights = {name: tensor.half() for name, tensor in dit().state_dict().items()}
    weights["pos_embed"] = torch.randn(weights["pos_embed"].shape).half()
    torch.save(weights, tmp_path / "dit.pt")
    trained, _ = converted(tmp_path / "dit.pt", *HEADS)
    assert torch.equal(trained.model.state_dict()["pos_embed"], weights["pos_embed"].float())


def test_files_of_older_torch(tmp_path: Path, converted: Any) -> None:
    torch.save(checkpoint(), tmp_path / "dit.pt", _use_new_zipfile_serialization=False)
    trained, _ = converted(tmp_path / "dit.pt", *HEADS)
    assert equal(dict(trained.model.state_dict()), dict(dit(2).state_dict()))


def test_sit(tmp_path: Path, converted: Any) -> None:
    """By the arguments in the file, by its name, and by an option."""
    torch.save(checkpoint(args=arguments(**SIT | {"path_type": "GVP"})), tmp_path / "0050000.pt")
    trained, _ = converted(tmp_path / "0050000.pt", *HEADS)
    assert (trained.config.diffusion.objective, trained.config.diffusion.interpolant) == ("flow", "gvp") and trained.config.model.learn_sigma
    assert trained.info["converted"]["assumed"].keys() == {"data", "vae"}  # the rest stands in its arguments
    torch.save(dit().state_dict(), tmp_path / "SiT-XL-2-256x256.pt")
    trained, said = converted(tmp_path / "SiT-XL-2-256x256.pt", *HEADS)
    assert trained.config.diffusion.objective == "flow" and "assumed: diffusion.objective: flow, as in SiT, by the file's name" in said
    assert "assumed: noise_at: 0, as in willisma/SiT" in said and equal(dict(trained.model.state_dict()), dict(dit().state_dict()))
    torch.save(dit().state_dict(), tmp_path / "last.pt")
    trained, said = converted(tmp_path / "last.pt", *HEADS, "--objective", "flow", "--interpolant", "linear", "--noise-at", "0")
    assert trained.config.diffusion.objective == "flow" and "diffusion" not in said and "noise_at" not in said


@torch.no_grad()
def test_repas_time_is_turned_around(tmp_path: Path, converted: Any) -> None:
    """Its noise is at 1, SiT's and ours at 0; the velocity changes its sign."""
    theirs = dit(learn_sigma=False)
    projectors = {f"projectors.0.{i}.{kind}": torch.ones(3) for i in (0, 2, 4) for kind in ("weight", "bias")}
    args = arguments(model="SiT-T/2", path_type="cosine", prediction="v", proj_coeff=0.5, encoder_depth=1, resolution=64)
    del args.image_size
    torch.save({"ema": {**theirs.state_dict(), **projectors}, "args": args, "steps": 123}, tmp_path / "last.pt")
    trained, said = converted(tmp_path / "last.pt", *HEADS)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.03, 0.4, 0.98]), torch.tensor([0, 5, 7])
    expected = -theirs(x, 1 - t, y)
    assert (trained.model(x, t, y) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (theirs(x, t, y) - expected).abs().max() > 0.01 * expected.abs().max()
    assert trained.config.diffusion.interpolant == "gvp" and trained.info["step"] == 123
    assert "left out: projectors.0.0.bias, projectors.0.0.weight, " in said and len(trained.info["converted"]["left_out"]) == 6
    assert "assumed: time: turned around" in said
    again = reverse_time(reverse_time(theirs.state_dict()))
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in theirs.state_dict().items())


def test_the_names_of_repas_oldest_files(tmp_path: Path, converted: Any) -> None:
    names = {name: re.sub(r"^blocks\.1\.", "decoder_blocks.0.", name) for name in dit().state_dict()}
    torch.save({names[name]: tensor for name, tensor in dit().state_dict().items()}, tmp_path / "dit.pt")
    trained, _ = converted(tmp_path / "dit.pt", *HEADS)
    assert equal(dict(trained.model.state_dict()), dict(dit().state_dict()))


# ---- EDM's networks


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"num_classes": 0, "augment_dim": 0, "channel_mult": (1, 2, 2), "num_blocks": 2, "attn_resolutions": (8, 4)}])
def test_a_state_dict_of_edm(change: dict[str, Any], tmp_path: Path, converted: Any) -> None:
    sizes: dict[str, Any] = {"input_size": 16, "in_channels": 3, "num_classes": 5, "model_channels": 16, "channel_mult": (2, 2),
                             "num_blocks": 1, "attn_resolutions": (8,), "augment_dim": 9} | change
    model = DDPMpp(**sizes).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["model.enc.8x8_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    torch.save(weights, tmp_path / "edm-cifar10-32x32-cond-vp.pt")
    trained, said = converted(tmp_path / "edm-cifar10-32x32-cond-vp.pt")
    config, x, t, y = trained.config, torch.randn(2, 3, 16, 16), torch.tensor([-1.0, 0.3]), torch.tensor([1, 4])
    assert torch.equal(trained.model(x, t, y), model(x, t, y)) and config.diffusion.objective == "edm"
    assert {key: getattr(config.model.unet, key) for key in sizes if hasattr(config.model.unet, key)} == {
        key: sizes[key] for key in sizes if hasattr(config.model.unet, key)}
    assert trained.info["data_info"]["kind"] == "pixels" and "sigma_data=0.5" in said


# ---- diffusers


@torch.no_grad()
def require_same_network(trained: Trained, theirs: Any) -> None:
    """To rounding, and unlike what facebookresearch's conventions would compute of the same weights."""
    model = trained.config.model
    x, t = torch.randn(4, 4, model.input_size, model.input_size), torch.tensor([0, 3, 480, 999])
    y = torch.tensor([0, model.num_classes - 1, model.num_classes, 1])     # with the null label
    expected = theirs(x, timestep=t, class_labels=y).sample
    found = trained.model(x, t, y)
    assert found.shape == expected.shape and (found - expected).abs().max() < 2e-6 * expected.abs().max()
    other = DiT(**{key: getattr(model, key) for key in SIZES}, learn_sigma=model.learn_sigma).eval()
    other.load_state_dict(trained.model.state_dict())
    assert (other(x, t, y) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("sizes", [{}, {"learn_sigma": False, "patch_size": 4, "heads": 1}, {"sample_size": 16, "depth": 1, "classes": 1000}, {"norm_eps": 1e-2}])
def test_a_transformer_of_diffusers(sizes: dict[str, Any], tmp_path: Path, converted: Any) -> None:
    """Alone, its forward pass is theirs to rounding."""
    theirs = their_dit(**sizes)
    theirs.save_pretrained(tmp_path / "transformer")
    trained, said = converted(tmp_path / "transformer")
    require_same_network(trained, theirs)
    assert trained.config.model.mlp_norm_eps == sizes.get("norm_eps", 1e-5) and trained.config.model.downscale_freq_shift == 1
    assert trained.config.diffusion.schedule == "linear" and "assumed: diffusion.schedule: linear" in said
    back = to_diffusers(dict(trained.model.state_dict()))
    assert equal(back, dict(theirs.state_dict()))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_files_of_diffusers(options: dict[str, Any], tmp_path: Path, converted: Any) -> None:
    """Sharded or not, in half precision, pickled, and under the class name of the first publication."""
    theirs = their_dit()
    saved_as = theirs.half() if "variant" in options else theirs
    saved_as.save_pretrained(tmp_path / "model", **options)
    if "variant" in options:                                             # not the positions, which are computed
        theirs = type(theirs).from_pretrained(tmp_path / "model", variant="fp16", torch_dtype=torch.float32).eval()
    assert len(list((tmp_path / "model").glob("*-of-*"))) == (0 if "max_shard_size" not in options else 9)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    trained, _ = converted(tmp_path / "model")
    require_same_network(trained, theirs)
    (file, *_) = (tmp_path / "model").glob("diffusion_pytorch_model*")
    again, _ = converted(file)                                           # named by itself
    assert equal(dict(again.model.state_dict()), dict(trained.model.state_dict()))


def test_a_pipeline_of_diffusers_and_its_samples(tmp_path: Path, converted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The scheduler gives the noise schedule, the VAE its hash; both are used by eval.sample."""
    import diffusers

    theirs, vae = their_dit(), their_vae()
    save_pipeline(tmp_path / "pipeline", theirs, vae=vae, scheduler=diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500))
    trained, said = converted(tmp_path / "pipeline")
    require_same_network(trained, theirs)
    assert (trained.config.diffusion.schedule, trained.config.diffusion.timesteps) == ("cosine", 500)
    assert trained.info["made_with"]["vae"] == str(tmp_path / "pipeline/vae") and trained.info["data_info"]["scale_factor"] == 0.5
    assert trained.info["converted"]["id2label"] == {"0": "tench", "1": "goldfish"} and "assumed" not in said
    assert sample.main([str(tmp_path / "out"), "--out", str(tmp_path / "samples"), "--num-samples", "4", "--steps", "3", "--device", "cpu"]) == 0
    assert "untrained weights" not in capsys.readouterr().err
    drawn = ShardDataset(tmp_path / "samples/cfg1.5")
    assert drawn.info.kind == "pixels" and drawn.info.shape == (3, 16, 16) and len(drawn) == 4
    provenance = json.loads((tmp_path / "samples/cfg1.5/provenance.json").read_text())
    assert provenance["converted"]["sha256"] == trained.info["converted"]["sha256"]
    their_vae(3).save_pretrained(tmp_path / "other")
    assert sample.main([str(tmp_path / "out"), "--out", str(tmp_path / "no"), "--vae", str(tmp_path / "other"), "--device", "cpu"]) == 2
    assert "the model was trained with AutoencoderKL sha256:" in capsys.readouterr().err


def test_a_vae_that_nobody_names_is_taken_on_trust(tmp_path: Path, converted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dit().state_dict(), tmp_path / "dit.pt")
    for channels in (3, 4):
        their_vae(channels).save_pretrained(tmp_path / f"vae{channels}")
    _, said = converted(tmp_path / "dit.pt", *HEADS)
    assert "assumed: vae: none known" in said
    options = ("--num-samples", "2", "--steps", "2", "--device", "cpu", "--cfg-scale", "1")
    draw = lambda vae: sample.main([str(tmp_path / "out"), "--out", str(tmp_path / f"with {vae}"), "--vae", str(vae), *options])  # noqa: E731
    capsys.readouterr()
    assert draw(tmp_path / "vae3") == 2 and "has latents of 3 channels, and the model draws 4" in capsys.readouterr().err
    assert draw(tmp_path / "vae4") == 0 and "note: the converted weights do not say which VAE made their latents" in capsys.readouterr().err


def test_a_vae_that_is_named(tmp_path: Path, converted: Any, refused: Any) -> None:
    torch.save(dit().state_dict(), tmp_path / "dit.pt")
    for channels in (3, 4):
        their_vae(channels).save_pretrained(tmp_path / f"vae{channels}")
    trained, said = converted(tmp_path / "dit.pt", *HEADS, "--vae", str(tmp_path / "vae4"))
    assert trained.info["data_info"]["encoders"]["vae"].startswith("AutoencoderKL sha256:") and "assumed: vae" not in said
    assert "has latents of 3 channels, and the model draws 4" in refused(tmp_path / "dit.pt", *HEADS, "--vae", str(tmp_path / "vae3"))


# ---- our own


def test_our_own_runs_and_exports(run_here: RunHere, tmp_path: Path, converted: Any, refused: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    expected = dict(load_trained(export.export(run)).model.state_dict())
    card = export.export(run, tmp_path / "out") / "README.md"
    assert card.exists()
    trained, said = converted(run)
    assert not card.exists()  # it was of what lay there before
    assert equal(dict(trained.model.state_dict()), expected) and trained.info["step"] == 6 and "a run of largescale" in said
    description = json.loads((run / "export/config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == description
    assert converted(run, "--step", "3")[0].info["step"] == 3
    # Of an older version: its field names become today's.
    description["config"]["model"]["caption_tokens"] = description["config"]["model"].pop("max_caption_tokens")
    (run / "export/config.json").write_text(json.dumps(description))
    trained, _ = converted(run / "export/model.safetensors")
    assert equal(dict(trained.model.state_dict()), expected)
    assert "max_caption_tokens" in json.loads((tmp_path / "out/config.json").read_text())["config"]["model"]
    assert "--num-heads 4 has no effect" in refused(run, "--num-heads", "4")
    assert sample.main([str(run / "export"), "--out", str(run / "samples"), "--num-samples", "2", "--steps", "2", "--device", "cpu"]) == 0
    assert "is a data set or samples, and has no weights" in refused(run / "samples/cfg1.5")


# ---- what is refused


def test_a_name_on_the_hub_that_was_fetched(converted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    their_dit().save_pretrained(tmp_path / "snapshot/transformer")
    (tmp_path / "snapshot/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only, **where: str(tmp_path / "snapshot"))
    trained, _ = converted("somebody/a-dit")
    require_same_network(trained, their_dit())
    assert trained.info["converted"]["source"] == "somebody/a-dit" and trained.config.name == "a-dit"
