"""diffusers' DiTPipeline for any number of classes, for pixels, and for a VAE with a shift. Part of
largescale (Apache-2.0), and needs nothing of it."""

import inspect
from typing import Any, ClassVar, Optional, Union

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor


class LargescaleDiTPipeline(DiTPipeline):
    """Draws images from a DiT: with labels or without, of latents or of pixels.

    `num_classes`: how many classes were trained; 0: no labels. `null_class`: the label that stands
    for none, which guidance needs; None where none was trained. `pixels`: the model draws pixels,
    and there is no VAE. `latents_mean`, `latents_std`, `latents_scale`: how latents were normalised,
    x = (latent - mean) / std * scale, where it is not by the VAE's own scaling_factor.
    """

    _optional_components: ClassVar[list[str]] = ["vae"]

    # diffusers reads these types, and older versions of it no `X | None`.
    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: Union[AutoencoderKL, AutoencoderTiny, None] = None,  # noqa: UP007
        id2label: Optional[dict] = None,  # type: ignore[type-arg]  # noqa: UP045
        num_classes: int = 1000,
        null_class: Optional[int] = 1000,  # noqa: UP045
        pixels: bool = False,
        latents_scale: Optional[float] = None,  # noqa: UP045
        latents_mean: Optional[list] = None,  # type: ignore[type-arg]  # noqa: UP045
        latents_std: Optional[list] = None,  # type: ignore[type-arg]  # noqa: UP045
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(
            id2label=id2label,
            num_classes=num_classes,
            null_class=null_class,
            pixels=pixels,
            latents_scale=latents_scale,
            latents_mean=latents_mean,
            latents_std=latents_std,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images: int = 1,
        latents: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image of each label; of a model without labels, `num_images` of them.

        `guidance_scale`: 1 is no guidance; by default 4, as DiTPipeline has it, or 1 where the
        model has no null class. `latents`: the noise to begin with, (N, C, H, W); by default it is
        drawn from `generator`. `output_type`: "pil", "np", "pt", or "latent", which is what the
        model draws and no VAE has decoded.
        """
        self._require_decoder(output_type)
        labels = self._labels(class_labels, num_images)
        scale = self._scale(guidance_scale)
        if latents is None:
            config = self.transformer.config
            latents = randn_tensor(
                (len(labels), config.in_channels, config.sample_size, config.sample_size),
                generator=generator,
                device=self._execution_device,
                dtype=self.transformer.dtype,
            )

        x = self._denoise(latents, labels, scale, num_inference_steps, generator)
        images = x if output_type == "latent" else self._decoded(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _require_decoder(self, output_type: str) -> None:
        """Raise ValueError where latents could not become images."""
        if self.vae is None and not self.config.pixels and output_type != "latent":
            raise ValueError(
                "this model draws latents and the folder carries no VAE: give from_pretrained the "
                "VAE that it was trained with as vae=..., or ask for output_type='latent'"
            )

    def _labels(self, class_labels: list[int] | None, num_images: int) -> torch.Tensor:
        """The labels as (N,) int64. Raises ValueError for one that was not trained."""
        count = self.config.num_classes
        if class_labels is None or not count:
            if count:
                raise ValueError(f"give class_labels, a list of numbers from 0 to {count - 1}")
            if class_labels is not None:
                raise ValueError("this model has no labels: give num_images, and no class_labels")
            return torch.zeros(num_images, dtype=torch.long, device=self._execution_device)
        labels = torch.tensor(class_labels, dtype=torch.long).reshape(-1)
        outside = (labels < 0) | (labels >= count)
        if outside.any():
            raise ValueError(
                f"label {int(labels[outside][0])} lies outside the model's classes 0 to {count - 1}"
            )
        return labels.to(self._execution_device)

    def _scale(self, guidance_scale: float | None) -> float:
        """The guidance scale. Raises ValueError where there is nothing to guide with."""
        if self.config.null_class is None:
            if guidance_scale not in (None, 1):
                raise ValueError(
                    "this model was trained without a null class, so nothing can guide it: set "
                    "guidance_scale=1"
                )
            return 1.0
        return 4.0 if guidance_scale is None else guidance_scale

    def _denoise(
        self, x: torch.Tensor, labels: torch.Tensor, scale: float, steps: int, generator: Any
    ) -> torch.Tensor:
        """From noise to what the model draws, both (N, C, H, W)."""
        scheduler, asked = self._schedule(steps, x.device)
        x = x * scheduler.init_noise_sigma

        # Options that only some schedulers have.
        options = {"use_clipped_model_output": True, "generator": generator}
        known = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in known}
        for t in self.progress_bar(scheduler.timesteps):
            noise = self._noise(scheduler.scale_model_input(x, t), asked(t), labels, scale)
            x = scheduler.step(noise, t, x, **options).prev_sample
        return x

    def _noise(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The predicted noise, guided, (N, C, H, W)."""
        channels = x.shape[1]
        # Without guidance the null class is not asked for.
        if scale != 1:
            null = torch.full_like(labels, self.config.null_class)
            x, labels = torch.cat([x, x]), torch.cat([labels, null])
        t = t.to(x.device).expand(len(x))
        # A learned variance, in the channels after the noise, is not used.
        noise = self.transformer(x, timestep=t, class_labels=labels).sample[:, :channels]
        if scale == 1:
            return noise
        cond, uncond = noise.chunk(2)
        return uncond + scale * (cond - uncond)

    def _schedule(self, steps: int, device: torch.device) -> tuple[Any, Any]:
        """The scheduler, ready for so many steps, and what gives the model's timestep for its."""
        scheduler = self.scheduler
        betas = scheduler.config.get("trained_betas")
        # diffusers computes the products in float32, which some images are sensitive to.
        if betas is not None and hasattr(scheduler, "alphas_cumprod"):
            products = np.cumprod(1 - np.asarray(betas, np.float64))
            scheduler.alphas_cumprod = torch.from_numpy(products).float()
        if isinstance(scheduler, DDIMScheduler) and scheduler.config.timestep_spacing == "linspace":
            kept = spread(scheduler.config.num_train_timesteps, steps)
            scheduler = respaced(scheduler, kept)
            return scheduler, lambda t: kept[t]
        scheduler.set_timesteps(steps, device=device)
        return scheduler, lambda t: t

    def _decoded(self, x: torch.Tensor, output_type: str) -> Any:
        """Images of what the model draws, which is x (N, C, H, W)."""
        if self.vae is not None:
            config = self.vae.config
            # DiTPipeline has no shift, and no statistics.
            ours = self.config
            x = x / (ours.latents_scale or config.scaling_factor)
            if ours.latents_mean:
                mean = torch.tensor(ours.latents_mean, dtype=x.dtype, device=x.device)
                std = torch.tensor(ours.latents_std, dtype=x.dtype, device=x.device)
                x = x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
            # A VAE with statistics of its own takes no shift.
            if not (getattr(config, "latents_mean", None) and getattr(config, "latents_std", None)):
                x = x + (getattr(config, "shift_factor", None) or 0)
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        images = x.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


def spread(timesteps: int, steps: int) -> torch.Tensor:
    """So many timesteps, evenly from 0 to the last, rising: those of openai/guided-diffusion."""
    if not 2 <= steps <= timesteps:
        raise ValueError(f"num_inference_steps={steps} must lie between 2 and {timesteps}")
    strides = np.full(steps - 1, (timesteps - 1) / (steps - 1))
    return torch.from_numpy(np.rint(np.cumsum([0.0, *strides])).astype(np.int64))


def respaced(scheduler: DDIMScheduler, kept: torch.Tensor) -> DDIMScheduler:
    """DDIM over the kept timesteps. With this spacing diffusers' own steps from t to t - T // steps,
    which is not the next timestep that it asks the model at."""
    shorter: DDIMScheduler = DDIMScheduler.from_config(
        scheduler.config,
        num_train_timesteps=len(kept),
        trained_betas=None,
        timestep_spacing="leading",
    )
    shorter.alphas_cumprod = scheduler.alphas_cumprod[kept]
    shorter.set_timesteps(len(kept))
    return shorter
