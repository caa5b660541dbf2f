"""diffusers' DiT with the timestep's frequencies of facebookresearch/DiT. Part of largescale
(Apache-2.0), and needs nothing of it."""

import functools
from typing import Any

from diffusers import DiTTransformer2DModel


class LargescaleDiTTransformer(DiTTransformer2DModel):
    """DiT whose timestep embedding divides by 128, as facebookresearch/DiT and largescale do;
    diffusers' own class divides by 127. All else is diffusers'."""

    # from_config reads the names of a model's settings off its signature.
    @functools.wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
