"""VAEs as one file of weights under the names of CompVis/latent-diffusion: VA-VAE (LightningDiT),
MAR's, and others whose architecture is AutoencoderKL's."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largescale.encoders.identity import library, loading
from largescale.errors import DataError

# What stands beside the VAE in a checkpoint of its training.
_OURS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_NAMES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load_ldm_vae(file: Path) -> Any:
    """AutoencoderKL with the weights of the file. Raises DataError.

    The file says nothing of a scale, which is 1: such latents are normalised by the statistics of
    the data (data.normalize dataset).
    """
    diffusers = library("diffusers")
    with loading(str(file), "give a file of encoder, decoder, quant_conv and post_quant_conv"):
        weights = _read(file)
        layout = _layout(weights)
        module = diffusers.AutoencoderKL(**layout)
        module.load_state_dict(_renamed(weights, len(layout["block_out_channels"])))
    return module


def _read(file: Path) -> dict[str, Tensor]:
    """The VAE's own weights in float32, without those of its training."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(file)
    else:
        found = torch.load(file, map_location="cpu", weights_only=True)
    # Lightning's checkpoints have state_dict, MAR's model.
    for key in ("state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
    weights = {}
    for name, value in found.items():
        if name.startswith(_OURS):
            weights[name] = value.float()
    if "encoder.conv_in.weight" not in weights or "decoder.conv_in.weight" not in weights:
        raise DataError(
            f"{file} has no weights of a VAE under the names of latent-diffusion "
            "(encoder.conv_in.weight ...); give a folder as diffusers saves it, or such a file"
        )
    return weights


def _layout(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of AutoencoderKL, by the names and shapes of the weights."""
    levels, blocks = set(), set()
    for name in weights:
        if found := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name):
            levels.add(int(found[1]))
            blocks.add(int(found[2]))
    widths, down, up = [], [], []
    for level in sorted(levels):
        widths.append(weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0])
        attends = f"encoder.down.{level}.attn.0.q.weight" in weights
        down.append("AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D")
        attends = f"decoder.up.{level}.attn.0.q.weight" in weights
        up.append("AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D")
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(down),
        # From the lowest resolution up, which the file's decoder counts down to.
        "up_block_types": tuple(reversed(up)),
        "layers_per_block": len(blocks),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "scaling_factor": 1.0,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def _renamed(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights under diffusers' names."""
    renamed = {}
    for name, value in weights.items():
        if found := re.match(r"decoder\.up\.(\d+)\.", name):
            name = f"decoder.up.{levels - 1 - int(found[1])}.{name[found.end() :]}"
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if found := re.search(r"\.attentions\.\d+\.(norm|q|k|v|proj_out)\.", name):
            name = f"{name[: found.start(1)]}{_ATTENTION[found[1]]}{name[found.end(1) :]}"
            # A convolution of one pixel there, a linear layer here.
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[name] = value
    return renamed
