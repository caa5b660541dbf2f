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

HALF_POWER = math.sqrt(0.5)  # of a sum of two branches: the variance stays


def positional_embedding(c_noise: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim) float32: sines, then cosines, at wavelengths from 2 pi to 20000 pi, both
    included."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=c_noise.device) / (dim // 2 - 1)
    angles = c_noise.float()[:, None] * (1 / 10000) ** exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv2d(nn.Conv2d):
    """Keeps height and width. Computes in its input's type, whatever type the weights have."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class GroupNorm(nn.GroupNorm):
    """Of 32 groups, or of 4 channels each where there are fewer. Computes in its input's type."""

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
    """x (N, C, H, W) and emb (N, E) float32 -> (N, out_channels, H', W') in x's type, H' = H, H / 2
    or 2 H. In the decoder x is joined with `encoded`, (N, in_channels - C, H, W). Dropout draws
    from torch's global generator."""

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
        self.skip = (
            Conv2d(in_channels, out_channels, 1)
            if resample or in_channels != out_channels
            else None
        )
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, encoded: Tensor | None = None) -> Tensor:
        if encoded is not None:
            x = torch.cat([x, encoded], dim=1)
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        h = h + self.affine(emb).to(h.dtype)[:, :, None, None]
        h = self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(self._resampled(x)))) * HALF_POWER
        if self.attention:
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * HALF_POWER
        return x

    def _resampled(self, x: Tensor) -> Tensor:
        """By EDM's filter [1, 1]: the mean of each 2 x 2 pixels, or each pixel four times."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def _attend(self, qkv: Tensor) -> Tensor:
        """One head over all channels: (N, 3 C, H, W), q, k and v of a channel side by side, -> (N,
        C, H, W)."""
        n, _, height, width = qkv.shape
        qkv = qkv.reshape(n, 1, -1, 3, height * width).permute(
            3, 0, 1, 4, 2
        )  # (3, N, 1, T, C), T = H * W
        q, k, v = qkv.contiguous()  # fused kernels want the channels dense
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
    """The way down, and the channels of what the decoder takes from it. `width`: channels after the
    first convolution."""
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
    """The way up; each block takes the encoder's last output that is left."""
    last, width = levels[-1][0], widths[-1]
    size = f"{last}x{last}"
    dec = nn.ModuleDict(
        {
            f"{size}_in0": block(width, width, attention=True),
            f"{size}_in1": block(width, width),
        }
    )
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
        self.input_size, self.in_channels, self.out_channels = input_size, in_channels, in_channels
        self.num_classes, self.model_channels, self.augment_dim = (
            num_classes,
            model_channels,
            augment_dim,
        )

        emb = 4 * model_channels
        self.map_label = LinearFp32(num_classes, model_channels) if num_classes else None
        self.map_augment = (
            nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = LinearFp32(model_channels, emb)
        self.map_layer1 = LinearFp32(emb, emb)

        levels = [
            (resolution, mult * model_channels, resolution in attn_resolutions)
            for resolution, mult in zip(resolutions, channel_mult, strict=True)
        ]
        block = partial(UNetBlock, emb_channels=emb, dropout=dropout)
        self.enc, widths = encoder(levels, num_blocks, in_channels, model_channels, block)
        self.dec = decoder(levels, num_blocks, self.out_channels, widths, block)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As in EDM: xavier_uniform, with a block's last convolution, its attention and the output
        close to 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                last = name.rpartition(".")[2]
                small = last in ("conv1", "proj") or last.endswith("aux_conv")
                nn.init.xavier_uniform_(
                    module.weight, gain=1e-5 if small else math.sqrt(0.2) if last == "qkv" else 1.0
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[UNetBlock]:
        """In the order in which they run."""
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    @property
    def compute_type(self) -> torch.dtype:
        """Of the blocks' convolutions."""
        return next(p for p in self.dec.parameters() if p.ndim == 4).dtype

    def forward(
        self, x: Tensor, t: Tensor, y: Condition, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x (N, C, H, W) of any float type; t (N,), EDM's c_noise = ln(sigma) / 4; y (N,) int64,
        ignored without classes; augment_labels (N, augment_dim), None for images as they are -> (N,
        C, H, W) float32."""
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise ConfigError(
                f"this model takes (N, {self.in_channels}, {self.input_size}, {self.input_size}), "
                f"got {tuple(x.shape)}; set input_size and in_channels to the data's"
            )
        emb = self.embedding(t, y, augment_labels)  # (N, 4 * model_channels)
        first, *encoder = self.enc.values()
        *decoder, last_norm, last_conv = self.dec.values()
        x = first(x.float()).to(self.compute_type)
        encoded = [x]
        for block in encoder:
            x = self._run(block, x, emb, None)
            encoded.append(x)
        for block in decoder:
            assert isinstance(block, UNetBlock)
            x = self._run(block, x, emb, encoded.pop() if block.in_channels > x.shape[1] else None)
        return last_conv(F.silu(last_norm(x.float())))

    def embedding(self, t: Tensor, y: Condition, augment_labels: Tensor | None) -> Tensor:
        """(N, 4 * model_channels) float32. The null label is the zero vector where others are
        one-hot."""
        if isinstance(y, Captions):
            raise ConfigError(
                "this model takes labels and was given captions; choose data with labels, or "
                "architecture=dit"
            )
        emb = positional_embedding(t, self.model_channels)
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
        if self.checkpoint_blocks and torch.is_grad_enabled():  # again with the same dropout
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
    for name, count in {"num_classes": num_classes, "augment_dim": augment_dim}.items():
        if count < 0:
            raise ConfigError(f"{name}={count} is negative; set 0 for none")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout} is not in [0, 1); set 0 for none")


def from_edm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a released EDM network under our names, without its constant resampling
    filters."""
    return {
        name.removeprefix("model."): value
        for name, value in state.items()
        if "resample_filter" not in name
    }


def flops_per_image(model: DDPMpp) -> int:
    """Floating-point operations of one forward pass per image, with augment labels where the model
    takes them: two per multiply-add, convolutions and matrix products only."""
    total = sum(
        2 * p.numel()
        for name, p in model.named_parameters()
        if name.startswith("map_") and p.ndim == 2
    )
    for name, part in (*model.enc.items(), *model.dec.items()):
        pixels = int(name.partition("x")[0]) ** 2  # a block resamples first
        for module in part.modules():
            if isinstance(module, Conv2d):
                total += 2 * module.weight.numel() * pixels
            elif isinstance(module, LinearFp32):
                total += 2 * module.weight.numel()
            elif isinstance(module, UNetBlock) and module.attention:
                total += 4 * pixels**2 * module.out_channels
    return total
