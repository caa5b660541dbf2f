"""Sample grids while training, from the EMA."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from largescale.build import build_model, latent_shape
from largescale.config import Config
from largescale.data.loader import to_condition
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import SamplerName
from largescale.diffusion.samplers import AnyObjective
from largescale.distributed import Ranks
from largescale.engine import Engine
from largescale.images import balanced_labels, grid, titled, to_uint8
from largescale.models.conditioning import Condition, take
from largescale.sampling import SamplingConfig, draw_samples
from largescale.telemetry import Telemetry

_SAMPLER: dict[str, SamplerName] = {"gaussian": "ddim", "flow": "euler", "edm": "heun"}


class Preview:
    """The same classes, or captions of the data set, every time."""

    def __init__(self, config: Config, objective: AnyObjective, engine: Engine, ranks: Ranks,
                 dataset: ShardDataset, stop: Callable[[], bool] = lambda: False):
        """`stop` is asked often; once it is true the preview is left out."""
        self._config, self._objective, self._engine, self._ranks = config, objective, engine, ranks
        self._stop = stop
        self._pixels = dataset.info.kind == "pixels"
        n, self._titles = config.telemetry.preview_images, None
        self._y: Condition = torch.tensor(balanced_labels(n, max(min(
            config.model.num_classes, dataset.info.num_classes), 1)))
        if config.model.caption_tokens and config.telemetry.preview_every:
            rows = sample_indices(np.arange(n), len(dataset), config.train.seed)
            gathered = dataset.gather(rows, choice=np.zeros(n))
            self._y = to_condition({name: torch.from_numpy(values) for name, values in gathered.items()})
            self._titles = [texts[0] for texts in dataset.texts(rows)]

    def __call__(self, step: int, telemetry: Telemetry) -> None:
        """Collective: every rank draws its share, rank 0 lays out the grid. Raises Stopped, on every rank."""
        c, ranks = self._config, self._ranks
        objective, look = c.diffusion.objective, c.telemetry
        sampling = SamplingConfig(
            _SAMPLER[objective], look.preview_steps, look.preview_cfg_scale, seed=c.train.seed,
            clip_denoised=self._pixels and objective == "gaussian",
        )
        n = c.telemetry.preview_images
        model = self._ema_model()
        x = ranks.together(lambda: draw_samples(
            model, self._objective, sampling, index=range(n)[ranks.rank :: ranks.world_size],
            condition=lambda index: take(self._y, torch.tensor(index)),
            shape=latent_shape(c.model), num_classes=c.model.num_classes, batch_size=64, device=ranks.device,
            stop=self._stop,
        ))
        images = np.empty((n, *x.shape[2:], 3), np.uint8)
        for rank, share in enumerate(ranks.all_gather_bytes(to_uint8(x).tobytes())):
            images[rank :: ranks.world_size] = np.frombuffer(share, np.uint8).reshape(-1, *images.shape[1:])
        if ranks.rank == 0:
            columns, scale = min(10, n), max(1, (96 if self._titles else 64) // images.shape[1])
            sheet = titled(images, self._titles, columns, scale) if self._titles else grid(images, columns, scale)
            telemetry.image(step, "samples", sheet)

    def _ema_model(self) -> nn.Module:
        """A copy in fp32, gathered from the ranks' partitions; lives for one preview."""
        model = build_model(self._config.model).to(self._ranks.device).eval()
        flat = self._ranks.all_gather_flat(self._engine.ema_partition())[: self._engine.numel]
        nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])
        for ours, trained in zip(model.parameters(), self._engine.module.parameters(), strict=True):
            if not ours.requires_grad:
                ours.data.copy_(trained)  # fixed values, which have no EMA
        return model
