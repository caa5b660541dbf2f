"""What a person says of weights, what their source says, and what is assumed in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from largescale.config.schema import DiffusionConfig, ModelConfig
from largescale.errors import ConfigError
from largescale.interop.state_dicts import Which

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a person says of weights that do not say it themselves."""

    weights: Which | None = None
    """Which weights of a training's checkpoint: ema, or model, those that the optimizer held; by
    default the EMA where there is one."""
    num_heads: int | None = None
    """Attention heads; by default those that the published network of this width has."""
    class_dropout_prob: float | None = None
    """0 where the label embedding has no row for the null label; by default 0.1, and its last row is
    that."""
    objective: Literal["gaussian", "flow", "edm"] | None = None
    """What was trained: gaussian (DiT), flow (SiT) or edm; the weights of DiT and SiT look the
    same. By default by the file's own settings, else by its name."""
    schedule: Literal["linear", "cosine"] | None = None
    """The noise schedule of the objective gaussian; by default linear, as DiT was published."""
    interpolant: Literal["linear", "gvp"] | None = None
    """The path of the objective flow; by default linear, as SiT was published."""
    noise_at: Literal[0, 1] | None = None
    """Where the time of the objective flow is pure noise: 0 as in willisma/SiT, 1 as in REPA, whose
    weights are turned around; by default by the file."""
    kind: Literal["latents", "pixels"] | None = None
    """What the images are; by default pixels for 1 or 3 channels, else a VAE's latents."""
    vae: str | None = None
    """The VAE of the latents, a folder or a name on the hub: its hash becomes a part of the export,
    and eval.sample refuses others. By default that of the pipeline."""
    name: str | None = None
    """The name of the model; by default that of the source."""

    def require_unset(self, names: Sequence[str], because: str) -> None:
        """Raises ConfigError for one of these options that was given."""
        # An option that nothing reads would be taken to have worked.
        for name in names:
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{flag} {getattr(self, name)} has no effect: {because}; leave it out"
                )


@dataclass
class Facts:
    """What is known of a source while it is read, and how."""

    choices: Choices
    assumed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def choose(
        self, key: str, given: Value | None, said: Value | None, default: Value, why: str
    ) -> Value:
        """What an option gives, else what the source says, else the default, which is noted."""
        if given is not None:
            return given
        if said is not None:
            return said
        self.assumed[key] = f"{default}, {why}"
        return default


@dataclass(frozen=True)
class Source:
    """A source's network and weights, before they are checked against one another."""

    weights: dict[str, Tensor]
    """In float32, under our names."""
    model: ModelConfig
    diffusion: DiffusionConfig
    format: str
    files: tuple[Path, ...]
    which: str = "as in the file"
    step: int = 0
    vae: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """More of what the source says, as plain JSON values."""
