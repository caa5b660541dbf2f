"""DDPM++, the U-Net of Song et al., arXiv:2011.13456, as Karras et al. train it, arXiv:2206.00364
(EDM), with the parameter names of EDM's released networks below their prefix `model.` (`from_edm`).

In half precision the blocks run in the weights' type, but for the softmax of their attention. The
embeddings, the first convolution, which must not round away the little noise of a small sigma, and
the last norm and convolution compute in float32; where the weights are float32 every cast here does
nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from largescale.condition import Captions, Condition
from largescale.errors import ConfigError
from largescale.models.embedders import LinearFp32

# The factor of a sum of two branches, with which the variance stays as it is.
HALF_POWER = math.sqrt(0.5)


def positional_embedding(c_noise: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (N,) -> (N, dim) float32: sines, then cosines, at wavelengths from 2 pi
    to 20000 pi, both included."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=c_noise.device) / (dim // 2 - 1)
    angles = c_noise.float()[:, None] * (1 / 10000) ** exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv2d(nn.Conv2d):
    """A convolution that keeps height and width, and computes in its input's type, whatever type
    the weights have."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class GroupNorm(nn.GroupNorm):
    """A norm of 32 groups, or of groups of 4 channels where that makes fewer. Computes in its
    input's type."""

    def __init__(self, channels: int):
        groups = min(32, channels // 4)
        if groups == 0 or channels % groups:
            raise ConfigError(
                f"a group norm of {channels} channels cannot have {max(groups, 1)} groups of equal "
                "size, 4 channels or more; choose model_channels a multiple of 32, or of 4 with "
                "fewer than 128 channels everywhere"
            )
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(
            x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class UNetBlock(nn.Module):
    """A residual block: x (N, C, H, W) and emb (N, E) float32 -> (N, out_channels, H', W') in x's
    type, H' = H, H / 2 or 2 H. In the decoder x is joined with `encoded`, (N, in_channels - C, H,
    W). Dropout draws from torch's global generator."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        *,
        attention: bool = False,
        resample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.attention, self.resample = dropout, attention, resample
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3)
        self.affine = LinearFp32(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        # As EDM's, a block that resamples has a skip convolution, also where it is not needed.
        self.skip: Conv2d | None = None
        if resample or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1)
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, encoded: Tensor | None = None) -> Tensor:
        if encoded is not None:
            x = torch.cat([x, encoded], dim=1)

        # The residual branch, with the noise level added between its convolutions.
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        h = h + self.affine(emb).to(h.dtype)[:, :, None, None]
        h = self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training))
        shortcut = x if self.skip is None else self.skip(self._resampled(x))
        x = (h + shortcut) * HALF_POWER
        if self.attention:
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * HALF_POWER
        return x

    def _resampled(self, x: Tensor) -> Tensor:
        """x at half or twice the resolution, or as it is."""
        # EDM's filter [1, 1]: the mean of each 2 x 2 pixels, or each pixel four times.
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention with one head over all channels: (N, 3 C, H, W), q, k and v of a channel side
        by side, -> (N, C, H, W)."""
        n, _, height, width = qkv.shape
        qkv = qkv.reshape(n, 1, -1, 3, height * width)
        qkv = qkv.permute(3, 0, 1, 4, 2)  # (3, N, 1, T, C), T = H * W
        # Fused kernels need the channels contiguous.
        q, k, v = qkv.contiguous()
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, -1, height, width)


Level = tuple[int, int, bool]
"""(resolution, channels, with attention?), of the image's resolution first."""


def encoder(
    levels: Sequence[Level],
    num_blocks: int,
    in_channels: int,
    width: int,
    block: Callable[..., UNetBlock],
) -> tuple[nn.ModuleDict, list[int]]:
    """The layers of the way down, and the channels of each one's output, which the decoder takes.
    `width`: channels after the first convolution."""
    # Layers have EDM's names, so that its released weights fit.
    first = levels[0][0]
    enc = nn.ModuleDict({f"{first}x{first}_conv": Conv2d(in_channels, width, 3)})
    widths = [width]
    for resolution, channels, attention in levels:
        size = f"{resolution}x{resolution}"
        if resolution != first:
            enc[f"{size}_down"] = block(width, width, resample="down")
            widths.append(width)
        for i in range(num_blocks):
            enc[f"{size}_block{i}"] = block(width, channels, attention=attention)
            width = channels
            widths.append(width)
    return enc, widths


def decoder(
    levels: Sequence[Level],
    num_blocks: int,
    out_channels: int,
    widths: list[int],
    block: Callable[..., UNetBlock],
) -> nn.ModuleDict:
    """The layers of the way up; each block takes the encoder's last output that is left."""
    last = levels[-1][0]
    width = widths[-1]
    size = f"{last}x{last}"
    dec = nn.ModuleDict(
        {
            f"{size}_in0": block(width, width, attention=True),
            f"{size}_in1": block(width, width),
        }
    )

    # A block more than in the encoder, as that has one more output for each resolution.
    left = list(widths)
    for resolution, channels, has_attention in reversed(levels):
        size = f"{resolution}x{resolution}"
        if resolution != last:
            dec[f"{size}_up"] = block(width, width, resample="up")
        for i in range(num_blocks + 1):
            attention = has_attention and i == num_blocks
            dec[f"{size}_block{i}"] = block(width + left.pop(), channels, attention=attention)
            width = channels
    dec[f"{size}_aux_norm"] = GroupNorm(width)
    dec[f"{size}_aux_conv"] = Conv2d(width, out_channels, 3)
    return dec


class DDPMpp(nn.Module):
    """The raw network F of EDM's preconditioning (its eq. 7), which is the objective's."""

    checkpoint_blocks: bool = False
    """Keep each block's input only, and compute the block again in the backward pass."""
    learn_sigma = False
    y_embedder = None

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.13,
        augment_dim: int = 0,
    ):
        """`input_size`: height and width of the image. `num_classes` and `augment_dim`: 0 for none.
        Dropping labels is the caller's, who passes the null label `num_classes`. Weights are drawn
        from torch's global generator."""
        super().__init__()
        resolutions = check_sizes(
            input_size, model_channels, channel_mult, num_blocks, attn_resolutions
        )
        check_ranges(num_classes, augment_dim, dropout)
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = in_channels
        self.num_classes = num_classes
        self.model_channels = model_channels
        self.augment_dim = augment_dim

        # The embedding of noise level, label and augmentation.
        emb = 4 * model_channels
        self.map_label: LinearFp32 | None = None
        self.map_augment: nn.Linear | None = None
        if num_classes:
            self.map_label = LinearFp32(num_classes, model_channels)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = LinearFp32(model_channels, emb)
        self.map_layer1 = LinearFp32(emb, emb)

        # From the image's resolution down and up again.
        levels: list[Level] = []
        for resolution, mult in zip(resolutions, channel_mult, strict=True):
            levels.append((resolution, mult * model_channels, resolution in attn_resolutions))
        block = partial(UNetBlock, emb_channels=emb, dropout=dropout)
        self.enc, widths = encoder(levels, num_blocks, in_channels, model_channels, block)
        self.dec = decoder(levels, num_blocks, self.out_channels, widths, block)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialises as EDM does: xavier_uniform, with a block's last convolution, its attention
        and the output close to 0."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            last = name.rpartition(".")[2]
            gain = 1.0
            if last in ("conv1", "proj") or last.endswith("aux_conv"):
                gain = 1e-5
            elif last == "qkv":
                gain = math.sqrt(0.2)
            nn.init.xavier_uniform_(module.weight, gain=gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[UNetBlock]:
        """The residual blocks, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    @property
    def compute_type(self) -> torch.dtype:
        """The type of the blocks' convolutions."""
        return next(p for p in self.dec.parameters() if p.ndim == 4).dtype

    def forward(
        self, x: Tensor, t: Tensor, y: Condition, augment_labels: Tensor | None = None
    ) -> Tensor:
        """F(x), (N, C, H, W) float32, from x (N, C, H, W) of any float type; t (N,), EDM's c_noise
        = ln(sigma) / 4; y (N,) int64, ignored without classes; and augment_labels (N, augment_dim),
        None for images as they are."""
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ConfigError(
                f"this model takes (N, {self.in_channels}, {self.input_size}, {self.input_size}), "
                f"got {tuple(x.shape)}; set input_size and in_channels to the data's"
            )
        emb = self.embedding(t, y, augment_labels)  # (N, 4 * model_channels)
        first, *encoder = self.enc.values()
        *decoder, last_norm, last_conv = self.dec.values()

        # The way down keeps every output.
        x = first(x.float()).to(self.compute_type)
        encoded = [x]
        for block in encoder:
            x = self._run(block, x, emb, None)
            encoded.append(x)

        # The way up takes them back, where a block has more inputs than x has channels.
        for block in decoder:
            assert isinstance(block, UNetBlock)
            x = self._run(block, x, emb, encoded.pop() if block.in_channels > x.shape[1] else None)
        return last_conv(F.silu(last_norm(x.float())))

    def embedding(self, t: Tensor, y: Condition, augment_labels: Tensor | None) -> Tensor:
        """The embedding of noise level, label and augmentation, (N, 4 * model_channels) float32."""
        if isinstance(y, Captions):
            raise ConfigError(
                "this model takes labels and was given captions; choose data with labels, or "
                "architecture=dit"
            )
        emb = positional_embedding(t, self.model_channels)
        # The null label, num_classes, is the zero vector where others are one-hot.
        if self.map_label is not None:
            one_hot = F.embedding(
                y, torch.eye(self.num_classes + 1, self.num_classes, device=y.device)
            )
            emb = emb + self.map_label(one_hot * math.sqrt(self.num_classes))  # (N, num_classes)
        if augment_labels is not None:
            if self.map_augment is None or augment_labels.shape != (len(t), self.augment_dim):
                raise ConfigError(
                    f"this model takes augment labels ({len(t)}, {self.augment_dim}), got "
                    f"{tuple(augment_labels.shape)}; set augment_dim to their number, or pass None"
                )
            emb = emb + F.linear(augment_labels.float(), self.map_augment.weight.float())
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor, encoded: Tensor | None) -> Tensor:
        # Computed again in the backward pass, with the same dropout.
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, emb, encoded, use_reentrant=False, preserve_rng_state=True)
        return block(x, emb, encoded)


