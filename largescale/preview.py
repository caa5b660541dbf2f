"""Sample grids while training, from the EMA."""

import numpy as np
from torch import nn

from largescale.build import build_model, latent_shape
from largescale.config import Config
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.distributed import Ranks
from largescale.engine import Engine
from largescale.images import balanced_labels, grid, to_uint8
from largescale.sampling import SamplingConfig, draw_samples
from largescale.telemetry import Telemetry


class Preview:
    def __init__(self, config: Config, diffusion: GaussianDiffusion, engine: Engine, ranks: Ranks, pixels: bool):
        self._config, self._diffusion, self._engine, self._ranks = config, diffusion, engine, ranks
        self._pixels = pixels

    def __call__(self, step: int, telemetry: Telemetry) -> None:
        """Collective: every rank draws its share, rank 0 lays out the grid."""
        c, ranks = self._config, self._ranks
        sampling = SamplingConfig(
            "ddim", c.telemetry.preview_steps, c.telemetry.preview_cfg_scale, seed=c.train.seed,
            clip_denoised=self._pixels,
        )
        labels = balanced_labels(c.telemetry.preview_images, c.model.num_classes)
        index = range(len(labels))
        part = slice(ranks.rank, None, ranks.world_size)
        x = draw_samples(
            self._ema_model(), self._diffusion, sampling, index=index[part], labels=labels[part],
            shape=latent_shape(c.model), num_classes=c.model.num_classes, batch_size=64, device=ranks.device,
        )
        images = np.empty((len(labels), *x.shape[2:], 3), np.uint8)
        for rank, share in enumerate(ranks.all_gather_object(to_uint8(x))):
            images[rank :: ranks.world_size] = share
        if ranks.rank == 0:
            sheet = grid(images, columns=min(10, len(images)), scale=max(1, 64 // images.shape[1]))
            telemetry.image(step, "samples", sheet)

    def _ema_model(self) -> nn.Module:
        """A copy in fp32, gathered from the ranks' partitions; lives for one preview."""
        model = build_model(self._config.model).to(self._ranks.device).eval()
        flat = self._ranks.all_gather_flat(self._engine.ema_partition())[: self._engine.numel]
        nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])
        return model
