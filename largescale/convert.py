"""python -m largescale.convert SOURCE --out DIR: published weights become an export.

SOURCE: a file of weights of facebookresearch/DiT, fast-DiT, willisma/SiT, REPA or EDM (a state dict,
or a training's checkpoint); a DiT of diffusers, its pipeline's folder or its transformer's, or its
name on the hub; or a run or an export of largescale, also of an older version.

DIR gets model.safetensors and config.json, which eval.sample and further training take. What neither
the weights nor an option says is assumed, printed, and written down in config.json. Nothing is
unpickled that could run code.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from largescale.checkpoint.export_folder import (
    require_export_folder,
    require_writable_export,
    write_export,
)
from largescale.checkpoint.weights import EXPORT_CONFIG, EXPORT_WEIGHTS
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.errors import ConfigError
from largescale.interop.choices import Choices
from largescale.interop.model_card import remove_card
from largescale.interop.names import listed
from largescale.interop.sources import Converted, read_source


@dataclass(frozen=True, kw_only=True)
class Convert(Choices):
    source: Annotated[str, tyro.conf.Positional]
    """A file of weights, a folder in diffusers' layout, a name on the hub such as
    facebook/DiT-XL-2-256, or a run or export of largescale."""
    out: Path
    """The folder to write to."""
    step: int | None = None
    """The step of a run's checkpoint; by default the newest valid one."""

    def check(self) -> None:
        """Raises ConfigError, or an error of --out, before any work is done."""
        check_counts(self, "num_heads")
        if self.class_dropout_prob is not None and not 0 <= self.class_dropout_prob < 1:
            raise ConfigError(
                f"class_dropout_prob={self.class_dropout_prob} must be in [0, 1); set "
                "--class-dropout-prob"
            )
        require_export_folder(self.out)
        require_writable_export(self.out)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Convert, args, program="largescale.convert", description=__doc__)
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Convert) -> None:
    options.check()
    converted = read_source(options.source, options, options.step)
    write_export(options.out, converted.weights, converted.description)
    # A card from before is of other weights.
    remove_card(options.out)
    report(options, converted)


def report(options: Convert, converted: Converted) -> None:
    """Print what was converted, and what had to be assumed."""
    parameters = sum(tensor.numel() for tensor in converted.weights.values())
    which = converted.description.get("converted", {}).get("weights", "ema")
    print(f"{options.source}: {converted.format}, {parameters:,} values, weights: {which}")
    for key, why in converted.assumed.items():
        print(f"assumed: {key}: {why}")
    if converted.left_out:
        print(f"left out: {listed(converted.left_out)}")
    out = options.out
    print(f"weights: {out / EXPORT_WEIGHTS}, config: {out / EXPORT_CONFIG}")


if __name__ == "__main__":
    sys.exit(main())
