"""Every class of autoencoder, small and random: what its config says of its latents, and that coding follows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largescale.encoders.normalization import Normalization
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import DataError
from tests.lazy import Lazy

diffusers = Lazy("diffusers")

CPU = torch.device("cpu")
KL: dict[str, Any] = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def flux(**config: Any) -> Any:
    """As Flux's and SD3's: 16 channels, a shift, no quant_conv."""
    return diffusers.AutoencoderKL(**KL | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
                                           "use_quant_conv": False, "use_post_quant_conv": False} | config)


def with_statistics() -> Any:
    return diffusers.AutoencoderKL(**KL, latent_channels=3, scaling_factor=0.5, latents_mean=(1.0, -2.0, 0.5), latents_std=(2.0, 0.5, 3.0))


def dc() -> Any:
    """As DC-AE f32c32: six resolutions, 32 times down, nothing drawn."""
    widths = (8, 8, 8, 8, 8, 32)
    return diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1), encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.3189)


def rae() -> Any:
    model = diffusers.AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=8, encoder_num_hidden_layers=1, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16, patch_size=16, encoder_input_size=32,
        latents_mean=torch.full((64, 1, 1), 0.25), latents_std=torch.full((64, 1, 1), 2.0))
    model.decoder.decoder_pred.bias.data.fill_(0.5)
    return model


def flux2() -> Any:
    model = diffusers.AutoencoderKLFlux2(**KL, latent_channels=4)
    model.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    model.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return model


def hunyuan() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 64), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=32, scaling_factor=0.75)


def asymmetric() -> Any:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, scaling_factor=0.18)


def tiny() -> Any:
    return diffusers.AutoencoderTiny(latent_channels=16, shift_factor=0.0, scaling_factor=1.5)


def opened(folder: Path, make: Callable[[], Any]) -> tuple[Any, Vae]:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder)
    return model, load_vae(str(folder), CPU)


@pytest.mark.parametrize(("make", "kind", "channels", "downsampling", "scale", "side"), [
    (flux, "moments", 16, 2, 0.3611, 16), (with_statistics, "moments", 3, 2, 0.5, 16), (dc, "latents", 32, 32, 0.3189, 64),
    (rae, "latents", 64, 16, 1.0, 64), (flux2, "moments", 16, 4, 1.0, 16), (hunyuan, "moments", 16, 4, 0.75, 16),
    (asymmetric, "moments", 4, 2, 0.18, 16), (tiny, "latents", 16, 8, 1.5, 32)])
def test_every_class_says_what_its_latents_are(
        tmp_path: Path, make: Callable[[], Any], kind: str, channels: int, downsampling: int, scale: float, side: int) -> None:
    model, vae = opened(tmp_path, make)
    assert (vae.kind, vae.latent_channels, vae.downsampling, vae.scale_factor) == (kind, channels, downsampling, scale)
    images = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stored = vae.encode(images)
    assert stored.dtype == torch.float16 and tuple(stored.shape[1:]) == vae.stored_shape(side)
    assert vae.identity.startswith(f"{type(model).__name__} sha256:") and vae.decoding_bytes(side) > 0 and vae.nbytes > 0

    # What the model itself restores of its own latents is what ours does of x_start.
    x_start = vae.normalization.apply(stored.float().chunk(2, 1)[0] if kind == "moments" else stored.float())
    pixels = images.float() / 255 if make is rae else images.float() / 127.5 - 1
    with torch.no_grad():
        encoded = model.encode(pixels, return_dict=False)[0]
        restored = model.decode(encoded.mode() if kind == "moments" else encoded, return_dict=False)[0]
    expected = (restored * 255 if make is rae else (restored + 1) * 127.5).clamp(0, 255)
    assert x_start.shape[1:] == (channels, side // downsampling, side // downsampling)
    assert (vae.decode(x_start).float() - expected).abs().max() <= 1.6, "rounded, from float16 latents"
    assert expected.std() > 0.5


def test_x_start_is_what_diffusers_pipelines_make_of_a_latent(tmp_path: Path) -> None:
    """Each as diffusers' pipelines of that model write it."""
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)

    def both(make: Callable[[], Any], theirs: Callable[[Any, Tensor], Tensor]) -> None:
        model, vae = opened(tmp_path / make.__name__, make)
        with torch.no_grad():
            expected = theirs(model, model.encode(images.float() / 127.5 - 1).latent_dist.mode())
        ours = vae.normalization.apply(vae.encode(images).float()[:, : vae.latent_channels])
        torch.testing.assert_close(ours, expected, atol=4e-3, rtol=4e-3)

    both(flux, lambda model, z: (z - model.config.shift_factor) * model.config.scaling_factor)
    both(with_statistics, lambda model, z: (z - torch.tensor(model.config.latents_mean).view(1, 3, 1, 1)) * model.config.scaling_factor
         / torch.tensor(model.config.latents_std).view(1, 3, 1, 1))

    def of_flux2(model: Any, z: Tensor) -> Tensor:
        b, c, h, w = z.shape
        z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        return (z - model.bn.running_mean.view(1, -1, 1, 1)) / torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)

    both(flux2, of_flux2)


