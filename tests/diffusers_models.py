"""Small models of diffusers with random weights; where diffusers is not installed, the test is skipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch


def their_dit(*, heads: int = 3, depth: int = 3, sample_size: int = 8, patch_size: int = 2, learn_sigma: bool = True, classes: int = 10,
              **more: Any) -> Any:
    """A transformer with weights of unequal scales; its blocks' copies of an embedder are equal, as in every published file."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=8, in_channels=4, out_channels=8 if learn_sigma else 4, num_layers=depth,
        sample_size=sample_size, patch_size=patch_size, num_embeds_ada_norm=classes, **more)
    generator = torch.Generator().manual_seed(0)
    weights = model.state_dict()
    for i, name in enumerate(weights):
        first = re.sub(r"blocks\.\d+\.norm1\.emb", "blocks.0.norm1.emb", name)
        weights[name] = weights[first].clone() if first != name else torch.randn(weights[name].shape, generator=generator) * (0.05 + 0.02 * (i % 5))
    model.load_state_dict(weights)
    return model.eval()


def their_vae(channels: int = 4) -> Any:
    """A VAE that scales down by 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                                   latent_channels=channels, norm_num_groups=4, scaling_factor=0.5)


def save_pipeline(folder: Path, transformer: Any, *, vae: Any = None, scheduler: Any = None, **options: Any) -> None:
    """A folder as published ones are."""
    import diffusers

    scheduler = scheduler or diffusers.DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    diffusers.DiTPipeline(transformer, vae or their_vae(), scheduler).save_pretrained(folder, **options)
    # Published ones have it; saving one again leaves it out.
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "tench", "1": "goldfish"}}))