def check_sizes(
    input_size: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    num_blocks: int,
    attn_resolutions: Iterable[int],
) -> list[int]:
    """The resolution of each level, from the image's down. Raises ConfigError for a network that
    cannot be built; the widths of its group norms are their own to check."""
    if not channel_mult or min(channel_mult) < 1 or num_blocks < 1:
        raise ConfigError(
            f"channel_mult={channel_mult} and num_blocks={num_blocks} must be one or more numbers "
            "from 1 up; EDM's are (2, 2, 2) and 4 for CIFAR-10"
        )
    if model_channels < 4 or model_channels % 4:
        raise ConfigError(f"model_channels={model_channels} is not a multiple of 4; EDM uses 128")

    # Each level after the first halves the resolution.
    step = 2 ** (len(channel_mult) - 1)
    if input_size < 1 or input_size % step:
        raise ConfigError(
            f"input_size={input_size} cannot be halved {len(channel_mult) - 1} times, once a level "
            f"of channel_mult={channel_mult}; try input_size {max(input_size // step, 1) * step}, "
            "or fewer levels"
        )
    resolutions = [input_size >> level for level in range(len(channel_mult))]
    if missing := sorted(set(attn_resolutions) - set(resolutions)):
        raise ConfigError(
            f"attn_resolutions has {missing[0]}, and no level of this network has that resolution; "
            f"choose among {resolutions}"
        )
    return resolutions