def test_flux2_keeps_its_statistics_in_float32(tmp_path: Path) -> None:
    _, vae = opened(tmp_path, flux2)
    assert load_vae(str(tmp_path), CPU, torch.bfloat16).normalization == vae.normalization


def test_rae_takes_one_resolution_and_is_named_with_its_statistics(tmp_path: Path) -> None:
    model, vae = opened(tmp_path / "a", rae)
    with pytest.raises(DataError, match="resolution 128 is not the 64 pixels that this AutoencoderRAE was made for; try 64"):
        vae.stored_shape(128)
    model._latents_std.mul_(2)
    model.save_pretrained(tmp_path / "b")
    assert load_vae(str(tmp_path / "b"), CPU).identity != vae.identity, "the same weights, other latents"


@pytest.mark.parametrize("statistics", [
    {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}, {"latents_mean": (0.0,) * 16, "latents_std": (0.0,) * 16}])
def test_statistics_of_another_encoder_in_a_config(tmp_path: Path, statistics: dict[str, Any]) -> None:
    flux(**statistics).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="latents_mean and latents_std .* the latents 16 channels.*another encoder's"):
        load_vae(str(tmp_path), CPU)


def test_normalization_is_undone() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for norm in (Normalization(0.18215), Normalization(0.5, (1.0, -2.0, 0.0), (2.0, 0.5, 1.0))):
        torch.testing.assert_close(norm.undo(norm.apply(x)), x)
    assert Normalization(0.18215).apply(x).equal(x * 0.18215), "bitwise what it was before there were means"


