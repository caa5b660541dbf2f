"""Samples of a model M_i inside its interval of noise levels, and of the full model elsewhere."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.sample import Sample, Sampler
from largescale.checkpoint.weights import Trained, load_trained, weights_sha256
from largescale.condition import Condition
from largescale.diffusion.objective import Model
from largescale.diffusion.sampling import SamplingConfig, draw_batches
from largescale.errors import CheckpointError
from largescale.models.build import latent_shape
from largescale.models.inference import prepare


def bounds(low: float, high: float) -> tuple[float, float]:
    """The interval [low, high), open to infinity where it ends at an end of the noise axis, at which
    samplers ask too."""
    return low if low > 0 else -math.inf, high if high < 1 else math.inf


class Spliced:
    """A model (x_t, t, y) -> output: `inside` where the noise level lies in [low, high), `outside`
    elsewhere."""

    def __init__(
        self,
        inside: Model,
        outside: Model,
        noise_level: Callable[[Tensor], Tensor],
        low: float,
        high: float,
    ):
        """`noise_level`: u (N,) of t (N,), as the network is given it."""
        self.inside = inside
        self.outside = outside
        self._noise_level = noise_level
        self._low, self._high = bounds(low, high)

    def __call__(self, x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        u = self._noise_level(t)
        chosen = (u >= self._low) & (u < self._high)
        # Samplers ask at one noise level for all images: nearly always one of the models is enough.
        if chosen.all():
            return self.inside(x_t, t, y)
        if not chosen.any():
            return self.outside(x_t, t, y)
        # Both models see all images: a batch at two levels is rare.
        return torch.where(
            chosen[:, None, None, None], self.inside(x_t, t, y), self.outside(x_t, t, y)
        )


class SplicedSampler(Sampler):
    """eval.sample with `part` in the place of the model within [low, high)."""

    def __init__(self, options: Sample, part: Path, interval: tuple[float, float]) -> None:
        super().__init__(options)
        # The two have to agree, or splicing them would draw nonsense.
        self.part = load_trained(part)
        self.interval = interval
        check_fits(self.part, self.trained, part, options.source)
        self._spliced: Spliced | None = None

    def model(self, config: SamplingConfig) -> Model:
        """Both models as one; prepared when first needed, like the base class's."""
        if self._spliced is None:
            # Both at the same precision, or the samples would depend on where the interval lies.
            outside = super().model(config)
            inside = prepare(
                self.part.model,
                device=self.device,
                precision=config.precision,
                compile=self.compile,
            )
            self._spliced = Spliced(inside, outside, noise_level_of(self.trained), *self.interval)
        return self._spliced

    def job(self, config: SamplingConfig) -> dict[str, Any]:
        """All that the samples depend on, the model inside the interval included."""

        # With this the provenance of the samples names both models.
        spliced = {
            "interval": list(self.interval),
            "step": self.part.info["step"],
            "weights_sha256": weights_sha256(self.part.model.state_dict()),
        }
        return {**super().job(config), "spliced": spliced}


def noise_level_of(trained: Trained) -> Callable[[Tensor], Tensor]:
    """The function from t (N,), as the network is given it, to the noise level u (N,)."""
    objective = trained.objective
    return lambda t: objective.noise_level(objective.time_of_input(t))


def check_fits(part: Trained, full: Trained, part_path: Path, full_path: Path) -> None:
    """Raises CheckpointError for models whose inputs or outputs do not mean the same."""
    ours = meaning(part)
    theirs = meaning(full)
    for name, one in ours.items():
        if one != theirs[name]:
            raise CheckpointError(
                f"{part_path} and {full_path} cannot be sampled together: {name} is {one} in one, "
                f"{theirs[name]} in the other; give --full a model of the same data and objective"
            )


def meaning(trained: Trained) -> dict[str, Any]:
    """What a model's inputs and outputs mean: its objective, their shapes, and its data."""
    model = trained.config.model
    # Not the width or depth, in which the two may differ.
    facts: dict[str, Any] = {
        "diffusion": trained.config.diffusion,
        "shape": latent_shape(model),
        "num_classes": model.num_classes,
        "learn_sigma": model.learn_sigma,
    }
    for name in ("kind", "shape", "scale_factor", "latent_mean", "latent_std", "encoders"):
        facts[f"{name} of the data"] = trained.info["data_info"].get(name)
    return facts


def asked_levels(trained: Trained, config: SamplingConfig) -> list[float]:
    """The noise levels at which sampling asks the network, in the order asked. No network is
    needed, as its answers do not change them."""
    # The shapes that a network would return.
    noise_level = noise_level_of(trained)
    shape = latent_shape(trained.config.model)
    channels = shape[0] * (2 if trained.config.model.learn_sigma else 1)
    asked: list[float] = []

    def note(x_t: Tensor, t: Tensor, y: Condition) -> Tensor:
        # All samples of a batch are asked for at the same level.
        asked.extend(noise_level(t[:1]).tolist())
        return x_t.new_zeros(len(x_t), channels, *x_t.shape[2:])

    # One sample without guidance, which would ask twice at each level.
    one = draw_batches(
        note,
        trained.objective,
        replace(config, cfg_scale=1.0),
        index=[0],
        shape=shape,
        num_classes=0,
        condition=lambda index: torch.zeros(1).long(),
        batch_size=1,
        device=torch.device("cpu"),
    )
    assert len(list(one)) == 1
    return asked
