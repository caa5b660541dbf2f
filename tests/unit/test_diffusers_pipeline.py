"""Pipelines for diffusers, opened and drawn from by diffusers itself."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from largescale.config.presets import PRESETS
from largescale.diffusion.sampling import SamplingConfig, draw_samples
from largescale.encoders.normalization import Normalization
from largescale.encoders.vae import Vae
from largescale.errors import CheckpointError, ConfigError, DataError
from largescale.interop import diffusers_pipeline
from largescale.interop.diffusers_pipeline import (
    PipelineParts,
    check_exportable,
    class_names,
    difference,
    open_vae,
    reasons,
    write_pipeline,
)
from largescale.models.build import latent_shape
from largescale.randomness import stream_seed
from tests.lazy import Lazy
from tests.random_models import STOCK, make_trained, make_vae

diffusers = Lazy("diffusers")

CPU = torch.device("cpu")
SAME = 1e-4  # of the range of the image


@pytest.fixture(autouse=True)
def modules_of_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers copies the code of folders to one of its own, which it adds to sys.path."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    diffusers.utils.logging.disable_progress_bar()
    yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Vae:
    return make_vae(tmp_path_factory.mktemp("vae"))


def opened(folder: Path, stock: bool, **more: Any) -> Any:
    """The pipeline as a user opens it."""
    if stock:
        pipe = diffusers.DiTPipeline.from_pretrained(folder)
        assert type(pipe) is diffusers.DiTPipeline and type(pipe.transformer) is diffusers.DiTTransformer2DModel
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **more)
        assert type(pipe).__name__ == "LargescaleDiTPipeline" and isinstance(pipe, diffusers.DiTPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(samples: range) -> list[torch.Generator]:
    """The generators that eval.sample --seed 1 draws these samples' noise from."""
    return [torch.Generator().manual_seed(stream_seed(1, "sample", i)) for i in samples]


def ours(parts: PipelineParts, sampler: str, steps: int | str, scale: float, labels: list[int]) -> np.ndarray:
    """Images (N, H, W, C) in [0, 1] as eval.sample draws them, but for the rounding to bytes."""
    trained = parts.trained
    how = SamplingConfig(sampler, steps, cfg_scale=scale, seed=1, clip_denoised=parts.pixels)  # type: ignore[arg-type]
    model = trained.config.model
    x = draw_samples(trained.model, trained.objective, how, index=range(len(labels)), shape=latent_shape(model),
                     condition=lambda index: torch.tensor(labels)[list(index)], num_classes=model.num_classes,
                     batch_size=len(labels), device=CPU)
    if parts.vae:
        with torch.no_grad():
            x = parts.vae.module.decode(x / parts.vae.scale_factor + parts.vae.shift_factor).sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def off(mine: np.ndarray, theirs: np.ndarray) -> float:
    assert mine.shape == theirs.shape and mine.std() > 0.01
    return float(np.abs(mine - theirs).max() / (mine.max() - mine.min()))


