"""--train.init-from: a run that starts with trained weights in place of random ones."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largescale.checkpoint.files import CheckpointDir, is_run
from largescale.checkpoint.weights import read_weights, weights_sha256
from largescale.config.schema import Config
from largescale.config.serialise import flatten, from_dict, to_dict
from largescale.errors import CheckpointError, ConfigError, usable
from largescale.models.build import build_model

# Settings of the network that its weights' shapes do not show.
_UNSEEN_IN_SHAPES = (
    "model.architecture",
    "model.num_heads",
    "model.downscale_freq_shift",
    "model.mlp_norm_eps",
)
# What the weights were trained for: another value is another task, which fine-tuning may be.
_OF_THE_TASK = (
    "diffusion.objective",
    "diffusion.schedule",
    "diffusion.interpolant",
    "data.normalize",
)
# Weights that are named in an error.
_NAMED = 4


@dataclass(frozen=True)
class FirstWeights:
    """The weights that a run starts with, and which parts of its network start anew all the same."""

    source: Path
    weights: dict[str, Tensor]
    """EMA weights by name, fp32, on the CPU."""
    description: dict[str, Any]
    """Config and provenance of these weights, as an export carries them."""
    new: tuple[str, ...]
    """train.init_new"""

    @classmethod
    def read(cls, config: Config, step: int | None = None) -> "FirstWeights":
        """Those of train.init_from: an export, or a run, by default its newest checkpoint. Raises
        CheckpointError."""
        assert config.train.init_from is not None
        source = Path(config.train.init_from)
        try:
            description, weights = read_weights(source, step)
        except CheckpointError as error:
            raise CheckpointError(
                f"--train.init-from {source}: {error}; files of other programs become an export by "
                "python -m largescale.convert"
            ) from error
        return cls(source, weights, description, config.train.init_new)

    def record(self) -> dict[str, Any]:
        """What the run's checkpoints say of its first weights."""
        return {
            "sha256": weights_sha256(self.weights),
            "new": sorted(self.new),
            "source": str(self.source),
            "name": self.description["config"]["name"],
            "step": self.description["step"],
        }

    def check(self, config: Config) -> None:
        """Raises ConfigError, naming what does not fit, unless the run's network can start with
        these weights."""
        with torch.device("meta"):
            model = build_model(config.model)
        self._fitting(config, model)

    def load_into(self, model: nn.Module, config: Config) -> None:
        """Set the model's weights, but for the parts that start anew. Raises ConfigError where they
        do not fit, CheckpointError where they are not finite."""
        fitting = self._fitting(config, model)
        for name, value in fitting.items():
            if not value.isfinite().all():
                raise CheckpointError(
                    f"--train.init-from {self.source}: {name} holds values that are not finite; "
                    "take another checkpoint"
                )
        model.load_state_dict(fitting, strict=False)

    def notes(self, config: Config, data_info: dict[str, Any]) -> Iterator[str]:
        """Where the weights were trained for something else than this run. `data_info`: the run's
        data set."""
        with usable(self.source):
            before = dict(flatten(to_dict(from_dict(self.description["config"]))))
        now = dict(flatten(to_dict(config)))
        for key in _OF_THE_TASK:
            if before[key] != now[key]:
                yield f"the first weights were trained with {key}={before[key]}, this run has {now[key]}"
        was = self.description["data_info"]
        for key in ("kind", "encoders"):
            if was.get(key) and was[key] != data_info.get(key):
                yield f"the first weights are of data with {key}={was[key]}, these have {data_info.get(key)}"

    def _fitting(self, config: Config, model: nn.Module) -> dict[str, Tensor]:
        """The weights that the model gets, by name. Raises ConfigError where anything else does not
        fit it."""
        with usable(self.source):
            before = dict(flatten(to_dict(from_dict(self.description["config"]))))
        now = dict(flatten(to_dict(config)))
        # With another of these every shape fits, and the outputs mean something else.
        for key in _UNSEEN_IN_SHAPES:
            if before[key] != now[key]:
                raise ConfigError(
                    f"--train.init-from {self.source} has {key}={before[key]}, and this run "
                    f"{now[key]}; set --{key.replace('_', '-')} {before[key]}"
                )

        own = model.state_dict()
        self._check_new_parts(own.keys() | self.weights.keys())
        kept = {name: w for name, w in self.weights.items() if not is_part(name, self.new)}
        wrong = []
        for name in sorted(own.keys() | kept.keys()):
            there = tuple(kept[name].shape) if name in kept else None
            here = tuple(own[name].shape) if name in own else None
            if there != here and not is_part(name, self.new):
                wrong.append((name, there, here))
        if wrong:
            raise ConfigError(self._does_not_fit(wrong, before, now))
        return kept

    def _check_new_parts(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a part of train.init_new that is in neither network."""
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        for new in self.new:
            if not any(is_part(name, (new,)) for name in names):
                near = difflib.get_close_matches(new, parts, n=1)
                meant = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(
                    f"--train.init-new {new} is no part of the network; {meant}Its parts: "
                    f"{', '.join(parts)}"
                )

    def _does_not_fit(
        self,
        wrong: list[tuple[str, Any, Any]],
        before: dict[str, Any],
        now: dict[str, Any],
    ) -> str:
        """The error's text. `wrong`: (name, shape there, shape here); None where it is absent."""
        shown = []
        for name, there, here in wrong[:_NAMED]:
            shown.append(f"{name}: {there or 'absent'} there, {here or 'absent'} here")
        if len(wrong) > _NAMED:
            shown.append(f"and {len(wrong) - _NAMED} more")
        settings = []
        for key in sorted(now):
            if key.startswith("model.") and before.get(key) != now[key]:
                settings.append(f"{key}={before.get(key)} there, {now[key]} here")
        # Tens of names may be wrong, of two or three parts.
        parts = list(dict.fromkeys(_part_of(name) for name, _, _ in wrong))
        return (
            f"--train.init-from {self.source} does not fit this run's network:\n  "
            + "\n  ".join(shown)
            + "".join(f"\n  ({setting})" for setting in settings)
            + f"\ntake over its settings, or start these parts anew: --train.init-new {' '.join(parts)}"
        )


def is_part(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a weight belongs to one of these parts of the network: final_layer is one, and
    cross_attn one in every block."""
    return any(f".{part}." in f".{name}." for part in parts)


def _part_of(name: str) -> str:
    """The part to name for a weight: of a block its sublayer, elsewhere the top module."""
    first, *rest = name.split(".")
    return rest[1] if first == "blocks" and len(rest) > 1 else first


def check_resumed(config: Config, checkpoint: CheckpointDir) -> None:
    """Raise CheckpointError where the options name other first weights than the run in the
    checkpoint was started with. Weights that are gone or damaged by now are not needed any more."""
    wanted = config.train.init_from
    if wanted is None:
        return
    started = checkpoint.manifest()["state"].get("init") or {}
    # A run may have trained on since: what counts is the checkpoint that was taken.
    step = started["step"] if started and is_run(Path(wanted)) else None
    first = started | {"new": sorted(config.train.init_new)}
    try:
        first = FirstWeights.read(config, step).record()
    except CheckpointError:
        # A run that was started with random ones needs those that it is given now.
        if not started:
            raise
    for key in ("sha256", "new"):
        if started.get(key) != first[key]:
            raise CheckpointError(
                f"{checkpoint.path.parent.parent} was started with other first weights: "
                f"{_described(started)}, and --train.init-from {wanted} is {_described(first)}; "
                "leave the options out to resume it, or start another run with --output DIR"
            )


def _described(record: dict[str, Any]) -> str:
    if not record:
        return "random ones"
    new = f", new: {' '.join(record['new'])}" if record["new"] else ""
    return f"step {record['step']} of {record['name']} (sha256 {record['sha256'][:12]}{new})"


def started_from(record: dict[str, Any]) -> str:
    """A line of the log. `record`: `FirstWeights.record`."""
    return f"the first weights are those of {record['source']}: {_described(record)}"
