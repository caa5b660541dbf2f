"""Sample grids while training, from the EMA."""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

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
from largescale.models.build import latent_shape
from largescale.monitoring.telemetry import Telemetry
from largescale.training.gathered import gather_model


def load_decoder(dataset: ShardDataset) -> tuple[Vae | None, str]:
    """The VAE that made the data set's latents, on the CPU, from local files; or None, and why."""
    made_with = dataset.manifest.get("made_with")
    spec = made_with.get("vae") if isinstance(made_with, dict) else None
    if not spec:
        return None, f"{dataset.path} does not record where its VAE was"

    # Making a network draws from torch's generator, which training must not notice.
    try:
        with offline(), torch.random.fork_rng(devices=[]):
            vae = load_vae(spec, torch.device("cpu"))
    except (DataError, OSError) as error:
        return None, str(error)

    made_by = dataset.info.encoders.get("vae")
    if vae.identity != made_by:
        return None, f"{spec} is {vae.identity}, the data are of {made_by}"
    return vae.normalized(dataset.info.normalization), ""


def load_linear_rgb(dataset: ShardDataset) -> list[list[float]] | None:
    """The linear map to colours that was fitted while packing; None where there is none for these
    latents."""
    # Without a usable map latents are shown as they are: a preview is not worth an error.
    try:
        matrix = np.array(json.loads((dataset.path / LATENT_RGB).read_text()), np.float64)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    # A row for each channel, and one for the constant term.
    fits = matrix.shape == (dataset.info.x_shape[0] + 1, 3) and np.isfinite(matrix).all()
    return matrix.tolist() if fits else None


def shows_latents(config: Config, dataset: ShardDataset) -> bool:
    """Whether there are previews that need a VAE to be pictures."""
    return (
        dataset.info.kind != "pixels" and 0 < config.telemetry.preview_every <= config.train.steps
    )


class Preview:
    """Draws a sheet of samples: the same classes, or captions of the data set, every time.

    Latents are shown as pictures where their VAE is found in local files.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        engine: Engine,
        ranks: Ranks,
        dataset: ShardDataset,
        stop: Callable[[], bool] = lambda: False,
    ):
        """`stop` is asked often; once it is true the preview is left out. `note`: what is to be
        logged about previews, or empty."""
        self._config = config
        self._objective = objective
        self._engine = engine
        self._ranks = ranks
        self._stop = stop
        self._pixels = dataset.info.kind == "pixels"
        self._packed = dataset.packed.normalization
        self._normalization = dataset.info.normalization

        # Only rank 0 lays out the sheet, so only it needs a way from latents to pictures.
        self._vae: Vae | None = None
        self._rgb: list[list[float]] | None = None
        self.note = ""
        if ranks.rank == 0 and shows_latents(config, dataset):
            self._vae, why = load_decoder(dataset)
            self._rgb = load_linear_rgb(dataset)
            if self._vae:
                self.note = f"note: previews are decoded by {self._vae.identity}"
            elif self._rgb:
                self.note = (
                    f"note: previews show latents by a linear map to colours, not decoded: {why}"
                )
            else:
                self.note = f"note: previews show latents, not decoded: {why}"

        # The condition of each picture is the same in every preview, so that they can be compared.
        n = config.telemetry.preview_images
        n_classes = max(min(config.model.num_classes, dataset.info.num_classes), 1)
        self._y: Condition = torch.tensor(balanced_labels(n, n_classes))
        self._titles: list[str] | None = None
        if config.model.max_caption_tokens and config.telemetry.preview_every:
            rows = sample_indices(np.arange(n), dataset.first_rows, config.train.seed)
            gathered = dataset.gather(rows, choice=np.zeros(n))
            self._y = to_condition(
                {name: torch.from_numpy(values) for name, values in gathered.items()}
            )
            self._titles = [texts[0] for texts in dataset.texts(rows)]

    def __call__(self, step: int, telemetry: Telemetry) -> None:
        """Log a sheet of samples: every rank draws its share, rank 0 lays out the grid. Collective.
        Raises Stopped, on every rank."""
        n = self._config.telemetry.preview_images
        ranks = self._ranks
        x = self._draw()

        # Rank r drew pictures r, r + world_size, ...: shares differ by one picture at most.
        samples = np.empty((n, *x.shape[1:]), np.float32)
        for rank, share in enumerate(ranks.all_gather_bytes(x.numpy().tobytes())):
            drawn = np.frombuffer(share, np.float32).reshape(-1, *x.shape[1:])
            samples[rank :: ranks.world_size] = drawn

        # An error of rank 0 must reach the others, which would wait for it at the next step.
        sheet = ranks.raise_on_all_ranks(
            lambda: self._sheet(torch.from_numpy(samples)) if ranks.rank == 0 else None
        )
        if sheet is not None:
            telemetry.image(step, "samples", sheet)

    def _draw(self) -> Tensor:
        """This rank's share of the samples, (n, C, H, W) on the CPU."""
        c = self._config
        ranks = self._ranks
        objective = self._objective
        sampling = SamplingConfig(
            objective.preview_sampler,
            c.telemetry.preview_steps,
            c.telemetry.preview_cfg_scale,
            seed=c.train.seed,
            clip_denoised=self._pixels and objective.clips_predictions,
        )
        # A collective, so before and not inside what one rank alone may fail in.
        model = gather_model(c, self._engine, ranks, "ema")
        return ranks.raise_on_all_ranks(
            lambda: draw_samples(
                model,
                objective,
                sampling,
                index=range(c.telemetry.preview_images)[ranks.rank :: ranks.world_size],
                condition=lambda index: select(self._y, torch.tensor(index)),
                shape=latent_shape(c.model),
                num_classes=c.model.num_classes,
                batch_size=64,
                device=ranks.device,
                stop=self._stop,
            )
        )

    def _sheet(self, x: Tensor) -> np.ndarray:
        """All samples as one image, with captions and, for undecoded latents, a heading. Raises
        Stopped."""
        # Latents that are not decoded need a heading.
        images = self._decoded(x)
        heading = ""
        if images is None and self._rgb:
            # The map is of latents as their encoder normalises them.
            if self._normalization != self._packed:
                x = self._packed.apply(self._normalization.undo(x))
            images = to_uint8(linear_rgb(x, self._rgb))
            heading = LINEAR
        elif images is None:
            images = to_uint8(x)
            heading = "" if self._pixels else UNDECODED

        # Small pictures are enlarged to about 64 pixels, or 96 to leave room for a caption.
        titles = self._titles
        columns = min(10, len(x))
        scale = max(1, (96 if titles else 64) // images.shape[1])
        sheet = titled(images, titles, columns, scale) if titles else grid(images, columns, scale)
        return headed(sheet, heading) if heading else sheet

    def _decoded(self, x: Tensor) -> np.ndarray | None:
        """The pictures of latents, (N, H, W, 3) uint8; None without a VAE, or without memory for
        it."""
        if self._vae is None:
            return None
        images = []
        # The VAE is on the device only while it decodes: training needs the memory.
        try:
            vae = self._vae.moved(self._ranks.device)
            # One at a time, since decoding takes far more memory than the picture.
            for latent in x.split(1):
                if self._stop():
                    raise Stopped
                images.append(vae.decode(latent))
        except torch.OutOfMemoryError:
            return None
        finally:
            self._vae = self._vae.moved(torch.device("cpu"))
        return torch.cat(images).permute(0, 2, 3, 1).numpy()