@pytest.mark.parametrize(("settings", "stock"), [
    ({**STOCK}, True),
    ({**STOCK, "schedule": "cosine", "learn_sigma": False, "patch_size": 4}, True),
    ({}, False),
    ({"schedule": "cosine", "patch_size": 4}, False),
    ({"num_classes": 1000, "learn_sigma": False}, False),
    ({"pixels": True, "schedule": "cosine"}, False),
    ({"pixels": True, "in_channels": 1, "learn_sigma": False, "downscale_freq_shift": 1}, False),
    ({"class_dropout_prob": 0.0}, False),
    ({"num_classes": 0, "class_dropout_prob": 0.0}, False),
], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_the_image_is_the_same(settings: dict[str, Any], stock: bool, scheduler: Any, vae: Vae, tmp_path: Path) -> None:
    """Drawn there and here from the same noise, guided too. 20 steps of DPM-Solver++ visit t = 499.5, rounded."""
    trained = make_trained(**settings)
    parts = PipelineParts(trained, None if settings.get("pixels") else vae, class_names(None, trained), scheduler=scheduler)
    facts = write_pipeline(tmp_path, parts)
    assert (not facts.reasons) == stock and facts.own_transformer == (trained.config.model.downscale_freq_shift == 0)
    pipe = opened(tmp_path, stock)
    asked = {"class_labels": [3, 7]} if trained.num_classes else {"num_images": 2}
    for scale in (1.0, 2.5) if trained.config.model.class_dropout_prob else (1.0,):
        images = pipe(**asked, guidance_scale=scale, generator=noise_of(range(2)), num_inference_steps=20, output_type="np").images
        steps = "ddim20" if stock and scheduler == "ddim" else 20
        mine = ours(parts, scheduler, steps, scale, [3, 7] if trained.num_classes else [0, 0])
        assert off(mine, images) < SAME
        # What differs little is seen: other steps. In latents under the cosine schedule it is not: an untrained network's
        # first step throws them far away, and the VAE's norms bring them back.
        if settings.get("pixels") or trained.config.diffusion.schedule == "linear":
            assert off(ours(parts, scheduler, 21, scale, [3, 7] if trained.num_classes else [0, 0]), images) > SAME


def test_another_scheduler_takes_its_place(vae: Vae, tmp_path: Path) -> None:
    """As the card says."""
    for name, settings in (("stock", STOCK), ("own", {})):
        parts = PipelineParts(trained := make_trained(**settings), vae, class_names(None, trained))
        write_pipeline(tmp_path / name, parts)
        pipe = opened(tmp_path / name, name == "stock")
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
        images = pipe(class_labels=[3, 7], guidance_scale=2.0, generator=noise_of(range(2)), num_inference_steps=10, output_type="np").images
        assert off(ours(parts, "dpm++2m", 10, 2.0, [3, 7]), images) < SAME


def test_the_stock_class_is_off_as_the_facts_say(vae: Vae, tmp_path: Path) -> None:
    """With facebookresearch's frequencies."""
    parts = PipelineParts(trained := make_trained(num_classes=1000), vae, class_names(None, trained))
    facts = write_pipeline(tmp_path, parts)
    stock = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    assert difference(trained, stock) == facts.stock_off and facts.stock_off.keys() == {"0", "1", "249", "499", "999"}
    assert max(facts.stock_off.values()) > 10 * SAME > 100 * max(facts.off.values()) and facts.stock_off["0"] < SAME
    # t = 0 has the same sines and cosines at any frequency.
    pipe = diffusers.DiTPipeline(stock, vae.module, diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler"))
    pipe.scheduler.register_to_config(timestep_spacing="leading")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3, 7], guidance_scale=2.0, generator=noise_of(range(2)), num_inference_steps=20, output_type="np").images
    assert off(ours(parts, "ddim", "ddim20", 2.0, [3, 7]), images) > SAME


