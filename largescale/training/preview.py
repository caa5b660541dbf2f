"""Sample grids while training, from the EMA."""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from largescale.condition import Condition, select
from largescale.config.schema import Config
from largescale.data.format import LATENT_RGB
from largescale.data.images import (
    LINEAR,
    UNDECODED,
    balanced_labels,
    grid,
    headed,
    linear_rgb,
    titled,
    to_uint8,
)
from largescale.data.loader import to_condition
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.objective import Objective
from largescale.diffusion.sampling import SamplingConfig, draw_samples
from largescale.distributed.ranks import Ranks
from largescale.encoders.identity import offline
from largescale.encoders.vae import Vae, load_vae
from largescale.engine.deepspeed_engine import Engine
from largescale.errors import DataError, Stopped
from largescale.models.build import build_model, latent_shape
from largescale.monitoring.telemetry import Telemetry


def load_decoder(dataset: ShardDataset) -> tuple[Vae | None, str]:
    """The VAE that made the data set's latents, on the CPU, from files that lie here; or None, and
    why."""
    made_with, made_by = dataset.manifest.get("made_with"), dataset.info.encoders.get("vae")
    spec = made_with.get("vae") if isinstance(made_with, dict) else None
    if not spec:
        return None, f"{dataset.path} does not say where its VAE was"
    try:
        with offline(), torch.random.fork_rng(devices=[]):  # making a network draws from it
            vae = load_vae(spec, torch.device("cpu"))
    except (DataError, OSError) as error:
        return None, str(error)
    return (
        (vae, "")
        if vae.identity == made_by
        else (None, f"{spec} is {vae.identity}, the data are of {made_by}")
    )


def load_linear_rgb(dataset: ShardDataset) -> list[list[float]] | None:
    """The map to colours that was fitted while packing; None where there is none for these
    latents."""
    try:
        matrix = np.array(json.loads((dataset.path / LATENT_RGB).read_text()), np.float64)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fits = matrix.shape == (dataset.info.x_shape[0] + 1, 3) and np.isfinite(matrix).all()
    return matrix.tolist() if fits else None


def shows_latents(config: Config, dataset: ShardDataset) -> bool:
    """Whether there are previews that need a VAE to be pictures."""
    return (
        dataset.info.kind != "pixels" and 0 < config.telemetry.preview_every <= config.train.steps
    )


class Preview:
    """The same classes, or captions of the data set, every time. Of latents pictures, where their
    VAE lies here."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        engine: Engine,
        ranks: Ranks,
        dataset: ShardDataset,
        stop: Callable[[], bool] = lambda: False,
    ):
        """`stop` is asked often; once it is true the preview is left out. `note`, if any, is better
        known."""
        self._config, self._objective, self._engine, self._ranks = config, objective, engine, ranks
        self._stop = stop
        self._pixels, self._vae, self._rgb, self.note = (
            dataset.info.kind == "pixels",
            None,
            None,
            "",
        )
        if ranks.rank == 0 and shows_latents(config, dataset):
            self._vae, why = load_decoder(dataset)
            self._rgb = load_linear_rgb(dataset)
            shown = "show latents by a linear map to colours" if self._rgb else "show latents"
            self.note = (
                f"note: previews are decoded by {self._vae.identity}"
                if self._vae
                else f"note: previews {shown}, not decoded: {why}"
            )
        n, self._titles = config.telemetry.preview_images, None
        self._y: Condition = torch.tensor(
            balanced_labels(n, max(min(config.model.num_classes, dataset.info.num_classes), 1))
        )
        if config.model.max_caption_tokens and config.telemetry.preview_every:
            rows = sample_indices(np.arange(n), len(dataset), config.train.seed)
            gathered = dataset.gather(rows, choice=np.zeros(n))
            self._y = to_condition(
                {name: torch.from_numpy(values) for name, values in gathered.items()}
            )
            self._titles = [texts[0] for texts in dataset.texts(rows)]

    def __call__(self, step: int, telemetry: Telemetry) -> None:
        """Collective: every rank draws its share, rank 0 lays out the grid. Raises Stopped, on
        every rank."""
        n, ranks, x = self._config.telemetry.preview_images, self._ranks, self._draw()
        samples = np.empty((n, *x.shape[1:]), np.float32)
        for rank, share in enumerate(ranks.all_gather_bytes(x.numpy().tobytes())):
            samples[rank :: ranks.world_size] = np.frombuffer(share, np.float32).reshape(
                -1, *x.shape[1:]
            )
        sheet = ranks.raise_on_all_ranks(
            lambda: self._sheet(torch.from_numpy(samples)) if ranks.rank == 0 else None
        )
        if sheet is not None:
            telemetry.image(step, "samples", sheet)

    def _draw(self) -> Tensor:
        """(n, C, H, W) on the CPU: this rank's share."""
        c, ranks = self._config, self._ranks
        objective, look = self._objective, c.telemetry
        sampling = SamplingConfig(
            objective.preview_sampler,
            look.preview_steps,
            look.preview_cfg_scale,
            seed=c.train.seed,
            clip_denoised=self._pixels and objective.clips_predictions,
        )
        model = self._ema_model()
        return ranks.raise_on_all_ranks(
            lambda: draw_samples(
                model,
                objective,
                sampling,
                index=range(look.preview_images)[ranks.rank :: ranks.world_size],
                condition=lambda index: select(self._y, torch.tensor(index)),
                shape=latent_shape(c.model),
                num_classes=c.model.num_classes,
                batch_size=64,
                device=ranks.device,
                stop=self._stop,
            )
        )

    def _sheet(self, x: Tensor) -> np.ndarray:
        """Raises Stopped."""
        images = self._decoded(x)
        heading = ""
        if images is None:
            images = to_uint8(linear_rgb(x, self._rgb) if self._rgb else x)
            heading = "" if self._pixels else LINEAR if self._rgb else UNDECODED
        columns, scale = min(10, len(x)), max(1, (96 if self._titles else 64) // images.shape[1])
        sheet = (
            titled(images, self._titles, columns, scale)
            if self._titles
            else grid(images, columns, scale)
        )
        return headed(sheet, heading) if heading else sheet

    def _decoded(self, x: Tensor) -> np.ndarray | None:
        """(N, H, W, 3) uint8 of latents; None without a VAE, or memory for it, which is the
        device's for this only."""
        if self._vae is None:
            return None
        images = []
        try:
            vae = self._vae.moved(self._ranks.device)
            for latent in x.split(1):
                if self._stop():
                    raise Stopped
                images.append(vae.decode(latent))
        except torch.OutOfMemoryError:
            return None
        finally:
            self._vae = self._vae.moved(torch.device("cpu"))
        return torch.cat(images).permute(0, 2, 3, 1).numpy()

    def _ema_model(self) -> nn.Module:
        """A copy in fp32, gathered from the ranks' partitions; lives for one preview."""
        model = build_model(self._config.model).to(self._ranks.device).eval()
        flat = self._ranks.all_gather_flat(self._engine.ema_partition())[: self._engine.numel]
        nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])
        for ours, trained in zip(model.parameters(), self._engine.module.parameters(), strict=True):
            if not ours.requires_grad:
                ours.data.copy_(trained)  # fixed values, which have no EMA
        return model