def check_ranges(num_classes: int, augment_dim: int, dropout: float) -> None:
    """Raises ConfigError for numbers that no network has."""
    for name, count in {"num_classes": num_classes, "augment_dim": augment_dim}.items():
        if count < 0:
            raise ConfigError(f"{name}={count} is negative; set 0 for none")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout} is not in [0, 1); set 0 for none")


def from_edm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a released EDM network under our names."""
    # Without its resampling filters, which are constant.
    renamed = {}
    for name, value in state.items():
        if "resample_filter" not in name:
            renamed[name.removeprefix("model.")] = value
    return renamed


def flops_per_image(model: DDPMpp) -> int:
    """Floating-point operations of one forward pass per image, with augment labels where the model
    takes them: two per multiply-add, convolutions and matrix products only."""
    total = 0
    for name, p in model.named_parameters():
        if name.startswith("map_") and p.ndim == 2:
            total += 2 * p.numel()

    # A layer's name starts with its resolution. A block resamples first.
    for name, part in (*model.enc.items(), *model.dec.items()):
        pixels = int(name.partition("x")[0]) ** 2
        for module in part.modules():
            if isinstance(module, Conv2d):
                total += 2 * module.weight.numel() * pixels
            elif isinstance(module, LinearFp32):
                total += 2 * module.weight.numel()
            elif isinstance(module, UNetBlock) and module.attention:
                total += 4 * pixels**2 * module.out_channels
    return total