def test_code_is_run_only_if_it_is_trusted(vae: Vae, tmp_path: Path) -> None:
    from diffusers.utils.dynamic_modules_utils import get_cached_module_file

    if "trust_remote_code" not in inspect.signature(get_cached_module_file).parameters:
        pytest.skip("this version of diffusers runs the code of a local folder unasked")
    write_pipeline(tmp_path, PipelineParts(trained := make_trained(), vae, class_names(None, trained)))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiTPipeline.from_pretrained(tmp_path)
    # Its own class opens it too, as the code is of a subclass.
    assert type(diffusers.DiTPipeline.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "LargescaleDiTPipeline"


def test_a_vae_with_a_shift(tmp_path: Path) -> None:
    """DiTPipeline ignores it."""
    parts = PipelineParts(trained := make_trained(**STOCK), make_vae(tmp_path / "vae", shift_factor=0.3), class_names(None, trained))
    (tmp_path / "out").mkdir()
    facts = write_pipeline(tmp_path / "out", parts)
    assert "shift_factor" in facts.reasons[0] and len(facts.reasons) == 1
    images = opened(tmp_path / "out", False)(class_labels=[3, 999], guidance_scale=2.0, generator=noise_of(range(2)),
                                             num_inference_steps=10, output_type="np").images
    assert off(ours(parts, "ddim", 10, 2.0, [3, 999]), images) < SAME


@pytest.mark.parametrize("carried", [True, False])
def test_latents_normalised_by_the_data(tmp_path: Path, carried: bool) -> None:
    """As data.normalize dataset has it: the folder says so, whoever gives the VAE."""
    vae = make_vae(tmp_path / "vae", shift_factor=0.3)
    norm = Normalization(1.0, (0.5, -1.0, 0.0, 2.0), (0.5, 2.0, 1.0, 3.0))
    trained = make_trained(**STOCK)
    trained.info["data_info"] |= {"scale_factor": 1.0, "latent_mean": list(norm.mean or ()), "latent_std": list(norm.std or ()),
                                  "encoders": {"vae": vae.identity}}
    opened_vae, _ = open_vae(str(tmp_path / "vae"), trained)
    assert opened_vae is not None and opened_vae.normalization == norm
    parts = PipelineParts(trained, opened_vae if carried else None, class_names(None, trained))
    (tmp_path / "out").mkdir()
    facts = write_pipeline(tmp_path / "out", parts)
    assert any("normalised otherwise" in reason for reason in facts.reasons)
    pipe = opened(tmp_path / "out", False, **({} if carried else {"vae": vae.module}))
    images = pipe(class_labels=[3, 999], guidance_scale=2.0, generator=noise_of(range(2)), num_inference_steps=10, output_type="np").images
    x = pipe(class_labels=[3, 999], guidance_scale=2.0, generator=noise_of(range(2)), num_inference_steps=10, output_type="latent").images
    expected = opened_vae.decode(x).permute(0, 2, 3, 1).numpy() / 255
    assert np.abs(images - expected).max() < 0.6 / 255 and expected.std() > 0.01


def test_a_vae_whose_latents_a_pipeline_cannot_arrange(tmp_path: Path) -> None:
    vae = replace(make_vae(tmp_path / "vae"), patch=2)
    trained = make_trained(**STOCK)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="cannot decode by AutoencoderKL.*--vae none"):
        patch.setattr("largescale.interop.diffusers_pipeline.load_vae", lambda *_: vae)
        open_vae(str(tmp_path / "vae"), trained)


def test_without_a_vae_it_is_given_by_the_caller(vae: Vae, tmp_path: Path) -> None:
    trained = make_trained(**STOCK)
    write_pipeline(tmp_path, PipelineParts(trained, None, class_names(None, trained)))
    pipe = opened(tmp_path, False)
    with pytest.raises(ValueError, match="carries no VAE.*as vae=.*output_type='latent'"):
        pipe(class_labels=[1])
    how: dict[str, Any] = {"class_labels": [3], "guidance_scale": 2.0, "num_inference_steps": 5}
    latent = pipe(**how, generator=noise_of(range(1)), output_type="latent").images
    assert latent.shape == (1, 4, 8, 8)
    images = opened(tmp_path, False, vae=vae.module)(**how, generator=noise_of(range(1)), output_type="np").images
    assert off(ours(PipelineParts(trained, vae, ()), "ddim", 5, 2.0, [3]), images) < SAME
    # The noise can be given too.
    x = torch.randn(1, 4, 8, 8, generator=noise_of(range(1))[0])
    assert torch.equal(pipe(**how, latents=x, output_type="latent").images, latent)


