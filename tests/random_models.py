"""Small networks and VAEs that diffusers opens too."""

from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.weights import Trained
from largescale.config.schema import Config, DiffusionConfig, ModelConfig
from largescale.diffusion.build import build_objective
from largescale.encoders.vae import Vae, load_vae
from largescale.models.build import build_model

SMALL: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
# What diffusers' own class computes.
STOCK: dict[str, Any] = {"num_classes": 1000, "downscale_freq_shift": 1, "mlp_norm_eps": 1e-5}


def make_trained(schedule: str = "linear", pixels: bool = False, **model: Any) -> Trained:
    """A network whose every weight matters: those of a new one are zero where it ends."""
    config = Config("made", model=ModelConfig(**SMALL | {"in_channels": 3 if pixels else 4} | model),
                    diffusion=DiffusionConfig(schedule=schedule))  # type: ignore[arg-type]
    network = build_model(config.model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name != "pos_embed":
                scale = 0.3 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    info = {"step": 5, "data_info": {"kind": "pixels" if pixels else "latents", "name": "made",
                                     "num_classes": config.model.num_classes}}
    return Trained(network, build_objective(config), config, info)


def make_vae(folder: Path, **config: Any) -> Vae:
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config).save_pretrained(folder)
    return load_vae(str(folder), torch.device("cpu"))


