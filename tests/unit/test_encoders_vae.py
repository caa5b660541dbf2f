import json
import os
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from largescale.encoders import identity
from largescale.encoders.identity import weights_identity
from largescale.encoders.vae import load_vae
from largescale.errors import DataError
from tests.lazy import Lazy

diffusers = Lazy("diffusers")

CPU = torch.device("cpu")
SHARED = Path(os.environ.get("LARGESCALE_SHARED") or Path(__file__).parents[2].parent / "shared")
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def kl(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config).eval()


def images(n: int = 3, side: int = 16) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def save_taesd(folder: Path, vae: Any, name: str = "taesd") -> None:
    """In TAESD's own layout, where the decoder's first layer has no weights."""
    folder.mkdir(exist_ok=True)
    torch.save(vae.encoder.layers.state_dict(), folder / f"{name}_encoder.pth")
    decoder = {f"{int(k.split('.')[0]) + 1}.{k.split('.', 1)[1]}": v for k, v in vae.decoder.layers.state_dict().items()}
    torch.save(decoder, folder / f"{name}_decoder.pth")


@pytest.mark.parametrize("shift", [None, 0.25])
def test_moments_are_the_posterior_of_the_shifted_latent(tmp_path: Path, shift: float | None) -> None:
    reference = kl(scaling_factor=0.5, shift_factor=shift)
    reference.save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path), CPU)
    assert (vae.kind, vae.latent_channels, vae.downsampling, vae.scale_factor) == ("moments", 4, 2, 0.5)
    moments = vae.encode(images())
    assert moments.dtype == torch.float16 and tuple(moments.shape[1:]) == vae.stored_shape(16) == (8, 8, 8)
    with torch.no_grad():
        expected = reference.encode(images().float() / 127.5 - 1).latent_dist.parameters
    expected[:, :4] -= shift or 0
    torch.testing.assert_close(moments.float(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shift", [None, 0.25])
def test_decoding_undoes_scale_and_shift(tmp_path: Path, shift: float | None) -> None:
    reference = kl(scaling_factor=0.5, shift_factor=shift)
    reference.save_pretrained(tmp_path)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 3
    decoded = load_vae(str(tmp_path), CPU).decode((latent - (shift or 0)) * 0.5)
    with torch.no_grad():
        expected = ((reference.decode(latent).sample + 1) * 127.5).clamp(0, 255)
    assert decoded.dtype == torch.uint8 and decoded.shape == (2, 3, 16, 16)
    assert (decoded.float() - expected).abs().max() <= 0.5001       # rounded, not cut off


def test_half_precision_computes_nearly_the_same(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path)
    full, half = (load_vae(str(tmp_path), CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.module.dtype == half.dtype == torch.bfloat16 and half.identity == full.identity
    a, b = full.encode(images()).float(), half.encode(images()).float()
    assert not a.equal(b) and (a - b).abs().mean() < 0.02 * a.abs().mean()


def test_the_same_weights_have_one_identity(tmp_path: Path) -> None:
    vae = kl()
    vae.save_pretrained(tmp_path / "one")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "diffusion_pytorch_model.bin").exists()
    kl(seed=1).save_pretrained(tmp_path / "other")
    one, pipeline, pickled, other = (
        load_vae(str(tmp_path / n), CPU).identity for n in ("one", "pipeline", "pickled", "other"))
    assert one == pipeline == pickled != other
    assert one.startswith("AutoencoderKL sha256:") and len(one) == len("AutoencoderKL sha256:") + 16


def test_taesd_files_and_diffusers_folder_are_one_vae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = diffusers.AutoencoderTiny(latent_channels=16).eval()
    reference.save_pretrained(tmp_path / "diffusers")
    save_taesd(tmp_path / "taesd", reference, "taef1")
    vae, same = load_vae(str(tmp_path / "taesd"), CPU), load_vae(str(tmp_path / "diffusers"), CPU)
    assert vae.identity == same.identity and (vae.kind, vae.latent_channels, vae.downsampling) == ("latents", 16, 8)
    latent = vae.encode(images(side=32))
    assert latent.equal(same.encode(images(side=32))) and tuple(latent.shape[1:]) == vae.stored_shape(32) == (16, 4, 4)
    with torch.no_grad():
        expected = reference.encode(images(side=32).float() / 127.5 - 1).latents
    torch.testing.assert_close(latent.float(), expected, atol=1e-3, rtol=1e-3)


def test_identity_is_of_names_and_values_alone() -> None:
    def identity(*layers: tuple[str, nn.Module]) -> str:
        return weights_identity(nn.Sequential(OrderedDict(layers)))

    torch.manual_seed(0)
    a, b = nn.Linear(2, 3).half(), nn.Linear(3, 2)
    one = identity(("a", a), ("b", b))
    assert one == identity(("b", b), ("a", a)) == identity(("a", deepcopy(a).float()), ("b", b))
    assert one != identity(("b", a), ("a", b))


def test_loading_prints_nothing(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path, safe_serialization=False)        # about which diffusers has much to say
    save_taesd(tmp_path / "taesd", diffusers.AutoencoderTiny())
    program = "import sys, torch; from largescale.encoders.vae import load_vae; from largescale.encoders import identity; " \
              "identity.SAID_AFTER_S = 1000; [load_vae(folder, torch.device('cpu'), torch.bfloat16) for folder in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "taesd"], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout + done.stderr == ""


def test_a_load_that_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As where there is no network: the hub is asked for a minute."""
    monkeypatch.setattr(identity, "SAID_AFTER_S", 0.01)
    with pytest.raises(DataError, match="a/b cannot be loaded .*; give a folder"):
        with identity.loading("a/b", "give a folder"):
            said = ""
            while "still loading a/b: it may be downloaded" not in said:
                said += capsys.readouterr().err
                time.sleep(0.01)
            raise OSError("no network")


def test_a_folder_that_takes_long_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity, "SAID_AFTER_S", 0.01)
    said = ""
    with identity.loading(f"hf:{tmp_path}", "give a folder"):
        while not said:
            said = capsys.readouterr().err
            time.sleep(0.01)
    assert said == f"still loading hf:{tmp_path}\n"


def test_resolution_that_does_not_divide(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="resolution 17 is not a multiple of 2.*try 16 or 18"):
        load_vae(str(tmp_path), CPU).stored_shape(17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_beyond_float16(tmp_path: Path, dtype: torch.dtype) -> None:
    vae = kl()
    vae.quant_conv.weight.data *= 1e6
    vae.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="not finite" + ("" if dtype == torch.float32 else ".*try float32")):
        load_vae(str(tmp_path), CPU, dtype).encode(images())


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pickle-was-run"),)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def edit_config(key: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return edit


def malicious(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(kl().state_dict() | {"malice": Malice()}, folder / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(("damage", "message"), [
    (empty, "neither config.json .* nor NAME_encoder.pth and NAME_decoder.pth"),
    (edit_config("_class_name", "VQModel"), "is of class VQModel; the VAEs that work are AutoencoderKL, AutoencoderTiny, AutoencoderDC"),
    (edit_config("layers_per_block", 2), "do not fit its config.json: .* missing or too many"),
    (edit_config("mid_block_add_attention", False), "do not fit its config.json: .* missing or too many"),
    (edit_config("latent_channels", 8), "cannot be loaded .*(size mismatch|expected shape).*fetch the folder anew"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded .*fetch the folder anew"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded .Error no file named"),
    (truncated, "cannot be loaded"),
    (malicious, "cannot be loaded .*nsupported"),
])
def test_damaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    kl().save_pretrained(tmp_path / "vae")
    damage(tmp_path / "vae")
    with pytest.raises(DataError, match=message):
        load_vae(str(tmp_path / "vae"), CPU)
    assert not Path("pickle-was-run").exists()


def other_shape(folder: Path) -> None:
    weights = torch.load(folder / "taesd_decoder.pth") | {"1.weight": torch.zeros(64, 9, 3, 3)}
    torch.save(weights, folder / "taesd_decoder.pth")


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "taesd_decoder.pth").unlink(), "taesd_decoder.pth is missing"),
    (lambda folder: shutil.copy(folder / "taesd_encoder.pth", folder / "taef1_encoder.pth"), "several.*taef1, taesd"),
    (lambda folder: torch.save({"0.weight": Malice()}, folder / "taesd_encoder.pth"), "cannot be loaded .*nsupported"),
    (lambda folder: torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, folder / "taesd_encoder.pth"), "cannot be loaded .*Missing key"),
    (other_shape, "cannot be loaded .*(size mismatch|expected shape)"),
])
def test_damaged_taesd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    save_taesd(tmp_path / "vae", diffusers.AutoencoderTiny())
    damage(tmp_path / "vae")
    with pytest.raises(DataError, match=message):
        load_vae(str(tmp_path / "vae"), CPU)
    assert not Path("pickle-was-run").exists()


def test_names_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nobody/has-this-vae cannot be loaded .*without a network give a local folder: --vae DIR "
                                        "with config.json and the weights, as `hf download NAME --local-dir DIR` makes it"):
        load_vae("nobody/has-this-vae", CPU)
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DataError, match="is not a folder; give one: --vae DIR"):
            load_vae(str(path), CPU)


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kl().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DataError, match=r"diffusers is not installed; in the clone: pip install -e '\.\[prep\]'"):
        load_vae(str(tmp_path), CPU)


def taesd_directly(weights: Weights, x: Tensor, encoder: bool) -> Tensor:
    """TAESD from its description, without diffusers: layers in the order of their numbers."""
    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    if not encoder:
        x = torch.tanh(x / 3) * 3
    for i in sorted({int(name.split(".")[0]) for name in weights}):
        if f"{i}.conv.0.weight" in weights:
            if f"{i}.pool.0.weight" in weights:
                pooled = F.group_norm(conv(f"{i}.pool.0", x), 4, weights[f"{i}.pool.1.weight"], weights[f"{i}.pool.1.bias"])
                x = x + conv(f"{i}.pool.3", pooled.relu())
            x = (x + conv(f"{i}.conv.4", conv(f"{i}.conv.2", conv(f"{i}.conv.0", x).relu()).relu())).relu()
        elif f"{i}.bias" not in weights:                                # from one resolution to the next
            x = conv(str(i), x, stride=2) if encoder else conv(str(i), F.interpolate(x, scale_factor=2))
        else:
            x = conv(str(i), x) if encoder or i > 1 else conv(str(i), x).relu()
    return x


def psnr(a: Tensor, b: Tensor) -> np.ndarray:
    """(B, ...) in [0, 255] -> (B,) in dB."""
    return (10 * torch.log10(255**2 / (a.float() - b.float()).square().flatten(1).mean(dim=1))).numpy()


def test_taef2_does_what_its_authors_say() -> None:
    folder, pictures = SHARED / "data" / "taef2", SHARED / "data" / "imagenet1k-sample" / "images"
    if not folder.is_dir() or not pictures.is_dir():
        pytest.skip(f"no {folder} or no {pictures}; set LARGESCALE_SHARED")
    originals = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
                             for path in sorted(pictures.iterdir())[::125]])      # (8, 3, 256, 256)
    vae = load_vae(str(folder), CPU)
    assert (vae.kind, vae.latent_channels, vae.downsampling, vae.scale_factor) == ("latents", 32, 8, 1.0)
    latents = vae.encode(originals)
    restored = vae.decode(latents.float() * vae.scale_factor)

    encoder, decoder = ({k: v.float() for k, v in torch.load(folder / f"taef2_{part}.pth", weights_only=True).items()}
                        for part in ("encoder", "decoder"))
    with torch.inference_mode():
        expected = taesd_directly(encoder, originals.float() / 255, encoder=True)
        direct = taesd_directly(decoder, expected, encoder=False).clamp(0, 1) * 255
    torch.testing.assert_close(latents.float(), expected, atol=2e-3, rtol=2e-3)
    assert np.abs(psnr(originals, restored) - psnr(originals, direct)).max() < 0.1
    assert abs(psnr(originals, restored).mean() - 29.79) < 2, "PROVENANCE.txt: 29.79 dB over 40 images"