def test_what_the_pipeline_refuses(vae: Vae, tmp_path: Path) -> None:
    for name, settings in (("labels", {}), ("no null", {"class_dropout_prob": 0.0}), ("none", {"num_classes": 0, "class_dropout_prob": 0.0})):
        write_pipeline(tmp_path / name, PipelineParts(trained := make_trained(**settings), vae, class_names(None, trained)))
    labelled, unguided, none = (opened(tmp_path / name, False) for name in ("labels", "no null", "none"))
    for pipe, how, says in (
        (labelled, {"class_labels": [3, 10]}, "label 10 lies outside the model's classes 0 to 9"),
        (labelled, {"class_labels": [-1]}, "label -1 lies outside"),
        (labelled, {}, "give class_labels, a list of numbers from 0 to 9"),
        (labelled, {"class_labels": [1], "num_inference_steps": 1}, "num_inference_steps=1 must lie between 2 and 1000"),
        (unguided, {"class_labels": [3], "guidance_scale": 2.0}, "without a null class.*guidance_scale=1"),
        (none, {"class_labels": [3]}, "has no labels: give num_images"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(**how)
    # By default it is guided where it can be.
    how = {"num_inference_steps": 3, "output_type": "pt"}
    four = labelled(class_labels=[3], guidance_scale=4.0, generator=noise_of(range(1)), **how).images
    assert torch.equal(labelled(class_labels=[3], generator=noise_of(range(1)), **how).images, four)
    assert unguided(class_labels=[3], **how).images.isfinite().all() and labelled(class_labels=[3], num_inference_steps=3).images[0].size == (16, 16)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_and_shards(dtype: Any, vae: Vae, tmp_path: Path) -> None:
    """Weights above the size are several files with an index, which diffusers reads."""
    parts = PipelineParts(trained := make_trained(**STOCK), vae, class_names(None, trained), dtype=dtype, max_shard_size="100KB")
    write_pipeline(tmp_path, parts)
    names = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {*names}
    stored = {name: w for file in names for name, w in load_file(tmp_path / "transformer" / file).items()}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    pipe = opened(tmp_path, True)
    for name, w in pipe.transformer.state_dict().items():
        assert stored[name].dtype == half and torch.equal(stored[name].float(), w)
    assert torch.equal(stored["proj_out_2.weight"].float(), trained.model.final_layer.linear.weight.to(half).float())


@pytest.mark.parametrize("settings", [STOCK, {}, {"pixels": True}], ids=["stock", "own", "pixels"])
def test_a_pipeline_that_computes_in_half_precision(settings: dict[str, Any], vae: Vae, tmp_path: Path) -> None:
    """As diffusers' users load it, on a GPU in float16."""
    parts = PipelineParts(trained := make_trained(**settings), None if settings.get("pixels") else vae, class_names(None, trained), dtype="bf16")
    write_pipeline(tmp_path, parts)
    images = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=settings != STOCK, torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.transformer.dtype == dtype
        images.append(pipe(class_labels=[3, 7], guidance_scale=1.5, generator=noise_of(range(2)), num_inference_steps=5, output_type="np").images)
    # Even the noise is drawn in that type, and bfloat16 has three digits.
    assert images[1].dtype == np.float32 and np.isfinite(images[1]).all() and images[1].std() > 0.01


def test_the_schedule_is_ours() -> None:
    for schedule in ("linear", "cosine"):
        trained = make_trained(schedule=schedule)
        for name in ("ddim", "dpm++2m"):
            scheduler = diffusers_pipeline.make_scheduler(PipelineParts(trained, None, (), scheduler=name))
            table = torch.from_numpy(trained.objective.tables["alphas_cumprod"])  # type: ignore[union-attr, attr-defined]
            torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-4, atol=0)


# ---- names of classes


def test_names_of_classes(tmp_path: Path, vae: Vae) -> None:
    trained = make_trained()
    assert class_names(None, trained) == tuple("0123456789")
    (tmp_path / "names.txt").write_text("\n".join(["null, nought", *"abcdefghé"]) + "\n")
    names = class_names(tmp_path / "names.txt", trained)
    write_pipeline(tmp_path / "out", PipelineParts(trained, vae, names))
    pipe = opened(tmp_path / "out", False)
    # Commas part synonyms, as in DiTPipeline.
    assert pipe.get_label_ids(["nought", "é", "null"]) == [0, 9, 0] and names[9] == "é"
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["null_class"] == 10


# ---- what cannot be exported


@pytest.mark.parametrize(("preset", "says"), [
    ("debug_sit", "no class for diffusion.objective=flow"), ("debug_edm", "no class for diffusion.objective=edm|architecture=ddpmpp"),
    ("edm_ddpmpp_cifar10", "no class for model.architecture=ddpmpp"), ("dit_s2_coco256", "no DiT that takes captions"),
])
def test_models_that_diffusers_has_no_class_for(preset: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"{says}.*leave out --format diffusers"):
        check_exportable(PRESETS[preset]())


def test_another_width_of_the_mlp() -> None:
    config = make_trained().config
    with pytest.raises(ConfigError, match="mlp_ratio=3.0"):
        check_exportable(replace(config, model=replace(config.model, mlp_ratio=3.0)))


def test_weights_that_are_not_finite(tmp_path: Path, vae: Vae) -> None:
    trained = make_trained()
    with torch.no_grad():
        trained.model.blocks[1].mlp.fc1.bias[3] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.bias are not finite"):
        write_pipeline(tmp_path, PipelineParts(trained, vae, class_names(None, trained)))


def test_a_network_that_diffusers_computes_otherwise(tmp_path: Path, vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of it may."""
    real = diffusers_pipeline.transformer_config
    monkeypatch.setattr(diffusers_pipeline, "transformer_config", lambda *a: real(*a) | {"norm_eps": 0.1})
    with pytest.raises(CheckpointError, match="diffusers' network would give other outputs"):
        write_pipeline(tmp_path, PipelineParts(trained := make_trained(), vae, class_names(None, trained)))


def test_reasons_for_code() -> None:
    trained = make_trained(pixels=True, class_dropout_prob=0.0)
    said = " ".join(reasons(PipelineParts(trained, None, ())))
    assert "divide by 128" in said and "no null class" in said and "draws pixels" in said


# ---- the VAE


def test_which_vae_is_carried(tmp_path: Path) -> None:
    vae, other = make_vae(tmp_path / "a"), make_vae(tmp_path / "b", shift_factor=0.1)
    trained = make_trained()
    trained.info["made_with"] = {"vae": str(tmp_path / "a")}
    trained.info["data_info"]["encoders"] = {"vae": vae.identity}
    found, note = open_vae(None, trained)
    assert found and found.identity == vae.identity and not note
    assert open_vae("none", trained)[0] is None and "no VAE" in open_vae("none", trained)[1]
    # The shift is no weight, so these are the same.
    assert open_vae(str(tmp_path / "b"), trained)[0].identity == other.identity  # type: ignore[union-attr]
    trained.info["data_info"]["encoders"] = {"vae": "AutoencoderKL sha256:0"}
    with pytest.raises(ConfigError, match="the model was trained with AutoencoderKL sha256:0"):
        open_vae(None, trained)
    del trained.info["made_with"]
    assert open_vae(None, trained)[0] is None
    with pytest.raises(ConfigError, match="draws pixels, which need no --vae"):
        open_vae("x", make_trained(pixels=True))


@pytest.mark.parametrize("spoil", ["gone", "a file", "weights cut short", "a text encoder", "a name on the hub"])
def test_a_vae_that_cannot_be_opened(spoil: str, tmp_path: Path) -> None:
    make_vae(tmp_path / "vae")
    where = str(tmp_path / "vae")
    if spoil == "gone":
        where = str(tmp_path / "nothing")
    elif spoil == "a file":
        where = str(tmp_path / "vae/config.json")
    elif spoil == "weights cut short":
        (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    elif spoil == "a text encoder":
        (tmp_path / "vae/config.json").write_text('{"_class_name": "CLIPTextModel"}')
    else:
        where = "nobody/nothing"
    trained = make_trained()
    trained.info["made_with"] = {"vae": where}
    with pytest.raises(DataError, match="--vae none leaves it out"):
        open_vae(None, trained)


def test_a_vae_that_diffusers_cannot_read_back(tmp_path: Path, vae: Vae) -> None:
    """As TAEF2, whose layers AutoencoderTiny does not have."""
    module = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                                       num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    module.encoder.extra = torch.nn.Linear(1, 1)
    other = replace(vae, identity="AutoencoderTiny sha256:1", module=module)
    with pytest.raises(DataError, match="cannot read back; leave it out with --vae none"):
        write_pipeline(tmp_path, PipelineParts(trained := make_trained(), other, class_names(None, trained)))
