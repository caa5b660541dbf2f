"""Images from a trained model, in Python:

model = largescale.load("runs/digits")
images = model.sample(labels=[3, 7], cfg_scale=2.0, steps=50, seed=0)  # (2, H, W, 3) uint8
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largescale.checkpoint.files import is_run
from largescale.checkpoint.weights import Trained, build_trained, is_export, load_trained
from largescale.condition import Condition
from largescale.config.deepspeed import Precision
from largescale.data.format import normalization_of
from largescale.data.images import to_uint8
from largescale.data.loader import encoded_condition
from largescale.diffusion.objective import SamplerName
from largescale.diffusion.sampling import SamplingConfig, check_guidance, draw_batches
from largescale.distributed.ranks import check_cuda, local_device
from largescale.encoders.text import TextEncoder, load_text_encoder_of_model
from largescale.encoders.vae import Vae, load_vae_of_model
from largescale.errors import ConfigError, DataError
from largescale.interop.choices import Choices
from largescale.interop.sources import read_source
from largescale.models.build import latent_shape
from largescale.models.half_precision import check_on_cpu
from largescale.models.inference import Prepared, prepare

# The paper's guidance scale.
CFG_SCALE = 1.5
# Latents that are decoded at a time: the decoder needs far more memory than the model.
DECODED_AT_ONCE = 16


class Pipeline:
    """A trained model with what its samples need beside it: a VAE for latents, a text encoder for
    prompts. Both are loaded when they are first needed."""

    def __init__(
        self,
        trained: Trained,
        *,
        device: Literal["cpu", "cuda"] | None = None,
        precision: Precision | Literal["auto"] = "auto",
        compile: bool = False,
        vae: str | None = None,
        text_encoder: str | None = None,
    ):
        """`device`: by default a GPU if there is one. `precision`: of the matrix products; auto: on
        a GPU that of the training, else fp32. `compile`: whether to use torch.compile. `vae`,
        `text_encoder`: where they lie now; by default where they were when the data were packed;
        vae="none": `sample` returns latents. Raises ConfigError."""
        self.trained = trained
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_cuda(name)
        self.device = local_device(name)
        # A CPU computes in half precision slowly, or not at all, whatever the training had.
        if precision == "auto":
            on_gpu = self.device.type == "cuda"
            precision = trained.info.get("precision", "fp32") if on_gpu else "fp32"
        if precision not in get_args(Precision):
            raise ConfigError(
                f"unknown precision={precision!r}; choose one of auto, "
                f"{', '.join(get_args(Precision))}"
            )
        if self.device.type == "cpu":
            check_on_cpu(precision, "precision={}")
        self.precision: Precision = precision
        self._compile = compile
        made_with = trained.info.get("made_with", {})
        # Loaded when they are first needed: pixels need no VAE, and labels no text encoder.
        self._vae_spec = vae or made_with.get("vae") or "none"
        self._text_encoder_spec = text_encoder or made_with.get("text_encoder")

    @cached_property
    def vae(self) -> Vae | None:
        """What decodes the samples; None where the model draws pixels, or latents are wanted.
        Raises ConfigError for another VAE than the model was trained with."""
        if self._vae_spec == "none":
            return None
        return load_vae_of_model(
            self._vae_spec,
            self._encoders.get("vae"),
            normalization_of(self.trained.info["data_info"]),
            self.device,
        )

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """What encodes prompts. Raises ConfigError for another one than the model was trained
        with."""
        trained_with = self._encoders.get("text")
        if self._text_encoder_spec is None:
            raise ConfigError(
                f"prompts need the text encoder that the model was trained with, {trained_with}; "
                "load the model with text_encoder=..."
            )
        return load_text_encoder_of_model(
            self._text_encoder_spec,
            trained_with,
            self.device,
            self.trained.config.model.max_caption_tokens,
        )

    def sample(
        self,
        labels: int | Sequence[int] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        n: int | None = None,
        cfg_scale: float | None = None,
        sampler: SamplerName | None = None,
        steps: int | None = None,
        seed: int = 0,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cfg_channels: int | None = None,
        batch_size: int = 32,
    ) -> npt.NDArray[Any]:
        """Draw images, (N, H, W, 3) uint8, grey ones too; with vae="none" latents (N, C, H, W)
        float32, as the model sees them.

        The images are those that `eval.sample` draws with the same seed, `labels` being its
        --classes: image i depends on (seed, i) alone, bitwise at the same batch size. `labels` or
        `prompts` are used in turn; `n`: how many images, by default one for each of them; a model
        of labels that is given none draws all classes in turn. `cfg_scale`: guidance scale, by
        default 1.5, and 1, no guidance, where the model cannot be guided. `sampler`, `steps`: by
        default ddpm in 250 steps, for SiT sde, for EDM heun in 18. Raises ConfigError for settings
        that the model cannot take, DataError for images that are not finite.
        """
        config = self._config(cfg_scale, sampler, steps, seed, eta, guidance_interval, cfg_channels)
        count, condition = self._conditions(labels, prompts, n)
        model = self.trained.config.model
        batches = draw_batches(
            self._model,
            self.trained.objective,
            config,
            index=range(count),
            condition=condition,
            shape=latent_shape(model),
            num_classes=model.num_classes,
            batch_size=batch_size,
            device=self.device,
        )
        return np.concatenate([self._to_images(x) for _, x in batches])

    def _config(
        self,
        cfg_scale: float | None,
        sampler: SamplerName | None,
        steps: int | None,
        seed: int,
        eta: float,
        guidance_interval: tuple[float, float],
        cfg_channels: int | None,
    ) -> SamplingConfig:
        """How samples are drawn, as `sample` is asked to. Raises ConfigError."""
        objective = self.trained.objective
        model = self.trained.config.model
        if cfg_scale is None:
            cfg_scale = CFG_SCALE if model.class_dropout_prob else 1.0
        check_guidance(
            [cfg_scale],
            cfg_channels,
            class_dropout_prob=model.class_dropout_prob,
            in_channels=model.in_channels,
        )
        config = SamplingConfig(
            sampler or objective.samplers[0],
            objective.default_steps if steps is None else steps,
            cfg_scale,
            guidance_interval,
            cfg_channels,
            eta,
            clip_denoised=self._pixels and objective.clips_predictions,
            seed=seed,
            precision=self.precision,
        )
        config.check(objective)
        return config

    @property
    def _pixels(self) -> bool:
        """Whether the model draws pixels, not latents."""
        return bool(self.trained.info["data_info"]["kind"] == "pixels")

    def _to_images(self, x: Tensor) -> npt.NDArray[Any]:
        """Samples (B, C, H, W) as they are returned. Raises DataError for those that are not
        finite."""
        if not x.isfinite().all():
            raise DataError(
                f"a sample is not finite, drawn in {self.precision}; try precision='fp32', or "
                "another checkpoint"
            )
        if self._pixels:
            return to_uint8(x)
        if self.vae is None:
            return x.cpu().numpy()
        decoded = torch.cat([self.vae.decode(part) for part in x.split(DECODED_AT_ONCE)])
        return decoded.permute(0, 2, 3, 1).numpy()

    def _conditions(
        self, labels: int | Sequence[int] | None, prompts: str | Sequence[str] | None, n: int | None
    ) -> tuple[int, Callable[[Sequence[int]], Condition]]:
        """How many images, and the conditions of given image numbers. Raises ConfigError."""
        captions = self.trained.config.model.max_caption_tokens > 0
        if captions != (prompts is not None) or (captions and labels is not None):
            raise ConfigError(
                "the model was trained on captions; give prompts, and no labels"
                if captions
                else "the model was not trained on captions; leave out prompts"
            )
        if isinstance(prompts, str):
            prompts = [prompts]
        # An array, or a tensor, whose truth is no single one.
        if isinstance(labels, (np.ndarray, np.integer, Tensor)):
            labels = labels.tolist()
        if isinstance(labels, int):
            labels = [labels]
        given = len(prompts or labels or ())
        count = given if n is None else n
        if count < 1 or (given == 0 and (prompts is not None or labels is not None)):
            raise ConfigError(f"n={count} images; give labels or prompts, or n of 1 or more")
        if prompts is not None:
            return count, self._of_prompts(list(prompts))
        return count, self._of_labels(labels)

    def _of_prompts(self, prompts: list[str]) -> Callable[[Sequence[int]], Condition]:
        model = self.trained.config.model
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ConfigError(
                    f"prompt {i} is empty; give a text, or cfg_scale=0 to draw without"
                )
        # All at once: images that share a prompt share its encoding.
        encoded = self.text_encoder(prompts)

        def condition(index: Sequence[int]) -> Condition:
            return encoded_condition(
                [encoded[i % len(encoded)] for i in index],
                model.max_caption_tokens,
                model.caption_width,
                model.caption_pooled_width,
            )

        return condition

    def _of_labels(self, labels: Sequence[int] | None) -> Callable[[Sequence[int]], Condition]:
        classes = self.trained.num_classes
        if labels is not None and not classes:
            raise ConfigError("the model was trained without labels; leave them out, and give n")
        for label in labels or ():
            # numpy's whole numbers are labels too; texts and fractions are none.
            if not isinstance(label, (int, np.integer)):
                raise ConfigError(
                    f"label {label!r} is no whole number; give those of the classes, "
                    f"0..{classes - 1}"
                )
            if not 0 <= label < classes:
                raise ConfigError(
                    f"label {label} lies outside the classes 0..{classes - 1} that the model was "
                    "trained on"
                )
        # A model without labels takes one, and ignores it.
        each = torch.tensor(list(range(max(classes, 1)) if labels is None else map(int, labels)))
        return lambda index: each[torch.tensor(list(index)) % len(each)]

    @cached_property
    def _encoders(self) -> dict[str, str]:
        """The identities of the encoders that made the training data."""
        found: dict[str, str] = self.trained.info["data_info"].get("encoders", {})
        return found

    @cached_property
    def _model(self) -> Prepared:
        return prepare(
            self.trained.model, device=self.device, precision=self.precision, compile=self._compile
        )


def load(
    source: str | Path, *, step: int | None = None, ema_width: float | None = None, **options: Any
) -> Pipeline:
    """A trained model to draw images with.

    `source`: a run directory, such as runs/digits, an export, a name on the hub, or anything else
    that `largescale.convert` takes; what it assumed is in `trained.info["converted"]`. `step`: of a
    run, the checkpoint; by default the newest valid one. `ema_width`: of a run that was trained
    with optimizer.ema_widths, the width of the average; by default the EMA. `options` are those of
    `Pipeline`. Raises CheckpointError where there is no model.
    """
    path = Path(source).expanduser()
    # Only a run has averages of other widths; of anything else load_trained says so.
    if is_run(path) or is_export(path) or ema_width is not None:
        return Pipeline(load_trained(path, step, ema_width=ema_width), **options)
    converted = read_source(str(source), Choices(), step)
    trained = build_trained(converted.description, converted.weights, str(source))
    return Pipeline(trained, **options)