class LdmAttention(nn.Module):
    """Self-attention as in latent-diffusion: convolutions of one pixel."""

    def __init__(self, n: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(self.norm(x)).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class LdmBlock(nn.Module):
    def __init__(self, n: int, m: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, n, eps=1e-6), nn.GroupNorm(32, m, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(n, m, 3, padding=1), nn.Conv2d(m, m, 3, padding=1)
        if n != m:
            self.nin_shortcut = nn.Conv2d(n, m, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def parts(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


class Ldm(nn.Module):
    """latent-diffusion's VAE with VA-VAE's attention at the lowest resolution: two resolutions, 32 and 64 channels, 8 of latents."""

    def __init__(self) -> None:
        super().__init__()
        middle = {"block_1": LdmBlock(64, 64), "attn_1": LdmAttention(64), "block_2": LdmBlock(64, 64)}
        self.encoder = parts(
            conv_in=nn.Conv2d(3, 32, 3, padding=1),
            down=nn.ModuleList([
                parts(block=nn.ModuleList([LdmBlock(32, 32)]), attn=nn.ModuleList(), downsample=parts(conv=nn.Conv2d(32, 32, 3, stride=2))),
                parts(block=nn.ModuleList([LdmBlock(32, 64)]), attn=nn.ModuleList([LdmAttention(64)]))]),
            mid=parts(**middle), norm_out=nn.GroupNorm(32, 64, eps=1e-6), conv_out=nn.Conv2d(64, 16, 3, padding=1))
        middle = {"block_1": LdmBlock(64, 64), "attn_1": LdmAttention(64), "block_2": LdmBlock(64, 64)}
        self.decoder = parts(
            conv_in=nn.Conv2d(8, 64, 3, padding=1), mid=parts(**middle),
            up=nn.ModuleList([
                parts(block=nn.ModuleList([LdmBlock(64, 32), LdmBlock(32, 32)]), attn=nn.ModuleList()),
                parts(block=nn.ModuleList([LdmBlock(64, 64), LdmBlock(64, 64)]), attn=nn.ModuleList([LdmAttention(64), LdmAttention(64)]),
                      upsample=parts(conv=nn.Conv2d(64, 64, 3, padding=1)))]),
            norm_out=nn.GroupNorm(32, 32, eps=1e-6), conv_out=nn.Conv2d(32, 3, 3, padding=1))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(16, 16, 1), nn.Conv2d(8, 8, 1)

    def encode(self, x: Tensor) -> Tensor:
        e: Any = self.encoder
        h = e.down[0].block[0](e.conv_in(x))
        h = e.down[0].downsample.conv(F.pad(h, (0, 1, 0, 1)))
        h = e.down[1].attn[0](e.down[1].block[0](h))
        h = e.mid.block_2(e.mid.attn_1(e.mid.block_1(h)))
        moments: Tensor = self.quant_conv(e.conv_out(F.silu(e.norm_out(h))))
        return moments

    def decode(self, z: Tensor) -> Tensor:
        d: Any = self.decoder
        h = d.conv_in(self.post_quant_conv(z))
        h = d.mid.block_2(d.mid.attn_1(d.mid.block_1(h)))
        for level in (1, 0):
            for i, block in enumerate(d.up[level].block):
                h = block(h)
                if len(d.up[level].attn):
                    h = d.up[level].attn[i](h)
            if level:
                h = d.up[level].upsample.conv(F.interpolate(h, scale_factor=2.0))
        image: Tensor = d.conv_out(F.silu(d.norm_out(h)))
        return image


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_a_file_of_latent_diffusion(tmp_path: Path, key: str | None) -> None:
    """VA-VAE's files have state_dict, and its discriminator and foundation model beside it; MAR's have model."""
    torch.manual_seed(0)
    reference = Ldm().eval()
    weights = {**reference.state_dict(), "loss.discriminator.w": torch.zeros(2), "foundation_model.model.w": torch.zeros(2)}
    torch.save({key: weights} if key else weights, tmp_path / "vae.pt")
    vae = load_vae(str(tmp_path / "vae.pt"), CPU)
    assert (vae.kind, vae.latent_channels, vae.downsampling, vae.normalization) == ("moments", 8, 2, Normalization())
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        moments = reference.encode(images.float() / 127.5 - 1)
        decoded = ((reference.decode(moments[:, :8]) + 1) * 127.5).clamp(0, 255)
    torch.testing.assert_close(vae.encode(images).float(), moments, atol=1e-3, rtol=1e-3)
    assert (vae.decode(moments[:, :8]).float() - decoded).abs().max() <= 0.51 and decoded.std() > 1


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save({"encoder.x": torch.zeros(1)}, tmp_path / "vae.pt")
    with pytest.raises(DataError, match="has no weights of a VAE under the names of latent-diffusion"):
        load_vae(str(tmp_path / "vae.pt"), CPU)
    torch.save({k: v for k, v in Ldm().state_dict().items() if "mid.block_2" not in k}, tmp_path / "vae.pt")
    with pytest.raises(DataError, match=r"vae\.pt cannot be loaded .*[Mm]issing"):
        load_vae(str(tmp_path / "vae.pt"), CPU)
